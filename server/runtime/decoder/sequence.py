"""What the engine knows of a request: the flight, and its candidates (the n answers), each a sequence with pages of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from server.core import Call, IntArray
from server.runtime.decoder.contract import Job, Matcher, TextStream, Times, Token

if TYPE_CHECKING:
    from server.runtime.decoder.stream import JobStream

NO_DEADLINE = math.inf


class Flight:
    """A job on its way. `abandoned` is set by the event loop when nobody reads on; the rest is the engine thread's."""

    __slots__ = ("abandoned", "call", "candidates", "deadline", "job", "left", "stream")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.call: Call = job.call
        self.deadline = NO_DEADLINE if job.call.deadline is None else job.call.deadline
        self.abandoned = False
        self.candidates: list[Candidate] = []
        self.left = job.n
        self.stream: JobStream | None = None

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.abandoned or self.call.cancelled


class Candidate:
    """One sequence. Positions are those of its pages: `base` positions of the adapter's prefix, then its tokens.

    `key` orders candidates: the smallest goes first and is never preempted for another. It is the arrival, later by `ageing_s` for
    each level of priority, so that whoever waits long enough becomes the smallest.
    `ids[:length]` are the known tokens, prompt first; `computed` positions are in `pages`, the first `pure` of them by the wide form.
    `most`: tokens at which the answer ends. `forks`: candidates that begin with this one's prompt, until it has been run.
    """

    __slots__ = (
        "adapter_slot", "base", "cached", "computed", "flight", "forks", "ids", "index", "key", "length", "matcher", "most",
        "pages", "piece_steps", "pieces", "priority", "prompt", "pure", "sampler", "seeded", "shown_pages", "slot", "stored", "text",
        "times",
    )  # fmt: skip

    def __init__(self, flight: Flight, index: int, key: float, ids: IntArray, most: int) -> None:
        job = flight.job
        self.flight = flight
        self.index = index
        self.key = key
        self.priority = int(job.call.priority)
        self.ids = ids
        self.length = self.prompt = len(ids)
        self.most = most
        self.base = job.adapter.prefix if job.adapter is not None else 0
        self.stored = job.adapter.key if job.adapter is not None else ""
        self.adapter_slot = job.adapter.slot if job.adapter is not None else -1
        self.seeded = job.sampling.seed is not None
        self.pages: list[int] = []
        self.shown_pages = 0  # of `pages`, how many the step's table has
        self.slot = -1
        self.computed = self.pure = 0
        self.cached = -1  # prompt tokens that the prefix cache had, -1 before the first admission
        self.forks: list[Candidate] = []
        self.times = Times()
        self.sampler: Any = None
        self.text: TextStream | None = None
        self.matcher: Matcher | None = None
        self.pieces: list[Token] = []
        self.piece_steps = 0  # steps since a piece was sent

    @property
    def pending(self) -> int:
        """Tokens that have not been run; at least one while it runs."""
        return self.base + self.length - self.computed

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return self.length - self.prompt

    def reserve(self) -> None:
        """Makes room for the whole answer in `ids`, once it runs: what waits holds its prompt alone."""
        if len(self.ids) < self.most:
            grown = np.empty(self.most, np.int64)
            grown[: self.length] = self.ids[: self.length]
            self.ids = grown

    def append(self, token: int) -> None:
        """The next token; it has been drawn but not run."""
        self.ids[self.length] = token
        self.length += 1
