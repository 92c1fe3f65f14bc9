"""Heads that appear, break and vanish on the disk while a store watches."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from server.core import FloatArray
from server.errors import AdapterNotFound, ModelRejected
from server.runtime.adapters import AdapterStore
from server.runtime.heads import Base, Features, HeadSpec, LinearHead, write_linear_head
from server.runtime.verify import entry_of


def publish(root: Path, skill: str, version: int, *, base: str = "a" * 64, name: str | None = None) -> Path:
    spec = HeadSpec(
        name=name or skill,
        version=str(version),
        base=Base(name="minilm", version="1", sha256=base),
        features=Features(pooling="mean", normalize=True, size=4),
        labels=["yes", "no"],
    )
    folder = root / skill / str(version)
    folder.parent.mkdir(parents=True, exist_ok=True)
    weight = np.full((2, 4), float(version), np.float32)
    write_linear_head(folder, spec, weight, np.zeros(2, np.float32))
    return folder


def version_of(store: AdapterStore, skill: str) -> str | None:
    head = store.current(skill)
    return None if head is None else head.manifest.version


def test_the_newest_good_version_serves(tmp_path: Path) -> None:
    heard: list[tuple[str, str | None]] = []
    store = AdapterStore(tmp_path, on_change=lambda skill, version: heard.append((skill, version)))
    store.refresh()
    assert store.current("intent") is None
    first = publish(tmp_path, "intent", 1)
    store.refresh()
    assert version_of(store, "intent") == "1"
    held = store.current("intent")
    publish(tmp_path, "intent", 10)
    publish(tmp_path, "intent", 9)
    store.refresh()
    assert version_of(store, "intent") == "10" and store.versions() == {"intent": ["10", "9"]}
    assert held is not None and held.predict(np.ones((1, 4), np.float32)).shape == (1, 2)
    shutil.rmtree(tmp_path / "intent" / "10")
    store.refresh()
    assert version_of(store, "intent") == "9"
    shutil.rmtree(first.parent)
    store.refresh()
    assert store.current("intent") is None
    assert heard == [("intent", "1"), ("intent", "10"), ("intent", "9"), ("intent", None)]


def sharp(folder: Path, temperature: float, seed: int) -> FloatArray:
    """A head of 77 labels as a cosine classifier has it: large logits, at a temperature that makes them larger."""
    spec = HeadSpec(
        name="intent",
        version="1",
        base=Base(name="minilm", version="1", sha256="a" * 64),
        features=Features(pooling="mean", normalize=True, size=384),
        labels=[f"label {number}" for number in range(77)],
        temperature=temperature,
    )
    weight = np.random.default_rng(seed).standard_normal((77, 384)).astype(np.float32)
    weight *= 20.0 / np.linalg.norm(weight, axis=1, keepdims=True)
    write_linear_head(folder, spec, weight, np.zeros(77, np.float32))
    return weight


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0])
def test_a_sharp_head_is_no_broken_head(tmp_path: Path, temperature: float) -> None:
    """float32 sums differ with their order; what decides is whether they differ by more than that."""
    for seed in range(12):
        sharp(tmp_path / str(seed), temperature, seed)
        LinearHead.load(tmp_path / str(seed), base_sha256=None)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_a_graph_of_other_weights_is_refused(tmp_path: Path, temperature: float) -> None:
    weight = sharp(tmp_path / "one", temperature, 1)
    sharp(tmp_path / "two", temperature, 1)
    files = json.loads((tmp_path / "two" / "manifest.json").read_text())
    weight[3] *= 1.05
    save_file({"weight": weight, "bias": np.zeros(77, np.float32)}, tmp_path / "two" / "adapter.safetensors")
    entry = entry_of(tmp_path / "two" / "adapter.safetensors")
    files["files"]["adapter.safetensors"] = entry.model_dump()
    (tmp_path / "two" / "manifest.json").write_text(json.dumps(files))
    with pytest.raises(ModelRejected, match="differ by"):
        LinearHead.load(tmp_path / "two", base_sha256=None)


@pytest.mark.parametrize("damage", ["weights", "manifest", "name", "link"])
def test_a_broken_version_is_refused_once_and_the_old_one_stays(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    publish(tmp_path, "intent", 1)
    folder = publish(tmp_path, "intent", 2, name="other" if damage == "name" else None)
    if damage == "weights":
        path = folder / "adapter.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{}")
    elif damage == "link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    store = AdapterStore(tmp_path)
    for _ in range(3):
        store.refresh()
        assert version_of(store, "intent") == "1"
    assert sum(record.message == "adapter refused" for record in caplog.records) == (damage != "link")


def test_a_head_serves_only_on_the_base_it_was_trained_on(tmp_path: Path) -> None:
    loaded: dict[str, str] = {}
    store = AdapterStore(tmp_path, base_sha256=loaded.get)
    publish(tmp_path, "intent", 1, base="a" * 64)
    publish(tmp_path, "intent", 2, base="b" * 64)
    store.refresh()
    assert version_of(store, "intent") is None
    loaded["minilm"] = "a" * 64
    assert version_of(store, "intent") == "1"
    loaded["minilm"] = "b" * 64
    assert version_of(store, "intent") == "2"
    assert store.get("intent", "1").manifest.base.sha256 == "a" * 64
    with pytest.raises(AdapterNotFound, match="'1'"):
        store.get("intent", "7")


async def test_a_new_version_is_taken_over_by_itself(tmp_path: Path) -> None:
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()
    store = AdapterStore(tmp_path / "late", poll_s=0.02, on_change=lambda *_: loop.call_soon_threadsafe(changed.set) and None)
    await store.start()
    publish(tmp_path / "late", "intent", 1)
    await asyncio.wait_for(changed.wait(), 10)
    assert version_of(store, "intent") == "1"
    await store.stop()
