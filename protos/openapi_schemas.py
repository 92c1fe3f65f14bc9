"""JSON schemas of proto messages, as protojson writes and reads them: what the OpenAPI document has of messages and enums."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from google.api import field_behavior_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

Schema = dict[str, Any]

DURATION = "google.protobuf.Duration"
# What stands for "..." in the examples of ids.
JOB, INTERACTION = "9c1e5b7a2d4f60813c5e7a9b1d2f4e60", "019a9c1e5b7a7d4f60813c5e7a9b1d2f"

INTEGERS = {FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_SINT32, FieldDescriptor.TYPE_SFIXED32}
UNSIGNED = {FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_FIXED32}
WIDE = {FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_SINT64, FieldDescriptor.TYPE_SFIXED64}
WIDE_UNSIGNED = {FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED64}

# Messages that protojson writes in a form of their own.
WELL_KNOWN: dict[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time", "examples": ["2026-11-21T09:30:00Z"]},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]{1,9}(\.[0-9]{1,9})?s$", "examples": ["0.004s"]},
    "google.protobuf.Struct": {"type": "object", "additionalProperties": True, "examples": [{}]},
    "google.rpc.Status": {
        "type": "object",
        "description": "Why this part of the call failed.",
        "properties": {
            "code": {"type": "integer", "format": "int32", "description": "Canonical gRPC code; 0 is none.", "examples": [3]},
            "message": {"type": "string", "description": "What was wrong, what was expected, how to mend it."},
            "details": {
                "type": "array",
                "items": {"type": "object", "additionalProperties": True},
                "description": "ErrorInfo with the reason.",
            },
        },
        "examples": [{"code": 3, "message": "the text has 700 tokens; expected at most 512.", "details": []}],
    },
}


class Comments:
    """Leading comments of every element, by full name."""

    def __init__(self, files: Iterable[Any]) -> None:
        self._texts: dict[str, str] = {}
        for file in files:
            for location in file.source_code_info.location:
                if location.leading_comments and (name := _name(file, location.path)):
                    self._texts[name] = " ".join(line.strip() for line in location.leading_comments.strip().splitlines()).strip()

    def of(self, name: str) -> str:
        return self._texts.get(name, "")


def _name(file: Any, path: Iterable[int]) -> str | None:
    """Full name of the element at a path of SourceCodeInfo; None for those that have no name."""
    node, name, steps = file, file.package, list(path)
    for number, index in zip(steps[::2], steps[1::2], strict=False):
        field = node.DESCRIPTOR.fields_by_number.get(number)
        if field is None or field.message_type is None or not field.is_repeated:
            return None
        node = getattr(node, field.name)[index]
        if not hasattr(node, "name"):
            return None
        name += f".{node.name}"
    return name if len(steps) % 2 == 0 else None


def example_in(comment: str) -> Any:
    """What a comment gives as `for example "..."`; None where it gives nothing, or half of something."""
    found = re.search(r'for example "([^"]*)"', comment)
    if not found:
        return None
    return re.sub(r"[0-9a-f]*\.\.\.", INTERACTION if found.group(1).startswith("interactions/") else JOB, found.group(1))


def behaviours(field: FieldDescriptor) -> set[int]:
    return set(field.GetOptions().Extensions[field_behavior_pb2.field_behavior])


def required(field: FieldDescriptor) -> bool:
    return field_behavior_pb2.REQUIRED in behaviours(field)


def output_only(field: FieldDescriptor) -> bool:
    return field_behavior_pb2.OUTPUT_ONLY in behaviours(field)


def real_oneof(field: FieldDescriptor) -> bool:
    """Whether the field is one of several; `optional` makes a oneof of its own, which is none."""
    return field.containing_oneof is not None and len(field.containing_oneof.fields) > 1


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


class Schemas:
    """Component schemas, made as they are asked for. `sent` and `taken` are the messages that answers and requests can hold."""

    def __init__(self, comments: Comments, *, sent: set[str], taken: set[str]) -> None:
        self.comments = comments
        self.sent, self.taken = sent, taken
        self.components: dict[str, Schema] = {}

    def reference(self, descriptor: Descriptor | EnumDescriptor) -> Schema:
        """A reference to the component, which is made if it is new."""
        if descriptor.full_name in WELL_KNOWN:
            return dict(WELL_KNOWN[descriptor.full_name])
        name = descriptor.name
        if name not in self.components:
            self.components[name] = {}  # holds the place: messages may hold themselves
            made = self._enum(descriptor) if isinstance(descriptor, EnumDescriptor) else self.message(descriptor)
            self.components[name] = made
        return {"$ref": f"#/components/schemas/{name}"}

    def message(self, descriptor: Descriptor, leave_out: frozenset[str] = frozenset()) -> Schema:
        """The schema itself, without the fields that a path holds."""
        fields = [field for field in descriptor.fields if field.name not in leave_out]
        schema: Schema = {"type": "object", "description": self.comments.of(descriptor.full_name)}
        schema["properties"] = {field.json_name: self.field(field) for field in fields}
        answers_alone = descriptor.full_name in self.sent and descriptor.full_name not in self.taken
        if answers_alone:
            needed = [field.json_name for field in fields if field.containing_oneof is None]
        else:
            needed = [field.json_name for field in fields if required(field)]
        if needed:
            schema["required"] = needed
        if descriptor.full_name not in self.sent:
            schema["additionalProperties"] = False
            choices = [one for one in descriptor.oneofs if len(one.fields) > 1]
            if choices:
                schema["oneOf"] = [{"required": [field.json_name]} for field in choices[0].fields]
        return schema

    def field(self, field: FieldDescriptor) -> Schema:
        """Schema of a field with its comment."""
        comment = self.comments.of(field.full_name)
        if is_map(field):
            key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
            schema = {"type": "object", "additionalProperties": self._value(value)}
            if key.type in INTEGERS:
                schema["propertyNames"] = {"pattern": "^(0|-?[1-9][0-9]{0,8})$"}
        elif field.is_repeated:
            schema = {"type": "array", "items": self._value(field)}
        elif field.message_type is not None and not required(field):
            schema = _or_null(self._value(field))
        else:
            schema = self._value(field)
        if field.message_type is not None and field.message_type.full_name == DURATION and field.containing_type.full_name not in self.sent:
            schema["examples"] = ["30s"]  # of a limit that a caller sets
        example = example_in(comment)
        if example is not None and schema.get("type") == "string" and "enum" not in schema:
            schema["examples"] = [example]
        if comment:
            schema["description"] = comment
        if output_only(field):
            schema["readOnly"] = True
        return schema

    def _value(self, field: FieldDescriptor) -> Schema:
        """Schema of one value, without its comment."""
        if field.message_type is not None:
            return self.reference(field.message_type)
        if field.enum_type is not None:
            return self.reference(field.enum_type)
        kind = field.type
        if kind in INTEGERS:
            return {"type": "integer", "format": "int32", "minimum": -(2**31), "maximum": 2**31 - 1}
        if kind in UNSIGNED:
            return {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}
        if kind in WIDE:
            return {"type": "string", "format": "int64", "pattern": "^(0|-?[1-9][0-9]{0,17})$", "examples": ["120"]}
        if kind in WIDE_UNSIGNED:
            return {"type": "string", "format": "uint64", "pattern": "^(0|[1-9][0-9]{0,18})$", "examples": ["120"]}
        if kind == FieldDescriptor.TYPE_FLOAT:
            return {"type": "number", "format": "float"}
        if kind == FieldDescriptor.TYPE_DOUBLE:
            return {"type": "number", "format": "double"}
        if kind == FieldDescriptor.TYPE_BOOL:
            return {"type": "boolean"}
        if kind == FieldDescriptor.TYPE_BYTES:
            return {"type": "string", "contentEncoding": "base64"}
        return {"type": "string"}

    def _enum(self, descriptor: EnumDescriptor) -> Schema:
        names = [value.name for value in descriptor.values]
        parent = descriptor.full_name.rpartition(".")[0]
        lines = [f"- `{value.name}`: {self.comments.of(f'{descriptor.full_name}.{value.name}')}" for value in descriptor.values]
        text = self.comments.of(descriptor.full_name) or parent
        return {"type": "string", "enum": names, "description": text + "\n\n" + "\n".join(lines)}


def _or_null(schema: Schema) -> Schema:
    """Messages that are unset are written as null."""
    if "$ref" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    return {**schema, "type": [schema["type"], "null"]}


def example_of(schema: Schema, components: dict[str, Schema], depth: int = 0) -> Any:
    """A value that the schema allows, from the examples in it."""
    if "$ref" in schema:
        schema = components[schema["$ref"].rpartition("/")[2]]
    if schema.get("examples"):
        return schema["examples"][0]
    if "anyOf" in schema:
        return None if depth > 3 else example_of(schema["anyOf"][0], components, depth)
    if "enum" in schema:
        return schema["enum"][min(1, len(schema["enum"]) - 1)]
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "array":
        return [] if depth > 3 else [example_of(schema["items"], components, depth + 1)]
    if kind == "object":
        only = {name for one in schema.get("oneOf", [])[1:] for name in one["required"]}
        return (
            {
                name: example_of(part, components, depth + 1)
                for name, part in schema.get("properties", {}).items()
                if name not in only and name not in ("error", "stateMessage")
            }
            if "properties" in schema
            else {}
        )
    return {"integer": 1, "number": 0.5, "boolean": True, "string": "text"}.get(str(kind))
