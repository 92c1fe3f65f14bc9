"""A search for a better recipe of a student that writes: short trainings, judged by their loss on the watched rows."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainer.context import JobContext
from trainer.generation.base import GeneratorBase, load_torch
from trainer.generation.material import Material
from trainer.generation.recipe import Recipe
from trainer.search import Range, search

# Most trials, where the job's spec gives no other number: one takes minutes where an encoder's takes seconds.
SEARCHED = 12
_WORST = -1e6  # of a training that came to nothing
_TIMES = 6.0  # how far a rate may be from the recipe's, either way


def space_of(recipe: Recipe, rank_limit: int) -> dict[str, Range]:
    """What a search may change. Fewer epochs than the recipe's are tried, more are not: the best weights on the way are kept anyway."""
    most = min(recipe.rate * _TIMES, max(recipe.rate, 1.0))
    found = {"rate": Range(recipe.rate / _TIMES, most, log=True), "epochs": Range(recipe.epochs / 2, recipe.epochs)}
    if recipe.method == "lora":
        found["rank"] = Range(min(4, recipe.rank), max(rank_limit, recipe.rank), log=True, whole=True)
    return found


def searched(
    base: GeneratorBase, recipe: Recipe, material: Material, context: JobContext, spec: Mapping[str, Any], rank_limit: int, reserve_s: float
) -> Recipe:
    """The recipe with what the trials found better, within half of the time that is left after `reserve_s`.

    `spec` may give "trials", the most of them. Each trial's curves are under its name. Raises Cancelled.
    """
    from trainer.generation.student import make_student
    from trainer.generation.tune import fine_tune

    if not material.watched:
        context.log("no search: there are too few rows to watch some of them")
        return recipe

    def loss(parameters: Mapping[str, Any], name: str) -> float:
        name = f"{recipe.method}-{name}"
        own = replace(
            context,
            folder=context.folder / name,
            metric=lambda curve, step, value: context.metric(f"{name}/{curve}", step, value),
            progress=lambda stage, done, total: context.progress(f"{name}/{stage}", done, total),
        )
        tried = replace(recipe, **parameters)
        tuned = fine_tune(make_student(load_torch(base), tried), material.train, material.watched, tried, own, reserve_s)
        shutil.rmtree(own.folder, ignore_errors=True)
        return max(-tuned.loss, _WORST)

    space = space_of(recipe, rank_limit)
    left = max(0.0, context.left_s() - reserve_s)
    found = search(
        loss,
        space,
        replace(context, folder=context.folder / recipe.method),
        left / 2,
        first={name: getattr(recipe, name) for name in space},
        most=int(spec.get("trials") or SEARCHED),
    )
    context.log(f"search: {found.trials} trials, the least loss on the watched rows is {-found.value:.4f}")
    return replace(recipe, **found.parameters)
