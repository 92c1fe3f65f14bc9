"""What is seen of a student during a stage of its rollout: sums, so that what several servers saw can be added up. Pure; no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Comparisons of one stretch, and stretches that are remembered: a change is looked for in the last 200 or so comparisons.
BLOCK, MOST_BLOCKS = 4, 48
# The same for answers, of which there are many more.
STRETCH, MOST_STRETCHES = 20, 32
_MOST_LABELS = 256
OTHER = "\0other"
# Latencies are counted in classes whose ends grow by a quarter, from 0.1 ms on.
_FIRST_S, _GROWTH = 1e-4, 1.25
_MOST_LATENCIES = 72


@dataclass(slots=True)
class Evidence:
    """Sums of one stage, of one server or of all.

    `compared` of the student's answers that would be delivered had the teacher's beside them, `agreed` were the same. `blocks`: the newest
    comparisons in stretches [time_ms, compared, agreed]; `forgotten` older stretches were dropped. `paired`: requests of the champion's
    in whose shadow the student ran, and that one of both at least would have delivered; of those the student was `better`, or `worse`: the
    champion's would have been right by the teacher and the student's not. Where both say the same nobody is asked, and it is neither.
    `answers` were asked of the student, `failed` of them came to nothing, `slow` took too long; `stretches`: [time_ms, answers, failed,
    slow]. `champion_blocks` are of the champion beside it. `labels` and `qualities` count what the student said, and how sure it was.
    """

    requests: int = 0
    compared: int = 0
    agreed: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    forgotten: int = 0
    better: int = 0
    worse: int = 0
    paired: int = 0
    answers: int = 0
    failed: int = 0
    slow: int = 0
    below: int = 0
    stretches: list[list[int]] = field(default_factory=list)
    stretches_forgotten: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    qualities: dict[str, int] = field(default_factory=dict)
    student_s: dict[str, int] = field(default_factory=dict)
    teacher_s: dict[str, int] = field(default_factory=dict)
    thumbs_up: int = 0
    thumbs_down: int = 0
    corrections: int = 0
    champion_blocks: list[list[int]] = field(default_factory=list)
    champion_forgotten: int = 0

    def compare(self, agreed: bool, now_ms: int = 0) -> None:
        """Counts an answer that would be delivered and the teacher's beside it."""
        self.compared += 1
        self.agreed += agreed
        self.forgotten += _add(self.blocks, agreed, now_ms)

    def compare_champion(self, agreed: bool, now_ms: int = 0) -> None:
        """The same of the champion's answer."""
        self.champion_forgotten += _add(self.champion_blocks, agreed, now_ms)

    def pair(self, difference: int) -> None:
        """Counts a pair of answers: 1, the student's was better, -1, worse, 0, neither."""
        self.paired += 1
        self.better += difference > 0
        self.worse += difference < 0

    def correct(self, agreed: bool) -> None:
        """A person says that a comparison counted was the other way round; `agreed`: what holds now. Which stretch it was in is not known:
        it is taken to be the newest that it can have been in.
        """
        self.agreed += 1 if agreed else -1
        for block in reversed(self.blocks):
            if (block[2] < block[1]) if agreed else (block[2] > 0):
                block[2] += 1 if agreed else -1
                break

    def answer(
        self, *, failed: bool = False, slow: bool = False, below: bool = False, seconds: float | None = None, now_ms: int = 0
    ) -> None:
        """Counts an answer that the student was asked for."""
        self.answers += 1
        self.failed += failed
        self.slow += slow
        self.below += below
        if not self.stretches or self.stretches[-1][1] >= STRETCH:
            self.stretches.append([now_ms, 0, 0, 0])
            if len(self.stretches) > MOST_STRETCHES:
                del self.stretches[0]
                self.stretches_forgotten += 1
        newest = self.stretches[-1]
        newest[1] += 1
        newest[2] += failed
        newest[3] += slow
        if seconds is not None:
            _count(self.student_s, str(latency_class(seconds)))

    def say(self, label: str | None, quality: float | None) -> None:
        """Counts what the student said, and how sure it was."""
        if label is not None:
            _count(self.labels, label)
        if quality is not None:
            _count(self.qualities, str(min(int(quality * 10), 9)))

    def teacher_took(self, seconds: float) -> None:
        """Counts how long the teacher took."""
        _count(self.teacher_s, str(latency_class(seconds)))

    def thumb(self, up: bool) -> None:
        """Counts a thumb for an answer of the student."""
        self.thumbs_up += up
        self.thumbs_down += not up

    def to_json(self) -> dict[str, Any]:
        """Plain values, without what is empty."""
        return {name: value for name in _NAMES if (value := getattr(self, name))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evidence:
        """What `to_json` gave; unknown names fall away."""
        return cls(**{name: data[name] for name in _NAMES if name in data})


_NAMES = tuple(Evidence.__dataclass_fields__)
_NUMBERS = tuple(name for name, one in Evidence.__dataclass_fields__.items() if one.type == "int")
_COUNTS = ("labels", "qualities", "student_s", "teacher_s")
_STRETCHES = ("blocks", "stretches", "champion_blocks")


def total(parts: Iterable[Evidence]) -> Evidence:
    """The sums of several servers; stretches in the order of time."""
    whole = Evidence()
    for part in parts:
        for name in _NUMBERS:
            setattr(whole, name, getattr(whole, name) + getattr(part, name))
        for name in _COUNTS:
            counts = getattr(whole, name)
            for key, count in getattr(part, name).items():
                counts[key] = counts.get(key, 0) + count
        for name in _STRETCHES:
            getattr(whole, name).extend(list(stretch) for stretch in getattr(part, name))
    for name in _STRETCHES:
        getattr(whole, name).sort(key=_time)
    return whole


def latency_class(seconds: float) -> int:
    """Which class a latency falls into."""
    from math import log

    return 0 if seconds <= _FIRST_S else min(int(log(seconds / _FIRST_S) / log(_GROWTH)) + 1, _MOST_LATENCIES)


def latency_quantile(counts: Mapping[str, int], share: float) -> float | None:
    """Seconds that `share` of the latencies do not exceed, by the upper end of their class; None without any."""
    whole = sum(counts.values())
    if not whole:
        return None
    seen = 0
    for number in sorted(map(int, counts)):
        seen += counts[str(number)]
        if seen >= share * whole:
            break
    return float(_FIRST_S * _GROWTH**number)


def _count(counts: dict[str, int], key: str) -> None:
    if key not in counts and len(counts) >= _MOST_LABELS:
        key = OTHER
    counts[key] = counts.get(key, 0) + 1


def _add(blocks: list[list[int]], agreed: bool, now_ms: int) -> int:
    """Counts a comparison in the newest stretch, or in a new one; returns how many stretches were forgotten for it."""
    forgotten = 0
    if not blocks or blocks[-1][1] >= BLOCK:
        blocks.append([now_ms, 0, 0])
        if len(blocks) > MOST_BLOCKS:
            del blocks[0]
            forgotten = 1
    blocks[-1][1] += 1
    blocks[-1][2] += agreed
    return forgotten


def _time(stretch: list[int]) -> int:
    return stretch[0]
