"""Raw tensors through real graphs: joined where the first axis allows it, alone elsewhere, and refused with the tensor's name."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from server.core import Call
from server.errors import DeadlineExceeded, InvalidTensor
from server.runtime.observer import BatchReport, NullObserver
from server.runtime.sessions import Sessions
from server.runtime.tensor_engine import TensorEngine
from tests.runtime import graphs_for_tests as graphs

SESSIONS = Sessions()
SHARED = Path(os.environ.get("UNDERSTUDY_SHARED", Path(__file__).parents[2].parent / "shared"))
WEIGHTS = np.random.default_rng(1).standard_normal((3, 2)).astype(np.float32)


class Batches(NullObserver):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def batch_done(self, batch: BatchReport) -> None:
        self.sizes.append(batch.sequences)


def linear(path: Path, *, axes: tuple[Any, Any] = ("N", "N"), extra: str = "") -> Path:
    """x[N, L, 3] -> y = x @ WEIGHTS, [N, L, 2]; `extra` "sum" makes y the sum over N of that, whatever its declared axis says."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["product" if extra else "y"])]
    if extra == "sum":
        nodes.append(helper.make_node("ReduceSum", ["product", "axis"], ["y"], keepdims=1))
    inputs = [graphs.value("x", TensorProto.FLOAT, [axes[0], "L", 3])]
    outputs = [graphs.value("y", TensorProto.FLOAT, [axes[1], "L", 2])]
    constants = {"w": WEIGHTS} | ({"axis": np.array([0])} if extra else {})
    return graphs.write(path, nodes, inputs, outputs, constants)


def engine(path: Path, observer: Any = None) -> TensorEngine:
    return TensorEngine(SESSIONS.open(path), "raw", "1", None, observer)


def call() -> Call:
    return Call("test")


def tensors(count: int, shapes: list[tuple[int, int]]) -> list[Any]:
    rng = np.random.default_rng(count)
    return [rng.standard_normal((*shapes[i % len(shapes)], 3)).astype(np.float32) for i in range(count)]


async def test_callers_are_joined_where_their_other_sizes_agree(tmp_path: Path) -> None:
    seen = Batches()
    made = engine(linear(tmp_path / "m.onnx"), seen)
    assert made.batched
    inputs = tensors(40, [(1, 4), (3, 4), (2, 7), (0, 4)])
    results = await asyncio.gather(*(made.infer({"x": x}, None, call()) for x in inputs))
    for x, result in zip(inputs, results, strict=True):
        assert result["y"].shape == (*x.shape[:2], 2)
        np.testing.assert_allclose(result["y"], x @ WEIGHTS, atol=1e-5)
    await made.close()
    assert sum(seen.sizes) == 40 and max(seen.sizes) > 1


@pytest.mark.parametrize("axes", [("N", "M"), (2, 2), (None, None), ("N", 2)], ids=str)
async def test_callers_are_never_joined_without_one_symbolic_first_axis(tmp_path: Path, axes: tuple[Any, Any]) -> None:
    seen = Batches()
    made = engine(linear(tmp_path / "m.onnx", axes=axes), seen)
    assert not made.batched
    inputs = tensors(10, [(2, 4)])
    results = await asyncio.gather(*(made.infer({"x": x}, ["y"], call()) for x in inputs))
    for x, result in zip(inputs, results, strict=True):
        np.testing.assert_allclose(result["y"], x @ WEIGHTS, atol=1e-5)
    await made.close()
    assert seen.sizes == [1] * 10


async def test_a_graph_whose_axes_lie_is_found_out_and_runs_calls_alone(tmp_path: Path) -> None:
    made = engine(linear(tmp_path / "m.onnx", extra="sum"))
    inputs = tensors(30, [(2, 4)])
    results = await asyncio.gather(*(made.infer({"x": x}, None, call()) for x in inputs))
    for x, result in zip(inputs, results, strict=True):
        np.testing.assert_allclose(result["y"], (x @ WEIGHTS).sum(0, keepdims=True), atol=1e-5)
    assert not made.batched
    await made.close()


@pytest.mark.parametrize(
    ("inputs", "outputs", "got", "tensor"),
    [
        ({}, None, None, "x"),
        ({"x": np.zeros((1, 1, 3), np.float32), "z": np.zeros(1)}, None, None, "z"),
        ({"x": np.zeros((1, 1, 3))}, None, "float64", "x"),
        ({"x": np.zeros((1, 3), np.float32)}, None, "2", "x"),
        ({"x": np.zeros((1, 1, 4), np.float32)}, None, "[1, 1, 4]", "x"),
        ({"x": np.zeros((1, 1, 3), np.float32)}, ["nope"], None, "nope"),
    ],
)
async def test_refusals_name_the_tensor(tmp_path: Path, inputs: Any, outputs: Any, got: str | None, tensor: str) -> None:
    made = engine(linear(tmp_path / "m.onnx"))
    with pytest.raises(InvalidTensor) as caught:
        await made.infer(inputs, outputs, call())
    assert caught.value.metadata["tensor"] == tensor
    assert got is None or caught.value.metadata["got"] == got
    await made.close()


async def test_metadata_and_deadline(tmp_path: Path) -> None:
    made = engine(linear(tmp_path / "m.onnx"))
    assert [(s.name, s.dtype, s.shape) for s in made.inputs] == [("x", np.dtype(np.float32), ("N", "L", 3))]
    assert [(s.name, s.onnx_type) for s in made.outputs] == [("y", "tensor(float)")]
    with pytest.raises(DeadlineExceeded):
        await made.infer({"x": np.zeros((1, 1, 3), np.float32)}, None, Call("late", deadline=1.0))
    await made.close()


async def test_input_that_only_the_graph_can_refuse_is_the_callers_fault(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"])]
    ids, y = graphs.value("ids", TensorProto.INT64, ["N"]), graphs.value("y", TensorProto.FLOAT, ["N", graphs.WIDTH])
    made = engine(graphs.write(tmp_path / "m.onnx", nodes, [ids], [y], {"table": graphs.TABLE}))
    good, bad = np.array([1, 2]), np.array([graphs.WORDS + 1])
    results = await asyncio.gather(*(made.infer({"ids": x}, None, call()) for x in (good, bad, good)), return_exceptions=True)
    assert isinstance(results[1], InvalidTensor)
    for i in (0, 2):
        np.testing.assert_array_equal(results[i]["y"], graphs.TABLE[good])  # type: ignore[index]
    await made.close()


async def test_text_tensors(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["s"], ["y"])]
    made = engine(
        graphs.write(
            tmp_path / "m.onnx", nodes, [graphs.value("s", TensorProto.STRING, ["N"])], [graphs.value("y", TensorProto.STRING, ["N"])], {}
        )
    )
    result = await made.infer({"s": np.array([b"abc", "d"], np.object_)}, None, call())
    assert result["y"].tolist() == ["abc", "d"]
    for wrong in (np.array([b"\xff"], np.object_), np.array([5], np.object_)):
        with pytest.raises(InvalidTensor):
            await made.infer({"s": wrong}, None, call())
    await made.close()


async def test_an_encoder_graph_answers_raw_tensors_alone(tmp_path: Path) -> None:
    made = engine(graphs.packed_hidden(tmp_path / "m.onnx"))
    assert not made.batched
    ids = np.array([3, 4, 5])
    feeds = {"input_ids": ids, "position_ids": np.array([0, 1, 0]), "token_type_ids": np.zeros(3, np.int64)}
    result = await made.infer({**feeds, "cu_seqlens": np.array([0, 2, 3], np.int32)}, None, call())
    np.testing.assert_allclose(result["hidden"], graphs.TABLE[ids] + np.array([[0], [1], [0]]), atol=1e-6)
    await made.close()


@pytest.mark.skipif(not (SHARED / "data/tiny_weights").is_dir(), reason="real weights are not beside the repository")
async def test_a_real_model_with_state_runs_alone() -> None:
    made = engine(SHARED / "data/tiny_weights/silero_vad/silero_vad_16k_op15.onnx")
    assert not made.batched
    state, scores = np.zeros((2, 1, 128), np.float32), []
    noise = np.random.default_rng(0).standard_normal((1, 576)).astype(np.float32) * 0.01
    for _ in range(3):
        answer = await made.infer({"input": noise, "state": state, "sr": np.array(16000)}, None, call())
        outputs = list(answer.values())
        scores.append(float(outputs[0].reshape(-1)[0]))
        state = outputs[1]
    assert all(0 <= score <= 1 for score in scores) and np.any(state)
    await made.close()
