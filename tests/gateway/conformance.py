"""Holds the gateway to its OpenAPI document: a site on which the document's examples are true, and schemathesis over every operation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.gateway_process import GatewayProcess
from tests.made import make
from tests.providers.loopback import OpenAIServer, Reply
from tests.server_process import ServerProcess

# The document's names, and the small models that stand for them here.
MODELS = {"all-minilm-l6-v2": "embedder", "smollm2-135m-instruct": "scripted", "classifier": "classifier", "ranker": "ranker"}
MODELS |= {"llama": "scripted", "tagger": "tagger", "reader": "reader", "adder": "adder"}
EXAMPLE_KEY = "7f3k2m9q"
EXAMPLE_JOB = "9c1e5b7a2d4f60813c5e7a9b1d2f4e60"
EXAMPLE_INTERACTION = "019a9c1e5b7a7d4f60813c5e7a9b1d2f"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)
# What takes models away is tried last, so that the others have some to work with.
DESTRUCTIVE = "(UnloadModel|DeleteModel)"
# A caller who gives an answer less time than it takes gets 504, as documented; no other 5xx is let pass, nor this one elsewhere.
HURRIED = ("/v1/ensembles:run", "/v1/inference:run", "/task", "/api/agents")
CONFIG = """
[server]
grace_s = 5
[models.default]
text-generation = "smollm2-135m-instruct"
[lake]
path = {lake}
flush_s = 0.3
[registry]
url = {registry}
[budget.total]
day_usd = 5.0
[providers.openai]
base_url = "{vendor}"
api_key_env = "LOOP_KEY"
training_allowed = true
requests_per_minute = 100000
[providers.openai.prices."gpt-4o-mini"]
input_per_million_usd = 2.5
output_per_million_usd = 10.0
[skills.support-intent]
task = "text-classification"
instruction = "Which intent does the customer have?"
labels = ["card_arrival", "transfer", "fees"]
teacher = "openai/gpt-4o-mini"
base = "all-minilm-l6-v2"
min_rows = 1
[skills.support-reply]
task = "text-generation"
instruction = "Answer the customer."
teacher = "openai/gpt-4o-mini"
"""
WAIT_S = 20.0


class Site:
    """A server and a gateway for which the document's examples hold. `url` is the gateway's; it lives until `close`."""

    def __init__(self, folder: Path, small_models: Path) -> None:
        models = folder / "models"
        for name, small in MODELS.items():
            shutil.copytree(small_models / small, models / name)
            for manifest in (models / name).glob("*/manifest.json"):
                manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "name": name}))
        self.vendor = OpenAIServer(lambda _number, _text: Reply("card_arrival"))
        paths = {"lake": json.dumps(str(folder / "lake")), "registry": json.dumps(f"sqlite:///{folder / 'registry.db'}")}
        config = CONFIG.format(vendor=self.vendor.base_url, **paths)
        self.server = ServerProcess(folder / "server", config, models=models, env={"LOOP_KEY": "sk-loop"})
        self.server.wait_ready()
        self.gateway = GatewayProcess(self.server.address)
        self.url = self.gateway.url

    def close(self) -> None:
        self.gateway.stop()
        self.server.stop(allow_errors=True)
        self.vendor.close()

    def document(self) -> dict[str, Any]:
        """The document, with an interaction, a job and a key that there are in its examples."""
        with httpx.Client(base_url=self.url, timeout=120) as http:
            text = http.get("/openapi.json").text
            ran = http.post("/v1/inference:run", json={"skill": "support-intent", "inputs": [{"text": "Where is my card?"}]})
            interaction = ran.json()["results"][0]["interactionId"]
            job = http.post("/v1/trainingJobs", json={"skill": "skills/support-intent", "kind": "TRAINING_JOB_KIND_ASSESS"})
            made = http.post("/v1/apiKeys", json={"displayName": "an application", "role": "ROLE_USER"})
            key = made.json()["apiKey"]["name"].removeprefix("apiKeys/")
            _until(lambda: http.get(f"/v1/interactions/{interaction}").status_code == 200)
        assert job.status_code == 200, job.text
        name = job.json()["trainingJob"]["name"].removeprefix("trainingJobs/")
        for example, true in ((EXAMPLE_INTERACTION, interaction), (EXAMPLE_JOB, name), (EXAMPLE_KEY, key)):
            text = text.replace(example, true)
        found: dict[str, Any] = json.loads(text)
        return found


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)  # between looks from outside


@dataclass
class Outcome:
    """What schemathesis found. `failures` is empty where all was as documented."""

    operations: int = 0
    tested: int = 0
    cases: int = 0
    failures: list[str] = field(default_factory=list)


def conform(site: Site, folder: Path, *, seconds: float, seed: int | None = None) -> Outcome:
    """Runs schemathesis over all operations: the examples and a few values by chance of each; for `seconds` the edges of each schema and
    more values by chance; then what takes models away.
    """
    document = folder / "openapi.json"
    document.write_text(json.dumps(site.document()))
    settings = folder / "schemathesis.toml"
    allowed = 'checks.not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 504]'
    settings.write_text("\n".join(f'[[operations]]\ninclude-path = "{path}"\n{allowed}' for path in HURRIED))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings), "run", str(document), "--url", site.url]
    command += ["--checks", ",".join(CHECKS), "--continue-on-failure", "--no-shrink", "--request-timeout", "120", "--warnings", "off"]
    command += ["--suppress-health-check", "all", "--no-color", "--report", "json"]
    command += ["--seed", str(seed)] if seed is not None else []
    passes = [
        ["--phases", "examples,fuzzing", "--max-examples", "3", "--exclude-operation-id-regex", DESTRUCTIVE],
        ["--phases", "coverage,fuzzing", "--max-time", str(round(seconds)), "--exclude-operation-id-regex", DESTRUCTIVE],
        ["--phases", "examples,coverage,fuzzing", "--max-examples", "5", "--include-operation-id-regex", DESTRUCTIVE],
    ]
    outcome = Outcome()
    for number, chosen in enumerate(passes):
        report = folder / f"report{number}.json"
        done = subprocess.run(
            [*command, *chosen, "--report-json-path", str(report)], capture_output=True, text=True, cwd=folder, check=False
        )
        assert report.is_file(), done.stdout + done.stderr
        found = json.loads(report.read_text())
        outcome.cases += found["test_cases"]["generated"]
        if "--max-time" not in chosen:  # which may end before it has come to all
            outcome.operations += found["operations"]["selected"]
            outcome.tested += found["operations"]["tested"]
        if found["failures"] or found["errors"] or done.returncode:
            outcome.failures.append(done.stdout.partition("= FAILURES =")[2] or done.stdout)  # with each request as a line of curl
    return outcome


def breaking(base: str) -> str:
    """What `make breaking` says against a commit of git; empty where nothing that clients rely on has changed."""
    done = make("breaking", f"BASE={base}")
    return "" if done.returncode == 0 else done.stdout + done.stderr
