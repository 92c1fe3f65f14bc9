"""Rounding of one product: the bound that keeps 16-bit lanes from saturating, the gain of each step, and exactness on this CPU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from server.runtime.graphs.checkpoint import Dense
from server.runtime.graphs.quantize import compensated, pair_safe, quantize_product, round_weights
from server.runtime.ort import import_ort


def keeps_the_bound(q: np.ndarray) -> bool:
    pairs = q[: len(q) // 2 * 2].reshape(len(q) // 2, 2, q.shape[1])
    return bool(
        (np.maximum(pairs, 0).sum(axis=1) <= 128).all() and (np.minimum(pairs, 0).sum(axis=1) >= -128).all() and (np.abs(q) <= 127).all()
    )


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), seed=st.integers(0, 10_000), extreme=st.booleans())
def test_pairs_are_made_safe_and_safe_ones_left(rows: int, seed: int, extreme: bool) -> None:
    rng = np.random.default_rng(seed)
    q = rng.choice([-127.0, -64.0, 0.0, 1.0, 65.0, 127.0], (rows, 7)) if extreme else rng.integers(-60, 61, (rows, 7)).astype(np.float64)
    safe = pair_safe(q)
    assert keeps_the_bound(safe)
    assert (np.sign(safe) * np.sign(q) >= 0).all()
    if not extreme:
        np.testing.assert_array_equal(safe, q)


def outliers(tokens: int, width: int, seed: int = 0) -> np.ndarray:
    """Activations as transformers have them: correlated channels, and a few that are much larger than the rest."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, width)) @ (np.eye(width) + 0.3 * rng.standard_normal((width, width)))
    mixed[:, rng.choice(width, width // 16, replace=False)] *= 20
    return mixed.astype(np.float32)


@pytest.mark.parametrize("width", [64, 97])
def test_rounding_with_compensation_is_safe_and_better(width: int) -> None:
    rng = np.random.default_rng(1)
    x = outliers(2000, width)
    weight = rng.standard_normal((width, 80)).astype(np.float32)
    plain, scale = round_weights(weight, np.square(x).mean(axis=0))
    better = compensated(weight, scale, x.T @ x)
    assert keeps_the_bound(plain) and keeps_the_bound(better)

    def error(q: np.ndarray) -> float:
        return float(np.square(x @ (q * scale) - x @ weight).sum())

    assert error(better) < 0.8 * error(plain)


@pytest.mark.parametrize("form", ["static", "row"])
def test_a_product_in_int8_is_within_a_percent(form: str) -> None:
    x, fresh = np.split(outliers(1800, 96), [1500])
    rng = np.random.default_rng(2)
    dense = Dense(rng.standard_normal((96, 50)).astype(np.float32), rng.standard_normal(50).astype(np.float32))
    choice = quantize_product(x, dense, np.arange(0, 1500, 3), (form,))
    assert choice.form == form
    assert choice.error < 1e-3
    product = choice.product
    scaled = fresh * product.mult
    if product.row:
        step = np.abs(scaled).max(axis=1, keepdims=True) / 127
        rows = np.rint(scaled / step) * step
    else:
        rows = (np.clip(np.rint(scaled) + product.zero_point, 0, 255) - product.zero_point) * product.scale
    got = rows @ (product.weight.astype(np.float32) * product.weight_scale) + product.bias
    want = fresh @ dense.weight + dense.bias
    assert np.square(got - want).sum() / np.square(want).sum() < 2e-3


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_safe_weights_multiply_exactly_on_this_cpu(rows: int) -> None:
    """The largest activations there are, times the heaviest weights that the bound allows, through ONNX Runtime's own product."""
    rng = np.random.default_rng(3)
    weight = pair_safe(rng.choice([-127.0, -64.0, 64.0, 127.0, 1.0], (384, 48))).astype(np.int8)
    constants = {"b": weight, "scale": np.float32(1), "weight_scale": np.ones(48, np.float32), "zero": np.uint8(0)}
    node = helper.make_node("MatMulIntegerToFloat", ["a", "b", "scale", "weight_scale", "zero"], ["y"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "exact",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, ["m", 384])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 48])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = import_ort().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    a = np.full((rows, 384), 255, np.uint8)
    np.testing.assert_array_equal(session.run(None, {"a": a})[0], a.astype(np.float32) @ weight.astype(np.float32))
