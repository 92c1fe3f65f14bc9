"""Encoders with adapters answer as PEFT does, each sequence with its own adapter, and without one as if there were none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.core import Call, Task
from server.errors import ModelRejected
from server.runtime.engine import Encoded, Engine, GraphForm, Pool
from server.runtime.graphs.build import build
from server.runtime.lora.bank import AdapterBank
from server.runtime.lora.convert import ADAPTERS, add_peft
from server.runtime.lora.layout import layout_of
from server.runtime.lora.session import AdaptedSession
from server.runtime.lora.store import AdapterSet
from server.runtime.repository import ModelFiles, Repository
from server.runtime.sessions import Sessions
from server.runtime.worker import EngineSettings
from tests.runtime.graphs.random_models import answers, random_model, random_sequences, write_tokenizer
from tests.runtime.lora.models import peft_adapter

peft = pytest.importorskip("peft")

TARGETS = {
    "bert": {"one": ["query", "value"], "two": ["query", "key", "value", "attention.output.dense", "intermediate.dense"]},
    "roberta": {"one": ["key"], "two": ["value", "attention.output.dense"]},
    "distilbert": {"one": ["q_lin", "v_lin"], "two": ["k_lin", "out_lin", "lin1", "lin2"]},
    "mpnet": {"one": ["attn.q", "attn.v"], "two": ["attn.k", "attn.o"]},
}
RANKS = {"one": 3, "two": 8}


def publish(repository: Repository, folder: Path, task: Task, form: str) -> ModelFiles:
    with repository.staging() as staged:
        built = build(folder, staged, task=task, form=form, adapters=True)  # type: ignore[arg-type]
        (staged / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        fields: dict[str, Any] = {**built.manifest, "task": task.value, "form": "packed"}
        if task is Task.FEATURE_EXTRACTION:
            fields |= {"pooling": "mean", "normalize": False}
        return repository.publish(staged, "base", fields)


def adapt(model: Any, name: str, targets: list[str], folder: Path, *, alpha: float = 11) -> Any:
    # A base in transformers has its own classes for tasks; none is named here, so that PEFT wraps the plain module.
    config = peft.LoraConfig(r=RANKS[name], lora_alpha=alpha, target_modules=targets, use_rslora=name == "two")
    return peft_adapter(copy.deepcopy(model), config, len(name), folder)


def cosine(row: Any, hidden: np.ndarray) -> float:
    mean = hidden.mean(axis=0)
    return float(row @ mean / np.linalg.norm(row) / np.linalg.norm(mean))


@pytest.mark.parametrize("architecture", TARGETS)
async def test_a_mixed_batch_gives_each_sequence_its_adapter(architecture: str, tmp_path: Path) -> None:
    task = Task.TEXT_CLASSIFICATION if architecture == "bert" else Task.FEATURE_EXTRACTION
    model = random_model(tmp_path, architecture, task)
    write_tokenizer(tmp_path)
    repository = Repository(tmp_path / "models")
    files = publish(repository, tmp_path, task, "float32")
    layout = layout_of(files.manifest)
    assert layout is not None
    tuned: dict[str, Any] = {"": model}
    bank = AdapterBank(layout, 3, 8)
    adapters = AdapterSet(files.manifest, repository.root / ADAPTERS, bank)
    for name, targets in TARGETS[architecture].items():
        tuned[name] = adapt(model, name, targets, tmp_path / name)
        add_peft(tmp_path / name, files.manifest, repository.root / ADAPTERS, name)
    await adapters.start()
    uses = {name: await adapters.acquire(name) for name in TARGETS[architecture]}
    session = AdaptedSession(Sessions().open(files.model), bank)
    engine = Engine(session, GraphForm.of(files.manifest), EngineSettings(lanes=1))
    sequences = random_sequences([5, 12, 1, 7, 30, 9, 5], 1)
    names = ["one", "", "two", "two", "one", "", "one"]
    encoded = [Encoded(np.array(ids), None, uses[name].slot if name else -1) for (ids, _), name in zip(sequences, names, strict=True)]
    output = await engine.run(encoded, Call("test"))
    for row, sequence, name in zip(output.rows, sequences, names, strict=True):
        (want,) = answers(tuned[name], [sequence], types=False)
        assert not isinstance(row, Exception)
        np.testing.assert_allclose(row, want, rtol=0, atol=1e-4 * max(1.0, float(np.abs(want).max())))
    alone = await engine.run(encoded[2:3], Call("test"))
    np.testing.assert_array_equal(alone.rows[0], output.rows[2])
    assert not np.allclose(*(answers(tuned[name], sequences[:1], types=False)[0] for name in ("one", "two")), atol=1e-2)
    await engine.close()
    session.close()


async def test_int8_products_take_adapters_too(tmp_path: Path) -> None:
    model = random_model(tmp_path, "bert", Task.FEATURE_EXTRACTION)
    write_tokenizer(tmp_path)
    repository = Repository(tmp_path / "models")
    files = publish(repository, tmp_path, Task.FEATURE_EXTRACTION, "int8")
    layout = layout_of(files.manifest)
    assert layout is not None
    # As large as training makes them: static scales were fitted to the base's activations.
    tuned = adapt(model, "two", TARGETS["bert"]["two"], tmp_path / "two", alpha=1)
    add_peft(tmp_path / "two", files.manifest, repository.root / ADAPTERS, "two")
    bank = AdapterBank(layout, 1, 8)
    adapters = AdapterSet(files.manifest, repository.root / ADAPTERS, bank)
    await adapters.start()
    use = await adapters.acquire("two@1")
    session = AdaptedSession(Sessions().open(files.model), bank)
    engine = Engine(session, GraphForm.of(files.manifest), EngineSettings(lanes=1))
    sequences = random_sequences([20, 20, 15, 30], 1)
    pool = Pool("mean")
    for slot, wanted, other in ((use.slot, tuned, model), (-1, model, tuned)):
        output = await engine.run([Encoded(np.array(ids), None, slot) for ids, _ in sequences], Call("test"), pool)
        right, wrong = answers(wanted, sequences, types=False), answers(other, sequences, types=False)
        for row, near, far in zip(output.rows, right, wrong, strict=True):
            assert not isinstance(row, Exception)
            assert cosine(row, near) > 0.99
            assert 1 - cosine(row, near) < 0.3 * (1 - cosine(row, far))
    await engine.close()
    session.close()


def test_a_graph_without_places_takes_no_adapter(tmp_path: Path) -> None:
    model = random_model(tmp_path, "bert", Task.FEATURE_EXTRACTION)
    write_tokenizer(tmp_path)
    repository = Repository(tmp_path / "models")
    with repository.staging() as staged:
        built = build(tmp_path, staged, task=Task.FEATURE_EXTRACTION, form="float32")
        (staged / "tokenizer.json").write_bytes((tmp_path / "tokenizer.json").read_bytes())
        fields = {**built.manifest, "task": "feature-extraction", "form": "packed", "pooling": "mean"}
        files = repository.publish(staged, "base", fields)
    adapt(model, "one", ["query"], tmp_path / "one")
    with pytest.raises(ModelRejected, match="--adapters"):
        add_peft(tmp_path / "one", files.manifest, repository.root / ADAPTERS, "one")
