"""Exceptions to `google.rpc.Status`: the one place where the tree of server/errors.py meets gRPC.

Every status has one ErrorInfo{reason, domain, metadata}; with `field` in the metadata a BadRequest, with `retry_after_s` a RetryInfo, and a
RequestInfo with the request's id. An exception that is none of ours becomes INTERNAL, and says nothing but that id.
"""

from __future__ import annotations

import grpc
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from server.errors import InternalError, InvalidArgument, UnderstudyError

DOMAIN = "understudy.dev"
DETAILS_KEY = "grpc-status-details-bin"
# A status travels in HTTP/2 trailers, of which clients take 8 KiB; hostile names must not make it larger.
MAX_MESSAGE = 1000
MAX_VALUE = 200
MAX_ENTRIES = 12
MAX_DETAILS = 4096


def to_error(error: BaseException, request_id: str = "") -> UnderstudyError:
    """Ours as it is; anything else becomes an InternalError without detail."""
    if isinstance(error, UnderstudyError):
        return error
    return InternalError(f"the server failed on this request; its log has the reason under the request id {request_id or '(none)'}.")


def to_status(error: BaseException, request_id: str = "") -> status_pb2.Status:
    """The status of a whole call (with RequestInfo) or, without `request_id`, of one item."""
    ours = to_error(error, request_id)
    message = _clip(ours.message, MAX_MESSAGE)
    status = status_pb2.Status(code=code_pb2.Code.Value(ours.code), message=message)
    metadata = {key[:63]: _clip(value, MAX_VALUE) for key, value in list(ours.metadata.items())[:MAX_ENTRIES]}
    _add(status, error_details_pb2.ErrorInfo(reason=ours.reason, domain=DOMAIN, metadata=metadata))
    if ours.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(max(ours.retry_after_s, 0.0) * 1e9))
        _add(status, retry)
    if isinstance(ours, InvalidArgument) and metadata.get("field"):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=metadata["field"], description=_clip(message, MAX_VALUE), reason=ours.reason
        )
        _add(status, error_details_pb2.BadRequest(field_violations=[violation]))
    if request_id:
        _add(status, error_details_pb2.RequestInfo(request_id=request_id))
    return status


def trailers(status: status_pb2.Status) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata that carries the details of `status`."""
    packed = status.SerializeToString()
    if len(packed) > MAX_DETAILS:
        short = status_pb2.Status(code=status.code, message=_clip(status.message, MAX_VALUE), details=status.details[:1])
        packed = short.SerializeToString()
    return ((DETAILS_KEY, packed),)


def grpc_code(code: int | str) -> grpc.StatusCode:
    """The enum member for a canonical code, by name or number."""
    return grpc.StatusCode[code if isinstance(code, str) else code_pb2.Code.Name(code)]


def _add(status: status_pb2.Status, detail: Message) -> None:
    status.details.add().Pack(detail)


def _clip(text: str, limit: int) -> str:
    """At most `limit` characters, and nothing that UTF-8 cannot carry: input may hold lone surrogates."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= limit else text[: limit - 3] + "..."
