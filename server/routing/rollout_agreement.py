"""Whether a student's answer is the teacher's: what a rollout counts. Pure."""

from __future__ import annotations

import numpy as np

from server.core import Reply
from server.quality.agreement import kind_of, normal, support

# Texts of which so much is said by the other too are the same answer; vectors and scores so near each other as well.
ALIKE, NEAR_VECTORS, NEAR_SCORES = 0.6, 0.95, 0.1


def agrees(task: str, prompt: str, mine: Reply, theirs: Reply) -> bool:
    """Labels, entities and calls of tools have to be the same; closed answers the same in their normal form, JSON in its canonical one;
    texts say for the most part the same words; vectors and scores are near.
    """
    if mine.labels and theirs.labels:
        return mine.labels[0].name == theirs.labels[0].name
    if task == "token-classification":
        return {(one.label, one.text) for one in mine.entities} == {(one.label, one.text) for one in theirs.entities}
    if mine.embedding is not None and theirs.embedding is not None:
        return _cosine(mine.embedding, theirs.embedding) >= NEAR_VECTORS
    if mine.score is not None and theirs.score is not None:
        return abs(mine.score - theirs.score) <= NEAR_SCORES
    if mine.tool_calls or theirs.tool_calls:
        return [(one.name, one.arguments) for one in mine.tool_calls] == [(one.name, one.arguments) for one in theirs.tool_calls]
    return same_words(prompt, mine.text, theirs.text)


def same_words(prompt: str, mine: str, theirs: str) -> bool:
    """Whether two written answers say the same."""
    if kind_of(mine) == "closed" or kind_of(theirs) == "closed":
        return normal(mine) == normal(theirs)
    if mine.split() == theirs.split():
        return True
    return bool(support(prompt, [mine, theirs])[0] >= ALIKE)


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    if one.shape != other.shape:
        return 0.0
    scale = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / scale if scale else 0.0
