"""Loading, swapping and unloading of real ONNX models, with calls under way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from server.core import Task
from server.errors import (
    Draining,
    InvalidArgument,
    ManifestInvalid,
    ModelInUse,
    ModelNotFound,
    ModelNotLoaded,
    ModelRejected,
    OutOfMemory,
    TaskNotSupported,
    UnderstudyError,
    VersionNotFound,
)
from server.runtime.memory import available_bytes
from server.runtime.ort import import_ort
from server.runtime.repository import ModelFiles, Repository
from server.runtime.runtime import InThread, ModelState, ModelStatus, Runtime

RAW = {"task": "tensor", "form": "tensor"}


class Session:
    """The least that can be served: one ONNX Runtime session."""

    encoder = None

    def __init__(self, session: Any) -> None:
        self.session: Any = session
        self.closed_with: bool | None = None

    @property
    def tensors(self) -> Any:
        return self

    def run(self, value: float) -> float:
        return float(self.session.run(None, {"x": np.array([value], np.float32)})[0][0])

    async def close(self, drain: bool) -> None:
        self.closed_with, self.session = drain, None


async def load_session(files: ModelFiles, in_thread: InThread) -> Any:
    return Session(await in_thread(lambda: import_ort().InferenceSession(str(files.model), providers=["CPUExecutionProvider"])))


def write(folder: Path, factor: float) -> Path:
    """A graph y = factor * x."""
    folder.mkdir(exist_ok=True)
    weight = numpy_helper.from_array(np.array([factor], np.float32), "w")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [values[0]], [values[1]], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), folder / "model.onnx")
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    repository = Repository(tmp_path / "models")
    for version in (1, 2):
        repository.add(write(tmp_path / "source", float(version)), "times", fields=RAW)
    return repository


@pytest.fixture
async def runtime(repository: Repository) -> AsyncIterator[Runtime]:
    runtime = Runtime(repository, load_session, drain_s=20.0)
    yield runtime
    await runtime.close()


def answer(runtime: Runtime, version: str | None = None) -> float:
    with runtime.use_tensors("times", version) as model:
        return model.run(1.0)  # type: ignore[attr-defined, no-any-return]


async def test_the_latest_answers_unless_a_version_is_named(runtime: Runtime) -> None:
    first = await runtime.load("times", "1")
    assert (first.state, first.version, first.default) == (ModelState.READY, "1", True)
    assert answer(runtime) == 1.0
    await runtime.load("times")
    assert (answer(runtime), answer(runtime, "1"), answer(runtime, "2")) == (2.0, 1.0, 2.0)
    statuses = runtime.loaded()
    assert [(s.version, s.state, s.default, s.requests) for s in statuses] == [("1", "READY", False, 2), ("2", "READY", True, 2)]
    assert all(status.memory_bytes > 0 and status.loaded_ns > 0 for status in statuses)


async def test_loading_what_is_loaded_takes_traffic_back(runtime: Runtime) -> None:
    await runtime.load("times", "1")
    await runtime.load("times", "2")
    await runtime.load("times", "1")
    assert answer(runtime) == 1.0


async def test_replacing_drops_every_other_version(runtime: Runtime) -> None:
    await runtime.load("times", "1")
    await runtime.load("times", "2")
    await runtime.load("times", "2", replace=True)
    await runtime.load("times", "2")
    with pytest.raises(ModelNotLoaded):
        runtime.tensors("times", "1")
    assert answer(runtime) == 2.0


async def test_unloading_the_default_hands_over_to_the_highest_left(runtime: Runtime) -> None:
    await runtime.load("times", "1")
    await runtime.load("times", "2")
    gone = await runtime.unload("times", "2")
    assert [(s.version, s.state) for s in gone] == [("2", "UNLOADED")]
    assert answer(runtime) == 1.0
    await runtime.unload("times")
    assert runtime.loaded() == []
    with pytest.raises(ModelNotLoaded):
        answer(runtime)


async def test_errors_name_what_is_the_matter(runtime: Runtime) -> None:
    with pytest.raises(ModelNotFound, match="did you mean 'times'"):
        runtime.get("timez")
    with pytest.raises(ModelNotLoaded, match="not loaded"):
        runtime.tensors("times")
    with pytest.raises(InvalidArgument):
        runtime.get("../times")
    with pytest.raises(InvalidArgument):
        await runtime.load("../times")
    with pytest.raises(ModelNotFound):
        await runtime.load("timez")
    with pytest.raises(VersionNotFound):
        await runtime.load("times", "9")
    with pytest.raises(ModelNotLoaded):
        await runtime.unload("times")
    await runtime.load("times")
    with pytest.raises(VersionNotFound):
        runtime.tensors("times", "9")
    with pytest.raises(ModelNotLoaded):
        runtime.tensors("times", "1")
    with pytest.raises(TaskNotSupported, match="raw tensors only"):
        runtime.get("times", Task.FEATURE_EXTRACTION)


async def test_many_loads_at_once_are_one(repository: Repository) -> None:
    built: list[str] = []

    async def load(files: ModelFiles, in_thread: InThread) -> Any:
        built.append(files.manifest.version)
        return await load_session(files, in_thread)

    runtime = Runtime(repository, load)
    statuses = await asyncio.gather(*(runtime.load("times", version) for version in ("2", None, "2", "1")))
    assert sorted(built) == ["1", "2"]
    assert [status.version for status in statuses] == ["2", "2", "2", "1"]
    await runtime.close()


async def test_a_caller_that_leaves_does_not_stop_the_load_of_others(runtime: Runtime) -> None:
    impatient = asyncio.create_task(runtime.load("times"))
    patient = asyncio.create_task(runtime.load("times"))
    while not runtime.loaded():
        await asyncio.sleep(0)
    impatient.cancel()
    assert (await patient).state is ModelState.READY


async def test_a_broken_version_is_refused_and_the_running_one_stays(runtime: Runtime, tmp_path: Path) -> None:
    await runtime.load("times", "1")
    folder = runtime.repository.root / "times" / "2"
    good = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").write_bytes(good[:-2] + b"\x00\x00")
    with pytest.raises(ModelRejected, match="SHA-256"):
        await runtime.load("times", "2", replace=True)
    assert answer(runtime) == 1.0
    status = runtime.loaded()[1]
    assert (status.version, status.state, status.memory_bytes) == ("2", "FAILED", 0) and "SHA-256" in status.error
    with pytest.raises(ModelNotLoaded, match="failed to load"):
        runtime.tensors("times", "2")
    (folder / "model.onnx").write_bytes(good)
    await runtime.load("times", "2", replace=True)
    assert answer(runtime) == 2.0


async def test_a_graph_that_the_runtime_cannot_build_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    source = write(tmp_path / "source", 3.0)
    model = onnx.load(source / "model.onnx")
    model.graph.node[0].op_type = "Nonsense"
    (source / "model.onnx").write_bytes(model.SerializeToString())
    runtime.repository.add(source, "times", fields=RAW)
    await runtime.load("times", "2")
    with pytest.raises(ModelRejected, match="Nonsense"):
        await runtime.load("times")
    assert answer(runtime) == 2.0


async def test_a_hostile_manifest_is_refused(runtime: Runtime) -> None:
    path = runtime.repository.root / "times" / "2" / "manifest.json"
    path.unlink()
    path.write_text('{"extra": ' + "[" * 50_000)
    with pytest.raises(ManifestInvalid):
        await runtime.load("times")


async def test_calls_that_hold_a_model_finish_before_it_closes(runtime: Runtime) -> None:
    await runtime.load("times", "1")
    with runtime.use_tensors("times") as held:
        await runtime.load("times", "2", replace=True)
        assert answer(runtime) == 2.0
        with pytest.raises(ModelNotLoaded):
            runtime.tensors("times", "1")
        unloaded = asyncio.create_task(runtime.unload("times", "1"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not unloaded.done() and held.run(1.0) == 1.0  # type: ignore[attr-defined]
    await unloaded
    assert held.closed_with is True  # type: ignore[attr-defined]


async def test_swaps_under_traffic_fail_no_call(runtime: Runtime) -> None:
    await runtime.load("times", "1")
    stop, served = asyncio.Event(), 0

    async def caller() -> None:
        nonlocal served
        while not stop.is_set():
            with runtime.use_tensors("times") as model:
                await asyncio.sleep(0)
                assert model.run(1.0) in (1.0, 2.0)  # type: ignore[attr-defined]
                served += 1

    callers = [asyncio.create_task(caller()) for _ in range(16)]
    for turn in range(20):
        await runtime.load("times", "2" if turn % 2 == 0 else "1", replace=True)
    stop.set()
    await asyncio.gather(*callers)
    assert served > 100


async def test_listeners_hear_every_state(repository: Repository) -> None:
    heard: list[tuple[str, str]] = []

    def broken(status: ModelStatus) -> None:
        raise RuntimeError("a listener's own mistake")

    runtime = Runtime(repository, load_session, on_change=broken)
    runtime.subscribe(lambda status: heard.append((status.version, status.state.value)))
    await runtime.load("times", "1")
    await runtime.load("times", "2", replace=True)
    await runtime.close()
    assert [state for version, state in heard if version == "1"] == ["LOADING", "READY", "UNLOADING", "UNLOADED"]
    assert [state for version, state in heard if version == "2"][:2] == ["LOADING", "READY"]
    assert heard[-1] == ("2", "UNLOADED")


async def test_a_model_that_does_not_fit_is_refused_before_it_takes_memory(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (available_bytes() or 0) > 1 << 20
    for name, text in {"memory.max": "1000000", "memory.current": "999990", "memory.stat": "inactive_file 5\nanon 9\n"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("server.runtime.memory._GROUP", tmp_path)
    assert available_bytes() == 15
    runtime = Runtime(repository, load_session)
    with pytest.raises(OutOfMemory, match="Unload another"):
        await runtime.load("times")
    (tmp_path / "memory.max").write_text("max\n")
    await runtime.load("times")
    await runtime.close()


async def test_only_what_is_not_loaded_can_be_deleted(runtime: Runtime) -> None:
    await runtime.load("times", "1")
    with pytest.raises(ModelInUse):
        await runtime.delete("times", "1")
    await runtime.delete("times", "2")
    with pytest.raises(VersionNotFound):
        await runtime.delete("times", "2")
    assert runtime.repository.versions("times") == ["1"]


async def test_a_closed_runtime_loads_nothing(repository: Repository) -> None:
    runtime = Runtime(repository, load_session)
    loading = asyncio.create_task(runtime.load("times"))
    while not runtime.loaded():
        await asyncio.sleep(0)
    await runtime.close()
    with pytest.raises((asyncio.CancelledError, UnderstudyError)):
        await loading
    with pytest.raises(Draining):
        await runtime.load("times")
    assert runtime.loaded() == []
    await runtime.close()
