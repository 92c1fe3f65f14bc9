"""What a call can raise, as one tree.

UnderstudyError
├── InvalidArgument        the request is wrong; `field` names the part; sending it again cannot help
├── NotFound
├── AlreadyExists
├── FailedPrecondition     right request, wrong state, e.g. the model is not loaded
├── ResourceExhausted      not now; `retry_after_s` says when
├── DeadlineExceeded
├── Cancelled
├── Unavailable            no server answered, or it is stopping
├── Unimplemented
├── Unauthenticated
├── PermissionDenied
├── ServerError            a defect of the server; give `request_id` to its operator
└── ItemErrors             some items of a batch failed; `errors` has each, `results` the others' values
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2

if TYPE_CHECKING:
    from understudy.results import Results

_DETAILS_KEY = "grpc-status-details-bin"
_REQUEST_ID_KEY = "x-request-id"


class UnderstudyError(Exception):
    """Base of the tree.

    `code` is gRPC's canonical name ("NOT_FOUND"), `reason` the server's own, finer one ("MODEL_NOT_FOUND"; empty where the server did not
    answer), `metadata` what varies in the message, `retry_after_s` the wait that the server asks for.
    """

    code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    @property
    def field(self) -> str:
        """The part of the request that is to blame, or "" where none is named."""
        return self.metadata.get("field", "")


class InvalidArgument(UnderstudyError):
    code = "INVALID_ARGUMENT"


class NotFound(UnderstudyError):
    code = "NOT_FOUND"


class AlreadyExists(UnderstudyError):
    code = "ALREADY_EXISTS"


class FailedPrecondition(UnderstudyError):
    code = "FAILED_PRECONDITION"


class ResourceExhausted(UnderstudyError):
    code = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(UnderstudyError):
    code = "DEADLINE_EXCEEDED"


class Cancelled(UnderstudyError):
    code = "CANCELLED"


class Unavailable(UnderstudyError):
    code = "UNAVAILABLE"


class Unimplemented(UnderstudyError):
    code = "UNIMPLEMENTED"


class Unauthenticated(UnderstudyError):
    code = "UNAUTHENTICATED"


class PermissionDenied(UnderstudyError):
    code = "PERMISSION_DENIED"


class ServerError(UnderstudyError):
    code = "INTERNAL"


class ItemErrors(UnderstudyError):
    """Some items failed. `errors` maps each one's index to its error; `results` has all, also the values of those that did not fail."""

    def __init__(self, errors: Mapping[int, UnderstudyError], results: Results[Any]) -> None:
        first = min(errors)
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        message = f"{len(errors)} of {len(results)} items failed; item {first}: {errors[first].message}{more}"
        super().__init__(message, reason=errors[first].reason, metadata=errors[first].metadata)
        self.code = errors[first].code
        self.errors = dict(errors)
        self.results = results


_BY_CODE: dict[str, type[UnderstudyError]] = {
    cls.code: cls
    for cls in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        ResourceExhausted,
        DeadlineExceeded,
        Cancelled,
        Unavailable,
        Unimplemented,
        Unauthenticated,
        PermissionDenied,
        ServerError,
    )
}
_BY_CODE |= {"OUT_OF_RANGE": InvalidArgument, "ABORTED": FailedPrecondition, "DATA_LOSS": ServerError, "UNKNOWN": ServerError}


def from_status(status: status_pb2.Status, request_id: str = "") -> UnderstudyError:
    """The error that a `google.rpc.Status` describes: of a whole call, or of one item."""
    reason, metadata, retry_after_s = "", {}, None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif detail.Is(error_details_pb2.RequestInfo.DESCRIPTOR):
            info = error_details_pb2.RequestInfo()
            detail.Unpack(info)
            request_id = info.request_id
    name = code_pb2.Code.Name(status.code) if status.code in code_pb2.Code.values() else "UNKNOWN"
    return _make(name, status.message, reason, metadata, request_id, retry_after_s)


def from_rpc_error(error: Any) -> UnderstudyError:
    """The error that gRPC raised, with the server's details where it sent some. Takes grpc.RpcError of both kinds of channel."""
    code: grpc.StatusCode = error.code()
    request_id = ""
    trailers: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == _REQUEST_ID_KEY:
            request_id = str(value)
    for key, value in trailers:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                status = status_pb2.Status.FromString(value)
            except ValueError:  # DecodeError: a proxy's, not the server's
                break
            return from_status(status, request_id)
    return _make(code.name, error.details() or code.name, "", {}, request_id, None)


def _make(
    code: str, message: str, reason: str, metadata: Mapping[str, str], request_id: str, retry_after_s: float | None
) -> UnderstudyError:
    cls = _BY_CODE.get(code, ServerError)
    error = cls(message, reason=reason, metadata=metadata, request_id=request_id, retry_after_s=retry_after_s)
    error.code = code
    return error
