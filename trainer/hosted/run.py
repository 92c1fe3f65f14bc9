"""Fine-tunes a vendor's model on a skill's curated rows: what it costs, then the files, the job, its end, and a line in the registry.

Everything that the vendor was asked is written down in the job's folder before and after it is asked, so that a trainer that is killed
goes on where it was: an uploaded file is not sent twice, and a job that was begun is found again and never begun a second time.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from server.config import Config
from server.errors import Cancelled, FailedPrecondition, InvalidArgument, ProviderUnavailable, SkillNotFound, TooLittleData, near_names
from server.registry.jobs import JobStore
from server.registry.registry import Registry
from trainer.context import JobContext
from trainer.hosted.base import HostedJob, HostedState, HostedTrainer, Order
from trainer.hosted.data import TrainingFile, write_chat
from trainer.hosted.offers import Estimate, Offer, cost, estimate, offer_of
from trainer.hosted.openai import OpenAITrainer
from trainer.hosted.records import add_hosted_model
from trainer.report import Report

if TYPE_CHECKING:
    from server.settings import ProviderConfig
    from trainer.curate.rows import Curated

T = TypeVar("T")
EPOCHS = 3  # a vendor's own choice would leave the cost open
METHOD = "hosted"
_STATE = "hosted.json"
_FILE = "training.jsonl"
_SHORTEST_S, _LONGEST_S = 1.0, 30.0
_PATIENCE = 20  # failures of polls in a row
_LOOK_S = 0.2  # how often a waiting job asks whether it was cancelled


@dataclass(slots=True, frozen=True)
class Around:
    """What the world gives: the time of day, and how long to wait between looks at the vendor (shortest, longest, in seconds)."""

    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    poll_s: tuple[float, float] = (_SHORTEST_S, _LONGEST_S)
    open: Callable[[str, ProviderConfig], HostedTrainer] = OpenAITrainer


@dataclass(slots=True)
class State:
    """What the vendor was asked so far; `asked`: the creation of a job was sent, and may have arrived. Kept as JSON."""

    provider: str = ""
    model: str = ""
    epochs: int = EPOCHS
    sha256: str = ""
    dataset: str = ""
    worst_micro_usd: int = 0
    file: str = ""
    asked: bool = False
    job: str = ""
    event: str = ""

    @classmethod
    def read(cls, folder: Path) -> State:
        """As written before, or a new one."""
        try:
            return cls(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls()

    def write(self, folder: Path) -> None:
        """Whole or not at all, and on the disk before it returns: what follows costs money."""
        draft = folder / f"{_STATE}.new"
        with draft.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(folder / _STATE)


@dataclass(slots=True, frozen=True)
class Plan:
    """What would be done: which model of which provider, on which file, for how much. `warnings` are for people."""

    provider: str
    model: str
    epochs: int
    per_million_usd: float
    file: TrainingFile
    curated: Curated
    estimate: Estimate
    warnings: list[str]

    def in_words(self) -> str:
        """For whoever has to agree."""
        lines = [f"{self.provider}/{self.model}: {self.estimate.in_words()}"]
        lines += [f"  not sent: {count:6d}  {why}" for why, count in self.curated.dropped.most_common()]
        held = sum(row.held_out for row in self.curated.rows)
        lines.append(f"  not sent: {held:6d}  held out, to judge by")
        return "\n".join(lines + [f"  note: {text}" for text in self.warnings])


def finetune(config: Config, skill: str, context: JobContext, spec: Mapping[str, Any], *, around: Around | None = None) -> Report:
    """A job of the kind "finetune". `spec`: "provider" ("local", or a provider of the configuration), "model", "epochs", "seed", and
    "max_cost_usd", the most that may be spent, without which a budget must limit the provider, the skill or the whole.

    Raises:
        SkillNotFound, InvalidArgument: no such skill, provider or model.
        TooLittleData: fewer rows than the skill's min_rows or the vendor's least.
        FailedPrecondition: the offer has ended, nobody agreed to the cost, or the vendor refuses this organisation.
        BudgetExceeded: no budget has room for it.
        ProviderUnavailable: the vendor failed for good, or its job did.
        Cancelled: the vendor's job is cancelled too, unless this trainer has only lost its lease.
    """
    name = str(spec.get("provider") or "local")
    if name == "local":
        from trainer.train import train

        return train(config, skill, context, {key: value for key, value in spec.items() if key in ("method", "seed", "hub_repo")})
    around = around or Around()
    registry = Registry(config.registry)
    try:
        provider = _provider(config, skill, name)
        hosted = around.open(name, provider)
        try:
            return _Run(_Job(config, skill, context, spec), hosted, registry, around).run()
        finally:
            hosted.close()
    finally:
        registry.close()


def plan(config: Config, skill: str, context: JobContext, spec: Mapping[str, Any], now: datetime, registry: Registry) -> Plan:
    """Reads, curates and writes the training file into the job's folder; sends nothing. Raises what `finetune` raises before it sends."""
    from trainer.curate.pii import Scrubber
    from trainer.curate.pipeline import curate

    name = str(spec["provider"])
    provider = _provider(config, skill, name)
    offer = offer_of(provider.kind)
    model = str(spec.get("model") or offer.default_model)
    if not model:
        raise InvalidArgument(f"{name!r} is no vendor whose models are known here. Name one: --model.", field="model")
    warnings = offer.warnings(model, now)
    price = offer.price(model, provider)
    epochs = int(spec.get("epochs") or EPOCHS)
    curated = curate(config, skill, context, registry)
    rows = [row for row in curated.rows if not row.held_out and (row.label or row.answer)]
    if config.curation.pii == "off":  # at home that may be right; nobody's address leaves the house
        scrubber = Scrubber.of(config.curation.pii_entities)
        rows = [scrubber.scrub(row)[0] for row in rows]
    _enough(config, skill, len(rows), offer, curated)
    context.folder.mkdir(parents=True, exist_ok=True)
    file = write_chat(context.folder / _FILE, skill, config.skills[skill], rows)
    found = estimate(file.examples, file.content_bytes, file.messages, epochs, price)
    return Plan(name, model, epochs, price, file, curated, found, warnings)


@dataclass(slots=True, frozen=True)
class _Job:
    config: Config
    skill: str
    context: JobContext
    spec: Mapping[str, Any]


class _Run:
    def __init__(self, job: _Job, hosted: HostedTrainer, registry: Registry, around: Around) -> None:
        self._config = job.config
        self._skill = job.skill
        self._context = job.context
        self._spec = job.spec
        self._hosted = hosted
        self._registry = registry
        self._around = around
        self._state = State.read(job.context.folder)
        self._report = Report(job.skill, job.context.job, method=METHOD)

    def run(self) -> Report:
        context, state = self._context, self._state
        context.folder.mkdir(parents=True, exist_ok=True)
        if not state.asked:
            self._prepare()
        else:
            context.log(f"going on with what was asked of {state.provider} before")
        return asyncio.run(self._paid())

    def _prepare(self) -> None:
        """Up to the moment before money is spent."""
        context, state = self._context, self._state
        made = plan(self._config, self._skill, context, self._spec, self._around.now(), self._registry)
        for text in made.warnings:
            context.log(f"note: {text}")
        context.log(f"{made.provider}/{made.model}: {made.estimate.in_words()}")
        self._agreed(made)
        self._note(made.curated)
        rows = [(row.interaction_id, row.held_out) for row in made.curated.rows]
        if not state.dataset:
            state.dataset = self._registry.add_dataset(context.job, made.curated.table_version, made.curated.fingerprint, rows)
        state.provider, state.model, state.epochs = made.provider, made.model, made.epochs
        state.worst_micro_usd = made.estimate.worst_micro_usd
        if state.sha256 != made.file.sha256:
            state.sha256, state.file = made.file.sha256, ""
        state.write(context.folder)

    def _note(self, curated: Curated) -> None:
        report = self._report
        report.read, report.dropped, report.sources = curated.read, dict(curated.dropped), dict(curated.sources)
        report.held_out_rows = sum(row.held_out for row in curated.rows)
        report.train_rows = len(curated.rows) - report.held_out_rows

    def _agreed(self, made: Plan) -> None:
        worst = made.estimate.worst_micro_usd
        allowed = self._spec.get("max_cost_usd")
        if allowed is not None and worst <= float(allowed) * 1e6:
            return
        budget = self._config.budget
        scopes = (budget.total, budget.providers.get(made.provider), budget.skills.get(self._skill))
        if allowed is None and any(one is not None and one.micro_usd() for one in scopes):
            return
        why = f"{float(allowed):g} were allowed" if allowed is not None else "nobody agreed to it, and no budget limits it"
        message = f"Fine-tuning costs {made.estimate.in_words()}; {why}. Say so with --yes, or give max_cost_usd or a budget."
        raise FailedPrecondition(message, worst_micro_usd=worst)

    async def _paid(self) -> Report:
        """With the worst case reserved in the budget as long as it may come to that."""
        from server.routing.budget import Budget
        from server.routing.budget_windows import Scopes

        state = self._state
        budget = Budget(self._config.budget, self._registry)
        scopes = Scopes(provider=state.provider, skill=self._skill)
        reservation = None
        try:
            try:
                reservation = await budget.reserve(state.worst_micro_usd, scopes)
            except Exception:
                if not state.asked:  # else the money is out, and not to look after it would bring none back
                    raise
            job = await asyncio.to_thread(self._see_through)
            spent = self._cost(job)
            if reservation is not None:
                await budget.settle(reservation, spent)
                reservation = None
            return self._finish(job, spent)
        finally:
            if reservation is not None:
                await budget.release(reservation)
            await budget.close()

    def _see_through(self) -> HostedJob:
        """The vendor's job, ended."""
        try:
            if not self._state.job:
                self._begin()
            return self._wait()
        except Cancelled:
            self._cancelled()
            raise

    def _begin(self) -> None:
        state, context, hosted = self._state, self._context, self._hosted
        job = self._again(lambda: hosted.find(context.job)) if state.asked else None
        if job is None:
            if not state.file:
                context.check()
                context.progress("upload", 0, 1)
                state.file = self._again(lambda: hosted.upload(context.folder / _FILE))
                state.write(context.folder)
                context.progress("upload", 1, 1)
            context.check()
            state.asked = True
            state.write(context.folder)
            seed = int(self._spec.get("seed") or context.seed)
            suffix = self._skill[:18]
            job = self._create(Order(state.model, state.file, "", state.epochs, seed, suffix, context.job))
        state.job = job.id
        state.write(context.folder)
        context.log(f"{state.provider} has begun the job {job.id}")

    def _create(self, order: Order) -> HostedJob:
        """Where the answer did not come, the job may be there all the same. A refusal takes the request back."""
        try:
            return self._again(lambda: self._hosted.find(order.tag) or self._hosted.create(order), first=lambda: self._hosted.create(order))
        except (FailedPrecondition, InvalidArgument):
            self._state.asked = False
            self._state.write(self._context.folder)
            raise

    def _wait(self) -> HostedJob:
        """Looks at the job until it ends, less often with time; repeats what the vendor says of it."""
        shortest, longest = self._around.poll_s
        pause = shortest
        while True:
            job = self._again(lambda: self._hosted.poll(self._state.job))
            self._repeat_events()
            if job.state.ended:
                return job
            self._pause(pause)
            pause = min(pause * 1.5, longest)

    def _repeat_events(self) -> None:
        state, context = self._state, self._context
        try:
            events = self._hosted.events(state.job, state.event)
        except ProviderUnavailable:  # they are for reading; the next look brings them
            return
        for event in events:
            context.log(f"{state.provider}: {event.text}")
            for name, value in event.values.items():
                context.metric(f"hosted/{name}", event.step, value)
        if events:
            state.event = events[-1].id
            state.write(context.folder)

    def _again(self, ask: Callable[[], T], first: Callable[[], T] | None = None) -> T:
        """Repeats what failed at the vendor's side, with its own pauses; `first` is asked the first time. A refused key ends it."""
        shortest, longest = self._around.poll_s
        for attempt in range(_PATIENCE):
            self._context.check()
            try:
                return (first or ask)() if attempt == 0 else ask()
            except ProviderUnavailable as error:
                status = error.metadata.get("status", "")
                if attempt + 1 == _PATIENCE or (status.startswith("4") and status not in ("408", "409", "429")):
                    raise
                asked = error.retry_after_s
                self._pause(asked if asked is not None else min(shortest * 2**attempt, longest))
        raise AssertionError("the last attempt returns or raises")

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._context.check()
            time.sleep(min(left, _LOOK_S))

    def _cancelled(self) -> None:
        """Takes the vendor's job back where a person wanted that; a trainer that lost its lease leaves it to the next."""
        with suppress(Exception):
            wanted = JobStore(self._registry).get(self._context.job).cancel
            if wanted and self._state.job:
                self._hosted.cancel(self._state.job)

    def _cost(self, job: HostedJob) -> int:
        """Charged are trained tokens; where the vendor gives no count, at worst all that it was sent."""
        if job.trained_tokens is None:
            return self._state.worst_micro_usd if job.state is HostedState.SUCCEEDED else 0
        provider = self._config.providers[self._state.provider]
        return cost(job.trained_tokens, offer_of(provider.kind).price(self._state.model, provider))

    def _finish(self, job: HostedJob, spent: int) -> Report:
        state, context = self._state, self._context
        if job.state is HostedState.CANCELLED:
            raise Cancelled(f"job {context.job} was cancelled at {state.provider}", job=context.job)
        if job.state is not HostedState.SUCCEEDED or not job.result:
            message = f"{state.provider} failed at the job {job.id} ({job.error or 'no code given'}). Look at it in the vendor's dashboard."
            raise ProviderUnavailable(message, provider=state.provider, vendor_code=job.error or "none", vendor_job=job.id)
        metrics = {"cost_usd": spent / 1e6, "trained_tokens": float(job.trained_tokens or 0), "epochs": float(state.epochs)}
        name = f"{state.provider}/{job.result}"
        add_hosted_model(self._registry, name, self._skill, f"{state.provider}/{state.model}", state.sha256, metrics, context.job)
        context.log(f"{name} is ready. To be asked it must be named: skills.{self._skill}.teacher or .fallbacks, and its price beside it.")
        return replace(self._report, state="succeeded", version=job.result, base=f"{state.provider}/{state.model}", metrics=metrics)


def _provider(config: Config, skill: str, name: str) -> ProviderConfig:
    if skill not in config.skills:
        raise SkillNotFound(f"There is no skill {skill!r} in the configuration; {near_names(skill, list(config.skills))}", skill=skill)
    provider = config.providers.get(name)
    if provider is None:
        known = ["local", *config.providers]
        raise InvalidArgument(f"There is no provider {name!r}; {near_names(name, known)}", field="provider", provider=name)
    return provider


def _enough(config: Config, skill: str, rows: int, offer: Offer, curated: Curated) -> None:
    least = max(config.skills[skill].min_rows, offer.least_examples)
    if rows < least:
        dropped = "; ".join(f"{count} rows: {why}" for why, count in curated.dropped.most_common()) or "none were dropped"
        message = (
            f"{skill!r} has {rows} rows to learn from; {least} are needed ({curated.read} were read, {dropped}). Let more traffic pass."
        )
        raise TooLittleData(message, rows=rows, minimum=least, skill=skill)
