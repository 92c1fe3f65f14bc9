"""How near a text is to each task's phrases: kernel ridge regression over the phrases.

Every phrase votes for the tasks by its nearness, exp(cosine - 1) + WORDS * (tf-idf cosine over words and pairs of words), and the votes
are solved for so that the phrases themselves come out right (Hastie et al., The Elements of Statistical Learning, 5.8.2). The embedding
carries the meaning; words and pairs carry what it blurs, whether a sentence asks, tells or orders. The word weights are fitted on the
phrases like everything else. On 5-fold cross-validation over the phrases: nearest phrase 63 %, ridge on the embedding 82 %, both 85 %.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.core import FloatArray

# Chosen by that cross-validation.
WORDS = 0.2  # weight of the word kernel beside the embedding's
RIDGE = 0.1
BALANCE = 0.5  # 0: each phrase counts alike; 1: each task does
TEMPERATURE = 0.07  # of the softmax that makes scores of votes; least log loss

_WORD = re.compile(r"\w+|\?")
_MAX_WORDS = 64


def terms(text: str) -> list[str]:
    """Words and neighbouring pairs in lower case; "?" is a word, "^" the beginning."""
    words = _WORD.findall(text.lower())[:_MAX_WORDS]
    return words + [f"{a} {b}" for a, b in zip(["^", *words], words, strict=False)]


@dataclass(slots=True, frozen=True)
class PhraseHead:
    """What is fitted. n phrases of d dimensions, c classes; `classes[i]` is phrase i's."""

    vectors: FloatArray  # [n, d], unit length
    classes: np.ndarray  # int64[n]
    votes: FloatArray  # [n, c]
    terms: dict[str, int]
    rarity: FloatArray  # inverse document frequency a term
    term_votes: FloatArray  # [terms, c]

    def votes_for(self, texts: Sequence[str], vectors: FloatArray) -> FloatArray:
        """float32[len(texts), c]; about 1 for the right class and 0 for the others, without bounds."""
        found: FloatArray = np.exp(vectors @ self.vectors.T - 1) @ self.votes
        for row, text in zip(found, texts, strict=True):
            places, weights = self._weigh(text)
            if places:
                row += weights @ self.term_votes[places]
        return found

    def nearest(self, vector: FloatArray, klass: int) -> tuple[int, float]:
        """The index of the class's phrase that is nearest to the vector, and the cosine."""
        rows = np.flatnonzero(self.classes == klass)
        near = self.vectors[rows] @ vector
        best = int(near.argmax())
        return int(rows[best]), float(near[best])

    def _weigh(self, text: str) -> tuple[list[int], FloatArray]:
        counts = Counter(place for term in terms(text) if (place := self.terms.get(term)) is not None)
        return list(counts), _weights(counts, self.rarity)


def fit(texts: Sequence[str], vectors: FloatArray, classes: np.ndarray, count: int) -> PhraseHead:
    """Fits the votes of `texts` with their unit `vectors` float32[n, d] and `classes` int64[n] in [0, count). About a second."""
    n = len(texts)
    counts = [Counter(terms(text)) for text in texts]
    frequency = Counter(term for one in counts for term in one)
    index = {term: place for place, term in enumerate(sorted(frequency))}
    rarity = np.array([math.log((1 + n) / (1 + frequency[term])) + 1 for term in index], np.float32)
    rows_of: list[list[int]] = [[] for _ in index]
    weights_of: list[list[float]] = [[] for _ in index]
    for row, one in enumerate(counts):
        places = Counter({index[term]: times for term, times in one.items()})
        for place, weight in zip(places, _weights(places, rarity).tolist(), strict=True):
            rows_of[place].append(row)
            weights_of[place].append(weight)
    kernel: FloatArray = np.exp(vectors @ vectors.T - 1)
    for rows, weights in zip(rows_of, weights_of, strict=True):
        values = np.array(weights, np.float32)
        kernel[np.ix_(rows, rows)] += WORDS * np.outer(values, values)
    sizes = np.bincount(classes, minlength=count)
    balance = (n / (count * np.maximum(sizes, 1))) ** BALANCE
    kernel[np.diag_indices(n)] += RIDGE / balance[classes]
    wanted = np.eye(count, dtype=np.float32)[classes] - 1 / count
    votes = np.linalg.solve(kernel, wanted.astype(np.float32))
    term_votes = np.stack([WORDS * np.array(w, np.float32) @ votes[rows] for rows, w in zip(rows_of, weights_of, strict=True)])
    return PhraseHead(vectors, classes, votes, index, rarity, term_votes.astype(np.float32))


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
