"""The rollouts of one server while it runs: what it sees, what it hears from others, and the steps that follow.

Where a rollout is stands in the registry; a step is written with the revision that it was decided on, so that of several servers that
decide at once one does. What a server sees it counts in memory and writes every `poll_s` seconds under its own name; all add up. The event
loop never waits for the database: a thread does, and without a database every rollout stays where it is and says so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from server.errors import FailedPrecondition, InvalidArgument, Unavailable
from server.registry.rollouts import CHALLENGER, CHAMPION, SHADOW, Change, RolloutEvent, RolloutTable, StoredRollout, shown
from server.routing import rollout as machine
from server.routing.rollout import AUTO, Rollout, Verdict
from server.routing.rollout_evidence import Evidence, total
from server.routing.rollout_live import Live, Seen
from server.routing.rollout_watch import AGREEMENT, INPUTS_CHANGED, TEACHER_CHANGED, WORDS
from server.routing.skills import Skill, SkillBook, Standing, Student, Students, student_of
from server.settings import RolloutConfig

_log = logging.getLogger(__name__)
# So long a suspended student's fate waits for what is found out about the cause, in seconds.
_LOOKING_S = 8.0
# The most that a target's own sampling error may add to the margin.
_MOST_ERROR = 0.05
_INCONCLUSIVE = 6  # times min_comparisons, in one stage: after so many a student that neither goes on nor back makes way for a newer one
_FROZEN = "the registry does not answer: the rollout stays where it is"


class Counters(Protocol):
    """Where steps are counted."""

    def rollout(self, skill: str, percent: int, step: str) -> None:
        """A skill's rollout took a step, after which its student has so many percent of the requests."""
        ...


@dataclass(slots=True, frozen=True)
class Report:
    """Where a rollout is and why, for people."""

    skill: str
    rollout: Rollout
    verdict: Verdict
    seen: Evidence
    teacher_share: float
    frozen: str = ""
    alarms: tuple[str, ...] = ()


class RolloutBook:
    """One a process, on its event loop. See server.routing.skills.Standings."""

    def __init__(
        self,
        config: RolloutConfig,
        table: RolloutTable,
        students: Students,
        *,
        keep: Callable[[Mapping[str, tuple[str, ...]]], None] | None = None,
        counters: Counters | None = None,
        seed: int | None = None,
    ) -> None:
        """`keep` is told which versions have to stay in memory."""
        self.config = config
        self.holder = secrets.token_hex(16)
        self._table = table
        self._students = students
        self._keep = keep
        self._counters = counters
        self._book: SkillBook | None = None
        self._live: dict[str, Live] = {}
        self._random = random.Random(seed)
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._polling = asyncio.Lock()
        self._alarms: list[tuple[str, str, str, str, dict[str, object]]] = []
        self.frozen = ""

    def of(self, skills: SkillBook) -> None:
        """The skills whose rollouts these are; they ask the book in turn, so it comes after both are made."""
        self._book = skills

    # What routes ask.

    def standing(self, skill: str) -> Standing:
        """See Standings."""
        live = self._live.get(skill)
        if live is None:
            return Standing("held", moves=True)
        now = live.rollout
        champion = "" if live.champion_suspended else now.champion
        if live.suspended:
            return Standing("full" if champion else "rolled_back", 100 if champion else 0, champion, moves=True)
        return Standing(now.stage, now.percent, now.student, champion, moves=True)

    def teacher_share(self, skill: str) -> float:
        """Share of the answers that students deliver for which the teacher is asked too, now."""
        live = self._live.get(skill)
        return 0.0 if live is None else live.share()

    def draw(self, skill: str) -> tuple[bool, float]:
        """Whether the teacher is asked beside an answer that a student delivers, and with what probability that was drawn."""
        live = self._live.get(skill)
        share = 0.0 if live is None else live.share()
        drawn = share > 0 and self._random.random() < share
        if drawn and live is not None:
            live.drawn()
        return drawn, share

    def wants(self, skill: str, version: str) -> bool:
        """Whether a student has to be ready to answer: not one that was rolled back."""
        live = self._live.get(skill)
        return live is None or version not in live.rollout.refused

    def live(self, skill: str) -> Live | None:
        """What this server knows of a skill's rollout."""
        return self._live.get(skill)

    # What is seen.

    def saw(self, skill: Skill, seen: Seen) -> None:
        """One item, once all that was asked for it has come."""
        live = self._live.get(skill.name)
        if live is not None and live.saw(skill, seen):
            self._suspended(skill.name, live)

    def signs(self, skill: str) -> tuple[str, ...]:
        """Kinds of changes that were seen since the last call, for whoever looks into them."""
        live = self._live.get(skill)
        if live is None or not live.signs:
            return ()
        found, live.signs = tuple(dict.fromkeys(live.signs)), []
        return found

    def alarm(self, skill: str, version: str, kinds: Sequence[str], cause: str) -> None:
        """Something changed, and why: it is logged, shown, and written into the audit trail with the next look."""
        words = f"drift alarm: {'; '.join(WORDS.get(kind, kind) for kind in kinds)}. {cause}"
        live = self._live.get(skill)
        if live is None:
            return
        live.alarm(words)
        if AGREEMENT in kinds and live.suspended and version == live.rollout.student:
            live.cause = cause
        stage = shown(live.rollout.stage, live.rollout.percent)
        self._alarms.append((skill, stage, version, words, {"signs": list(kinds), "requests": live.mine.requests}))
        _log.warning("rollout alarm", extra={"skill": skill, "student": version, "alarm": words})
        self._wake.set()

    def feedback_kept(self, interaction_id: str, *, rating: int | None, thumb: str | None, correction: str | None) -> None:
        """See server.api.feedback.FeedbackObserver. A rating of 1 or 2 is a thumb down, of 4 or 5 one up."""
        up = thumb == "up" if thumb else None if rating is None or rating == 3 else rating > 3
        for name, live in self._live.items():
            if live.feedback(interaction_id, up, correction):
                self._suspended(name, live)

    def _suspended(self, skill: str, live: Live) -> None:
        why = live.suspended or live.champion_suspended
        student = live.rollout.student if live.suspended else live.rollout.champion
        _log.warning("student suspended", extra={"skill": skill, "student": student, "reason": why})
        if live.suspended and live.proven:
            live.signs.append(AGREEMENT)
            live.looking_until = time.monotonic() + _LOOKING_S
        self._wake.set()

    # The loop.

    async def start(self) -> None:
        """Looks once, then every `poll_s` seconds until `close`."""
        await self.poll()
        self._task = asyncio.create_task(self._run(), name="rollouts")

    async def close(self) -> None:
        """Ends the loop, and writes what was seen."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
            await self.poll()

    async def _run(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.config.poll_s):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self.poll()
            except Exception:
                _log.exception("a look at the rollouts failed; it goes on")

    async def poll(self) -> None:
        """Writes what was seen, reads what others wrote, and takes the steps that follow."""
        async with self._polling:
            await self._poll()

    async def _poll(self) -> None:
        assert self._book is not None, "of() comes first"
        names = [name for name in self._book.names() if self._book.rolls(name)]
        if not names:
            return
        mine = [(name, live.rollout.epoch, json.dumps(live.mine.to_json())) for name, live in self._live.items() if live.dirty]
        for name, _, _ in mine:
            self._live[name].dirty = False
        try:
            rows, others = await asyncio.to_thread(self._exchange, mine, frozenset(names))
            for name in names:
                self._adopt(name, rows.get(name), others.get(name))
            while self._alarms:
                skill, stage, version, words, evidence = self._alarms[0]
                await asyncio.to_thread(self._table.note, skill, AUTO, stage, version, words, evidence)
                self._alarms.pop(0)
            for name in names:
                change = self._decide(name)
                if change is not None and await asyncio.to_thread(self._table.change, change):
                    self._took(name, change)
        except Unavailable as error:
            for name, _, _ in mine:
                self._live[name].dirty = True
            if not self.frozen:
                _log.error(_FROZEN, extra={"error": error.message})
            self.frozen = _FROZEN
            return
        if self.frozen:
            _log.info("the registry answers again")
        self.frozen = ""
        if self._keep is not None:
            self._keep({name: live.rollout.versions for name, live in self._live.items()})

    def _exchange(
        self, mine: list[tuple[str, int, str]], names: frozenset[str]
    ) -> tuple[dict[str, StoredRollout], dict[str, tuple[int, list[Evidence]]]]:
        """In a thread: this server's evidence out, the rows and the other servers' evidence in."""
        for name, epoch, sums in mine:
            self._table.put_evidence(name, epoch, self.holder, json.loads(sums))
        rows = self._table.all()
        others: dict[str, tuple[int, list[Evidence]]] = {}
        for name in names & rows.keys():
            epoch = int(rows[name].state.get("epoch", 0))
            found = self._table.evidence(name, epoch)
            others[name] = (epoch, [Evidence.from_json(sums) for holder, sums in found.items() if holder != self.holder])
        return rows, others

    def _adopt(self, name: str, row: StoredRollout | None, others: tuple[int, list[Evidence]] | None) -> None:
        live = self._live.setdefault(name, Live(self.config))
        if row is not None and row.revision != live.revision:
            live.become(Rollout.from_json(row.state), row.revision)
        if others is not None and others[0] == live.rollout.epoch:
            live.others = total(others[1])

    # Steps.

    def _decide(self, name: str) -> Change | None:
        assert self._book is not None, "of() comes first"
        live = self._live[name]
        now, seen = live.rollout, live.seen()
        if live.suspended:
            return self._back(name, live)
        if live.champion_suspended and now.champion:
            return self._change(name, machine.drop_champion(now, live.champion_suspended), AUTO, live.champion_suspended, seen)
        if now.paused:
            return None
        newest = self._newest(name, now, max(seen.compared, seen.paired))
        if newest is not None:
            reason = f"version {newest.version} was published"
            target, tolerance = promised(newest, self._book.get(name).deliver_bar, self.config.margin)
            return self._change(name, machine.begin(now, newest.version, target, tolerance, reason), AUTO, reason, seen)
        verdict = machine.judge(now, seen, self.config)
        if verdict.step == "promote":
            return self._change(name, machine.promote(now, seen, verdict.reason), AUTO, verdict.reason, seen, verdict)
        if verdict.step == "rollback":
            return self._change(name, machine.roll_back(now, verdict.reason), AUTO, verdict.reason, seen, verdict)
        return None

    def _back(self, name: str, live: Live) -> Change | None:
        """The suspended student goes, unless it is the teacher that changed: then who is right is for a person to say. While that is
        looked into the student stays suspended.
        """
        if not live.cause and time.monotonic() < live.looking_until:
            return None
        why = f"{live.suspended}; {live.cause}" if live.cause else live.suspended
        if live.cause.startswith(TEACHER_CHANGED):
            return self._change(name, machine.hold(live.rollout, f"held: {why}"), AUTO, f"held: {why}", live.seen())
        after = machine.roll_back(live.rollout, why, changed_inputs=live.cause.startswith(INPUTS_CHANGED))
        return self._change(name, after, AUTO, why, live.seen())

    def _newest(self, name: str, now: Rollout, compared: int) -> Student | None:
        """The newest version that may answer, where it is newer than all that were there. It waits while another is in its canary: else
        one that is trained every night would keep all from ever getting through. But not for one that stays inconclusive after so many
        comparisons in one stage: that would keep better ones waiting for ever.
        """
        assert self._book is not None, "of() comes first"
        if now.stage == machine.CANARY and compared < _INCONCLUSIVE * self.config.min_comparisons:
            return None
        known = [int(one) for one in (now.student, now.champion, *now.former, *now.refused) if one]
        for version, made in self._students.ready(name).items():
            if known and int(version) <= max(known):
                return None
            student = student_of(made, self._book.get(name))
            if not student.held:
                return student
        return None

    def _change(self, name: str, after: Rollout, actor: str, reason: str, seen: Evidence, verdict: Verdict | None = None) -> Change:
        live = self._live[name]
        row = StoredRollout(name, after.stage, after.percent, after.student, after.to_json(), live.revision + 1)
        evidence: dict[str, float] = {"compared": seen.compared, "agreed": seen.agreed, "requests": seen.requests, "answers": seen.answers}
        evidence |= {"failed": seen.failed, "better": seen.better, "worse": seen.worse, "paired": seen.paired}
        if verdict is not None:
            evidence |= {"lower": round(verdict.lower, 4), "upper": round(verdict.upper, 4), "all_compared": verdict.compared}
        aliases = {
            CHAMPION: after.serving,
            CHALLENGER: after.student if after.stage == machine.CANARY else "",
            SHADOW: after.student if after.stage == machine.SHADOW else "",
        }
        before = shown(live.rollout.stage, live.rollout.percent)
        gone = [one for one in after.refused if one not in live.rollout.refused]
        to = machine.ROLLED_BACK if gone else shown(after.stage, after.percent)
        return Change(row, live.revision, actor, before, reason, evidence, aliases, to, gone[-1] if gone else after.student)

    def _took(self, name: str, change: Change) -> None:
        live = self._live[name]
        live.become(Rollout.from_json(change.row.state), change.row.revision)
        now = live.rollout
        step = change.to_stage
        told = {"skill": name, "student": now.student, "before": change.from_stage, "stage": shown(now.stage, now.percent)}
        level = logging.WARNING if step == machine.ROLLED_BACK else logging.INFO
        _log.log(level, "rollout", extra={**told, "reason": change.reason})
        if self._counters is not None:
            self._counters.rollout(name, now.percent, step)

    # What people do and see.

    async def command(self, name: str, verb: str, actor: str, reason: str = "", version: str = "") -> Report:
        """promote, hold, resume or rollback, by hand. `version`: of a student that is to be taken, again where it was rolled back.

        Raises:
            SkillNotFound: with near names.
            FailedPrecondition: the rollout does not move by itself, or there is nobody to promote or to roll back.
            InvalidArgument: no such version is at hand.
            Unavailable: the registry does not answer, or somebody else was quicker every time.
        """
        self._check_rolls(name)
        for _ in range(5):
            await self.poll()
            if self.frozen:
                raise Unavailable(f"The rollout of {name!r} cannot be changed: {self.frozen}.", retry_after_s=5.0)
            live = self._live[name]
            told = reason or f"{verb} by {actor}"
            after = self._by_hand(name, live, verb, told, version)
            change = self._change(name, after, actor, told, live.seen())
            if await asyncio.to_thread(self._table.change, change):
                self._took(name, change)
                return self.report(name)
        raise Unavailable(f"The rollout of {name!r} changed again and again meanwhile. Look at it, and try again.", retry_after_s=1.0)

    def _by_hand(self, name: str, live: Live, verb: str, told: str, version: str) -> Rollout:
        now = live.rollout
        if verb == "hold":
            return machine.hold(now, told)
        if verb == "resume":
            return machine.resume(now, told)
        if verb == "rollback":
            if not now.student or now.stage in (machine.HELD, machine.ROLLED_BACK):
                raise FailedPrecondition(f"No student of {name!r} is on its way or at full; there is nobody to roll back.", skill=name)
            return machine.roll_back(now, told)
        assert self._book is not None, "of() comes first"
        if version and (version != now.student or now.stage == machine.ROLLED_BACK):
            made = self._students.ready(name).get(version)
            student = None if made is None else student_of(made, self._book.get(name))
            if student is None or student.held:
                ready = ", ".join(self._students.ready(name)) or "none"
                why = student.held if student is not None else f"it is not at hand; these are: {ready}"
                raise InvalidArgument(f"Version {version[:16]!r} of {name!r} cannot be taken: {why}.", field="version")
            target, tolerance = promised(student, self._book.get(name).deliver_bar, self.config.margin)
            taken = replace(now, refused=tuple(one for one in now.refused if one != version))
            return machine.begin(taken, version, target, tolerance, told)
        if not now.moving:
            raise FailedPrecondition(f"No student of {name!r} is on its way; name a version to begin with.", skill=name)
        return machine.promote(now, live.seen(), told)

    def report(self, name: str) -> Report:
        """Where a rollout is. Raises SkillNotFound, and FailedPrecondition where it does not move by itself."""
        self._check_rolls(name)
        live = self._live.get(name) or Live(self.config)
        seen = live.seen()
        verdict = machine.judge(live.rollout, seen, self.config)
        return Report(name, live.rollout, verdict, seen, self.teacher_share(name), self.frozen, tuple(live.alarms))

    async def events(self, name: str, most: int, after: tuple[int, str] | None = None) -> list[RolloutEvent]:
        """A skill's steps, newest first. Raises SkillNotFound, Unavailable."""
        assert self._book is not None, "of() comes first"
        self._book.get(name)
        return await asyncio.to_thread(self._table.events, name, most, after)

    def _check_rolls(self, name: str) -> None:
        assert self._book is not None, "of() comes first"
        skill = self._book.get(name)
        if not self._book.rolls(name):
            why = (
                f'its rollout is set to "{skill.rollout}" in the configuration'
                if skill.rollout != AUTO
                else "it has no teacher to compare with"
            )
            why = "student_model answers for it" if skill.student_model else why
            raise FailedPrecondition(f"The rollout of {name!r} does not move by itself: {why}.", skill=name)


def promised(student: Student, bar: float, margin: float) -> tuple[float, float]:
    """How often a student has to agree with its teacher where it delivers, and by how much it may fall short.

    What it was measured to do on held-out rows, and not less than the bar under its ceiling. The measure has a sampling error, of which one
    standard deviation is added to the margin.
    """
    ceiling = student.calibration.ceiling if student.calibration is not None else 1.0
    measured = student.measured
    target = max(bar * ceiling if measured is None else measured, bar * ceiling)
    rows = student.metrics.get("held_out_rows", 0.0) * student.metrics.get("local_share", 1.0)
    error = (target * (1.0 - target) / rows) ** 0.5 if rows > 0 else 0.0
    return target, margin + min(error, _MOST_ERROR)
