"""The products and their adapters called through ctypes, on any instruction set that this processor runs; see direct.py."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, addressof, c_char_p, c_int32, c_int64, c_uint16, c_void_p
from typing import Any

import numpy as np

from native.kernels.twins_products import Lora
from tests.native import direct
from tests.native.direct import BYTES, FLOATS, INTS, LONGS, Array


class LoraArgs(Structure):
    _fields_ = [
        *[("ids", INTS), ("bank", c_void_p), ("ranks", INTS), ("layout", LONGS)],
        *[(name, c_int64) for name in ("slots", "rank", "width", "targets", "parts")],
        ("bfloat16", c_int32),
    ]


class FloatGemmArgs(Structure):
    _fields_ = [
        *[("a", FLOATS), ("b", FLOATS), ("weights", c_void_p), ("y", FLOATS)],
        *[(name, c_int64) for name in ("rows", "depth", "cols")],
        ("lora", c_void_p),
    ]


class Int4GemmArgs(Structure):
    _fields_ = [
        *[("a", FLOATS), ("b", BYTES), ("scale", POINTER(c_uint16)), ("y", FLOATS)],
        *[(name, c_int64) for name in ("rows", "depth", "cols", "block")],
        ("lora", c_void_p),
    ]


class LoraAddArgs(Structure):
    _fields_ = [
        *[("x", FLOATS), ("y", FLOATS), ("out", FLOATS)],
        *[(name, c_int64) for name in ("rows", "depth", "cols")],
        ("lora", c_void_p),
    ]


def _lora(lora: Lora | None, keep: list[Any]) -> int | None:
    """The address of the adapters' arguments, which `keep` keeps alive."""
    if lora is None:
        return None
    args = LoraArgs()
    sizes = dict(zip(("slots", "rank", "width"), lora.bank.shape, strict=True))
    bank = np.ascontiguousarray(lora.bank)
    values = {"ids": lora.adapter_ids, "bank": bank.ctypes.data, "ranks": lora.ranks, "layout": lora.layout, **sizes}
    direct.fill(args, {**values, "targets": lora.ranks.shape[1], "parts": len(lora.layout), "bfloat16": int(bank.dtype == np.uint16)}, keep)
    keep += [args, bank]
    return addressof(args)


def _call(isa: str, function: str, args: Structure, values: dict[str, Any], lora: Lora | None, shape: tuple[int, int]) -> Array:
    keep: list[Any] = []
    out = np.full(shape, np.nan, np.float32)
    direct.fill(args, {**values, "rows": shape[0], "cols": shape[1], "lora": _lora(lora, keep)}, keep)
    direct.fill(args, {"out" if isinstance(args, LoraAddArgs) else "y": out}, keep)
    call = getattr(direct.library(), function)
    call.restype, call.argtypes = c_char_p, [c_char_p, c_void_p]
    message = call(isa.encode(), ctypes.addressof(args))
    if message:
        raise direct.Refused(message.decode())
    return out


def float_gemm(isa: str, a: Array, b: Array, lora: Lora | None = None) -> Array:
    return _call(isa, "us_direct_float_gemm", FloatGemmArgs(), {"a": a, "b": b, "depth": b.shape[0]}, lora, (len(a), b.shape[1]))


def int4_gemm(isa: str, a: Array, data: Array, scale: Array, cols: int, block: int, lora: Lora | None = None) -> Array:
    values = {"a": a, "b": data, "scale": scale, "depth": a.shape[1], "block": block}
    return _call(isa, "us_direct_int4_gemm", Int4GemmArgs(), values, lora, (len(a), cols))


def int8_gemm(isa: str, values: dict[str, Any], lora: Lora | None = None) -> Array:
    shape = (len(values["a"]), values["b"].shape[1])
    return _call(isa, "us_direct_gemm", direct.GemmArgs(), {**values, "depth": values["b"].shape[0]}, lora, shape)


def lora_add(isa: str, y: Array, x: Array, lora: Lora) -> Array:
    return _call(isa, "us_direct_lora_add", LoraAddArgs(), {"x": x, "y": y, "depth": x.shape[1]}, lora, (len(y), y.shape[1]))
