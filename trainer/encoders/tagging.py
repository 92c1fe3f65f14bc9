"""Entities: a label of the BIO scheme for each token, learned from character spans and read back as the server reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.encoders import measure
from trainer.encoders.base import Tokens
from trainer.encoders.examples import Example, Span

OUTSIDE = "O"
_IGNORED = -100  # torch's cross entropy leaves such targets out
_PREDICTED_AT_ONCE = 64


def token_labels(kinds: Sequence[str]) -> list[str]:
    """O, then B- and I- of each kind."""
    return [OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]


def targets(offsets: Sequence[tuple[int, int]], special: Sequence[int], spans: Sequence[Span]) -> list[str | None]:
    """The label of each token, None for special ones. The first token that touches an entity begins it."""
    begun: set[Span] = set()
    found: list[str | None] = []
    for (start, end), is_special in zip(offsets, special, strict=True):
        span = next((one for one in spans if start < one[1] and one[0] < end), None)
        if is_special or start == end:
            found.append(None)
        elif span is None:
            found.append(OUTSIDE)
        else:
            found.append(f"{'I' if span in begun else 'B'}-{span[2]}")
            begun.add(span)
    return found


def spans_of(labels: Sequence[str], offsets: Sequence[tuple[int, int]]) -> tuple[Span, ...]:
    """Neighbours of one kind are one entity, a B- begins another: aggregation "simple" of server/runtime/tasks/entities.py."""
    spans: list[Span] = []
    before = OUTSIDE
    for label, (start, end) in zip(labels, offsets, strict=True):
        kind = label[2:] if label != OUTSIDE else OUTSIDE
        if kind != OUTSIDE:
            if label.startswith("B-") or before != kind:
                spans.append((start, end, kind))
            else:
                spans[-1] = (spans[-1][0], end, kind)
        before = kind
    return tuple(spans)


class Tagger:
    """See trainer.encoders.fit.Learner; `labels` are those of `token_labels`."""

    def __init__(self, model: Any, tokens: Tokens, labels: Sequence[str], device: str) -> None:
        self.model = model.to(device)
        self._tokens = tokens
        self._labels = list(labels)
        self._place = {label: number for number, label in enumerate(labels)}
        self._device = device

    def length(self, row: Example, /) -> int:
        """Characters, which is near enough."""
        return len(row.text)

    def loss(self, batch: Sequence[Example], /) -> Any:
        """Cross entropy over the tokens of a batch, each by its row's weight."""
        import torch

        encodings = self._tokens.encode([row.text for row in batch])
        inputs = self._tokens.tensors(encodings, self._device)
        wanted = torch.full(inputs["input_ids"].shape, _IGNORED, dtype=torch.int64)
        for place, (row, one) in enumerate(zip(batch, encodings, strict=True)):
            labels = targets(one.offsets, one.special_tokens_mask, row.spans)
            numbers = [_IGNORED if label is None else self._place[label] for label in labels]
            wanted[place, : len(numbers)] = torch.tensor(numbers)
        logits = self.model(**inputs).logits.float()
        wanted = wanted.to(self._device)
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=_IGNORED, reduction="none")
        weights = torch.tensor([row.weight for row in batch], device=self._device)[:, None] * (wanted != _IGNORED)
        return (losses * weights).sum() / weights.sum().clamp(min=1e-6)

    def validate(self, rows: Sequence[Example], /) -> float:
        """Entity F1."""
        return measure.f1(measure.entity_counts([row.spans for row in rows], self.answers(rows)))

    def answers(self, rows: Sequence[Example]) -> list[tuple[Span, ...]]:
        """The entities of each text, as far as it is read."""
        import torch

        found: list[tuple[Span, ...]] = []
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(rows), _PREDICTED_AT_ONCE):
                encodings = self._tokens.encode([row.text for row in rows[start : start + _PREDICTED_AT_ONCE]])
                best = self.model(**self._tokens.tensors(encodings, self._device)).logits.argmax(dim=-1).cpu().tolist()
                for one, numbers in zip(encodings, best, strict=True):
                    real = [place for place, special in enumerate(one.special_tokens_mask) if not special]
                    found.append(spans_of([self._labels[numbers[place]] for place in real], [one.offsets[place] for place in real]))
        return found
