"""The runtime with the real loader: packed graphs of our own, calls through the engine, memory of the process."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from server.config import RuntimeConfig
from server.core import Call, Task
from server.errors import ModelRejected, TaskNotSupported
from server.runtime.loader import make_loader
from server.runtime.observer import NullObserver
from server.runtime.pull import pull
from server.runtime.repository import Repository
from server.runtime.runtime import ModelState, Runtime
from server.runtime.verify import sha256_of
from tests.checkpoints import HIDDEN, checkpoint

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["where is my card ?", "the cards is lost", "pay"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of an embedder, of different weights, and a classifier."""
    root = tmp_path_factory.mktemp("repository")
    repository = Repository(root / "models")
    for seed in (1, 2):
        pull(str(checkpoint(root / f"embedder{seed}", seed=seed)), repository, name="embedder", dtype="float32")
    labels = {"id2label": {"0": "yes", "1": "no"}}
    pull(str(checkpoint(root / "c", "BertForSequenceClassification", **labels)), repository, name="classifier", dtype="float32")
    return repository.root


@pytest.fixture
async def runtime(models: Path) -> AsyncIterator[Runtime]:
    runtime = Runtime(Repository(models), make_loader(RuntimeConfig(threads=1), NullObserver()), drain_s=20.0)
    yield runtime
    await runtime.close()


async def embed(runtime: Runtime, version: str | None = None) -> np.ndarray:
    with runtime.use("embedder", Task.FEATURE_EXTRACTION, version) as model:
        results = await model.embed(TEXTS, call=Call("test"))
    assert not any(isinstance(item, Exception) for item in results.items), results.items
    return np.stack(results.items)  # type: ignore[arg-type]


async def test_models_answer_for_the_tasks_they_do(runtime: Runtime) -> None:
    await asyncio.gather(runtime.load("embedder"), runtime.load("classifier"))
    vectors = await embed(runtime)
    assert vectors.shape == (3, HIDDEN) and np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    with runtime.use("classifier", Task.TEXT_CLASSIFICATION) as model:
        labels = (await model.classify(TEXTS, call=Call("test"))).items[0]
    assert {label.name for label in labels} == {"yes", "no"}  # type: ignore[union-attr]
    with pytest.raises(TaskNotSupported, match="'embedder'"):
        runtime.get("classifier", Task.FEATURE_EXTRACTION)
    assert runtime.models_for(Task.TEXT_CLASSIFICATION) == ["classifier"]
    assert runtime.models_for(Task.TENSOR) == ["classifier", "embedder"]
    assert runtime.models_for(Task.QUESTION_ANSWERING) == []


async def test_the_same_session_serves_text_and_tensors(runtime: Runtime) -> None:
    await runtime.load("embedder")
    with runtime.use("embedder") as model:
        ids = np.asarray(model.tokenizer.encode(["pay"])[0].ids, np.int64)
    feeds = {"input_ids": ids, "position_ids": np.arange(len(ids)), "cu_seqlens": np.array([0, len(ids)], np.int32)}
    with runtime.use_tensors("embedder") as tensors:
        answer = await tensors.infer({**feeds, "token_type_ids": np.zeros_like(ids)}, None, Call("test"))
    assert answer["hidden"].shape == (len(ids), HIDDEN)


async def test_swaps_under_load_fail_no_call_and_mix_no_answers(runtime: Runtime) -> None:
    await runtime.load("embedder", "1")
    await runtime.load("embedder", "2")
    expected = [await embed(runtime, "1"), await embed(runtime, "2")]
    assert not np.allclose(expected[0], expected[1], atol=1e-2)
    await runtime.unload("embedder", "1")
    stop, seen = asyncio.Event(), [0, 0]

    async def caller() -> None:
        while not stop.is_set():
            vectors = await embed(runtime)
            match = [bool(np.allclose(vectors, one, atol=1e-6)) for one in expected]
            assert any(match), "an answer of neither version"
            seen[match.index(True)] += 1

    callers = [asyncio.create_task(caller()) for _ in range(8)]
    for turn in range(6):
        await runtime.load("embedder", "1" if turn % 2 == 0 else "2", replace=True)
        before = sum(seen)
        while sum(seen) < before + 8:
            await asyncio.sleep(0)
            for task in callers:
                if task.done():
                    task.result()
    stop.set()
    await asyncio.gather(*callers)
    assert min(seen) > 0


async def test_a_graph_that_does_not_fit_its_manifest_is_refused(runtime: Runtime, models: Path, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "models")
    source = Repository(models).open("embedder", "1")
    other = Repository(models).open("classifier", "1")
    staged = tmp_path / "staged"
    staged.mkdir()
    (staged / "tokenizer.json").write_bytes(source.paths["tokenizer.json"].read_bytes())
    (staged / "model.onnx").write_bytes(other.model.read_bytes())
    fields = source.manifest.model_dump(exclude={"name", "version", "files", "created"})
    repository.add(staged, "liar", fields={**fields, "form": "padded"})
    lying = Runtime(repository, make_loader(RuntimeConfig(threads=1), NullObserver()))
    with pytest.raises(ModelRejected):
        await lying.load("liar")
    assert lying.loaded()[0].state is ModelState.FAILED
    await lying.close()


async def test_nothing_of_a_failed_load_stays_in_memory(runtime: Runtime, models: Path, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "models")
    source = Repository(models).open("embedder", "1")
    copied = repository.add(source.folder, "broken")
    tokenizer = copied.paths["tokenizer.json"]
    tokenizer.unlink()
    tokenizer.write_text('{"version": "1.0", "model": {"type": "WordPiece", "vocab": {}}}')
    path = copied.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["tokenizer.json"] = {"sha256": sha256_of(tokenizer), "size": tokenizer.stat().st_size}
    path.unlink()
    path.write_text(json.dumps(manifest))
    broken = Runtime(repository, make_loader(RuntimeConfig(threads=1), NullObserver()))
    threads = []
    for _ in range(8):
        with pytest.raises(ModelRejected, match=r"tokenizer\.json"):
            await broken.load("broken")
        threads.append(len(os.listdir("/proc/self/task")))
        (status,) = broken.loaded()
        assert (status.state, status.memory_bytes, status.in_use) == (ModelState.FAILED, 0, 0)
    assert threads[-1] <= threads[0] + 2, threads  # those of the event loop's executor; an engine left over each time would be 7
    await broken.close()


async def test_an_unloaded_model_is_freed_without_the_garbage_collector(runtime: Runtime) -> None:
    """The server freezes what lives at its start: cycles among those objects would never be collected."""
    await runtime.load("embedder")
    await embed(runtime)
    model = runtime.get("embedder")
    parts = [weakref.ref(part) for part in (model, model.engine, model.tokenizer)]
    del model
    gc.collect()
    gc.disable()
    try:
        await runtime.unload("embedder")
        await asyncio.sleep(0)
        assert [part() for part in parts] == [None] * 3
    finally:
        gc.enable()


MEMORY = """
import asyncio, json, sys
from pathlib import Path
from server.config import RuntimeConfig
from server.core import Call
from server.runtime.loader import make_loader
from server.runtime.observer import NullObserver
from server.runtime.repository import Repository
from server.runtime.runtime import Runtime

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])

async def main():
    runtime = Runtime(Repository(Path(sys.argv[1])), make_loader(RuntimeConfig(threads=2), NullObserver()))
    seen = []
    await runtime.load("big", "1")
    for cycle in range(20):
        await runtime.load("big", "2" if cycle % 2 == 0 else "1")
        with runtime.use("big") as model:
            await model.embed(["where is my card ?"] * 16, call=Call("x"))
        await runtime.unload("big", "1" if cycle % 2 == 0 else "2")
        seen.append(resident())
    await runtime.close()
    print(json.dumps(seen))

asyncio.run(main())
"""


def test_memory_is_given_back_over_twenty_swaps(tmp_path: Path) -> None:
    """Each version has 50 MB of weights: one that stayed would show at once."""
    repository = Repository(tmp_path / "models")
    for seed in (1, 2):
        source = checkpoint(tmp_path / f"big{seed}", seed=seed, max_position_embeddings=400_000)
        pull(str(source), repository, name="big", dtype="float32")
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    run = [sys.executable, "-c", MEMORY, str(repository.root)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert max(seen[-3:]) <= 1.10 * seen[0], seen
