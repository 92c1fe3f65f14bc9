"""Which rows a step sees: texts of near lengths together, in an order that follows from the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from server.core import IntArray

if TYPE_CHECKING:
    import torch

# Batches that are sorted by length together: enough to waste little on padding, few enough to keep them mixed.
_POOL = 16


def epoch_batches(lengths: IntArray, classes: IntArray, *, size: int, views: int, seed: tuple[int, int]) -> list[IntArray]:
    """Indices int64[<= size] of every batch of an epoch; each row comes once. `seed`: of the run and the epoch.

    With `views` > 1 rows are drawn in groups of one class, so that nearly each finds another of its class in its batch.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    groups = _groups(order, classes, views, rng) if views > 1 else [order[at : at + 1] for at in range(len(order))]
    batches: list[IntArray] = []
    at_once = size * _POOL // views
    for start in range(0, len(groups), at_once):
        pool = sorted(groups[start : start + at_once], key=lambda group: int(lengths[group].max()))
        rows = np.concatenate(pool)
        batches += [rows[at : at + size] for at in range(0, len(rows), size)]
    return [batches[at] for at in rng.permutation(len(batches))]


def _groups(order: IntArray, classes: IntArray, views: int, rng: np.random.Generator) -> list[IntArray]:
    """The rows in groups of one class, in a random order; what is left over of a class is a smaller group."""
    groups: list[IntArray] = []
    for label in np.unique(classes):
        mine = order[classes[order] == label]
        groups += [mine[at : at + views] for at in range(0, len(mine), views)]
    return [groups[at] for at in rng.permutation(len(groups))]


class TokenTable:
    """Token ids of texts, as the server's tokenizer gives them, cut at `max_tokens`."""

    def __init__(self, tokenizer: Path, texts: Sequence[str], max_tokens: int) -> None:
        from tokenizers import Tokenizer

        inner = Tokenizer.from_file(str(tokenizer))
        inner.no_padding()
        inner.enable_truncation(max_tokens)
        self.ids = [np.array(encoding.ids, dtype=np.int64) for encoding in inner.encode_batch(list(texts))]
        self.lengths: IntArray = np.array([len(ids) for ids in self.ids], dtype=np.int64)

    def batch(self, rows: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and attention_mask, int64[B, L]."""
        import torch

        width = int(self.lengths[rows].max())
        ids = np.zeros((len(rows), width), dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for place, row in enumerate(rows):
            ids[place, : self.lengths[row]] = self.ids[row]
            mask[place, : self.lengths[row]] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)
