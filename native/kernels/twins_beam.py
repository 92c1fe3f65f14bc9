"""NumPy twins of beam search's operators; see twins.py. R rows, P positions, V tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def beam_attention(
    x: Floats,
    bias: Floats | None,
    pool: Floats,
    table: NDArray[np.int32],
    lengths: NDArray[np.int32] | None = None,
    relative: Floats | None = None,
    *,
    num_heads: int,
    scale: float,
    column: int = 0,
    own: int = 1,
) -> tuple[Doubles, Doubles]:
    """The result [R, inner] and the pool [slots, width] afterwards.

    With `own`, x is Q | K | V [R, 3 * inner], and K and V go to the slot of the row's last position in table [R, P] first; else x is Q,
    and table [R, 2] holds first slot and count. `relative` [heads, span]: bias by distance, the last beyond.
    """
    value = x.astype(np.float64) + (0.0 if bias is None else bias)
    after = pool.astype(np.float64)
    rows, inner = len(x), x.shape[1] // (3 if own else 1)
    dim = inner // num_heads
    places: list[NDArray[Any]] = []
    for row in range(rows):
        if own:
            assert lengths is not None
            places.append(table[row, : lengths[row]])
            after[places[-1][-1], column : column + 2 * inner] = value[row, inner:]
        else:
            places.append(table[row, 0] + np.arange(table[row, 1]))
    y = np.empty((rows, inner))
    for row, slots in enumerate(places):
        for head in range(num_heads):
            at = slice(head * dim, (head + 1) * dim)
            keys, values = (after[slots, first : first + inner][:, at] for first in (column, column + inner))
            scores = keys @ value[row, :inner][at] * scale
            if relative is not None:
                scores = scores + relative[head, np.minimum(np.arange(len(slots))[::-1], relative.shape[1] - 1)]
            weights = np.exp(scores - scores.max())
            y[row, at] = weights @ values / weights.sum()
    return y, after


def top_tokens(logits: Floats, k: int) -> tuple[Doubles, Floats, NDArray[np.int64]]:
    """The log of the sum of exponentials [R], and the k best logits [R, k] with their tokens, equal ones by token."""
    exact = logits.astype(np.float64)
    most = exact.max(axis=1, keepdims=True)
    lse = (most + np.log(np.exp(exact - most).sum(axis=1, keepdims=True)))[:, 0]
    ids = np.stack([np.lexsort((np.arange(len(row)), -row))[:k] for row in logits])
    return lse, np.take_along_axis(logits, ids, axis=1), ids
