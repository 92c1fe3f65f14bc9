"""FeedbackService of the real server: what is refused, what is kept once, and how it is read again, by gRPC and by the clients."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from server.api.feedback import FeedbackServicer
from server.config import load_config
from server.lake import table
from server.lake.ids import IdKey
from server.lake.lake import Lake
from server.lake.reading import LakeReader
from server.lake.schema import FEEDBACK
from server.registry.registry import Registry
from tests.conftest import StartServer
from tests.server_process import ServerProcess
from understudy.aio import AsyncClient
from understudy.client import Client, Feedback
from understudy.errors import UnderstudyError
from understudy.v1 import feedback_pb2
from understudy.v1 import feedback_service_pb2 as pb
from understudy.v1.feedback_service_pb2_grpc import FeedbackServiceStub


@pytest.fixture
def served(start_server: StartServer, tmp_path: Path) -> ServerProcess:
    return start_server(f"""
[lake]
path = {json.dumps(str(tmp_path / "lake"))}
flush_s = 0.2
[registry]
url = {json.dumps(f"sqlite:///{tmp_path / 'registry.db'}")}
""")


@pytest.fixture
def known(served: ServerProcess, tmp_path: Path) -> Iterator[str]:
    yield IdKey.open(tmp_path / "lake" / "id.key").new()


def refused(call: Any) -> tuple[str, str]:
    """The code's name and the field."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)
    assert status is not None
    from google.rpc import error_details_pb2

    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    return caught.value.code().name, info.metadata.get("field", "")


def test_feedback_from_its_sender_to_its_reader(served: ServerProcess, known: str, tmp_path: Path) -> None:
    other = IdKey.open(tmp_path / "lake" / "id.key").new()
    with grpc.insecure_channel(served.address) as channel, Client(served.address) as client:
        stub = FeedbackServiceStub(channel)

        def create(**fields: Any) -> pb.CreateFeedbackRequest:
            return pb.CreateFeedbackRequest(feedback=feedback_pb2.Feedback(**{"interaction_id": known, **fields}))

        for fields, wrong in [
            ({"metrics": {"a b": 1.0}}, "feedback.metrics"),
            ({"metrics": {"": 1.0}}, "feedback.metrics"),
            ({"metrics": {"x" * 65: 1.0}}, "feedback.metrics"),
            ({"metrics": {"a": float("nan")}}, "feedback.metrics"),
            ({"metrics": {"a": float("inf")}}, "feedback.metrics"),
            ({"metrics": {f"m{n}": 1.0 for n in range(33)}}, "feedback.metrics"),
            ({"rating": 6}, "feedback.rating"),
            ({"correction": "x" * 17_000}, "feedback.correction"),
            ({"interaction_id": ""}, "feedback.interaction_id"),
            ({}, "feedback"),
        ]:
            assert refused(lambda fields=fields: stub.CreateFeedback(create(**fields), timeout=10)) == ("INVALID_ARGUMENT", wrong)
        assert refused(lambda: stub.CreateFeedback(create(interaction_id="a" * 32, rating=1), timeout=10))[0] == "NOT_FOUND"

        batch = pb.BatchCreateFeedbackRequest(requests=[create(rating=5), create(rating=9)])
        code, field = refused(lambda: stub.BatchCreateFeedback(batch, timeout=10))
        assert (code, field) == ("INVALID_ARGUMENT", "requests[1].feedback.rating"), "and of the first nothing is kept"
        batch = pb.BatchCreateFeedbackRequest(requests=[create(rating=5), create(rating=4, interaction_id="a" * 32)])
        assert refused(lambda: stub.BatchCreateFeedback(batch, timeout=10)) == ("NOT_FOUND", "requests[1].feedback.interaction_id")
        for count in (0, 1001):
            batch = pb.BatchCreateFeedbackRequest(requests=[create(rating=5)] * count)
            assert refused(lambda batch=batch: stub.BatchCreateFeedback(batch, timeout=10)) == ("INVALID_ARGUMENT", "requests")

        first = client.feedback(known, thumb="down", metrics={"resolved": 0, "latency/s": 1.5}, user="ada")
        many = client.feedback_many([
            Feedback(known, correction="transfer", request_id="once"),
            Feedback(known, correction="transfer", request_id="once"),
            Feedback(other, rating=5),
            Feedback(known, metrics={"resolved": 1}, comment="sorted out"),
        ])  # fmt: skip
        assert many[0] == many[1] and len({first, *many}) == 4
        assert client.feedback_many([Feedback(known, rating=1, request_id="once")]) == many[:1], "what was kept first stays"

        found = [None]
        end = time.monotonic() + 30
        while len(found) < 3 and time.monotonic() < end:
            found = client.list_feedback(known)
        assert [one.feedback_id for one in found] == [first, many[0], many[3]]
        assert found[0].metrics == {"resolved": 0, "latency/s": 1.5} and found[0].thumb == "down"
        assert found[1].correction == "transfer" and found[1].rating is None and found[2].comment == "sorted out"
        page = stub.ListFeedback(pb.ListFeedbackRequest(interaction_id=known, page_size=2), timeout=10)
        rest = stub.ListFeedback(pb.ListFeedbackRequest(interaction_id=known, page_size=2, page_token=page.next_page_token), timeout=10)
        assert [one.feedback_id for one in (*page.feedback, *rest.feedback)] == [first, many[0], many[3]] and not rest.next_page_token
        with pytest.raises(UnderstudyError, match="No interaction"):
            client.list_feedback("a" * 32)

        async def asynchronously() -> list[str]:
            async with AsyncClient(served.address) as again:
                await again.feedback_many([Feedback(other, thumb="up", user="ada")])
                return [one.feedback_id for one in await again.list_feedback(known)]

        assert asyncio.run(asynchronously()) == [first, many[0], many[3]]
    served.stop()
    rows = table.read(tmp_path / "lake", FEEDBACK).to_pylist()
    ada = IdKey.open(tmp_path / "lake" / "id.key").pseudonym("ada")
    assert sorted(row["user_hash"] or "" for row in rows) == ["", "", "", ada, ada], "a user's feedback can be found, by the hash alone"


def test_an_observer_hears_of_new_feedback_once(tmp_path: Path) -> None:
    config = load_config(flags={"lake.path": str(tmp_path / "lake"), "registry.url": f"sqlite:///{tmp_path}/registry.db"}, environ={})
    registry = Registry(config.registry)
    lake = Lake(tmp_path / "lake")
    heard: list[tuple[str, int | None, str | None, str | None]] = []

    class Observer:
        def feedback_kept(self, interaction_id: str, *, rating: int | None, thumb: str | None, correction: str | None) -> None:
            heard.append((interaction_id, rating, thumb, correction))

    servicer = FeedbackServicer(lake, registry, LakeReader(config, registry), observer=Observer())
    key = lake.ids.new()
    said = feedback_pb2.Feedback(interaction_id=key, rating=2, thumb=feedback_pb2.THUMB_DOWN, correction="card")
    request = pb.CreateFeedbackRequest(feedback=said, request_id="r1")

    async def run() -> None:
        await servicer.CreateFeedback(request, None)  # type: ignore[arg-type]
        await servicer.CreateFeedback(request, None)  # type: ignore[arg-type]

    asyncio.run(run())
    lake.close()
    registry.close()
    assert heard == [(key, 2, "down", "card")]
