"""Bytes that are no message get INVALID_ARGUMENT with the field; bytes that are one reach the method unchanged."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from server.api import wire
from server.errors import InvalidArgument, UnderstudyError
from understudy.v1 import inference_service_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"]
TEXTS = b"\x12\x02ok"  # EmbedRequest.texts, once


@pytest.mark.parametrize(
    ("data", "field", "says"),
    [
        (TEXTS + b"\x12\x02\xff\xfe", "texts[1]", "UTF-8"),
        (b"\x0a\x04\x0a\x02\xc3\x28", "model.name", "UTF-8"),
        (TEXTS + b"\x12\x7fx", "texts[1]", "127 bytes are announced and 1 are there"),
        (b"\x18", "truncate", "ends inside a number"),
        (b"\x18" + b"\xff" * 11, "truncate", "longer than 10 bytes"),
        (b"\x00\x00", "", "impossible number 0"),
        (b"\x1f", "truncate", "wire type 7"),
        (b"\x1c", "truncate", "a group ends"),
        (b"\xfb\x01", "#31", "does not end"),
    ],
)
def test_says_which_field_is_broken(data: bytes, field: str, says: str) -> None:
    with pytest.raises(DecodeError):
        pb.EmbedRequest.FromString(data)
    with pytest.raises(InvalidArgument, match=says) as caught:
        wire.parse(pb.EmbedRequest, data)
    assert caught.value.metadata.get("field", "") == field
    assert 0 <= int(caught.value.metadata["offset"]) <= len(data)


def test_whatever_protobuf_refuses_is_an_invalid_argument_of_ours() -> None:
    rng = random.Random(7)
    whole = pb.RunRequest(skill="s", inputs=[{"text": "naïve"}, {"pair": {"text": "a", "text_pair": "b"}}], user="u").SerializeToString()
    refused = 0
    for _ in range(3000):
        data = bytearray(whole[: rng.randrange(len(whole) + 1)])
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            pb.RunRequest.FromString(bytes(data))
        except DecodeError:
            refused += 1
            with pytest.raises(InvalidArgument):
                wire.parse(pb.RunRequest, bytes(data))
            assert wire.explain(pb.RunRequest.DESCRIPTOR, bytes(data)) is not None, bytes(data)
        else:
            assert wire.explain(pb.RunRequest.DESCRIPTOR, bytes(data)) is None, bytes(data)
    assert refused > 500


def test_deep_nesting_ends_without_a_stack_overflow() -> None:
    assert wire.explain(health_pb2.HealthCheckRequest.DESCRIPTOR, b"\x7b" * 5000) is not None


class _Codes:
    """The smallest guard: the class of the error becomes the code."""

    def unary(self, method: str, call: wire.Unary) -> wire.Unary:
        async def guarded(data: bytes, context: wire.Context) -> bytes:
            try:
                return await call(data, context)
            except UnderstudyError as error:
                await context.abort(grpc.StatusCode[error.code], error.message)

        return guarded

    def stream(self, method: str, call: wire.Stream) -> wire.Stream:
        async def guarded(data: Any, context: wire.Context) -> AsyncIterator[bytes]:
            try:
                async for response in call(data, context):
                    yield response
            except UnderstudyError as error:
                await context.abort(grpc.StatusCode[error.code], error.message)

        return guarded

    def took(self, request: Any) -> None:
        pass


class _Servicer:
    async def Embed(self, request: pb.EmbedRequest, context: wire.Context) -> pb.EmbedResponse:
        return pb.EmbedResponse(model={"name": ",".join(request.texts)})

    @wire.raw
    async def Classify(self, request: bytes, context: wire.Context) -> bytes:
        assert isinstance(request, bytes)
        return pb.ClassifyResponse(model={"name": str(len(request))}).SerializeToString()


@pytest.mark.asyncio
async def test_methods_over_the_wire() -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([wire.handlers(SERVICE, _Servicer(), _Codes())])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

        async def call(method: str, data: bytes) -> bytes:
            return await channel.unary_unary(f"/{SERVICE.full_name}/{method}")(data, timeout=10)

        answer = pb.EmbedResponse.FromString(await call("Embed", pb.EmbedRequest(texts=["a", "b"]).SerializeToString()))
        assert answer.model.name == "a,b"
        assert pb.ClassifyResponse.FromString(await call("Classify", b"\xff" * 9)).model.name == "9"
        for method, data, code in [("Embed", b"\x12\x01\xff", "INVALID_ARGUMENT"), ("Rerank", b"", "UNIMPLEMENTED")]:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(method, data)
            assert caught.value.code().name == code
    await server.stop(0)
