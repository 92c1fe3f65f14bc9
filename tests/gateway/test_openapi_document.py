"""The OpenAPI document: what the protos give, valid, complete, with examples that are true; and the page over it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from google.api import annotations_pb2
from google.protobuf import json_format
from google.protobuf.descriptor import ServiceDescriptor
from openapi_spec_validator import validate

from tests.api.auth_calls import FILES
from tests.gateway_process import GatewayProcess
from tests.made import ROOT
from understudy.v1 import auth_pb2

FOLDER = ROOT / "gateway" / "openapi"
DOCUMENT: dict[str, Any] = json.loads((FOLDER / "openapi.json").read_text())
SERVICES: dict[str, ServiceDescriptor] = {name: service for file in FILES for name, service in file.DESCRIPTOR.services_by_name.items()}


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for verb, operation in item.items():
            yield path, verb, operation


def test_the_document_is_what_the_protos_give() -> None:
    done = subprocess.run([sys.executable, "protos/generate_openapi.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_check_sees_a_change(tmp_path: Path) -> None:
    """A tree of its own, whose document says something else."""
    for folder in ("protos", "gateway/openapi", "clients/python"):
        (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "protos").symlink_to(ROOT / "protos")
    (tmp_path / "clients" / "python").symlink_to(ROOT / "clients" / "python")
    (tmp_path / "gateway" / "openapi").mkdir()
    for file in FOLDER.glob("*.yaml"):
        (tmp_path / "gateway" / "openapi" / file.name).write_text(file.read_text().replace("Runs a task in plain words", "Does a task"))
    (tmp_path / "gateway" / "openapi" / "openapi.json").write_text((FOLDER / "openapi.json").read_text())
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'protos')!r}); import generate_openapi as g; from pathlib import Path; "
    script += f"g.OPENAPI = Path({str(tmp_path / 'gateway' / 'openapi')!r}); g.DOCUMENT = g.OPENAPI / 'openapi.json'; g.main()"
    done = subprocess.run([sys.executable, "-c", script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "make openapi" in done.stderr


def test_the_table_in_the_documentation_has_every_path() -> None:
    spec = importlib.util.spec_from_file_location("rest_table", ROOT / "protos" / "rest_table.py")
    assert spec is not None and spec.loader is not None
    rest_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rest_table)
    assert rest_table.PAGE.read_text() == rest_table.page(), "run `make openapi` and commit docs/rest.md"
    assert rest_table.table().count("| `") == sum(1 for _ in operations())


def test_the_document_is_valid() -> None:
    validate(DOCUMENT)
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(ids) == len(set(ids))


def test_every_rule_of_every_rpc_is_there_with_its_role() -> None:
    for service in SERVICES.values():
        for method in service.methods:
            rule = method.GetOptions().Extensions[annotations_pb2.http]
            role = auth_pb2.Role.Name(method.GetOptions().Extensions[auth_pb2.required_role]).removeprefix("ROLE_").lower()
            rules = [rule, *rule.additional_bindings] if rule.WhichOneof("pattern") else []
            assert rules or method.client_streaming, method.full_name
            name = f"{service.full_name}/{method.name}"
            found = [(verb, one) for path, verb, one in operations() if one.get("x-grpc-method") == name and path.startswith("/v1/")]
            for one in rules:
                assert one.WhichOneof("pattern") in [verb for verb, _ in found], name
            assert len(found) >= len(rules), name
            assert {one["x-required-role"] for _, one in found} <= {role}, name


def test_every_element_is_described_and_every_body_has_an_example() -> None:
    for path, verb, operation in operations():
        where = f"{verb} {path}"
        assert operation["summary"] and operation["description"], where
        for parameter in operation.get("parameters", []):
            assert parameter["description"], (where, parameter["name"])
        for content in operation.get("requestBody", {}).get("content", {}).values():
            assert content["examples"], where
        answer = operation["responses"]["200"]["content"]
        assert "example" in answer["application/json"] if "application/json" in answer else answer, where
    for name, schema in DOCUMENT["components"]["schemas"].items():
        assert schema.get("description"), name
        if not name.startswith(("OpenAI", "Older")):
            for field, inner in schema.get("properties", {}).items():
                assert inner.get("description") or name == "Error", f"{name}.{field}"


def test_examples_of_bodies_are_messages() -> None:
    """Also those that no test can have answered, since they need what a server has not."""
    for key, examples in yaml.safe_load((FOLDER / "examples.yaml").read_text()).items():
        service, _, name = key.partition(".")
        method = SERVICES[service].methods_by_name[name]
        body = method.GetOptions().Extensions[annotations_pb2.http].body
        message = method.input_type if body == "*" else method.input_type.fields_by_name[body].message_type
        for example in examples.values():
            json_format.ParseDict(example, message._concrete_class())


def test_the_gateway_serves_the_document(gateway: GatewayProcess) -> None:
    answer = httpx.get(f"{gateway.url}/openapi.json")
    assert answer.json() == DOCUMENT
    assert answer.headers["content-type"] == "application/json"
    again = httpx.get(f"{gateway.url}/openapi.json", headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304 and not again.content
    plain = httpx.get(f"{gateway.url}/openapi.json", headers={"accept-encoding": "identity"})
    assert plain.json() == DOCUMENT and "content-encoding" not in plain.headers


def test_the_page_loads_nothing_from_elsewhere(gateway: GatewayProcess) -> None:
    page = httpx.get(f"{gateway.url}/docs")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {one for one in loaded if one.startswith("/docs/")} == {"/docs/docs.css", "/docs/docs.js"}
    for one in loaded:
        assert one.startswith(("/", "#", "data:,")) and not one.startswith("//")
    for one in ("/docs/docs.css", "/docs/docs.js"):
        part = httpx.get(gateway.url + one)
        assert part.status_code == 200
        assert not re.search(r"https?://|innerHTML|@import|eval\(", part.text)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/docs/docs.js"])
def test_the_page_is_only_read(gateway: GatewayProcess, path: str) -> None:
    assert httpx.head(gateway.url + path).status_code == 200
    refused = httpx.post(gateway.url + path, json={})
    assert refused.status_code == 405
    assert refused.json()["error"]["reason"] == "METHOD_NOT_ALLOWED"
