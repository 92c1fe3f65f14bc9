"""Curated rows as token sequences: answers to learn, pairs of a wanted and a rejected answer, and answers with a thumb."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.errors import InputTooLong, UnderstudyError
from trainer.curate.rows import Row
from trainer.generation.odds import Odds, OddsReader
from trainer.generation.prompts import Prompts

TOO_LONG = "prompt and answer are longer than the base's context"
LONG_ANSWER = "the answer is longer than the skill's max_tokens"
REFUSED = "the base's chat template does not take the conversation"
UNREADABLE = "the base's tokenizer cannot write the answer as it is"
# One training row in ten says when to stop; by a hash of the text, so that a later run with more rows decides alike.
_WATCHED_ONE_IN = 10


@dataclass(slots=True, frozen=True)
class Example:
    """Tokens of a prompt and of the answer that is wanted, its last token included. `weight`: see Row. `odds`: the teacher's, or None."""

    row: Row
    prompt: list[int]
    answer: list[int]
    weight: float = 1.0
    odds: Odds | None = None


@dataclass(slots=True, frozen=True)
class Pair:
    """For DPO: the wanted answer and the one that a person corrected or put down."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(slots=True, frozen=True)
class Opinion:
    """For KTO: an answer that a person liked, or not."""

    prompt: list[int]
    answer: list[int]
    good: bool


@dataclass(slots=True)
class Material:
    """What there is to learn from. `watched` are training rows that say when to stop; `held_out` is seen by no training."""

    train: list[Example] = field(default_factory=list)
    watched: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    opinions: list[Opinion] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def gather(rows: Sequence[Row], prompts: Prompts, max_tokens: int, reserve: int = 0) -> Material:
    """Tokenizes rows; what does not fit falls away, with a reason.

    Args:
        rows: as curation leaves them.
        prompts: of the skill over its base.
        max_tokens: the longest answer that the skill gives, in tokens.
        reserve: positions that the student's own prefix takes of the context.
    """
    found = Material()
    odds = OddsReader(prompts)
    reader = _Reader(prompts, max_tokens, prompts.limit - reserve)
    for row in rows:
        prompt = reader.prompt(row)
        answer = reader.answer(prompt, row.answer) if row.answer else None
        rejected = reader.answer(prompt, row.rejected) if row.rejected and not row.held_out else None
        reason = next((one for one in (prompt, answer) if isinstance(one, str)), "")
        if reason:
            found.dropped[reason] += 1
            continue
        assert isinstance(prompt, list), "no reason was given"
        if isinstance(answer, list):
            _put(found, Example(row, prompt, answer, row.weight, odds.of(row.teacher_tokens, answer)))
        if not row.held_out:
            _prefer(found, row, prompt, answer if isinstance(answer, list) else None, rejected if isinstance(rejected, list) else None)
    return found


def _put(found: Material, one: Example) -> None:
    if one.row.held_out:
        found.held_out.append(one)
    elif int.from_bytes(hashlib.sha256(f"watched\t{one.row.text}".encode("utf-8", "replace")).digest()[:4], "big") % _WATCHED_ONE_IN == 0:
        found.watched.append(one)
    else:
        found.train.append(one)


def _prefer(found: Material, row: Row, prompt: list[int], answer: list[int] | None, rejected: list[int] | None) -> None:
    if answer is not None and rejected is not None and answer != rejected:
        found.pairs.append(Pair(prompt, answer, rejected))
    elif rejected is not None:
        found.opinions.append(Opinion(prompt, rejected, False))
    elif answer is not None and row.thumb == "up":
        found.opinions.append(Opinion(prompt, answer, True))


class _Reader:
    """Tokens, or why there are none."""

    def __init__(self, prompts: Prompts, max_tokens: int, limit: int) -> None:
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._limit = limit

    def prompt(self, row: Row) -> list[int] | str:
        try:
            return self._prompts.prompt(row)
        except UnderstudyError as error:
            return TOO_LONG if isinstance(error, InputTooLong) else REFUSED

    def answer(self, prompt: list[int] | str, text: str) -> list[int] | str:
        if isinstance(prompt, str):
            return prompt
        try:
            ids = self._prompts.answer(text)
        except UnderstudyError:
            return UNREADABLE
        if self._prompts.read(ids).strip() != text.strip():
            return UNREADABLE
        if len(ids) > self._max_tokens:
            return LONG_ANSWER
        return ids if len(prompt) + len(ids) <= self._limit else TOO_LONG
