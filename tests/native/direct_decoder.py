"""The decoders' operators called through ctypes, as `tests.native.direct` calls the encoders'."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np

from native.kernels.twins_decoder import PagedInputs, PagedShape
from tests.native import direct
from tests.native.direct import BYTES, FLOATS, INTS, LONGS, Array, Quant, Refused


class TokensArgs(Structure):
    _fields_ = [
        *[("ids", LONGS), ("table", c_void_p), ("extra", FLOATS), ("y", FLOATS)],
        *[(name, c_int64) for name in ("rows", "cols", "words", "extra_rows")],
        *[("multiplier", c_float), ("bfloat16", c_int32)],
    ]


class SkipArgs(Structure):
    _fields_ = [
        *[(name, FLOATS) for name in ("x", "row_scale", "bias", "residual", "inner", "gamma", "s", "y")],
        *[("quant", Quant), ("rows", c_int64), ("cols", c_int64), ("epsilon", c_float)],
    ]


class GatedArgs(Structure):
    _fields_ = [
        *[(name, FLOATS) for name in ("x", "row_scale", "bias", "y")],
        *[("quant", Quant), ("rows", c_int64), ("cols", c_int64), ("kind", c_int32)],
    ]


class PagedArgs(Structure):
    _fields_ = [
        *[("qkv", FLOATS), ("cu", INTS), ("past", INTS), ("table", INTS), ("pool", BYTES)],
        *[(name, FLOATS) for name in ("cos", "sin", "row_scale", "bias", "q_gamma", "k_gamma", "out")],
        ("quant", Quant),
        *[(name, c_int64) for name in ("tokens", "sequences", "width", "layers", "pages", "page_bytes", "positions", "half")],
        *[(name, c_int64) for name in ("heads", "kv_heads", "dim", "layer", "window")],
        *[("scale", c_float), ("softcap", c_float), ("epsilon", c_float), ("kv_dtype", c_int32)],
    ]


def _call(isa: str, function: str, args: Structure, values: dict[str, Any]) -> None:
    keep: list[Any] = []
    direct.fill(args, values, keep)
    call = getattr(direct.library(), function)
    call.restype, call.argtypes = c_char_p, [c_char_p, c_void_p]
    message = call(isa.encode(), ctypes.addressof(args))
    if message:
        raise Refused(message.decode())


def _quantized(args: Structure, quant: dict[str, Any], shape: tuple[int, int], keep: list[Any]) -> list[Array]:
    q, scale = np.empty(shape, np.uint8), np.empty(shape[0], np.float32)
    direct.fill(args.quant, {"zero_point": 128, **quant, "q": q, "scale": scale}, keep)
    return [q, scale] if quant.get("per_row") else [q]


def _result(
    isa: str, function: str, args: Structure, values: dict[str, Any], quant: dict[str, Any] | None, out: tuple[str, int, int]
) -> list[Array]:
    keep: list[Any] = []
    name, rows, cols = out
    if quant:
        results = _quantized(args, quant, (rows, cols), keep)
    else:
        results = [np.full((rows, cols), np.nan, np.float32)]
        values = {**values, name: results[0]}
    _call(isa, function, args, values)
    return results


def tokens(isa: str, ids: Array, table: Array, extra: Array | None = None, multiplier: float = 1.0) -> Array:
    rows, (words, cols) = len(ids), table.shape
    y = np.full((rows, cols), np.nan, np.float32)
    values = {"ids": ids, "table": table, "extra": extra, "y": y, "rows": rows, "cols": cols, "words": words, "multiplier": multiplier}
    extra_rows = 0 if extra is None else len(extra)
    _call(isa, "us_direct_tokens", TokensArgs(), {**values, "extra_rows": extra_rows, "bfloat16": table.dtype == np.uint16})
    return y


def skip(isa: str, values: dict[str, Any], quant: dict[str, Any] | None = None, want_sum: bool = True) -> list[Array]:
    """[s, y], [s, q], or [s, q, scale]; without s unless wanted."""
    rows, cols = values["x"].shape
    s = np.full((rows, cols), np.nan, np.float32) if want_sum else None
    sizes = {"rows": rows, "cols": cols, "s": s}
    results = _result(isa, "us_direct_skip", SkipArgs(), {"epsilon": 1e-6, **values, **sizes}, quant, ("y", rows, cols))
    return results if s is None else [s, *results]


def gated(isa: str, values: dict[str, Any], quant: dict[str, Any] | None = None) -> list[Array]:
    rows, cols = values["x"].shape[0], values["x"].shape[1] // 2
    return _result(isa, "us_direct_gated", GatedArgs(), {**values, "rows": rows, "cols": cols}, quant, ("y", rows, cols))


def paged(isa: str, inputs: PagedInputs, shape: PagedShape, quant: dict[str, Any] | None = None, **changed: Any) -> list[Array]:
    """Writes into inputs.kv_pool; gives [out], [q] or [q, scale]. `changed`: fields of us_paged_args set to something else."""
    rows, columns = inputs.qkv.shape
    dim = columns // (shape.num_heads + 2 * shape.kv_heads)
    assert inputs.kv_pool.flags.c_contiguous
    layers, pages, page_bytes = inputs.kv_pool.shape
    cos, sin = (inputs.cos, inputs.sin) if shape.rotary else (None, None)
    values = {
        "qkv": inputs.qkv,
        "cu": inputs.cu_seqlens,
        "past": inputs.past_lens,
        "table": inputs.block_table,
        "pool": inputs.kv_pool,
        "cos": cos,
        "sin": sin,
        "row_scale": inputs.row_scale,
        "bias": inputs.bias,
        "q_gamma": inputs.q_gamma,
        "k_gamma": inputs.k_gamma,
        "tokens": rows,
        "sequences": len(inputs.cu_seqlens) - 1,
        "width": inputs.block_table.shape[1],
        "layers": layers,
        "pages": pages,
        "page_bytes": page_bytes,
        "positions": 0 if cos is None else len(cos),
        "half": 0 if cos is None else cos.shape[1],
        "heads": shape.num_heads,
        "kv_heads": shape.kv_heads,
        "dim": dim,
        "layer": shape.layer,
        "window": shape.window,
        "scale": shape.scale,
        "softcap": shape.softcap,
        "epsilon": shape.epsilon,
        "kv_dtype": shape.kv_dtype,
        **changed,
    }
    return _result(isa, "us_direct_paged", PagedArgs(), values, quant, ("out", rows, shape.num_heads * dim))
