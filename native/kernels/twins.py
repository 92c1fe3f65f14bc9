"""NumPy twins of every operator in the kernel library: the reference that tests and the self-test hold the compiled code to.

T tokens, S sequences, C columns. Everything is computed in float64 and rounded at the end, so a twin is right to the last digit
that float32 has; quantized outputs follow the formulas of the operators (round half to even).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import erf

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Quantized:
    """`q` uint8 [T, C]; `scale` float32 [T] with one scale a row, else None; `exact` float64 [T, C] is q before rounding and clamping."""

    q: NDArray[np.uint8]
    scale: Floats | None
    exact: NDArray[np.float64]


def prologue(x: Floats, row_scale: Floats | None, bias: Floats | None) -> NDArray[np.float64]:
    """Gives x [T, C] * row_scale [T] + bias [C], either of which may be absent."""
    value = x.astype(np.float64)
    if row_scale is not None:
        value = value * row_scale[:, None]
    if bias is not None:
        value = value + bias
    return value


def quantize(w: NDArray[np.float64], mult: Floats, zero_point: int = 128, per_row: bool = False) -> Quantized:
    """Makes w [T, C] u8 by mult [C]. Static: rint(w * mult) + zero_point; per row: the largest |w * mult| of a row becomes 127."""
    scaled = w * mult
    scale = None
    if per_row:
        peak = np.maximum(np.abs(scaled).max(axis=1, initial=0.0), TINY)
        scale = (peak / 127.0).astype(np.float32)
        scaled = scaled * (127.0 / peak)[:, None]
        zero_point = 128
    exact = scaled + zero_point
    q = np.clip(np.rint(scaled) + zero_point, 0, 255).astype(np.uint8)
    return Quantized(q, scale, exact)


def packed_attention(
    qkv: Floats,
    cu_seqlens: NDArray[np.int32],
    row_scale: Floats | None = None,
    bias: Floats | None = None,
    rel_bias: Floats | None = None,
    *,
    num_heads: int,
    scale: float = 0.0,
) -> NDArray[np.float64]:
    """Maps qkv [T, 3H] (Q | K | V, head-major) -> [T, H]; attention inside each sequence; rel_bias [heads, 2R - 1] by clamped k - q."""
    value = prologue(qkv, row_scale, bias)
    tokens, columns = value.shape
    hidden = columns // 3
    dim = hidden // num_heads
    q, k, v = (part.reshape(tokens, num_heads, dim).transpose(1, 0, 2) for part in np.split(value, 3, axis=1))
    out = np.zeros((num_heads, tokens, dim))
    for start, end in itertools.pairwise(cu_seqlens):
        if start == end:
            continue
        rows = slice(start, end)
        score = q[:, rows] @ k[:, rows].transpose(0, 2, 1) * (scale or dim**-0.5)
        if rel_bias is not None:
            far = rel_bias.shape[1] // 2
            position = np.arange(end - start)
            score = score + rel_bias[:, np.clip(position[None, :] - position[:, None], -far, far) + far]
        weight = np.exp(score - score.max(axis=2, keepdims=True))
        out[:, rows] = weight @ v[:, rows] / weight.sum(axis=2, keepdims=True)
    return out.transpose(1, 0, 2).reshape(tokens, hidden)


def _normalise(v: NDArray[np.float64], gamma: Floats, beta: Floats | None, epsilon: float, rms: bool) -> NDArray[np.float64]:
    if not rms:
        v = v - v.mean(axis=1, keepdims=True)
    v = v / np.sqrt(np.square(v).mean(axis=1, keepdims=True) + epsilon) * gamma
    return v if beta is None else v + beta


def add_norm(
    x: Floats,
    gamma: Floats,
    beta: Floats | None = None,
    row_scale: Floats | None = None,
    bias: Floats | None = None,
    residual: Floats | None = None,
    *,
    epsilon: float = 1e-12,
    rms: bool = False,
) -> NDArray[np.float64]:
    """LayerNorm, or RMSNorm, of prologue(x) + residual: [T, C] -> [T, C]."""
    v = prologue(x, row_scale, bias)
    if residual is not None:
        v = v + residual
    return _normalise(v, gamma, beta, epsilon, rms)


def bias_gelu(x: Floats, row_scale: Floats | None = None, bias: Floats | None = None, *, approximate: bool = False) -> NDArray[np.float64]:
    """GELU of prologue(x): by erf, or with `approximate` by tanh."""
    v = prologue(x, row_scale, bias)
    if approximate:
        return np.asarray(0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))))
    return np.asarray(0.5 * v * (1 + np.vectorize(erf, otypes=[np.float64])(v / np.sqrt(2))))


def embed_norm(
    input_ids: NDArray[np.int64],
    position_ids: NDArray[np.int64],
    token_type_ids: NDArray[np.int64] | None,
    word: Floats,
    position: Floats,
    token_type: Floats | None,
    gamma: Floats,
    beta: Floats | None,
    *,
    epsilon: float = 1e-12,
) -> NDArray[np.float64]:
    """LayerNorm of word[input_ids] + position[position_ids] + token_type[token_type_ids, or 0]: [T, H]."""
    v = word[input_ids].astype(np.float64) + position[position_ids]
    if token_type is not None:
        v = v + (token_type[0] if token_type_ids is None else token_type[token_type_ids])
    return _normalise(v, gamma, beta, epsilon, False)


def int8_gemm(
    a: NDArray[np.uint8], b: NDArray[np.int8], a_scale: NDArray[np.float32], b_scale: Floats, a_zero: NDArray[np.uint8]
) -> NDArray[np.float64]:
    """Multiplies (a [T, K] - a_zero) by b [K, N] exactly, then by a_scale * b_scale [N]; a_scale and a_zero are scalars."""
    exact = (a.astype(np.int64) - int(a_zero)) @ b.astype(np.int64)
    return exact * (float(a_scale) * b_scale.astype(np.float64))
