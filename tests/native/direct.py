"""The kernel library called through ctypes: any instruction set that this processor runs, without ONNX Runtime."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int8, c_int32, c_int64, c_uint8, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.runtime import kernels

Array = NDArray[Any]
FLOATS, BYTES, INTS, LONGS = POINTER(c_float), POINTER(c_uint8), POINTER(c_int32), POINTER(c_int64)


class Quant(Structure):
    _fields_ = [("mult", FLOATS), ("q", BYTES), ("scale", FLOATS), ("zero_point", c_int32), ("per_row", c_int32)]


class AttentionArgs(Structure):
    _fields_ = [
        *[("qkv", FLOATS), ("cu", INTS), ("row_scale", FLOATS), ("bias", FLOATS), ("rel_bias", FLOATS), ("out", FLOATS), ("quant", Quant)],
        *[(name, c_int64) for name in ("tokens", "sequences", "hidden", "heads", "rel_span")],
        ("scale", c_float),
    ]


class NormArgs(Structure):
    _fields_ = [
        *[(name, FLOATS) for name in ("x", "row_scale", "bias", "residual", "gamma", "beta", "y")],
        *[("quant", Quant), ("rows", c_int64), ("cols", c_int64), ("epsilon", c_float), ("rms", c_int32)],
    ]


class GeluArgs(Structure):
    _fields_ = [
        *[(name, FLOATS) for name in ("x", "row_scale", "bias", "y")],
        *[("quant", Quant), ("rows", c_int64), ("cols", c_int64), ("approximate", c_int32)],
    ]


class EmbedArgs(Structure):
    _fields_ = [
        *[(name, LONGS) for name in ("ids", "positions", "types")],
        *[(name, FLOATS) for name in ("word", "position", "type", "gamma", "beta", "y")],
        ("quant", Quant),
        *[(name, c_int64) for name in ("rows", "cols", "words", "max_positions", "type_count")],
        ("epsilon", c_float),
    ]


class GemmArgs(Structure):
    _fields_ = [
        *[("a", BYTES), ("b", POINTER(c_int8)), ("weights", c_void_p), ("b_scale", FLOATS), ("y", FLOATS)],
        *[(name, c_int64) for name in ("rows", "depth", "cols")],
        *[("a_scale", c_float), ("a_zero", c_int32), ("lora", c_void_p), ("mult", FLOATS), ("row_scale", FLOATS)],
    ]


class Refused(Exception):
    """The library's message about wrong arguments."""


def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(os.environ.get("UNDERSTUDY_TEST_KERNELS") or str(kernels.library_path()))
    loaded.us_isa_list.restype = c_char_p
    return loaded


def runnable() -> list[str]:
    return str(library().us_isa_list().decode()).split()


def fill(args: Structure, values: dict[str, Any], keep: list[Any]) -> None:
    for name, kind in args._fields_:
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value)
            keep.append(value)
            value = value.ctypes.data_as(kind)
        setattr(args, name, value)


def _call(
    isa: str, function: str, args: Structure, values: dict[str, Any], quant: dict[str, Any] | None, shape: tuple[int, int]
) -> list[Array]:
    keep: list[Any] = []
    results: list[Array] = []
    if quant:
        q, scale = np.empty(shape, np.uint8), np.empty(shape[0], np.float32)
        fill(args.quant, {"zero_point": 128, **quant, "q": q, "scale": scale}, keep)
        results = [q, scale] if quant.get("per_row") else [q]
    if not quant or isinstance(args, (NormArgs, EmbedArgs, GemmArgs)):
        out = np.full(shape, np.nan, np.float32)
        values = {**values, "out" if isinstance(args, AttentionArgs) else "y": out}
        results = [out, *results]
    fill(args, values, keep)
    call = getattr(library(), function)
    call.restype, call.argtypes = c_char_p, [c_char_p, c_void_p]
    message = call(isa.encode(), ctypes.addressof(args))
    if message:
        raise Refused(message.decode())
    return results


def attention(isa: str, values: dict[str, Any], quant: dict[str, Any] | None = None) -> list[Array]:
    """`values` as the fields of us_attention_args; gives [out], [q], or [q, scale]."""
    tokens, columns = values["qkv"].shape
    rel = values.get("rel_bias")
    sizes = {
        "tokens": tokens,
        "hidden": columns // 3,
        "sequences": len(values["cu"]) - 1,
        "rel_span": 0 if rel is None else rel.shape[1] // 2 + 1,
    }
    return _call(isa, "us_direct_attention", AttentionArgs(), {**values, **sizes}, quant, (tokens, columns // 3))


def norm(isa: str, values: dict[str, Any], quant: dict[str, Any] | None = None) -> list[Array]:
    rows, cols = values["x"].shape
    return _call(isa, "us_direct_norm", NormArgs(), {"epsilon": 1e-12, **values, "rows": rows, "cols": cols}, quant, (rows, cols))


def gelu(isa: str, values: dict[str, Any], quant: dict[str, Any] | None = None) -> list[Array]:
    rows, cols = values["x"].shape
    return _call(isa, "us_direct_gelu", GeluArgs(), {**values, "rows": rows, "cols": cols}, quant, (rows, cols))


def embed(isa: str, values: dict[str, Any], quant: dict[str, Any] | None = None) -> list[Array]:
    rows, cols = len(values["ids"]), values["word"].shape[1]
    kinds = values.get("type")
    sizes = {
        "rows": rows,
        "cols": cols,
        "words": len(values["word"]),
        "max_positions": len(values["position"]),
        "type_count": 0 if kinds is None else len(kinds),
    }
    return _call(isa, "us_direct_embed", EmbedArgs(), {"epsilon": 1e-12, **values, **sizes}, quant, (rows, cols))


def gemm(isa: str, values: dict[str, Any]) -> Array:
    (rows, depth), cols = values["a"].shape, values["b"].shape[1]
    return _call(isa, "us_direct_gemm", GemmArgs(), {**values, "rows": rows, "depth": depth, "cols": cols}, None, (rows, cols))[0]
