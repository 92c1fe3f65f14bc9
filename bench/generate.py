"""`make bench-generate`: measures every bar of generation in one run and prints a row for each.

It writes bench/results/generate.json and exits 0 however it went. The first run builds llama.cpp, trains a small LLaMA and pulls models,
which takes half an hour on two cores; all of it stays under build/bench.

`--only NAME` (repeatable) measures one; the rows of the others stay as they were, each with the commit it was measured on.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.harness import Row, run_measures
from bench.measures import generation_features as features
from bench.measures import generation_life as life
from bench.measures import generation_sampling as sampling
from bench.measures import generation_speed as speed
from bench.measures import generation_truth as truth

MEASURES: dict[str, tuple[str, Callable[[], Row]]] = {
    "correct": (truth.CORRECT, truth.correct),
    "speed": (speed.SPEED, speed.speed),
    "prefill": (speed.PREFILL, speed.prefill),
    "precision": (truth.PRECISION, truth.precision),
    "steadiness": (life.STEADINESS, life.steadiness),
    "adapters": (features.ADAPTERS, features.adapters),
    "prefix": (life.PREFIX, life.prefix),
    "structured": (features.STRUCTURED, features.structured),
    "sampling": (sampling.SAMPLING, sampling.sampling),
    "cancel": (life.CANCEL, life.cancel),
}


def main() -> None:
    run_measures("generate", MEASURES, __doc__)


if __name__ == "__main__":
    main()
