"""The decoders' operators as ONNX Runtime runs them: statuses, unwanted outputs, threads, and a pool that is bound and changed in place."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from native.kernels.twins_decoder import PagedInputs, PagedShape
from server.runtime import kernels, kernels_decoder, ort
from tests.native import direct_decoder
from tests.native.test_decoder_kernels import make_case, own

SHAPE = PagedShape(6, 2, 1)
ATTRIBUTES = {name: getattr(SHAPE, name) for name in SHAPE.__slots__}


def floats(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def paged(inputs: PagedInputs, threads: int = 1, **attributes: float) -> np.ndarray[Any, Any]:
    return kernels.run_op("PagedAttention", kernels_decoder.paged_feeds(inputs), ["y"], {**ATTRIBUTES, **attributes}, threads)[0]


def case(lengths: list[int], pasts: list[int], seed: int = 3) -> PagedInputs:
    return make_case(np.random.default_rng(seed), SHAPE, 64, lengths, pasts, True)


@pytest.mark.parametrize(("lengths", "pasts"), [([1] * 32, list(range(0, 320, 10))), ([1, 200, 1, 3], [2100, 0, 40, 7]), ([300], [0])])
def test_threads_change_no_bit_of_paged_attention(lengths: list[int], pasts: list[int]) -> None:
    inputs = case(lengths, pasts)
    expected = direct_decoder.paged(str(kernels.isa_name()), own(inputs), SHAPE)[0]
    pools = []
    for threads in (1, 2, 3):
        mine = own(inputs)
        np.testing.assert_array_equal(paged(mine, threads), expected)
        pools.append(mine.kv_pool)
    assert all(np.array_equal(pools[0], pool) for pool in pools)


def test_a_bound_pool_is_changed_in_place() -> None:
    inputs = case([3], [20])
    before, mine = inputs.kv_pool.copy(), own(inputs)
    feeds = kernels_decoder.paged_feeds(inputs)
    onnxruntime = ort.import_ort()
    model = kernels.single_op_model("PagedAttention", feeds, ["y"], ATTRIBUTES)
    session = onnxruntime.InferenceSession(model, ort.session_options(1), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items() if value is not None}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], paged(mine))
    np.testing.assert_array_equal(values["kv_pool"].numpy(), mine.kv_pool)
    assert (mine.kv_pool != before).any()


PAGED_WRONG: list[tuple[dict[str, Any], dict[str, float], str]] = [
    ({"qkv": floats(3, 641)}, {}, "qkv has 641 columns; expected a multiple of the 10 heads"),
    ({"qkv": floats(4, 640)}, {}, r"row_scale has shape \[3\]"),
    ({"past_lens": np.zeros(2, np.int32)}, {}, r"past_lens has shape \[2\]"),
    ({"block_table": np.zeros((2, 3), np.int32)}, {}, r"block_table has shape \[2, 3\]"),
    ({"block_table": np.full((1, 3), 99, np.int32)}, {}, r"PagedAttention: block_table\[0, 0\] is 99"),
    ({"kv_pool": np.zeros((2, 8192), np.uint8)}, {}, r"kv_pool has shape \[2, 8192\]"),
    ({"kv_pool": np.zeros((2, 3, 8192), np.uint8)}, {}, "pages of kv_pool have 8192 bytes"),
    ({"cu_seqlens": np.zeros(0, np.int32)}, {}, "cu_seqlens is empty"),
    ({"cu_seqlens": np.array([0, 4], np.int32)}, {}, "cu_seqlens runs from 0 to 4"),
    ({"cos": None}, {}, "rotary = 1 needs the inputs cos and sin"),
    ({"sin": floats(5, 2)}, {}, "sin has shape"),
    ({"q_gamma": floats(63)}, {}, r"q_gamma has shape \[63\]"),
    ({}, {"num_heads": 5}, "num_heads must be at least 1 and a multiple of kv_heads"),
    ({}, {"kv_heads": 0}, "num_heads must be at least 1 and a multiple of kv_heads"),
    ({}, {"page": 32}, "the attribute page must be 16"),
    ({}, {"kv_dtype": 3}, "the attribute kv_dtype must be"),
    ({}, {"layer": 3}, "layer is 3, kv_pool has 3"),
    ({}, {"window": -1}, "the attributes window and softcap"),
]


@pytest.mark.parametrize(("changed", "attributes", "why"), PAGED_WRONG)
def test_wrong_inputs_of_paged_attention_end_in_a_status(changed: dict[str, Any], attributes: dict[str, float], why: str) -> None:
    with pytest.raises(Exception, match=why):
        paged(dataclasses.replace(case([3], [20]), **changed), **attributes)


@pytest.mark.parametrize(
    ("op", "feeds", "attributes", "why"),
    [
        (
            "EmbedTokens",
            {"ids": np.array([0, 5]), "t": floats(5, 8), "e": None},
            {},
            r"EmbedTokens: input_ids\[1\] is 5, not within 0\.\.4",
        ),
        (
            "EmbedTokens",
            {"ids": np.array([0]), "t": np.zeros((5, 8), np.int32), "e": None},
            {},
            "table must be float32, or bfloat16 as uint16",
        ),
        ("EmbedTokens", {"ids": np.array([0]), "t": floats(5, 8), "e": floats(2, 7)}, {}, r"extra_rows has shape \[2, 7\]"),
        ("GatedAct", {"x": floats(2, 9)}, {}, "x has 9 columns"),
        ("GatedAct", {"x": floats(2, 8), "r": None, "b": floats(4)}, {}, r"bias has shape \[4\]"),
        ("GatedAct", {"x": floats(2, 8)}, {"kind": 3}, "the attribute kind must be"),
    ],
)
def test_wrong_inputs_end_in_a_status(op: str, feeds: dict[str, Any], attributes: dict[str, float], why: str) -> None:
    with pytest.raises(Exception, match=why):
        kernels.run_op(op, feeds, ["y"], attributes)


def test_either_output_of_a_skip_norm_may_be_left_out() -> None:
    x = floats(5, 16)
    feeds = {"x": x, "row_scale": None, "bias": None, "residual": x, "inner": None, "gamma": floats(16)}
    s, y = kernels.run_op("SkipNorm", feeds, ["s", "y"], {})
    np.testing.assert_array_equal(s, x + x)
    np.testing.assert_array_equal(kernels.run_op("SkipNorm", feeds, ["", "y"], {})[0], y)
    np.testing.assert_array_equal(kernels.run_op("SkipNorm", feeds, ["s"], {})[0], s)


def test_a_step_without_tokens_gives_no_rows() -> None:
    inputs = case([0, 0], [20, 3])
    assert paged(inputs).shape == (0, 384)
    empty = dataclasses.replace(
        inputs, cu_seqlens=np.zeros(1, np.int32), past_lens=inputs.past_lens[:0], block_table=inputs.block_table[:0]
    )
    assert paged(empty).shape == (0, 384)
