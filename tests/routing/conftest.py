"""A real base with a real head on it, and in-memory providers that keep the contract."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from server.config import RuntimeConfig
from server.core import Call, FloatArray, Limits, Preference, Task, TokenLogprob, Usage, Work
from server.errors import DeadlineExceeded, UnderstudyError, Unimplemented
from server.lake.lake import Lake
from server.providers.base import Completion, Embeddings, Health, Part, Prompt
from server.quality.calibration import Calibration
from server.routing.briefing import Ask
from server.routing.judge import QualityBook, QualityJudge
from server.routing.pace import Paces
from server.routing.router import Router
from server.routing.routes import RouteParts
from server.routing.skills import Skill, SkillBook, Student
from server.runtime.heads import Base, Features, HeadSpec, LinearHead, write_linear_head
from server.runtime.loader import make_loader
from server.runtime.observer import NullObserver
from server.runtime.repository import Repository
from server.runtime.runtime import Runtime
from trainer import linear

LABELS = ("card", "password", "transfer")
TEXTS = {
    "card": ["where is my card ?", "the card is lost", "how do i find my card", "a card is late"],
    "password": ["password reset", "how do i reset my password ?", "my password is lost", "reset the password"],
    "transfer": ["money transfer", "my money transfer is late", "where is the transfer ?", "a transfer of money"],
}
SURE = Calibration((1.0, 0.0), 100.0, 0.97, 0.01, 500)
FITTED: dict[str, linear.Fitted] = {}  # the base of a session is always the same
UNSURE = Calibration((1.0, 0.0), -100.0, 0.97, 0.01, 500)


class ScriptedProvider:
    """Answers by a function of the text; an exception is raised, None never comes."""

    def __init__(self, answer: Callable[[str], str | UnderstudyError | None], *, cost: int = 7, training_allowed: bool = True) -> None:
        self.name = "vendor"
        self.training_allowed = training_allowed
        self.asked: list[str] = []
        self.circuit = ""
        self.gate: asyncio.Event | None = None  # answers wait for it
        self._answer = answer
        self._cost = cost

    async def complete(self, model: str, prompt: Prompt, deadline: float | None) -> Completion:
        text = prompt.messages[-1].content
        self.asked.append(text)
        answer = self._answer(text)
        if self.gate is not None:
            await self.gate.wait()
        if answer is None:
            try:
                async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                    await asyncio.Event().wait()
            except TimeoutError:
                raise DeadlineExceeded("late", stage="provider") from None
        if isinstance(answer, UnderstudyError):
            raise answer
        assert answer is not None
        tokens = tuple(TokenLogprob(word, -0.5, ((word, -0.5), ("x", -1.5))[: prompt.top_logprobs]) for word in answer.split())
        return Completion(answer, Usage(20, 2), f"{model}-2026", self._cost, 1, logprobs=tokens if prompt.logprobs else ())

    def gives_logprobs(self, model: str) -> bool:
        return model == "open"

    def worst_cost_micro_usd(self, model: str, prompt: Prompt) -> int | None:
        return 50

    def aborted_cost_micro_usd(self, model: str, prompt: Prompt, text: str) -> int:
        return 5

    async def stream(self, model: str, prompt: Prompt, deadline: float | None) -> AsyncGenerator[Part, None]:
        completion = await self.complete(model, prompt, deadline)
        yield Part(completion.text)
        yield Part(completion=completion)

    async def embed(self, model: str, texts: Sequence[str], deadline: float | None) -> Embeddings:
        raise Unimplemented("no embeddings here")

    def open_circuit(self) -> str:
        return self.circuit

    def health(self) -> Health:
        return Health("open" if self.circuit else "closed")

    async def close(self) -> None:
        pass


def ask(
    *texts: str,
    preference: Preference | None = None,
    max_cost_micro_usd: int | None = None,
    skill: str = "intent",
    **more: Any,
) -> Ask:
    """A request for texts."""
    return Ask(skill, [Work(text) for text in texts], limits=Limits(preference, max_cost_micro_usd), **more)


class Heads:
    """Adapters in memory."""

    def __init__(self) -> None:
        self.heads: dict[str, LinearHead] = {}

    def current(self, skill: str) -> LinearHead | None:
        return self.heads.get(skill)


class Bench:
    """A router with everything around it within reach."""

    def __init__(self, runtime: Runtime, lake: Lake, head: Callable[[Calibration | None, str], LinearHead]) -> None:
        self.runtime = runtime
        self.lake = lake
        self.heads = Heads()
        self.rows: list[dict[str, object]] = []
        self._head = head

    def student(self, calibration: Calibration | None, *, base_sha256: str = "") -> None:
        self.heads.heads["intent"] = self._head(calibration, base_sha256)

    def router(
        self,
        provider: ScriptedProvider | None,
        *,
        bar: float = 0.8,
        max_cost: int | None = None,
        labels: tuple[str, ...] = LABELS,
    ) -> Router:
        skill = Skill(
            "intent",
            instruction="Say what.",
            labels=labels,
            teachers=("vendor/big",) if provider else (),
            base="embedder",
            deliver_bar=bar,
            max_cost_micro_usd=max_cost,
        )
        return self.router_of(skill, {"vendor": provider} if provider else {})

    def router_of(self, skill: Skill, providers: Mapping[str, ScriptedProvider], **more: Any) -> Router:
        parts = RouteParts(SkillBook({skill.name: skill}, self.heads), self.runtime, providers, self.default_model, Paces(), **more)
        return Router(parts, self.lake, QualityJudge(self.runtime, lambda: "embedder", QualityBook(self.lake.path)))

    def default_model(self, task: Task) -> str:
        return {Task.FEATURE_EXTRACTION: "embedder"}[task]

    def row(self, index: int = -1) -> dict[str, object]:
        return self.rows[index]


@pytest_asyncio.fixture
async def runtime(small_models: Path) -> AsyncIterator[Runtime]:
    found = Runtime(Repository(small_models), make_loader(RuntimeConfig(threads=1), NullObserver()))
    await found.load("embedder")
    yield found
    await found.close()


async def vectors(runtime: Runtime, texts: list[str]) -> FloatArray:
    import numpy as np

    with runtime.use("embedder", Task.FEATURE_EXTRACTION) as model:
        results = await model.embed(texts, call=Call("test"), pooling="mean", normalize=True)
    return np.stack([item for item in results.items if not isinstance(item, Exception)])


@pytest_asyncio.fixture
async def bench(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    import numpy as np

    texts = [text for label in LABELS for text in TEXTS[label]]
    classes = np.repeat(np.arange(len(LABELS)), [len(TEXTS[label]) for label in LABELS])
    manifest = runtime.manifest("embedder")
    digest = manifest.files["model.onnx"].sha256
    if digest not in FITTED:
        FITTED[digest] = linear.fit(await vectors(runtime, texts), classes, len(LABELS), strengths=(100.0,))
    fitted = FITTED[digest]
    made = 0

    def head(calibration: Calibration | None, base_sha256: str) -> LinearHead:
        nonlocal made
        made += 1
        spec = HeadSpec(
            name="intent",
            version=str(made),
            base=Base(name="embedder", version=manifest.version, sha256=base_sha256 or digest),
            features=Features(pooling="mean", normalize=True, size=manifest.hidden_size),
            labels=list(LABELS),
            calibration=calibration.to_json() if calibration else {},
        )
        folder = tmp_path / "heads" / str(made)
        write_linear_head(folder, spec, fitted.weight, fitted.bias)
        return LinearHead.load(folder, base_sha256=spec.base.sha256)

    lake = Lake(tmp_path / "lake")
    bench = Bench(runtime, lake, head)
    append = lake.append

    def watch(table: str, records: list[dict[str, object]]) -> bool:
        bench.rows += records
        return append(table, records)

    monkeypatch.setattr(lake, "append", watch)
    yield bench
    for log in lake._logs.values():
        log.close()


__all__ = ["SURE", "UNSURE", "Bench", "ScriptedProvider", "Student", "ask"]
