"""Tests that may be looked at after every answer: evidence and confidence sequences for yes-or-no outcomes, from counts alone.

An e-process is a non-negative process that starts at 1 and, while the hypothesis holds, does not grow in expectation; the chance that it
ever reaches 1/alpha is alpha at most (Ville 1939; Howard, Ramdas, McAuliffe and Sekhon 2021, "Time-uniform, nonparametric,
nonasymptotic confidence sequences"). The product of likelihood ratios against a fixed share is one, and so is every mixture of such
products (Robbins 1970; Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting"). For outcomes of 0 and 1
it depends on nothing but how many there were of each: the sums of several servers add up.

A sum over starting points, each with a weight, and weights that sum to 1 at most, is an e-process too. It finds changes: whatever was
good before a student went bad does not count against the newest outcomes (Shin, Ramdas and Rinaldo 2023, "E-detectors").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

# Alternatives to "the share is at least p": the share is c * p. From "a little worse" to "nearly never".
_FACTORS = (0.995, 0.99, 0.98, 0.96, 0.93, 0.88, 0.8, 0.68, 0.5, 0.3, 0.1)
_LOG_FACTORS = tuple(math.log(c) for c in _FACTORS)
# Shares of the capital, below 2: nothing is lost at once.
_BETS = (0.1, 0.25, 0.5, 1.0, 1.4, 1.8)
_EPSILON = 1e-6
_BISECTIONS = 30
# sum over j >= 1 of 1 / j^1.2, rounded up: starting points may go on for ever.
_EXPONENT, _ZETA = 1.2, 5.592


def evidence_below(n: int, successes: int, share: float, likely: float | None = None) -> float:
    """An e-process against "outcomes succeed with probability `share` or more", from `n` outcomes of which so many succeeded.

    `likely`: an alternative, below `share`, that half of the weight is put on; it has to be chosen before the outcomes are seen.
    With p > share every ratio (p1/share)^x ((1-p1)/(1-share))^(1-x), p1 < share, has an expectation below 1, so the hypothesis is the whole
    range and not its end alone.
    """
    if n <= 0:
        return 1.0
    share = min(max(share, _EPSILON), 1.0 - _EPSILON)
    failures = n - successes
    grid = [successes * log + failures * gain for log, gain in zip(_LOG_FACTORS, _gains(share), strict=True)]
    found = _mean_exp(grid)
    if likely is None or not likely < share:
        return found
    likely = max(likely, _EPSILON)
    one = successes * math.log(likely / share) + failures * math.log((1.0 - likely) / (1.0 - share))
    return 0.5 * found + 0.5 * math.exp(min(one, 700.0))


def evidence_above(n: int, successes: int, share: float, likely: float | None = None) -> float:
    """An e-process against "outcomes succeed with probability `share` or less"; `likely` is above `share`."""
    return evidence_below(n, n - successes, 1.0 - share, None if likely is None else 1.0 - likely)


def evidence_not_behind(n: int, better: int, worse: int, margin: float) -> float:
    """An e-process against "what is compared is worse oftener than it is better, by the share `margin` of all pairs or more".

    A pair is 1 where it is better, 0 where it is worse, 1/2 where it is neither; the hypothesis is that their mean is (1 - margin) / 2 at
    most. The evidence is the capital of somebody who bets fixed shares on more (Waudby-Smith and Ramdas 2024), the mean over the shares.
    """
    if n <= 0:
        return 1.0
    if margin >= 1.0:
        return math.inf
    edge = (1.0 - margin) / 2.0
    neither = n - better - worse
    return _mean_exp(
        [
            better * math.log1p(bet * (1.0 - edge)) + worse * math.log1p(-bet * edge) + neither * math.log1p(bet * (0.5 - edge))
            for bet in _BETS
        ]
    )


def bounds(n: int, successes: int, alpha: float) -> tuple[float, float]:
    """Lower and upper end of the confidence sequence of the share; each end alone is passed with probability `alpha` at most, ever.

    The ends are where `evidence_above` and `evidence_below` reach 1/alpha, which are monotone in the share.
    """
    if n <= 0:
        return 0.0, 1.0
    return 1.0 - _upper(n, n - successes, alpha), _upper(n, successes, alpha)


def evidence_of_change(blocks: Sequence[tuple[int, int]], share: float, first: int = 0) -> float:
    """An e-process against "the share has always been `share` or more", which looks for a stretch of late in which it was not.

    `blocks`: outcomes and successes of consecutive stretches, the newest last; `first`: how many stretches were before those and are
    forgotten (forgetting can only lower it). Stretch j has the weight j^-1.2 / sum, counted from 1.
    """
    total, n, successes = 0.0, 0, 0
    for place in range(len(blocks) - 1, -1, -1):
        n += blocks[place][0]
        successes += blocks[place][1]
        total += evidence_below(n, successes, share) / ((first + place + 1) ** _EXPONENT * _ZETA)
    return total


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(chi-square with so many degrees of freedom > statistic), by Wilson and Hilferty's cube root (1931)."""
    if degrees <= 0 or statistic <= 0:
        return 1.0
    spread = 2.0 / (9.0 * degrees)
    z = ((statistic / degrees) ** (1.0 / 3.0) - (1.0 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2.0))


def same_distribution(before: dict[str, int], after: dict[str, int], least: float = 5.0) -> float:
    """p-value of "both counts come from one distribution" (Pearson's test); classes that are expected less than `least` times are one."""
    n, m = sum(before.values()), sum(after.values())
    if not n or not m:
        return 1.0
    cells: list[tuple[float, float]] = []
    rest_before = rest_after = 0.0
    for key in before.keys() | after.keys():
        x, y = float(before.get(key, 0)), float(after.get(key, 0))
        if (x + y) * min(n, m) / (n + m) < least:
            rest_before, rest_after = rest_before + x, rest_after + y
        else:
            cells.append((x, y))
    if rest_before + rest_after:
        cells.append((rest_before, rest_after))
    statistic = 0.0
    for x, y in cells:
        both = x + y
        for seen, expected in ((x, both * n / (n + m)), (y, both * m / (n + m))):
            statistic += (seen - expected) ** 2 / expected
    return chi_square_tail(statistic, len(cells) - 1)


@lru_cache(maxsize=4096)
def _gains(share: float) -> tuple[float, ...]:
    """log((1 - c share) / (1 - share)) for each factor."""
    return tuple(math.log((1.0 - c * share) / (1.0 - share)) for c in _FACTORS)


def _mean_exp(logs: Sequence[float]) -> float:
    top = max(logs)
    if top > 600.0:
        return math.inf
    return math.exp(top) * sum(math.exp(one - top) for one in logs) / len(logs)


def _upper(n: int, successes: int, alpha: float) -> float:
    """The smallest share that the outcomes speak against."""
    low, high = successes / n, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if evidence_below(n, successes, middle) >= 1.0 / alpha:
            high = middle
        else:
            low = middle
    return high
