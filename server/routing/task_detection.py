"""Which task a request in plain words asks for, as a Hugging Face pipeline tag, or none.

Reference phrases a task (task_phrases.json) and the local embedder decide, see task_head.py; no list of keywords does. A text that asks
for nothing, small talk or pasted content, is answered by abstention, with the nearest tasks named all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

from server.core import Call, FloatArray, Priority, Task
from server.routing import task_head
from server.routing.task_head import PhraseHead
from server.routing.task_parameters import TaskParameters, read_parameters
from server.routing.task_request import Part, clean, content_of, is_long, parts_of
from server.runtime.encoder import EncoderModel
from server.runtime.runtime import Runtime
from server.runtime.verify import MODEL

CANDIDATES = 5
# Votes: below it no task is taken even where it leads; costs nothing on the phrases and keeps garbage out.
_FLOOR = 0.15


@dataclass(slots=True, frozen=True)
class Phrase:
    """A reference phrase. `task` is "" where it asks for nothing; `family` is a kind within the task, such as "sentiment"."""

    text: str
    task: str
    family: str = ""


@dataclass(slots=True, frozen=True)
class PhraseBook:
    """The phrases in order. `tasks` are in order too; `digest` changes with any phrase."""

    version: str
    tasks: tuple[str, ...]
    phrases: tuple[Phrase, ...]
    digest: str

    @classmethod
    def of(cls, version: str, tasks: Mapping[str, Mapping[str, Sequence[str]]], no_task: Sequence[str]) -> PhraseBook:
        """`tasks` maps a task to its families ("general" for none) to their phrases."""
        phrases = [
            Phrase(text, task, "" if family == "general" else family)
            for task, families in tasks.items()
            for family, texts in families.items()
            for text in texts
        ]
        phrases += [Phrase(text, "") for text in no_task]
        digest = hashlib.sha256(json.dumps([dataclasses.astuple(phrase) for phrase in phrases]).encode()).hexdigest()
        return cls(version, tuple(tasks), tuple(phrases), digest)


@cache
def default_phrases() -> PhraseBook:
    """The phrases that come with the server."""
    data = json.loads(resources.files("server.routing").joinpath("task_phrases.json").read_text("utf-8"))
    return PhraseBook.of(data["version"], data["tasks"], data["no_task"])


@dataclass(slots=True, frozen=True)
class TaskCandidate:
    """A task that the request may ask for. `score` in [0, 1]; `phrase` is its nearest one, `similarity` the cosine to it."""

    task: str
    score: float
    phrase: str
    similarity: float


@dataclass(slots=True, frozen=True)
class Detection:
    """What a request asks for. `task` is None on abstention; then `candidates` say what came near.

    `score` in [0, 1] is the task's, or on abstention that of "no task"; all tasks' and that one add up to 1. `margin` is its distance to
    the next. `instruction` is the part of the request that decided, `content` what it is about ("" where that is not in the request).
    """

    task: str | None
    score: float
    margin: float
    phrase: str
    candidates: tuple[TaskCandidate, ...]
    parameters: TaskParameters = field(default_factory=TaskParameters)
    instruction: str = ""
    content: str = ""


class TaskDetector:
    """Detects with the embedder `model` of `runtime`; one a process, used on its event loop, any number of calls at once.

    The phrases are embedded, and the head is fitted, at the first call (or by `warm`): some seconds, once for each SHA-256 of the
    embedder that serves, so a new version of it is taken up by itself. In the folder `cache`, where there is one, that is kept for the
    next start.
    """

    def __init__(self, runtime: Runtime, model: str, book: PhraseBook | None = None, cache: Path | None = None) -> None:
        self.model = model
        self.book = book or default_phrases()
        self._runtime = runtime
        self._cache = cache
        self._fitted: tuple[str, asyncio.Task[PhraseHead]] | None = None

    async def warm(self) -> None:
        """Makes the first `detect` as quick as the others. Raises as `detect` does."""
        with self._runtime.use(self.model, Task.FEATURE_EXTRACTION) as model:
            await self._head(model)

    async def detect(self, text: str, call: Call) -> Detection:
        """What `text` asks for; an empty text asks for nothing.

        Raises:
            ModelNotFound, ModelNotLoaded: the embedder, by name.
            TaskNotSupported: the model embeds nothing.
            Overloaded, DeadlineExceeded, Cancelled: as the runtime says.
        """
        request = clean(text)
        with self._runtime.use(self.model, Task.FEATURE_EXTRACTION) as model:
            if not request:
                return Detection(None, 1.0, 1.0, "", ())
            head = await self._head(model)
            parts = parts_of(request)
            vectors = await _embed(model, [part.text for part in parts], call)
        return self._decide(request, parts, vectors, head)

    async def _head(self, model: EncoderModel) -> PhraseHead:
        digest = model.manifest.files[MODEL].sha256
        if self._fitted is None or self._fitted[0] != digest or _failed(self._fitted[1]):
            self._fitted = (digest, asyncio.ensure_future(self._fit(model.manifest.version, digest)))
        # Shielded: a caller that leaves does not take the others' head away.
        return await asyncio.shield(self._fitted[1])

    async def _fit(self, version: str, digest: str) -> PhraseHead:
        texts = [phrase.text for phrase in self.book.phrases]
        place = {task: index for index, task in enumerate(self.book.tasks)}
        classes = np.array([place.get(phrase.task, len(place)) for phrase in self.book.phrases], np.int64)
        loop = asyncio.get_running_loop()
        path = self._cache / f"tasks-{digest[:16]}-{self.book.digest[:16]}.safetensors" if self._cache else None
        kept = await loop.run_in_executor(None, _read, path, (len(texts), len(place) + 1)) if path else None
        if kept:
            return await loop.run_in_executor(None, task_head.fit, texts, kept[0], classes, len(place) + 1, kept[1])
        with self._runtime.use(self.model, Task.FEATURE_EXTRACTION, version) as model:
            vectors = await _embed(model, texts, Call("task-phrases", priority=Priority.BULK))
        head = await loop.run_in_executor(None, task_head.fit, texts, vectors, classes, len(place) + 1)
        if path:
            await loop.run_in_executor(None, _write, path, vectors, head.votes.reshape(-1, len(place) + 1)[: len(texts)])
        return head

    def _decide(self, request: str, parts: Sequence[Part], vectors: FloatArray, head: PhraseHead) -> Detection:
        near = head.cosines(vectors)
        votes = head.votes_for([part.text for part in parts], near)
        # A short request is one thought, so its parts are averaged. A long one is mostly content: the part that is most unlike "no task".
        leads = votes[:, :-1].max(axis=1) - votes[:, -1]
        together = votes[int(leads.argmax())] if is_long(request) else votes.mean(axis=0)
        scores = task_head.scores_of(together)
        order = np.argsort(-together[:-1], kind="stable")
        best = int(order[0])
        candidates = tuple(self._candidate(int(task), scores, votes, near, head) for task in order[:CANDIDATES])
        none = float(scores[-1])
        if together[best] < _FLOOR or together[best] <= together[-1]:
            nearest, _ = head.nearest(near[0], len(self.book.tasks))
            margin = none - candidates[0].score
            return Detection(None, none, margin, self.book.phrases[nearest].text, candidates)
        task = self.book.tasks[best]
        decided = _instruction(parts, votes[:, best])
        phrase, _ = head.nearest(near[decided], best)
        runner_up = max(none, candidates[1].score if len(candidates) > 1 else 0.0)
        parameters = read_parameters(request, task, [parts[decided], *parts], self.book.phrases[phrase].family)
        return Detection(
            task,
            candidates[0].score,
            candidates[0].score - runner_up,
            self.book.phrases[phrase].text,
            candidates,
            parameters,
            parts[decided].text,
            content_of(request, parts[decided]),
        )

    def _candidate(self, task: int, scores: FloatArray, votes: FloatArray, near: FloatArray, head: PhraseHead) -> TaskCandidate:
        index, similarity = head.nearest(near[int(votes[:, task].argmax())], task)
        return TaskCandidate(self.book.tasks[task], float(scores[task]), self.book.phrases[index].text, similarity)


def _instruction(parts: Sequence[Part], votes: FloatArray) -> int:
    """Which part is the instruction: the one with most votes for the task; the whole only where it is clearly more than its clauses."""
    margins = [float(vote) - (0.1 if part.kind == "whole" else 0.0) for part, vote in zip(parts, votes, strict=True)]
    return int(np.argmax(margins))


def _read(path: Path, shape: tuple[int, int]) -> tuple[FloatArray, FloatArray] | None:
    """Vectors and votes of an earlier fit, or None where there are none or the file is broken."""
    safetensors = importlib.import_module("safetensors")
    try:
        kept = importlib.import_module("safetensors.numpy").load_file(path)
        vectors, votes = kept["vectors"], kept["votes"]
    except (OSError, KeyError, safetensors.SafetensorError):
        return None
    good = votes.shape == shape and vectors.ndim == 2 and len(vectors) == shape[0] and votes.dtype == vectors.dtype == np.float32
    return (vectors, votes) if good and np.isfinite(votes).all() and np.isfinite(vectors).all() else None


def _write(path: Path, vectors: FloatArray, votes: FloatArray) -> None:
    """Keeps a fit for the next start; a folder that cannot be written costs the next start its time, nothing else."""
    content = importlib.import_module("safetensors.numpy").save({"vectors": vectors, "votes": np.ascontiguousarray(votes)})
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            part.write_bytes(content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _failed(task: asyncio.Task[PhraseHead]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


async def _embed(model: EncoderModel, texts: Sequence[str], call: Call) -> FloatArray:
    """float32[len(texts), D] of unit length. A text without letters has tokens all the same; one that has none is a zero vector."""
    results = await model.embed([text if re.search(r"\S", text) else "?" for text in texts], call=call, normalize=True, truncate=True)
    for row in results.items:
        if isinstance(row, Exception):
            raise row
    return np.stack([np.asarray(row, np.float32) for row in results.items])
