"""The two operators of beam search against NumPy, through ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from server.runtime.kernels import DOMAIN, OPSET, register
from server.runtime.ort import import_ort

Array = npt.NDArray[Any]


def session(op: str, inputs: dict[str, Array], outputs: dict[str, int], attributes: dict[str, float], threads: int = 2) -> Any:
    from onnx import helper

    node = helper.make_node(op, list(inputs), list(outputs), domain=DOMAIN, **attributes)
    named = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), [None] * v.ndim) for n, v in inputs.items() if n]
    results = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    graph = helper.make_graph([node], op, named, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, OPSET)], ir_version=9)
    options = import_ort().SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    register(options)
    return import_ort().InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize(("heads", "dim"), [(1, 8), (4, 16), (3, 64), (2, 5), (2, 31)])
@pytest.mark.parametrize("own", [True, False])
def test_attention_over_slots(heads: int, dim: int, own: bool) -> None:
    random = np.random.default_rng(heads * dim + own)
    inner, rows, slots, column = heads * dim, 7, 200, 2 * heads * dim
    pool = random.standard_normal((slots, 3 * 2 * inner)).astype(np.float32)
    x = random.standard_normal((rows, inner * (3 if own else 1))).astype(np.float32)
    bias = random.standard_normal(x.shape[1]).astype(np.float32)
    relative = random.standard_normal((heads, 9)).astype(np.float32)
    lengths = random.integers(1, 24, rows).astype(np.int32)
    if own:
        # Rows share early slots, as beams do; each has a last slot of its own.
        table = random.integers(0, 100, (rows, 24)).astype(np.int32)
        table[np.arange(rows), lengths - 1] = 100 + np.arange(rows)
    else:
        table = np.stack([random.integers(0, slots - 24, rows), lengths], axis=1).astype(np.int32)
    feeds: dict[str, Array] = {"x": x, "bias": bias, "pool": pool.copy(), "table": table}
    if own:
        feeds |= {"lengths": lengths, "relative": relative}
    run = session("BeamAttention", feeds, {"y": 1}, {"num_heads": heads, "scale": 0.3, "column": column, "own": int(own)})
    got = run.run(None, feeds)[0]

    value = (x + bias).astype(np.float64)
    expected_pool = pool.astype(np.float64)
    if own:
        for row in range(rows):
            expected_pool[table[row, lengths[row] - 1], column : column + 2 * inner] = value[row, inner:]
    for row in range(rows):
        count = lengths[row]
        places = table[row, :count] if own else table[row, 0] + np.arange(count)
        for head in range(heads):
            at = head * dim
            keys = expected_pool[places, column + at : column + at + dim]
            values = expected_pool[places, column + inner + at : column + inner + at + dim]
            scores = keys @ value[row, at : at + dim] * 0.3
            if own:
                scores += relative[head, np.minimum(np.arange(count)[::-1], 8)]
            np.testing.assert_allclose(got[row, at : at + dim], softmax(scores) @ values, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(feeds["pool"], expected_pool, rtol=1e-6)
    alone = {name: v[2:3] if name not in ("bias", "pool", "relative") else v for name, v in feeds.items()}
    np.testing.assert_array_equal(run.run(None, alone)[0][0], got[2])


def test_slots_outside_of_the_pool_are_refused() -> None:
    feeds: dict[str, Array] = {
        "x": np.zeros((2, 24), np.float32),
        "bias": np.zeros(24, np.float32),
        "pool": np.zeros((4, 16), np.float32),
        "table": np.array([[0, 1], [2, 3]], np.int32),
        "lengths": np.array([2, 2], np.int32),
    }
    run = session("BeamAttention", feeds, {"y": 1}, {"num_heads": 2, "scale": 1.0})
    for name, bad in (
        ("table", np.array([[0, 4], [2, 3]], np.int32)),
        ("table", np.array([[-1, 1], [2, 3]], np.int32)),
        ("lengths", np.array([2, 3], np.int32)),
        ("lengths", np.array([0, 2], np.int32)),
        ("pool", np.zeros((4, 15), np.float32)),
    ):
        with pytest.raises(Exception, match="BeamAttention"):
            run.run(None, {**feeds, name: bad})
    run.run(None, feeds)
    cross: dict[str, Array] = {"x": feeds["x"][:, :8].copy(), "bias": np.zeros(8, np.float32), "pool": feeds["pool"]}
    cross["table"] = np.array([[0, 4], [3, 2]], np.int32)
    run = session("BeamAttention", cross, {"y": 1}, {"num_heads": 2, "scale": 1.0, "own": 0})
    with pytest.raises(Exception, match="slots 3 to 4 of 4"):
        run.run(None, cross)


@pytest.mark.parametrize(("cols", "k"), [(7, 7), (64, 1), (1000, 33), (32_003, 8), (256, 256)])
def test_top_tokens(cols: int, k: int) -> None:
    random = np.random.default_rng(cols)
    logits = (random.standard_normal((5, cols)) * 4).astype(np.float32)
    logits[1] = np.round(logits[1])  # many ties
    logits[2] = -np.inf
    logits[2, cols // 2] = 3.0
    feeds = {"logits": logits, "k": np.array([k], np.int64)}
    lse, values, ids = session("TopTokens", feeds, {"lse": 1, "values": 1, "ids": 7}, {}).run(None, feeds)
    exact = logits.astype(np.float64)
    most = exact.max(axis=1)
    np.testing.assert_allclose(lse, most + np.log(np.exp(exact - most[:, None]).sum(axis=1)), rtol=1e-6, atol=1e-6)
    for row in range(5):
        order = np.lexsort((np.arange(cols), -logits[row]))[:k]
        np.testing.assert_array_equal(values[row], logits[row, order])
        if row != 2:
            np.testing.assert_array_equal(ids[row], order)
    with pytest.raises(Exception, match="TopTokens"):
        session("TopTokens", feeds, {"lse": 1, "values": 1, "ids": 7}, {}).run(None, {**feeds, "k": np.array([cols + 1], np.int64)})
