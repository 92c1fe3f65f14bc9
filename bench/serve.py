"""`make bench-serve`: measures every bar of serving in one run and prints a row for each.

It writes bench/results/serve.json and exits 0 however it went.

`--only NAME` (repeatable) measures one; the rows of the others stay as they were, each with the commit it was measured on.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.harness import Row, run_measures
from bench.measures import life, speed, start, truth

MEASURES: dict[str, tuple[str, Callable[[], Row]]] = {
    "start": (start.BAR, start.measure),
    "parity": (truth.PARITY, truth.parity),
    "invisible": (truth.INVISIBLE, truth.invisible),
    "throughput": (speed.THROUGHPUT, speed.throughput),
    "latency": (speed.LATENCY, speed.latency),
    "overload": (life.OVERLOAD, life.overload),
    "drain": (life.DRAIN, life.drain),
    "swap": (life.SWAP, life.swap),
    "native": (truth.NATIVE, truth.native),
    "hostile": (truth.HOSTILE, truth.hostile),
    "loop": (truth.LOOP, truth.loop),
}


def main() -> None:
    run_measures("serve", MEASURES, __doc__)


if __name__ == "__main__":
    main()
