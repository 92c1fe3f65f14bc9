"""What the tests of keys share: calls by path with a key, and databases of a test's own."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2, status_pb2

from server.api.open_inference import SERVICE as OPEN_INFERENCE
from understudy.v1 import (
    admin_service_pb2,
    ensemble_service_pb2,
    feedback_service_pb2,
    inference_service_pb2,
    model_service_pb2,
    skill_service_pb2,
    stats_service_pb2,
    training_service_pb2,
)

# What a test waits for at most, in seconds: all of it takes moments on a machine that is not overloaded.
SOON_S = 30.0
FILES = (
    admin_service_pb2,
    ensemble_service_pb2,
    feedback_service_pb2,
    inference_service_pb2,
    model_service_pb2,
    skill_service_pb2,
    stats_service_pb2,
    training_service_pb2,
)


def until(answer: Callable[[], object], wanted: object) -> float:
    """Asks until the answer is this one; the seconds that it took."""
    began = time.monotonic()
    while (found := answer()) != wanted:
        assert time.monotonic() - began < SOON_S, found
        time.sleep(0.02)
    return time.monotonic() - began


class Answer(NamedTuple):
    """How a call ended: `code` by name, and of a refusal its reason and metadata."""

    code: str
    reason: str = ""
    metadata: Mapping[str, str] = MappingProxyType({})
    message: str = ""
    retry_s: float | None = None
    data: bytes = b""


def services() -> list[Any]:
    """The descriptors of all that asks for keys."""
    return [service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()] + [OPEN_INFERENCE]


def methods() -> list[MethodDescriptor]:
    """All their methods."""
    return [method for service in services() for method in service.methods]


def path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def call(
    channel: grpc.Channel, path: str, key: str | None = None, request: Any = None, *, metadata: Sequence[tuple[str, str]] = ()
) -> Answer:
    """One call by its path; `request` a message, or None for an empty one."""
    method = descriptor_pool.Default().FindMethodByName(path.removeprefix("/").replace("/", "."))  # type: ignore[no-untyped-call]
    data = b"" if request is None else request.SerializeToString()
    sent = (*metadata, *((("authorization", f"Bearer {key}"),) if key is not None else ()))
    raw: Any = channel
    try:
        if method.client_streaming:
            answers = list(raw.stream_stream(path)(iter([data]), metadata=sent, timeout=30))
        elif method.server_streaming:
            answers = list(raw.unary_stream(path)(data, metadata=sent, timeout=30))
        else:
            answers = [raw.unary_unary(path)(data, metadata=sent, timeout=30)]
    except grpc.RpcError as error:
        return refusal(error)
    return Answer("OK", data=b"".join(answers))


def refusal(error: Any) -> Answer:
    """What a refused call says."""
    full = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            full.ParseFromString(value)
    return of_status(error.code().name, full, error.details())


def of_status(code: str, full: status_pb2.Status, message: str) -> Answer:
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    found = {kind: any(detail.Unpack(kind_of) for detail in full.details) for kind, kind_of in (("info", info), ("retry", retry))}
    wait = retry.retry_delay.ToMilliseconds() / 1000 if found["retry"] else None
    return Answer(code, info.reason, dict(info.metadata), message, wait)


@contextmanager
def own_database(url: str) -> Iterator[str]:
    """On PostgreSQL, which all tests share, a database of its own: keys of other tests would be keys here. On SQLite the file is."""
    if url.startswith("sqlite"):
        yield url
        return
    from sqlalchemy import create_engine, make_url

    name = f"keys{secrets.token_hex(6)}"
    owner = create_engine(url, isolation_level="AUTOCOMMIT")
    with owner.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield make_url(url).set(database=name).render_as_string(hide_password=False)
    finally:
        with owner.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        owner.dispose()
