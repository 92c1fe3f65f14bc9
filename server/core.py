"""The nouns that travel between packages. Imports nothing of ours.

Times are seconds of `time.monotonic()` unless a name ends in `_ns` or `_ms`. Arrays are NumPy, C-contiguous.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
T = TypeVar("T")


class Task(StrEnum):
    """Kinds of work, named as Hugging Face pipeline tags."""

    FEATURE_EXTRACTION = "feature-extraction"
    TEXT_CLASSIFICATION = "text-classification"
    ZERO_SHOT_CLASSIFICATION = "zero-shot-classification"
    TEXT_RANKING = "text-ranking"
    TOKEN_CLASSIFICATION = "token-classification"
    QUESTION_ANSWERING = "question-answering"
    TENSOR = "tensor"  # a raw ONNX model: served through the Open Inference Protocol alone


class Priority(IntEnum):
    """Lower runs first. INTERACTIVE is the default; BULK yields to it at every batch."""

    CRITICAL = 0
    INTERACTIVE = 1
    BULK = 2


@dataclass(slots=True)
class Call:
    """What a request carries from the edge down: identity, deadline, priority, and whether its caller left.

    `deadline` is monotonic seconds, or None. `cancelled` is set by the edge, on the event loop, when the caller leaves; every stage
    may look at it, from any thread; it never goes back to False.
    """

    request_id: str
    deadline: float | None = None
    priority: Priority = Priority.INTERACTIVE
    cancelled: bool = False
    tenant: str = ""
    user: str = ""

    def remaining(self, now: float | None = None) -> float | None:
        """Seconds until the deadline (negative when past), or None without one."""
        return None if self.deadline is None else self.deadline - (time.monotonic() if now is None else now)


@dataclass(slots=True)
class Timings:
    """Seconds that one request spent in each stage; for a batch of items, the slowest item's."""

    tokenize: float = 0.0
    queue: float = 0.0
    run: float = 0.0
    post: float = 0.0

    def merge(self, other: Timings) -> None:
        """Keeps the larger of each stage."""
        self.tokenize = max(self.tokenize, other.tokenize)
        self.queue = max(self.queue, other.queue)
        self.run = max(self.run, other.run)
        self.post = max(self.post, other.post)


@dataclass(slots=True, frozen=True)
class Usage:
    """Tokens a request used. `output` stays 0 for encoders."""

    input: int = 0
    output: int = 0


@dataclass(slots=True, frozen=True)
class Label:
    """A class and its score in [0, 1]."""

    name: str
    score: float


@dataclass(slots=True, frozen=True)
class Entity:
    """A span of the input. `start` and `end` are offsets in Unicode code points, end exclusive."""

    label: str
    score: float
    text: str
    start: int
    end: int


@dataclass(slots=True, frozen=True)
class Span:
    """An extractive answer; `start`/`end` as in Entity, in the context. An empty text means "no answer"."""

    text: str
    score: float
    start: int
    end: int


@dataclass(slots=True)
class Results(Generic[T]):
    """One entry an item, in the caller's order: a value, or the error of that item alone.

    `truncated[i]` is True where truncation was asked for and happened.
    """

    items: list[T | Exception]
    timings: Timings = field(default_factory=Timings)
    usage: Usage = field(default_factory=Usage)
    truncated: Sequence[bool] = ()
    model: str = ""
    version: str = ""
