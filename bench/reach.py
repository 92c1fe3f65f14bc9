"""`make bench-reach`: measures every bar of the ways in: REST, OpenAI SDKs, clients, console, keys. A row for each.

It writes bench/results/reach.json and exits 0 however it went. Bars that ask for behaviour are measured by the tests that hold it.

`--only NAME` (repeatable) measures one; the rows of the others stay as they were, each with the commit it was measured on.
"""

from __future__ import annotations

from bench.harness import run_modules

# Name -> module and function of bench.measures, imported when they are measured; what each bar asks stands beside it there.
_MEASURES = {
    "sdks": ("reach_tests", "sdks"),
    "overhead": ("reach_overhead", "overhead"),
    "conformance": ("reach_tests", "conformance"),
    "clients": ("reach_tests", "clients"),
    "console": ("reach_tests", "console"),
    "security": ("reach_tests", "security"),
    "start": ("reach_start", "start"),
}


def main() -> None:
    """See the module."""
    run_modules("reach", _MEASURES, __doc__)


if __name__ == "__main__":
    main()
