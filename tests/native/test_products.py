"""Products of decoders and the adapters inside them: every instruction set against the twins, and the promises that batches rely on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native.kernels import twins
from native.kernels import twins_products as products
from native.kernels.twins_products import Lora
from tests.native import direct, direct_products

ISAS = direct.runnable()
FUZZ = settings(max_examples=30, deadline=None, derandomize=True)
SHAPES = (st.integers(0, 15), st.integers(1, 300), st.integers(1, 70), st.integers(0, 2**32 - 1))
Array = np.ndarray[Any, Any]


def floats(random: np.random.Generator, *shape: int) -> twins.Floats:
    return random.standard_normal(shape).astype(np.float32)


def close(got: Array, expected: Array, depth: int) -> None:
    """Within a few roundings of a sum of `depth` terms of the size that the expected values have over all."""
    assert got.shape == expected.shape
    if expected.size:
        assert np.abs(got - expected).max() <= 1e-6 * (4 + depth**0.5) * np.abs(expected).max()


def bank(random: np.random.Generator, shape: tuple[int, int, int], rank: int = 8, slots: int = 5, bfloat16: bool = False) -> Lora:
    """Adapters for a product of rows x depth x cols whose columns belong to up to three layers; some rows and some ranks are none."""
    rows, depth, cols = shape
    cuts = sorted({0, cols, *(int(c) for c in random.integers(0, cols + 1, 2))})
    layout, width = [], 2
    for target, (first, last) in enumerate(itertools.pairwise(cuts)):
        layout.append((width, width + depth + 1, first, last - first, target, depth))
        width += depth + last - first + 3
    weights = floats(random, slots, rank, width) * np.float32(0.3)
    return Lora(
        adapter_ids=random.integers(-1, slots, rows).astype(np.int32),
        bank=products.to_bfloat16(weights) if bfloat16 else weights,
        ranks=random.integers(0, rank + 1, (slots, len(layout))).astype(np.int32),
        layout=np.array(layout, np.int64),
    )


def int4_case(random: np.random.Generator, depth: int, cols: int, block: int) -> tuple[Array, Array]:
    q = random.integers(0, 16, (depth, cols)).astype(np.uint8)
    return products.pack_int4(q, np.abs(floats(random, -(-depth // block), cols)) + np.float32(0.01), block)


def int8_case(random: np.random.Generator, rows: int, depth: int, cols: int) -> dict[str, Any]:
    return {
        "a": random.integers(0, 256, (rows, depth)).astype(np.uint8),
        "b": random.integers(-127, 128, (depth, cols)).astype(np.int8),
        "a_scale": np.float32(0.02),
        "b_scale": np.abs(floats(random, cols)) * np.float32(0.1),
        "a_zero": int(random.integers(0, 256)),
        "mult": np.abs(floats(random, depth)) + np.float32(0.5),
        "row_scale": np.abs(floats(random, rows)) + np.float32(0.5),
    }


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bfloat16", [False, True])
@FUZZ
@given(*SHAPES)
def test_float_gemm(isa: str, bfloat16: bool, rows: int, depth: int, cols: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b, lora = floats(random, rows, depth), floats(random, depth, cols), bank(random, (rows, depth, cols), bfloat16=bfloat16)
    close(direct_products.float_gemm(isa, a, b), products.float_gemm(a, b), depth)
    expected = products.float_gemm(a, b) + products.lora_delta(a.astype(np.float64), lora, cols)
    close(direct_products.float_gemm(isa, a, b, lora), expected, depth)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", products.BLOCKS)
@FUZZ
@given(*SHAPES)
def test_int4_gemm(isa: str, block: int, rows: int, depth: int, cols: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, lora = floats(random, rows, depth) * np.float32(10.0 ** random.integers(-4, 5)), bank(random, (rows, depth, cols))
    data, scale = int4_case(random, depth, cols, block)
    expected = products.int4_gemm(a, data, scale, depth=depth, cols=cols, block=block)
    close(direct_products.int4_gemm(isa, a, data, scale, cols, block), expected, depth)
    expected = expected + products.lora_delta(a.astype(np.float64), lora, cols)
    close(direct_products.int4_gemm(isa, a, data, scale, cols, block, lora), expected, depth)


@pytest.mark.parametrize("isa", ISAS)
@FUZZ
@given(*SHAPES, st.booleans())
def test_int8_gemm_with_adapters(isa: str, rows: int, depth: int, cols: int, seed: int, per_row: bool) -> None:
    random = np.random.default_rng(seed)
    values, lora = int8_case(random, rows, depth, cols), bank(random, (rows, depth, cols))
    row_scale = values["row_scale"] if per_row else None
    exact = twins.int8_gemm(*(values[name] for name in ("a", "b", "a_scale", "b_scale", "a_zero")))
    x = products.dequantize(values["a"], values["a_zero"], values["mult"], row_scale)
    expected = exact + products.lora_delta(x, lora, cols, row_scale)
    close(direct_products.int8_gemm(isa, {**values, "row_scale": row_scale}, lora), expected, depth)


@pytest.mark.parametrize("isa", ISAS)
@FUZZ
@given(*SHAPES)
def test_adapters_alone_add_to_any_product(isa: str, rows: int, depth: int, cols: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x, y, lora = floats(random, rows, depth), floats(random, rows, cols), bank(random, (rows, depth, cols), rank=11)
    close(direct_products.lora_add(isa, y, x, lora), y + products.lora_delta(x.astype(np.float64), lora, cols), depth)


@FUZZ
@given(st.integers(1, 300), st.integers(1, 70), st.sampled_from(products.BLOCKS), st.integers(0, 2**32 - 1))
def test_packed_weights_unpack_to_what_was_packed(depth: int, cols: int, block: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    q = random.integers(0, 16, (depth, cols)).astype(np.uint8)
    scale = products.from_bfloat16(products.to_bfloat16(floats(random, -(-depth // block), cols)))
    data, bits = products.pack_int4(q, scale, block)
    assert data.shape == (-(-cols // 16), -(-depth // block) * block // 4, 32)
    meant = (q.astype(np.float32) - 8) * np.repeat(scale, block, axis=0)[:depth]
    np.testing.assert_array_equal(products.unpack_int4(data, bits, depth, cols, block), meant)
    # As the layout is written down: byte j of panel p and group g.
    row, column = int(random.integers(depth)), int(random.integers(cols))
    byte = data[column // 16, row // 4, column % 8 * 4 + row % 4]
    assert (byte >> 4 if column % 16 >= 8 else byte & 15) == q[row, column]


def test_wrong_four_bit_weights_are_not_packed() -> None:
    with pytest.raises(ValueError, match="no 4-bit weights"):
        products.pack_int4(np.full((32, 16), 16, np.uint8), np.ones((1, 16), np.float32), 32)
    with pytest.raises(ValueError, match="no 4-bit weights"):
        products.pack_int4(np.zeros((33, 16), np.uint8), np.ones((1, 16), np.float32), 32)


def test_rounding_activations_costs_less_than_rounding_weights() -> None:
    random = np.random.default_rng(5)
    a, w = floats(random, 64, 512) * np.exp(floats(random, 64, 512)), floats(random, 512, 96)
    for block in products.BLOCKS:
        peak = np.abs(w.reshape(-1, block, 96)).max(axis=1)
        scale = products.from_bfloat16(products.to_bfloat16(peak / 7))
        q = np.clip(np.rint(w / np.repeat(scale, block, axis=0)) + 8, 0, 15).astype(np.uint8)
        data, bits = products.pack_int4(q, scale, block)
        stored = products.unpack_int4(data, bits, 512, 96, block).astype(np.float64)
        by_weights = np.linalg.norm(a @ stored - a @ w.astype(np.float64))
        by_inputs = np.linalg.norm(products.int4_gemm(a, data, bits, depth=512, cols=96, block=block) - a @ stored)
        assert by_inputs < 0.3 * by_weights


def every_product(random: np.random.Generator, isa: str, rows: int, depth: int, cols: int) -> list[Callable[[Array, Lora], Array]]:
    """Each product with fixed weights, as a function of chosen rows and their adapters."""
    a, b = floats(random, rows, depth), floats(random, depth, cols)
    data, scale = int4_case(random, depth, cols, 32)
    values = int8_case(random, rows, depth, cols)

    def int8(chosen: Array, lora: Lora) -> Array:
        return direct_products.int8_gemm(isa, {**values, "a": values["a"][chosen], "row_scale": values["row_scale"][chosen]}, lora)

    return [
        lambda chosen, lora: direct_products.float_gemm(isa, a[chosen], b, lora),
        lambda chosen, lora: direct_products.int4_gemm(isa, a[chosen], data, scale, cols, 32, lora),
        lambda chosen, lora: direct_products.lora_add(isa, a[chosen] @ np.zeros((depth, cols), np.float32), a[chosen], lora),
        int8,
    ]


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_gets_the_same_bits_alone_and_in_any_batch(isa: str) -> None:
    random = np.random.default_rng(11)
    rows, depth, cols = 150, 333, 75
    lora = bank(random, (rows, depth, cols), slots=3)
    for product in every_product(random, isa, rows, depth, cols):
        whole = product(np.arange(rows), lora)
        for chosen in ([0], [149], [3, 70, 71], list(range(20, 27)), list(range(149, -1, -1)), [5] * 9):
            picked = replace(lora, adapter_ids=lora.adapter_ids[chosen])
            np.testing.assert_array_equal(whole[chosen], product(np.array(chosen), picked))


@pytest.mark.parametrize("isa", ISAS)
def test_rows_without_adapter_get_the_bits_of_the_bare_product(isa: str) -> None:
    random = np.random.default_rng(12)
    lora = bank(random, (40, 96, 64))
    none = replace(lora, adapter_ids=np.full(40, -1, np.int32))
    bare = lora.adapter_ids < 0
    for product in every_product(random, isa, 40, 96, 64):
        without, mixed = product(np.arange(40), none), product(np.arange(40), lora)
        np.testing.assert_array_equal(without[bare], mixed[bare])
        assert np.any(without[~bare] != mixed[~bare])


def test_an_adapter_of_another_slot_changes_nothing() -> None:
    random = np.random.default_rng(13)
    lora = bank(random, (30, 64, 48))
    emptied = np.where((np.arange(5) == 2)[:, None, None], np.float32(np.nan), lora.bank).astype(np.float32)
    kept = lora.adapter_ids != 2
    for product in every_product(random, ISAS[0], 30, 64, 48):
        np.testing.assert_array_equal(product(np.arange(30), lora)[kept], product(np.arange(30), replace(lora, bank=emptied))[kept])


def test_ranks_past_the_adapters_own_are_not_read() -> None:
    random = np.random.default_rng(14)
    lora = bank(random, (30, 64, 48))
    lora.ranks[:] = 3
    for product in every_product(random, ISAS[0], 30, 64, 48):
        whole = product(np.arange(30), lora)
        beyond = np.where((np.arange(8) >= 3)[None, :, None], np.float32(np.nan), lora.bank).astype(np.float32)
        np.testing.assert_array_equal(whole, product(np.arange(30), replace(lora, bank=beyond)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e-45, 0.0])
def test_a_broken_row_does_not_touch_its_neighbours(isa: str, value: float) -> None:
    random = np.random.default_rng(15)
    a, b, lora = floats(random, 9, 96), floats(random, 96, 40), bank(random, (9, 96, 40))
    data, scale = int4_case(random, 96, 40, 32)
    others = np.arange(9) != 4
    broken = a.copy()
    broken[4] = value
    for product in (
        lambda x: direct_products.float_gemm(isa, x, b, lora),
        lambda x: direct_products.int4_gemm(isa, x, data, scale, 40, 32, lora),
    ):
        right, seen = product(a), product(broken)
        np.testing.assert_array_equal(right[others], seen[others])
        if not np.isfinite(value):
            assert not np.isfinite(seen[4]).any()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"adapter_ids": np.array([0, 5, 0], np.int32)}, r"adapter_ids\[1\] is 5, not within -1\.\.4"),
        ({"adapter_ids": np.array([2**31 - 1, 0, 0], np.int32)}, r"adapter_ids\[0\] is 2147483647"),
        ({"ranks": np.full((5, 1), 9, np.int32)}, r"lora_ranks\[0, 0\] is 9, not within 0\.\.8"),
        ({"ranks": np.full((5, 1), -1, np.int32)}, r"lora_ranks\[0, 0\] is -1"),
        ({"layout": [(-1, 0, 0, 8, 0, 16)]}, "has A at -1"),
        ({"layout": [(2**62, 0, 0, 8, 0, 16)]}, "has A at 4611686018427387904"),
        ({"layout": [(25, 0, 0, 8, 0, 16)]}, "has A at 25, which leaves the bank's width of 40"),
        ({"layout": [(0, 33, 0, 8, 0, 16)]}, "has B at 33"),
        ({"layout": [(0, 0, 1, 8, 0, 16)]}, "has columns 1 to 8, not within 8"),
        ({"layout": [(0, 0, 0, -1, 0, 16)]}, "has B at 0"),
        ({"layout": [(0, 16, 0, 8, 1, 16)]}, "has target 1 of 1"),
        ({"layout": [(0, 16, 0, 8, 0, 15)]}, "has 15 inputs for a product of 16"),
    ],
)
def test_adapters_that_leave_the_bank_are_refused(change: dict[str, Any], why: str) -> None:
    layout = np.array([(0, 16, 0, 8, 0, 16)], np.int64)
    lora = Lora(np.zeros(3, np.int32), np.zeros((5, 8, 40), np.float32), np.ones((5, 1), np.int32), layout)
    wrong = replace(lora, **{name: np.asarray(value, getattr(lora, name).dtype) for name, value in change.items()})
    a, b = np.ones((3, 16), np.float32), np.ones((16, 8), np.float32)
    with pytest.raises(direct.Refused, match=why):
        direct_products.float_gemm("base", a, b, wrong)
    with pytest.raises(direct.Refused, match=why):
        direct_products.lora_add("base", np.ones((3, 8), np.float32), a, wrong)
    # Rows without adapter do not even look.
    direct_products.float_gemm("base", a, b, replace(wrong, adapter_ids=np.full(3, -1, np.int32)))


def test_quantized_inputs_with_adapters_need_their_multipliers() -> None:
    random = np.random.default_rng(16)
    values = int8_case(random, 3, 16, 8)
    layout = np.array([(0, 16, 0, 8, 0, 16)], np.int64)
    lora = Lora(np.zeros(3, np.int32), np.zeros((1, 8, 40), np.float32), np.ones((1, 1), np.int32), layout)
    with pytest.raises(direct.Refused, match="adapters over quantized inputs need mult"):
        direct_products.int8_gemm("base", {**values, "mult": None}, lora)


def test_weights_of_eight_bits_are_exact_wherever_their_groups_went() -> None:
    """Deep panels, in which most groups of rows find no partner that keeps sixteen bits."""
    random = np.random.default_rng(17)
    for largest in (63, 127):
        values = int8_case(random, 5, 2056, 40)
        values["b"] = np.clip(np.rint(random.standard_normal((2056, 40)) * largest / 3), -largest, largest).astype(np.int8)
        exact = twins.int8_gemm(*(values[name] for name in ("a", "b", "a_scale", "b_scale", "a_zero")))
        for isa in ISAS:
            np.testing.assert_allclose(direct_products.int8_gemm(isa, values), exact, rtol=3e-7)
