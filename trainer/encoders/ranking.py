"""Relevance: a cross-encoder that reads query and document together and answers with one logit, whose sigmoid is the score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from server.core import FloatArray
from trainer.encoders import measure
from trainer.encoders.base import Tokens
from trainer.encoders.examples import Example

_PREDICTED_AT_ONCE = 32


class CrossEncoder:
    """See trainer.encoders.fit.Learner."""

    def __init__(self, model: Any, tokens: Tokens, device: str) -> None:
        self.model = model.to(device)
        self._tokens = tokens
        self._device = device

    def length(self, row: Example, /) -> int:
        """Characters of both texts."""
        return len(row.text) + len(row.pair)

    def loss(self, batch: Sequence[Example], /) -> Any:
        """Cross entropy against the wanted score, which may lie between 0 and 1."""
        import torch

        wanted = torch.tensor([row.score for row in batch], device=self._device)
        weights = torch.tensor([row.weight for row in batch], device=self._device)
        return torch.nn.functional.binary_cross_entropy_with_logits(self._logits(batch), wanted, weight=weights / weights.mean())

    def validate(self, rows: Sequence[Example], /) -> float:
        """Concordance, within queries where they have several documents, minus a hundredth of the loss, which tells equal orders apart."""
        scores = self.answers(rows)
        wanted = [row.score for row in rows]
        statistic, units = measure.concordance_statistic(wanted, scores.tolist(), measure.groups_of(rows))
        near = np.clip(scores, 1e-6, 1 - 1e-6)
        loss = -np.mean(np.array(wanted) * np.log(near) + (1 - np.array(wanted)) * np.log(1 - near))
        return statistic(np.arange(units)) - 0.01 * float(loss)

    def answers(self, rows: Sequence[Example]) -> FloatArray:
        """float32[rows] in [0, 1]."""
        import torch

        found = [np.zeros(0, np.float32)]
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(rows), _PREDICTED_AT_ONCE):
                found.append(torch.sigmoid(self._logits(rows[start : start + _PREDICTED_AT_ONCE])).float().cpu().numpy())
        return np.concatenate(found)

    def _logits(self, rows: Sequence[Example]) -> Any:
        encodings = self._tokens.encode([(row.text, row.pair) for row in rows])
        return self.model(**self._tokens.tensors(encodings, self._device)).logits[:, 0].float()
