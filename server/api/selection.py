"""Which model answers a call: the one that it names, else the task's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.core import Task
from server.errors import InvalidArgument, ModelNotLoaded
from server.runtime.runtime import Runtime


class Selection:
    """`defaults`: the model of a task for calls that name none."""

    def __init__(self, runtime: Runtime, defaults: Mapping[Task, str]) -> None:
        self._runtime = runtime
        self._defaults = defaults
        self._only: dict[Task, str] = {}  # what `name` found, until a model changes
        runtime.subscribe(lambda _status: self._only.clear())

    def pick(self, selector: Any, task: Task) -> tuple[str, str | None]:
        """Name and version of the model that a `ModelSelector` means. Raises InvalidArgument, ModelNotLoaded."""
        if selector.version and not selector.name:
            raise InvalidArgument("a version without a name; expected model.name too.", field="model.name")
        return selector.name or self.default(task), selector.version or None

    def default(self, task: Task) -> str:
        """The configured default, else the only loaded model that is made for the task, else the only one that does it.

        Raises InvalidArgument where there are several, ModelNotLoaded where there is none.
        """
        known = self._defaults.get(task) or self._only.get(task)
        if known is not None:
            return known
        able = self._runtime.models_for(task)
        made = [name for name in able if self._runtime.manifest(name).task is task]
        choice = made or able
        if len(choice) == 1:
            self._only[task] = choice[0]
            return choice[0]
        if not choice:
            message = f"no loaded model does {task.value}; load one with ModelService.LoadModel, or see what there is with ListModels."
            raise ModelNotLoaded(message, task=task.value)
        names = ", ".join(repr(name) for name in choice[:10])
        raise InvalidArgument(
            f"several loaded models do {task.value}: {names}. Name one in model.name, or configure models.default.", field="model.name"
        )
