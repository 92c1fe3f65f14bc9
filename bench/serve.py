"""`make bench-serve`: measures every bar of serving in one run and prints a row for each.

It writes bench/results/serve.json and exits 0 however it went.

`--only NAME` (repeatable) measures one; the rows of the others stay as they were, each with the commit it was measured on.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable

from bench.harness import ROOT, Row, conditions, write_results
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=list(MEASURES), help="measure this bar alone; may be repeated")
    chosen = parser.parse_args().only or list(MEASURES)
    seen = conditions()
    print(f"on {seen['cpu']}, {seen['cores']} cores, kernels {seen['kernels'].get('isa')}, commit {seen['commit']}", flush=True)
    rows: list[Row] = []
    for name in chosen:
        begun = time.perf_counter()
        try:
            row = MEASURES[name][1]()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            row = Row(name, MEASURES[name][0], f"could not be measured: {error}", False)
        rows.append(row)
        print(f"{row.line()}   [{time.perf_counter() - begun:.0f} s]", flush=True)
        write_results(ROOT / "bench" / "results" / "serve.json", rows, seen)
    print(f"{sum(r.met for r in rows)} of {len(rows)} bars met; bench/results/serve.json has the figures")


if __name__ == "__main__":
    main()
