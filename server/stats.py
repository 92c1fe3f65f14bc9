"""What became of skills' items since the process started: counts, money, quality and latency, in memory of constant size a skill."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

_STEP = 1.05  # a bucket's bound over the one before: quantiles are right to 2.5 %
_LEAST_S = 1e-4
_BUCKETS = 300  # up to 227 s; slower ones count as that


class ItemReport(NamedTuple):
    """One finished item of a skill; money in 1e-6 US dollars.

    `answered_by`: local, provider or nobody. `teacher_cost_micro_usd`: what the skill's teacher would have cost, where that is known: its
    price for the tokens of a local answer, or what it cost. `escalated`: an answer was below the bar or failed, and another candidate was
    asked. `tries`: answers asked of the candidate that delivered.
    """

    answered_by: str
    cost_micro_usd: int = 0
    seconds: float = 0.0
    quality: float | None = None
    teacher_cost_micro_usd: int | None = None
    escalated: bool = False
    tries: int = 1


@dataclass(slots=True)
class Latencies:
    """A histogram whose buckets grow by 5 %."""

    counts: list[int] = field(default_factory=lambda: [0] * _BUCKETS)

    def add(self, seconds: float) -> None:
        """Counts one."""
        place = math.ceil(math.log(seconds / _LEAST_S, _STEP)) if seconds > _LEAST_S else 0
        self.counts[min(place, _BUCKETS - 1)] += 1

    def quantile(self, share: float) -> float | None:
        """Seconds that this share of the items took at most; None before the first."""
        total = sum(self.counts)
        if not total:
            return None
        before = itertools.accumulate(self.counts)
        place = next(place for place, counted in enumerate(before) if counted >= share * total and counted)
        return _LEAST_S * float(_STEP ** (place - 0.5 if place else 0))


@dataclass(slots=True)
class SkillStats:
    """Sums over the items of one skill, or of all. `known_teacher` items add up to `teacher_cost` of money."""

    requests: int = 0
    local: int = 0
    failed: int = 0
    escalated: int = 0
    second_tries: int = 0
    cost: int = 0
    provider_cost: int = 0  # of the items that a provider answered
    teacher_cost: int = 0
    known_teacher: int = 0
    quality_sum: float = 0.0
    quality_count: int = 0
    latencies: Latencies = field(default_factory=Latencies)

    def add(self, item: ItemReport) -> None:
        """Counts one item."""
        self.requests += 1
        self.local += item.answered_by == "local"
        self.failed += item.answered_by == "nobody"
        self.escalated += item.escalated
        self.second_tries += item.tries > 1
        self.cost += item.cost_micro_usd
        if item.answered_by == "provider":
            self.provider_cost += item.cost_micro_usd
        if item.teacher_cost_micro_usd is not None:
            self.teacher_cost += item.teacher_cost_micro_usd
            self.known_teacher += 1
        if item.quality is not None:
            self.quality_sum += item.quality
            self.quality_count += 1
        if item.answered_by != "nobody":
            self.latencies.add(item.seconds)

    @property
    def provider(self) -> int:
        """Items that providers answered."""
        return self.requests - self.local - self.failed

    @property
    def local_share(self) -> float | None:
        """Of the answered items, the share that local models answered; None before the first."""
        answered = self.local + self.provider
        return self.local / answered if answered else None

    @property
    def quality_mean(self) -> float | None:
        """Mean quality of the answers whose quality is known; None where it is of none."""
        return self.quality_sum / self.quality_count if self.quality_count else None

    @property
    def all_to_teacher(self) -> int | None:
        """What the answered items would have cost if the teacher had answered all; None where nothing says what it costs.

        Items whose teacher's cost is unknown are taken at the mean of the known ones, else at the mean of what providers cost.
        """
        answered = self.local + self.provider
        if self.known_teacher:
            unknown = max(0, answered - self.known_teacher)
            return self.teacher_cost + round(unknown * self.teacher_cost / self.known_teacher)
        return round(answered * self.provider_cost / self.provider) if self.provider else None

    @property
    def saved(self) -> int | None:
        """What was not paid because of local answers; below 0 where the route cost more than the teacher alone."""
        teacher = self.all_to_teacher
        return None if teacher is None else teacher - self.cost


class Stats:
    """All skills. For the event loop alone."""

    def __init__(self) -> None:
        self.skills: dict[str, SkillStats] = {}

    def add(self, skill: str, item: ItemReport) -> None:
        """Counts an item."""
        one = self.skills.get(skill)
        if one is None:
            one = self.skills[skill] = SkillStats()
        one.add(item)


def together(skills: Iterable[SkillStats]) -> SkillStats:
    """The sums over skills. Savings are each skill's own, so those of the total must be summed apart."""
    total = SkillStats()
    for one in skills:
        for name in ("requests", "local", "failed", "escalated", "second_tries", "cost", "provider_cost", "teacher_cost", "known_teacher"):
            setattr(total, name, getattr(total, name) + getattr(one, name))
        total.quality_sum += one.quality_sum
        total.quality_count += one.quality_count
        total.latencies.counts = [left + right for left, right in zip(total.latencies.counts, one.latencies.counts, strict=True)]
    return total
