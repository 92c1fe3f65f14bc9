"""`understudy run MODEL "prompt"`: streams an answer to the terminal, from a running server or from a model loaded in this process.

With --skill the name is a skill's, and whoever its route finds answers.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the command line asks for. `options` are keyword arguments of the client's `generate`."""

    model: str
    prompt: str
    chat: bool = False
    system: str = ""
    address: str = "127.0.0.1:50051"
    local: bool = False
    verbose: bool = False
    skill: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


class Speaker(Protocol):
    """Who answers: `say` streams one answer's text; afterwards `story` has what it took, in words."""

    story: str

    def say(self, prompt: str | None, messages: list[dict[str, str]] | None) -> AsyncIterator[str]: ...


def run(asked: RunOptions, file: str | None, flags: Mapping[str, object]) -> int:
    """Prints the answers; returns the exit code. Raises InvalidArgument, and what the runtime or the client raises."""
    if asked.skill and asked.local:
        raise InvalidArgument("--skill needs a running server: it knows who may answer. Leave --local out.", field="local")
    try:
        if asked.local:
            return asyncio.run(_local(asked, file, flags))
        return asyncio.run(_remote(asked))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


async def _remote(asked: RunOptions) -> int:
    from understudy.aio import AsyncClient
    from understudy.errors import UnderstudyError

    async with AsyncClient(asked.address, timeout_s=3600) as client:
        try:
            return await _talk(asked, _Skill(client, asked) if asked.skill else _Remote(client, asked))
        except UnderstudyError as error:
            hint = " Start one with `understudy serve`, or add --local." if error.code == "UNAVAILABLE" and not error.reason else ""
            print(f"understudy: {error.message}{hint}", file=sys.stderr)
            return 1


async def _local(asked: RunOptions, file: str | None, flags: Mapping[str, object]) -> int:
    from pathlib import Path

    from server.config import load_config
    from server.runtime.loader import make_loader
    from server.runtime.observer import NullObserver
    from server.runtime.repository import Repository
    from server.runtime.runtime import Runtime

    config = load_config(file, flags=flags)
    runtime = Runtime(Repository(Path(config.models.path)), make_loader(config.runtime, NullObserver(), config.generation))
    try:
        name, _, version = asked.model.partition("@")
        await runtime.load(name, version or None)
        with runtime.use_generator(name) as model:
            return await _talk(asked, _Local(model, asked))
    finally:
        await runtime.close()


async def _talk(asked: RunOptions, speaker: Speaker) -> int:
    if not asked.chat:
        prompt = asked.prompt or (sys.stdin.read() if not sys.stdin.isatty() else "")
        if not prompt:
            raise InvalidArgument("there is no prompt. Give one, pipe one in, or talk with --chat.", field="prompt")
        await _print(speaker.say(prompt, None))
        _tell(asked, speaker)
        return 0
    messages = [{"role": "system", "content": asked.system}] if asked.system else []
    said: str | None = asked.prompt
    while said is not None:
        if said:
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": await _print(speaker.say(None, messages))})
            _tell(asked, speaker)
        said = await asyncio.to_thread(_ask)
    return 0


async def _print(pieces: AsyncIterator[str]) -> str:
    said = []
    async for piece in pieces:
        said.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
    print(flush=True)
    return "".join(said)


def _ask() -> str | None:
    """The next line of the conversation, or None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _tell(asked: RunOptions, speaker: Speaker) -> None:
    if asked.verbose:
        print(speaker.story, file=sys.stderr, flush=True)


class _Remote:
    def __init__(self, client: Any, asked: RunOptions) -> None:
        self._client = client
        self._asked = asked
        self.story = ""

    async def say(self, prompt: str | None, messages: list[dict[str, str]] | None) -> AsyncIterator[str]:
        name, _, version = self._asked.model.partition("@")
        stream = self._client.generate(prompt, messages=messages, model=name, version=version, **self._asked.options)
        async with stream:
            async for delta in stream:
                yield delta.text
        usage, took = stream.summary.usage, stream.summary.timings
        self.story = _story(usage.input_tokens, usage.output_tokens, took.time_to_first_token, took.inter_token)


class _Skill:
    """A skill by its route: written as it comes where the task is to generate text, else whole."""

    def __init__(self, client: Any, asked: RunOptions) -> None:
        self._client = client
        self._asked = asked
        self.story = ""

    async def say(self, prompt: str | None, messages: list[dict[str, str]] | None) -> AsyncIterator[str]:
        name = self._asked.model
        skill = await self._client.skills.get(name)
        if skill.task != "text-generation":
            (answer,) = await self._client.run(name, [messages or prompt])
            yield answer.text
            self.story = _route(answer.decision, answer.quality, answer.cost_usd)
            return
        stream = self._client.generate(prompt, messages=messages, skill=name, **self._asked.options)
        async with stream:
            async for delta in stream:
                yield delta.text
        self.story = _route(stream.summary.decision, stream.summary.quality, stream.summary.cost_usd)


class _Local:
    def __init__(self, model: Any, asked: RunOptions) -> None:
        self._model = model
        self._asked = asked
        self.story = ""

    async def say(self, prompt: str | None, messages: list[dict[str, str]] | None) -> AsyncIterator[str]:
        from server.api.generate import to_request
        from server.core import Call
        from understudy import generation
        from understudy.v1 import inference_service_pb2 as pb

        prepared = generation.generate(prompt, messages, None, dict(self._asked.options))
        answers = await self._model.generate(to_request(pb.GenerateRequest.FromString(prepared.request)), Call("run"))
        async for deltas in answers.deltas():
            for delta in deltas:
                yield delta.text
        summary = answers.summary()
        self.story = _story(summary.usage.input, summary.usage.output, summary.timings.first_token, summary.timings.inter_token)


def _route(decision: Any, quality: float | None, cost_usd: float) -> str:
    hops = "; ".join(f"{hop.candidate}: {hop.outcome}, {hop.reason}, {hop.elapsed_s * 1e3:.0f} ms" for hop in decision.hops)
    known = "" if quality is None else f", quality {quality:.2f}"
    return f"[{hops}{known}, ${cost_usd:.6f}]"


def _story(read: int, written: int, first_s: float, between_s: float) -> str:
    rate = f", then {1 / between_s:.0f} tokens/s" if between_s else ""
    return f"[{read} tokens read, {written} written; first after {first_s * 1e3:.0f} ms{rate}]"
