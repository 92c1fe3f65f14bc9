"""Students of entities, ranking and embeddings, from a lake on the disk to a model that the server's runtime serves."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.config import Config, load_config
from server.core import Call, Task
from server.lake import table
from server.lake.ids import IdKey
from server.lake.log import Log
from server.lake.schema import INTERACTIONS
from server.registry.registry import Registry
from server.runtime.loader import make_loader
from server.runtime.observer import NullObserver
from server.runtime.pull import pull
from server.runtime.references import Reference, read_reference
from server.runtime.repository import Repository
from server.runtime.runtime import Runtime
from tests.checkpoints import checkpoint
from trainer.context import JobContext
from trainer.encoders.run import train
from trainer.report import Report

WORDS = [f"w{i}" for i in range(26)]  # what tests/checkpoints.py has behind its own words
PEOPLE, PLACES, OTHERS = WORDS[:6], WORDS[6:12], [*WORDS[12:], "the", "card", "is", "lost", "my", "where", "pay"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other on models this small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the model "tiny" and beside it the checkpoint that it was made of."""
    root = tmp_path_factory.mktemp("base")
    checkpoint(root / "checkpoint", seed=3)
    pull(str(root / "checkpoint"), Repository(root / "models"), name="tiny", dtype="float32")
    return root


@pytest.fixture
def workplace(tmp_path: Path, base: Path) -> Path:
    import shutil

    shutil.copytree(base / "models", tmp_path / "models")
    return tmp_path


def config(workplace: Path, base: Path, **skills: dict[str, Any]) -> Config:
    lines = [f"[models]\npath = {json.dumps(str(workplace / 'models'))}", f"[lake]\npath = {json.dumps(str(workplace / 'lake'))}"]
    lines.append(f"[registry]\nurl = {json.dumps(f'sqlite:///{workplace}/registry.db')}")
    lines.append(f"[training.sources]\ntiny = {json.dumps(str(base / 'checkpoint'))}")
    lines.append("[providers.vendor]")
    for name, settings in skills.items():
        lines.append(f"[skills.{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in {"base": "tiny", "teacher": "vendor/big", **settings}.items()]
    (workplace / "understudy.toml").write_text("\n".join(lines) + "\n")
    return load_config(workplace / "understudy.toml", environ={})


def fill(lake: Path, rows: Iterable[dict[str, Any]], skill: str, **more: object) -> list[str]:
    """Interactions as the router writes them; gives their ids."""
    key = IdKey.open(lake / "id.key")
    log = Log(table.log_folder(lake, INTERACTIONS))
    ids = []
    base = {"skill": skill, "input_kind": "text", "training_allowed": True, "source_model": "big", "candidate": "vendor/big", **more}
    for row in rows:
        ids.append(key.new())
        log.append([{"time_ns": time.time_ns(), "interaction_id": ids[-1], **base, **row}])
    log.close()
    table.convert(lake, INTERACTIONS)
    return ids


def named(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts whose people and places the teacher finds, in the words in which the server records a provider's answer."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        words, entities = [], []
        for _ in range(rng.randint(4, 9)):
            kind = rng.choice(["", "", "", "person", "place"])
            word = rng.choice({"": OTHERS, "person": PEOPLE, "place": PLACES}[kind])
            if kind and word not in words:
                entities.append({"text": word, "label": kind})
            elif kind:
                continue
            words.append(word)
        answer = json.dumps(entities)
        rows.append({"input": " ".join(words), "teacher_text": answer, "output_text": answer})
    return rows


def context(workplace: Path, settings: Config, skill: str, **more: Any) -> JobContext:
    registry = Registry(settings.registry)
    job = registry.start_job(skill, "train")
    registry.close()
    return JobContext(job, workplace / "jobs" / job, **more)


def run(workplace: Path, settings: Config, skill: str, spec: dict[str, Any] | None = None, **more: Any) -> Report:
    return train(settings, skill, context(workplace, settings, skill, **more), spec or {})


async def serve(settings: Config, reference: Reference, ask: Any) -> Any:
    """What `ask(model, call)` gives with the model that a reference points to."""
    runtime = Runtime(Repository(Path(settings.models.path)), make_loader(settings.runtime, NullObserver()))
    try:
        await runtime.load(reference.target.model, reference.target.version)
        assert runtime.manifest(reference.target.model).files["model.onnx"].sha256 == reference.target.sha256
        with runtime.use(reference.target.model) as model:
            return await ask(model, Call("test"))
    finally:
        await runtime.close()


async def test_entities_from_a_lake_to_a_model_that_serves(workplace: Path, base: Path) -> None:
    import asyncio

    settings = config(workplace, base, people={"task": "token-classification", "labels": ["person", "place"]})
    fill(workplace / "lake", named(320, 1), "people")
    report = await asyncio.to_thread(run, workplace, settings, "people", {"method": "full", "learning_rate": 3e-3, "epochs": 6})
    assert (report.state, report.version, report.reason) == ("succeeded", "1", "")
    reference = read_reference(workplace / "models" / "adapters" / "people" / "1")
    assert reference.metrics["f1"] > 0.9 and reference.metrics["parity/agreement"] >= 0.95

    async def ask(model: Any, call: Call) -> Any:
        assert model.manifest.task is Task.TOKEN_CLASSIFICATION
        return (await model.extract_entities(["where is w2 w7 card"], call=call)).items[0]

    found = await serve(settings, reference, ask)
    assert [(one.text, one.label, one.start) for one in found] == [("w2", "person", 9), ("w7", "place", 12)]

