"""The two operators of beam search against their twins, through ONNX Runtime, and under the sanitizers."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from native.kernels import twins_beam
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

    expected, after = twins_beam.beam_attention(**{**feeds, "pool": pool}, num_heads=heads, scale=0.3, column=column, own=int(own))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(feeds["pool"], after, rtol=1e-6)
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
    expected_lse, expected_values, expected_ids = twins_beam.top_tokens(logits, k)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(values, expected_values)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(ids[finite], expected_ids[finite])
    with pytest.raises(Exception, match="TopTokens"):
        session("TopTokens", feeds, {"lse": 1, "values": 1, "ids": 7}, {}).run(None, {**feeds, "k": np.array([cols + 1], np.int64)})


WIDTHS = {"4": ["-DUS_VW=4"], "8": ["-march=x86-64-v3"] if platform.machine() == "x86_64" else ["-DUS_VW=8"], "16": ["-DUS_VW=16"]}


@pytest.mark.parametrize("width", WIDTHS)
def test_no_access_leaves_the_arrays(width: str, tmp_path: Path) -> None:
    """Both loops on arrays of exactly their size, under AddressSanitizer and UBSan, for each width of vectors."""
    here = Path(__file__).resolve()
    sources = [here.with_name("fuzz_beam.c"), here.parents[2] / "native" / "kernels" / "beam.c"]
    flags = ["-std=gnu11", "-O1", "-g", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi", "-DUS_ISA=base"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = tmp_path / "fuzz"
    subprocess.run(["cc", *flags, *sanitize, *WIDTHS[width], *map(str, sources), "-o", str(program), "-lm"], check=True)
    done = subprocess.run([str(program), "300"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
