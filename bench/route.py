"""`make bench-route`: measures every bar of routing in one run and prints a row for each.

It writes bench/results/route.json and exits 0 however it went. The first run installs LiteLLM into an environment of its own, which stays
under build/bench. Data that only some machines have (SHARED of bench/harness.py) is named by the rows that miss it.

`--only NAME` (repeatable) measures one; the rows of the others stay as they were, each with the commit it was measured on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from bench.harness import Row, run_measures

# Name -> module and function of bench.measures, imported when they are measured; what each bar asks stands beside it there.
_MEASURES = {
    "tasks": ("routing_tasks", "tasks"),
    "routing": ("routing_difficulty", "routing"),
    "quality": ("routing_quality", "quality"),
    "scoring": ("routing_quality", "scoring"),
    "overhead": ("routing_overhead", "overhead"),
    "budget": ("routing_budget", "budget"),
    "faults": ("routing_faults", "faults"),
    "secrets": ("routing_faults", "secrets"),
    "reservation": ("routing_budget", "reservation"),
    "ensembles": ("routing_ensembles", "ensembles"),
}


def _later(module: str, function: str) -> Callable[[], Row]:
    def measure() -> Row:
        row = getattr(importlib.import_module(f"bench.measures.{module}"), function)()
        assert isinstance(row, Row)
        return row

    return measure


def main() -> None:
    """See the module."""
    run_measures(
        "route",
        {name: (f"see bench/measures/{module}.py", _later(module, function)) for name, (module, function) in _MEASURES.items()},
        __doc__,
    )


if __name__ == "__main__":
    main()
