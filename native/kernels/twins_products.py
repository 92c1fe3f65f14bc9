"""NumPy twins of the decoders' products and of the adapters inside them, and the packer of 4-bit weights.

T tokens, K inputs, N outputs. Twins compute in float64; what the compiled operator rounds on purpose (Int4Gemm: activations to s8 a
block) the twin rounds likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
COLUMNS = 16  # of a panel
GROUP = 4  # rows of B in one group
BLOCKS = (32, 64, 128)


def to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16 of each finite value (ties to even), same shape."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> Floats:
    """The float32 values that bfloat16 `bits` stand for, same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pack_int4(q: NDArray[np.uint8], scale: Floats, block: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Lays 4-bit weights out as Int4Gemm reads them; a weight is (q - 8) * scale.

    q uint8 [K, N] of 0..15; scale float32 [ceil(K / block), N], rounded to bfloat16 here (quantize with the rounded scale:
    `from_bfloat16(to_bfloat16(scale))`); block 32, 64 or 128. Gives data uint8 [panels, Kp / 4, 32] and scale uint16
    [panels, Kp / block, 16], panels = ceil(N / 16), Kp = K padded to the block with weights of zero. In byte j of panel p and group g the
    low nibble is column 16p + j // 4, the high one column 16p + 8 + j // 4, both of row 4g + j % 4. ValueError where shapes disagree.
    """
    depth, cols = q.shape
    blocks, panels = -(-depth // block), -(-cols // COLUMNS)
    if block not in BLOCKS or scale.shape != (blocks, cols) or q.max(initial=0) > 15:
        raise ValueError(f"q {q.shape} of at most {q.max(initial=0)} with scale {scale.shape} and block {block} are no 4-bit weights")
    whole = np.full((blocks * block, panels * COLUMNS), 8, np.uint8)
    whole[:depth, :cols] = q
    # [group, row, panel, half, column] -> [panel, group, column, row] for each half
    parts = whole.reshape(-1, GROUP, panels, 2, COLUMNS // 2).transpose(2, 0, 3, 4, 1)
    data = (parts[:, :, 0] | parts[:, :, 1] << 4).reshape(panels, -1, 2 * COLUMNS)
    scales = np.zeros((blocks, panels * COLUMNS), np.float32)
    scales[:, :cols] = scale
    return np.ascontiguousarray(data), np.ascontiguousarray(to_bfloat16(scales).reshape(blocks, panels, COLUMNS).transpose(1, 0, 2))


def unpack_int4(data: NDArray[np.uint8], scale: NDArray[np.uint16], depth: int, cols: int, block: int) -> Floats:
    """The weights float32 [depth, cols] that packed `data` and `scale` stand for: pack_int4 backwards."""
    panels = data.shape[0]
    parts = data.reshape(panels, -1, COLUMNS // 2, GROUP)
    q = np.stack([parts & 15, parts >> 4], axis=2).transpose(1, 4, 0, 2, 3).reshape(-1, panels * COLUMNS)
    scales = from_bfloat16(scale).transpose(1, 0, 2).reshape(-1, panels * COLUMNS)
    return np.ascontiguousarray(((q.astype(np.float32) - 8) * np.repeat(scales, block, axis=0))[:depth, :cols])


def quantize_blocks(a: Floats, block: int) -> NDArray[np.float64]:
    """Activations [T, K] as Int4Gemm takes them: rounded to s8 a row and block, the largest of each becoming 127."""
    tokens, depth = a.shape
    padded = np.zeros((tokens, -(-depth // block), block), np.float32)
    padded.reshape(tokens, padded.shape[1] * block)[:, :depth] = a
    peak = np.abs(padded).max(axis=2, keepdims=True)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    q = np.rint(padded * inverse).astype(np.float64)
    return np.asarray((q * (peak / np.float32(127))).reshape(tokens, padded.shape[1] * block)[:, :depth])


def float_gemm(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Multiplies a [T, K] by b [K, N]."""
    return np.asarray(a.astype(np.float64) @ b.astype(np.float64))


def int4_gemm(a: Floats, data: NDArray[np.uint8], scale: NDArray[np.uint16], *, depth: int, cols: int, block: int) -> NDArray[np.float64]:
    """Multiplies a [T, depth], rounded as `quantize_blocks` does, by packed weights [depth, cols]."""
    return np.asarray(quantize_blocks(a, block) @ unpack_int4(data, scale, depth, cols, block).astype(np.float64))


@dataclass(frozen=True, slots=True)
class Lora:
    """The adapters' inputs of a product.

    adapter_ids int32 [T], -1 without; bank float32 or uint16 (bfloat16 bits) [slots, rank, width]; ranks int32 [slots, targets]; layout
    int64 [n, 6] of (a, b, first column of y, outputs, target index, inputs). The adapter's scale is in B.
    """

    adapter_ids: NDArray[np.int32]
    bank: Floats | NDArray[np.uint16]
    ranks: NDArray[np.int32]
    layout: NDArray[np.int64]


def lora_delta(x: NDArray[np.float64], lora: Lora, cols: int, row_scale: Floats | None = None) -> NDArray[np.float64]:
    """What the adapters add to y [T, cols] for true inputs x [T, K]; with row_scale [T] divided by it, as y is raw there."""
    bank = from_bfloat16(lora.bank.view(np.uint16)) if lora.bank.dtype == np.uint16 else lora.bank
    delta = np.zeros((len(x), cols))
    for token, slot in enumerate(lora.adapter_ids):
        if slot < 0:
            continue
        for a, b, first, outputs, target, inputs in lora.layout:
            rank = lora.ranks[slot, target]
            h = bank[slot, :rank, a : a + inputs].astype(np.float64) @ x[token]
            delta[token, first : first + outputs] += h @ bank[slot, :rank, b : b + outputs].astype(np.float64)
    return delta if row_scale is None else delta / row_scale[:, None]


def dequantize(a: NDArray[np.uint8], a_zero: int, mult: Floats, row_scale: Floats | None = None) -> NDArray[np.float64]:
    """True inputs [T, K] of an int8 product, as its adapters see them: (a - a_zero) / mult [K] * row_scale [T]."""
    x = (a.astype(np.float64) - a_zero) / mult
    return np.asarray(x if row_scale is None else x * row_scale[:, None])
