"""The exported file and the present student, asked by the code that serves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from server.config import Config
from server.core import Call, Priority, Task
from server.errors import UnderstudyError
from server.runtime.encoder import EncoderModel
from server.runtime.loader import make_loader
from server.runtime.observer import NullObserver
from server.runtime.repository import Repository
from server.runtime.runtime import Runtime
from trainer.encoders.examples import EMBEDDING, ENTITIES, RANKING
from trainer.encoders.judge import Judge

_AT_ONCE = 256


async def served_output(config: Config, models: Path, name: str, version: str, judge: Judge) -> Any:
    """Loads a version of a model in the repository `models`, and gives its output on the judge's rows; see trainer.encoders.judge.

    An item that the model refuses counts as no answer: no entities, the lowest score. Raises ModelNotFound, ModelRejected,
    TaskNotSupported.
    """
    runtime = Runtime(Repository(models), make_loader(config.runtime, NullObserver()))
    try:
        await runtime.load(name, version)
        with runtime.use(name, _task_of(judge.task, runtime.manifest(name).task), version) as model:
            return await _ask(model, judge)
    finally:
        await runtime.close(drain=False)


def _task_of(task: str, of_model: Task) -> Task:
    """What the runtime is asked for: embedders do ranking and similarity too."""
    if task == ENTITIES:
        return Task.TOKEN_CLASSIFICATION
    return Task.TEXT_RANKING if task == RANKING and of_model is Task.TEXT_RANKING else Task.FEATURE_EXTRACTION


async def _ask(model: EncoderModel, judge: Judge) -> Any:
    call = Call("trainer", priority=Priority.BULK)
    rows = judge.rows
    if judge.task == ENTITIES:
        found: list[tuple[tuple[int, int, str], ...]] = []
        for start in range(0, len(rows), _AT_ONCE):
            results = await model.extract_entities([row.text for row in rows[start : start + _AT_ONCE]], call=call)
            for item in results.items:
                found.append(() if _failed(item) else tuple((one.start, one.end, one.label) for one in item))  # type: ignore[union-attr]
        return found
    if judge.task == EMBEDDING:
        return await _vectors(model, judge.queries, "query", call) @ (await _vectors(model, judge.documents, "passage", call)).T
    if judge.task == RANKING:
        return await _relevances(model, judge, call)
    first = await _vectors(model, [row.text for row in rows], "", call)
    second = await _vectors(model, [row.pair for row in rows], "", call)
    return (first * second).sum(axis=1)


async def _relevances(model: EncoderModel, judge: Judge, call: Call) -> Any:
    places: dict[str, list[int]] = {}
    for place, row in enumerate(judge.rows):
        places.setdefault(row.text, []).append(place)
    scores = np.full(len(judge.rows), -1.0)
    for query, chosen in places.items():
        results = await model.rerank(query, [judge.rows[place].pair for place in chosen], call=call, truncate=True)
        for ranked in results.items:
            if not _failed(ranked):
                scores[chosen[ranked.index]] = ranked.score  # type: ignore[union-attr]
    return scores


async def _vectors(model: EncoderModel, texts: Sequence[str], kind: str, call: Call) -> Any:
    """float32[texts, H] of length 1; zeros where the model refuses a text."""
    found: list[Any] = []
    for start in range(0, len(texts), _AT_ONCE):
        results = await model.embed(texts[start : start + _AT_ONCE], call=call, normalize=True, truncate=True, kind=kind)
        found += [None if _failed(item) else item for item in results.items]
    size = model.manifest.hidden_size
    return np.stack([np.zeros(size, np.float32) if one is None else one for one in found])


def _failed(item: object) -> bool:
    """Whether the item was refused; what is no error of ours is raised."""
    if isinstance(item, Exception) and not isinstance(item, UnderstudyError):
        raise item
    return isinstance(item, Exception)
