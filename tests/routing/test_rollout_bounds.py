"""The tests that may be looked at after every answer: exact where they can be counted out, and kept over seeded runs."""

from __future__ import annotations

import math
import random

import pytest

from server.routing.rollout_bounds import (
    bounds,
    chi_square_tail,
    evidence_above,
    evidence_below,
    evidence_not_behind,
    evidence_of_change,
    same_distribution,
)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_evidence_has_an_expectation_of_one_at_the_edge_and_less_beyond(share: float, n: int) -> None:
    def expected(p: float) -> float:
        return sum(math.comb(n, s) * p**s * (1 - p) ** (n - s) * evidence_below(n, s, share, share * 0.9) for s in range(n + 1))

    assert expected(share) == pytest.approx(1.0, rel=1e-9)
    for more in (0.2, 0.6, 0.99):
        assert expected(share + more * (1 - share)) <= 1.0 + 1e-9, "the whole range above the edge is the hypothesis"
    assert expected(share / 2) > 1.0


def test_the_two_sides_mirror_each_other() -> None:
    assert evidence_above(20, 18, 0.6, 0.9) == pytest.approx(evidence_below(20, 2, 0.4, 0.1))
    low, high = bounds(50, 45, 0.05)
    other = bounds(50, 5, 0.05)
    assert (low, high) == pytest.approx((1 - other[1], 1 - other[0]), abs=1e-6) and low < 0.9 < high
    assert bounds(0, 0, 0.05) == (0.0, 1.0)


def test_bounds_are_where_the_evidence_reaches_one_over_alpha() -> None:
    low, high = bounds(200, 180, 0.05)
    assert evidence_above(200, 180, low) == pytest.approx(20, rel=1e-3) and evidence_below(200, 180, high) == pytest.approx(20, rel=1e-3)
    wide, narrow = bounds(100, 90, 0.05), bounds(10_000, 9_000, 0.05)
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 5


def test_a_true_share_leaves_its_sequence_no_oftener_than_alpha() -> None:
    left = 0
    for seed in range(200):
        dice = random.Random(seed)
        good = 0
        for n in range(1, 401):
            good += dice.random() < 0.9
            if evidence_below(n, good, 0.9) >= 20 or evidence_above(n, good, 0.9) >= 20:
                left += 1
                break
    assert left <= 200 * (0.05 + 0.05)


@pytest.mark.parametrize(("margin", "differing"), [(0.02, 0.1), (0.06, 0.08), (0.06, 0.5), (0.3, 0.4)])
def test_one_that_is_behind_by_the_margin_is_seldom_shown_not_to_be(margin: float, differing: float) -> None:
    shown = 0
    for seed in range(300):
        dice = random.Random(seed)
        better = worse = 0
        for n in range(1, 601):
            drawn = dice.random()
            better += drawn < (differing - margin) / 2
            worse += (differing - margin) / 2 <= drawn < differing
            if evidence_not_behind(n, better, worse, margin) >= 20:
                shown += 1
                break
    assert shown <= 300 * 0.05 + 3 * (300 * 0.05 * 0.95) ** 0.5


def test_an_equal_one_is_shown_to_keep_up_by_a_few_dozen_that_differ() -> None:
    assert evidence_not_behind(0, 0, 0, 0.06) == 1.0 and evidence_not_behind(1, 0, 1, 1.0) == math.inf
    assert evidence_not_behind(250, 10, 10, 0.06) >= 20, "20 of 250 had to be asked about"
    assert evidence_not_behind(250, 5, 20, 0.06) < 1.0


def test_a_change_is_found_that_the_whole_would_hide() -> None:
    before, after = [(4, 4)] * 40, [(4, 1)] * 5
    n, s = sum(a for a, _ in before + after), sum(b for _, b in before + after)
    assert evidence_below(n, s, 0.9) < 1, "40 good stretches speak for it"
    assert evidence_of_change(before + after, 0.9) > 40
    assert evidence_of_change(before[-10:] + after, 0.9, first=30) == pytest.approx(evidence_of_change(before + after, 0.9), rel=0.05)


def test_no_change_is_no_evidence() -> None:
    found = 0
    for seed in range(60):
        dice = random.Random(seed)
        blocks: list[tuple[int, int]] = []
        for _ in range(60):
            blocks.append((4, sum(dice.random() < 0.92 for _ in range(4))))
            if evidence_of_change(blocks, 0.9) >= 20:
                found += 1
                break
    assert found <= 3


def test_distributions_are_told_apart() -> None:
    dice = random.Random(1)

    def draw(n: int, weights: list[float]) -> dict[str, int]:
        counts: dict[str, int] = {}
        for one in dice.choices("abcdef", weights, k=n):
            counts[one] = counts.get(one, 0) + 1
        return counts

    usual = [5.0, 4.0, 3.0, 2.0, 1.0, 1.0]
    alike = [same_distribution(draw(1000, usual), draw(200, usual)) for _ in range(100)]
    assert sum(p < 0.05 for p in alike) <= 12 and min(alike) > 1e-5
    assert same_distribution(draw(1000, usual), draw(200, usual[::-1])) < 1e-9
    assert same_distribution({}, {"a": 3}) == 1.0 and same_distribution({"a": 5}, {"a": 100}) == 1.0


@pytest.mark.parametrize(
    ("statistic", "degrees", "tail"), [(3.841, 1, 0.05), (18.307, 10, 0.05), (29.588, 10, 0.001), (124.342, 100, 0.05)]
)
def test_the_tail_of_chi_square(statistic: float, degrees: int, tail: float) -> None:
    assert chi_square_tail(statistic, degrees) == pytest.approx(tail, rel=0.1)
