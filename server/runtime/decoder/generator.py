"""What a loaded decoder does for its callers: a request in words to a job of the engine, and the engine's pieces back to words."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.core import Call, FinishReason, Format, ToolCall, Usage
from server.errors import AdapterNotFound, InputTooLong, InvalidArgument, UnderstudyError
from server.runtime.decoder.contract import AdapterUse, DecoderEngine, Job, Matcher, Piece, Stream, TextStream, Times, Token
from server.runtime.decoder.prompt import PromptReader
from server.runtime.decoder.request import Answer, Confidence, Delta, GenerateRequest, GenerationTimings, Summary
from server.runtime.decoder.tools import ToolReader, forced_call
from server.runtime.manifest import Decoder, Manifest
from server.runtime.tokenizers import TextTokenizer

# Prompts up to so many characters are tokenized on the event loop: a hand-over to a thread costs more.
_SHORT_CHARACTERS = 2000


class Adapters(Protocol):
    """Adapters that are loaded over the model."""

    async def acquire(self, name: str) -> AdapterUse:
        """Holds the adapter "name" (its newest version) or "name@version"; raises AdapterNotFound with those that there are."""


class Grammars(Protocol):
    """Makes grammars of what callers ask for."""

    async def compile(self, form: Format) -> Callable[[], Matcher]:
        """Raises InvalidArgument (field "response_format...") with the reason."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a model is made of. `texts` makes the detokenizers of a request from its stop strings, and from whether the answer goes on from
    the prompt's last word; `check` refuses bad sampling values.
    """

    manifest: Manifest
    tokenizer: TextTokenizer
    reader: PromptReader
    engine: DecoderEngine
    texts: Callable[[Sequence[str], bool], Callable[[], TextStream]]
    check: Callable[[GenerateRequest], None]
    grammars: Grammars | None = None
    adapters: Adapters | None = None


class GeneratorModel:
    """A text-generation model in memory. Used on the event loop; owns none of its parts."""

    def __init__(self, parts: Parts) -> None:
        assert parts.manifest.decoder is not None, "a manifest of form decoder"
        self.manifest = parts.manifest
        self.decoder: Decoder = parts.manifest.decoder
        self.tokenizer = parts.tokenizer
        self._parts = parts

    @property
    def chats(self) -> bool:
        """Whether it takes conversations."""
        return self._parts.reader.chats

    def text_of(self, token_id: int) -> str:
        """The text of one token by itself."""
        return str(self.tokenizer.inner.decode([token_id], skip_special_tokens=False))

    async def generate(self, request: GenerateRequest, call: Call) -> Generation:
        """Accepts a request and queues it; the answers come from what is returned.

        Raises:
            InvalidArgument: a field is to blame, which is named; InputTooLong with the prompt's tokens and the limit.
            AdapterNotFound, Overloaded, Draining: as their names say.
        """
        began = time.monotonic()
        parts = self._parts
        _check_counts(request)
        parts.check(request)
        call.stage = "tokenize"
        prompt = await self._tokenize(request)
        tokenized = time.monotonic()
        self._check_length(len(prompt))
        matcher = await self._grammar(request)
        adapter = await self._adapter(request)
        call.stage = "queue"
        try:
            stream = parts.engine.submit(self._job(request, prompt, matcher, adapter, call))
        except BaseException:
            if adapter is not None:
                adapter.release()
            raise
        return Generation(self, request, stream, _Start(began, tokenized, len(prompt), adapter, call))

    def _job(
        self, request: GenerateRequest, prompt: list[int], matcher: Callable[[], Matcher] | None, adapter: AdapterUse | None, call: Call
    ) -> Job:
        prefix = adapter.prefix if adapter is not None else 0
        room = max(1, self.manifest.max_tokens - len(prompt) - prefix)
        stops = frozenset(() if request.ignore_eos else self.decoder.stop_token_ids) | frozenset(request.stop_token_ids)
        return Job(
            prompt=prompt,
            sampling=request.sampling,
            max_tokens=min(request.max_tokens or room, room),
            call=call,
            n=request.best_of or request.n,
            stop_ids=stops,
            adapter=adapter,
            text=self._parts.texts(request.stop, bool(request.prompt) or len(request.token_ids or ()) > 1),
            matcher=matcher,
        )

    async def _tokenize(self, request: GenerateRequest) -> list[int]:
        reader = self._parts.reader
        if request.prompt is not None:
            if len(request.prompt) <= _SHORT_CHARACTERS:
                return reader.text(request.prompt)
            return await asyncio.to_thread(reader.text, request.prompt)
        if request.messages is not None:
            return await asyncio.to_thread(reader.chat, request.messages, request.tools)
        ids = list(request.token_ids or ())
        if not ids:
            raise InvalidArgument("token_ids.ids is empty; expected one id at least.", field="token_ids.ids")
        self._check_ids(ids, "token_ids.ids")
        return ids

    def _check_ids(self, ids: Sequence[int], field: str) -> None:
        known = self.decoder.vocabulary
        bad = next((index for index, one in enumerate(ids) if not 0 <= one < known), None)
        if bad is not None:
            message = f"{field}[{bad}] is {ids[bad]}; the model knows ids from 0 to {known - 1}."
            raise InvalidArgument(message, field=f"{field}[{bad}]", limit=known)

    def _check_length(self, tokens: int) -> None:
        limit = self.manifest.max_tokens
        if tokens >= limit:
            raise InputTooLong(
                f"the prompt has {tokens} tokens; the model's context is {limit} tokens, prompt and answer together. Shorten the prompt.",
                tokens=tokens,
                limit=limit,
            )

    async def _grammar(self, request: GenerateRequest) -> Callable[[], Matcher] | None:
        form = request.format
        if request.tool_choice:
            form = forced_call(request.tools, request.tool_choice)
        if form is None:
            return None
        if request.tools and request.format is not None:
            raise InvalidArgument("response_format and tools are both set; expected one of them.", field="response_format")
        if self._parts.grammars is None:
            raise InvalidArgument(f"model {self.manifest.name!r} cannot follow a response_format. Leave it out.", field="response_format")
        return await self._parts.grammars.compile(form)

    async def _adapter(self, request: GenerateRequest) -> AdapterUse | None:
        if not request.adapter:
            return None
        if self._parts.adapters is None:
            message = f"model {self.manifest.name!r} takes no adapters; expected an empty adapter."
            raise AdapterNotFound(message, adapter=request.adapter[:128], field="adapter")
        return await self._parts.adapters.acquire(request.adapter)


@dataclass(slots=True)
class _Start:
    """When a request began (monotonic seconds), and what it began with."""

    began: float
    tokenized: float
    prompt: int
    adapter: AdapterUse | None
    call: Call


class Generation:
    """The answers to one accepted request: iterate it once, or `collect` it. `summary` is whole once the iteration has ended.

    Leaving the iteration early, or cancelling the task that iterates, frees the engine's place within one step.
    """

    def __init__(self, model: GeneratorModel, request: GenerateRequest, stream: Stream, start: _Start) -> None:
        self._model = model
        self._request = request
        self._stream = stream
        self._start = start
        names = [tool.name for tool in request.tools]
        self._answers = [_Growing(names) for _ in range(request.best_of or request.n)]
        self._cached = 0
        self.prompt_tokens = start.prompt
        self.adapter = start.adapter.key if start.adapter is not None else ""  # name@version; empty without one

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What has come since the last look, merged: at most one delta an answer, and none that is empty."""
        call = self._start.call
        try:
            async for pieces in self._stream:
                call.stage = "run"
                found = self._merge(pieces)
                if found:
                    yield found
        finally:
            self.cancel()

    async def collect(self) -> list[Answer]:
        """All answers, whole; with `best_of`, those with the highest mean log-probability, best first."""
        texts: list[list[str]] = [[] for _ in self._answers]
        tokens: list[list[Token]] = [[] for _ in self._answers]
        calls: list[list[ToolCall]] = [[] for _ in self._answers]
        async for deltas in self.deltas():
            for delta in deltas:
                texts[delta.index].append(delta.text)
                tokens[delta.index] += delta.tokens
                calls[delta.index] += delta.tool_calls
        answers = []
        for index, grown in enumerate(self._answers):
            assert grown.finish is not None, "the engine ends every answer"
            answers.append(Answer("".join(texts[index]), tokens[index], grown.finish, calls[index], grown.confidence(), grown.count))
        if len(answers) > self._request.n:
            answers.sort(key=lambda answer: -answer.confidence.logprob)
        return answers[: self._request.n]

    def cancel(self) -> None:
        """Ends the work, if it has not ended, and lets the adapter go. May be called at any time, and twice."""
        self._stream.cancel()
        adapter, self._start.adapter = self._start.adapter, None
        if adapter is None:
            return
        if all(grown.finish is not None for grown in self._answers):
            adapter.release()
        else:
            # The step that runs now may read the adapter's slot yet; the stream says when the engine has dropped the job.
            task = asyncio.get_running_loop().create_task(_release_after(self._stream, adapter))
            _LEAVING.add(task)
            task.add_done_callback(_LEAVING.discard)

    def summary(self) -> Summary:
        """Who answered, what it used and how long it took."""
        start = self._start
        times = [grown.times for grown in self._answers]
        gaps = sum(max(0, grown.count - 1) for grown in self._answers)
        first = min((one.first_token for one in times if one.first_token), default=0.0)
        queued = max((one.admitted - one.arrival for one in times if one.admitted), default=0.0)
        timings = GenerationTimings(
            tokenize=start.tokenized - start.began,
            queue=max(0.0, queued),
            first_token=max(0.0, first - start.began) if first else 0.0,
            inter_token=sum(one.last_token - one.first_token for one in times) / gaps if gaps else 0.0,
            total=time.monotonic() - start.began,
        )
        manifest = self._model.manifest
        usage = Usage(start.prompt, sum(grown.count for grown in self._answers), self._cached)
        return Summary(manifest.name, manifest.version, self.adapter, usage, timings)

    def _merge(self, pieces: Sequence[Piece]) -> list[Delta]:
        found: dict[int, Delta] = {}
        keep = self._request.return_token_ids or self._request.sampling.logprobs
        for piece in pieces:
            self._cached = max(self._cached, piece.cached)
            delta = found.setdefault(piece.index, Delta(piece.index, "", []))
            self._answers[piece.index].take(piece, delta, keep)
        return [delta for delta in found.values() if delta.text or delta.tokens or delta.finish is not None]


_LEAVING: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly


async def _release_after(stream: Stream, adapter: AdapterUse) -> None:
    """Lets an adapter go once a cancelled job has left the engine."""
    try:
        async for _ in stream:
            pass
    except UnderstudyError:
        pass
    finally:
        adapter.release()


class _Growing:
    """One answer while it is written."""

    __slots__ = ("_entropy", "_logprob", "_margin", "_tools", "count", "finish", "times")

    def __init__(self, tools: Sequence[str]) -> None:
        self._tools = ToolReader(tools) if tools else None
        self._logprob = self._entropy = self._margin = 0.0
        self.count = 0
        self.finish: FinishReason | None = None
        self.times = Times()

    def take(self, piece: Piece, delta: Delta, keep: bool) -> None:
        """Adds a piece to what the caller gets next."""
        text = "".join([token.text for token in piece.tokens]) + piece.text_end
        for token in piece.tokens:
            self._logprob += token.logprob
            self._entropy += token.entropy
            self._margin += token.margin
        self.count += len(piece.tokens)
        delta.count += len(piece.tokens)
        self.times = piece.times
        if keep:
            delta.tokens += piece.tokens
        delta.text += text if self._tools is None else self._tools.push(text)
        if piece.finish is not None:
            self.finish = piece.finish
            if self._tools is not None:
                rest, delta.tool_calls = self._tools.finish()
                delta.text += rest
                if delta.tool_calls and piece.finish is FinishReason.STOP:
                    self.finish = FinishReason.TOOL_CALLS
            delta.finish = self.finish
            delta.confidence = self.confidence()

    def confidence(self) -> Confidence:
        """Means so far; zeros for an answer without tokens."""
        count = max(1, self.count)
        return Confidence(self._logprob / count, self._entropy / count, self._margin / count)


MOST_TOOLS = 128


def _check_counts(request: GenerateRequest) -> None:
    """Raises InvalidArgument for lengths and tools that cannot be."""
    if request.max_tokens < 0:
        message = f"sampling.max_tokens is {request.max_tokens}; expected 0 (what fits) or more."
        raise InvalidArgument(message, field="sampling.max_tokens", limit=0)
    if request.tools and request.messages is None:
        raise InvalidArgument("tools are given without a chat; expected a conversation, whose template shows them.", field="tools")
    if len(request.tools) > MOST_TOOLS:
        raise InvalidArgument(f"tools has {len(request.tools)} entries; expected at most {MOST_TOOLS}.", field="tools", limit=MOST_TOOLS)
    for index, tool in enumerate(request.tools):
        if not tool.name:
            raise InvalidArgument(f"tools[{index}].name is empty; expected the function's name.", field=f"tools[{index}].name")
