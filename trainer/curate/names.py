"""People's names in rows, by a token classifier of the repository: the only kind of personal data here that no pattern can tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from server.config import Config
from server.core import Call, Entity, Priority, Task
from trainer.curate.loops import in_own_loop
from trainer.curate.rows import Row

FindNames = Callable[[Sequence[Row], Callable[[int, int], None]], Mapping[str, Sequence[str]]]
"""Rows to words that name people, by interaction."""

_PEOPLE = frozenset({"per", "person", "people", "name", "pers"})
_CHUNK = 128
_SURE = 0.5


def finder(config: Config, model: str) -> FindNames:
    """A finder by a token-classification model, which is loaded for the length of one call.

    It raises ModelNotFound, ModelRejected, TaskNotSupported.
    """

    def find(rows: Sequence[Row], progress: Callable[[int, int], None]) -> Mapping[str, Sequence[str]]:
        texts = [(row.interaction_id, text) for row in rows for text in dict.fromkeys(_texts(row))]
        found: dict[str, list[str]] = defaultdict(list)
        for (key, _), entities in zip(texts, _run(config, model, [text for _, text in texts], progress), strict=True):
            found[key] += [one.text for one in entities if one.label.casefold() in _PEOPLE and one.score >= _SURE and one.text.strip()]
        return found

    return find


def _texts(row: Row) -> list[str]:
    answers = () if row.label else (row.answer, row.rejected)
    return [text for text in (row.text, *(content for _, content in row.messages), *answers) if text]


def _run(config: Config, model: str, texts: Sequence[str], progress: Callable[[int, int], None]) -> list[Sequence[Entity]]:
    """Entities of each text; of one that the model refuses, none."""
    from server.runtime.loader import make_loader
    from server.runtime.observer import NullObserver
    from server.runtime.repository import Repository
    from server.runtime.runtime import Runtime

    async def run() -> list[Sequence[Entity]]:
        runtime = Runtime(Repository(Path(config.models.path)), make_loader(config.runtime, NullObserver()))
        found: list[Sequence[Entity]] = []
        try:
            await runtime.load(model)
            with runtime.use(model, Task.TOKEN_CLASSIFICATION) as served:
                for start in range(0, len(texts), _CHUNK):
                    call = Call("trainer", priority=Priority.BULK)
                    results = await served.extract_entities(texts[start : start + _CHUNK], call=call)
                    found += [one if isinstance(one, list) else () for one in results.items]
                    progress(min(start + _CHUNK, len(texts)), len(texts))
        finally:
            await runtime.close(drain=False)
        return found

    return in_own_loop(run)
