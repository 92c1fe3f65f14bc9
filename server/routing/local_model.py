"""A local model that does a skill's task by itself: a generator, an encoder-decoder, a classifier, an embedder, ..."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from server.core import Call, Message, Reply, Results, Task, Timings, TokenLogprob, Usage, Work
from server.errors import InternalError, ProviderUnavailable, UnderstudyError
from server.quality.model import QualityModel
from server.routing.candidates import Allowance, Answer, Brief, Failure, Piece, Signals
from server.routing.judge import SCORED
from server.routing.pace import Paces
from server.routing.prompting import format_of, max_tokens_of, messages_of, plain_prompt, read_reply
from server.routing.schema_check import checker
from server.runtime.decoder.contract import Sampling, Token
from server.runtime.decoder.generator import GeneratorModel
from server.runtime.decoder.request import Answer as Generated
from server.runtime.decoder.request import Delta, GenerateRequest
from server.runtime.runtime import Runtime
from server.runtime.seq2seq.contract import Seq2SeqOptions

_SECOND_TEMPERATURE = 0.7  # a second try at temperature 0 would say the same
_MAX_LABELS = 8


@dataclass(slots=True, frozen=True)
class Pinned:
    """A student that a model serves as: its name in decisions, the model's version, and how its answers are judged.

    `quality`: of each answer, where nothing tells them apart: what the student was measured to be on held-out rows.
    """

    name: str
    version: str
    judge: QualityModel | None = None
    quality: float | None = None


class LocalModel:
    """What all of them share. `model`: "model" or "model/adapter"; `task`: of the model, which need not be the skill's.

    Without `pinned` the version answers that is the model's default.
    """

    local = True
    scored = True
    aborted_micro_usd = 0

    def __init__(self, model: str, task: Task, runtime: Runtime, brief: Brief, paces: Paces, pinned: Pinned | None = None) -> None:
        self._model, _, self._adapter = model.partition("/")
        self._task = task
        self._runtime = runtime
        self._brief = brief
        self._paces = paces
        self._pinned = pinned
        self._version = pinned.version if pinned is not None else None
        if pinned is not None:
            self.name = pinned.name
        else:
            self.name = f"local:{model}@{runtime.manifest(self._model).version}" if not self._adapter else f"local:{model}"

    def closed(self) -> str:
        """See Candidate."""
        if self._version is not None:
            return "" if self._runtime.has(self._model, self._version) else f"{self._model}@{self._version} is not loaded"
        return "" if self._model in self._runtime.models_for(self._task) else f"{self._model!r} is not loaded"

    def _judged(self, answer: Answer) -> Answer:
        """With how the student's answers are judged, where it has a way of its own."""
        pinned = self._pinned
        if pinned is None or (pinned.judge is None and pinned.quality is None):
            return answer
        if self._brief.skill.task in SCORED or answer.quality is not None:
            return replace(answer, judged_by=pinned.judge)
        return replace(answer, quality=pinned.quality, basis="what it was measured to be on held-out rows")

    def expected_s(self) -> float | None:
        """See Candidate."""
        return self._paces.expected_s(self.name)

    def worst_cost_micro_usd(self, work: Work) -> int | None:
        """Nothing."""
        return 0


class EncoderCandidate(LocalModel):
    """Classification, zero-shot classification, entities, spans, vectors, relevance and similarity, translation and summaries."""

    async def answers(
        self, works: Sequence[Work], call: Call, timings: Timings, allowed: Allowance
    ) -> AsyncIterator[tuple[int, Answer | Failure]]:
        """See Candidate."""
        started = time.perf_counter()
        try:
            results: Results[Any] = await self._run(works, call)
        except UnderstudyError as error:
            for index in range(len(works)):
                yield index, Failure(error)
            return
        elapsed = time.perf_counter() - started
        self._paces.took(self.name, elapsed)
        timings.merge(results.timings)
        share = Usage(results.usage.input // len(works), results.usage.output // len(works))
        for index, item in enumerate(results.items):
            if isinstance(item, Exception):
                known = item if isinstance(item, UnderstudyError) else InternalError(f"model {self._model!r} failed on an item")
                yield index, Failure(known, elapsed_s=elapsed)
            else:
                answer = Answer(self._reply(item), usage=share, source_model=self._model, elapsed_s=elapsed)
                yield index, self._judged(answer)

    async def second_try(self, work: Work, first: Answer, call: Call, allowed: Allowance) -> Answer | Failure | None:
        """None: it says the same again."""
        return None

    async def stream(self, work: Work, call: Call, allowed: Allowance) -> AsyncGenerator[Piece, None]:
        """The whole answer at once."""
        async for _, answer in self.answers([work], call, Timings(), allowed):
            if isinstance(answer, Failure):
                raise answer.error
            yield Piece(answer.reply.text)
            yield Piece(answer=answer)

    async def _run(self, works: Sequence[Work], call: Call) -> Results[Any]:
        if self._task in (Task.TRANSLATION, Task.SUMMARIZATION):
            parameters = self._brief.parameters
            options = Seq2SeqOptions(parameters.get("source_language", ""), parameters.get("target_language", ""))
            with self._runtime.use_seq2seq(self._model, self._task, self._version) as seq2seq:
                return await seq2seq.generate([work.text for work in works], call, options)
        with self._runtime.use(self._model, self._task, self._version) as model:
            return await self._encode(model, works, call)

    async def _encode(self, model: Any, works: Sequence[Work], call: Call) -> Results[Any]:
        asked = self._brief.skill.task
        texts = [work.text for work in works]
        runs: dict[str, Callable[[], Awaitable[Results[Any]]]] = {
            "feature-extraction": lambda: model.embed(texts, call=call),
            "token-classification": lambda: model.extract_entities(texts, call=call),
            "question-answering": lambda: model.answer([(work.text, work.text_pair or "") for work in works], call=call),
            "sentence-similarity": lambda: _similarities(model, works, call),
            "text-ranking": lambda: _relevances(model, works, call),
        }
        if asked in runs:
            return await runs[asked]()
        if self._brief.labels:
            chosen: Results[Any] = await model.classify_zero_shot(texts, self._brief.labels, call=call)
            return chosen
        pairs = [(work.text, work.text_pair) if work.text_pair is not None else work.text for work in works]
        classified: Results[Any] = await model.classify(pairs, call=call, top_k=_MAX_LABELS)
        return classified

    def _reply(self, item: Any) -> Reply:
        asked = self._brief.skill.task
        if asked == "feature-extraction":
            return Reply(embedding=item)
        if asked in ("sentence-similarity", "text-ranking"):
            return Reply(f"{item:.6g}", score=float(item))
        if asked == "token-classification":
            return Reply("; ".join(f"{one.label}: {one.text}" for one in item), entities=item)
        if asked == "question-answering":
            return Reply(item[0].text if item else "", spans=item)
        if asked in ("translation", "summarization"):
            return Reply(item.text, finish=item.finish)
        return Reply(item[0].name if item else "", labels=item)


async def _similarities(model: Any, works: Sequence[Work], call: Call) -> Results[Any]:
    """Cosine of the two texts' vectors."""
    texts = [text for work in works for text in (work.text, work.text_pair or "")]
    found: Results[Any] = await model.embed(texts, call=call, normalize=True)
    items: list[Any] = []
    for first, second in zip(found.items[::2], found.items[1::2], strict=True):
        if isinstance(first, Exception) or isinstance(second, Exception):
            items.append(first if isinstance(first, Exception) else second)
        else:
            items.append(float(np.dot(first, second)))
    return Results(items, found.timings, found.usage)


async def _relevances(model: Any, works: Sequence[Work], call: Call) -> Results[Any]:
    """Each pair's relevance; documents of one query together."""
    items: list[Any] = [None] * len(works)
    whole: Results[Any] = Results(items)
    queries: dict[str, list[int]] = {}
    for index, work in enumerate(works):
        queries.setdefault(work.text, []).append(index)
    used = 0
    for query, indices in queries.items():
        found = await model.rerank(query, [works[i].text_pair or "" for i in indices], call=call)
        whole.timings.merge(found.timings)
        used += found.usage.input
        for ranked in found.items:
            if isinstance(ranked, Exception):
                place = getattr(ranked, "metadata", {}).get("field", "documents[0]").partition("[")[2].partition("]")[0]
                items[indices[int(place)]] = ranked
            else:
                items[indices[ranked.index]] = ranked.score
    whole.usage = Usage(used)
    return whole


class GeneratorCandidate(LocalModel):
    """A text-generation model that is told what a provider would be told."""

    def __init__(self, model: str, runtime: Runtime, brief: Brief, paces: Paces, pinned: Pinned | None = None) -> None:
        super().__init__(model, Task.TEXT_GENERATION, runtime, brief, paces, pinned)
        self._check = checker(brief.skill.json_schema) if brief.skill.json_schema else None

    async def answers(
        self, works: Sequence[Work], call: Call, timings: Timings, allowed: Allowance
    ) -> AsyncIterator[tuple[int, Answer | Failure]]:
        """See Candidate. All items run at once, in the same steps of the engine."""

        async def numbered(index: int, work: Work) -> tuple[int, Answer | Failure]:
            return index, await self._one(work, call, timings, messages_of(self._brief, work))

        tasks = [asyncio.ensure_future(numbered(index, work)) for index, work in enumerate(works)]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()

    async def second_try(self, work: Work, first: Answer, call: Call, allowed: Allowance) -> Answer | Failure | None:
        """Asks again with a fresh sample, naming what was found wanting."""
        wrong = "; ".join(first.findings) or "it may be wrong"
        again = (
            *messages_of(self._brief, work),
            Message("assistant", first.reply.text),
            Message("user", f"Look at your answer again: {wrong}. Answer anew, with the answer alone."),
        )
        return await self._one(work, call, Timings(), again, temperature=_SECOND_TEMPERATURE)

    async def stream(self, work: Work, call: Call, allowed: Allowance) -> AsyncGenerator[Piece, None]:
        """See Candidate."""
        started = time.perf_counter()
        with self._runtime.use_generator(self._model, version=self._version) as model:
            generation = await model.generate(self._request(model, messages_of(self._brief, work), None), call)
            texts: list[str] = []
            tokens: list[Token] = []
            last: Delta | None = None
            try:
                async for deltas in generation.deltas():
                    for delta in deltas:
                        texts.append(delta.text)
                        tokens += delta.tokens
                        last = delta if delta.finish is not None else last
                        if delta.text:
                            yield Piece(delta.text, _signals(tokens))
            finally:
                generation.cancel()
            usage = generation.summary().usage
            written = self._written(model, tokens)
        assert last is not None and last.finish is not None, "the engine ends every answer"
        self._paces.took(self.name, time.perf_counter() - started)
        reply = Reply("".join(texts), tool_calls=last.tool_calls, finish=last.finish, tokens=written)
        elapsed = time.perf_counter() - started
        signals = replace(_signals(tokens), valid=None if self._check is None else not self._check(reply.text))
        yield Piece(answer=self._judged(Answer(reply, usage=usage, source_model=self._model, elapsed_s=elapsed, signals=signals)))

    async def _one(
        self, work: Work, call: Call, timings: Timings, messages: Sequence[Message], temperature: float | None = None
    ) -> Answer | Failure:
        started = time.perf_counter()
        try:
            with self._runtime.use_generator(self._model, version=self._version) as model:
                generation = await model.generate(self._request(model, messages, temperature), call)
                try:
                    (answer,) = await generation.collect()
                finally:
                    generation.cancel()
                summary = generation.summary()
                written = self._written(model, answer.tokens)
        except UnderstudyError as error:
            return Failure(error, elapsed_s=time.perf_counter() - started)
        elapsed = time.perf_counter() - started
        self._paces.took(self.name, elapsed)
        took = summary.timings
        timings.merge(Timings(took.tokenize, took.queue, max(0.0, took.total - took.queue - took.tokenize)))
        return self._read(work, answer, written, summary.usage, elapsed)

    def _written(self, model: GeneratorModel, tokens: Sequence[Token]) -> tuple[TokenLogprob, ...]:
        if not self._brief.manner.logprobs:
            return ()
        return tuple(TokenLogprob(one.text, one.logprob, [(model.text_of(id), logprob) for id, logprob in one.top]) for one in tokens)

    def _read(self, work: Work, answer: Generated, written: Sequence[TokenLogprob], usage: Usage, elapsed: float) -> Answer | Failure:
        signals = _signals(answer.tokens)
        if answer.tool_calls:
            found: Reply | str = Reply(answer.text, tool_calls=answer.tool_calls, finish=answer.finish)
        else:
            found = read_reply(self._brief, work, answer.text, answer.finish, self._check)
        if isinstance(found, str):
            return Failure(ProviderUnavailable(f"{self.name} answered with {found}."), usage=usage, elapsed_s=elapsed)
        signals = replace(signals, valid=True if self._check else None)
        found = replace(found, tokens=written)
        return self._judged(Answer(found, usage=usage, source_model=self._model, elapsed_s=elapsed, signals=signals))

    def _request(self, model: GeneratorModel, messages: Sequence[Message], temperature: float | None) -> GenerateRequest:
        skill, manner = self._brief.skill, self._brief.manner
        tools = self._brief.tools if model.chats and manner.tool_choice != "none" else ()
        asked = GenerateRequest(
            sampling=Sampling(
                temperature=skill.temperature if temperature is None else temperature,
                top_p=1.0 if manner.top_p is None else manner.top_p,
                presence_penalty=manner.presence_penalty,
                frequency_penalty=manner.frequency_penalty,
                seed=manner.seed,
                logprobs=True,
                top_logprobs=manner.top_logprobs,
            ),
            max_tokens=max_tokens_of(self._brief),
            stop=manner.stop,
            format=None if tools else format_of(self._brief),
            tools=tools,
            tool_choice=manner.tool_choice if tools else "",
            adapter=self._adapter,
            return_token_ids=True,
        )
        if model.chats:
            return replace(asked, messages=messages)
        return replace(asked, prompt=plain_prompt(messages))


def _signals(tokens: Sequence[Token]) -> Signals:
    return Signals(
        np.array([token.logprob for token in tokens], np.float32),
        np.array([token.entropy for token in tokens], np.float32),
        np.array([token.margin for token in tokens], np.float32),
    )
