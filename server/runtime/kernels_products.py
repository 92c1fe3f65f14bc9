"""The part of the kernels' self-test that proves the products and their adapters against their twins."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from native.kernels import twins, twins_products
from native.kernels.twins_products import Lora
from server.runtime.kernels import expect_close, run_op

Feeds = dict[str, NDArray[Any] | None]
TOLERANCE = 3e-5


def lora_feeds(lora: Lora) -> Feeds:
    """The adapters' inputs of a product, in the order of the operators."""
    return {"adapter_ids": lora.adapter_ids, "lora_bank": lora.bank, "lora_ranks": lora.ranks, "lora_layout": lora.layout}


def self_test() -> None:
    """Runs every product with and without adapters; FailedPrecondition names the first that is wrong."""
    random = np.random.default_rng(9)

    def floats(*shape: int) -> twins.Floats:
        return random.standard_normal(shape).astype(np.float32)

    rows, depth, cols = 11, 72, 40
    a, b, exact_a = floats(rows, depth), floats(depth, cols), np.zeros((rows, depth))
    exact_a[:] = a
    layout = np.array([(1, 75, 0, 24, 0, depth), (1, 100, 24, 16, 1, depth)], np.int64)
    ranks = np.array([[4, 2], [0, 6], [6, 1]], np.int32)
    lora = Lora(random.integers(-1, 3, rows).astype(np.int32), floats(3, 6, 120), ranks, layout)
    delta = twins_products.lora_delta(exact_a, lora, cols)
    expected = twins_products.float_gemm(a, b)
    plain: Feeds = {"a": a, "b": b}
    expect_close("FloatGemm", run_op("FloatGemm", plain, ["y"], {}, constants=["b"])[0], expected, TOLERANCE)
    got = run_op("FloatGemm", {**plain, **lora_feeds(lora)}, ["y"], {}, constants=["b", "lora_layout"])[0]
    expect_close("FloatGemm", got, expected + delta, TOLERANCE)
    got = run_op("LoraAdd", {"raw": floats(rows, cols) * 0, "x": a, **lora_feeds(lora)}, ["y"], {}, constants=["lora_layout"])[0]
    expect_close("LoraAdd", got, delta, TOLERANCE)
    _int4(a, lora, delta, random)
    _int8(lora, random, (rows, depth, cols))


def _int4(a: twins.Floats, lora: Lora, delta: NDArray[np.float64], random: np.random.Generator) -> None:
    depth, cols, block = a.shape[1], delta.shape[1], 32
    q = random.integers(0, 16, (depth, cols)).astype(np.uint8)
    data, scale = twins_products.pack_int4(q, random.random((-(-depth // block), cols), np.float32), block)
    feeds: Feeds = {"a": a, "b": data, "scale": scale, **lora_feeds(lora)}
    got = run_op("Int4Gemm", feeds, ["y"], {"depth": depth, "cols": cols, "block": block}, constants=["b", "scale", "lora_layout"])[0]
    expected = twins_products.int4_gemm(a, data, scale, depth=depth, cols=cols, block=block) + delta
    expect_close("Int4Gemm", got, expected, TOLERANCE)


def _int8(lora: Lora, random: np.random.Generator, shape: tuple[int, int, int]) -> None:
    rows, depth, cols = shape
    narrow = dataclasses.replace(lora, bank=twins_products.to_bfloat16(np.asarray(lora.bank, np.float32)))
    a, b = random.integers(0, 256, (rows, depth)).astype(np.uint8), random.integers(-127, 128, (depth, cols)).astype(np.int8)
    a_scale, b_scale, a_zero = np.full((), 0.01, np.float32), random.random(cols, np.float32), np.full((), 117, np.uint8)
    mult, row_scale = random.random(depth, np.float32) * 9 + 30, random.random(rows, np.float32) + 0.5
    x = twins_products.dequantize(a, 117, mult, row_scale)
    expected = twins.int8_gemm(a, b, a_scale, b_scale, a_zero) + twins_products.lora_delta(x, narrow, cols, row_scale)
    product: Feeds = {"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale, "a_zero": a_zero}
    feeds: Feeds = {**product, **lora_feeds(narrow), "mult": mult, "row_scale": row_scale}
    got = run_op("Int8Gemm", feeds, ["y"], {}, constants=["b", "lora_layout"])[0]
    expect_close("Int8Gemm", got, expected, TOLERANCE)
