"""The parts that skills need: adapters, providers, lake, registry, budget, router, and their servicers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from server.api.auth import keys_asked
from server.api.auth_keys import KeyBook
from server.api.ensembles import EnsembleServicer
from server.api.feedback import FeedbackServicer
from server.api.generate_skill import SkillGeneration
from server.api.interactions import Interactions, Reading
from server.api.run import RunServicer
from server.api.selection import Selection
from server.api.skills import SkillServicer
from server.config import Config
from server.core import Outcome, Task
from server.errors import UnderstudyError
from server.metrics import Metrics
from server.routing.budget import Budget
from server.routing.candidates import Brief
from server.runtime.adapters import AdapterStore, stand_of
from server.runtime.runtime import Runtime
from server.runtime.verify import MODEL
from server.stats import ItemReport

if TYPE_CHECKING:
    from server.lake.lake import Lake
    from server.providers.base import Provider
    from server.registry.registry import Registry
    from server.routing.afterwards import Afterwards
    from server.routing.difficulty_book import DifficultyBook
    from server.routing.rollout_book import RolloutBook
    from server.routing.skills import SkillBook

ADAPTERS = "adapters"  # the folder of the model repository that holds them


@dataclass(slots=True)
class SkillParts:
    """Built by `build_skills`; `start` before serving, `close` after the last call."""

    run: RunServicer
    generation: SkillGeneration
    skills: SkillServicer
    feedback: FeedbackServicer
    ensembles: EnsembleServicer
    interactions: Interactions
    adapters: AdapterStore
    lake: Lake
    registry: Registry
    providers: Mapping[str, Provider]
    keys: KeyBook | None  # None where no keys are asked for
    budget: Budget
    difficulty: DifficultyBook
    rollouts: RolloutBook
    afterwards: Afterwards

    async def start(self) -> None:
        """Looks for adapters, at the rollouts and at what is spent, and starts the threads."""
        await self.adapters.start()
        await self.rollouts.start()
        await self.difficulty.start()
        await self.budget.start()
        await asyncio.to_thread(self.lake.start)

    async def close(self) -> None:
        """Stops in the order of dependence; the lake's log is sealed and converted last."""
        await self.afterwards.close()
        await self.interactions.reading.close()
        await self.adapters.stop()
        await self.rollouts.close()
        await self.difficulty.stop()
        for provider in self.providers.values():
            await provider.close()
        await self.budget.close()
        await asyncio.to_thread(self.lake.close)
        await asyncio.to_thread(self.registry.close)


def build_skills(config: Config, runtime: Runtime, selection: Selection, metrics: Metrics) -> SkillParts:
    """Everything behind Run, SkillService and FeedbackService. Raises InvalidArgument for a skill or provider that cannot work."""
    from server.lake.lake import Lake
    from server.lake.reading import LakeReader
    from server.providers.make import make_providers
    from server.registry.api_keys import ApiKeys
    from server.registry.registry import Registry
    from server.routing.detection import Detection
    from server.routing.difficulty_book import DifficultyBook
    from server.routing.ensemble import Ensembles
    from server.routing.judge import QualityBook, QualityJudge
    from server.routing.pace import Paces
    from server.routing.router import Router
    from server.routing.routes import RouteParts

    models = Path(config.models.path)
    registry = Registry(config.registry)
    store, book, rollouts = make_students(config, runtime, registry, metrics)
    providers = make_providers(config.providers)
    lake = Lake.of(config, registry, observer=metrics)
    keys = KeyBook(ApiKeys(registry), poll_s=config.auth.poll_s) if keys_asked(config) else None
    budget = Budget(config.budget, registry, observer=metrics, key_limits=keys.limits_of if keys is not None else None)
    difficulty = DifficultyBook(models / ADAPTERS, runtime, poll_s=config.models.adapter_poll_s)

    def embedder() -> str:
        """Raises where there is none, or several."""
        return config.routing.embedder or selection.default(Task.FEATURE_EXTRACTION)

    parts = RouteParts(
        book,
        runtime,
        providers,
        selection.default,
        Paces(),
        budget=budget if budget.limited else None,
        difficulty=difficulty,
        max_difficulty=config.routing.max_difficulty,
        least_gain=config.routing.least_gain,
    )
    judge, detector, observer = (
        QualityJudge(runtime, embedder, QualityBook(models / ADAPTERS)),
        Detection(runtime, embedder, Path(config.lake.path).parent / "cache"),
        ItemReports(metrics),
    )
    router = Router(parts, lake, judge, detector=detector, observer=observer, rollouts=rollouts, hold_tokens=config.routing.hold_tokens)
    ensembles = Ensembles(parts, lake, judge, embedder, detector=detector, observer=observer)
    return SkillParts(
        RunServicer(router, config.server.max_items, config.routing.run_many_in_flight),
        SkillGeneration(router),
        SkillServicer(book, rollouts),
        FeedbackServicer(lake, registry, LakeReader(config, registry), observer=rollouts),
        EnsembleServicer(ensembles),
        Interactions(config, registry, lake.ids, book, Reading()),
        store,
        lake,
        registry,
        providers,
        keys,
        budget,
        difficulty,
        rollouts,
        router.afterwards,
    )


def make_students(config: Config, runtime: Runtime, registry: Registry, metrics: Metrics) -> tuple[AdapterStore, SkillBook, RolloutBook]:
    """The students on the disk, the skills that they stand in for, and how far each one's rollout is."""
    from server.registry.rollouts import RolloutTable
    from server.routing.rollout_book import RolloutBook
    from server.routing.skills import SkillBook
    from server.runtime.student_models import ReadyStudents, StudentModels

    async def load_models() -> None:
        """What students of our skills stand on, but for those that were rolled back."""
        wanted = ((skill, number, made) for skill in book.names() for number, made in store.made(skill).items())
        await models.ensure(stand_of(made) for skill, number, made in wanted if rollouts.wants(skill, str(number)))

    root = Path(config.models.path) / ADAPTERS
    store = AdapterStore(
        root, base_sha256=lambda name: base_sha256(runtime, name), poll_s=config.models.adapter_poll_s, after_look=load_models
    )
    models = StudentModels(runtime)
    students = ReadyStudents(store, models)
    rollouts = RolloutBook(config.rollout, RolloutTable(registry), students, keep=store.keep, counters=metrics)
    book = SkillBook.from_config(config, store, students=students, rollouts=rollouts)
    rollouts.of(book)
    return store, book, rollouts


class ItemReports:
    """Tells the metrics of finished items."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def item_done(self, brief: Brief, outcome: Outcome, elapsed_s: float) -> None:
        """See server.routing.router.ItemObserver."""
        decision = outcome.decision
        asked = [hop for hop in decision.hops if hop.outcome in ("delivered", "below_bar", "failed")]
        answered_by = "nobody" if outcome.error is not None else "local" if decision.local else "provider"
        # What the teacher would have cost is known where it answered; of local answers it is taken from those.
        by_teacher = bool(decision.candidate) and decision.candidate == brief.skill.teacher
        report = ItemReport(
            answered_by,
            outcome.cost_micro_usd,
            elapsed_s,
            outcome.quality,
            teacher_cost_micro_usd=asked[-1].cost_micro_usd if by_teacher and asked else None,
            escalated=len(asked) > 1,
            tries=asked[-1].tries if asked else 1,
        )
        self._metrics.item(decision.skill, report)


def base_sha256(runtime: Runtime, name: str) -> str | None:
    """SHA-256 of the graph that answers to a base's name now, or None."""
    try:
        return runtime.manifest(name).files[MODEL].sha256
    except UnderstudyError:
        return None
