"""How far a student's rollout is, and when it goes on or back: a pure state machine. No clock, no I/O, no randomness.

    no student -> held          a new version -> shadow -> canary 10 -> 50 -> 80 -> full
                                          any of these -> rolled_back; the champion, or the teacher, goes on

What is tested is the share of answers *that would be delivered* in which the student agrees with its teacher. A teacher errs too, so nobody
agrees with it always: the measure is the student's own agreement on held-out rows, its `target`. The student goes on when the evidence
refutes "its share is at most target - tolerance", and back when it refutes "at least target - tolerance"; in between, it stays. The
tolerance is the margin of the configuration with the sampling error of the target. A small canary can do little harm: to enter a stage in
which it answers a share x, only target - tolerance / x has to be surpassed, so that all answers together lose no more than the tolerance.

A new version of a skill whose champion is at full goes through its own shadow and canary beside it, and is measured by it: it goes on
when the evidence refutes "it is right on fewer requests than the champion, by more than the tolerance". Where both say the same there is no
difference, whatever the teacher would say, so the teacher is asked for the others alone: a few dozen questions replace some hundred.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from server.routing.rollout_bounds import bounds, evidence_above, evidence_below, evidence_not_behind, evidence_of_change
from server.routing.rollout_evidence import Evidence, latency_quantile

HELD, SHADOW, CANARY, FULL, ROLLED_BACK = "held", "shadow", "canary", "full", "rolled_back"
# Stage and share of the requests in percent, in order.
LADDER = ((SHADOW, 0), (CANARY, 10), (CANARY, 50), (CANARY, 80), (FULL, 100))
AUTO = "auto"
# Whatever its teacher's speed, a student that takes less than this is not slow: seconds.
NEVER_SLOW_S = 0.25
_SLOW_SHARE = 0.05  # p95
_MOST_REFUSED = 64
_KEPT_CHAMPIONS = 2
# Of alpha: comparisons, failures, latency.
_OF_AGREEMENT, _OF_FAILURES, _OF_LATENCY = 0.5, 0.25, 0.25


class Rules(Protocol):
    """What the machine reads of server.settings.RolloutConfig."""

    @property
    def alpha(self) -> float: ...
    @property
    def margin(self) -> float: ...
    @property
    def min_comparisons(self) -> int: ...
    @property
    def max_error_share(self) -> float: ...


@dataclass(slots=True, frozen=True)
class Past:
    """What a student's earlier stages showed: sums that go on, and what its answers looked like, which later ones are measured by."""

    compared: int = 0
    agreed: int = 0
    blocks: int = 0
    stretches: int = 0
    better: int = 0
    worse: int = 0
    paired: int = 0
    labels: Mapping[str, int] = field(default_factory=dict)
    qualities: Mapping[str, int] = field(default_factory=dict)
    teacher_s: Mapping[str, int] = field(default_factory=dict)
    thumbs_up: int = 0
    thumbs_down: int = 0

    def after(self, seen: Evidence) -> Past:
        """With a stage's evidence."""
        return Past(
            self.compared + seen.compared,
            self.agreed + seen.agreed,
            self.blocks + seen.forgotten + len(seen.blocks),
            self.stretches + seen.stretches_forgotten + len(seen.stretches),
            self.better + seen.better,
            self.worse + seen.worse,
            self.paired + seen.paired,
            _sum(self.labels, seen.labels),
            _sum(self.qualities, seen.qualities),
            _sum(self.teacher_s, seen.teacher_s),
            self.thumbs_up + seen.thumbs_up,
            self.thumbs_down + seen.thumbs_down,
        )


@dataclass(slots=True, frozen=True)
class Rollout:
    """Where a skill's rollout is. Versions are those of the skill's students, as text; "" is none.

    `student` is at `stage` with `percent` of the requests; `champion` answers the others, where there is one besides; `former`: champions
    before, newest first; `refused`: rolled back, and not taken again unless told; `paused`: it stays whatever the evidence says. `epoch`
    numbers the stages: evidence is counted by it. `promises`: target and tolerance of versions that may come back.
    """

    stage: str = HELD
    percent: int = 0
    student: str = ""
    champion: str = ""
    former: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    paused: bool = False
    target: float = 0.0
    tolerance: float = 0.0
    past: Past = field(default_factory=Past)
    reason: str = ""
    epoch: int = 0
    promises: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def moving(self) -> bool:
        """Whether a student is on its way."""
        return self.stage in (SHADOW, CANARY)

    @property
    def serving(self) -> str:
        """The version that answers whoever is in no canary, or "" where the teacher does."""
        return self.student if self.stage == FULL else self.champion

    @property
    def versions(self) -> tuple[str, ...]:
        """Versions that have to be at hand."""
        return tuple(dict.fromkeys(one for one in (self.student if self.stage != ROLLED_BACK else "", self.champion, *self.former) if one))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rollout:
        """What `to_json` gave; unknown names fall away."""
        known: dict[str, Any] = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        told: Mapping[str, Any] = known.get("past", {})
        past = {name: value for name, value in told.items() if name in Past.__dataclass_fields__}
        more: dict[str, Any] = {name: tuple(known[name]) for name in ("former", "refused") if name in known}
        more["promises"] = {version: (float(one), float(two)) for version, (one, two) in known.get("promises", {}).items()}
        return cls(**{**known, "past": Past(**past), **more})


@dataclass(slots=True, frozen=True)
class Verdict:
    """What the evidence says. `step`: "promote", "rollback" or "stay"; the bounds are of the share that agrees, with all that was seen."""

    step: str
    reason: str
    compared: int = 0
    agreed: int = 0
    lower: float = 0.0
    upper: float = 1.0


# Steps. Each gives the rollout after it.


def begin(now: Rollout, version: str, target: float, tolerance: float, reason: str) -> Rollout:
    """A new version starts in the shadow; whoever is at full goes on as the champion. A student that was on its way is dropped."""
    after = replace(_next(now, SHADOW, 0, reason), student=version, champion=now.serving, past=Past(), paused=False)
    promises = {one: now.promises[one] for one in after.versions if one in now.promises} | {version: (target, tolerance)}
    return replace(after, target=target, tolerance=tolerance, promises=promises)


def promote(now: Rollout, seen: Evidence, reason: str) -> Rollout:
    """The next stage of the ladder."""
    assert now.moving, f"nothing is on its way in stage {now.stage}"
    stage, percent = LADDER[_rung(now) + 1]
    after = replace(_next(now, stage, percent, reason), past=now.past.after(seen))
    if stage != FULL:
        return after
    former = tuple(dict.fromkeys(one for one in (now.champion, *now.former) if one and one != now.student))
    return replace(after, champion="", former=former[:_KEPT_CHAMPIONS])


def roll_back(now: Rollout, reason: str, *, changed_inputs: bool = False) -> Rollout:
    """The student goes; the champion goes on at full, or one that was before it, or else the teacher alone. Students of before have not
    seen changed inputs either, so that the teacher answers those.
    """
    assert now.student and now.stage not in (HELD, ROLLED_BACK), f"nobody answers in stage {now.stage}"
    refused = (*(one for one in now.refused if one != now.student), now.student)[-_MOST_REFUSED:]
    back = now.champion or next((one for one in now.former if one not in refused and not changed_inputs), "")
    former = tuple(one for one in now.former if one not in (back, now.student))
    after = replace(_next(now, ROLLED_BACK, 0, reason), champion="", former=former, refused=refused, paused=False)
    if not back:
        return after
    target, tolerance = now.promises.get(back, (0.0, 0.0))
    return replace(after, stage=FULL, percent=100, student=back, past=Past(), target=target, tolerance=tolerance)


def drop_champion(now: Rollout, reason: str) -> Rollout:
    """The champion goes while a student is on its way, and the teacher answers for it; the student's stage goes on as it was."""
    assert now.moving and now.champion, "nobody else answers"
    refused = (*(one for one in now.refused if one != now.champion), now.champion)[-_MOST_REFUSED:]
    former = tuple(one for one in now.former if one != now.champion)
    return replace(now, champion="", former=former, refused=refused, reason=reason)


def hold(now: Rollout, reason: str) -> Rollout:
    """It stays where it is, whatever the evidence says."""
    return replace(now, paused=True, reason=reason)


def resume(now: Rollout, reason: str) -> Rollout:
    """The evidence decides again."""
    return replace(now, paused=False, reason=reason)


# What the evidence says.


def judge(now: Rollout, seen: Evidence, rules: Rules) -> Verdict:
    """What is to be done. Guards come before promotion; a student that is paused is still rolled back by nobody but a person."""
    if now.stage not in (SHADOW, CANARY, FULL) or not now.student:
        return Verdict("stay", now.reason)
    compared, agreed = now.past.compared + seen.compared, now.past.agreed + seen.agreed
    lower, upper = bounds(compared, agreed, rules.alpha)
    say = _Words(now, compared, agreed, lower, upper)
    bad = _failing(now, seen, rules) or _worse_than_promised(now, seen, rules, say) or _worse_than_champion(now, seen, rules)
    if bad:
        return say.verdict("rollback", bad)
    if now.stage == FULL:
        return say.verdict("stay", "at full; the teacher goes on being asked for some")
    share = LADDER[_rung(now) + 1][1] / 100
    if now.champion:
        return _beside_champion(now, seen, rules, share, say)
    if seen.compared < rules.min_comparisons:
        return say.verdict("stay", f"{seen.compared} of {rules.min_comparisons} comparisons that this stage needs")
    least = max(now.target - now.tolerance / share, 0.0)
    if evidence_above(compared, agreed, least, now.target) < 1.0 / rules.alpha:
        return say.verdict("stay", f"inconclusive: not yet shown to be above {least:.3f}, which the next stage asks")
    return say.verdict("promote", f"shown to be above {least:.3f}")


def _beside_champion(now: Rollout, seen: Evidence, rules: Rules, share: float, say: _Words) -> Verdict:
    """Whether a challenger goes on: by its answers in the shadow of the champion's."""
    if seen.paired < rules.min_comparisons:
        return say.verdict("stay", f"{seen.paired} of {rules.min_comparisons} answers beside the champion's that this stage needs")
    paired, better, worse = now.past.paired + seen.paired, now.past.better + seen.better, now.past.worse + seen.worse
    told = f"{worse} worse, {better} better, of {paired} beside the champion's"
    if evidence_not_behind(paired, better, worse, now.tolerance / share) < 1.0 / rules.alpha:
        return say.verdict("stay", f"inconclusive: not yet shown to be within {now.tolerance / share:.3f} of the champion: {told}")
    return say.verdict("promote", f"shown to be within {min(now.tolerance / share, 1.0):.3f} of the champion: {told}")


def alarming(now: Rollout, seen: Evidence, rules: Rules) -> str:
    """Why the student goes back, or "": what has to be known after every comparison, without the bounds that people read."""
    if now.stage not in (SHADOW, CANARY, FULL) or not now.student:
        return ""
    say = _Words(now, now.past.compared + seen.compared, now.past.agreed + seen.agreed)
    return _failing(now, seen, rules) or _worse_than_promised(now, seen, rules, say) or _worse_than_champion(now, seen, rules)


def champion_alarming(now: Rollout, seen: Evidence, rules: Rules) -> str:
    """Why the champion beside a student that is on its way goes, or ""."""
    target, tolerance = now.promises.get(now.champion, (0.0, 0.0))
    if not now.moving or not now.champion or target <= 0.0:
        return ""
    least = max(target - tolerance, 0.0)
    late = evidence_of_change([(n, s) for _, n, s in seen.champion_blocks], least, seen.champion_forgotten)
    if late < 1.0 / (_OF_AGREEMENT * rules.alpha):
        return ""
    n, s = sum(block[1] for block in seen.champion_blocks[-8:]), sum(block[2] for block in seen.champion_blocks[-8:])
    return f"the champion agrees with its teacher less than {least:.3f}: of the last {n} comparisons in {s}"


def floor(now: Rollout) -> float:
    """The share of agreement below which a student goes back."""
    return max(now.target - now.tolerance, 0.0)


def slow_after_s(teacher_s: Mapping[str, int], ratio: float) -> float | None:
    """Seconds after which a student's answer counts as slow: so many times the teacher's p95; None until that is known."""
    if sum(teacher_s.values()) < 20:
        return None
    return max((latency_quantile(teacher_s, 0.95) or 0.0) * ratio, NEVER_SLOW_S)


@dataclass(slots=True, frozen=True)
class _Words:
    now: Rollout
    compared: int
    agreed: int
    lower: float = 0.0
    upper: float = 1.0

    @property
    def share(self) -> str:
        return f"{self.agreed} of {self.compared}"

    def verdict(self, step: str, reason: str) -> Verdict:
        return Verdict(
            step, f"{reason} ({self.share} agree, target {self.now.target:.3f})", self.compared, self.agreed, self.lower, self.upper
        )


def _worse_than_promised(now: Rollout, seen: Evidence, rules: Rules, say: _Words) -> str:
    least = floor(now)
    whole = evidence_below(say.compared, say.agreed, least)
    late = evidence_of_change([(n, s) for _, n, s in seen.blocks], least, now.past.blocks + seen.forgotten)
    if 0.5 * whole + 0.5 * late < 1.0 / (_OF_AGREEMENT * rules.alpha):
        return ""
    n, s = sum(block[1] for block in seen.blocks[-8:]), sum(block[2] for block in seen.blocks[-8:])
    return f"it agrees with its teacher less than {least:.3f}: of the last {n} comparisons in {s}"


def _worse_than_champion(now: Rollout, seen: Evidence, rules: Rules) -> str:
    """By the sign test of paired answers, where the difference is more than is tolerated."""
    better, worse = now.past.better + seen.better, now.past.worse + seen.worse
    paired = now.past.paired + seen.paired
    if not now.champion or worse - better <= now.tolerance * paired:
        return ""
    if evidence_below(better + worse, better, 0.5) < 1.0 / (_OF_AGREEMENT * rules.alpha):
        return ""
    return f"it is worse than the champion: {worse} answers for {better}, of {paired}"


def _failing(now: Rollout, seen: Evidence, rules: Rules) -> str:
    first = now.past.stretches + seen.stretches_forgotten
    for place, name, share, part in (
        (2, "fail", rules.max_error_share, _OF_FAILURES),
        (3, "take too long", _SLOW_SHARE, _OF_LATENCY),
    ):
        bad = sum(stretch[place] for stretch in seen.stretches)
        if not bad:
            continue
        blocks = [(stretch[1], stretch[1] - stretch[place]) for stretch in seen.stretches]
        if evidence_of_change(blocks, 1.0 - share, first) >= 1.0 / (part * rules.alpha):
            newest = seen.stretches[-4:]
            n, of = sum(stretch[place] for stretch in newest), sum(stretch[1] for stretch in newest)
            return f"its answers {name}: {n} of the last {of}, at most {share:.0%} may"
    return ""


def _rung(now: Rollout) -> int:
    return LADDER.index((now.stage, now.percent))


def _next(now: Rollout, stage: str, percent: int, reason: str) -> Rollout:
    return replace(now, stage=stage, percent=percent, reason=reason, epoch=now.epoch + 1)


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in one.keys() | other.keys()}
