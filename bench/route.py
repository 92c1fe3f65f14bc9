"""`make bench-route`: measures every bar of routing in one run and prints a row for each.

It writes bench/results/route.json and exits 0 however it went. The first run installs LiteLLM into an environment of its own, which stays
under build/bench. Data that only some machines have (SHARED of bench/harness.py) is named by the rows that miss it.

`--only NAME` (repeatable) measures one; the rows of the others stay as they were, each with the commit it was measured on.
"""

from __future__ import annotations

from bench.harness import run_modules

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


def main() -> None:
    """See the module."""
    run_modules("route", _MEASURES, __doc__)


if __name__ == "__main__":
    main()
