"""Few labels and many requests that nobody labelled: the first student labels the requests, and a second one learns from both.

Which label a request gets follows from its neighbours as well as from the first student: labels spread over the graph of nearest
neighbours in the student's own vectors (Zhou et al. 2004, "Learning with Local and Global Consistency", with given labels held fast).
Every request is learnt from, and counts by how sure its label is, so that there is no threshold to choose.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from server.core import FloatArray, IntArray

if TYPE_CHECKING:
    from trainer.classify.encoder import Student
    from trainer.classify.loop import Rows

# Unlabelled rows for each labelled one from which a second student is worth its time.
LEAST_RATIO = 1.0
_NEIGHBOURS = 10
_TEMPERATURE = 0.1  # of neighbours' weights: exp(cosine / temperature)
_SPREAD = 0.8  # how much of a request's label its neighbours decide in each round
_ROUNDS = 20
_BLOCK = 1024


def spread(given: FloatArray, classes: IntArray, asked: FloatArray, logits: FloatArray) -> tuple[IntArray, FloatArray]:
    """Labels int64[m] of the vectors `asked` float32[m, H], and how sure each is, float32[m] in (0, 1].

    `given` float32[n, H] with their `classes` int64[n]; `logits` float32[m, labels]: what the first student says of the asked ones. All
    vectors have length 1. Memory: 1,024 rows of similarities at a time.
    """
    if not len(asked):
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    start = np.concatenate([np.eye(logits.shape[1], dtype=np.float32)[classes], _softmax(logits)])
    neighbours, weights = _graph(np.concatenate([given, asked]))
    shares = start.copy()
    for _ in range(_ROUNDS):
        spread = np.zeros_like(shares)
        for place in range(neighbours.shape[1]):
            spread += weights[:, place, None] * shares[neighbours[:, place]]
        shares = _SPREAD * spread + (1.0 - _SPREAD) * start
        shares[: len(given)] = start[: len(given)]
    found = shares[len(given) :]
    return found.argmax(axis=1).astype(np.int64), np.asarray(found.max(axis=1), dtype=np.float32)


def labelled_by(student: Student, rows: Rows, asked: IntArray) -> Rows:
    """The rows with those at `asked` int64[m] of the table, which have no labels yet, as the student labels them."""
    given = rows.trained
    vectors = student.embed(rows.tokens, asked)
    weight, bias = student.linear()
    classes, sure = spread(student.embed(rows.tokens, given), rows.classes[given], vectors, vectors @ weight.T + bias)
    every = np.append(rows.classes, np.zeros(len(rows.tokens.lengths) - len(rows.classes), np.int64))
    weights = np.append(rows.weights, np.zeros(len(every) - len(rows.weights), np.float32)).astype(np.float32)
    every[asked], weights[asked] = classes, sure
    return replace(rows, classes=every, weights=weights, trained=np.append(given, asked))


def _graph(vectors: FloatArray) -> tuple[IntArray, FloatArray]:
    """The nearest other rows of each, int64[n, k], and their weights float32[n, k], which add up to 1."""
    size = min(_NEIGHBOURS, len(vectors) - 1)
    neighbours = np.zeros((len(vectors), size), np.int64)
    weights = np.zeros((len(vectors), size), np.float32)
    for begin in range(0, len(vectors), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        similar = vectors[block] @ vectors.T
        rows = np.arange(len(similar))
        similar[rows, begin + rows] = -np.inf
        near = np.argpartition(-similar, size - 1, axis=1)[:, :size]
        cosines = np.take_along_axis(similar, near, axis=1)
        weight = np.exp((cosines - cosines.max(axis=1, keepdims=True)) / _TEMPERATURE)
        neighbours[block], weights[block] = near, weight / weight.sum(axis=1, keepdims=True)
    return neighbours, weights


def _softmax(logits: FloatArray) -> FloatArray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True), dtype=np.float32)
