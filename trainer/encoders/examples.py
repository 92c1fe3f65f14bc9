"""From curated rows to examples of a task: a teacher's or a person's answer, which is text or JSON, read as what a model learns from.

Entities are found again by their words, each at its first free place, as the server reads a provider's answer
(server/routing/prompting.py); an answer that gives `start` and `end` is taken at its word where the text has those words there.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from trainer.curate.rows import is_held_out, normalised

Span = tuple[int, int, str]
"""An entity: start and end as offsets in code points, end exclusive, and its label."""

ENTITIES = "token-classification"
RANKING = "text-ranking"
SIMILARITY = "sentence-similarity"
EMBEDDING = "feature-extraction"
TASKS = (ENTITIES, RANKING, SIMILARITY, EMBEDDING)
RELEVANT = 0.5  # a pair with this score or more belongs together

NO_ANSWER = "no answer from a teacher or a person"
NO_JSON = "the answer is no list of entities"
NOT_IN_TEXT = "an entity's words are not in the text"
FOREIGN_LABEL = "an entity's label is not one of the skill's"
NO_SCORE = "the answer is no score from 0 to 1"
NO_PAIR = "the input is no pair of texts"
REPEATED = "repeats another row's text"
_YES = frozenset({"relevant", "yes", "true", "same", "up"})
_NO = frozenset({"irrelevant", "not relevant", "no", "false", "different", "down"})


class RowLike(Protocol):
    """What is read of trainer.curate.rows.Row."""

    @property
    def interaction_id(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def held_out(self) -> bool: ...
    @property
    def corrected(self) -> bool: ...
    @property
    def answer(self) -> str: ...
    @property
    def rejected(self) -> str: ...
    @property
    def thumb(self) -> str: ...
    @property
    def weight(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a task. `pair`: the second text, or ""; `score` in [0, 1] of a pair; `spans` of a text's entities.

    `rejected`: the answer that a person put down or corrected, as text; `agreed`: a person said that the answer is right; `weight` > 0: how
    much the row counts in training.
    """

    id: str
    text: str
    pair: str = ""
    score: float = 0.0
    spans: tuple[Span, ...] = ()
    held_out: bool = False
    corrected: bool = False
    rejected: str = ""
    agreed: bool = False
    weight: float = 1.0


@dataclass(slots=True)
class Examples:
    """What could be read, and why the others could not."""

    rows: list[Example] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def read(task: str, rows: Iterable[RowLike], labels: Collection[str] = ()) -> Examples:
    """Examples of `task`, one of TASKS. `labels`: kinds of entities that the skill knows; empty: any.

    Rows of pairs are held out by their first text, so that no query is on both sides. Of rows with equal texts a person's counts, else the
    last.
    """
    found = Examples()
    kept: dict[tuple[str, str], Example] = {}
    for row in rows:
        one = _entities(row, labels) if task == ENTITIES else _pair(row, task)
        if isinstance(one, str):
            found.dropped[one] += 1
            continue
        key = normalised(one.text), normalised(one.pair)
        if key in kept:
            found.dropped[REPEATED] += 1
        if key not in kept or one.corrected or not kept[key].corrected:
            kept[key] = one
    found.rows = list(kept.values())
    return found


def read_entities(answer: str, text: str, labels: Collection[str] = ()) -> tuple[Span, ...] | str:
    """The entities in an answer, by their start, or why it has none to learn from.

    Understood: a JSON list of {"text", "label"} (with "start" and "end" where the writer knows them), an object with it under "entities",
    and the local models' "label: words; label: words". An empty list says that the text has no entity.
    """
    given = _listed(answer)
    if given is None:
        return NO_JSON
    spans: list[Span] = []
    for one in given:
        words, label = one.get("text"), one.get("label")
        if not isinstance(words, str) or not isinstance(label, str) or not words.strip() or not label:
            return NO_JSON
        if labels and label not in labels:
            return FOREIGN_LABEL
        start = _place(one, words, text, spans)
        if start < 0:
            return NOT_IN_TEXT
        spans.append((start, start + len(words), label))
    return tuple(sorted(spans))


def read_score(answer: str) -> float | None:
    """A relevance or similarity in [0, 1]: a number, {"score": number}, or a plain yes or no; else None."""
    said = answer.strip()
    if said.casefold() in _YES:
        return 1.0
    if said.casefold() in _NO:
        return 0.0
    value = _json(said)
    if isinstance(value, dict):
        value = value.get("score")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
        return None
    return float(value)


def read_pair(text: str) -> tuple[str, str] | None:
    """Both texts of an input that the lake keeps as {"text": ..., "text_pair": ...}, or None."""
    value = _json(text)
    if not isinstance(value, dict):
        return None
    first, second = value.get("text"), value.get("text_pair")
    if not isinstance(first, str) or not isinstance(second, str) or not first.strip() or not second.strip():
        return None
    return first, second


def _entities(row: RowLike, labels: Collection[str]) -> Example | str:
    if not row.answer.strip():
        return NO_ANSWER
    spans = read_entities(row.answer, row.text, labels)
    if isinstance(spans, str):
        return spans
    more: dict[str, Any] = {
        "held_out": row.held_out,
        "corrected": row.corrected,
        "rejected": row.rejected,
        "agreed": row.thumb == "up",
        "weight": row.weight,
    }
    return Example(row.interaction_id, row.text, spans=spans, **more)


def _pair(row: RowLike, task: str) -> Example | str:
    both = read_pair(row.text)
    if both is None and task == EMBEDDING and row.corrected and row.answer.strip():
        both = row.text, row.answer  # a person gave the text that this one should be near
        score: float | None = 1.0
    elif both is None:
        return NO_PAIR
    else:
        score = read_score(row.answer)
        if score is None and task == EMBEDDING and row.thumb in ("up", "down"):
            score = float(row.thumb == "up")
    if score is None:
        return NO_SCORE if row.answer.strip() else NO_ANSWER
    more: dict[str, Any] = {"corrected": row.corrected, "rejected": row.rejected, "agreed": row.thumb == "up", "weight": row.weight}
    return Example(row.interaction_id, both[0], both[1], score, held_out=is_held_out(both[0]), **more)


def _listed(answer: str) -> list[dict[str, Any]] | None:
    """The entities of an answer as objects, or None where it is none."""
    value = _json(answer)
    if isinstance(value, dict):
        value = value.get("entities")
    if isinstance(value, list):
        return value if all(isinstance(one, dict) for one in value) else None
    if value is not None or answer.strip().startswith(("{", "[")):
        return None
    parts = [part.partition(":") for part in answer.split(";") if part.strip()]
    if not all(colon and label.strip() and words.strip() for label, colon, words in parts):
        return None
    return [{"label": label.strip(), "text": words.strip()} for label, _, words in parts]


def _place(one: dict[str, Any], words: str, text: str, taken: list[Span]) -> int:
    """Where an entity begins: where it says, else at the first place that none has taken; -1: nowhere."""
    said = one.get("start")
    if isinstance(said, int) and not isinstance(said, bool) and said >= 0 and text[said : said + len(words)] == words:
        return said if _free(said, words, taken) else -1
    start = text.find(words)
    while start >= 0 and not _free(start, words, taken):
        start = text.find(words, start + 1)
    return start


def _free(start: int, words: str, taken: list[Span]) -> bool:
    return not any(start < end and begin < start + len(words) for begin, end, _ in taken)


def _json(text: str) -> Any:
    inner = text.strip()
    if inner.startswith("```"):
        inner = inner.strip("`").strip()
        inner = inner.removeprefix("json").strip()
    try:
        return json.loads(inner)
    except (ValueError, RecursionError):
        return None
