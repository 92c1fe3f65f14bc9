"""`make bench-learn`: measures every bar of the learning loop in one run and prints a row for each.

It writes bench/results/learn.json and exits 0 however it went. Data that only some machines have (SHARED of bench/harness.py) is named by
the rows that miss it. The teacher of the flywheel is a SIMULATION, and its rows say so.

`--only NAME` (repeatable) measures one; the rows of the others stay as they were, each with the commit it was measured on.
"""

from __future__ import annotations

from bench.harness import run_modules

# Name -> module and function of bench.measures, imported when they are measured; what each bar asks stands beside it there.
_MEASURES = {
    "lossless": ("learn_lake", "lossless"),
    "recording": ("learn_lake", "recording"),
    "curation": ("learn_curation", "curation"),
    "erasure": ("learn_lake", "erasure"),
    "accuracy": ("learn_accuracy", "accuracy"),
    "few": ("learn_few", "few_labels"),
    "flywheel": ("learn_flywheel", "flywheel"),
    "bad_teacher": ("learn_flywheel", "bad_teacher"),
    "drift": ("learn_flywheel", "drift"),
    "safety": ("learn_safety", "safety"),
    "generation": ("learn_generation", "generation"),
    "encoders": ("learn_encoders", "encoders"),
    "resumption": ("learn_resumption", "resumption"),
}


def main() -> None:
    """See the module."""
    run_modules("learn", _MEASURES, __doc__)


if __name__ == "__main__":
    main()
