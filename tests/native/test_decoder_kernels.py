"""The decoders' operators against their twins on every instruction set, and that nothing else in a step changes a query's bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native.kernels import twins, twins_decoder
from native.kernels.twins_decoder import PagedInputs, PagedShape
from tests.native import direct, direct_decoder
from tests.native.test_kernels import boundaries, close, floats, maybe, quantized

ISAS = direct.runnable()
FUZZ = settings(max_examples=30, deadline=None, derandomize=True)
Array = direct.Array


def check_forms(call: Any, isa: str, values: dict[str, Any], expected: Array, random: np.random.Generator, tolerance: float = 4e-6) -> None:
    """The float form, the static and the per-row form of one operator; its last results are looked at."""
    close(call(isa, values)[-1], expected, tolerance)
    mult = (np.abs(floats(random, expected.shape[1])) + 0.1) * 30
    zero_point = int(random.integers(0, 256))
    quantized(call(isa, values, {"mult": mult, "zero_point": zero_point})[-1:], twins.quantize(expected, mult, zero_point), mult)
    quantized(call(isa, values, {"mult": mult, "per_row": 1})[-2:], twins.quantize(expected, mult, per_row=True), mult)


@pytest.mark.parametrize("isa", ISAS)
@FUZZ
@given(st.integers(0, 9), st.integers(1, 200), st.booleans(), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_embed_tokens(isa: str, rows: int, cols: int, half: bool, extra: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    table: Array = floats(random, 11, cols)
    if half:
        table = twins_decoder.bfloat16_bits(table)
    extra_rows = floats(random, extra, cols) if extra else None
    ids = random.integers(0, 11 + extra, rows)
    expected = twins_decoder.embed_tokens(ids, table, extra_rows, multiplier=5.5)
    np.testing.assert_array_equal(direct_decoder.tokens(isa, ids, table, extra_rows, 5.5), expected.astype(np.float32))


@pytest.mark.parametrize("bad", [-1, 13, 2**62, -(2**63)])
def test_embed_tokens_refuses_ids_outside_both_tables(bad: int) -> None:
    random = np.random.default_rng(1)
    with pytest.raises(direct.Refused, match=rf"input_ids\[1\] is {bad}, not within 0\.\.12 \(11 words and 2 extra rows\)"):
        direct_decoder.tokens("base", np.array([0, bad, 0]), floats(random, 11, 8), floats(random, 2, 8))
    with pytest.raises(direct.Refused, match=r"not within 0\.\.10"):
        direct_decoder.tokens("base", np.array([11]), floats(random, 11, 8))


@pytest.mark.parametrize("isa", ISAS)
@FUZZ
@given(st.integers(0, 9), st.integers(1, 300), st.booleans(), st.integers(0, 2**32 - 1))
def test_skip_norm(isa: str, rows: int, cols: int, want_sum: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    row_scale, bias, residual, inner = maybe(random, rows), maybe(random, cols), maybe(random, rows, cols), maybe(random, cols)
    x, gamma = floats(random, rows, cols), floats(random, cols)
    s, y = twins_decoder.skip_norm(x, gamma, row_scale, bias, residual, inner, epsilon=1e-5)
    values = {"x": x, "gamma": gamma, "row_scale": row_scale, "bias": bias, "residual": residual, "inner": inner, "epsilon": 1e-5}
    check_forms(lambda *args: direct_decoder.skip(*args, want_sum=want_sum), isa, values, y, random)
    if want_sum:
        close(direct_decoder.skip(isa, values)[0], s, 4e-6)


@pytest.mark.parametrize("isa", ISAS)
@FUZZ
@given(st.integers(0, 9), st.integers(1, 300), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_gated_act(isa: str, rows: int, cols: int, kind: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x, row_scale, bias = floats(random, rows, 2 * cols) * 3, maybe(random, rows), maybe(random, 2 * cols)
    expected = twins_decoder.gated_act(x, row_scale, bias, kind=kind)
    # A gelu is right to a millionth, which `up` multiplies.
    check_forms(direct_decoder.gated, isa, {"x": x, "row_scale": row_scale, "bias": bias, "kind": kind}, expected, random, 2e-5)


def rotation(positions: int, half: int) -> tuple[twins.Floats, twins.Floats]:
    angle = np.arange(positions)[:, None] / 10000 ** (np.arange(half)[None] / half)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def make_case(
    random: np.random.Generator, shape: PagedShape, dim: int, lengths: list[int], pasts: list[int], full: bool = False
) -> PagedInputs:
    """Sequences with `pasts` positions of random K and V in shuffled pages and `lengths` new tokens. Unwritten positions hold NaN."""
    tokens, columns = sum(lengths), (shape.num_heads + 2 * shape.kv_heads) * dim
    needed = [-(-(past + n) // 16) for past, n in zip(pasts, lengths, strict=True)]
    pages = sum(needed) + 2
    table = np.full((len(lengths), max([*needed, 1]) + 1), -1, np.int32)
    free = list(random.permutation(pages))
    for row, count in zip(table, needed, strict=True):
        row[:count] = [free.pop() for _ in range(count)]
    pool = np.full((shape.layer + 2, pages, shape.page_bytes(dim)), 0xFF, np.uint8)
    half = max(1, int(random.integers(1, dim // 2 + 1)) if dim > 1 else 1)
    cos, sin = rotation(max([past + n for past, n in zip(pasts, lengths, strict=True)] + [1]) + 1, half)
    optional: Any = floats if full else maybe
    inputs = PagedInputs(
        qkv=floats(random, sum(pasts), columns),
        cu_seqlens=boundaries(pasts),
        past_lens=np.zeros(len(pasts), np.int32),
        block_table=table,
        kv_pool=pool,
        cos=cos if dim > 1 else None,
        sin=sin if dim > 1 else None,
    )
    past_shape = shape if dim > 1 else dataclasses.replace(shape, rotary=0)
    if sum(pasts):
        direct_decoder.paged(ISAS[0], inputs, past_shape)
    inputs.qkv, inputs.cu_seqlens, inputs.past_lens = floats(random, tokens, columns), boundaries(lengths), np.array(pasts, np.int32)
    inputs.row_scale = abs(floats(random, tokens)) if full or random.random() < 0.5 else None
    inputs.bias, inputs.q_gamma, inputs.k_gamma = optional(random, columns), optional(random, dim), optional(random, dim)
    return inputs


def own(inputs: PagedInputs) -> PagedInputs:
    """The same with a pool of its own."""
    return dataclasses.replace(inputs, kv_pool=inputs.kv_pool.copy())


def check_paged(isa: str, inputs: PagedInputs, shape: PagedShape, dim: int, tolerance: float = 2e-5) -> None:
    ours, theirs = own(inputs), own(inputs)
    got = direct_decoder.paged(isa, ours, shape)[0]
    twins_decoder.paged_attention(theirs, shape)
    for s, (past, n) in enumerate(zip(inputs.past_lens, np.diff(inputs.cu_seqlens), strict=True)):
        if not n:
            continue
        for mine, other in zip(*(twins_decoder.read_pages(x, shape, s, int(past + n), dim) for x in (ours, theirs)), strict=True):
            np.testing.assert_array_equal(mine[:, :past], other[:, :past])
            step = (2e-6, 2**-7, 1.02 / 127)[shape.kv_dtype] * np.abs(other).max(axis=2, keepdims=True)
            assert np.all(np.abs(mine - other) <= 1e-6 + step)
    written = (ours.kv_pool != inputs.kv_pool).any(axis=(0, 2))
    assert set(np.flatnonzero(written)) <= set(inputs.block_table.ravel().tolist())
    assert not (np.delete(ours.kv_pool, shape.layer, axis=0) != np.delete(inputs.kv_pool, shape.layer, axis=0)).any()
    # Rounding of K and V may fall on either side in the two, so the outputs are compared over the pages that ours wrote.
    close(got, twins_decoder.paged_attention(ours, shape, write=False), tolerance)


@pytest.mark.parametrize("isa", ISAS)
@FUZZ
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), max_size=5),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(2, 80),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([0, 0, 1, 7, 33]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_paged_attention(
    isa: str, sizes: list[tuple[int, int]], kv_heads: int, group: int, dim: int, kv_dtype: int, window: int, capped: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    shape = PagedShape(kv_heads * group, kv_heads, 1, 0.0, window, 5.0 if capped else 0.0, kv_dtype)
    lengths, pasts = [n for n, _ in sizes], [past for _, past in sizes]
    check_paged(isa, make_case(random, shape, dim, lengths, pasts), shape, dim)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [8, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("kv_dtype", [0, 1, 2])
def test_paged_attention_of_usual_heads(isa: str, dim: int, kv_dtype: int) -> None:
    random = np.random.default_rng(dim)
    shape = PagedShape(6, 2, 0, dim**-0.5, kv_dtype=kv_dtype)
    check_paged(isa, make_case(random, shape, dim, [1, 1, 70, 0, 17], [0, 130, 0, 5, 63], True), shape, dim)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [0, 900, 1100, 3000])
def test_paged_attention_over_several_segments(isa: str, window: int) -> None:
    random = np.random.default_rng(window)
    shape = PagedShape(2, 1, 0, window=window)
    check_paged(isa, make_case(random, shape, 16, [1, 5, 1], [2500, 1020, 1023]), shape, 16)


@pytest.mark.parametrize("isa", ISAS)
def test_layers_without_rotation_need_no_table(isa: str) -> None:
    shape = PagedShape(4, 2, 0, rotary=0)
    inputs = make_case(np.random.default_rng(3), shape, 32, [3, 1], [20, 0])
    inputs.cos = inputs.sin = None
    check_paged(isa, inputs, shape, 32)


def in_chunks(isa: str, inputs: PagedInputs, shape: PagedShape, chunk: int, quant: dict[str, Any] | None) -> list[Array]:
    """One sequence's prompt in pieces of `chunk` tokens: the rows of all calls."""
    parts = []
    for start in range(0, len(inputs.qkv), chunk):
        rows = slice(start, min(start + chunk, len(inputs.qkv)))
        row_scale = None if inputs.row_scale is None else inputs.row_scale[rows]
        cu, past = boundaries([rows.stop - start]), np.array([inputs.past_lens[0] + start], np.int32)
        part = dataclasses.replace(inputs, qkv=inputs.qkv[rows], row_scale=row_scale, cu_seqlens=cu, past_lens=past)
        parts.append(direct_decoder.paged(isa, part, shape, quant))
    return [np.concatenate(results) for results in zip(*parts, strict=True)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", [0, 1, 2])
@pytest.mark.parametrize(
    ("group", "dim", "window", "tokens", "past"), [(3, 64, 0, 150, 0), (1, 20, 50, 150, 9), (7, 64, 0, 60, 1000), (9, 128, 1030, 33, 1020)]
)
@pytest.mark.parametrize("quant", [None, "static", "per_row"])
def test_a_prompt_gets_the_same_bits_whole_and_in_chunks(
    isa: str, kv_dtype: int, group: int, dim: int, window: int, tokens: int, past: int, quant: str | None
) -> None:
    random = np.random.default_rng(11)
    shape = PagedShape(2 * group, 2, 0, window=window, kv_dtype=kv_dtype, softcap=30.0 if window else 0.0)
    inputs = make_case(random, shape, dim, [tokens], [past], True)
    options = quant and {"mult": np.full(2 * group * dim, 40, np.float32), "per_row": int(quant == "per_row")}
    whole = own(inputs)
    expected = direct_decoder.paged(isa, whole, shape, options or None)
    for chunk in (1, 7, 64) if quant is None else (16,):
        cut = own(inputs)
        for a, b in zip(expected, in_chunks(isa, cut, shape, chunk, options or None), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(cut.kv_pool, whole.kv_pool)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", [0, 2])
def test_a_sequence_gets_the_same_bits_alone_and_in_any_step(isa: str, kv_dtype: int) -> None:
    random = np.random.default_rng(12)
    shape = PagedShape(6, 2, 1, kv_dtype=kv_dtype)
    inputs = make_case(random, shape, 64, [1, 40, 1, 0, 3, 1, 17], [0, 5, 1200, 4, 2000, 64, 15], True)
    whole = own(inputs)
    batch = direct_decoder.paged(isa, whole, shape)[0]
    for s in range(len(inputs.past_lens)):
        rows = slice(inputs.cu_seqlens[s], inputs.cu_seqlens[s + 1])
        assert inputs.row_scale is not None
        alone = dataclasses.replace(
            own(inputs),
            qkv=inputs.qkv[rows],
            row_scale=inputs.row_scale[rows],
            cu_seqlens=boundaries([rows.stop - rows.start]),
            past_lens=inputs.past_lens[s : s + 1],
            block_table=inputs.block_table[s : s + 1],
        )
        np.testing.assert_array_equal(direct_decoder.paged(isa, alone, shape)[0], batch[rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
@pytest.mark.parametrize("kv_dtype", [0, 1, 2])
def test_a_broken_sequence_neither_crashes_nor_touches_its_neighbours(isa: str, value: float, kv_dtype: int) -> None:
    random = np.random.default_rng(9)
    shape = PagedShape(3, 1, 0, kv_dtype=kv_dtype)
    inputs = make_case(random, shape, 32, [20, 30, 1], [3, 40, 70])
    expected = direct_decoder.paged(isa, own(inputs), shape)[0]
    broken = own(inputs)
    broken.qkv = broken.qkv.copy()
    broken.qkv[20:50] = value
    out = direct_decoder.paged(isa, broken, shape)[0]
    np.testing.assert_array_equal(out[:20], expected[:20])
    np.testing.assert_array_equal(out[50:], expected[50:])
    for per_row in (0, 1):
        direct_decoder.paged(isa, own(broken), shape, {"mult": np.ones(96, np.float32), "per_row": per_row})
        x = np.full((2, 40), value, np.float32)
        direct_decoder.gated(isa, {"x": x}, {"mult": np.ones(20, np.float32), "per_row": per_row})
        direct_decoder.skip(isa, {"x": x, "gamma": x[0]}, {"mult": np.ones(40, np.float32), "per_row": per_row})


def test_pages_below_the_window_are_not_asked_for() -> None:
    shape = PagedShape(2, 1, 0, window=20)
    inputs = make_case(np.random.default_rng(4), shape, 8, [2], [60])
    expected = direct_decoder.paged(ISAS[0], own(inputs), shape)[0]
    inputs.block_table[0, :2] = -1
    np.testing.assert_array_equal(direct_decoder.paged(ISAS[0], own(inputs), shape)[0], expected)


HOSTILE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"cu_seqlens": np.array([0, 9], np.int32)}, {}, "cu_seqlens runs from 0 to 9"),
    ({"cu_seqlens": np.array([1, 4], np.int32)}, {}, "cu_seqlens runs from 1 to 4"),
    ({"cu_seqlens": np.array([0, 5, 4], np.int32), "past_lens": np.zeros(2, np.int32)}, {}, "falls from 5 to 4"),
    ({"past_lens": np.array([-1], np.int32)}, {}, r"past_lens\[0\] is -1"),
    ({"past_lens": np.array([2**31 - 1], np.int32)}, {}, "its 4 pages hold 64"),
    ({"past_lens": np.array([61], np.int32)}, {}, "ends at position 65; its 4 pages hold 64"),
    ({"block_table": np.array([[0, 1, -1, 0]], np.int32)}, {}, r"block_table\[0, 2\] is -1, not within 0\.\.4"),
    ({"block_table": np.array([[0, 5, 1, 0]], np.int32)}, {}, r"block_table\[0, 1\] is 5"),
    ({"block_table": np.array([[0, 2**31 - 1, 1, 0]], np.int32)}, {}, r"block_table\[0, 1\] is 2147483647"),
    ({}, {"positions": 40}, "ends at position 41; cos and sin have 40 rows"),
    ({}, {"half": 9}, "cos has 9 columns"),
    ({}, {"half": 0}, "cos has 0 columns"),
    ({}, {"layer": 1}, "layer is 1"),
    ({}, {"layer": -1}, "layer is -1"),
    ({}, {"heads": 3}, "must be a multiple"),
    ({}, {"kv_heads": 0}, "must be a multiple"),
    ({}, {"kv_heads": -1}, "must be a multiple"),
    ({}, {"dim": 257}, r"expected 1\.\.256"),
    ({}, {"kv_dtype": 3}, "kv_dtype is 3"),
    ({}, {"kv_dtype": 1}, "pages of kv_pool have 4096 bytes"),
    ({}, {"page_bytes": 4095}, "pages of kv_pool have 4095 bytes"),
    ({}, {"window": -1}, "window is -1"),
]


@pytest.mark.parametrize(("changed", "fields", "why"), HOSTILE)
def test_paged_attention_refuses_what_leads_outside(changed: dict[str, Any], fields: dict[str, Any], why: str) -> None:
    random = np.random.default_rng(1)
    cos, sin = rotation(70, 8)
    table, pool = np.arange(4, dtype=np.int32)[None], np.zeros((1, 5, 4096), np.uint8)
    inputs = PagedInputs(floats(random, 4, 128), boundaries([4]), np.array([37], np.int32), table, pool, cos, sin)
    shape = PagedShape(4, 2)
    direct_decoder.paged("base", inputs, shape)
    with pytest.raises(direct.Refused, match=why):
        direct_decoder.paged("base", dataclasses.replace(inputs, **changed), shape, None, **fields)


def test_gated_act_refuses_an_unknown_kind() -> None:
    with pytest.raises(direct.Refused, match="kind is 3"):
        direct_decoder.gated("base", {"x": np.zeros((1, 4), np.float32), "kind": 3})
