"""Operations of the OpenAPI document: each HTTP rule of each RPC, with its parameters, body and answers."""

from __future__ import annotations

import re
from typing import Any

from google.api import annotations_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from openapi_schemas import Schema, Schemas, example_in, example_of, is_map, required

VERBS = ("get", "put", "post", "delete", "patch")
PLURALS = {"skills": "skill", "models": "model", "versions": "version", "adapters": "adapter", "interactions": "interaction"}
# Examples of path parameters where the field's comment gives none.
STAND_INS = {"model": "llama", "adapter": "french", "version": "1"}
STREAM = "application/x-ndjson"
TEXT_LIMIT = 255  # of a path's segment


def rules(method: MethodDescriptor) -> list[Any]:
    """The rule of an RPC and its additional bindings."""
    rule = method.GetOptions().Extensions[annotations_pb2.http]
    return [rule, *rule.additional_bindings] if rule.WhichOneof("pattern") else []


def path_of(template: str) -> tuple[str, list[tuple[str, list[str]]]]:
    """Writes "/v1/{name=models/*}:load" as "/v1/models/{model}:load", and says which field holds which parameters.

    A star after a collection's name is the parameter of that name in the singular.
    """
    bound: list[tuple[str, list[str]]] = []

    def replace(found: re.Match[str]) -> str:
        field, _, pattern = found.group(1).partition("=")
        if not pattern:
            bound.append((field, [field]))
            return "{" + field + "}"
        segments, names = pattern.split("/"), []
        for at, segment in enumerate(segments):
            if segment == "*":
                name = singular(segments[at - 1])
                names.append(name)
                segments[at] = "{" + name + "}"
        bound.append((field, names))
        return "/".join(segments)

    return re.sub(r"\{([^}]*)\}", replace, template), bound


def singular(collection: str) -> str:
    return PLURALS.get(collection) or collection.removesuffix("s")


class Operations:
    """Makes the operations; `errors` are the component responses by status."""

    def __init__(self, schemas: Schemas, examples: dict[str, Any], role_of: Any) -> None:
        self.schemas, self.examples, self.role_of = schemas, examples, role_of

    def of(self, method: MethodDescriptor) -> list[tuple[str, str, dict[str, Any]]]:
        """(path, verb, operation) of each rule."""
        return [self._operation(method, rule, number) for number, rule in enumerate(rules(method))]

    def _operation(self, method: MethodDescriptor, rule: Any, number: int) -> tuple[str, str, dict[str, Any]]:
        verb = str(rule.WhichOneof("pattern"))
        path, bound = path_of(getattr(rule, verb))
        service = method.containing_service.name
        comment = self.schemas.comments.of(method.full_name)
        summary, description = sentences(comment)
        operation: dict[str, Any] = {
            "operationId": f"{service}_{method.name}" + (f"_{number + 1}" if number else ""),
            "tags": [service.removesuffix("Service")],
            "summary": summary,
            "description": description or summary + ".",
            "x-required-role": self.role_of(method),
            "x-grpc-method": f"{method.containing_service.full_name}/{method.name}",
        }
        parameters = [*self._path_parameters(method.input_type, bound), *self._query(method.input_type, bound, rule.body)]
        if parameters:
            operation["parameters"] = parameters
        if rule.body:
            operation["requestBody"] = self._body(method, bound, rule.body)
        operation["responses"] = self._responses(method, comment, has_body=bool(rule.body))
        return path, verb, operation

    def _path_parameters(self, message: Descriptor, bound: list[tuple[str, list[str]]]) -> list[Schema]:
        parameters = []
        for field_path, names in bound:
            field = field_at(message, field_path)
            comment = self.schemas.comments.of(field.full_name)
            example = example_in(comment) or ""
            for at, name in enumerate(names):
                found = example.split("/")[2 * at + 1 : 2 * at + 2] or [
                    STAND_INS[name] if "adapter" in names or name != "model" else "all-minilm-l6-v2"
                ]
                parameters.append(
                    {
                        "name": name,
                        "in": "path",
                        "required": True,
                        "description": f"The {split_words(name)}'s name." if name != "version" else "The version, a positive number.",
                        "schema": {"type": "string", "minLength": 1, "maxLength": TEXT_LIMIT, "pattern": "^[^/]+$"},
                        "example": found[0],
                    }
                )
        return parameters

    def _query(self, message: Descriptor, bound: list[tuple[str, list[str]]], body: str) -> list[Schema]:
        if body == "*":
            return []
        held = {field_path.partition(".")[0] for field_path, _ in bound} | {body}
        parameters = []
        for field in message.fields:
            if field.name in held or is_map(field):
                continue
            schema = self.schemas.field(field)
            description = schema.pop("description", "")
            schema.pop("readOnly", None)
            if isinstance(schema.get("type"), list):  # a query has no null
                schema["type"] = schema["type"][0]
            parameter = {"name": field.json_name, "in": "query", "description": description, "schema": schema}
            if required(field):
                parameter["required"] = True
            parameters.append(parameter)
        return parameters

    def _body(self, method: MethodDescriptor, bound: list[tuple[str, list[str]]], body: str) -> Schema:
        message = method.input_type
        if body == "*":
            left_out = frozenset(path for path, _ in bound)
            schema = self.schemas.message(message, left_out) if left_out else self.schemas.reference(message)
        else:
            inner = message.fields_by_name[body].message_type
            left_out = frozenset(path.partition(".")[2] for path, _ in bound if path.startswith(body + "."))
            schema = self.schemas.message(inner, left_out) if left_out else self.schemas.reference(inner)
        resolved = self.schemas.components[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        content: Schema = {"schema": schema}
        key = f"{method.containing_service.name}.{method.name}"
        given = self.examples.get(key)
        if given is None and resolved.get("required"):
            raise SystemExit(f"gateway/openapi/examples.yaml has no example of {key}, whose body has required fields; add one")
        content["examples"] = {name: {"value": value} for name, value in (given or {"empty": {}}).items()}
        return {"required": bool(resolved.get("required") or resolved.get("oneOf")), "content": {"application/json": content}}

    def _responses(self, method: MethodDescriptor, comment: str, *, has_body: bool) -> Schema:
        schema = self.schemas.reference(method.output_type)
        description = self.schemas.comments.of(method.output_type.full_name)
        if method.server_streaming:
            text = f'{description} One JSON document a line: {{"result": ...}}, and {{"error": ...}} as the last where it fails midway.'
            content = {STREAM: {"schema": {"type": "string"}, "x-item-schema": {"type": "object", "properties": {"result": schema}}}}
            return {"200": {"description": text, "content": content}, **errors(comment, has_body=has_body)}
        example = example_of(schema, self.schemas.components)
        content = {"application/json": {"schema": schema, "example": example}}
        return {"200": {"description": description, "content": content}, **errors(comment, has_body=has_body)}


def errors(comment: str, *, has_body: bool) -> Schema:
    """References to the errors that an operation can answer with."""
    statuses = ["400", "401", "403", "404", "405", "429", "500", "501", "503", "504"]
    statuses += ["408", "413", "415"] if has_body else []
    statuses += ["409"] if "ALREADY_EXISTS" in comment else []
    return {status: {"$ref": f"#/components/responses/{status}"} for status in sorted(statuses)}


def field_at(message: Descriptor, path: str) -> FieldDescriptor:
    first, _, rest = path.partition(".")
    field = message.fields_by_name[first]
    return field_at(field.message_type, rest) if rest else field


def sentences(comment: str) -> tuple[str, str]:
    """The first sentence without its full stop, and the rest."""
    found = re.match(r"(.+?)\.(?:\s+(.*))?$", comment, re.DOTALL)
    if not found:
        return comment, ""
    return found.group(1), (found.group(2) or "").strip()


def split_words(name: str) -> str:
    """Writes "trainingJob" as "training job"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
