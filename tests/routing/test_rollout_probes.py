"""What changed is told from inputs that were answered before it did, however many have been compared since."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from server.core import Call, Label, Reply, Timings, Work
from server.routing.candidates import Allowance, Answer, Failure
from server.routing.rollout_probes import Probe, Probes

BRIEF: Any = SimpleNamespace(skill=SimpleNamespace(name="s", task="text-classification"))
SINCE = 35  # comparisons from a change until it is found


class Says:
    """A candidate that answers number n with what `of` says of it, and remembers what it was asked."""

    def __init__(self, of: Any) -> None:
        self.of = of
        self.asked: list[int] = []

    def closed(self) -> str:
        return ""

    async def answers(
        self, works: Sequence[Work], call: Call, timings: Timings, allowed: Allowance
    ) -> AsyncIterator[tuple[int, Answer | Failure]]:
        for place, work in enumerate(works):
            self.asked.append(int(work.text))
            yield place, Answer(said(self.of(int(work.text))))


def said(label: str) -> Reply:
    return Reply(label, [Label(label, 1.0)])


def right(number: int) -> str:
    return str(number % 7)


def half_wrong(number: int) -> str:
    return "wrong" if number % 2 else right(number)


def diagnose(before: int, student: Any, teacher: Any, after: Any) -> tuple[str, Says]:
    """`before` answers are compared, then something changes: `after` gives the pairs compared since, of student and teacher."""
    student, teacher = Says(student), Says(teacher)
    probes = Probes(lambda brief, version: student, lambda brief: teacher)
    for number in range(before):
        probes.keep("s", "1", Probe(Work(str(number)), said(right(number)), said(right(number))))
    for number in range(before, before + SINCE):
        mine, theirs = after(number)
        probes.keep("s", "1", Probe(Work(str(number)), said(mine), said(theirs)))
    return asyncio.run(probes.diagnose(BRIEF, "1", {"agreement": 1})), teacher


@pytest.mark.parametrize("before", [30, 60, 300])
def test_a_teacher_that_turned_bad_is_named(before: int) -> None:
    cause, teacher = diagnose(before, right, half_wrong, lambda number: (right(number), half_wrong(number)))
    assert cause.startswith("the teacher changed"), cause
    assert max(teacher.asked) < before, "an input that was compared after the change says nothing"


def test_a_student_that_turned_bad_is_named_and_the_teacher_not_paid() -> None:
    cause, teacher = diagnose(60, half_wrong, right, lambda number: (half_wrong(number), right(number)))
    assert cause.startswith("the student changed") and teacher.asked == []


def test_other_inputs_are_named_and_a_few_other_words_forgiven() -> None:
    def forgetful(number: int) -> str:
        return "another word" if number in (3, 17) else right(number)

    cause, teacher = diagnose(60, right, forgetful, lambda number: ("unheard of", right(number)))
    assert cause.startswith("inputs changed") and len(teacher.asked) <= 32


def test_without_old_inputs_nothing_is_said() -> None:
    probes = Probes(lambda brief, version: Says(right), lambda brief: Says(right))
    assert "no old inputs" in asyncio.run(probes.diagnose(BRIEF, "1", {}))
