"""The parts that only skills need, built where skills are configured: adapters, providers, lake, registry, router, and their servicers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.api import feedback
from server.api.wire import Context
from server.config import Config
from server.errors import InteractionNotFound, SkillNotFound, UnderstudyError
from server.runtime.adapters import AdapterStore
from server.runtime.runtime import Runtime
from server.runtime.verify import MODEL

if TYPE_CHECKING:
    from server.lake.lake import Lake
    from server.providers.base import Provider
    from server.registry.registry import Registry

ADAPTERS = "adapters"  # the folder of the model repository that holds them


class NoSkills:
    """Answers for skills where none is configured."""

    async def Run(self, request: Any, _context: Context) -> Any:
        """No skill can be found."""
        message = f"there is no skill {request.skill[:128]!r}; none is configured. Add a [skills.<name>] section."
        raise SkillNotFound(message, skill=request.skill[:128], field="skill")

    async def CreateFeedback(self, request: Any, _context: Context) -> Any:
        """No interaction can be found."""
        feedback.check(request)
        raise InteractionNotFound("No interaction has this id; this server runs no skills.", field="feedback.interaction_id")


@dataclass(slots=True)
class SkillParts:
    """Built by `build_skills`; `start` before serving, `close` after the last call."""

    run: Any
    skills: Any
    feedback: Any
    adapters: AdapterStore | None = None
    lake: Lake | None = None
    registry: Registry | None = None
    providers: Mapping[str, Provider] | None = None

    async def start(self) -> None:
        """Looks for adapters, and starts the threads."""
        if self.adapters is not None:
            await self.adapters.start()
        if self.lake is not None:
            await asyncio.to_thread(self.lake.start)

    async def close(self) -> None:
        """Stops in the order of dependence; the lake's log is sealed and converted last."""
        if self.adapters is not None:
            await self.adapters.stop()
        for provider in (self.providers or {}).values():
            await provider.close()
        if self.lake is not None:
            await asyncio.to_thread(self.lake.close)
        if self.registry is not None:
            await asyncio.to_thread(self.registry.close)


def build_skills(config: Config, runtime: Runtime) -> SkillParts:
    """Everything behind Run, SkillService and FeedbackService. Raises InvalidArgument for a skill or provider that cannot work."""
    from server.api.skills import SkillServicer
    from server.routing.skills import SkillBook

    store = AdapterStore(
        Path(config.models.path) / ADAPTERS,
        base_sha256=lambda name: base_sha256(runtime, name),
        poll_s=config.models.adapter_poll_s,
    )
    book = SkillBook.from_config(config, store)
    if not config.skills:
        nobody = NoSkills()
        return SkillParts(nobody, SkillServicer(book), nobody)
    from server.api.run import RunServicer
    from server.lake.lake import Lake
    from server.providers.openai import OpenAIProvider
    from server.registry.registry import Registry
    from server.routing.router import Router

    providers = {name: OpenAIProvider(name, one) for name, one in config.providers.items()}
    lake = Lake(Path(config.lake.path), flush_s=config.lake.flush_s, segment_bytes=config.lake.segment_bytes)
    registry = Registry(config.registry)
    router = Router(book, runtime, providers, lake)
    return SkillParts(
        RunServicer(router, config.server.max_items),
        SkillServicer(book),
        feedback.FeedbackServicer(lake, registry),
        store,
        lake,
        registry,
        providers,
    )


def base_sha256(runtime: Runtime, name: str) -> str | None:
    """SHA-256 of the graph that answers to a base's name now, or None."""
    try:
        return runtime.manifest(name).files[MODEL].sha256
    except UnderstudyError:
        return None
