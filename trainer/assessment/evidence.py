"""What the lake says of answers: each student's answer that a person or the teacher judged, and each teacher's that a person did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from server.core import FloatArray
from server.quality.agreement import ALIKE, kind_of, medoid, normal

if TYPE_CHECKING:
    from server.lake.reading import LakeReader

COLUMNS = (
    "interaction_id",
    "time",
    "task",
    "input_kind",
    "input",
    "local",
    "output_text",
    "labels",
    "finish_reason",
    "teacher_label",
    "teacher_text",
    "student_label",
    "student_text",
    "student_quality",
    "student",
    "student_version",
    "rating",
    "thumb",
    "correction",
)
LIKED, DISLIKED = 4, 2  # ratings from 1 to 5; 3 says neither
PERSON, TEACHER = "person", "teacher"


@dataclass(slots=True, frozen=True)
class Saying:
    """One interaction's answers and what is known of them; texts are "" where there is none. `opinion`: of what was delivered."""

    id: str
    time: datetime
    prompt: str
    local: bool
    student: str
    teacher: str
    correction: str
    opinion: bool | None
    quality: float | None
    version: str
    finish: str


@dataclass(slots=True, frozen=True)
class Judged:
    """An answer and whether it is acceptable, by whom (PERSON or TEACHER). `quality`: what was promised of a student's answer.

    `strong_ok`: whether the teacher's answer to the same was acceptable, where a person said so; None: the teacher is the standard.
    """

    id: str
    time: datetime
    prompt: str
    answer: str
    ok: bool
    by: str
    student: bool
    version: str = ""
    quality: float | None = None
    strong_ok: bool | None = None
    finish: str = ""


def read(reader: LakeReader, skill: str) -> list[Saying]:
    """All of a skill, oldest first."""
    return [saying for row in reader.interactions(skill=skill, columns=COLUMNS).to_pylist() if (saying := _saying(row)) is not None]


def texts_to_compare(sayings: Sequence[Saying]) -> list[str]:
    """Answers whose likeness only their embeddings tell; each once."""
    found: dict[str, None] = {}
    for saying in sayings:
        for one, other in ((saying.student, saying.correction), (saying.student, saying.teacher), (saying.teacher, saying.correction)):
            if one and other and normal(one) != normal(other) and "text" in (kind_of(one), kind_of(other)):
                found |= {one: None, other: None}
    return list(found)


def judge(sayings: Sequence[Saying], vectors: Mapping[str, FloatArray]) -> list[Judged]:
    """The judgements, oldest first. Texts that differ and have no vectors are not compared: nobody can tell."""
    found: list[Judged] = []
    for saying in sayings:
        strong = _same(saying.teacher, saying.correction, vectors)
        if strong is None and not saying.local:
            strong = saying.opinion
        if saying.student:
            ok, by = _same(saying.student, saying.correction, vectors), PERSON
            if ok is None and saying.local:
                ok = saying.opinion
            if ok is None:
                ok, by = _same(saying.student, saying.teacher, vectors), TEACHER
            if ok is not None:
                found.append(_judged(saying, saying.student, ok, by, strong, True))
        if saying.teacher and strong is not None:
            found.append(_judged(saying, saying.teacher, strong, PERSON, None, False))
    return found


def _judged(saying: Saying, answer: str, ok: bool, by: str, strong: bool | None, student: bool) -> Judged:
    return Judged(
        id=saying.id,
        time=saying.time,
        prompt=saying.prompt,
        answer=answer,
        ok=ok,
        by=by,
        student=student,
        version=saying.version if student else "",
        quality=saying.quality if student else None,
        strong_ok=strong,
        finish=saying.finish if student == saying.local else "",
    )


def _saying(row: Mapping[str, Any]) -> Saying | None:
    if not row["input"]:
        return None
    student, teacher = row["student_label"] or row["student_text"] or "", row["teacher_label"] or row["teacher_text"] or ""
    delivered = (row["labels"] or [None])[0] or row["output_text"] or ""
    thumb, rating = row["thumb"], row["rating"]
    opinion = {"up": True, "down": False}.get(thumb or "")
    if opinion is None and rating is not None and (rating >= LIKED or rating <= DISLIKED):
        opinion = rating >= LIKED
    if not student and row["local"]:
        student = delivered
    return Saying(
        id=row["interaction_id"],
        time=row["time"],
        prompt=row["input"],
        local=bool(row["local"]),
        student=student,
        teacher=teacher or ("" if row["local"] else delivered),
        correction=row["correction"] or "",
        opinion=opinion,
        quality=row["student_quality"],
        version=f"{row['student']}@{row['student_version']}" if row["student"] else "",
        finish=row["finish_reason"] or "",
    )


def _same(answer: str, wanted: str, vectors: Mapping[str, FloatArray]) -> bool | None:
    """Whether two answers say the same; None where one is missing, or nobody can tell."""
    if not answer or not wanted:
        return None
    if normal(answer) == normal(wanted):
        return True
    if "text" not in (kind_of(answer), kind_of(wanted)):
        return False
    one, other = vectors.get(answer), vectors.get(wanted)
    if one is None or other is None:
        return None
    return medoid([answer, wanted], np.stack([one, other])).share >= ALIKE
