"""What engines report while they work; the metrics of the serving process implement it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class BatchReport:
    """A batch that left. `tokens` includes padding, `fill` is tokens over the budget, `queue_waits_s` has one wait a sequence."""

    model: str
    version: str
    sequences: int
    tokens: int
    fill: float
    queue_waits_s: Sequence[float]
    run_s: float
    post_s: float


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step of a decoder engine. `form` of the weights; `prompt_tokens` of it were pieces of prompts, `looked_up` entered with newly
    admitted prompts, of which the prefix cache had `hits`. `copied`: pages whose content was copied since the step before.
    `first_token_s`: from arrival, `inter_token_s`: since the token before.
    """

    model: str
    version: str
    form: str
    run_s: float
    post_s: float
    tokens: int
    prompt_tokens: int
    generated: int
    finished: int
    running: int
    waiting: int
    pages_used: int
    pages: int
    preempted: int
    looked_up: int
    hits: int
    copied: int
    queue_waits_s: Sequence[float]
    first_token_s: Sequence[float]
    inter_token_s: Sequence[float]


class Observer(Protocol):
    """Called from engine threads and from the event loop, at once: implementations are thread-safe, quick, and never raise."""

    def batch_done(self, batch: BatchReport) -> None:
        """After the rows of a batch were handed to the event loop."""

    def answers_running(self, model: str, version: str, running: int, pages_used: int) -> None:
        """A decoder has nothing to run, because the answers that ran have left."""

    def step_done(self, step: StepReport) -> None:
        """After the tokens of a decoder's step were handed to the event loop."""

    def rejected(self, model: str, reason: str) -> None:
        """A call was refused at the door; `reason` is its error's."""

    def skipped(self, model: str, reason: str, count: int) -> None:
        """Sequences that left the queue without being run; `reason`: "cancelled" or "expired"."""

    def run_failed(self, model: str, reason: str) -> None:
        """A run of the graph failed; `reason` is its error's."""

    def queue_depth(self, model: str, waiting: int) -> None:
        """Sequences that wait, after each change."""


class NullObserver:
    """Reports to nobody."""

    def batch_done(self, batch: BatchReport) -> None:
        pass

    def answers_running(self, model: str, version: str, running: int, pages_used: int) -> None:
        pass

    def step_done(self, step: StepReport) -> None:
        pass

    def rejected(self, model: str, reason: str) -> None:
        pass

    def skipped(self, model: str, reason: str, count: int) -> None:
        pass

    def run_failed(self, model: str, reason: str) -> None:
        pass

    def queue_depth(self, model: str, waiting: int) -> None:
        pass
