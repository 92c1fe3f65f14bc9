"""Every RPC of understudy.v1 against the running server."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from tests.server_process import ServerProcess
from understudy.v1 import inference_service_pb2 as pb
from understudy.v1 import inference_service_pb2_grpc as stubs


@pytest.fixture
def inference(server: ServerProcess):
    with grpc.insecure_channel(server.address) as channel:
        yield stubs.InferenceServiceStub(channel)


def test_embed_gives_unit_vectors(inference: stubs.InferenceServiceStub) -> None:
    response = inference.Embed(pb.EmbedRequest(texts=["the card is lost", "money", ""]))
    vectors = [np.array(one.embedding, np.float32) for one in response.results]
    assert [len(one) for one in vectors] == [32, 32, 0]
    assert np.allclose([np.linalg.norm(one) for one in vectors[:2]], 1, atol=1e-5)
    assert response.results[2].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert response.model.name == "embedder"
