"""What a teacher told of its odds, in the student's vocabulary: where both cut an answer into the same tokens, and nowhere else.

The lake keeps them as JSON, a list of [text, logprob, [[text, logprob], ...]] for each token of the teacher's answer (the column
teacher_tokens). They came over a network and are not trusted to be well-formed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from server.core import FloatArray, IntArray
from trainer.generation.losses import align
from trainer.generation.prompts import Prompts

_MOST = 20  # alternatives a place, as vendors give


@dataclass(slots=True, frozen=True)
class Odds:
    """Of the first n tokens of an answer: `ids` int64[n, k] of the teacher's likeliest, -1 where the student has no such token, and
    `logprobs` float32[n, k].
    """

    ids: IntArray
    logprobs: FloatArray


class OddsReader:
    """Reads the odds of rows for one base. Blocks; the vocabulary is read once, a second for 100,000 tokens."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._ids: Mapping[str, int] | None = None

    def of(self, told: str, answer: Sequence[int]) -> Odds | None:
        """The odds at the places of `answer` (tokens of the student, its last included), or None where there are none to use."""
        tokens = tokens_of(told)
        if not tokens:
            return None
        pieces = self._prompts.pieces(answer)
        # A character of several tokens is held back by one side and escaped by the other: such answers go without odds.
        if [text for text, _ in tokens] != pieces:
            return None
        if self._ids is None:
            self._ids = self._prompts.vocabulary()
        tables = [table for _, table in tokens]
        return Odds(*align(tables, self._ids, max(map(len, tables))))


def tokens_of(told: str) -> list[tuple[str, dict[str, float]]]:
    """Each token's text and the likeliest at its place, the token among them; [] of anything that is none."""
    try:
        return [_token(one) for one in json.loads(told)] if told else []
    except (ValueError, TypeError, LookupError, RecursionError):
        return []


def _token(one: Any) -> tuple[str, dict[str, float]]:
    text, logprob, top = one
    table = {_text(other): _logprob(value) for other, value in [*top[:_MOST], (text, logprob)]}
    return _text(text), table


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a token that is no text")
    return value


def _logprob(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value > 0:
        raise ValueError("a log-probability that is none")
    return float(np.float32(value))
