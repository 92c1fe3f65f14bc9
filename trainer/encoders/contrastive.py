"""Embeddings: texts that belong together are drawn near, all others of the batch pushed away.

InfoNCE over in-batch negatives and hard negatives (van den Oord et al. 2018; "multiple negatives ranking", Henderson et al. 2017), with
the cosine times 20. Hard negatives are documents that a score below 0.5 calls wrong for the query, else the base's own nearest wrong
document, unless it is nearly as near as the right one: such are often unlabelled right ones (Moreira et al. 2024). Graded pairs of
sentence similarity are ordered by CoSENT, no pair's cosine should pass that of a pair with a greater score (Su 2022), and drawn to their
scores themselves by the squared error, for callers read the cosine as a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from server.core import FloatArray
from trainer.encoders import measure
from trainer.encoders.base import Tokens
from trainer.encoders.examples import EMBEDDING, RELEVANT, Example

SCALE = 20.0
NEARNESS = 10.0  # of the squared error beside CoSENT
NEARLY = 0.95  # a wrong document with more than this share of the right one's cosine is left alone
_PREDICTED_AT_ONCE = 64
_NEAREST = 20


class Embedder:
    """See trainer.encoders.fit.Learner. `task`: feature-extraction (retrieval) or sentence-similarity (graded pairs)."""

    def __init__(self, model: Any, tokens: Tokens, task: str, device: str) -> None:
        self.model = model.to(device)
        self._tokens = tokens
        self._task = task
        self._device = device
        self._right: dict[str, set[str]] = {}
        self._wrong: dict[str, list[str]] = {}

    def prepare(self, rows: Sequence[Example]) -> list[Example]:
        """Takes the training rows in, finds hard negatives, and gives the rows to train on. Call it before LoRA or training begins."""
        for row in rows:
            if row.score >= RELEVANT:
                self._right.setdefault(row.text, set()).add(row.pair)
            else:
                self._wrong.setdefault(row.text, []).append(row.pair)
        if self._task != EMBEDDING:
            return list(rows)
        positive = [row for row in rows if row.score >= RELEVANT]
        self._mine(positive)
        return positive

    def length(self, row: Example, /) -> int:
        """Characters of the longer text."""
        return max(len(row.text), len(row.pair))

    def loss(self, batch: Sequence[Example], /) -> Any:
        """InfoNCE of the positive pairs; of graded pairs CoSENT and the squared error."""
        first = self._vectors([row.text for row in batch], self._query)
        second = self._vectors([row.pair for row in batch], self._passage)
        if self._task == EMBEDDING:
            return self._contrast(batch, first, second)
        return self._graded(batch, first, second)

    def validate(self, rows: Sequence[Example], /) -> float:
        """nDCG@10 of the rows' queries over the rows' documents; of graded pairs Spearman's correlation."""
        if self._task != EMBEDDING:
            return measure.spearman([row.score for row in rows], self.cosines(rows).tolist())
        queries, documents, gains = measure.retrieval(rows, [row.pair for row in rows])
        if not queries:
            return 0.0
        scores = self.matrix(queries, documents)
        return float(measure.ranking(gains, list(scores)).ndcg.mean())

    def cosines(self, rows: Sequence[Example]) -> FloatArray:
        """float32[rows]: of each pair."""
        first = self._predicted([row.text for row in rows], self._query)
        second = self._predicted([row.pair for row in rows], self._passage)
        return np.asarray((first * second).sum(axis=1), np.float32)

    def matrix(self, queries: Sequence[str], documents: Sequence[str]) -> FloatArray:
        """float32[queries, documents] of cosines."""
        found: FloatArray = self._predicted(queries, self._query) @ self._predicted(documents, self._passage).T
        return found

    @property
    def _query(self) -> str:
        return self._tokens.query_prefix if self._task == EMBEDDING else ""

    @property
    def _passage(self) -> str:
        return self._tokens.passage_prefix if self._task == EMBEDDING else ""

    def _mine(self, rows: Sequence[Example]) -> None:
        """The nearest document that is wrong and not nearly right, for queries that have no known wrong one."""
        queries = sorted({row.text for row in rows} - set(self._wrong))
        documents = sorted({row.pair for row in rows})
        if not queries or len(documents) < 2:
            return
        place = {document: number for number, document in enumerate(documents)}
        for query, cosine in zip(queries, self.matrix(queries, documents), strict=True):
            right = [place[one] for one in self._right[query]]
            limit = NEARLY * float(cosine[right].min())
            order = np.argsort(-cosine, kind="stable")[:_NEAREST]
            near = [documents[i] for i in order if i not in right and cosine[i] < limit]
            if near:
                self._wrong[query] = near[:1]

    def _contrast(self, batch: Sequence[Example], first: Any, second: Any) -> Any:
        import torch

        extra = [self._wrong[row.text][0] for row in batch if row.text in self._wrong]
        documents = [*(row.pair for row in batch), *extra]
        vectors = torch.cat([second, self._vectors(extra, self._passage)]) if extra else second
        logits = SCALE * first @ vectors.T
        own = torch.arange(len(batch), device=logits.device)
        right = [[document in self._right.get(row.text, ()) for document in documents] for row in batch]
        other = torch.tensor(right, device=logits.device)
        other[own, own] = False  # its own document is what it should find; further right ones are no negatives
        losses = torch.nn.functional.cross_entropy(logits.masked_fill(other, -1e4), own, reduction="none")
        weights = torch.tensor([row.weight for row in batch], device=losses.device)
        return (losses * weights).sum() / weights.sum()

    def _graded(self, batch: Sequence[Example], first: Any, second: Any) -> Any:
        import torch

        cosine = (first * second).sum(dim=1)
        wanted, weights = (torch.tensor(values, device=cosine.device) for values in zip(*((r.score, r.weight) for r in batch), strict=True))
        pairs = wanted[:, None] < wanted[None, :]
        differences = SCALE * (cosine[:, None] - cosine[None, :])[pairs]
        order = torch.logsumexp(torch.cat([differences, differences.new_zeros(1)]), dim=0)
        return order + NEARNESS * ((cosine - wanted) ** 2 * weights).sum() / weights.sum()

    def _vectors(self, texts: Sequence[str], prefix: str) -> Any:
        """float32[texts, H] of length 1, pooled as the server pools."""
        import torch

        inputs = self._tokens.tensors(self._tokens.encode([prefix + text for text in texts]), self._device)
        hidden = self.model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"]
        if self._tokens.pooling == "cls":
            pooled = hidden[:, 0]
        elif self._tokens.pooling == "last":
            pooled = hidden[torch.arange(len(texts), device=hidden.device), mask.sum(dim=1) - 1]
        else:
            weight = mask[:, :, None].float()
            pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1)
        return torch.nn.functional.normalize(pooled, dim=1)

    def _predicted(self, texts: Sequence[str], prefix: str) -> FloatArray:
        import torch

        self.model.eval()
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        found: dict[int, Any] = {}
        with torch.no_grad():
            for start in range(0, len(order), _PREDICTED_AT_ONCE):
                places = order[start : start + _PREDICTED_AT_ONCE]
                rows = self._vectors([texts[place] for place in places], prefix).cpu().numpy()
                found |= dict(zip(places, rows, strict=True))
        return np.stack([found[place] for place in range(len(texts))])
