"""The part of the kernels' self-test that proves the decoders' operators against their twins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from native.kernels import twins, twins_decoder
from native.kernels.twins_decoder import PagedInputs, PagedShape
from server.runtime.kernels import expect_close, expect_quantized, run_op

Feeds = Mapping[str, NDArray[Any] | None]


def paged_feeds(inputs: PagedInputs) -> Feeds:
    """The inputs of PagedAttention in the order of the operator; those that are absent are None."""
    return {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}


def self_test() -> None:
    """Runs every operator of decoder graphs, plain, static and per row; FailedPrecondition names the first that is wrong."""
    random = np.random.default_rng(8)

    def floats(*shape: int) -> twins.Floats:
        return random.standard_normal(shape).astype(np.float32)

    rows, cols = 9, 72
    x, residual, gamma, inner, bias = floats(rows, cols), floats(rows, cols), floats(cols), floats(cols), floats(2 * cols)
    row_scale, mult = abs(floats(rows)) + 0.5, (abs(floats(cols)) + 0.5) * 30
    s, y = twins_decoder.skip_norm(x, gamma, row_scale, None, residual, inner, epsilon=1e-6)
    skip: Feeds = {"x": x, "row_scale": row_scale, "bias": None, "residual": residual, "inner": inner, "gamma": gamma}
    got = run_op("SkipNorm", skip, ["s", "y"], {"epsilon": 1e-6})
    expect_close("SkipNorm", got[0], s, 5e-6)
    expect_close("SkipNorm", got[1], y, 5e-6)
    _quantized("SkipNorm", skip, {"epsilon": 1e-6}, mult, y, ["", "q"])

    table, extra, ids = floats(7, cols), floats(2, cols), random.integers(0, 9, rows)
    for words in (table, twins_decoder.bfloat16_bits(table)):
        expected = twins_decoder.embed_tokens(ids, words, extra, multiplier=1.5)
        expect_close(
            "EmbedTokens", run_op("EmbedTokens", {"ids": ids, "t": words, "e": extra}, ["y"], {"multiplier": 1.5})[0], expected, 1e-6
        )

    gate_up = floats(rows, 2 * cols)
    wide = {"x": gate_up, "row_scale": row_scale, "bias": bias}
    for kind in range(3):
        expected = twins_decoder.gated_act(gate_up, row_scale, bias, kind=kind)
        expect_close("GatedAct", run_op("GatedAct", wide, ["y"], {"kind": kind})[0], expected, 2e-5)
    _quantized("GatedAct", wide, {"kind": 2}, mult, expected, ["q"])
    for kv_dtype in range(3):
        _paged(random, PagedShape(6, 2, 1, 0.2, (0, 0, 9)[kv_dtype], (0.0, 20.0, 0.0)[kv_dtype], kv_dtype))


def _quantized(
    op: str, feeds: Feeds, attributes: dict[str, float], mult: twins.Floats, exact: twins_decoder.Doubles, outputs: list[str]
) -> None:
    with_mult = {**feeds, "mult": mult}
    static = run_op(op + "Q", with_mult, outputs, {**attributes, "zero_point": 120})
    expect_quantized(op + "Q", static, twins.quantize(exact, mult, 120))
    per_row = run_op(op + "Q", with_mult, [*outputs, "out_scale"], {**attributes, "per_row": 1})
    expect_quantized(op + "Q", per_row, twins.quantize(exact, mult, per_row=True))


def _paged(random: np.random.Generator, shape: PagedShape) -> None:
    """A prompt of 20 tokens, then its next token beside another prompt."""
    dim, angle = 24, random.random((40, 8))
    pool = np.zeros((2, 6, shape.page_bytes(dim)), np.uint8)
    attributes = {name: getattr(shape, name) for name in shape.__slots__}
    for lengths, pasts in (([20, 0], [0, 0]), ([1, 17], [20, 0])):
        tokens, columns = sum(lengths), (shape.num_heads + 2 * shape.kv_heads) * dim
        inputs = PagedInputs(
            qkv=random.standard_normal((tokens, columns)).astype(np.float32),
            cu_seqlens=np.array([0, lengths[0], tokens], np.int32),
            past_lens=np.array(pasts, np.int32),
            block_table=np.array([[4, 1], [5, 0]], np.int32),
            kv_pool=pool,
            cos=np.cos(angle).astype(np.float32),
            sin=np.sin(angle).astype(np.float32),
            row_scale=(random.random(tokens) + 0.5).astype(np.float32),
            bias=random.standard_normal(columns).astype(np.float32),
            q_gamma=random.random(dim).astype(np.float32),
            k_gamma=random.random(dim).astype(np.float32),
        )
        got = run_op("PagedAttention", paged_feeds(inputs), ["y"], attributes)[0]
        expect_close(
            "PagedAttention", got, twins_decoder.paged_attention(dataclasses.replace(inputs, kv_pool=pool.copy()), shape, write=False), 2e-5
        )
        exact = dataclasses.replace(inputs, kv_pool=np.zeros_like(pool))
        if shape.kv_dtype == 0 and pasts == [0, 0]:
            expect_close("PagedAttention", got, twins_decoder.paged_attention(exact, shape), 2e-5)
            mult = np.full(shape.num_heads * dim, 30, np.float32)
            _quantized("PagedAttention", paged_feeds(inputs), attributes, mult, twins_decoder.paged_attention(exact, shape), ["q"])
