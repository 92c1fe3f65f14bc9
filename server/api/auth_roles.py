"""Which role each method takes, and what else is to be known of it before it runs: one rule a method, made once, when it is registered.

Our own methods say their role in the protos (`required_role`); those of the Open Inference Protocol, whose file is not ours, stand here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor

from server.core import Role
from server.errors import PermissionDenied
from understudy.v1 import auth_pb2

_OPEN_INFERENCE = "inference.GRPCInferenceService"
_OPEN_INFERENCE_ROLES = {
    Role.VIEWER: (
        "ServerLive",
        "ServerReady",
        "ServerMetadata",
        "ModelReady",
        "ModelMetadata",
        "ModelConfig",
        "ModelStatistics",
        "RepositoryIndex",
        "SystemSharedMemoryStatus",
        "CudaSharedMemoryStatus",
    ),
    Role.USER: ("ModelInfer", "ModelStreamInfer"),
    Role.OPERATOR: (
        "RepositoryModelLoad",
        "RepositoryModelUnload",
        "SystemSharedMemoryRegister",
        "SystemSharedMemoryUnregister",
        "CudaSharedMemoryRegister",
        "CudaSharedMemoryUnregister",
        "TraceSetting",
        "LogSettings",
    ),
}
_ROLE_OF = {f"{_OPEN_INFERENCE}.{name}": role for role, names in _OPEN_INFERENCE_ROLES.items() for name in names}
_READS = ("Get", "List")
# Where a request says what it is about, the first that is set.
_RESOURCE_FIELDS = ("name", "parent", "model_name", "skill")
_ROLES = {int(role): role for role in Role}


@dataclass(slots=True, frozen=True)
class Rule:
    """Of one method. `skill_of`: for keys that are limited to skills, the skill that a request asks, or a refusal; None: the method asks
    none. `each`: the servicer admits the messages of a stream one by one, so that a refusal is that message's alone.
    """

    method: str
    role: Role
    audited: bool
    skill_of: Callable[[Any], str] | None
    streams: bool = False
    each: bool = False


def rule_of(path: str) -> Rule:
    """The rule of a method by its path, "/package.Service/Method". Raises TypeError for one without a role: there is none by default."""
    method = path.removeprefix("/")
    descriptor = descriptor_pool.Default().FindMethodByName(method.replace("/", "."))  # type: ignore[no-untyped-call]
    role = required_role(descriptor)
    audited = role >= Role.OPERATOR and not descriptor.name.startswith(_READS)
    each = descriptor.full_name == "understudy.v1.InferenceService.RunMany"
    return Rule(method, role, audited, _skill_of(descriptor.full_name, role), descriptor.client_streaming, each)


def required_role(method: MethodDescriptor) -> Role:
    """The least role that may call it. Raises TypeError where nothing says one."""
    role = _ROLE_OF.get(method.full_name)
    if role is None:
        role = _ROLES.get(method.GetOptions().Extensions[auth_pb2.required_role])
    if role is None:
        raise TypeError(f"{method.full_name} has no role; give it `option (required_role)` in its proto, or a line in {__name__}")
    return role


def resource_of(message: Any) -> str:
    """What a request is about, for the audit log, by the first field that says it; "" where none does."""
    for name in _RESOURCE_FIELDS:
        value = getattr(message, name, "")
        if isinstance(value, str) and value:
            return value
    for field, value in message.ListFields() if hasattr(message, "ListFields") else ():
        if field.message_type is not None and not field.is_repeated:
            return resource_of(value)
    return ""


def refuse_skill(caller_skills: Iterable[str], skill: str) -> PermissionDenied:
    """The error for a skill that a key may not ask."""
    allowed = ", ".join(sorted(caller_skills))[:200]
    message = f"this key may not ask the skill {skill[:128]!r}; it may ask {allowed}. Ask one of them, or an admin for another key."
    return PermissionDenied(message, skill=skill[:128], allowed=allowed)


def _skill_of(method: str, role: Role) -> Callable[[Any], str] | None:
    """A key that is limited to skills may look at what its role sees, give feedback, and ask its skills: nothing that names a model."""
    if role == Role.VIEWER or method.startswith("understudy.v1.FeedbackService."):
        return None
    asking: Callable[[Any], str] = _ASKING.get(method, _names_models)
    return asking


def _run(request: Any) -> str:
    if request.model:
        raise PermissionDenied("this key is limited to skills, and the request names a model; leave model out.", field="model")
    return _named(request)


def _named(request: Any) -> str:
    if not request.skill:
        raise PermissionDenied("this key is limited to skills, and the request names none; set skill.", field="skill")
    return str(request.skill)


def _names_models(_request: Any) -> str:
    raise PermissionDenied("this key is limited to skills, and this method asks models as such; call Run or Generate with a skill.")


_ASKING: Mapping[str, Callable[[Any], str]] = {
    "understudy.v1.InferenceService.Run": _run,
    "understudy.v1.InferenceService.RunMany": _run,
    "understudy.v1.InferenceService.ExplainRoute": lambda request: _run(request.request),
    "understudy.v1.InferenceService.Generate": _named,
    "understudy.v1.InferenceService.GenerateText": _named,
}
