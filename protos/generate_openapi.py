"""Writes the OpenAPI document of all that the gateway serves: `python protos/generate_openapi.py` makes gateway/openapi/openapi.json.

What the RPCs serve comes from the protos: their HTTP rules, messages, comments and options. What the gateway serves besides (OpenAI's
paths, the older paths, health) stands in gateway/openapi/*.yaml, with the examples of the RPCs. `--check` writes nothing and fails where
the file that is there is another.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from generate_python import PROTOS, _google_protos, _run
from google.api import annotations_pb2  # noqa: F401  registers the extension before the protos are read
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet

sys.path.insert(0, str(PROTOS.parent / "clients" / "python"))

from openapi_operations import Operations, rules
from openapi_schemas import Comments, Schemas, example_of

from understudy.v1 import auth_pb2

OPENAPI = PROTOS.parent / "gateway" / "openapi"
DOCUMENT = OPENAPI / "openapi.json"


def generate() -> str:
    """The document's text. Raises SystemExit where a proto is wrong, or an example is missing."""
    parts = {name: yaml.safe_load((OPENAPI / f"{name}.yaml").read_text()) for name in ("common", "examples", "openai", "older")}
    files, methods = _compile()
    sent = _reached(method.output_type for method in methods)
    taken = _reached(method.input_type for method in methods)
    schemas = Schemas(Comments(files), sent=sent, taken=taken)
    operations = Operations(schemas, parts["examples"], _role_of)
    paths: dict[str, Any] = {}
    for method in methods:
        for path, verb, operation in operations.of(method):
            paths.setdefault(path, {})[verb] = operation
    _tags(parts["common"], methods, schemas)
    document = dict(parts["common"])
    document["components"]["schemas"].update(schemas.components)
    _openai_errors(document["components"]["responses"])
    for name in ("openai", "older"):
        for path, item in parts[name]["paths"].items():
            for verb, operation in item.items():
                _complete(operation, parts[name]["tag"])
                _add_example(operation, document["components"]["schemas"] | parts[name].get("schemas", {}))
                paths.setdefault(path, {})[verb] = operation
        document["components"]["schemas"].update(parts[name].get("schemas", {}))
    document["paths"] = dict(sorted(paths.items()))
    document["components"]["schemas"] = dict(sorted(document["components"]["schemas"].items()))
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _compile() -> tuple[list[Any], list[MethodDescriptor]]:
    """Our files with their comments, and the RPCs that have an HTTP rule."""
    sources = sorted(str(path) for path in (PROTOS / "understudy").rglob("*.proto"))
    include = [f"-I{path}" for path in [str(PROTOS), *_google_protos()]]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        _run(["protoc", *include, f"--descriptor_set_out={out}", "--include_source_info", "--include_imports", *sources])
        found = FileDescriptorSet.FromString(out.read_bytes())
    ours = [file for file in found.file if file.package == "understudy.v1"]
    pool = descriptor_pool.DescriptorPool()
    for file in found.file:
        pool.Add(file)
    services = [pool.FindServiceByName(f"{file.package}.{service.name}") for file in ours for service in file.service]
    return ours, [method for service in services for method in service.methods if rules(method)]


def _role_of(method: MethodDescriptor) -> str:
    role = method.GetOptions().Extensions[auth_pb2.required_role]
    return auth_pb2.Role.Name(role).removeprefix("ROLE_").lower()


def _reached(messages: Any) -> set[str]:
    """Full names of the messages and of all that they hold."""
    seen: set[str] = set()

    def visit(message: Descriptor) -> None:
        if message.full_name not in seen:
            seen.add(message.full_name)
            for field in message.fields:
                if field.message_type is not None:
                    visit(field.message_type)

    for message in messages:
        visit(message)
    return seen


def _tags(common: dict[str, Any], methods: list[MethodDescriptor], schemas: Schemas) -> None:
    """A tag a service, described by its comment, before those that are written by hand."""
    tags: dict[str, str] = {}
    for method in methods:
        service = method.containing_service
        tags.setdefault(service.name.removesuffix("Service"), schemas.comments.of(service.full_name))
    common["tags"] = [*({"name": name, "description": text} for name, text in tags.items()), *common["tags"]]


def _complete(operation: dict[str, Any], tag: str) -> None:
    """Adds what all operations written by hand have in common: their tag, and `errors`, a list of statuses, as references."""
    operation.setdefault("tags", [tag])
    component = "openai" if tag == "OpenAI" else ""
    for status in operation.pop("errors", []):
        operation["responses"][str(status)] = {"$ref": f"#/components/responses/{component}{status}"}


def _openai_errors(responses: dict[str, Any]) -> None:
    """Twins of the errors in the form that OpenAI's clients read."""
    for status, response in list(responses.items()):
        told = response["content"]["application/json"]["example"]["error"]
        example = {"error": {"message": told["message"], "type": "invalid_request_error", "param": None, "code": None}}
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/OpenAIError"}, "example": example}}
        responses[f"openai{status}"] = {**response, "content": content}


def _add_example(operation: dict[str, Any], components: dict[str, Any]) -> None:
    """An example of the answer from those in its schema."""
    content = operation["responses"]["200"]["content"].get("application/json")
    if content and "example" not in content:
        content["example"] = example_of(content["schema"], components)


def main() -> None:
    """Writes the document, or compares it."""
    text = generate()
    if "--check" not in sys.argv[1:]:
        DOCUMENT.write_text(text)
    elif not DOCUMENT.is_file() or DOCUMENT.read_text() != text:
        raise SystemExit(f"{DOCUMENT} is not what the protos give; run `make openapi` and commit it")


if __name__ == "__main__":
    main()
