"""Examples to batches of tensors, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.generation.losses import IGNORED
from trainer.generation.material import Example


@dataclass(slots=True, frozen=True)
class Collate:
    """Rows become `input_ids`, `attention_mask`, `labels` int64[B, L] (the answers' tokens alone) and `weights` float[B]."""

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
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "weights": weights}
