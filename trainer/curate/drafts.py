"""The lake's rows as drafts: what was asked, what each side answered, what people said of it.

Nothing in the lake is trusted to be well-formed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from server.settings import CurationConfig
from trainer.curate.rows import is_held_out

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = (
    "interaction_id", "time", "input_kind", "input", "instruction", "parameters", "user_hash", "local", "quality", "error",
    "labels", "output_text", "teacher_label", "teacher_text", "teacher_source_model", "source_model", "training_allowed",
    "teacher_tokens",
    "student_label", "student_text", "student_quality", "rating", "thumb", "correction",
)  # fmt: skip
EMPTY = "the input is empty"
TOO_LONG = "the input or an answer is longer than curation.max_text_bytes"
UNREADABLE = "the input is not what its kind says"
IMAGES = "the input has images"
_CHUNK = 4096
# Control characters that no text needs, but for tab, line feed and carriage return.
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10, 13)}
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


@dataclass(slots=True)
class Draft:
    """An interaction on its way to a row. Answers are labels of a skill that classifies, else texts; None where there is none.

    `delivered`: what the caller got; `local`: from the student; `quality`: of what was delivered; `refused`: why the teacher's may not be
    learnt from. The steps decide `answer`, its `origin` ("person", "teacher", "student"), `rejected` and `weight`.
    """

    interaction_id: str
    time: datetime
    text: str
    messages: tuple[tuple[str, str], ...]
    held_out: bool
    group: str = ""
    instruction: str = ""
    parameters: tuple[tuple[str, str], ...] = ()
    delivered: str | None = None
    local: bool = False
    quality: float | None = None
    teacher: str | None = None
    teacher_tokens: str = ""
    source_model: str = ""
    training_allowed: bool = False
    refused: str = ""
    student: str | None = None
    student_quality: float | None = None
    rating: int | None = None
    thumb: str = ""
    correction: str | None = None
    answer: str = ""
    origin: str = ""
    rejected: str = ""
    weight: float = 1.0

    @property
    def corrected(self) -> bool:
        """Whether a person gave the answer."""
        return self.origin == "person"


def raw_rows(found: pa.Table) -> Iterator[dict[str, Any]]:
    """The table's rows as dictionaries, a part at a time."""
    for batch in found.to_batches(max_chunksize=_CHUNK):
        yield from batch.to_pylist()


def draft_of(raw: Mapping[str, Any], classifies: bool, settings: CurationConfig) -> Draft | str:
    """The draft, or the reason why the input cannot be used."""
    key, kind, given = str(raw.get("interaction_id") or ""), raw.get("input_kind") or "text", clean(raw.get("input"))
    if not given.strip():
        return EMPTY
    read = _input(str(kind), given)
    if isinstance(read, str):
        return read
    text, messages = read
    answers = {name: clean(raw.get(name)).strip() for name in ("teacher_text", "student_text", "output_text", "correction")}
    if max(len(one.encode()) for one in (given, *answers.values())) > settings.max_text_bytes:
        return TOO_LONG
    teacher, student, delivered = answers["teacher_text"], answers["student_text"], answers["output_text"]
    if classifies:
        teacher, student = clean(raw.get("teacher_label")), clean(raw.get("student_label"))
        delivered = _first(raw.get("labels")) or delivered
    group = str(raw.get("user_hash") or "")
    return Draft(
        interaction_id=key,
        time=_time(raw.get("time")),
        text=text,
        messages=messages,
        held_out=is_held_out(group if settings.split_by == "user" and group else clean(raw.get("input"))),
        group=group,
        instruction=clean(raw.get("instruction")),
        parameters=_parameters(raw.get("parameters")),
        delivered=delivered or None,
        local=bool(raw.get("local")),
        quality=_number(raw.get("quality")),
        teacher=teacher or None,
        teacher_tokens=raw.get("teacher_tokens") or "",
        source_model=str(raw.get("teacher_source_model") or ("" if raw.get("local") else raw.get("source_model")) or "unknown"),
        training_allowed=bool(raw.get("training_allowed")),
        student=student or None,
        student_quality=_number(raw.get("student_quality")),
        rating=None if (stars := _number(raw.get("rating"))) is None else int(stars),
        thumb=str(raw.get("thumb") or ""),
        correction=answers["correction"] or None,
    )


def clean(value: object) -> str:
    """A text without control characters and lone surrogates; "" of anything that is none."""
    if not isinstance(value, str):
        return ""
    return value.translate(_CONTROL).encode("utf-8", "replace").decode("utf-8")


def _input(kind: str, given: str) -> tuple[str, tuple[tuple[str, str], ...]] | str:
    """The text that stands for the input, and the conversation; or why there is none."""
    if kind == "text":
        return given, (("user", given),)
    try:
        value = json.loads(given)
    except (ValueError, RecursionError):
        return UNREADABLE
    if kind == "pair":
        if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in ("text", "text_pair")):
            return UNREADABLE
        return (given, ()) if value["text"].strip() or value["text_pair"].strip() else EMPTY
    if kind != "chat" or not isinstance(value, list) or not value:
        return UNREADABLE
    messages: list[tuple[str, str]] = []
    for one in value:
        if not isinstance(one, dict) or one.get("role") not in _ROLES or not isinstance(one.get("content"), str):
            return UNREADABLE
        if one.get("images"):
            return IMAGES
        messages.append((one["role"], clean(one["content"])))
    last = next((content for role, content in reversed(messages) if role == "user"), messages[-1][1])
    return (last, tuple(messages)) if last.strip() else EMPTY


def _first(labels: object) -> str:
    return clean(labels[0]) if isinstance(labels, list) and labels else ""


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _time(value: object) -> datetime:
    return value if isinstance(value, datetime) else datetime(1970, 1, 1, tzinfo=UTC)


def _parameters(value: object) -> tuple[tuple[str, str], ...]:
    try:
        found = json.loads(value) if isinstance(value, str) and value else {}
    except (ValueError, RecursionError):
        return ()
    return tuple(sorted((str(k), str(v)) for k, v in found.items())) if isinstance(found, dict) else ()
