"""Sessions through ONNX Runtime's C API against its Python package: same values, one sleeping pool, clear refusals, memory given back."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper

from native import session as native
from server.errors import Cancelled, InvalidTensor
from server.runtime.ort import import_ort
from server.runtime.sessions import Sessions, SessionSettings, _ort_library, _PythonSession, release_memory
from tests.runtime import graphs_for_tests as graphs

TYPES = [np.float32, np.float64, np.float16, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, np.bool_]
SESSIONS = Sessions()


@pytest.fixture(scope="module")
def environment() -> native.Environment:
    found = SESSIONS._shared_environment()
    if found is None:
        pytest.skip("this build of onnxruntime carries no C library")
    return found


def identity(path: Path, dtype: Any, shape: list[Any]) -> Path:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = helper.make_node("Identity", ["x"], ["y"])
    return graphs.write(path, [node], [graphs.value("x", kind, shape)], [graphs.value("y", kind, shape)], {})


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: np.dtype(t).name)
def test_every_type_goes_in_and_out(tmp_path: Path, environment: native.Environment, dtype: Any) -> None:
    session = native.NativeSession(environment, str(identity(tmp_path / "m.onnx", dtype, ["A", 3, "B"])))
    for shape in ((2, 3, 4), (0, 3, 1), (1, 3, 0)):
        sent = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
        got = np.asarray(session.run([sent], [0], None)[0])
        assert got.dtype == sent.dtype and got.shape == sent.shape and np.array_equal(got, sent)


def test_scalars_and_values_that_outlive_their_session(tmp_path: Path, environment: native.Environment) -> None:
    session = native.NativeSession(environment, str(identity(tmp_path / "m.onnx", np.int64, [])))
    value = np.asarray(session.run([np.array(7)], [0], None)[0])
    session.close()
    del session
    gc.collect()
    assert value.shape == () and value == 7


def test_values_equal_those_of_the_python_package(tmp_path: Path, environment: native.Environment) -> None:
    path = graphs.packed_hidden(tmp_path / "m.onnx")
    ours = native.NativeSession(environment, str(path))
    theirs = import_ort().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(n, t) for n, t, _ in ours.inputs] == [(node.name, node.type) for node in theirs.get_inputs()]
    assert [s for _, _, s in ours.inputs] == [tuple(node.shape) for node in theirs.get_inputs()]
    ids = np.array([1, 5, 9])
    feeds = [ids, np.arange(3), np.zeros(3, np.int64), np.array([0, 3], np.int32)]
    want = theirs.run(None, dict(zip([n for n, _, _ in ours.inputs], feeds, strict=True)))[0]
    assert np.array_equal(np.asarray(ours.run(feeds, [0], None)[0]), want)


def test_refusals(tmp_path: Path, environment: native.Environment) -> None:
    session = native.NativeSession(environment, str(identity(tmp_path / "m.onnx", np.int64, ["N", 2])))
    good = np.zeros((1, 2), np.int64)
    for arrays, wanted in (
        ([], [0]),
        ([good, good], [0]),
        ([good], [1]),
        ([good], [-1]),
        ([good.astype(np.int32)], [0]),
        ([good.astype(np.float64)], [0]),
        ([np.zeros((4, 4), np.int64)[:, ::2]], [0]),
    ):
        with pytest.raises(ValueError):
            session.run(arrays, wanted, None)
    with pytest.raises(native.OrtFailure) as caught:
        session.run([np.zeros((1, 3), np.int64)], [0], None)
    assert caught.value.code == 2
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.run([good], [0], None)
    with pytest.raises(native.OrtFailure):
        native.NativeSession(environment, str(tmp_path / "absent.onnx"))
    with pytest.raises(OSError, match="absent"):
        native.NativeSession(environment, str(tmp_path / "m.onnx"), str(tmp_path / "absent.so"))
    with pytest.raises(OSError):
        native.Environment(str(tmp_path / "absent.so"), 1, False)
    with pytest.raises(TypeError):
        native.Value()
    assert np.array_equal(SESSIONS.open(tmp_path / "m.onnx").run({"x": good}, ["y"])[0], good)


def test_a_stop_ends_one_run_and_the_session_goes_on(tmp_path: Path) -> None:
    session = SESSIONS.open(graphs.packed_hidden(tmp_path / "m.onnx", layers=80))
    feeds = {name: np.zeros(400, np.int64) for name in ("input_ids", "position_ids", "token_type_ids")}
    feeds["cu_seqlens"] = np.array([0, 400], np.int32)
    stop = session.stop()
    timer = threading.Timer(0.05, stop.set)
    timer.start()
    with pytest.raises(Cancelled):
        session.run(feeds, ["hidden"], stop)
    timer.join()
    assert stop.is_set
    small = {name: array[:2] for name, array in feeds.items()} | {"cu_seqlens": np.array([0, 2], np.int32)}
    assert session.run(small, ["hidden"], session.stop())[0].shape == (2, graphs.WIDTH)


def test_sessions_share_one_pool_that_sleeps(tmp_path: Path) -> None:
    path = graphs.packed_hidden(tmp_path / "m.onnx", layers=6)
    feeds = {name: np.zeros(64, np.int64) for name in ("input_ids", "position_ids", "token_type_ids")}
    feeds["cu_seqlens"] = np.array([0, 64], np.int32)
    first = SESSIONS.open(path)
    first.run(feeds, ["hidden"])
    threads = psutil.Process().num_threads()
    others = [SESSIONS.open(path) for _ in range(5)]
    for session in others:
        session.run(feeds, ["hidden"])
    assert psutil.Process().num_threads() == threads
    before = time.process_time()
    threading.Event().wait(0.3)
    assert time.process_time() - before < 0.1


def test_loading_leaves_the_interpreter_free(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    constants: dict[str, Any] = {f"w{i}": rng.standard_normal((1500, 1500)).astype(np.float32) for i in range(8)}
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(8)]
    ends = [graphs.value(name, TensorProto.FLOAT, ["N", 1500]) for name in ("x0", "x8")]
    path = graphs.write(tmp_path / "m.onnx", nodes, ends[:1], ends[1:], constants)
    ticks, loaded = [time.perf_counter()], threading.Event()

    def tick() -> None:
        while not loaded.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    SESSIONS.open(path)
    seconds = time.perf_counter() - start
    loaded.set()
    thread.join()
    assert max(b - a for a, b in itertools.pairwise(ticks)) < seconds / 2


def test_memory_is_given_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    constants = {f"w{i}": rng.standard_normal((1000, 1000)).astype(np.float32) for i in range(10)}  # 40 MB
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(10)]
    ends = [graphs.value(name, TensorProto.FLOAT, ["N", 1000]) for name in ("x0", "x10")]
    path = graphs.write(tmp_path / "m.onnx", nodes, ends[:1], ends[1:], constants)
    resident = []
    for _ in range(6):
        session = SESSIONS.open(path)
        session.run({"x0": np.zeros((8, 1000), np.float32)}, ["x10"])
        session.close()
        release_memory()
        resident.append(psutil.Process().memory_info().rss / 2**20)
    assert resident[-1] - resident[1] < 15


def test_nothing_is_sent_home(tmp_path: Path) -> None:
    code = "from server.runtime.sessions import Sessions; import sys; Sessions().open(__import__('pathlib').Path(sys.argv[1]))"
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code, str(identity(tmp_path / "m.onnx", np.int64, ["N"]))], env=env, check=True)
    assert not (tmp_path / "home").exists()


def test_library_is_found_without_importing_the_package() -> None:
    code = "import sys; from server.runtime.sessions import _ort_library; print(_ort_library()); assert 'onnxruntime' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == str(_ort_library())


def test_graphs_with_text_go_through_the_python_package(tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    ends = [graphs.value(name, TensorProto.STRING, ["N"]) for name in ("x", "y")]
    session = SESSIONS.open(graphs.write(tmp_path / "m.onnx", [node], ends[:1], ends[1:], {}))
    assert session.run({"x": np.array(["a"], np.object_)}, ["y"], session.stop())[0].tolist() == ["a"]


def test_the_way_of_other_providers(tmp_path: Path) -> None:
    session = _PythonSession(SessionSettings(threads=1), identity(tmp_path / "m.onnx", np.int64, ["N"]))
    stop = session.stop()
    assert session.run({"x": np.arange(3)}, ["y"], stop)[0].tolist() == [0, 1, 2]
    stop.set()
    assert stop.is_set
    with pytest.raises(Cancelled):
        session.run({"x": np.arange(3)}, ["y"], stop)
    with pytest.raises(InvalidTensor):
        session.run({"x": np.zeros((1, 2), np.int64)}, ["y"], None)
