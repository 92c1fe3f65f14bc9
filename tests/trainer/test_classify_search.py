"""The search for hyperparameters: it finds, keeps to its budget, and goes on after a death."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="the trainer's extra is not installed")

from server.errors import Cancelled
from trainer.context import JobContext
from trainer.search import Range, search

SPACE = {"lr": Range(1e-5, 1e-1, log=True), "epochs": Range(1, 9, whole=True)}
FIRST = {"lr": 1e-2, "epochs": 2}


def hill(parameters: Mapping[str, Any], name: str) -> float:
    return -abs(float(parameters["epochs"]) - 6) - abs(float(parameters["lr"]) - 1e-3)


def test_it_begins_with_what_is_known_and_finds_better(tmp_path: Path) -> None:
    seen: list[Mapping[str, Any]] = []

    def watched(parameters: Mapping[str, Any], name: str) -> float:
        seen.append(parameters)
        return hill(parameters, name)

    found = search(watched, SPACE, JobContext("a", tmp_path), 60.0, first=FIRST, most=15)
    assert seen[0] == FIRST and found.trials == len(seen) == 15
    assert found.value > hill(FIRST, "") and isinstance(found.parameters["epochs"], int)


def test_a_budget_that_is_spent_begins_no_trial(tmp_path: Path) -> None:
    found = search(hill, SPACE, JobContext("a", tmp_path, deadline=0.0), 60.0, first=FIRST)
    assert (found.trials, found.parameters) == (0, {})


def test_a_trial_that_was_killed_is_begun_again_under_its_name(tmp_path: Path) -> None:
    names: list[tuple[str, Mapping[str, Any]]] = []

    def dies(parameters: Mapping[str, Any], name: str) -> float:
        names.append((name, parameters))
        if len(names) == 3:
            raise Cancelled("the trainer is gone")
        return hill(parameters, name)

    with pytest.raises(Cancelled):
        search(dies, SPACE, JobContext("a", tmp_path), 60.0, first=FIRST, most=5)
    found = search(dies, SPACE, JobContext("a", tmp_path), 60.0, first=FIRST, most=5)
    assert found.trials == 5 and len(names) == 6
    assert names[3] == names[2]
