"""NumPy twins of the decoders' operators between their products; float64 inside, as in `native.kernels.twins`.

T tokens, S sequences, H columns of the residual stream, I of the gated layer, Hq and Hkv heads of D columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import erf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from native.kernels.twins import Floats, prologue

Doubles = NDArray[np.float64]
Ints = NDArray[np.int32]
PAGE = 16
KV_DTYPES = ("float32", "bfloat16", "int8")
TINY = 1e-30


def bfloat16_bits(x: Floats) -> NDArray[np.uint16]:
    """The nearest bfloat16 of each float32, ties to even, as its 16 bits. NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.asarray(np.where(np.isnan(x), bits >> 16 | 0x40, rounded), np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> Floats:
    """float32 of bfloat16 bits, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def embed_tokens(
    input_ids: NDArray[np.int64], table: Floats | NDArray[np.uint16], extra_rows: Floats | None = None, *, multiplier: float = 1.0
) -> Doubles:
    """Rows of table [V, H] (uint16: bfloat16 bits), from id V on those of extra_rows [X, H], times multiplier -> [T, H]."""
    rows = from_bfloat16(table.view(np.uint16)) if table.dtype == np.uint16 else table.view(np.float32)
    if extra_rows is not None:
        rows = np.concatenate([rows, extra_rows])
    return np.asarray(rows[input_ids].astype(np.float64) * np.float32(multiplier), np.float64)


def _rms(v: Doubles, epsilon: float) -> Doubles:
    return np.asarray(v / np.sqrt(np.square(v).mean(axis=-1, keepdims=True) + epsilon), np.float64)


def skip_norm(
    x: Floats,
    gamma: Floats,
    row_scale: Floats | None = None,
    bias: Floats | None = None,
    residual: Floats | None = None,
    inner_gamma: Floats | None = None,
    *,
    epsilon: float = 1e-6,
) -> tuple[Doubles, Doubles]:
    """(s, y): s = residual + prologue(x), the latter normed by its root mean square where inner_gamma is given; y = rms(s) * gamma."""
    s = prologue(x, row_scale, bias)
    if inner_gamma is not None:
        s = _rms(s, epsilon) * inner_gamma
    if residual is not None:
        s = s + residual
    return s, _rms(s, epsilon) * gamma


def gated_act(x: Floats, row_scale: Floats | None = None, bias: Floats | None = None, *, kind: int = 0) -> Doubles:
    """act(gate) * up of prologue(x) = gate | up [T, 2I] -> [T, I]; kind: 0 silu, 1 gelu by tanh, 2 gelu by erf."""
    gate, up = np.split(prologue(x, row_scale, bias), 2, axis=1)
    if kind == 0:
        return np.asarray(gate / (1 + np.exp(-gate)) * up, np.float64)
    if kind == 1:
        return np.asarray(0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up, np.float64)
    return np.asarray(0.5 * gate * (1 + np.vectorize(erf, otypes=[np.float64])(gate / np.sqrt(2))) * up, np.float64)


@dataclass(frozen=True, slots=True)
class PagedShape:
    """The attributes of PagedAttention. `scale` 0: 1 / sqrt(D); `window` 0: everything before; `softcap` 0: none."""

    num_heads: int
    kv_heads: int
    layer: int = 0
    scale: float = 0.0
    window: int = 0
    softcap: float = 0.0
    kv_dtype: int = 0
    epsilon: float = 1e-6
    rotary: int = 1

    def page_bytes(self, dim: int) -> int:
        """Bytes of one page of one layer, see server/runtime/decoder/contract.py."""
        size = (4, 2, 1)[self.kv_dtype]
        return self.kv_heads * (2 * dim * PAGE * size + (2 * PAGE * 4 if self.kv_dtype == 2 else 0))


@dataclass(slots=True)
class PagedInputs:
    """The inputs of PagedAttention, as the operator takes them; kv_pool is written to."""

    qkv: Floats
    cu_seqlens: Ints
    past_lens: Ints
    block_table: Ints
    kv_pool: NDArray[np.uint8]
    cos: Floats | None
    sin: Floats | None
    row_scale: Floats | None = None
    bias: Floats | None = None
    q_gamma: Floats | None = None
    k_gamma: Floats | None = None


def _rotate(x: Doubles, cos: Floats, sin: Floats) -> Doubles:
    """Half-split rotation of the first 2 * cos.shape[1] columns of x [n, heads, D]; cos and sin [n, rot / 2]."""
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    return np.concatenate([a * c - b * s, b * c + a * s, rest], axis=-1)


def _page_parts(pool: NDArray[np.uint8], shape: PagedShape, page: int, head: int, dim: int) -> tuple[NDArray[Any], ...]:
    """Views of one head of one page: K [D, 16], V [16, D], and for int8 the scales of K and V [16]."""
    bytes_ = shape.page_bytes(dim) // shape.kv_heads
    raw = pool[shape.layer, page, head * bytes_ : (head + 1) * bytes_]
    dtype = (np.float32, np.uint16, np.int8)[shape.kv_dtype]
    size = dim * PAGE * np.dtype(dtype).itemsize
    k, v = raw[:size].view(dtype).reshape(dim, PAGE), raw[size : 2 * size].view(dtype).reshape(PAGE, dim)
    if shape.kv_dtype != 2:
        return k, v
    scales = raw[2 * size :].view(np.float32)
    return k, v, scales[:PAGE], scales[PAGE:]


def _write(inputs: PagedInputs, shape: PagedShape, place: tuple[int, int, int], k: Doubles, v: Doubles) -> None:
    page, slot, head = place
    parts = _page_parts(inputs.kv_pool, shape, page, head, len(k))
    for to, x, scale in zip((parts[0][:, slot], parts[1][slot]), (k, v), parts[2:] or (None, None), strict=True):
        if shape.kv_dtype == 0:
            to[:] = x
        elif shape.kv_dtype == 1:
            to[:] = bfloat16_bits(x.astype(np.float32))
        else:
            peak = max(float(np.abs(x).max()), TINY)
            assert scale is not None
            scale[slot] = peak / 127
            to[:] = np.rint(np.clip(x * (127 / peak), -127, 127))


def read_pages(inputs: PagedInputs, shape: PagedShape, sequence: int, positions: int, dim: int) -> tuple[Doubles, Doubles]:
    """K and V [Hkv, positions, D] of a sequence's first positions, as the pages hold them."""
    k, v = np.zeros((2, shape.kv_heads, positions, dim))
    for head in range(shape.kv_heads):
        for p in range(positions):
            parts = _page_parts(inputs.kv_pool, shape, int(inputs.block_table[sequence, p // PAGE]), head, dim)
            for to, x, scale in zip((k, v), (parts[0][:, p % PAGE], parts[1][p % PAGE]), parts[2:] or (None, None), strict=True):
                value = from_bfloat16(x) if shape.kv_dtype == 1 else x.astype(np.float64)
                to[head, p] = value * (1.0 if scale is None else float(scale[p % PAGE]))
    return k, v


def paged_attention(inputs: PagedInputs, shape: PagedShape, *, write: bool = True) -> Doubles:
    """Writes K and V of all new tokens into kv_pool (unless told that they are there), then attends over pages: [T, Hq * D]."""
    value = prologue(inputs.qkv, inputs.row_scale, inputs.bias)
    hq, hkv = shape.num_heads, shape.kv_heads
    dim = value.shape[1] // (hq + 2 * hkv)
    heads = value.reshape(len(value), hq + 2 * hkv, dim)
    q, k, v = heads[:, :hq], heads[:, hq : hq + hkv], heads[:, hq + hkv :]
    q = q if inputs.q_gamma is None else _rms(q, shape.epsilon) * inputs.q_gamma
    k = k if inputs.k_gamma is None else _rms(k, shape.epsilon) * inputs.k_gamma
    lengths = np.diff(inputs.cu_seqlens)
    position = np.concatenate([past + np.arange(n) for past, n in zip(inputs.past_lens, lengths, strict=True)] or [np.zeros(0, int)])
    if shape.rotary:
        assert inputs.cos is not None and inputs.sin is not None
        q, k = (_rotate(x, inputs.cos[position], inputs.sin[position]) for x in (q, k))
    out = np.zeros((len(value), hq, dim))
    for s, (past, n) in enumerate(zip(inputs.past_lens, lengths, strict=True)):
        tokens = slice(inputs.cu_seqlens[s], inputs.cu_seqlens[s + 1])
        for token in range(tokens.start, tokens.stop if write else tokens.start):
            place = int(position[token])
            for head in range(hkv):
                page = int(inputs.block_table[s, place // PAGE])
                _write(inputs, shape, (page, place % PAGE, head), k[token, head], v[token, head])
        if n:
            out[tokens] = _attend(q[tokens], *read_pages(inputs, shape, s, int(past + n), dim), int(past), shape)
    return out.reshape(len(value), hq * dim)


def _attend(q: Doubles, k: Doubles, v: Doubles, past: int, shape: PagedShape) -> Doubles:
    """Queries [n, Hq, D] at positions past .. past + n - 1 over k, v [Hkv, past + n, D] -> [n, Hq, D]."""
    group = shape.num_heads // shape.kv_heads
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    score = q.transpose(1, 0, 2) @ k.transpose(0, 2, 1) * (np.float32(shape.scale) or q.shape[2] ** -0.5)
    if shape.softcap:
        score = shape.softcap * np.tanh(score / shape.softcap)
    at, key = past + np.arange(len(q))[:, None], np.arange(k.shape[1])[None]
    seen = key <= at
    if shape.window:
        seen &= key > at - shape.window
    score = np.where(seen, score, -np.inf)
    weight = np.exp(score - score.max(axis=2, keepdims=True))
    return np.asarray((weight @ v / weight.sum(axis=2, keepdims=True)).transpose(1, 0, 2), np.float64)
