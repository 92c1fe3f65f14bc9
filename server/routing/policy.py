"""The order of a route and who is passed over: pure functions of what is known of the candidates. No clock, no I/O."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from server.core import Preference

# What is assumed of a candidate that nobody has asked yet: seconds.
_UNKNOWN_LOCAL_S, _UNKNOWN_PROVIDER_S = 0.05, 1.0


@dataclass(slots=True, frozen=True)
class Facts:
    """What is known of a candidate before it is asked. `rank`: its place in the configuration: locals, the teacher, fallbacks."""

    name: str
    local: bool
    rank: int
    worst_cost_micro_usd: int | None = 0
    expected_s: float | None = None


def order(candidates: Sequence[Facts], preference: Preference) -> list[tuple[Facts, str]]:
    """The candidates that may answer, in the order of asking, each with the reason of its place."""
    if preference is Preference.LOCAL_ONLY:
        return [(one, "a local model; nothing else may answer") for one in _by_rank(candidates) if one.local]
    if preference is Preference.PROVIDER_ONLY:
        return [(one, "a provider; nothing else may answer") for one in _by_rank(candidates) if not one.local]
    if preference is Preference.BEST:
        ranked = sorted(candidates, key=lambda one: (one.local, one.rank))
        return [(one, "a local model, after those that set the standard" if one.local else _standard(one, ranked)) for one in ranked]
    if preference is Preference.CHEAPEST:
        ranked = sorted(candidates, key=lambda one: (_cost(one), one.rank))
        return [(one, _costs(one)) for one in ranked]
    if preference is Preference.FASTEST:
        ranked = sorted(candidates, key=lambda one: (_seconds(one), one.rank))
        return [(one, "nobody has timed it yet" if one.expected_s is None else f"it took {one.expected_s:.3g} s of late") for one in ranked]
    if preference is Preference.FREE_FIRST:
        ranked = sorted(candidates, key=lambda one: (one.worst_cost_micro_usd != 0, one.rank))
        return [(one, _costs(one)) for one in ranked]
    return [(one, "a local model" if one.local else _standard(one, candidates)) for one in _by_rank(candidates)]


def assigned(skill: str, who: str, percent: int) -> tuple[bool, float]:
    """Whether the student may answer in a canary of so many percent, and the probability of that assignment. Sticky: who, not when."""
    digest = hashlib.blake2b(f"{skill}\0{who}".encode(), digest_size=8).digest()
    inside = int.from_bytes(digest, "big") % 100 < percent
    return inside, percent / 100 if inside else 1 - percent / 100


def share_of_deadline(now: float, deadline: float | None, later: int) -> float | None:
    """The deadline of one hop: half of what is left while others could still be asked, so that a stalled one leaves time for the next."""
    if deadline is None or not later:
        return deadline
    return now + max(deadline - now, 0.0) / 2


def _by_rank(candidates: Sequence[Facts]) -> list[Facts]:
    return sorted(candidates, key=lambda one: (not one.local, one.rank))


def _standard(one: Facts, among: Sequence[Facts]) -> str:
    first = min((other.rank for other in among if not other.local), default=one.rank)
    return "it is the skill's teacher" if one.rank == first else "it stands in for the teacher"


def _cost(one: Facts) -> float:
    return math.inf if one.worst_cost_micro_usd is None else one.worst_cost_micro_usd


def _costs(one: Facts) -> str:
    cost = one.worst_cost_micro_usd
    return "it has no price" if cost is None else f"it costs {cost} millionths of a US dollar at most" if cost else "it costs nothing"


def _seconds(one: Facts) -> float:
    if one.expected_s is not None:
        return one.expected_s
    return _UNKNOWN_LOCAL_S if one.local else _UNKNOWN_PROVIDER_S
