"""Every service by REST, and errors in their one form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.gateway_process import GatewayProcess


@pytest.fixture(scope="module")
def http(gateway: GatewayProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=30) as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, whose form is checked on the way."""
    assert response.headers["content-type"] == "application/json", response.text
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"code", "status", "reason", "message", "help", "metadata", "request_id"}
    assert error["code"] == response.status_code
    assert error["message"] and error["help"] and error["reason"]
    assert error["request_id"] == response.headers["x-request-id"]
    return error


# Method, path, body, and a field of the answer: at least one call of each service.
CALLS = [
    ("GET", "/v1/caller", None, "role"),
    ("GET", "/v1/status", None, "serverVersion"),
    ("GET", "/v1/stats", None, "total"),
    ("GET", "/v1/budget", None, "budgets"),
    ("GET", "/v1/timeline", None, "points"),
    ("GET", "/v1/interactions?page_size=2", None, "interactions"),
    ("GET", "/v1/skills", None, "skills"),
    ("GET", "/v1/trainingJobs", None, "trainingJobs"),
    ("GET", "/v1/schedules", None, "schedules"),
    ("GET", "/v1/models/embedder/versions/1", None, "model"),
    ("GET", "/v1/models/embedder/adapters", None, "adapters"),
    ("POST", "/v1/models/embedder:load", {}, "model"),
    ("POST", "/v1/inference:embed", {"model": {"name": "embedder"}, "texts": ["my card is lost"]}, "results"),
    ("POST", "/v1/inference:classify", {"model": {"name": "classifier"}, "inputs": [{"text": "my card is lost"}]}, "results"),
    ("POST", "/v1/inference:rerank", {"model": {"name": "ranker"}, "query": "card", "documents": ["a card", "transfer"]}, "results"),
    ("POST", "/v1/inference:extractEntities", {"model": {"name": "tagger"}, "texts": ["ada lived in london"]}, "results"),
    (
        "POST",
        "/v1/inference:generateText",
        {"model": {"name": "scripted"}, "prompt": "tell", "sampling": {"temperature": 0, "maxTokens": 3}},
        "results",
    ),
]


@pytest.mark.parametrize(("method", "path", "body", "field"), CALLS, ids=[f"{call[0]} {call[1]}" for call in CALLS])
def test_each_service_answers(http: httpx.Client, method: str, path: str, body: dict[str, Any] | None, field: str) -> None:
    response = http.request(method, path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert field in response.json(), response.text


def test_names_are_taken_in_either_case_and_given_in_one(http: httpx.Client) -> None:
    one = http.post("/v1/inference:rerank", json={"model": {"name": "ranker"}, "query": "card", "documents": ["a card"], "top_n": 1})
    other = http.post("/v1/inference:rerank", json={"model": {"name": "ranker"}, "query": "card", "documents": ["a card"], "topN": 1})
    assert one.status_code == other.status_code == 200, one.text
    status = http.get("/v1/status").json()
    assert "serverVersion" in status and status["draining"] is False  # unset fields are there too


@pytest.mark.parametrize(
    ("method", "path", "content", "code", "reason"),
    [
        ("GET", "/v1/models/absent/versions/1", None, 404, "MODEL_NOT_FOUND"),
        ("GET", "/v1/skills/absent", None, 404, "SKILL_NOT_FOUND"),
        ("GET", "/v1/trainingJobs/absent", None, 404, "JOB_NOT_FOUND"),
        ("GET", "/v1/feedback?interactionId=absent", None, 404, "INTERACTION_NOT_FOUND"),
        ("POST", "/v1/ensembles:run", b'{"skill": "absent", "input": {"text": "a"}}', 400, "INVALID_ARGUMENT"),
        ("GET", "/v1/absent", None, 404, "ROUTE_NOT_FOUND"),
        ("GET", "/absent", None, 404, "ROUTE_NOT_FOUND"),
        ("DELETE", "/v1/status", None, 405, "METHOD_NOT_ALLOWED"),
        ("DELETE", "/healthz", None, 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/v1/inference:embed", b"{", 400, "INVALID_ARGUMENT"),
        ("POST", "/v1/inference:embed", b'{"nonsense": 1}', 400, "INVALID_ARGUMENT"),
        ("POST", "/v1/inference:embed", b'{"texts": 7}', 400, "INVALID_ARGUMENT"),
        ("POST", "/v1/inference:embed", b'{"texts": ["\xff"]}', 400, "INVALID_ARGUMENT"),
        ("POST", "/v1/inference:embed", b'{"model": {"name": "embedder"}, "texts": []}', 400, "INVALID_ARGUMENT"),
        ("POST", "/v1/inference:classify", b'{"model": {"name": "embedder"}, "inputs": [{"text": "a"}]}', 400, "TASK_NOT_SUPPORTED"),
        ("GET", "/v1/interactions?page_size=many", None, 400, "INVALID_ARGUMENT"),
    ],
)
def test_errors_have_one_form(http: httpx.Client, method: str, path: str, content: bytes | None, code: int, reason: str) -> None:
    response = http.request(method, path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == code, response.text
    assert error_of(response)["reason"] == reason


def test_error_carries_metadata_and_help(http: httpx.Client) -> None:
    error = error_of(http.get("/v1/models/absent/versions/1"))
    assert error["status"] == "NOT_FOUND"
    assert error["metadata"]["model"] == "absent"
    assert "/v1/models" in error["help"]


def test_other_types_than_json_are_refused(http: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1", "nonsense"):
        response = http.post("/v1/inference:embed", content=b'{"texts": ["a"]}', headers={"content-type": kind})
        assert response.status_code == 415
        assert error_of(response)["reason"] == "UNSUPPORTED_MEDIA_TYPE"


def test_request_id_goes_through_to_the_server_and_back(http: httpx.Client, gateway: GatewayProcess) -> None:
    given = http.get("/v1/models/absent/versions/1", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == error_of(given)["request_id"] == "mine-1"
    made = http.get("/v1/status", headers={"x-request-id": "not good {}"})
    assert made.headers["x-request-id"] not in ("", "not good {}")
    gateway.wait_event("request", request_id="mine-1", status=404, route="/v1/{name=models/*/versions/*}")


def test_deadlines_are_passed_on(http: httpx.Client) -> None:
    for headers in ({"grpc-timeout": "1u"}, {"grpc-timeout": "100n"}):
        late = http.post("/v1/inference:embed", json={"model": {"name": "embedder"}, "texts": ["a"]}, headers=headers)
        assert late.status_code == 504, late.text
        assert error_of(late)["reason"] == "DEADLINE_EXCEEDED"
    story = {"model": {"name": "scripted"}, "prompt": "tell", "sampling": {"temperature": 0, "maxTokens": 2000}}
    late = http.post("/v1/inference:generateText", json=story, headers={"x-timeout-ms": "30"})
    assert late.status_code == 504, late.text


@pytest.mark.parametrize("headers", [{"grpc-timeout": "soon"}, {"grpc-timeout": "5"}, {"x-timeout-ms": "-1"}, {"x-timeout-ms": "1.5"}])
def test_deadlines_that_cannot_be_read_are_refused(http: httpx.Client, headers: dict[str, str]) -> None:
    response = http.get("/v1/status", headers=headers)
    assert response.status_code == 400
    assert next(iter(headers)) in error_of(response)["message"]


def test_a_stream_is_a_message_a_line(http: httpx.Client) -> None:
    story = {"model": {"name": "scripted"}, "prompt": "tell", "sampling": {"temperature": 0, "maxTokens": 5}}
    with http.stream("POST", "/v1/inference:generate", json=story) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/x-ndjson"
        assert response.headers["x-accel-buffering"] == "no"
        lines = [json.loads(line) for line in response.iter_lines()]
    assert len(lines) >= 2  # it came in parts
    assert all(line.keys() == {"result"} for line in lines)
    text = "".join(delta["text"] for line in lines for delta in line["result"]["deltas"])
    assert text == " me a story about"


def test_a_stream_that_fails_before_it_began_has_a_status(http: httpx.Client) -> None:
    response = http.post("/v1/inference:generate", json={"model": {"name": "absent"}, "prompt": "a"})
    assert response.status_code == 404
    assert error_of(response)["reason"] == "MODEL_NOT_FOUND"
    response = http.get("/v1/trainingJobs/absent:logs")
    assert response.status_code == 404
    assert error_of(response)["reason"] == "JOB_NOT_FOUND"


def test_a_stream_that_fails_midway_ends_with_the_error(http: httpx.Client) -> None:
    story = {"model": {"name": "scripted"}, "prompt": "tell", "sampling": {"temperature": 0, "maxTokens": 2000}}
    with http.stream("POST", "/v1/inference:generate", json=story, headers={"x-timeout-ms": "300"}) as response:
        assert response.status_code == 200
        lines = [json.loads(line) for line in response.iter_lines()]
    assert "result" in lines[0]
    assert lines[-1]["error"]["reason"] == "DEADLINE_EXCEEDED"
    assert lines[-1]["error"]["code"] == 504
    assert lines[-1]["error"]["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/v1/status", "GET"),
        ("/v1/trainingJobs", "GET, POST"),
        ("/v1/skills/a/schedule", "DELETE, PUT"),
        ("/v1/trainingJobs/a:cancel", "POST"),
        ("/v1/inference:embed", "POST"),
        ("/readyz", "GET, HEAD"),
    ],
)
def test_a_refused_method_is_told_the_others(http: httpx.Client, path: str, allow: str) -> None:
    response = http.patch(path)
    assert response.status_code == 405
    assert response.headers["allow"] == allow
    assert allow in error_of(response)["message"]
