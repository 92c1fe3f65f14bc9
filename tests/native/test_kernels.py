"""Every operator, on every instruction set that runs here, against its NumPy twin; and the promises that batches rely on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native.kernels import twins
from tests.native import direct

ISAS = direct.runnable()
FUZZ = settings(max_examples=40, deadline=None, derandomize=True)


def floats(random: np.random.Generator, *shape: int) -> twins.Floats:
    return random.standard_normal(shape).astype(np.float32)


def maybe(random: np.random.Generator, *shape: int) -> twins.Floats | None:
    return floats(random, *shape) if random.random() < 0.5 else None


def boundaries(lengths: list[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def close(got: direct.Array, expected: np.ndarray[Any, np.dtype[np.float64]], tolerance: float = 3e-6) -> None:
    assert got.shape == expected.shape
    assert np.max(np.abs(got - expected) / (1 + np.abs(expected)), initial=0) <= tolerance


def quantized(got: list[direct.Array], expected: twins.Quantized, mult: twins.Floats) -> None:
    if expected.scale is None:
        assert np.max(np.abs(got[0] - np.clip(expected.exact, 0, 255)), initial=0) <= 0.505
        return
    # Half a step, and what float32 may lose before: rows of nearly nothing have steps smaller than that.
    lost = 1e-5 * mult
    meant = (expected.exact - 128) * expected.scale[:, None]
    assert np.all(np.abs((got[0] - 128.0) * got[1][:, None] - meant) <= 0.505 * expected.scale[:, None] + lost)
    assert np.all(np.abs(got[1] - expected.scale) <= 1e-5 * expected.scale + lost.max())


def check(
    call: Any, isa: str, values: dict[str, Any], expected: np.ndarray[Any, np.dtype[np.float64]], random: np.random.Generator
) -> None:
    """The float form, the static and the per-row form of one operator."""
    # Scores of some tens lose their last digits in float32, and the softmax multiplies what is lost.
    close(call(isa, values)[0], expected, 2e-5 if call is direct.attention else 3e-6)
    mult = (np.abs(floats(random, expected.shape[1])) + 0.1) * 30
    zero_point = int(random.integers(0, 256))
    quantized(call(isa, values, {"mult": mult, "zero_point": zero_point})[-1:], twins.quantize(expected, mult, zero_point), mult)
    quantized(call(isa, values, {"mult": mult, "per_row": 1})[-2:], twins.quantize(expected, mult, per_row=True), mult)


def attention_case(random: np.random.Generator, lengths: list[int], heads: int, dim: int) -> dict[str, Any]:
    tokens, hidden = sum(lengths), heads * dim
    return {
        "qkv": floats(random, tokens, 3 * hidden),
        "cu": boundaries(lengths),
        "row_scale": maybe(random, tokens),
        "bias": maybe(random, 3 * hidden),
        "rel_bias": maybe(random, heads, 2 * int(random.integers(1, 40)) - 1),
        "heads": heads,
    }


def attention_twin(case: dict[str, Any], scale: float = 0.0) -> np.ndarray[Any, np.dtype[np.float64]]:
    rest = (case["row_scale"], case["bias"], case["rel_bias"])
    return twins.packed_attention(case["qkv"], case["cu"], *rest, num_heads=case["heads"], scale=scale)


def test_this_processor_runs_a_build_for_its_own_instruction_set() -> None:
    assert ISAS[-1] == "base"
    with open("/proc/cpuinfo") as file:
        flags = set(next((line for line in file if line.startswith("flags")), "").split())
    assert ("avx2" in ISAS) == ({"avx2", "fma"} <= flags)


@pytest.mark.parametrize("isa", ISAS)
@FUZZ
@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_attention(isa: str, lengths: list[int], heads: int, dim: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    case = attention_case(random, lengths, heads, dim)
    check(direct.attention, isa, case, attention_twin(case), random)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [32, 64, 80, 256])
@pytest.mark.parametrize("lengths", [[1], [512], [127, 0, 129, 1, 128], [257, 16]])
def test_attention_over_several_tiles(isa: str, dim: int, lengths: list[int]) -> None:
    random = np.random.default_rng(dim)
    case = attention_case(random, lengths, 2, dim)
    check(direct.attention, isa, case, attention_twin(case), random)


@pytest.mark.parametrize("isa", ISAS)
def test_attention_over_two_thousand_sequences(isa: str) -> None:
    random = np.random.default_rng(5)
    case = attention_case(random, list(random.integers(0, 4, 2000)), 2, 32)
    check(direct.attention, isa, case, attention_twin(case), random)


@pytest.mark.parametrize("isa", ISAS)
def test_attention_takes_a_scale_and_scores_that_overflow_an_exponential(isa: str) -> None:
    random = np.random.default_rng(3)
    case = attention_case(random, [200, 3], 2, 32)
    close(direct.attention(isa, {**case, "scale": 7.5})[0], attention_twin(case, 7.5), 2e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("cu", "why"),
    [
        ([0, 5, 3, 8], "falls from 5 to 3"),
        ([1, 8], "from 1 to 8"),
        ([0, 7], "from 0 to 7"),
        ([0, 9], "from 0 to 9"),
        ([0, 2_000_000_000, 8], "falls"),
        ([0, -4, 8], "falls"),
        ([0], "from 0 to 0"),
    ],
)
def test_attention_refuses_boundaries_that_leave_the_tokens(isa: str, cu: list[int], why: str) -> None:
    case = attention_case(np.random.default_rng(1), [8], 1, 8)
    with pytest.raises(direct.Refused, match=why):
        direct.attention(isa, {**case, "cu": np.array(cu, np.int32)})


@pytest.mark.parametrize("heads", [0, -1, 3, 2**40])
def test_attention_refuses_heads_that_do_not_divide_the_columns(heads: int) -> None:
    case = attention_case(np.random.default_rng(1), [8], 1, 8)
    with pytest.raises(direct.Refused, match="num_heads"):
        direct.attention("base", {**case, "heads": heads})


@pytest.mark.parametrize("isa", ISAS)
@FUZZ
@given(st.integers(0, 9), st.integers(1, 300), st.booleans(), st.integers(0, 2**32 - 1))
def test_norm(isa: str, rows: int, cols: int, rms: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    optional = {
        "beta": maybe(random, cols),
        "row_scale": maybe(random, rows),
        "bias": maybe(random, cols),
        "residual": maybe(random, rows, cols),
    }
    values = {"x": floats(random, rows, cols), "gamma": floats(random, cols), **optional, "epsilon": 1e-5}
    expected = twins.add_norm(values["x"], values["gamma"], **optional, epsilon=1e-5, rms=rms)
    check(direct.norm, isa, {**values, "rms": rms}, expected, random)


@pytest.mark.parametrize("isa", ISAS)
def test_norm_keeps_its_digits_when_the_mean_is_large(isa: str) -> None:
    random = np.random.default_rng(2)
    x = (floats(random, 3, 384) + 300).astype(np.float32)
    gamma = np.ones(384, np.float32)
    close(direct.norm(isa, {"x": x, "gamma": gamma})[0], twins.add_norm(x, gamma), 5e-5)


@pytest.mark.parametrize("isa", ISAS)
@FUZZ
@given(st.integers(0, 9), st.integers(1, 300), st.booleans(), st.integers(0, 2**32 - 1))
def test_gelu(isa: str, rows: int, cols: int, approximate: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    optional = {"row_scale": maybe(random, rows), "bias": maybe(random, cols)}
    x = floats(random, rows, cols) * 4
    expected = twins.bias_gelu(x, **optional, approximate=approximate)
    check(direct.gelu, isa, {"x": x, **optional, "approximate": approximate}, expected, random)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("approximate", [False, True])
def test_gelu_is_within_a_millionth_everywhere(isa: str, approximate: bool) -> None:
    x = np.linspace(-30, 30, 20001, dtype=np.float32)[None]
    close(direct.gelu(isa, {"x": x, "approximate": approximate})[0], twins.bias_gelu(x, approximate=approximate), 2e-6)


@pytest.mark.parametrize("isa", ISAS)
@FUZZ
@given(st.integers(0, 9), st.integers(1, 300), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_embed(isa: str, rows: int, cols: int, typed: bool, with_types: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    kinds = random.integers(0, 2, rows) if with_types else None
    tables = {"word": floats(random, 12, cols), "position": floats(random, 20, cols), "type": floats(random, 2, cols) if typed else None}
    ids, positions = random.integers(0, 12, rows), random.integers(0, 20, rows)
    gamma, beta = floats(random, cols), maybe(random, cols)
    expected = twins.embed_norm(ids, positions, kinds, *tables.values(), gamma, beta, epsilon=1e-6)
    values = {"ids": ids, "positions": positions, "types": kinds, **tables, "gamma": gamma, "beta": beta, "epsilon": 1e-6}
    check(direct.embed, isa, values, expected, random)


@pytest.mark.parametrize(("name", "what"), [("ids", "input_ids"), ("positions", "position_ids"), ("types", "token_type_ids")])
@pytest.mark.parametrize("bad", [-1, 5, 2**62, -(2**63)])
def test_embed_refuses_ids_outside_their_table(name: str, what: str, bad: int) -> None:
    random = np.random.default_rng(1)
    values: dict[str, Any] = {key: np.zeros(3, np.int64) for key in ("ids", "positions", "types")}
    values[name][1] = bad
    tables = {"word": floats(random, 5, 8), "position": floats(random, 5, 8), "type": floats(random, 2, 8), "gamma": floats(random, 8)}
    with pytest.raises(direct.Refused, match=rf"{what}\[1\] is {bad}, not within 0"):
        direct.embed("base", {**values, **tables})


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_a_broken_row_neither_crashes_nor_touches_its_neighbours(isa: str, value: float) -> None:
    random = np.random.default_rng(9)
    case = attention_case(random, [20, 140, 7], 2, 32)
    whole = direct.attention(isa, case)[0]
    broken = {**case, "qkv": case["qkv"].copy()}
    broken["qkv"][20:160] = value
    for quant in (None, {"mult": np.ones(64, np.float32)}, {"mult": np.ones(64, np.float32), "per_row": 1}):
        direct.attention(isa, broken, quant)
    out = direct.attention(isa, broken)[0]
    np.testing.assert_array_equal(out[:20], whole[:20])
    np.testing.assert_array_equal(out[160:], whole[160:])
    x = np.full((2, 40), value, np.float32)
    for per_row in (0, 1):
        direct.gelu(isa, {"x": x}, {"mult": np.ones(40, np.float32), "per_row": per_row})
        direct.norm(isa, {"x": x, "gamma": np.ones(40, np.float32)}, {"mult": np.ones(40, np.float32), "per_row": per_row})


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quant", [None, "static", "per_row"])
def test_a_sequence_gets_the_same_bits_alone_and_in_any_batch(isa: str, quant: str | None) -> None:
    random = np.random.default_rng(11)
    lengths = [1, 15, 16, 17, 130, 0, 300, 3, 8]
    case = attention_case(random, lengths, 3, 32)
    options = quant and {"mult": np.full(96, 40, np.float32), "per_row": int(quant == "per_row")}
    batch = direct.attention(isa, case, options)
    for start, end in zip(case["cu"][:-1], case["cu"][1:], strict=True):
        row_scale = None if case["row_scale"] is None else case["row_scale"][start:end]
        alone = {**case, "qkv": case["qkv"][start:end], "row_scale": row_scale, "cu": boundaries([end - start])}
        for inside, own in zip(batch, direct.attention(isa, alone, options), strict=True):
            np.testing.assert_array_equal(inside[start:end], own)


def product(random: np.random.Generator, shape: tuple[int, int, int], largest: int) -> dict[str, Any]:
    rows, depth, cols = shape
    return {
        "a": random.integers(0, 256, (rows, depth)).astype(np.uint8),
        "b": random.integers(-largest, largest + 1, (depth, cols)).astype(np.int8),
        "a_scale": np.float32(0.0173),
        "b_scale": np.abs(floats(random, cols)),
        "a_zero": int(random.integers(0, 256)),
    }


def same_product(isa: str, values: dict[str, Any]) -> None:
    """The sums are exact, so all that may differ is the rounding of two multiplications."""
    np.testing.assert_allclose(direct.gemm(isa, values), twins.int8_gemm(**values), rtol=3e-7, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@FUZZ
@given(st.integers(0, 9), st.integers(1, 100), st.integers(1, 70), st.sampled_from([1, 31, 63, 90, 127]), st.integers(0, 2**32 - 1))
def test_gemm(isa: str, rows: int, depth: int, cols: int, largest: int, seed: int) -> None:
    same_product(isa, product(np.random.default_rng(seed), (rows, depth, cols), largest))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight", [-128, -127, -65, -64, -63, -33, -32, 0, 32, 33, 63, 64, 65, 127])
def test_gemm_is_exact_where_sixteen_bits_would_overflow(isa: str, weight: int) -> None:
    values = product(np.random.default_rng(1), (5, 384, 48), 63)
    values["a"][:] = 255
    values["b"][:] = weight
    same_product(isa, values)
    values["b"][::2] = -weight if weight > -128 else 127
    same_product(isa, values)
    values["b"][:, 1::3] = 1
    same_product(isa, values)


@pytest.mark.parametrize("isa", ISAS)
def test_gemm_over_many_rows_and_a_row_alone_agree_to_the_bit(isa: str) -> None:
    values = product(np.random.default_rng(2), (203, 384, 1152), 63)
    whole = direct.gemm(isa, values)
    for row in (0, 1, 64, 202):
        np.testing.assert_array_equal(whole[row : row + 1], direct.gemm(isa, {**values, "a": values["a"][row : row + 1]}))


def test_gemm_refuses_what_could_overflow_thirty_two_bits() -> None:
    values = product(np.random.default_rng(3), (1, 2**15, 1), 127)
    with pytest.raises(direct.Refused, match="b has 32768 rows"):
        direct.gemm("base", values)
