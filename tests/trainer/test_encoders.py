"""Students of entities, ranking and embeddings, from a lake on the disk to a model that the server's runtime serves."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.config import Config, load_config
from server.core import Call, Task
from server.errors import Cancelled, FailedPrecondition, InvalidArgument, ModelNotFound, SkillNotFound, TooLittleData
from server.lake import table
from server.lake.ids import IdKey
from server.lake.log import Log
from server.lake.schema import FEEDBACK, INTERACTIONS
from server.registry.registry import Registry
from server.runtime.loader import make_loader
from server.runtime.observer import NullObserver
from server.runtime.pull import pull
from server.runtime.references import Reference, read_reference
from server.runtime.repository import Repository
from server.runtime.runtime import Runtime
from tests.checkpoints import checkpoint
from trainer.context import JobContext
from trainer.encoders import examples, export, judge
from trainer.encoders.run import train
from trainer.report import Report

WORDS = [f"w{i}" for i in range(26)]  # what tests/checkpoints.py has behind its own words
PLAIN = ["the", "card", "is", "lost", "my", "where", "pay"]
PEOPLE, PLACES, OTHERS = WORDS[:6], WORDS[6:12], [*WORDS[12:], *PLAIN]


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
def site(tmp_path: Path, base: Path) -> Path:
    shutil.copytree(base / "models", tmp_path / "models")
    return tmp_path


def config(site: Path, base: Path, **skills: dict[str, Any]) -> Config:
    lines = [f"[models]\npath = {json.dumps(str(site / 'models'))}", f"[lake]\npath = {json.dumps(str(site / 'lake'))}"]
    lines.append(f"[registry]\nurl = {json.dumps(f'sqlite:///{site}/registry.db')}")
    lines.append(f"[training.sources]\ntiny = {json.dumps(str(base / 'checkpoint'))}")
    lines.append("[providers.vendor]")
    for name, settings in skills.items():
        lines.append(f"[skills.{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in {"base": "tiny", "teacher": "vendor/big", **settings}.items()]
    (site / "understudy.toml").write_text("\n".join(lines) + "\n")
    return load_config(site / "understudy.toml", environ={})


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


def tell(lake: Path, sayings: Iterable[dict[str, Any]]) -> None:
    """Feedback as the server records it."""
    key = IdKey.open(lake / "id.key")
    log = Log(table.log_folder(lake, FEEDBACK))
    log.append([{"time_ns": time.time_ns(), "feedback_id": key.new(), **one} for one in sayings])
    log.close()
    table.convert(lake, FEEDBACK)


def pair(first: str, second: str) -> dict[str, Any]:
    return {"input": json.dumps({"text": first, "text_pair": second}), "input_kind": "pair"}


def relevant(count: int, seed: int) -> list[dict[str, Any]]:
    """Queries with a document that the teacher calls relevant and one that it does not: people are what is looked for."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        query = f"where is {OTHERS[number % 7]} {OTHERS[number // 7 % 9]} {OTHERS[number // 63]}"
        for words, score in ((PEOPLE, "0.9"), (PLACES, "0.1")):
            document = " ".join(rng.choice(words) for _ in range(3)) + f" {rng.choice(OTHERS)}"
            rows.append({**pair(query, document), "teacher_text": score, "output_text": score})
    return rows


def topics(count: int, seed: int) -> list[tuple[str, str]]:
    """Questions with a word of one of eight topics, and the topic's one document, which does not have that word."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        topic = rng.randrange(8)
        found[" ".join([WORDS[topic], *(rng.choice([*PLAIN, *WORDS[16:]]) for _ in range(3))])] = f"the {WORDS[8 + topic]} card is my pay"
    return list(found.items())


def context(site: Path, settings: Config, skill: str, **more: Any) -> JobContext:
    registry = Registry(settings.registry)
    job = registry.start_job(skill, "train")
    registry.close()
    return JobContext(job, site / "jobs" / job, **more)


def run(site: Path, settings: Config, skill: str, spec: dict[str, Any] | None = None, **more: Any) -> Report:
    return train(settings, skill, context(site, settings, skill, **more), spec or {})


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


async def trained(site: Path, settings: Config, skill: str, **spec: Any) -> tuple[Report, Reference]:
    report = await asyncio.to_thread(run, site, settings, skill, spec)
    assert (report.state, report.reason) == ("succeeded", "")
    return report, read_reference(site / "models" / "adapters" / skill / report.version)


async def test_entities_from_a_lake_to_a_model_that_serves(site: Path, base: Path) -> None:
    settings = config(site, base, people={"task": "token-classification", "labels": ["person", "place"]})
    ids = fill(site / "lake", [*named(320, 1), {"input": "my card", "teacher_text": "none, I think"}], "people")
    report, reference = await trained(site, settings, "people", method="full", learning_rate=3e-3, epochs=8)
    assert (report.version, report.model, report.method, reference.target.shown) == ("1", "people-student@1", "full", report.model)
    assert report.dropped[examples.NO_JSON] == 1 and report.read == 321 and report.labels == 2
    assert reference.metrics["f1"] > 0.9 and reference.metrics["parity/agreement"] >= 0.95 and reference.task == "token-classification"
    assert (
        "f1/person" in reference.metrics
        and reference.metrics["agreement"] > 0.8
        and reference.metrics["f1_low"] <= reference.metrics["f1"] <= reference.metrics["f1_high"]
    )
    (tried,) = report.tried
    assert (
        tried["method"] == "full"
        and tried["reaches"] == (tried["validation_agreement"] >= 0.8)
        and tried["losses"][-1][1] < tried["losses"][0][1]
    )

    async def ask(model: Any, call: Call) -> Any:
        assert model.manifest.task is Task.TOKEN_CLASSIFICATION and model.manifest.labels[0] == "O"
        return (await model.extract_entities(["where is w2 w7 card"], call=call)).items[0]

    found = await serve(settings, reference, ask)
    assert [(one.text, one.label, one.start) for one in found] == [("w2", "person", 9), ("w7", "place", 12)]

    registry = Registry(settings.registry)
    (adapter,) = registry.adapters("people")
    assert (adapter.kind, adapter.sha256, adapter.base) == ("model", reference.target.sha256, "tiny@1")
    assert [one.version for one in registry.adapters_with(ids[0])] == ["1"] and registry.adapters_with(ids[-1]) == []
    assert [(one.name, one.version) for one in registry.models(skill="people")] == [("people-student", "1")]
    registry.close()
    assert "| f1 |" in Path(report.card).read_text() and "tiny" in Path(report.card).read_text()
    assert not list((site / "jobs" / report.job).rglob("*.safetensors"))  # checkpoints are not kept for ever

    same = await asyncio.to_thread(run, site, settings, "people", {"method": "full"})
    assert same.state == "rejected" and "version 1 was made of the same rows" in same.reason and same.tried == []

    # A teacher that has gone mad teaches a student that is worse on what is held out, and nobody sees it.
    rng = random.Random(4)
    wild = [
        {**row, "teacher_text": json.dumps([{"text": row["input"].split()[0], "label": rng.choice(["person", "place"])}])}
        for row in named(300, 9)
    ]
    fill(site / "lake", wild, "people")
    worse = await asyncio.to_thread(run, site, settings, "people", {"method": "full", "epochs": 2, "learning_rate": 3e-3})
    assert worse.state == "rejected" and worse.version == "" and ("people-student@1" in worse.reason or "the bar" in worse.reason)
    assert [path.name for path in (site / "models" / "adapters" / "people").iterdir()] == ["1"]
    assert Repository(site / "models").versions("people-student") == ["1"]


async def test_ranking_from_a_lake_to_a_model_that_serves(site: Path, base: Path) -> None:
    settings = config(site, base, find={"task": "text-ranking"})
    fill(
        site / "lake",
        [*relevant(140, 2), {**pair("where", "card"), "teacher_text": "very"}, {"input": "alone", "teacher_text": "1"}],
        "find",
    )
    report, reference = await trained(site, settings, "find", method="full", learning_rate=3e-3, epochs=4)
    assert report.dropped[examples.NO_SCORE] == 1 and report.dropped[examples.NO_PAIR] == 1
    assert reference.metrics["concordance"] > 0.95 and reference.metrics["ndcg"] > 0.9
    assert reference.metrics["difference"] > 0.2 and reference.metrics["difference_low"] > 0  # against the base's cosine
    assert report.present_version == "tiny@1"

    async def ask(model: Any, call: Call) -> Any:
        return (await model.rerank("where is the card", ["w7 w8 my", "w1 w2 my"], call=call)).items

    first, second = await serve(settings, reference, ask)
    assert first.index == 1 and first.score > 0.7 > 0.3 > second.score


async def test_embeddings_from_thumbs_to_a_model_that_serves(site: Path, base: Path) -> None:
    settings = config(site, base, near={"task": "feature-extraction", "deliver_bar": 0.5})
    together = topics(240, 5)
    ids = fill(site / "lake", [pair(*one) for one in together], "near")
    tell(site / "lake", [{"interaction_id": one, "thumb": "up"} for one in ids])
    report, reference = await trained(site, settings, "near", method="full", learning_rate=3e-3, epochs=40)
    assert reference.metrics["difference"] > 0.02 and report.present_version == "tiny@1"
    assert reference.metrics["ndcg"] == pytest.approx(reference.metrics["present_ndcg"] + reference.metrics["difference"])

    async def ask(model: Any, call: Call) -> Any:
        assert model.manifest.pooling == "cls" and model.manifest.query_prefix == "query: "
        return np.stack(
            (await model.embed(["w1 lost where", "the w9 card is my pay", "the w12 card is my pay"], call=call, normalize=True)).items
        )

    query, right, wrong = await serve(settings, reference, ask)
    assert np.allclose([one @ one for one in (query, right, wrong)], 1.0, atol=1e-4) and reference.metrics["parity/agreement"] > 0.95


async def test_graded_similarity_by_lora(site: Path, base: Path) -> None:
    settings = config(site, base, alike={"task": "sentence-similarity", "deliver_bar": 0.3})
    fill(site / "lake", relevant(140, 6), "alike")
    report, reference = await trained(site, settings, "alike", method="lora", learning_rate=1e-2, epochs=6)
    assert report.method == "lora" and reference.metrics["difference"] > 0 and reference.metrics["concordance"] > 0.8
    assert reference.metrics["parity/agreement"] > 0.95  # LoRA is merged: the file is a whole model


async def test_what_does_not_answer_as_it_was_trained_is_not_published(site: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(site, base, find={"task": "text-ranking", "deliver_bar": 0.0})
    fill(site / "lake", relevant(140, 2), "find")
    monkeypatch.setattr(judge, "LEAST_PARITY", {"int8": 1.1, "float32": 1.1})
    monkeypatch.setattr(export, "LEAST_PARITY", {"int8": 1.1, "float32": 1.1})
    report = await asyncio.to_thread(run, site, settings, "find", {"method": "full", "epochs": 1})
    assert report.state == "rejected" and "the float32 file agrees with the torch model" in report.reason
    assert not (site / "models" / "adapters").exists() and Repository(site / "models").names() == ["tiny"]


async def test_a_cancelled_job_goes_on_as_if_it_had_not_been(site: Path, base: Path) -> None:
    settings = config(site, base, people={"task": "token-classification", "deliver_bar": 0.0})
    fill(site / "lake", named(200, 3), "people")
    spec = {"method": "lora", "epochs": 2, "learning_rate": 3e-3}
    whole = await asyncio.to_thread(run, site, settings, "people", spec, seed=7)
    shutil.rmtree(site / "models" / "adapters")

    job = context(site, settings, "people", seed=7)
    seen: list[int] = []
    job.metric = lambda name, step, value: seen.append(step)
    job.is_cancelled = lambda: any(step >= 10 for step in seen)
    with pytest.raises(Cancelled):
        await asyncio.to_thread(train, settings, "people", job, spec)
    # What came meanwhile is for the next job.
    fill(site / "lake", named(40, 8), "people")
    job.is_cancelled = lambda: False
    logs: list[str] = []
    job.log = logs.append
    again = await asyncio.to_thread(train, settings, "people", job, spec)
    assert any("taken up at step" in line for line in logs)
    first, second = whole.tried[0], again.tried[0]
    assert (first["losses"], first["validation"]) == (second["losses"], second["validation"])
    models = Repository(site / "models")
    assert whole.model == "people-student@1" and again.model == "people-student@2"
    assert models.manifest("people-student", "1").files["model.onnx"] == models.manifest("people-student", "2").files["model.onnx"]

    # It died after it had published and before anybody knew.
    told = await asyncio.to_thread(train, settings, "people", job, spec)
    assert (told.state, told.version, told.model, told.metrics) == ("succeeded", "2", again.model, again.metrics) and told.tried == []
    assert models.versions("people-student") == ["1", "2"]


def test_what_cannot_be_trained_is_refused(site: Path, base: Path) -> None:
    task = {"task": "token-classification"}
    settings = config(
        site,
        base,
        people=task,
        baseless={**task, "base": ""},
        foreign={**task, "base": "absent"},
        headed={**task, "method": "linear-head"},
    )
    with pytest.raises(SkillNotFound, match="people"):
        run(site, settings, "peple")
    with pytest.raises(InvalidArgument, match="auto, lora, full") as refused:
        run(site, settings, "people", {"method": "prefix"})
    assert refused.value.metadata["allowed"] == "auto,lora,full"
    with pytest.raises(InvalidArgument, match="linear-head"):
        run(site, settings, "headed")
    with pytest.raises(FailedPrecondition, match="no base"):
        run(site, settings, "baseless")
    with pytest.raises(ModelNotFound, match="absent"):
        run(site, settings, "foreign")
    fill(site / "lake", named(200, 1), "people")
    for name, value in (("seed", -1), ("seed", "x"), ("epochs", 0), ("epochs", 1.5), ("learning_rate", "high"), ("batch", True)):
        with pytest.raises(InvalidArgument, match=name):
            run(site, settings, "people", {name: value})


def test_too_little_data_says_how_much_and_why(site: Path, base: Path) -> None:
    settings = config(site, base, people={"task": "token-classification", "labels": ["person"]}, find={"task": "text-ranking"})
    with pytest.raises(TooLittleData) as refused:
        run(site, settings, "people")
    assert (refused.value.metadata["rows"], refused.value.metadata["minimum"]) == ("0", "100")
    foreign = [{**row, "teacher_text": json.dumps([{"text": row["input"].split()[0], "label": "ship"}])} for row in named(150, 1)]
    fill(site / "lake", foreign, "people")
    with pytest.raises(TooLittleData, match=examples.FOREIGN_LABEL):
        run(site, settings, "people")
    fill(site / "lake", [{**row, "teacher_text": "0.5"} for row in relevant(140, 1)], "find")
    with pytest.raises(TooLittleData, match="different scores"):
        run(site, settings, "find")
