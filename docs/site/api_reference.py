"""The page reference_api.md, from the protos and their comments: every service, RPC, message and value."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "protos"
sys.path.insert(0, str(ROOT / "clients" / "python"))

HEAD = """# API reference

Written from the protos in `protos/understudy/v1` when this site is built. A server tells the same by
reflection: `grpcurl -plaintext localhost:50051 describe`. Fields are only ever added. REST answers are JSON with lowerCamelCase names.

`REQUIRED` fields must be set; `OUTPUT_ONLY` ones are the server's. What an RPC answers when it cannot is a `google.rpc.Status` with one
of the [reasons](#errorreason).
"""
_KINDS = {kind: name.removeprefix("TYPE_").lower() for name, kind in descriptor_pb2.FieldDescriptorProto.Type.items()}
_VERBS = ("get", "post", "put", "patch", "delete")


class Comments:
    """Leading comments of one file's elements, by their path in the descriptor."""

    def __init__(self, file: Any) -> None:
        self._found = {tuple(one.path): one.leading_comments for one in file.source_code_info.location}

    def __call__(self, *path: int) -> str:
        return " ".join(self._found.get(path, "").split())


def descriptors() -> list[Any]:
    """Files of understudy.v1 with their comments, services first, by name."""
    import google.api

    # Both must be known before descriptors are parsed, so that their options are read.
    import google.api.annotations_pb2
    import google.api.field_behavior_pb2

    import understudy.v1.auth_pb2  # noqa: F401

    spec = importlib.util.find_spec("grpc_tools")
    assert spec is not None and spec.origin is not None, "grpcio-tools is a build requirement"
    shared = [Path(spec.origin).parent / "_proto", Path(google.api.annotations_pb2.__file__).parents[2]]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "all.pb"
        files = [str(path.relative_to(PROTOS)) for path in sorted((PROTOS / "understudy" / "v1").glob("*.proto"))]
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *(f"-I{one}" for one in shared)]
        subprocess.run([*command, "--include_source_info", f"--descriptor_set_out={out}", *files], check=True)
        found = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    return sorted(found.file, key=lambda file: (not file.service, file.name))


def page() -> str:
    """The page as Markdown."""
    files = descriptors()
    parts = [HEAD]
    for file in files:
        parts += services(file, Comments(file))
    parts.append("## Messages and values\n")
    for file in files:
        parts += types(file, Comments(file))
    return "\n".join(parts)


def services(file: Any, comments: Comments) -> Iterator[str]:
    """A section a service."""
    for at, service in enumerate(file.service):
        yield f"## {service.name}\n\n{comments(6, at)}\n"
        for number, method in enumerate(service.method):
            asked, given = _link(method.input_type), _link(method.output_type)
            asked, given = (
                (f"stream of {asked}" if method.client_streaming else asked),
                (f"stream of {given}" if method.server_streaming else given),
            )
            yield f"### {service.name}.{method.name} {{ #{_anchor(service.name + '.' + method.name)} }}\n\n{comments(6, at, 2, number)}\n"
            facts = [f"{asked} → {given}", *(f"`{verb}`" for verb in bindings(method)), f"role: {role(method)}"]
            yield "".join(f"- {fact}\n" for fact in facts)


def bindings(method: Any) -> list[str]:
    """REST bindings, as "GET /v1/status"."""
    from google.api import annotations_pb2

    rule = method.options.Extensions[annotations_pb2.http]
    found = []
    for one in (rule, *rule.additional_bindings):
        verb = one.WhichOneof("pattern")
        if verb in _VERBS:
            found.append(f"{verb.upper()} {getattr(one, verb)}")
    return found


def role(method: Any) -> str:
    """The least role that may call a method."""
    from understudy.v1 import auth_pb2

    return auth_pb2.Role.Name(method.options.Extensions[auth_pb2.required_role]).removeprefix("ROLE_").lower()


def types(file: Any, comments: Comments) -> Iterator[str]:
    """A section a message and a table of its fields, a section an enum and a table of its values."""
    for at, message in enumerate(file.message_type):
        yield from _message(message, message.name, comments, (4, at))
    for at, enum in enumerate(file.enum_type):
        yield from _enum(enum, comments, (5, at))


def _message(message: Any, name: str, comments: Comments, path: tuple[int, ...]) -> Iterator[str]:
    maps = {one.name: one for one in message.nested_type if one.options.map_entry}
    yield f"### {name} {{ #{_anchor(name)} }}\n\n{_safe(comments(*path))}\n"
    if message.field:
        yield "| field | type | meaning |\n|---|---|---|"
        for at, field in enumerate(message.field):
            meaning = _cell(" ".join([*_behaviours(field), comments(*path, 2, at)]))
            yield f"| `{field.name}` | {_type(field, message, maps)} | {meaning} |"
        yield ""
    for at, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message(nested, f"{name}.{nested.name}", comments, (*path, 3, at))
    for at, enum in enumerate(message.enum_type):
        yield from _enum(enum, comments, (*path, 4, at))


def _enum(enum: Any, comments: Comments, path: tuple[int, ...]) -> Iterator[str]:
    yield f"### {enum.name} {{ #{_anchor(enum.name)} }}\n\n{_safe(comments(*path))}\n"
    yield "| value | number | meaning |\n|---|---|---|"
    for at, value in enumerate(enum.value):
        yield f"| `{value.name}` | {value.number} | {_cell(comments(*path, 2, at))} |"
    yield ""


def _type(field: Any, message: Any, maps: dict[str, Any]) -> str:
    own = field.type_name.rpartition(".")[2]
    if own in maps and field.label == field.LABEL_REPEATED:
        key, value = maps[own].field
        return f"map of {_type(key, message, {})} to {_type(value, message, {})}"
    name = _link(field.type_name) if field.type_name else _KINDS[field.type]
    if field.label == field.LABEL_REPEATED:
        return f"list of {name}"
    if field.proto3_optional:
        return f"{name}, optional"
    return f"{name}, one of `{message.oneof_decl[field.oneof_index].name}`" if field.HasField("oneof_index") else name


def _behaviours(field: Any) -> list[str]:
    from google.api import field_behavior_pb2

    found = field.options.Extensions[field_behavior_pb2.field_behavior]
    return [f"**{field_behavior_pb2.FieldBehavior.Name(one)}**." for one in found]


def _link(full: str) -> str:
    name = full.lstrip(".")
    ours = name.removeprefix("understudy.v1.")
    return f"[{ours}](#{_anchor(ours)})" if ours != name else f"`{name}`"


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _safe(text: str) -> str:
    return re.sub(r"[<{\[]", lambda found: "\\" + found[0], text)


def _cell(text: str) -> str:
    return _safe(text).replace("|", "\\|")
