"""Examples to batches of tensors, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.generation.losses import IGNORED
from trainer.generation.material import Example


@dataclass(slots=True, frozen=True)
class Collate:
    """Rows become `input_ids`, `attention_mask`, `labels` int64[B, L] (the answers' tokens alone) and `weights` float[B].

    Where a teacher told its odds of some token, also `odds_ids` int64[B, L, k] and `odds` float[B, L, k], at the places of `labels`, and
    `told` bool[B, L], where there are any.
    """

    pad: int = 0

    def __call__(self, rows: Sequence[Example]) -> dict[str, Any]:
        import torch

        length = max(len(one.prompt) + len(one.answer) for one in rows)
        ids = torch.full((len(rows), length), self.pad, dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORED, dtype=torch.long)
        for place, one in enumerate(rows):
            begin, end = len(one.prompt), len(one.prompt) + len(one.answer)
            ids[place, :end] = torch.tensor([*one.prompt, *one.answer])
            mask[place, :end] = 1
            labels[place, begin:end] = torch.tensor(one.answer)
        weights = torch.tensor([one.weight for one in rows], dtype=torch.float32)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "weights": weights}
        width = max((one.odds.ids.shape[1] for one in rows if one.odds is not None), default=0)
        return batch | self._odds(rows, length, width) if width else batch

    @staticmethod
    def _odds(rows: Sequence[Example], length: int, width: int) -> dict[str, Any]:
        import torch

        ids = torch.full((len(rows), length, width), -1, dtype=torch.long)
        logprobs = torch.zeros((len(rows), length, width))
        told = torch.zeros((len(rows), length), dtype=torch.bool)
        for place, one in enumerate(rows):
            if one.odds is not None:
                count, own = one.odds.ids.shape
                span = slice(len(one.prompt), len(one.prompt) + count)
                ids[place, span, :own] = torch.from_numpy(one.odds.ids)
                logprobs[place, span, :own] = torch.from_numpy(one.odds.logprobs)
                told[place, span] = True
        return {"odds_ids": ids, "odds": logprobs, "told": told}
