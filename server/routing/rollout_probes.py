"""Old inputs with what student and teacher said to them. Where something changed, both are asked again: that tells which of them did."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from server.core import Call, Priority, Reply, Timings, Work
from server.routing.candidates import Allowance, Answer, Brief, Candidate
from server.routing.rollout_agreement import agrees
from server.routing.rollout_watch import cause, forgiven

_KEPT = 32  # and so many answers of the teacher a question costs
_NEWEST = 40  # comparisons that may be of changed times already: a change is found after some 30
_ENOUGH = 8  # with fewer inputs that are old for certain, the oldest of the newest help out
_VERSIONS = 4  # of each skill
_LONGEST_S = 30.0
_MOST_BYTES = 8192


@dataclass(slots=True, frozen=True)
class Probe:
    """An input, and the answers that it had."""

    work: Work
    mine: Reply
    teacher: Reply


@dataclass(slots=True)
class _Kept:
    """One student's. `newest` wait until so many others have been compared after them that nothing had changed yet when they were."""

    drawn: list[Probe] = field(default_factory=list)
    newest: deque[Probe] = field(default_factory=deque)
    seen: int = 0  # that were drawn from

    def asked(self) -> list[Probe]:
        return self.drawn + list(self.newest)[: max(_ENOUGH - len(self.drawn), 0)]


class Probes:
    """Some for each student, drawn evenly from the answers that were compared first, without the newest; in memory alone. `students` and
    `teacher` make candidates, None where there is none.
    """

    def __init__(
        self, students: Callable[[Brief, str], Candidate | None], teacher: Callable[[Brief], Candidate | None], first: int = 400
    ) -> None:
        self._students = students
        self._teacher = teacher
        self._first = first  # so many compared answers are drawn from: later ones may be of changed times
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._random = random.Random(0)

    def keep(self, skill: str, version: str, probe: Probe) -> None:
        """Reservoir sampling (Vitter 1985), delayed."""
        key = (skill, version)
        kept = self._kept.get(key)
        if kept is None:
            versions = [one for one in self._kept if one[0] == skill]
            for one in versions[: max(len(versions) - _VERSIONS + 1, 0)]:
                del self._kept[one]
            kept = self._kept[key] = _Kept()
        if kept.seen >= self._first or len(probe.work.plain.encode()) > _MOST_BYTES:
            return
        kept.newest.append(probe)
        if len(kept.newest) <= _NEWEST:
            return
        old = kept.newest.popleft()
        kept.seen += 1
        if len(kept.drawn) < _KEPT:
            kept.drawn.append(old)
        elif (place := self._random.randrange(kept.seen)) < _KEPT:
            kept.drawn[place] = old

    async def diagnose(self, brief: Brief, version: str, signs: Mapping[str, int]) -> str:
        """What changed, in words; see rollout_watch.cause."""
        kept = self._kept.get((brief.skill.name, version))
        probes = kept.asked() if kept is not None else []
        student, teacher = self._students(brief, version), self._teacher(brief)
        mine = await _ask(student, probes)
        same = sum(
            agrees(brief.skill.task, one.work.plain, mine[place].reply, one.mine) for place, one in enumerate(probes) if place in mine
        )
        if student is not None and probes and len(probes) - same > forgiven(len(probes)):
            return cause(same, len(probes), len(probes), signs)  # no need to pay for the teacher's answers
        theirs = await _ask(teacher, probes)
        places = [place for place in range(len(probes)) if place in mine and place in theirs]
        same = sum(agrees(brief.skill.task, probes[p].work.plain, mine[p].reply, probes[p].mine) for p in places)
        taught = sum(agrees(brief.skill.task, probes[p].work.plain, theirs[p].reply, probes[p].teacher) for p in places)
        return cause(same, taught, len(places), signs)


async def _ask(candidate: Candidate | None, probes: Sequence[Probe]) -> dict[int, Answer]:
    if candidate is None or not probes or candidate.closed():
        return {}
    call = Call("rollout", time.monotonic() + _LONGEST_S, Priority.BULK)
    found: dict[int, Answer] = {}
    async for index, answer in candidate.answers([one.work for one in probes], call, Timings(), Allowance(None, call.deadline)):
        if isinstance(answer, Answer):
            found[index] = answer
    return found
