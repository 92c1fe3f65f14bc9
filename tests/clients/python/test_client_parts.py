"""Retries, TLS and conversions of the Python client, against gRPC servers of the test's own."""

from __future__ import annotations

import datetime
import ipaddress
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from understudy import convert, errors
from understudy.aio import AsyncClient
from understudy.client import Client, RetryPolicy, Tls
from understudy.v1 import inference_pb2 as items
from understudy.v1 import inference_service_pb2 as pb

ANSWER = pb.EmbedResponse(results=[items.EmbedResult(embedding=[1.0, 2.0])]).SerializeToString()


@contextmanager
def answering(handler: Callable[[bytes, grpc.ServicerContext], bytes], credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """A gRPC server whose Embed is `handler`."""
    server = grpc.server(ThreadPoolExecutor(4))
    table = {"Embed": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("understudy.v1.InferenceService", table)])
    port = server.add_secure_port("127.0.0.1:0", credentials) if credentials else server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0)


def failing(times: int, code: grpc.StatusCode, retry_after_s: float | None = None) -> tuple[Callable[..., bytes], list[float]]:
    """A handler that fails so many times before it answers, and the times of the calls that it saw."""
    calls: list[float] = []

    def handle(_request: bytes, context: grpc.ServicerContext) -> bytes:
        calls.append(time.monotonic())
        if len(calls) > times:
            return ANSWER
        status = status_pb2.Status(code=code.value[0], message="not now")
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason="OVERLOADED", metadata={"limit": "1"}))
        if retry_after_s is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(int(retry_after_s * 1e9))
            status.details.add().Pack(retry)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(code, "not now")
        raise AssertionError

    return handle, calls


def test_unavailable_is_sent_again_until_it_answers() -> None:
    handle, calls = failing(3, grpc.StatusCode.UNAVAILABLE)
    with answering(handle) as address, Client(address, retry=RetryPolicy(attempts=5, initial_s=0.01)) as client:
        assert client.embed(["a"]).tolist() == [[1.0, 2.0]]
    assert len(calls) == 4


def test_a_full_server_is_asked_again_when_it_said() -> None:
    handle, calls = failing(1, grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=0.2)
    with answering(handle) as address, Client(address, retry=RetryPolicy(initial_s=0.01)) as client:
        client.embed(["a"])
    assert calls[1] - calls[0] >= 0.2


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL])
def test_final_errors_are_not_sent_again(code: grpc.StatusCode) -> None:
    handle, calls = failing(9, code)
    with answering(handle) as address, Client(address) as client, pytest.raises(errors.UnderstudyError) as caught:
        client.embed(["a"])
    assert len(calls) == 1
    assert (caught.value.code, caught.value.reason, caught.value.metadata) == (code.name, "OVERLOADED", {"limit": "1"})


def test_no_wait_outlives_the_deadline() -> None:
    handle, calls = failing(9, grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=30)
    with answering(handle) as address, Client(address) as client:
        start = time.monotonic()
        with pytest.raises(errors.ResourceExhausted) as caught:
            client.embed(["a"], timeout_s=2)
        assert time.monotonic() - start < 1.5
    assert caught.value.retry_after_s == 30
    assert len(calls) == 1


async def test_aio_retries_too() -> None:
    handle, calls = failing(2, grpc.StatusCode.UNAVAILABLE, retry_after_s=0.01)
    with answering(handle) as address:
        async with AsyncClient(address, retry=RetryPolicy(initial_s=0.01)) as client:
            assert (await client.embed(["a"])).shape == (1, 2)
    assert len(calls) == 3


def test_delays_grow_have_jitter_and_end() -> None:
    policy = RetryPolicy(attempts=4, initial_s=0.1, max_s=0.3)
    error = errors.Unavailable("x")
    for attempt, longest in ((1, 0.1), (2, 0.2), (3, 0.3)):
        seen = [policy.delay(error, attempt, 10) for _ in range(50)]
        assert all(wait is not None and longest / 2 <= wait <= longest for wait in seen)
        assert len(set(seen)) > 40
    assert policy.delay(error, 4, 10) is None
    assert policy.delay(error, 1, 0.01) is None


def certificate(folder: Path, name: str, issuer: Any = None, *, authority: bool = False) -> Any:
    """Writes `<name>.pem` and `<name>.key`; returns (certificate, key) for the next."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signer, signing_key = (issuer[0].subject, issuer[1]) if issuer else (subject, key)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(signing_key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}.key").write_bytes(private)
    return made, key


async def test_tls_and_mutual_tls(tmp_path: Path) -> None:
    ca = certificate(tmp_path, "ca", authority=True)
    certificate(tmp_path, "server", ca)
    certificate(tmp_path, "client", ca)
    pair = [((tmp_path / "server.key").read_bytes(), (tmp_path / "server.pem").read_bytes())]
    root = (tmp_path / "ca.pem").read_bytes()
    one_way = Tls(ca_file=str(tmp_path / "ca.pem"))
    both_ways = Tls(ca_file=str(tmp_path / "ca.pem"), cert_file=str(tmp_path / "client.pem"), key_file=str(tmp_path / "client.key"))
    seen: list[dict[str, Any]] = []

    def handle(_request: bytes, context: grpc.ServicerContext) -> bytes:
        seen.append(dict(context.invocation_metadata()))
        return ANSWER

    once = RetryPolicy(attempts=1)
    with answering(handle, grpc.ssl_server_credentials(pair)) as address:
        with Client(address, tls=one_way, api_key="secret", metadata=[("x-team", "search")]) as client:
            client.embed(["a"], request_id="r1")
        assert seen[0]["authorization"] == "Bearer secret"
        assert (seen[0]["x-team"], seen[0]["x-request-id"]) == ("search", "r1")
        with Client(address, retry=once) as client, pytest.raises(errors.Unavailable):
            client.embed(["a"])
    with answering(handle, grpc.ssl_server_credentials(pair, root, require_client_auth=True)) as address:
        with Client(address, tls=one_way, retry=once) as client, pytest.raises(errors.Unavailable):
            client.embed(["a"])
        async with AsyncClient(address, tls=both_ways) as other:
            assert (await other.embed(["a"])).shape == (1, 2)
    with pytest.raises(ValueError, match="both or neither"):
        Client("x", tls=Tls(cert_file="only.pem"))


def test_vectors_are_read_from_the_wire_as_protobuf_reads_them() -> None:
    rng = random.Random(3)
    for _ in range(300):
        response = pb.EmbedResponse(model={"name": "m", "version": "2"}, usage={"input_tokens": rng.randrange(1000)})
        for _ in range(rng.randrange(6)):
            kind = rng.randrange(4)
            result = response.results.add(embedding=[] if kind == 0 else [rng.uniform(-1, 1) for _ in range(rng.randrange(300))])
            if kind == 1:
                result.truncated = True
            if kind == 2:
                result.ClearField("embedding")
                result.error.code, result.error.message = 3, "bad"
        response.timings.run.nanos = 5_000_000
        data = response.SerializeToString()
        found = convert.embeddings(data)
        assert (found.model, found.version, found.usage.input_tokens) == ("m", "2", response.usage.input_tokens)
        assert found.timings.run == pytest.approx(0.005)
        assert len(found) == len(response.results)
        for got, want in zip(found.items, response.results, strict=True):
            if want.HasField("error"):
                assert isinstance(got, errors.InvalidArgument)
            else:
                assert not isinstance(got, errors.UnderstudyError)
                np.testing.assert_array_equal(got.vector, np.array(want.embedding, np.float32))
                assert got.truncated == want.truncated


def test_run_inputs_and_answers() -> None:
    assert convert.run_input("a").text == "a"
    assert convert.run_input(("a", "b")).pair.text_pair == "b"
    assert convert.run_input([{"role": "user", "content": "hi"}]).chat.messages[0].content == "hi"
    response = pb.RunResponse(
        results=[
            items.RunResult(
                output_text="card",
                labels=[items.Label(name="card", score=0.9)],
                decision=items.Decision(
                    skill="s", candidate="local:s@1", local=True, hops=[items.Hop(candidate="local:s@1", outcome="delivered")]
                ),
                quality=0.5,
                cost={"micro_usd": 1_500_000},
                interaction_id="i1",
            ),
            items.RunResult(error={"code": 14, "message": "all failed"}),
        ]
    )
    found = convert.run_answers(response.SerializeToString())
    assert (found[0].text, found[0].local, found[0].quality, found[0].cost_usd, found[0].interaction_id) == ("card", True, 0.5, 1.5, "i1")
    assert found[0].hops[0].quality is None
    assert isinstance(found.errors[1], errors.Unavailable)
