"""One skill's rollout as one server sees it: what it counts, how often it asks the teacher, what it finds suspicious. On the event loop."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log

from server.errors import InvalidArgument
from server.routing import rollout as machine
from server.routing.candidates import Answer, Failure
from server.routing.items import Item
from server.routing.rollout import Rollout
from server.routing.rollout_agreement import same_words
from server.routing.rollout_evidence import Evidence, total
from server.routing.rollout_watch import WORDS, Reference, Watch
from server.routing.skills import Skill
from server.settings import RolloutConfig

# A student that went bad is found out by comparing one answer after the other. How many, follows from a CUSUM (Page 1954) of what the
# comparisons say for a fall of so many points below the promise: so many agreements as would take it below ENOUGH again, at most BURST. A
# teacher that errs disagrees now and then with the best student, and is not asked ten times for each of its errors.
FALL, ENOUGH, BURST = 0.3, 0.6, 6
_LEAST_DISAGREEMENT, _MOST_DISAGREEMENT = 0.02, 0.6
_SURE = 0.8  # a quality from which on nobody calls an answer unsure
# After a sign that something changed the teacher is asked beside this share of so many answers.
SUSPICIOUS_SHARE, SUSPICIOUS_REQUESTS = 0.5, 150
# Answers for which feedback is still taken up.
_MOST_REMEMBERED = 20_000
# Of the comparisons, so many may be overruled by people's corrections: whoever corrects may err, or mean harm.
_MOST_CORRECTED, _FEW_CORRECTED = 0.1, 3
_MOST_ALARMS = 8
# Comparisons of earlier stages after which a student was good once.
_PROVEN = 100


@dataclass(slots=True)
class Seen:
    """What became of one item: the answers of the rollout's student and of the teacher, where they were asked.

    `agreed`: whether the student's answer is the teacher's, None where it would not be delivered or is not counted; of the champion too.
    `pair`: how the student's answer compares with the champion's, in whose shadow it was; see Evidence.pair.
    """

    item: Item
    version: str
    mine: Answer | None
    failure: Failure | None
    teacher: Answer | None
    agreed: bool | None = None
    champion_agreed: bool | None = None
    pair: int | None = None


@dataclass(slots=True)
class _Remembered:
    text: str
    agreed: bool | None
    epoch: int
    delivered: bool
    corrected: bool = False


@dataclass(slots=True)
class Live:
    """`mine`: what this server saw in this stage; `others`: what the other servers wrote of it.

    `suspended`: why the student is not asked until the step that takes it back is written. `signs`: kinds of changes that nobody looked
    into yet.
    """

    config: RolloutConfig
    rollout: Rollout = field(default_factory=Rollout)
    revision: int = 0
    mine: Evidence = field(default_factory=Evidence)
    others: Evidence = field(default_factory=Evidence)
    dirty: bool = False
    suspended: str = ""
    champion_suspended: str = ""
    looking_until: float = 0.0  # monotonic; so long a suspension waits for what is found out about it
    cause: str = ""  # what was found out
    signs: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    _burst: int = 0
    _doubt: float = 0.0
    _suspicious_until: int = 0
    _watch: Watch | None = None
    _remembered: OrderedDict[str, _Remembered] = field(default_factory=OrderedDict)

    def seen(self) -> Evidence:
        """Of all servers."""
        return total((self.others, self.mine)) if self.others.requests else self.mine

    def become(self, rollout: Rollout, revision: int) -> None:
        """The rollout as it is from now on. A new stage is counted anew, a new student is watched anew."""
        if rollout.epoch != self.rollout.epoch or rollout.student != self.rollout.student:
            self.mine, self.others, self.dirty = Evidence(), Evidence(), False
            self._burst = self._suspicious_until = 0
            self._doubt = 0.0
            self.suspended = self.cause = ""
            past = rollout.past
            reference = Reference(past.labels, past.qualities, (past.thumbs_up, past.thumbs_down))
            self._watch = Watch(reference, self.config.drift_window, self.config.alpha)
            if rollout.student != self.rollout.student:
                self._remembered.clear()
        if rollout.champion != self.rollout.champion:
            self.champion_suspended = ""
        if rollout.paused:
            self.suspended = self.champion_suspended = self.cause = ""
        self.rollout, self.revision = rollout, revision

    # How often the teacher is asked.

    def share(self) -> float:
        """Share of the answers that students deliver for which the teacher is asked too, now."""
        now, config = self.rollout, self.config
        if self.suspended or now.stage not in (machine.SHADOW, machine.CANARY, machine.FULL):
            return 0.0
        if config.teacher_share <= 0 and not now.moving:
            return 0.0
        usual = config.teacher_share
        if now.paused:  # a person decides: asking more would be paid for nothing
            return usual
        if self._burst > 0:
            return 1.0
        if now.moving and now.percent < 80 and not now.champion:  # beside a champion, pairs tell
            usual = config.canary_share
        elif now.stage == machine.FULL and self.mine.requests < config.first_requests and not now.past.paired:
            usual = max(usual, config.first_share)
        return max(usual, SUSPICIOUS_SHARE) if self.mine.requests < self._suspicious_until else usual

    def drawn(self) -> None:
        """An answer was drawn for comparison."""
        self._burst = max(self._burst - 1, 0)

    # What is seen.

    def saw(self, skill: Skill, seen: Seen) -> bool:
        """One item, once all that was asked for it has come. True where the student, or the champion, has to go at once."""
        now, mine, now_ms = self.rollout, self.mine, _now_ms()
        if self.suspended or now.student != seen.version:
            return False
        mine.requests += 1
        self.dirty = True
        if seen.teacher is not None:
            mine.teacher_took(seen.teacher.elapsed_s)
        bad = self._answered(skill, seen, now_ms)
        if seen.champion_agreed is not None:
            mine.compare_champion(seen.champion_agreed, now_ms)
            if not seen.champion_agreed and not self.champion_suspended and not now.paused:
                self.champion_suspended = machine.champion_alarming(now, self.seen(), self.config)
        if seen.agreed is not None:
            mine.compare(seen.agreed, now_ms)
            self._doubted(seen.agreed, seen.mine.quality if seen.mine is not None else None)
            bad = bad or not seen.agreed
        if seen.pair is not None:
            mine.pair(seen.pair)
            bad = bad or seen.pair < 0
        self._remember(seen)
        return self._look(bad) or bool(self.champion_suspended)

    def _doubted(self, agreed: bool, quality: float | None) -> None:
        """After a comparison: what it says for a fall, and how many are to follow it at once. An answer that the student was not sure of
        says less where it was wrong.
        """
        unsure = 0.0 if quality is None or quality >= _SURE else 1.0 - quality
        usual = min(max(1.0 - self.rollout.target, unsure, _LEAST_DISAGREEMENT), _MOST_DISAGREEMENT)
        fallen = min(usual + FALL, 0.95)
        against = log((1.0 - usual) / (1.0 - fallen))
        self._doubt = max(self._doubt + (-against if agreed else log(fallen / usual)), 0.0)
        if not agreed and self._doubt > ENOUGH:
            self._burst = min(ceil((self._doubt - ENOUGH) / against), BURST)

    def _answered(self, skill: Skill, seen: Seen, now_ms: int) -> bool:
        """Counts the student's answer, or that there was none. True where that speaks against it."""
        mine, answer = self.mine, seen.mine
        if answer is not None:
            known = mine.teacher_s if sum(mine.teacher_s.values()) >= 20 else self.rollout.past.teacher_s
            limit = machine.slow_after_s(known, self.config.max_latency_ratio)
            slow = limit is not None and answer.elapsed_s > limit
            below = answer.quality is not None and answer.quality < skill.deliver_bar
            mine.answer(slow=slow, below=below, seconds=answer.elapsed_s, now_ms=now_ms)
            label = answer.reply.labels[0].name if answer.reply.labels else None
            mine.say(label, answer.quality)
            if self._watch is not None:
                self._suspect(self._watch.saw(label, answer.quality))
            return slow
        failure = seen.failure
        if failure is None or failure.skipped or isinstance(failure.error, InvalidArgument):
            return False
        mine.answer(failed=True, now_ms=now_ms)
        return True

    def _look(self, bad: bool) -> bool:
        """A student that is found to be bad is not asked again, before any database knows."""
        if not bad or self.rollout.paused:
            return False
        self.suspended = machine.alarming(self.rollout, self.seen(), self.config)
        return bool(self.suspended)

    def _suspect(self, kinds: Sequence[str]) -> None:
        """Has more answers compared for a while: they decide."""
        for kind in kinds:
            self._suspicious_until = self.mine.requests + SUSPICIOUS_REQUESTS
            self.signs.append(kind)
            self.alarm(WORDS[kind])

    @property
    def proven(self) -> bool:
        """Whether the student has kept its promise for a while: if it does not any more, something changed."""
        return self.rollout.stage == machine.FULL or self.rollout.past.compared >= _PROVEN

    def alarm(self, words: str) -> None:
        """Shows what a person may want to look at."""
        self.alarms = [*[one for one in self.alarms if one != words][-_MOST_ALARMS + 1 :], words]

    # What people say.

    def _remember(self, seen: Seen) -> None:
        if seen.mine is None:
            return
        outcome = seen.item.outcome
        delivered = outcome.decision.candidate.endswith(f"@{seen.version}") and outcome.decision.local
        self._remembered[outcome.interaction_id] = _Remembered(seen.mine.reply.text, seen.agreed, self.rollout.epoch, delivered)
        while len(self._remembered) > _MOST_REMEMBERED:
            self._remembered.popitem(last=False)

    def feedback(self, interaction_id: str, up: bool | None, correction: str | None) -> bool:
        """What a person says of an answer. A correction overrules the teacher where the two were compared, up to a share of all
        comparisons; whatever else is said is a sign, and signs decide nothing. True where the student has to go at once.
        """
        known = self._remembered.get(interaction_id)
        if known is None or self.suspended:
            return False
        bad = False
        if correction is not None:
            right = same_words("", known.text, correction)
            up = right if up is None else up
            bad = self._correct(known, right)
        if up is not None and known.delivered:
            self.mine.thumb(up)
            self.dirty = True
            if self._watch is not None:
                self._suspect(self._watch.thumb(up))
        return self._look(bad)

    def _correct(self, known: _Remembered, right: bool) -> bool:
        mine = self.mine
        if known.agreed is None or known.agreed == right or known.corrected or known.epoch != self.rollout.epoch:
            return False
        if mine.corrections >= _FEW_CORRECTED + _MOST_CORRECTED * mine.compared:
            return False
        known.agreed, known.corrected = right, True
        mine.corrections += 1
        mine.correct(right)
        self.dirty = True
        if not right:
            self._burst = BURST
        return not right


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
