"""The search for one text's answer: which tokens may follow, which beams go on, when it ends. Equal to transformers' generate().

Scores are sums of log-probabilities. A step gets, for each beam that goes on, the best logits of its row and, where rules change scores,
the whole row; what a rule does not touch keeps its place in the row's order, so only touched tokens need a look beyond the best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.core import FloatArray
from server.runtime.seq2seq.rules import Rules

Ids = npt.NDArray[np.int64]
_NONE: Ids = np.empty(0, np.int64)
_NEVER = -math.inf


@dataclass(frozen=True, slots=True)
class Row:
    """What a run gave for one beam: its best logits, descending, with their tokens; `lse`; and all its logits, float32[vocabulary]."""

    values: Sequence[float]
    ids: Sequence[int]
    lse: float
    logits: FloatArray


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens after the start token, the end token included where it came. `ended`: at an end token that was not forced by the length."""

    tokens: list[int]
    score: float
    ended: bool


@dataclass(slots=True)
class _Beam:
    tokens: list[int]  # the start token first
    score: float


class Search:
    """One text. Ask `edits`, run the graph for the beams of `newest`, tell `advance`; until it gives None, then read `answer`."""

    def __init__(self, rules: Rules, source: Sequence[int], vocabulary: int) -> None:
        self.rules = rules
        self._vocabulary = vocabulary
        # All beams would be equal in the first step: one stands for them.
        self._beams = [_Beam([rules.start], 0.0)]
        self._finished: list[tuple[float, list[int]]] = []
        self._edits: list[Ids] = []
        self._encoder_ngrams = _ngrams(source, rules.encoder_no_repeat_ngram_size) if rules.encoder_no_repeat_ngram_size else {}
        self._banned = np.array(sorted(rules.banned), np.int64)

    @property
    def newest(self) -> list[int]:
        """The newest token of each beam that goes on."""
        return [beam.tokens[-1] for beam in self._beams]

    @property
    def length(self) -> int:
        """Tokens of each of them, the start included."""
        return len(self._beams[0].tokens)

    def edits(self) -> list[Ids]:
        """For each beam, the tokens whose scores the next step changes; the row's best must be that many more than `rules.keep`."""
        if self._forced() is not None or not self.rules.edits:
            self._edits = [_NONE] * len(self._beams)
        else:
            self._edits = [self._touched(beam.tokens) for beam in self._beams]
        return self._edits

    def advance(self, rows: Sequence[Row]) -> list[int] | None:
        """Takes a step. For each beam that goes on now, which of the beams before it continues; None at the end of the search."""
        candidates = self._candidates(rows)
        if self.rules.num_beams == 1:
            return self._advance_greedy(candidates)
        rules, length = self.rules, self.length + 1
        at_limit = length >= rules.max_length
        going: list[tuple[float, int, int]] = []
        for rank, (score, beam, token) in enumerate(candidates):
            if not at_limit and token not in rules.ends:
                if len(going) < rules.num_beams:
                    going.append((score, beam, token))
            elif rank < rules.num_beams:
                tokens = [*self._beams[beam].tokens, token]
                self._finished.append((score / (length - 1) ** rules.length_penalty, tokens))
        self._finished = sorted(self._finished, key=lambda one: -one[0])[: rules.num_beams]
        if not going or self._settled(going[0][0], length - 1):
            return None
        return self._continue(going)

    def answer(self) -> Answer:
        """The best answer found; call it once `advance` gave None."""
        rules = self.rules
        if self._finished:
            score, tokens = self._finished[0]
        else:
            tokens = self._beams[0].tokens
            score = self._beams[0].score / max(1, len(tokens) - 1) ** rules.length_penalty
        forced = len(tokens) == rules.max_length and tokens[-1] in rules.forced_last
        return Answer(tokens[1:], score, tokens[-1] in rules.ends and not forced)

    def restart(self) -> None:
        """Forgets every step."""
        self._beams = [_Beam([self.rules.start], 0.0)]
        self._finished = []

    def _continue(self, going: list[tuple[float, int, int]]) -> list[int]:
        self._beams = [_Beam([*self._beams[beam].tokens, token], score) for score, beam, token in going]
        return [beam for _, beam, _ in going]

    def _advance_greedy(self, candidates: list[tuple[float, int, int]]) -> list[int] | None:
        if not candidates:
            return None
        score, _, token = candidates[0]
        beam = self._beams[0]
        beam.tokens.append(token)
        beam.score = score
        return None if token in self.rules.ends or len(beam.tokens) >= self.rules.max_length else [0]

    def _settled(self, best: float, generated: int) -> bool:
        """Whether no beam that goes on can beat the worst finished one, by the estimate that `early_stopping` chooses."""
        rules = self.rules
        if len(self._finished) < rules.num_beams:
            return False
        if rules.early_stopping is True:
            return True
        longest = rules.early_stopping == "never" and rules.length_penalty > 0.0
        hypothetical = rules.max_length - 1 if longest else generated
        return bool(best / hypothetical**rules.length_penalty <= self._finished[-1][0])

    def _candidates(self, rows: Sequence[Row]) -> list[tuple[float, int, int]]:
        """The best (score, beam, token), descending; at most `rules.keep`, none that may not come."""
        forced = self._forced()
        if forced is not None:
            found = [(beam.score, i, token) for i, beam in enumerate(self._beams) for token in forced]
        else:
            found = []
            for i, (beam, row, edit) in enumerate(zip(self._beams, rows, self._edits, strict=True)):
                if len(edit):
                    found += self._edited(i, beam, row, edit)
                else:
                    base = beam.score - row.lse
                    found += [(base + value, i, token) for value, token in zip(row.values, row.ids, strict=True) if value > _NEVER]
        found.sort(key=lambda one: (-one[0], one[1], one[2]))
        return found[: self.rules.keep]

    def _edited(self, i: int, beam: _Beam, row: Row, edit: Ids) -> list[tuple[float, int, int]]:
        raw = row.logits[edit].astype(np.float64)
        changed = self._changed(beam.tokens, edit, raw, row.lse)
        base = beam.score - row.lse
        if self.rules.renormalize:
            # The other tokens' share of the probability is what the touched ones had not.
            left = 1.0 - np.exp(raw - row.lse).sum()
            if left < 0.5:
                whole = np.delete(row.logits.astype(np.float64) - row.lse, edit)
                left = float(np.exp(whole).sum())
            base -= math.log(max(left + float(np.exp(changed - row.lse).sum()), 1e-300))
        touched = set(edit.tolist())
        found = [(base + v, i, t) for v, t in zip(row.values, row.ids, strict=True) if t not in touched and v > _NEVER]
        return found + [(base + v, i, t) for v, t in zip(changed.tolist(), edit.tolist(), strict=True) if v > _NEVER]

    def _changed(self, tokens: list[int], edit: Ids, raw: npt.NDArray[np.float64], lse: float) -> npt.NDArray[np.float64]:
        """The new logits of `edit`; penalties work on log-probabilities in beam search, on logits where it is greedy."""
        rules = self.rules
        shift = lse if rules.num_beams > 1 else 0.0
        scores = raw - shift
        if rules.repetition_penalty != 1.0:
            penalised = np.where(scores < 0, scores * rules.repetition_penalty, scores / rules.repetition_penalty)
            scores = np.where(np.isin(edit, np.array(tokens, np.int64)), penalised, scores)
        scores[np.isin(edit, self._forbidden(tokens))] = _NEVER
        return scores + shift

    def _touched(self, tokens: list[int]) -> Ids:
        edit = self._forbidden(tokens)
        if self.rules.repetition_penalty != 1.0:
            edit = np.union1d(edit, np.array(tokens, np.int64))
        return edit[edit < self._vocabulary]

    def _forbidden(self, tokens: list[int]) -> Ids:
        """Tokens that may not follow `tokens`, sorted."""
        rules, length = self.rules, len(tokens)
        more: set[int] = set()
        if length < rules.min_length:
            more |= rules.ends
        if rules.no_repeat_ngram_size:
            more |= _followers(tokens, rules.no_repeat_ngram_size)
        if self._encoder_ngrams:
            before = rules.encoder_no_repeat_ngram_size - 1
            more |= self._encoder_ngrams.get(tuple(tokens[length - before :]) if before else (), set())
        for phrase in rules.banned_phrases:
            if len(phrase) <= length and tuple(tokens[length - len(phrase) + 1 :]) == phrase[:-1]:
                more.add(phrase[-1])
        if rules.banned_first and length == (1 if rules.forced_first is None else 2):
            more |= rules.banned_first
        if not more:
            return self._banned
        return np.array(sorted(more | rules.banned), np.int64)

    def _forced(self) -> tuple[int, ...] | None:
        """The only tokens that may come now, or None. They cost nothing."""
        rules, length = self.rules, self.length
        if rules.forced_last and length == rules.max_length - 1:
            return rules.forced_last
        if rules.forced_first is not None and length == 1:
            return (rules.forced_first,)
        return None


def _ngrams(tokens: Sequence[int], size: int) -> dict[tuple[int, ...], set[int]]:
    """For each run of `size` - 1 tokens, those that follow it somewhere."""
    followers: dict[tuple[int, ...], set[int]] = {}
    for i in range(len(tokens) - size + 1):
        followers.setdefault(tuple(tokens[i : i + size - 1]), set()).add(int(tokens[i + size - 1]))
    return followers


def _followers(tokens: list[int], size: int) -> set[int]:
    """Tokens that would make a run of `size` tokens that is there already."""
    if len(tokens) + 1 < size:
        return set()
    if size == 1:
        return set(tokens)
    last = tokens[len(tokens) - size + 1 :]
    return {tokens[i + size - 1] for i in range(len(tokens) - size + 1) if tokens[i : i + size - 1] == last}
