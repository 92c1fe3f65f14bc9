"""The gateway before a real server does what its OpenAPI document says, for every operation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.conformance import Site, conform

# Time that schemathesis gets; a longer run finds more.
SECONDS = float(os.environ.get("UNDERSTUDY_CONFORMANCE_S", "30"))
# Examples that ask for what this site does not have, or not any more.
NOT_HERE = {
    "InferenceService_Summarize": 400,
    "InferenceService_Translate": 400,
    "SkillService_PromoteRollout": 400,  # no student is on its way
    "SkillService_RollbackRollout": 400,
    "TrainingService_CreateTrainingJob": 409,  # the older path has queued the same
    "ModelService_LoadAdapter": 404,
    "ModelService_LoadAdapter_2": 404,
    "ModelService_UnloadAdapter": 404,
    "ModelService_UnloadAdapter_2": 404,
    "ModelService_DeleteModel": 400,  # loaded
    "Older_DeleteModel": 400,
}


@pytest.fixture(scope="module")
def site(gateway_binary: Path, small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    running = Site(tmp_path_factory.mktemp("conformance"), small_models)
    yield running
    running.close()


def requests_of(document: dict[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
    """Operation, method, URL and body of each example."""
    for path, item in document["paths"].items():
        for verb, operation in item.items():
            url = path
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path":
                    url = url.replace("{" + parameter["name"] + "}", parameter["example"])
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {"examples": {"": {"value": None}}})
            for example in content["examples"].values():
                yield operation["operationId"], verb, url, example["value"]


def test_every_example_is_answered(site: Site) -> None:
    """What takes models away comes last."""
    document = site.document()
    interaction = document["paths"]["/v1/interactions/{interaction}"]["get"]["parameters"][0]["example"]
    asked = sorted(requests_of(document), key=lambda one: "UnloadModel" in one[0] or "DeleteModel" in one[0])
    wrong = []
    with httpx.Client(base_url=site.url, timeout=120) as http:
        for operation, verb, url, body in asked:
            params = {"interactionId": interaction} if operation == "FeedbackService_ListFeedback" else {}
            params |= {"noFollow": "true"} if operation == "TrainingService_StreamTrainingJobLogs" else {}
            answer = http.request(verb.upper(), url, json=body, params=params)
            if answer.status_code != NOT_HERE.get(operation, 200):
                wrong.append((operation, url, answer.status_code, answer.text[:300]))
            if "UnloadModel" in operation:
                http.post("/v1/models/all-minilm-l6-v2:load", json={})
    assert not wrong, "\n".join(map(str, wrong))


def test_no_operation_answers_otherwise_than_documented(site: Site, tmp_path: Path) -> None:
    outcome = conform(site, tmp_path, seconds=SECONDS)
    assert not outcome.failures, "\n\n".join(outcome.failures)
    assert outcome.tested == outcome.operations
    assert outcome.cases > 4 * outcome.operations
