"""The contract of vendors that fine-tune their models for others, and the nouns that travel over it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol


class HostedState(StrEnum):
    """Where the vendor's job is."""

    QUEUED = "queued"  # the vendor's checks of the files included
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Nothing will change any more."""
        return self in (HostedState.SUCCEEDED, HostedState.FAILED, HostedState.CANCELLED)


@dataclass(slots=True, frozen=True)
class Order:
    """What is asked of a vendor. `training` and `validation` ("": none) are ids of uploaded files.

    `tag` is ours, kept with the job, so that a job whose creation was never answered can be found again; `suffix` becomes part of the
    model's name.
    """

    model: str
    training: str
    validation: str
    epochs: int
    seed: int
    suffix: str
    tag: str


@dataclass(slots=True, frozen=True)
class HostedJob:
    """The vendor's job. `result`: the model's name there, once it succeeded; `trained_tokens`: what is charged; `error`: its code."""

    id: str
    state: HostedState
    model: str
    result: str = ""
    trained_tokens: int | None = None
    error: str = ""


@dataclass(slots=True, frozen=True)
class HostedEvent:
    """A line of the vendor's. `values` are points of curves at `step`, where it brings any."""

    id: str
    text: str
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)


class HostedTrainer(Protocol):
    """One vendor. Methods block, are for one thread, and may be repeated where the text does not say otherwise.

    Every method raises ProviderUnavailable where the vendor cannot be reached, is overloaded or failed (with `retry_after_s` where it said
    so), FailedPrecondition where it refuses this organisation, InvalidArgument where it refuses what was asked.
    """

    name: str

    def upload(self, path: Path) -> str:
        """Sends a file of training data; returns the vendor's id. Repeating it leaves a second file there, and costs nothing."""
        ...

    def create(self, order: Order) -> HostedJob:
        """Begins a job that will be charged. Never repeated without `find` before: the first may have arrived."""
        ...

    def find(self, tag: str) -> HostedJob | None:
        """The newest job with this tag that did not fail."""
        ...

    def poll(self, job: str) -> HostedJob:
        """The job as it is now."""
        ...

    def events(self, job: str, after: str = "") -> list[HostedEvent]:
        """What was said after the event `after`, oldest first; "": from the beginning."""
        ...

    def cancel(self, job: str) -> HostedJob:
        """Ends a job; one that has ended stays as it is."""
        ...

    def close(self) -> None:
        """Closes connections."""
        ...
