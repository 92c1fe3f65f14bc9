"""A search for hyperparameters under a time budget, kept in the job's folder so that a killed job goes on with the trials it has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.context import JobContext


@dataclass(slots=True, frozen=True)
class Range:
    """What a parameter may be: from `low` to `high`, `log` by its logarithm; `whole` numbers alone where it counts something."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(slots=True, frozen=True)
class Found:
    """The best trial. `parameters` is empty where none was finished; `trials`: how many were."""

    parameters: Mapping[str, Any]
    value: float
    trials: int


def search(
    objective: Callable[[Mapping[str, Any], str], float],
    space: Mapping[str, Range],
    context: JobContext,
    budget_s: float,
    *,
    first: Mapping[str, Any],
    most: int = 30,
) -> Found:
    """Maximises `objective(parameters, name of the trial)` by TPE (Bergstra et al. 2011), beginning with `first`.

    No trial is begun that is unlikely to end within `budget_s`, by the longest so far; `most` trials end it too. Trials are in
    `search.log` of the job's folder: one that was killed is begun again, with its parameters and under its name, so that it finds its
    checkpoint. Raises what the objective raises.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    context.folder.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(context.folder / "search.log")))
    study = optuna.create_study(
        study_name="search",
        storage=storage,
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=context.seed, n_startup_trials=5),
    )
    for dead in study.get_trials(states=(TrialState.RUNNING,)):  # its trainer died
        study.enqueue_trial(dead.params, user_attrs={"name": dead.user_attrs.get("name", f"trial-{dead.number}")})
        study.tell(dead.number, state=TrialState.FAIL)
    if not study.get_trials():
        study.enqueue_trial(dict(first))
    begun = time.monotonic()
    longest = max((t.duration.total_seconds() for t in _finished(study) if t.duration), default=0.0)
    while len(_finished(study)) < most and time.monotonic() - begun + longest <= min(budget_s, context.left_s()):
        context.check()
        trial = study.ask()
        parameters = {name: _suggest(trial, name, allowed) for name, allowed in space.items()}
        name = trial.user_attrs.get("name") or f"trial-{trial.number}"
        trial.set_user_attr("name", name)
        start = time.monotonic()
        value = objective(parameters, name)
        study.tell(trial, value)
        longest = max(longest, time.monotonic() - start)
        context.metric("search/value", len(_finished(study)), value)
        context.progress("search", len(_finished(study)), most)
    done = _finished(study)
    if not done:
        return Found({}, float("-inf"), 0)
    return Found(dict(study.best_trial.params), float(study.best_value), len(done))


def _suggest(trial: Any, name: str, allowed: Range) -> float | int:
    if allowed.whole:
        return int(trial.suggest_int(name, int(allowed.low), int(allowed.high), log=allowed.log))
    return float(trial.suggest_float(name, allowed.low, allowed.high, log=allowed.log))


def _finished(study: Any) -> list[Any]:
    from optuna.trial import TrialState

    return list(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
