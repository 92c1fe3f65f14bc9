"""The exported student under the server's own runtime: what it answers to a skill's rows, and the log-probabilities that it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from server.config import Config
from server.core import Call, FloatArray, Priority, Timings
from server.routing.candidates import Allowance, Answer, Signals
from server.routing.local_model import GeneratorCandidate
from server.routing.pace import Paces
from server.routing.skills import Skill
from server.runtime.decoder.contract import Sampling
from server.runtime.decoder.request import GenerateRequest
from server.runtime.loader import make_loader
from server.runtime.observer import NullObserver
from server.runtime.repository import Repository
from server.runtime.runtime import Runtime
from trainer.curate.rows import Row
from trainer.generation.prompts import brief_of, work_of

if TYPE_CHECKING:
    from trainer.generation.export import Exported

_AT_ONCE = 32  # rows in the engine at a time


@dataclass(slots=True)
class Said:
    """What a student made of a row: its text, or "" with the error's reason; what was seen of its making."""

    text: str = ""
    finish: Any = None
    valid: bool | None = None
    error: str = ""
    signals: Signals = field(default_factory=Signals)


class ServedStudent:
    """A model of a repository in memory, with its adapters. Use: `student = await ServedStudent.open(...)`, then `close`."""

    def __init__(self, runtime: Runtime, model: str, spec: str) -> None:
        self._runtime = runtime
        self._model = model
        self.spec = spec

    @classmethod
    async def open(cls, config: Config, root: Path, model: str, adapter: str = "", version: str | None = None) -> ServedStudent:
        """`adapter`: "name@version", which is loaded too. Raises ModelNotFound, ModelRejected, AdapterNotFound."""
        generation = config.generation.model_copy(update={"adapters": []})
        runtime = Runtime(Repository(root), make_loader(config.runtime, NullObserver(), generation))
        try:
            await runtime.load(model, version)
            if adapter:
                name, _, number = adapter.partition("@")
                with runtime.use_adapters(model) as adapters:
                    await adapters.load(name, number or None)
            return cls(runtime, model, f"{model}/{adapter}" if adapter else model)
        except BaseException:
            await runtime.close(drain=False)
            raise

    @classmethod
    async def of(cls, config: Config, exported: Exported) -> ServedStudent:
        """The student that was exported."""
        target = exported.target
        return await cls.open(config, exported.root, target.model, f"{target.adapter}@{target.adapter_version}" if target.adapter else "")

    async def answers(self, skill: Skill, rows: Sequence[Row], progress: Callable[[int, int], None]) -> list[Said]:
        """What the server would answer to each row: the skill's prompt, grammar, sampling and checks."""
        said = [Said() for _ in rows]
        briefs: dict[tuple[Any, ...], list[int]] = {}
        for index, row in enumerate(rows):
            briefs.setdefault((row.parameters, row.instruction), []).append(index)
        done = 0
        for indices in briefs.values():
            candidate = GeneratorCandidate(self.spec, self._runtime, brief_of(skill, rows[indices[0]]), Paces())
            for start in range(0, len(indices), _AT_ONCE):
                part = indices[start : start + _AT_ONCE]
                call = Call("trainer", priority=Priority.BULK)
                async for place, answer in candidate.answers([work_of(rows[i]) for i in part], call, Timings(), Allowance()):
                    said[part[place]] = _said(answer) if isinstance(answer, Answer) else Said(error=answer.error.reason)
                done += len(part)
                progress(done, len(rows))
        return said

    async def greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int, top: int = 8) -> list[list[tuple[int, Mapping[int, float]]]]:
        """Greedy tokens behind each prompt of token ids, each with the log-probabilities of the `top` likeliest and its own."""
        found: list[list[tuple[int, Mapping[int, float]]]] = []
        adapter = self.spec.partition("/")[2]
        for prompt in prompts:
            request = GenerateRequest(
                token_ids=list(prompt),
                sampling=Sampling(temperature=0, logprobs=True, top_logprobs=top),
                max_tokens=max_tokens,
                adapter=adapter,
                return_token_ids=True,
            )
            with self._runtime.use_generator(self._model) as model:
                generation = await model.generate(request, Call("trainer", priority=Priority.BULK))
                (answer,) = await generation.collect()
            found.append([(token.id, {**dict(token.top), token.id: token.logprob}) for token in answer.tokens])
        return found

    async def close(self) -> None:
        """Unloads it."""
        await self._runtime.close()


def observed_rows(skill: Skill, rows: Sequence[Row], said: Sequence[Said]) -> list[Any]:
    """The answers as the server's quality model sees them (server.quality.scorer.Observed)."""
    from server.core import Task
    from server.quality.scorer import Observed

    tasks = {task.value: task for task in Task}
    task = tasks.get(skill.task, Task.TEXT_GENERATION)

    def shown(values: FloatArray) -> FloatArray | None:
        return values if len(values) else None

    return [
        Observed(
            prompt=work_of(row).plain,
            answer=one.text,
            task=task,
            finish=one.finish,
            logprobs=shown(one.signals.logprobs),
            entropies=shown(one.signals.entropies),
            margins=shown(one.signals.margins),
            valid=one.valid,
        )
        for row, one in zip(rows, said, strict=True)
    ]


def _said(answer: Answer) -> Said:
    return Said(answer.reply.text, answer.reply.finish, answer.signals.valid, "", answer.signals)


def torch_greedy(student: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[FloatArray]:
    """Log-probabilities float32[n + 1, V] that the torch student gives behind each prompt and each of the n tokens of an answer to it."""
    import torch

    student.eval()
    device = next(student.parameters()).device
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *answer]], device=device)
            logits = student(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        found.append(np.asarray(torch.log_softmax(logits[-len(answer) - 1 :].float(), dim=-1).cpu(), np.float32))
    return found
