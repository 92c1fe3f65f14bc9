"""The rows that curation leaves, and which of them are for evaluation alone."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from server.core import FloatArray

# One text in five is held out. By a hash of the text itself, so that no later run, with whatever data, trains on it.
HELD_OUT_ONE_IN = 5
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(slots=True, frozen=True)
class Row:
    """One input and the answer that is wanted; `corrected` where a person gave it.

    `text`: the input as the lake has it: a text as it is, a pair as JSON {"text", "text_pair"}, of a conversation the last user's words.
    `label`: of tasks that classify, else "". `answer`: the wanted answer as text (of classifiers the label); "" where all that is known
    is that `rejected` is not wanted: such rows are for KTO alone. `rejected`: an answer that a person put down or corrected; with
    `answer` it makes a pair for DPO. `messages`: (role, content) of what the caller sent, without the skill's instruction and without the
    answer; trainer.curate.asking.conversation adds what the model is told. `thumb`: what a person said of the delivered answer, "up",
    "down" or "". `weight` > 0: how much the row counts in training; an ordinary one has 1. `group`: whose row it is (a user's hash), ""
    where nobody is named. `instruction`, `parameters`: what the request said beyond the skill. `teacher_tokens`: JSON of
    the answer's tokens as the teacher told their odds (see trainer.generation.odds), or "".
    """

    interaction_id: str
    text: str
    label: str
    held_out: bool
    corrected: bool = False
    answer: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    rejected: str = ""
    thumb: str = ""
    weight: float = 1.0
    time: datetime = _BEGINNING
    group: str = ""
    instruction: str = ""
    parameters: tuple[tuple[str, str], ...] = ()
    teacher_tokens: str = ""


@dataclass(slots=True)
class Step:
    """What one step did: rows before and after, rows dropped by reason, a few of their interactions, seconds, and figures of its own."""

    name: str
    before: int
    after: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Curated:
    """What is left, what fell away and why, and where the teachers' words come from.

    `unlabelled`: training inputs whose wanted answer nobody gave, of skills that classify; they are none of `rows`, and have no label.
    `vectors`: float32[H] of rows' texts by interaction, as the search for label errors had them from `base`, "name@version", so that
    nobody has to embed them again; empty where there was none.
    """

    rows: list[Row] = field(default_factory=list)
    unlabelled: list[Row] = field(default_factory=list)
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    table_version: int = 0
    steps: list[Step] = field(default_factory=list)
    base: str = ""
    vectors: dict[str, FloatArray] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the sorted interaction ids and answers: equal where a run would learn the same again."""
        lines = sorted(f"{row.interaction_id}\t{row.label or row.answer}\t{row.rejected}\n" for row in self.rows)
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()

    def newest(self, share: float = 0.2) -> list[Row]:
        """The newest `share` of the held-out rows: how a student does on what came last, where traffic changes."""
        held = sorted((row for row in self.rows if row.held_out), key=lambda row: (row.time, row.interaction_id))
        return held[len(held) - round(len(held) * share) :]

    def report(self) -> dict[str, Any]:
        """The whole story as plain data for JSON."""
        held = sum(row.held_out for row in self.rows)
        return {
            "read": self.read,
            "kept": len(self.rows),
            "train_rows": len(self.rows) - held,
            "held_out_rows": held,
            "newest_held_out_rows": len(self.newest()),
            "unlabelled_rows": len(self.unlabelled),
            "corrected_rows": sum(row.corrected for row in self.rows),
            "dropped": dict(self.dropped.most_common()),
            "sources": dict(self.sources.most_common()),
            "labels": _labels(self.rows),
            "table_version": self.table_version,
            "fingerprint": self.fingerprint,
            "steps": [_step(step) for step in self.steps],
        }


def normalised(text: str) -> str:
    """Texts that differ only in case, spacing, Unicode form or closing punctuation are one text."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".!?… ")


def is_held_out(text: str) -> bool:
    """Whether a text is for evaluation alone, in this run and in every other."""
    digest = hashlib.sha256(normalised(text).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def _labels(rows: Sequence[Row]) -> dict[str, int]:
    return dict(Counter(row.label for row in rows if row.label).most_common())


def _step(step: Step) -> dict[str, Any]:
    plain: dict[str, Any] = {"name": step.name, "before": step.before, "after": step.after, "seconds": round(step.seconds, 4)}
    return {**plain, "dropped": dict(step.dropped), "examples": step.examples, "notes": step.notes}
