"""The paths of older designs: each is a call of the server, bodies by the messages' names and by their aliases, errors in the one form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import StartServer
from tests.gateway.conftest import StartGateway
from tests.gateway_process import GatewayProcess
from tests.made import ROOT

# The list that older designs promised.
PROMISED = """
POST /task · POST /feedback · GET /capabilities · GET /models · GET /stats · GET /api/models/status · POST /api/models/init
GET /api/budget/status · POST /api/agents · POST /api/training/jobs · GET /api/training/jobs/{id} · DELETE /api/training/jobs/{id}
GET /api/training/jobs/{id}/logs · GET /api/models · GET /api/models/{id} · DELETE /api/models/{id} · POST /api/models/{id}/deploy
POST /api/inference/{model_id} · POST /api/inference/{model_id}/batch · GET /health · POST /models/load · POST /models/infer
"""


@pytest.fixture(scope="module")
def http(gateway: GatewayProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=30) as client:
        yield client


def post(http: httpx.Client, path: str, body: object, code: int = 200) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == code, answer.text
    assert answer.headers["content-type"] == "application/json"
    return dict(answer.json())


def get(http: httpx.Client, path: str, code: int = 200) -> dict[str, Any]:
    answer = http.get(path)
    assert answer.status_code == code, answer.text
    return dict(answer.json())


def refused(http: httpx.Client, path: str, body: object, field: str) -> str:
    """The message of a 400 that names the field."""
    error = post(http, path, body, 400)["error"]
    assert error["reason"] == "INVALID_ARGUMENT" and error["metadata"]["field"] == field, error
    return str(error["message"])


def test_all_that_was_promised_is_served_and_documented(http: httpx.Client) -> None:
    document = json.loads((ROOT / "gateway" / "openapi" / "openapi.json").read_text())
    promised = [tuple(one.split()) for one in re.split(r"[·\n]", PROMISED) if one.strip()]
    assert len(promised) == 22
    for verb, path in promised:
        assert verb.lower() in document["paths"][path], path
        other = http.request("PATCH", path.replace("{", "").replace("}", ""))
        assert other.status_code == 405, path
        assert verb in other.headers["allow"].split(", ")
        assert other.json()["error"]["reason"] == "METHOD_NOT_ALLOWED"


@pytest.mark.parametrize("name", ["task", "prompt", "input", "text"])
def test_a_task_by_any_of_its_names(http: httpx.Client, name: str) -> None:
    answer = post(http, "/task", {"skill": "text-classification", name: "my card is lost"})
    assert answer["output"] == answer["results"][0]["outputText"] in ("card", "transfer", "password")
    assert answer["id"] == answer["results"][0]["interactionId"] != ""
    assert answer["local"] is True and answer["costUsd"] == 0 and answer["model"] == "local:classifier@1"
    assert answer["skill"] == "text-classification"


def test_a_task_in_plain_words_about_its_context(http: httpx.Client) -> None:
    answer = post(http, "/task", {"task": "extract the named entities", "context": "ada lived in london"})
    assert answer["results"][0]["decision"]["task"] == "token-classification"
    asked = post(http, "/task", {"skill": "question-answering", "task": "where?", "context": "ada lived in london"})
    assert asked["output"] in "ada lived in london"
    more = post(http, "/task", {"skill": "text-classification", "inputs": [{"text": "a card"}, {"text": "money"}]})
    assert len(more["results"]) == 2 and "output" not in more


def test_a_context_of_names_becomes_parameters(http: httpx.Client) -> None:
    body = {"skill": "text-classification", "text": "a card", "context": {"top_k": 1}, "parameters": {"top_k": "2"}}
    assert "`top_k`" in refused(http, "/task", body, "context")
    refused(http, "/task", {"text": "a", "context": 5}, "context")
    refused(http, "/task", {"text": "a", "context": {"deep": {}}}, "context")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/task", {"task": "a", "text": "b"}, "text"),
        ("/task", {}, "task"),
        ("/task", {"task": 5}, "task"),
        ("/task", {"taskx": "a"}, "taskx"),
        ("/task", {"context": "a"}, "context"),
        ("/task", {"skill": "text-classification", "text": "a", "inputs": [{"text": "b"}]}, "inputs"),
        ("/task", {"maxCost": {}, "max_cost": {}, "text": "a"}, "max_cost"),
        ("/api/agents", {"agent": "a", "name": "b", "text": "c"}, "name"),
        ("/feedback", {"interaction_id": "a", "task_id": "b"}, "task_id"),
        ("/feedback", {"rating": 5}, "interaction_id"),
        ("/feedback", {"id": "a", "rating": 5, "score": 5}, "score"),
        ("/feedback", {"id": "a", "thumb": "sideways"}, "thumb"),
        ("/models/load", {}, "model"),
        ("/models/load", {"model": "embedder", "model_id": "embedder"}, "model_id"),
        ("/models/load", {"model": "embedder@1", "version": "2"}, "version"),
        ("/models/load", {"model": "embedder", "speed": 1}, "speed"),
        ("/models/load", {"model": "embedder", "replace": "yes"}, "replace"),
        ("/models/infer", {"input": "a"}, "model"),
        ("/models/infer", {"model": "embedder"}, "input"),
        ("/models/infer", {"model": "embedder", "input": "a", "texts": ["b"]}, "texts"),
        ("/models/infer", {"model": "adder", "input": "a"}, "model"),
        ("/api/inference/embedder", {"inputs": ["a", "b"]}, "inputs"),
        ("/api/inference/embedder", {"input": 5}, "input"),
        ("/api/inference/embedder", {"input": "a", "normalize": True, "parameters": {"normalize": False}}, "normalize"),
        ("/api/inference/embedder", {"input": "a", "parameters": 1}, "parameters"),
        ("/api/inference/embedder/batch", {"input": "a"}, "input"),
        ("/api/inference/embedder/batch", {"inputs": []}, "inputs"),
        ("/api/training/jobs", {}, "skill"),
        ("/api/training/jobs", {"skill": "a", "skill_name": "b"}, "skill_name"),
        ("/api/training/jobs", {"skill": "a", "kind": "paint"}, "kind"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_was_expected(http: httpx.Client, path: str, body: object, field: str) -> None:
    assert "expected" in (message := refused(http, path, body, field)) or "works on" in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"a"', b"5", b'{"a": 1} {}', b'{"text": "a", "text": "b"}', b"\xff", b"null"])
def test_bodies_that_are_no_object_are_refused(http: httpx.Client, content: bytes) -> None:
    answer = http.post("/task", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    form = http.post("/task", content=b"text=a", headers={"content-type": "application/x-www-form-urlencoded"})
    assert form.status_code == 415


def test_an_agent_is_a_skill(http: httpx.Client) -> None:
    for name in ("agent", "agent_id", "agent_name", "name", "skill"):
        answer = post(http, "/api/agents", {name: "text-classification", "message": "my card is lost"})
        assert answer["agent"] == answer["skill"] == "text-classification"
        assert answer["output"] in ("card", "transfer", "password")
    assert post(http, "/api/agents", {"agent": "absent", "message": "a"}, 404)["error"]["reason"] == "SKILL_NOT_FOUND"


def test_feedback_by_its_aliases(http: httpx.Client) -> None:
    answer = post(http, "/task", {"skill": "text-classification", "text": "my card is lost"})
    for name, more in (
        ("interaction_id", {"thumb": "up"}),
        ("task_id", {"score": 2, "correction": "card"}),
        ("id", {"thumb": False, "comment": "no"}),
    ):
        kept = post(http, "/feedback", {name: answer["id"], **more})
        assert kept["feedback"]["interactionId"] == answer["id"] and kept["id"] == kept["feedback"]["feedbackId"]
    assert kept["feedback"]["thumb"] == "THUMB_DOWN"
    assert post(http, "/feedback", {"id": "absent", "rating": 5}, 404)["error"]["reason"] == "INTERACTION_NOT_FOUND"


def test_what_there_is(http: httpx.Client) -> None:
    able = get(http, "/capabilities")
    tasks = {one["task"]: one for one in able["tasks"]}
    assert "classifier" in tasks["text-classification"]["models"] and "text-classification" in tasks["text-classification"]["skills"]
    assert "embedder" in able["models"] and able["version"]
    listed = get(http, "/models")
    assert listed == get(http, "/api/models")
    assert listed["total"] == len(listed["models"]) and {"adder", "embedder"} <= {one["modelId"] for one in listed["models"]}
    assert get(http, "/stats").keys() == {"startTime", "total", "skills"}
    state = get(http, "/api/models/status")
    assert state["status"] == "ready" and state["total"] == len(state["models"]) > 0
    assert get(http, "/api/budget/status")["status"] == "ok"
    assert get(http, "/api/budget/status?scope=skill:absent", 404)["error"]["status"] == "NOT_FOUND"
    assert get(http, "/health") == {"status": "ok"}
    assert http.head("/health").status_code == 200


def test_a_model_with_its_versions(http: httpx.Client) -> None:
    adder = get(http, "/api/models/adder")
    assert [one["version"] for one in adder["versions"]] == ["1", "2"]
    assert adder["id"] == "adder" and adder["model"]["version"] == "2" and adder["status"] == "ready"
    assert [one["version"] for one in get(http, "/api/models/adder@1")["versions"]] == ["1"]
    assert get(http, "/api/models/absent", 404)["error"]["reason"] == "MODEL_NOT_FOUND"
    assert get(http, "/api/models/adder@9", 404)["error"]["reason"] == "VERSION_NOT_FOUND"
    loaded = http.delete("/api/models/embedder")
    assert loaded.status_code == 400 and loaded.json()["error"]["reason"] == "MODEL_IN_USE"


@pytest.mark.parametrize("path", ["/api/models/init", "/models/load"])
def test_loading_by_any_of_the_names(http: httpx.Client, path: str) -> None:
    for name in ("model", "model_id", "model_name", "name"):
        assert post(http, path, {name: "embedder"})["status"] == "ready"
    assert post(http, path, {"model": "embedder", "version": 1})["model"]["version"] == "1"
    assert post(http, path, {"model": "absent"}, 404)["error"]["reason"] == "MODEL_NOT_FOUND"


def test_each_task_by_its_model(http: httpx.Client) -> None:
    vector = post(http, "/api/inference/embedder", {"input": "my card"})
    assert vector["task"] == "feature-extraction" and len(vector["result"]["embedding"]) == 32
    assert vector["result"] == post(http, "/models/infer", {"model": "embedder@1", "inputs": ["my card"]})["results"][0]
    best = post(http, "/api/inference/classifier", {"inputs": "my card", "parameters": {"top_k": 1}})
    assert len(best["result"]["labels"]) == 1
    pairs = post(http, "/api/inference/classifier/batch", {"inputs": ["my card", {"text": "a", "text_pair": "b"}]})
    assert len(pairs["results"]) == 2
    found = post(http, "/api/inference/tagger/batch", {"texts": ["ada lived in london", "who"]})
    assert len(found["results"]) == 2
    answer = post(http, "/api/inference/reader", {"question": "where?", "context": "in london"})
    assert answer["result"]["answers"][0]["text"] in "in london"
    ranked = post(http, "/api/inference/ranker", {"query": "where", "documents": ["in london", "my card"]})
    assert {one["index"] for one in ranked["results"]} == {0, 1}
    written = post(http, "/api/inference/scripted", {"prompt": "the", "max_new_tokens": 3})
    assert written["result"]["finishReason"] == "FINISH_REASON_LENGTH" and written["usage"]["outputTokens"] == "3"
    replied = post(http, "/api/inference/scripted", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3})
    assert replied["usage"]["outputTokens"] == "3"
    assert post(http, "/api/inference/absent", {"input": "a"}, 404)["error"]["reason"] == "MODEL_NOT_FOUND"


def test_a_bad_item_of_a_batch_is_its_own(http: httpx.Client) -> None:
    long = "card " * 200
    mixed = post(http, "/api/inference/embedder/batch", {"inputs": ["card", long]})
    assert mixed["results"][0]["error"] is None and "64" in mixed["results"][1]["error"]["message"]
    assert post(http, "/api/inference/embedder", {"input": long}, 400)["error"]["reason"] == "INPUT_TOO_LONG"


def test_a_job_from_its_order_to_its_end(start_server: StartServer, start_gateway: StartGateway, tmp_path: Path) -> None:
    config = f"""
[registry]
url = "sqlite:///{tmp_path}/registry.db"
[skills.intent]
task = "text-classification"
labels = ["card", "transfer"]
base = "embedder"
min_rows = 1
"""
    server = start_server(config)
    with httpx.Client(base_url=start_gateway(server.address).url, timeout=30) as http:
        queued = post(http, "/api/training/jobs", {"skill_name": "intent", "type": "assess", "seed": 7})
        assert queued["status"] == "queued" and queued["job"]["skill"] == "skills/intent" and queued["job"]["seed"] == 7
        path = f"/api/training/jobs/{queued['id']}"
        assert get(http, path)["job"] == queued["job"]
        assert (
            post(http, "/api/training/jobs", {"skill": "skills/intent", "kind": "assess", "seed": 7}, 409)["error"]["reason"]
            == "ALREADY_EXISTS"
        )
        ended = http.delete(path)
        assert ended.status_code == 200 and ended.json()["status"] == "cancelled"
        logs = get(http, f"{path}/logs?after=0")
        assert logs["status"] == "cancelled" and isinstance(logs["lines"], list)
        assert get(http, f"{path}/logs?after=many", 400)["error"]["metadata"]["field"] == "after"
    for verb, absent in (("GET", ""), ("DELETE", ""), ("GET", "/logs")):
        with httpx.Client(base_url=start_gateway(server.address).url) as http:
            gone = http.request(verb, f"/api/training/jobs/absent{absent}")
            assert gone.status_code == 404 and gone.json()["error"]["reason"] == "JOB_NOT_FOUND"


def test_without_a_server_health_says_so(start_gateway: StartGateway) -> None:
    with httpx.Client(base_url=start_gateway("127.0.0.1:1").url, timeout=30) as http:
        assert get(http, "/health", 503)["error"]["status"] == "UNAVAILABLE"
        assert http.get("/docs").status_code == 200
