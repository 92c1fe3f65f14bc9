"""The tree of errors and its way to google.rpc.Status."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from server import errors
from server.api.status import DOMAIN, MAX_DETAILS, grpc_code, to_status, trailers
from understudy.v1 import error_reason_pb2


def tree(root: type[errors.UnderstudyError] = errors.UnderstudyError) -> Iterator[type[errors.UnderstudyError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def detail(status: status_pb2.Status, kind: type) -> object:
    for one in status.details:
        message = kind()
        if one.Unpack(message):
            return message
    return None


@pytest.mark.parametrize("error_class", sorted(set(tree()), key=lambda one: one.__name__), ids=lambda one: one.__name__)
def test_every_class_has_a_reason_and_a_code(error_class: type[errors.UnderstudyError]) -> None:
    assert f"ERROR_REASON_{error_class.reason}" in error_reason_pb2.ErrorReason.keys()  # noqa: SIM118
    status = to_status(error_class("what happened", model="m"), "id-1")
    assert grpc_code(status.code).name == error_class.code
    info = detail(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain, dict(info.metadata)) == (error_class.reason, DOMAIN, {"model": "m"})
    assert detail(status, error_details_pb2.RequestInfo).request_id == "id-1"


def test_every_reason_is_used() -> None:
    used = {f"ERROR_REASON_{one.reason}" for one in tree()}
    assert set(error_reason_pb2.ErrorReason.keys()) - used == {"ERROR_REASON_UNSPECIFIED"}


def test_retry_and_field_become_details() -> None:
    status = to_status(errors.Overloaded("full", retry_after_s=1.5), "id")
    delay = detail(status, error_details_pb2.RetryInfo).retry_delay
    assert delay.ToMilliseconds() == 1500
    status = to_status(errors.InvalidArgument("bad", field="texts[0]"), "id")
    violation = detail(status, error_details_pb2.BadRequest).field_violations[0]
    assert (violation.field, violation.description) == ("texts[0]", "bad")


def test_a_foreign_exception_shows_nothing_but_the_request_id() -> None:
    status = to_status(RuntimeError("the password is 1234"), "id-7")
    assert grpc_code(status.code) is grpc.StatusCode.INTERNAL
    assert "1234" not in str(status) and "id-7" in status.message


def test_hostile_names_do_not_outgrow_the_trailers() -> None:
    error = errors.ModelNotFound("x" * 100_000 + "\ud800", **{f"k{i}": "y" * 10_000 for i in range(100)})
    assert sum(len(value) for _, value in trailers(to_status(error, "id"))) <= MAX_DETAILS
