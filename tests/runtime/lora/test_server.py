"""Adapters through the real server: from a PEFT folder by the command line to an answer, and away again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from typer.testing import CliRunner

from server.commands.adapters import app
from server.core import Task
from server.errors import UnderstudyError
from server.runtime.graphs.build import build
from server.runtime.repository import Repository
from tests.runtime.lora.models import peft_adapter
from tests.server_process import ROOT, ServerProcess
from tests.small_models import HIDDEN, write_bert
from understudy.client import Client
from understudy.errors import FailedPrecondition, NotFound

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A BERT with places for adapters, one without, and two adapters that PEFT saved."""
    root = tmp_path_factory.mktemp("adapters")
    repository = Repository(root / "models")
    write_bert(root / "bert", Task.FEATURE_EXTRACTION, [])
    for name in ("embedder", "plain"):
        with repository.staging() as staged:
            built = build(root / "bert", staged, task=Task.FEATURE_EXTRACTION, form="float32", adapters=name == "embedder")
            (staged / "tokenizer.json").write_bytes((root / "bert" / "tokenizer.json").read_bytes())
            fields = {**built.manifest, "task": "feature-extraction", "form": "packed", "pooling": "mean", "normalize": False}
            repository.publish(staged, name, fields)
    for seed, rank in ((1, 4), (2, 8), (3, 64)):
        model = transformers.BertModel.from_pretrained(root / "bert", add_pooling_layer=False)
        peft_adapter(model, peft.LoraConfig(r=rank, lora_alpha=8, target_modules=["query", "value"]), seed, root / f"rank{rank}")
    return repository


def understudy(repository: Repository, *words: str, code: int = 0) -> str:
    """What `understudy adapters ...` prints, run in this process."""
    done = CliRunner().invoke(app, [*words, "--models", str(repository.root)])
    said = done.output + (done.exception.message if isinstance(done.exception, UnderstudyError) else "")
    assert done.exit_code == code, said
    return said


@pytest.fixture(scope="module")
def client(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = repository.root.parent
    command = [sys.executable, "-m", "server.cli", "adapters", "add", str(folder / "rank4"), "--base", "embedder", "--name", "small"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--models", str(repository.root)], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Added small@1 for embedder@1: lora, rank 4")
    running = ServerProcess(tmp_path_factory.mktemp("server"), "[server]\ngrace_s = 5", models=repository.root)
    running.wait_ready()
    with Client(running.address) as client:
        yield client
    running.stop(allow_errors=True)


def vectors(client: Client, texts: list[str], adapter: str = "") -> np.ndarray:
    return client.embed(texts, model="embedder", adapter=adapter)


def test_from_a_folder_of_pefts_to_an_answer(client: Client, repository: Repository) -> None:
    folder = repository.root.parent
    texts = ["where is my card", "the money is late", "london"]
    plain, small = vectors(client, texts), vectors(client, texts, "small")  # loaded at the start
    assert plain.shape == (3, HIDDEN)
    assert np.abs(small - plain).max() > 0.01
    with pytest.raises(NotFound, match="'small'"):
        vectors(client, texts, "large")
    assert "rank 8" in understudy(repository, "add", str(folder / "rank8"), "--base", "embedder", "--name", "large", "--license", "mit")
    assert [(one.name, one.state, one.rank, one.license) for one in client.adapters.list("embedder")] == [
        ("large", "unloaded", 8, "mit"),
        ("small", "ready", 4, ""),
    ]
    loaded = client.adapters.load("embedder", "large")
    assert (loaded.version, loaded.state, loaded.kind, loaded.current, loaded.resident, loaded.base) == (
        "1", "ready", "lora", True, True, "embedder@1",
    )  # fmt: skip
    large = vectors(client, texts, "large@1")
    assert np.abs(large - small).max() > 0.01
    np.testing.assert_array_equal(vectors(client, texts, "small"), small)
    np.testing.assert_array_equal(vectors(client, texts), plain)
    (gone,) = client.adapters.unload("embedder", "large")
    assert (gone.state, gone.active_requests) == ("unloaded", 0)
    with pytest.raises(NotFound):
        vectors(client, texts, "large")
    with pytest.raises(NotFound):
        client.adapters.unload("embedder", "large")


def test_what_cannot_be_loaded_says_why(client: Client, repository: Repository) -> None:
    folder = repository.root.parent
    understudy(repository, "add", str(folder / "rank64"), "--base", "embedder", "--name", "wide")
    with pytest.raises(FailedPrecondition, match=r"generation\.adapter_rank"):
        client.adapters.load("embedder", "wide")
    with pytest.raises(FailedPrecondition, match="--adapters"):
        client.adapters.load("plain", "small")
    with pytest.raises(FailedPrecondition, match="--adapters"):
        client.embed(["a"], model="plain", adapter="small")
    assert "places for LoRA" in understudy(repository, "add", str(folder / "rank4"), "--base", "plain", "--name", "small", code=1)
    assert client.adapters.list("plain") == []


def test_the_command_line_lists_verifies_and_removes(repository: Repository) -> None:
    folder = repository.root.parent
    understudy(repository, "add", str(folder / "rank4"), "--base", "embedder", "--name", "passing")
    assert "passing" in understudy(repository, "list", "embedder")
    assert "passing@1: good" in understudy(repository, "verify", "embedder", "passing")
    data = repository.root / "adapters" / "embedder" / "passing" / "1" / "adapter.onnx_adapter"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    assert "SHA-256" in understudy(repository, "verify", "embedder", "passing", code=1)
    assert "Deleted passing@1" in understudy(repository, "remove", "embedder", "passing", "--yes")
    understudy(repository, "add", str(folder / "rank4"), "--base", "embedder", "--name", "passing")
    assert "passing@2" in understudy(repository, "verify", "embedder", "passing")
    assert "'passing'" in understudy(repository, "remove", "embedder", "pasing", "--yes", code=1)
