"""What an ensemble decides, as pure functions: who is asked next, when more answers could not change the result, whose answer it is.

No clock, no I/O, no randomness but what is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

LOW, HIGH = 0.51, 0.99  # weights are held within those of such accuracies: no member is worth nothing, none is beyond appeal
OPEN_CHOICES = 10  # between how many answers members are taken to choose where nobody lists them: many could be given, few are tempting
VOTE_THRESHOLD, TEXT_THRESHOLD = 0.5, 0.6
# What is assumed of a member that nobody has counted: whoever lists it thinks that it is right more often than not.
ASSUMED = (2.0, 1.0)
OBSERVATIONS = 20.0  # that a stated accuracy stands for where none are given
_MASS = 500.0  # observations that are kept of a member; older ones fade
_MEMBERS = 10_000
_GRID = 4096


class Strategy(StrEnum):
    """See understudy.v1.EnsembleStrategy."""

    BEST_OF_N = "best_of_n"
    WEIGHTED = "weighted"
    CONSENSUS = "consensus"
    SPECIALIST = "specialist"

    @property
    def votes(self) -> bool:
        """Whether answers are compared with each other."""
        return self in (Strategy.WEIGHTED, Strategy.CONSENSUS)


@dataclass(slots=True, frozen=True)
class Slot:
    """A call that may be made: the member's place in the request, which of its samples, whether it is free, what its answer counts."""

    member: int
    sample: int
    free: bool = True
    weight: float = 1.0


@dataclass(slots=True, frozen=True)
class Rule:
    """What a request asks of its answers.

    `needed`: with fewer answers there is no result. `enough`: with so many whose result reaches the threshold nobody else is asked; 0: once
    more could not change it. `threshold`: lowest confidence of a vote, or quality; `text_threshold`: the same for texts.
    """

    strategy: Strategy
    needed: int
    enough: int = 0
    wave_size: int = 0
    threshold: float = VOTE_THRESHOLD
    text_threshold: float = TEXT_THRESHOLD

    def bar(self, closed: bool) -> float:
        """The threshold for this kind of answers."""
        return self.threshold if closed else self.text_threshold


@dataclass(slots=True, frozen=True)
class Standing:
    """How it stands between two answers.

    `left`: weights of the calls that have not answered yet, those in flight first; `running`: how many of them are in flight. `total`:
    weight of those that have answered; `top`: of what leads; `lead`: over the next different answer. `confidence`: of what leads, None
    where nothing is known. `closed`: votes can be counted; texts are only alike.
    """

    answered: int
    left: tuple[float, ...]
    running: int = 0
    total: float = 0.0
    top: float = 0.0
    lead: float = 0.0
    confidence: float | None = None
    closed: bool = True


@dataclass(slots=True, frozen=True)
class Beta:
    """What is known of a member's share of wins: a Beta distribution's parameters."""

    wins: float
    losses: float

    @property
    def mean(self) -> float:
        """The expected share."""
        return self.wins / (self.wins + self.losses)


def weights_of(accuracies: Sequence[float], choices: int = OPEN_CHOICES) -> list[float]:
    """What each member's answer counts, for members that are right so often: log((k - 1) p / (1 - p)).

    The likeliest answer of independent members whose wrong answers are spread over the k - 1 other ones has the highest sum of these; for
    two choices they are Nitzan and Paroush's (1982) log(p / (1 - p)). Scaled down together where one of them is beyond `HIGH`'s.
    """
    odds = [math.log((choices - 1) * held / (1.0 - held)) for held in (min(max(p, 0.01), 0.99) for p in accuracies)]
    least, most = (math.log(bound / (1.0 - bound)) for bound in (LOW, HIGH))
    scale = min(1.0, most / max(odds)) if max(odds) > 0.0 else 1.0
    return [max(one * scale, least) for one in odds]


def accuracy_of(weight: float) -> float:
    """The accuracy whose log(p / (1 - p)) is a weight, for votes that take accuracies."""
    return 1.0 / (1.0 + math.exp(-weight))


def rule_of(strategy: Strategy, calls: int, quorum: int = 0, wave_size: int = 0, bars: tuple[float | None, float] = (None, 0.8)) -> Rule:
    """The rule for so many calls. `bars`: the threshold that was asked for, and the skill's own, which holds where qualities decide."""
    asked, skills_own = bars
    if not strategy.votes:
        return Rule(strategy, quorum or 1, quorum, wave_size, skills_own if asked is None else asked)
    vote, text = (VOTE_THRESHOLD, TEXT_THRESHOLD) if asked is None else (asked, asked)
    return Rule(strategy, quorum or calls // 2 + 1, quorum, wave_size, vote, text)


def ordered(slots: Sequence[Slot]) -> list[Slot]:
    """The calls in the order of asking: what is free first, then first samples, then what counts most, then as they were given."""
    return sorted(slots, key=lambda slot: (not slot.free, slot.sample, -slot.weight))


def settled(standing: Standing, threshold: float) -> bool:
    """Whether the calls that are left could change nothing, if all of them said the same other thing: neither who leads nor, by that, the

    share of the leading answer to less than the threshold.
    """
    rest = sum(standing.left)
    return standing.lead > rest + 1e-9 and standing.top >= threshold * (standing.total + rest) - 1e-9


def fewest(standing: Standing, threshold: float) -> int:
    """How many of the calls that are left could settle the vote, if all of them said what leads; all of them where none could."""
    for count in range(len(standing.left)):
        more = sum(standing.left[:count])
        after = replace(
            standing,
            left=standing.left[count:],
            total=standing.total + more,
            top=standing.top + more,
            lead=standing.lead + more,
        )
        if settled(after, threshold):
            return count
    return len(standing.left)


def next_wave(rule: Rule, standing: Standing, unasked: Sequence[Slot]) -> int:
    """How many calls to make at once; 1 at least."""
    assert unasked and not standing.running
    if rule.wave_size:
        return min(rule.wave_size, len(unasked))
    if rule.strategy is Strategy.SPECIALIST:
        return 1
    if rule.strategy is Strategy.BEST_OF_N:
        return max(1, sum(slot.free for slot in unasked))
    missing = (rule.enough or rule.needed) - standing.answered
    if not rule.enough:
        missing = max(missing, fewest(standing, rule.threshold) if standing.closed else len(unasked) if standing.answered else 0)
    return min(max(missing, 1), len(unasked))


def verdict(rule: Rule, standing: Standing) -> str:
    """Why nobody else is asked or waited for, or "" where more answers are of use."""
    if standing.answered + len(standing.left) < rule.needed:
        return f"{rule.needed} answers are needed, and {standing.answered + len(standing.left)} can come at most"
    reached = standing.confidence is not None and standing.confidence >= rule.bar(standing.closed) - 1e-9
    if not rule.strategy.votes:
        if rule.enough and standing.answered >= rule.enough and reached:
            return f"{rule.enough} answers were asked for, and the best reaches the threshold"
        return "the best answer reaches the threshold" if reached and not standing.running and not rule.enough else ""
    if standing.answered < rule.needed:
        return ""
    if rule.enough and reached and standing.lead > 0:
        return f"{standing.answered} answers are enough"
    if not standing.closed:
        return "the texts agree" if reached and standing.lead > 0 else ""
    rest = sum(standing.left)
    if (standing.top + rest) / max(standing.total + rest, 1e-9) < rule.threshold - 1e-9:
        return "no answer can reach the threshold any more"
    return "more answers could not change the vote" if standing.left and settled(standing, rule.threshold) else ""


def best(qualities: Sequence[float | None], standard: Sequence[bool], threshold: float) -> int | None:
    """The answer of best of n: the highest quality where it reaches the threshold, else the best of those that set the standard, else the

    highest quality. `standard`: answers of members whose answers are taken without a score. None: there is no quality to go by.
    """
    known = [(quality, -index) for index, quality in enumerate(qualities) if quality is not None]
    if known and max(known)[0] >= threshold:
        return -max(known)[1]
    taken = [(-1.0 if (quality := qualities[index]) is None else quality, -index) for index, sets in enumerate(standard) if sets]
    if taken:
        return -max(taken)[1]
    return -max(known)[1] if known else None


def best_probabilities(posteriors: Sequence[Beta]) -> list[float]:
    """How likely each member has the highest share of wins of all: sum over x of p_i(x) prod_{j != i} P_j(x), on a grid.

    Drawing by these is Thompson sampling with its probabilities known, which off-policy estimates need.
    """
    assert posteriors
    x = (np.arange(_GRID) + 0.5) / _GRID
    logs = np.array([(one.wins - 1.0) * np.log(x) + (one.losses - 1.0) * np.log1p(-x) for one in posteriors])
    density = np.exp(logs - logs.max(axis=1, keepdims=True))
    density /= density.sum(axis=1, keepdims=True)
    below = np.clip(np.cumsum(density, axis=1) - density / 2.0, 1e-300, 1.0)
    everybody = np.log(below).sum(axis=0)
    found = (density * np.exp(everybody - np.log(below))).sum(axis=1)
    return [float(one) for one in found / found.sum()]


def draw(probabilities: Sequence[float], chance: float) -> int:
    """The member that `chance`, uniform in [0, 1), falls on."""
    for index, probability in enumerate(probabilities):
        chance -= probability
        if chance < 0.0:
            return index
    return len(probabilities) - 1


class WinTable:
    """How often each member was right at each skill since the server started: by measured qualities, and by votes that had a result.

    A vote counts whoever is with the majority as right, so members that err together raise each other. For the event loop alone.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], Beta] = {}

    def posterior(self, skill: str, model: str, accuracy: float | None = None, observations: float = 0.0) -> Beta:
        """What was counted, over what the request says of the member, or over what is assumed of any."""
        counted = self._counts.get((skill, model), Beta(0.0, 0.0))
        wins, losses = ASSUMED
        if accuracy is not None:
            mass = observations or OBSERVATIONS
            wins, losses = accuracy * mass, (1.0 - accuracy) * mass
        return Beta(counted.wins + wins, counted.losses + losses)

    def count(self, skill: str, model: str, won: bool) -> None:
        """One more observation."""
        before = self._counts.pop((skill, model), Beta(0.0, 0.0))
        fade = 1.0 if before.wins + before.losses < _MASS else 1.0 - 1.0 / _MASS
        self._counts[skill, model] = Beta(before.wins * fade + won, before.losses * fade + (not won))
        if len(self._counts) > _MEMBERS:
            del self._counts[next(iter(self._counts))]
