"""Everything that can go wrong, as one tree; the edge maps it to gRPC, nothing below knows of gRPC.

UnderstudyError
├── InvalidArgument          the request itself is wrong; sending it again cannot help
│   ├── InputTooLong             an item has more tokens than the model takes, and truncation was not asked for
│   ├── InvalidTensor            a raw tensor's name, dtype, shape or content is not what the model takes
│   └── RequestTooLarge          more items, bytes or pairs in one call than the limit
├── NotFound
│   ├── ModelNotFound
│   ├── VersionNotFound
│   ├── SkillNotFound
│   ├── AdapterNotFound
│   ├── InteractionNotFound
│   ├── JobNotFound
│   └── ApiKeyNotFound
├── AlreadyExists
├── FailedPrecondition       right request, wrong state
│   ├── ModelNotLoaded
│   ├── ModelInUse               e.g. deleting a version that is loaded
│   ├── TaskNotSupported         the model exists but does another task
│   ├── ModelRejected            a model's files are broken, altered or hostile; whatever ran before still runs
│   │   └── ManifestInvalid
│   └── TooLittleData            the trainer has fewer rows than it needs
├── ResourceExhausted        the answer is "not now"; carries `retry_after_s`
│   ├── Overloaded               a queue is full
│   ├── RateLimited              a key's calls come faster than it may
│   ├── BudgetExceeded
│   └── OutOfMemory
├── DeadlineExceeded         the caller's deadline passed; says at which stage
├── Cancelled                the caller left
├── Unavailable
│   ├── Draining                 the server is stopping
│   └── ProviderUnavailable      every candidate failed
├── Unimplemented
├── Unauthenticated
├── PermissionDenied
└── InternalError            our own mistake; the client sees no detail but a request id

`reason` is a value of `understudy.v1.ErrorReason` (error_reason.proto) without its prefix. Messages follow one form:
what was wrong, what was expected, how to mend it. Whatever varies in the message is in `metadata` too.
"""

from __future__ import annotations

from collections.abc import Mapping


class UnderstudyError(Exception):
    """Base of the tree. `reason` and `code` belong to the class, `metadata` (str -> str) to the instance.

    `code` is the canonical gRPC code's name, so that the mapping stands beside the class and cannot be forgotten.
    """

    reason = "INTERNAL"
    code = "INTERNAL"
    spent_micro_usd = 0  # what a provider charged all the same, in 1e-6 US dollars; set on the instance by whoever knows

    def __init__(self, message: str, *, retry_after_s: float | None = None, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.metadata: Mapping[str, str] = {key: str(value) for key, value in metadata.items()}


class InvalidArgument(UnderstudyError):
    """Give `field=` (the proto's field path) wherever one field is to blame."""

    reason = "INVALID_ARGUMENT"
    code = "INVALID_ARGUMENT"


class InputTooLong(InvalidArgument):
    reason = "INPUT_TOO_LONG"


class InvalidTensor(InvalidArgument):
    reason = "INVALID_TENSOR"


class RequestTooLarge(InvalidArgument):
    reason = "REQUEST_TOO_LARGE"


class NotFound(UnderstudyError):
    reason = "NOT_FOUND"
    code = "NOT_FOUND"


class ModelNotFound(NotFound):
    reason = "MODEL_NOT_FOUND"


class VersionNotFound(NotFound):
    reason = "VERSION_NOT_FOUND"


class SkillNotFound(NotFound):
    reason = "SKILL_NOT_FOUND"


class AdapterNotFound(NotFound):
    reason = "ADAPTER_NOT_FOUND"


class InteractionNotFound(NotFound):
    reason = "INTERACTION_NOT_FOUND"


class JobNotFound(NotFound):
    reason = "JOB_NOT_FOUND"


class ApiKeyNotFound(NotFound):
    reason = "API_KEY_NOT_FOUND"


class AlreadyExists(UnderstudyError):
    reason = "ALREADY_EXISTS"
    code = "ALREADY_EXISTS"


class FailedPrecondition(UnderstudyError):
    reason = "FAILED_PRECONDITION"
    code = "FAILED_PRECONDITION"


class ModelNotLoaded(FailedPrecondition):
    reason = "MODEL_NOT_LOADED"


class ModelInUse(FailedPrecondition):
    reason = "MODEL_IN_USE"


class TaskNotSupported(FailedPrecondition):
    reason = "TASK_NOT_SUPPORTED"


class ModelRejected(FailedPrecondition):
    reason = "MODEL_REJECTED"


class ManifestInvalid(ModelRejected):
    reason = "MANIFEST_INVALID"


class TooLittleData(FailedPrecondition):
    reason = "TOO_LITTLE_DATA"


class ResourceExhausted(UnderstudyError):
    reason = "RESOURCE_EXHAUSTED"
    code = "RESOURCE_EXHAUSTED"


class Overloaded(ResourceExhausted):
    reason = "OVERLOADED"


class RateLimited(ResourceExhausted):
    reason = "RATE_LIMITED"


class BudgetExceeded(ResourceExhausted):
    reason = "BUDGET_EXCEEDED"


class OutOfMemory(ResourceExhausted):
    reason = "OUT_OF_MEMORY"


class DeadlineExceeded(UnderstudyError):
    """Give `stage=`: one of queue, tokenize, run, post, provider."""

    reason = "DEADLINE_EXCEEDED"
    code = "DEADLINE_EXCEEDED"


class Cancelled(UnderstudyError):
    reason = "CANCELLED"
    code = "CANCELLED"


class Unavailable(UnderstudyError):
    reason = "UNAVAILABLE"
    code = "UNAVAILABLE"


class Draining(Unavailable):
    reason = "DRAINING"


class ProviderUnavailable(Unavailable):
    reason = "PROVIDER_UNAVAILABLE"


class Unimplemented(UnderstudyError):
    reason = "UNIMPLEMENTED"
    code = "UNIMPLEMENTED"


class Unauthenticated(UnderstudyError):
    reason = "UNAUTHENTICATED"
    code = "UNAUTHENTICATED"


class PermissionDenied(UnderstudyError):
    reason = "PERMISSION_DENIED"
    code = "PERMISSION_DENIED"


class InternalError(UnderstudyError):
    """Raised only at the edge, in place of an exception that is none of ours."""


def near_names(name: str, known: list[str]) -> str:
    """A clause that names the closest of `known`, and all of them when they are few; for NotFound messages."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(repr(n) for n in near)}?"
    if not known:
        return "there are none."
    shown = ", ".join(repr(n) for n in sorted(known)[:20])
    return f"these exist: {shown}{' and more' if len(known) > 20 else ''}."
