"""One matrix product in int4: symmetric blocks of 32 to 128 weights of a column with a bfloat16 scale, activations left float.

Scales are those of least error, weighed by how large each input is (as AWQ, arXiv 2306.00978, and llama.cpp's importance matrix do);
rounding is compensated (GPTQ, arXiv 2210.17323, alg. 1) where that is affordable.
"""

from __future__ import annotations

import numpy as np

from native.kernels.twins_products import from_bfloat16, pack_int4, to_bfloat16
from server.core import FloatArray
from server.runtime.graphs.decoder.forms import Int4
from server.runtime.graphs.decoder.int8 import Choice, Effort, Keep, Rows, Weights

# Shares of the scale at which the largest weight of a block becomes -8.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72)
FAST_SHRINK = (0.93,)
# Wider blocks are faster where one row waits for memory; they may cost this much more error.
WIDER = {32: 1.0, 64: 1.04, 128: 1.08}


def quantize_int4(rows: Rows, weights: Weights, effort: Effort, keep: Keep) -> Choice:
    """The int4 form of a product, its block size chosen by error."""
    picked, part = weights.sampled()
    want = rows.sample @ part
    shrink = FAST_SHRINK if effort.fast else SHRINK
    errors = {}
    for block in (32,) if effort.fast else WIDER:
        q, scale = round_blocks(part, rows.square, block, shrink)
        errors[block] = rows.error(rows.sample @ _back(q, scale, block), want)
    block = max(size for size, error in errors.items() if error <= WIDER[size] * errors[32])
    upper = rows.factor() if weights.inputs <= effort.compensate else None
    blocks, panels = -(-weights.inputs // block), -(-weights.outputs // 16)
    data = np.empty((panels, blocks * block // 4, 32), np.uint8)
    scales = np.empty((panels, blocks, 16), np.uint16)
    back = np.empty_like(part)

    def fill(start: int, end: int) -> None:
        columns = np.ascontiguousarray(weights.columns(start, end))
        q, scale = round_blocks(columns, rows.square, block, shrink)
        if upper is not None:
            q = _compensated(columns, scale, block, upper)
        inside = (picked >= start) & (picked < end)
        back[:, inside] = _back(q[:, picked[inside] - start], scale[:, picked[inside] - start], block)
        first, last = start // 16, -(-end // 16)
        data[first:last], scales[first:last] = pack_int4(q, scale, block)

    weights.each(fill, compensated=upper is not None)
    return Choice(f"int4-{block}", rows.error(rows.sample @ back, want), Int4(keep(data), keep(scales), block))


def round_blocks(weight: FloatArray, importance: FloatArray, block: int, shrink: tuple[float, ...]) -> tuple[np.ndarray, FloatArray]:
    """(uint8[K, N] of 0..15, scale float32[ceil(K / block), N] with the bits of bfloat16): weight = (q - 8) * scale."""
    depth, cols = weight.shape
    blocks = -(-depth // block)
    padded = np.zeros((blocks * block, cols), np.float32)
    padded[:depth] = weight
    values = padded.reshape(blocks, block, cols)
    matters = np.zeros(blocks * block, np.float32)
    matters[:depth] = importance
    matters = matters.reshape(blocks, block, 1)
    high, low = values.max(axis=1), values.min(axis=1)
    # The extreme of larger size becomes -8; its sign goes into the scale.
    extreme = np.where(-low > high, low, high) / np.float32(-8)
    best, best_scale = np.full((blocks, cols), np.inf, np.float32), np.zeros((blocks, cols), np.float32)
    for share in shrink:
        scale = _bfloat(extreme * np.float32(share))
        q = _round(values, scale)
        # The scale of least error for these very numbers.
        top = (matters * values * q).sum(axis=1)
        bottom = (matters * q * q).sum(axis=1)
        scale = _bfloat(np.divide(top, bottom, out=scale.copy(), where=bottom > 1e-20))
        error = (matters * np.square(q * scale[:, None] - values)).sum(axis=1)
        better = error < best
        best, best_scale = np.where(better, error, best), np.where(better, scale, best_scale)
    q = _round(values, best_scale).reshape(blocks * block, cols)[:depth]
    return (q + 8).astype(np.uint8), best_scale


def _bfloat(scale: FloatArray) -> FloatArray:
    return np.asarray(from_bfloat16(to_bfloat16(scale)))


def _round(values: FloatArray, scale: FloatArray) -> FloatArray:
    """[blocks, block, N] -> whole numbers of -8..7."""
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=np.abs(scale) > 1e-30)
    q: FloatArray = np.rint(values * inverse[:, None])
    return np.clip(q, -8, 7, out=q)


def _back(q: np.ndarray, scale: FloatArray, block: int) -> FloatArray:
    return (q.astype(np.float32) - 8) * np.repeat(scale, block, axis=0)[: len(q)]


def _compensated(weight: FloatArray, scale: FloatArray, block: int, upper: np.ndarray) -> np.ndarray:
    """Rounds row after row, pushing each row's error onto the rows still to come; scales stay."""
    size, step = len(weight), 128
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=np.abs(scale) > 1e-30)
    left = weight.copy()
    q = np.empty(weight.shape, np.uint8)
    for start in range(0, size, step):
        end = min(start + step, size)
        part = left[start:end]
        errors = np.empty_like(part)
        for j in range(end - start):
            k = start + j
            rounded = np.clip(np.rint(part[j] * inverse[k // block]), -8, 7)
            q[k] = rounded + 8
            errors[j] = (part[j] - rounded * scale[k // block]) / upper[k, k]
            if j + 1 < end - start:
                part[j + 1 :] -= upper[k, k + 1 : end, None] * errors[j]
        left[end:] -= upper[start:end, end:].T @ errors
    return q
