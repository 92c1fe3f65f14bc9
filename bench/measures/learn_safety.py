"""Bar `safety`: a bad student never passes its canary, one that goes bad at full is back within 300 requests, flipped thumbs cost little.

Thousands of SIMULATED lives (bench/rollout_simulation.py) under the server's own state machine, evidence and watch, with its defaults.
UNDERSTUDY_SAFETY_RUNS changes how many.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from bench.harness import Row, part, row_of
from bench.rollout_simulation import Life, World, agreement, challenge, live_one

RUNS = int(os.environ.get("UNDERSTUDY_SAFETY_RUNS", "1000"))
FEW = max(RUNS // 10, 20)
LONGEST, CALM = 2000, 2000  # requests on the way to full, and at full
BAD_FROM, AFTER = 600, 600  # after the first requests at full, which are compared oftener
GOOD = World(teacher=0.95, student=0.95)
PROMISED = agreement(GOOD.teacher, GOOD.student)
BAR = (
    f"SIMULATED, {RUNS} seeded lives: a student 10 points worse than promised passes its canary in <= 5 %; one that goes bad at full is "
    "back within 300 requests; a good one is taken back in <= 5 %; 10 % flipped thumbs cost < 1 point"
)


def safety() -> Row:
    """See the module."""
    began = time.monotonic()
    bad = [live_one(World(student=0.85, promised=PROMISED), seed, LONGEST, to_full=True) for seed in range(RUNS)]
    passed = _share(bad, lambda life: life.full_at is not None)
    behind = _share([challenge(seed, behind=0.1, requests=LONGEST) for seed in range(RUNS)], lambda life: life.full_at is not None)
    wrong, half, some = _fallen(0.0, RUNS), _fallen(0.5, RUNS), _fallen(0.7, FEW)
    good = [live_one(GOOD, seed, LONGEST, to_full=True) for seed in range(FEW)]
    calm = [live_one(GOOD, seed, CALM, full=True) for seed in range(FEW)]
    poisoned = [live_one(World(feedback=0.3, flipped=0.1), seed, CALM, full=True) for seed in range(FEW)]
    lost = (sum(one.back_at is not None for one in (*good, *calm))) / (2 * FEW)
    cost = 100 * (_right(calm) - _right(poisoned))
    reached = sorted(one.full_at for one in good if one.full_at is not None)
    asked = sum(one.full_asked for one in calm) / max(sum(one.full_requests for one in calm), 1)
    parts = [
        part("bad ones that passed the canary", "<= 0.05", passed, passed <= 0.05, runs=RUNS),
        part("challengers 10 points behind that took the champion's place", "<= 0.05", behind, behind <= 0.05, runs=RUNS),
        part("all wrong: back within 300", ">= 0.95", _in_time(wrong), _in_time(wrong) >= 0.95, median=_median(wrong), runs=RUNS),
        part("half wrong: back within 300", ">= 0.95", _in_time(half), _in_time(half) >= 0.95, median=_median(half), runs=RUNS),
        part("good ones taken back", "<= 0.05", lost, lost <= 0.05, runs=2 * FEW),
        part("cost of flipped thumbs, points", "< 1", round(cost, 3), cost < 1.0, runs=FEW),
        part("three in ten wrong: back within 300", "told", _in_time(some), True, median=_median(some), runs=FEW),
        part("requests to full, median", "told", reached[len(reached) // 2] if reached else None, True, reached=len(reached) / FEW),
        part("teacher asked beside, at full", "told", round(asked, 4), True),
        part("seconds", "told", round(time.monotonic() - began), True),
    ]
    return row_of("safety", BAR, parts)


def _fallen(right: float, runs: int) -> list[Life]:
    """Students that are right with this chance alone from some time after they reached full, as sure of themselves as before."""
    return [live_one(World(bad=right, bad_from=BAD_FROM), seed, BAD_FROM + AFTER, full=True) for seed in range(runs)]


def _in_time(lives: Sequence[Life]) -> float:
    return _share(lives, lambda life: life.back_at is not None and life.back_at <= BAD_FROM + 300)


def _median(lives: Sequence[Life]) -> int | None:
    back = sorted(life.back_at - BAD_FROM for life in lives if life.back_at is not None)
    return back[len(back) // 2] if back else None


def _share(lives: Sequence[Life], true: Callable[[Life], bool]) -> float:
    return sum(map(true, lives)) / len(lives)


def _right(lives: Sequence[Life]) -> float:
    return sum(life.right for life in lives) / sum(life.requests for life in lives)
