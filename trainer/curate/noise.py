"""Labels that are likely wrong: cleanlab's confident learning (Northcutt et al. 2021) on predictions that never saw the row they judge."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise

import numpy as np

from server.config import Config
from server.core import FloatArray, IntArray
from trainer import linear
from trainer.curate.loops import in_own_loop
from trainer.curate.rows import Row

MISLABELLED = "the label is likely wrong (label errors)"
# With fewer rows a label a prediction says too little of a label: on clean data of 10 rows a label more would be lost than won.
MIN_ROWS_A_LABEL = 20
FOLDS = 3
STRENGTH = 10.0
_SIZE = 512  # of hashed features
_MOST_FITTED = 20_000  # rows that one head is fitted on: more take time and memory, and tell little more of the labels


@dataclass(slots=True, frozen=True)
class Suspects:
    """Indices of rows whose labels are likely wrong, the surest first; `accuracy`: how often predictions of unseen rows agree."""

    indices: list[int]
    accuracy: float


def find(vectors: FloatArray, classes: IntArray, labels: int, cap: float, check: Callable[[], None]) -> Suspects:
    """Judges classes int64[n] by vectors float32[n, H]; at most the share `cap` of the rows is suspected.

    A row is suspected where both of cleanlab's rules say so: its label is among the least likely of its class, as many as the estimated
    noise has it, and it is among the likeliest to be of another class, as many as pass between the two classes.
    """
    from cleanlab.filter import find_label_issues  # type: ignore[import-untyped]

    probabilities = held_back(vectors, classes, labels, check)
    accuracy = float((probabilities.argmax(1) == classes).mean())
    ranked = find_label_issues(classes, probabilities, filter_by="both", return_indices_ranked_by="normalized_margin", n_jobs=1)
    check()
    return Suspects([int(index) for index in ranked[: int(cap * len(classes))]], accuracy)


def held_back(vectors: FloatArray, classes: IntArray, labels: int, check: Callable[[], None]) -> FloatArray:
    """Probabilities float32[n, labels], each row's by a linear head that was fitted without it."""
    part = np.random.default_rng(1).permutation(len(classes))
    logits = np.zeros((len(classes), labels), np.float32)
    for fold in range(FOLDS):
        check()
        fitted = np.flatnonzero((part % FOLDS != fold) & (part < _MOST_FITTED * FOLDS // (FOLDS - 1)))  # `part` is a shuffle
        weight, bias = linear.fit_at(vectors[fitted], classes[fitted], labels, STRENGTH)
        judged = part % FOLDS == fold
        logits[judged] = vectors[judged] @ weight.T + bias
    logits /= linear.temperature(logits, classes)
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    return np.asarray(logits / logits.sum(axis=1, keepdims=True), dtype=np.float32)


def hashed(texts: Sequence[str]) -> FloatArray:
    """Features float32[n, 512] of length 1, where no model is at hand: words, word pairs and runs of 4 characters, hashed."""
    found = np.zeros((len(texts), _SIZE), np.float32)
    for number, text in enumerate(texts):
        words = text.casefold().split()[:400]
        runs = [f"#{text[at : at + 4]}" for at in range(max(min(len(text), 2000) - 3, 0))]
        pieces = [*words, *(f"{a} {b}" for a, b in pairwise(words)), *runs]
        hashes = np.array([zlib.crc32(piece.encode()) for piece in pieces] or [0], np.uint32)
        np.add.at(found[number], hashes % _SIZE, np.where(hashes >> 31, 1.0, -1.0))
    found = np.sign(found) * np.sqrt(np.abs(found))
    return np.asarray(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6), dtype=np.float32)


def embedded(config: Config, base: str, texts: Sequence[str], progress: Callable[[int, int], None]) -> tuple[str, FloatArray, list[int]]:
    """Vectors of the texts by the base of the repository, as "name@version", float32[n, H], and the indices of the texts that have one."""
    from trainer.serving import ServedBase

    async def run() -> tuple[str, FloatArray, list[int]]:
        served = await ServedBase.open(config, base)
        try:
            vectors, kept, _ = await served.embed(texts, progress)
        finally:
            await served.close()
        return f"{served.base.name}@{served.base.version}", vectors, kept

    return in_own_loop(run)


def possible(rows: Sequence[Row]) -> str:
    """Why label errors cannot be looked for, or ""."""
    if find_spec("cleanlab") is None or find_spec("scipy") is None:
        return "cleanlab is not installed: pip install 'understudy-server[trainer]'"
    train = [row.label for row in rows if not row.held_out]
    labels = len(set(train))
    if labels < 2 or len(train) < MIN_ROWS_A_LABEL * labels:
        return f"{len(train)} training rows of {labels} labels are too few; {MIN_ROWS_A_LABEL} a label are needed"
    return ""
