"""How near a text is to each task's phrases: kernel ridge regression over the phrases.

Every phrase votes for the tasks by its nearness, exp(cosine - 1) + WORDS * (tf-idf cosine over words and pairs of words), and the votes
are solved for so that the phrases themselves come out right (Hastie et al., The Elements of Statistical Learning, 5.8.2). The embedding
carries the meaning; words and pairs carry what it blurs, whether a sentence asks, tells or orders. The word weights are fitted on the
phrases like everything else. On 5-fold cross-validation over the phrases: nearest phrase 67 %, ridge on the embedding 85 %, both 89 %.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.core import FloatArray, IntArray

# Chosen by that cross-validation.
WORDS = 0.2  # weight of the word kernel beside the embedding's
RIDGE = 0.1
BALANCE = 0.5  # 0: each phrase counts alike; 1: each task does
TEMPERATURE = 0.07  # of the softmax that makes scores of votes; least log loss

_WORD = re.compile(r"\w+|\?")
_MAX_WORDS = 64
# Products of this many phrases at a time stay below the size from which OpenBLAS uses threads: 0.1 ms, where waking them on a busy
# machine took 12.
BLOCK = 64


def terms(text: str) -> list[str]:
    """Words and neighbouring pairs in lower case; "?" is a word, "^" the beginning."""
    words = _WORD.findall(text.lower())[:_MAX_WORDS]
    return words + [f"{a} {b}" for a, b in zip(["^", *words], words, strict=False)]


@dataclass(slots=True, frozen=True)
class PhraseHead:
    """What is fitted. n phrases of d dimensions, c classes; `rows[k]` are the indices of class k's phrases."""

    size: int  # n
    vectors: FloatArray  # [n / BLOCK, BLOCK, d], unit length, then zeros
    rows: tuple[IntArray, ...]
    votes: FloatArray  # [n / BLOCK, BLOCK, c]
    terms: dict[str, int]
    rarity: FloatArray  # inverse document frequency a term
    term_votes: FloatArray  # [terms, c]

    def cosines(self, vectors: FloatArray) -> FloatArray:
        """float32[m, n]: how near each of m unit vectors is to each phrase."""
        near = np.matmul(self.vectors, vectors.T)
        return np.ascontiguousarray(near.reshape(-1, len(vectors))[: self.size].T)

    def votes_for(self, texts: Sequence[str], cosines: FloatArray) -> FloatArray:
        """float32[m, c] of m texts with their `cosines`; about 1 for the right class and 0 for the others, without bounds."""
        found: FloatArray = np.matmul(_blocks(np.exp(cosines - 1).T).transpose(0, 2, 1), self.votes).sum(axis=0)
        for row, text in zip(found, texts, strict=True):
            places, weights = self._weigh(text)
            if places:
                row += weights @ self.term_votes[places]
        return found

    def nearest(self, cosines: FloatArray, klass: int) -> tuple[int, float]:
        """The index of the class's phrase that is nearest by `cosines` float32[n] of one text, and its cosine."""
        rows = self.rows[klass]
        best = int(rows[int(cosines[rows].argmax())])
        return best, float(cosines[best])

    def _weigh(self, text: str) -> tuple[list[int], FloatArray]:
        counts = Counter(place for term in terms(text) if (place := self.terms.get(term)) is not None)
        return list(counts), _weights(counts, self.rarity)


def fit(texts: Sequence[str], vectors: FloatArray, classes: IntArray, count: int, votes: FloatArray | None = None) -> PhraseHead:
    """Fits the votes of `texts` with their unit `vectors` float32[n, d] and `classes` int64[n] in [0, count).

    Solving takes about a second and 8 n^2 bytes for 4,000 phrases; with `votes` float32[n, count] of an earlier fit nothing is solved.
    """
    counts = [Counter(terms(text)) for text in texts]
    frequency = Counter(term for one in counts for term in one)
    index = {term: place for place, term in enumerate(sorted(frequency))}
    rarity = np.array([math.log((1 + len(texts)) / (1 + frequency[term])) + 1 for term in index], np.float32)
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in index]
    for row, one in enumerate(counts):
        places = Counter({index[term]: times for term, times in one.items()})
        for place, weight in zip(places, _weights(places, rarity).tolist(), strict=True):
            found[place][0].append(row)
            found[place][1].append(weight)
    postings = [(np.array(rows, np.int64), np.array(weights, np.float32)) for rows, weights in found]
    if votes is None:
        votes = _solve(vectors, postings, classes, count)
    term_votes: FloatArray = np.stack([WORDS * weights @ votes[rows] for rows, weights in postings])
    rows_of = tuple(np.flatnonzero(classes == klass) for klass in range(count))
    return PhraseHead(len(texts), _blocks(vectors), rows_of, _blocks(votes), index, rarity, term_votes)


def _solve(vectors: FloatArray, postings: Sequence[tuple[IntArray, FloatArray]], classes: IntArray, count: int) -> FloatArray:
    """The votes float32[n, count]. `postings`: the phrases that have each term, and its weight in them."""
    n = len(classes)
    kernel: FloatArray = vectors @ vectors.T
    kernel -= 1
    np.exp(kernel, out=kernel)
    for rows, weights in postings:
        kernel[np.ix_(rows, rows)] += WORDS * np.outer(weights, weights)
    sizes = np.bincount(classes, minlength=count)
    balance = (n / (count * np.maximum(sizes, 1))) ** BALANCE
    kernel[np.diag_indices(n)] += RIDGE / balance[classes]
    wanted = np.eye(count, dtype=np.float32)[classes] - np.float32(1 / count)
    votes: FloatArray = np.linalg.solve(kernel, wanted)
    return votes


def _blocks(rows: FloatArray) -> FloatArray:
    """[n, k] as [ceil(n / BLOCK), BLOCK, k], filled up with zeros."""
    n, width = rows.shape
    padded = np.zeros((-(-n // BLOCK) * BLOCK, width), np.float32)
    padded[:n] = rows
    return padded.reshape(-1, BLOCK, width)


def _weights(counts: Counter[int], rarity: FloatArray) -> FloatArray:
    """The unit tf-idf vector at the counted places, in their order."""
    weights = np.array([(1 + math.log(times)) * rarity[place] for place, times in counts.items()], np.float32)
    length = float(np.linalg.norm(weights))
    return weights / length if length else weights


def scores_of(votes: FloatArray) -> FloatArray:
    """Votes float32[c] as scores that sum to 1."""
    raised = np.exp((votes - votes.max()) / TEMPERATURE)
    scores: FloatArray = raised / raised.sum()
    return scores
