"""The clients in other languages, by their own test runners, against one server process: what Python's client gets is what they must get.

Each suite reads from the environment where the servers are, and UNDERSTUDY_EXPECTED: a JSON file of texts and answers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import generation_models
from tests.clients.scripted_server import scripted_server
from tests.server_process import ROOT, ServerProcess
from understudy.client import Client

CLIENTS = ROOT / "clients"
TEXTS = ["where is my card ?", "how do i reset my password ?", "money transfer late"]
PROMPT = "tell"
SAMPLING = {"temperature": 1.0, "seed": 11, "max_tokens": 24}
SKILL = "text-classification"
# Language -> folder, test runner, and what must be there: `make clients` builds all of it.
SUITES: dict[str, tuple[str, list[str], str]] = {
    "go": ("go", ["go", "test", "-count=1", "./..."], "gen/understudy"),
    "typescript": ("typescript", ["npm", "--silent", "test"], "dist/test"),
    "java": ("java", ["mvn", "-o", "-q", "-B", "surefire:test"], "target/test-classes"),
    "rust": ("rust", ["cargo", "test", "--offline", "-j1"], "target/debug"),
}
# Language -> its example, as its README starts it.
EXAMPLES: dict[str, list[str]] = {
    "go": ["go", "run", "./example"],
    "typescript": ["node", "dist/examples/tour.js"],
    "java": ["mvn", "-o", "-q", "-B", "exec:java"],
    "rust": ["cargo", "run", "--offline", "-q", "--example", "tour"],
}


@pytest.fixture(scope="module")
def environment(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What every suite gets: the addresses, and what Python's client was answered."""
    folder = tmp_path_factory.mktemp("languages")
    config = f"""
[lake]
path = {json.dumps(str(folder / "lake"))}
[registry]
url = {json.dumps(f"sqlite:///{folder / 'registry.db'}")}
"""
    server = ServerProcess(folder, config, models=small_models)
    try:
        server.wait_ready()
        expected = folder / "expected.json"
        expected.write_text(json.dumps(ask_python(server.address)))
        with scripted_server(folder) as scripted:
            yield {
                **os.environ,
                "UNDERSTUDY_ADDRESS": server.address,
                "UNDERSTUDY_EXPECTED": str(expected),
                "UNDERSTUDY_SCRIPTED": scripted.address,
                "UNDERSTUDY_SCRIPTED_TLS": scripted.tls_address,
                "UNDERSTUDY_CA": str(scripted.ca_file),
            }
    finally:
        server.stop()


def ask_python(address: str) -> dict[str, Any]:
    """Questions, and Python's answers to them, by the names that every suite reads."""
    with Client(address) as client:
        vectors = client.embed(TEXTS)
        labels = client.classify(TEXTS)
        runs = client.run(SKILL, TEXTS)
        assert client.feedback(runs[0].interaction_id, thumb="up")
        return {
            "texts": TEXTS,
            "embeddings": vectors.astype(float).tolist(),
            "labels": [[[label.name, label.score] for label in one.labels] for one in labels],
            "skill": SKILL,
            "answers": [one.text for one in runs],
            "prompt": PROMPT,
            "sampling": SAMPLING,
            "text": client.generate_text(PROMPT, model=generation_models.NAME, **SAMPLING).text,
            "model": generation_models.NAME,
        }


@pytest.mark.parametrize("language", SUITES)
def test_suite_passes(language: str, environment: Mapping[str, str]) -> None:
    folder, command, built = SUITES[language]
    run(CLIENTS / folder, command, built, environment)


@pytest.mark.parametrize("language", EXAMPLES)
def test_example_runs(language: str, environment: Mapping[str, str]) -> None:
    folder, _, built = SUITES[language]
    said = run(CLIENTS / folder, EXAMPLES[language], built, environment)
    for words in ("3 vectors of 32", "Greta", "feedback", "MODEL_NOT_FOUND", "DEADLINE_EXCEEDED"):
        assert words in said, said


def run(folder: Path, command: list[str], built: str, environment: Mapping[str, str]) -> str:
    """Output of a command that must succeed. Skips where its language is not installed; fails where its client is not built."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    assert (folder / built).exists(), f"{folder / built} is missing: `make clients` builds it"
    done = subprocess.run(command, cwd=folder, env=dict(environment), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-20_000:]
    return done.stdout + done.stderr
