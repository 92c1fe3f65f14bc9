"""What a student is measured by while it learns: the answer's tokens alone, and where a teacher told its odds, how far it is from those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

IGNORED = -100  # label of a position that is not learnt
# What the likeliest tokens leave over is one more outcome; below this it is rounding.
_LEAST_REST = 1e-6


def answer_loss(logits: Any, batch: Mapping[str, Any], distil: float = 0.0) -> Any:
    """Mean loss of the answers' tokens, in nats: a scalar tensor. A token's loss is its cross-entropy; where a teacher told its odds,
    `distil` of it is the distance to those instead.

    Args:
        logits: float[B, L, V], those at position i say what stands at i + 1.
        batch: as Collate makes it: `labels`, IGNORED but for the answers' tokens; `weights`, how much each row counts (a row of weight 2
            counts as two rows); and `told`, `odds_ids` and `odds` where a teacher told its odds.
        distil: in [0, 1].
    """
    import torch

    shifted, wanted = logits[:, :-1].float(), batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(
        shifted.reshape(-1, shifted.shape[-1]), wanted.reshape(-1), ignore_index=IGNORED, reduction="none"
    ).view(wanted.shape)
    if distil and "told" in batch:
        told = batch["told"][:, 1:]
        apart = divergences(shifted[told], batch["odds_ids"][:, 1:][told], batch["odds"][:, 1:][told])
        losses = losses.masked_scatter(told, (1 - distil) * losses[told] + distil * apart)
    share = (wanted != IGNORED).to(losses.dtype) * batch["weights"][:, None]
    return (losses * share).sum() / share.sum().clamp(min=1e-9)


def divergences(logits: Any, ids: Any, logprobs: Any) -> Any:
    """KL(teacher || student) in nats over the teacher's likeliest tokens and all others together: float[n].

    A teacher gives its k best log-probabilities a token (OpenAI's `top_logprobs`), not the rest; what they leave over is one outcome more,
    so that the divergence is a lower bound of the true one and 0 where both agree (the data-processing inequality).

    Args:
        logits: float[n, V] of the student.
        ids: int64[n, k], the teacher's tokens in the student's vocabulary; -1 where one has none there, which counts among the rest.
        logprobs: float[n, k], natural logarithms.
    """
    import torch

    known = ids >= 0
    odds = torch.log_softmax(logits.float(), dim=-1).gather(1, ids.clamp(min=0))
    teacher = logprobs.float().exp() * known
    student = odds.exp() * known
    rest = (1 - teacher.sum(1)).clamp(min=_LEAST_REST)
    student_rest = (1 - student.sum(1)).clamp(min=_LEAST_REST)
    inside = torch.where(known, teacher * (logprobs.float() - odds), torch.zeros_like(odds)).sum(1)
    return inside + rest * (rest.log() - student_rest.log())


def align(top: Sequence[Mapping[str, float]], ids_of: Mapping[str, int], k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A teacher's alternatives (token's text -> log-probability, one table a position) in the student's vocabulary: ids, logprobs [n, k].

    Only a teacher of the student's own tokenizer has positions in common with it; the caller sees to that.
    """
    ids = np.full((len(top), k), -1, np.int64)
    logprobs = np.full((len(top), k), -np.inf, np.float32)
    for row, table in enumerate(top):
        for column, (text, logprob) in enumerate(sorted(table.items(), key=lambda one: -one[1])[:k]):
            ids[row, column] = ids_of.get(text, -1)
            logprobs[row, column] = logprob
    logprobs[ids < 0] = 0.0  # no part of the sum; a finite value keeps gradients clean
    return ids, logprobs
