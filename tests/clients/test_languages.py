"""The clients in other languages, by their own test runners, against one server process: what Python's client gets is what they must get.

The server asks for a key, and a gateway stands before it. Each suite reads from the environment where they are, its key, and
UNDERSTUDY_EXPECTED: a JSON file of texts and answers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from server.core import Role
from server.registry.api_keys import ApiKeys, KeySettings
from server.registry.registry import Registry
from server.settings import RegistryConfig
from tests import generation_models
from tests.clients.scripted_server import scripted_server
from tests.gateway_process import GatewayProcess, build_gateway
from tests.made import built
from tests.server_process import ROOT, ServerProcess
from understudy.client import Client
from understudy.options import GenerateOptions

CLIENTS = ROOT / "clients"
TEXTS = ["where is my card ?", "how do i reset my password ?", "money transfer late"]
PROMPT = "tell"
SAMPLING: GenerateOptions = {"temperature": 1.0, "seed": 11, "max_tokens": 24}
SKILL = "text-classification"
# Language -> its test runner.
SUITES: dict[str, list[str]] = {
    "go": ["go", "test", "-count=1", "./..."],
    "typescript": ["npm", "--silent", "test"],
    "java": ["mvn", "-o", "-q", "-B", "surefire:test"],
    "rust": ["cargo", "test", "--offline", "-q"],
}
# Language -> its example, as its README starts it.
EXAMPLES: dict[str, list[str]] = {
    "go": ["go", "run", "./example"],
    "typescript": ["node", "dist/examples/tour.js"],
    "java": ["mvn", "-o", "-q", "-B", "exec:java"],
    "rust": ["cargo", "run", "--offline", "-q", "--example", "tour"],
}
# Language -> the first example of its README, as a file that the build compiles.
FIRST: dict[str, str] = {
    "go": "example/hello/main.go",
    "typescript": "examples/hello.ts",
    "java": "src/test/java/Hello.java",
    "rust": "examples/hello.rs",
}


@pytest.fixture(scope="module")
def environment(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What every suite gets: the addresses, a key, and what Python's client was answered."""
    folder = tmp_path_factory.mktemp("languages")
    url = f"sqlite:///{folder / 'registry.db'}"
    key = ApiKeys(Registry(RegistryConfig(url=url))).create(KeySettings(Role.USER, "languages"), "test")[1]
    config = f"""
[auth]
keys = "required"
[lake]
path = {json.dumps(str(folder / "lake"))}
[registry]
url = {json.dumps(url)}
"""
    build_gateway()
    server = ServerProcess(folder, config, models=small_models)
    try:
        server.wait_ready()
        gateway = GatewayProcess(server.address)
        try:
            expected = folder / "expected.json"
            expected.write_text(json.dumps(ask_python(server.address, key)))
            with scripted_server(folder) as scripted:
                yield {
                    **os.environ,
                    # Where Go or Node.js are not installed the environment's own are taken, as in the Makefile.
                    "PATH": os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)]),
                    "UNDERSTUDY_ADDRESS": server.address,
                    "UNDERSTUDY_GATEWAY": gateway.url,
                    "UNDERSTUDY_API_KEY": key,
                    "UNDERSTUDY_EXPECTED": str(expected),
                    "UNDERSTUDY_SCRIPTED": scripted.address,
                    "UNDERSTUDY_SCRIPTED_TLS": scripted.tls_address,
                    "UNDERSTUDY_CA": str(scripted.ca_file),
                }
        finally:
            gateway.stop()
    finally:
        server.stop()


def ask_python(address: str, key: str) -> dict[str, Any]:
    """Questions, and Python's answers to them, by the names that every suite reads."""
    with Client(address, api_key=key) as client:
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
            "text": client.generate_text(PROMPT, **SAMPLING).text,
            "model": generation_models.NAME,
        }


@pytest.mark.parametrize("language", SUITES)
def test_suite_passes(language: str, environment: Mapping[str, str]) -> None:
    run(language, SUITES[language], environment)


@pytest.mark.parametrize("language", EXAMPLES)
def test_example_runs(language: str, environment: Mapping[str, str]) -> None:
    said = run(language, EXAMPLES[language], environment)
    for words in ("3 vectors of 32", "Greta", "feedback", "MODEL_NOT_FOUND", "DEADLINE_EXCEEDED"):
        assert words in said, said


@pytest.mark.parametrize("language", FIRST)
def test_the_readme_shows_what_is_compiled(language: str) -> None:
    example = (CLIENTS / language / FIRST[language]).read_text(encoding="utf-8")
    assert f"\n{example}```\n" in (CLIENTS / language / "README.md").read_text(encoding="utf-8")


def run(language: str, command: list[str], environment: Mapping[str, str]) -> str:
    """Output of a command that must succeed, in the folder of a client, which is built first. Skips where the language is not installed."""
    if shutil.which(command[0], path=environment["PATH"]) is None:
        pytest.skip(f"{command[0]} is not installed")
    built(f"client-{language}")
    done = subprocess.run(command, cwd=CLIENTS / language, env=dict(environment), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-20_000:]
    return done.stdout + done.stderr
