"""What an encoder is trained to make small."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, classes: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Mean over rows by their weights float32[B], with smoothed labels."""
    losses = functional.cross_entropy(logits, classes, label_smoothing=smoothing, reduction="none")
    return (losses * weights).sum() / weights.sum()


def supervised_contrastive(vectors: Tensor, classes: Tensor, weights: Tensor, tau: float) -> Tensor:
    """Khosla et al. 2020, equation 2 ("out"): vectors float32[B, H] of length 1; rows alone in their class have no part. 0 if all are."""
    same = classes[:, None] == classes[None, :]
    alone = torch.eye(len(classes), dtype=torch.bool, device=vectors.device)
    similar = (vectors @ vectors.T / tau).masked_fill(alone, float("-inf"))
    positive = same & ~alone
    count = positive.sum(1)
    log_share = similar - torch.logsumexp(similar, dim=1, keepdim=True)
    losses = -log_share.masked_fill(~positive, 0.0).sum(1) / count.clamp(min=1)
    weight = weights * (count > 0)
    return (losses * weight).sum() / weight.sum().clamp(min=1e-6)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Symmetric Kullback-Leibler divergence between two passes' logits (Liang et al. 2021, R-Drop), mean over rows."""
    p, q = functional.log_softmax(first, dim=1), functional.log_softmax(second, dim=1)
    one = functional.kl_div(p, q, log_target=True, reduction="batchmean")
    other = functional.kl_div(q, p, log_target=True, reduction="batchmean")
    return (one + other) / 2
