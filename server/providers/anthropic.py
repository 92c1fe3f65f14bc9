"""Anthropic's Messages API."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from server.core import FinishReason, Image, Message, ToolCall, Usage
from server.errors import InvalidArgument, Unimplemented
from server.providers.base import Embeddings, Part, Prompt
from server.providers.failures import stream_refusal
from server.providers.presets import Preset, presets
from server.providers.remote import RemoteProvider
from server.providers.wire import (
    ClientSettings,
    Reply,
    StreamReader,
    check_wishes,
    count,
    finish_of,
    image_type,
    image_url,
    schema_in_words,
    schema_of,
)
from server.settings import ProviderConfig

# The tool that older models are made to call, so that their answer follows a schema.
_ANSWER_TOOL = "answer"
_BLOCKS = 1024


class AnthropicProvider(RemoteProvider):
    """See `server.providers.base.Provider`."""

    def __init__(self, name: str, config: ProviderConfig, *, environ: Mapping[str, str] | None = None) -> None:
        wire = AnthropicWire(presets()[config.kind])
        super().__init__(name, config, wire, os.environ if environ is None else environ)

    async def embed(self, model: str, texts: Sequence[str], deadline: float | None) -> Embeddings:
        """See Provider; Anthropic has none."""
        raise Unimplemented(f"{self.name} has no embeddings. Ask a local model or another provider.", provider=self.name)


class AnthropicWire:
    """See `server.providers.wire.Wire`."""

    sdk = "anthropic"
    path = "/v1/messages"

    def __init__(self, preset: Preset) -> None:
        self._preset = preset

    def open(self, sdk: Any, settings: ClientSettings) -> Any:
        """See Wire."""
        return sdk.AsyncAnthropic(
            api_key=settings.api_key or "none",
            base_url=settings.base_url,
            timeout=settings.http.timeout,
            max_retries=0,  # repeating is ours: the library would repeat what may have been charged
            http_client=settings.http,
            open_telemetry=False,  # traces are ours too, and may hold no texts
        )

    def gives_logprobs(self, model: str) -> bool:
        """See Wire."""
        return False

    def body(self, model: str, prompt: Prompt, *, stream: bool) -> dict[str, Any]:
        """See Wire. Messages of systems and developers become the system prompt, in their order."""
        free = self._preset.samples_freely(model)
        schema = schema_of(prompt)
        check_wishes(model, prompt, penalties=False, logprobs=False)
        system = [m.content for m in prompt.messages if m.role in ("system", "developer") and m.content]
        body: dict[str, Any] = {"model": model, "max_tokens": prompt.max_tokens, "messages": turns_of(prompt.messages)}
        if free and prompt.temperature is not None:
            body["temperature"] = prompt.temperature
        elif free and prompt.top_p is not None:  # newer models refuse the two together
            body["top_p"] = prompt.top_p
        if prompt.stop:
            body["stop_sequences"] = list(prompt.stop)
        if prompt.tools:
            body["tools"] = [
                {"name": t.name, "description": t.description, "input_schema": t.parameters or {"type": "object"}} for t in prompt.tools
            ]
            if prompt.tool_choice:
                known = {"none": {"type": "none"}, "required": {"type": "any"}}
                body["tool_choice"] = known.get(prompt.tool_choice, {"type": "tool", "name": prompt.tool_choice})
        if schema is not None and not free:
            # Models that think refuse to be made to call a tool; they hold answers to schemas instead.
            body["output_config"] = {"format": {"type": "json_schema", "schema": self._transformed(schema)}}
        elif forces_tool(schema, prompt):
            body["tools"] = [{"name": _ANSWER_TOOL, "description": "Gives the answer.", "input_schema": schema}]
            body["tool_choice"] = {"type": "tool", "name": _ANSWER_TOOL}
        elif prompt.format is not None:
            system.append(schema_in_words(schema))
        if system:
            body["system"] = "\n\n".join(system)
        if stream:
            body["stream"] = True
        return body

    def read(self, answer: Any, prompt: Prompt, who: str) -> Reply:
        """See Wire."""
        blocks = answer["content"]
        texts = [block["text"] for block in blocks if block["type"] == "text"]
        calls = [ToolCall(block["id"], block["name"], json.dumps(block["input"])) for block in blocks if block["type"] == "tool_use"]
        usage = usage_of(answer.get("usage"), None)
        return _reply("".join(texts), calls, finish_of(answer.get("stop_reason"), who), usage, answer.get("model"), self._answers(prompt))

    def reader(self, who: str, key: str, prompt: Prompt) -> StreamReader:
        """See Wire."""
        return EventReader(who, key, self._answers(prompt))

    def _answers(self, prompt: Prompt) -> bool:
        """Whether a call of our own tool is the answer. Models that were not made to call it cannot know of it."""
        return prompt.format is not None and not prompt.tools

    @staticmethod
    def _transformed(schema: dict[str, Any]) -> dict[str, Any]:
        """The schema in the subset that the API takes; what it does not take is put into the descriptions."""
        import anthropic

        try:
            return anthropic.transform_schema(schema)
        except (ValueError, TypeError, LookupError) as error:
            raise InvalidArgument(f"The JSON Schema of the format is none that Anthropic takes: {error}.", field="format") from None


class EventReader:
    """See `server.providers.wire.StreamReader`."""

    def __init__(self, who: str, key: str, answers: bool) -> None:
        self.usage: Usage | None = None
        self.ended = False
        self._who = who
        self._key = key
        self._answers = answers
        self._texts: list[str] = []
        self._calls: dict[int, list[str]] = {}
        self._thinking: list[str] = []
        self._finish: FinishReason | None = None
        self._model = ""

    @property
    def text(self) -> str:
        """What was received so far, thinking and the arguments of calls included: what was paid for."""
        return "".join(self._texts) + "".join(self._thinking) + "".join("".join(call) for call in self._calls.values())

    def take(self, event: str, data: str) -> Part | None:
        """See StreamReader."""
        found = json.loads(data)
        kind = found.get("type", event)
        if kind == "content_block_delta":
            return self._take_delta(found["index"], found["delta"])
        if kind == "content_block_start":
            self._take_start(found["index"], found["content_block"])
        elif kind == "message_start":
            message = found["message"]
            self._model = str(message.get("model") or "")
            self.usage = usage_of(message.get("usage"), None)
        elif kind == "message_delta":
            self.usage = usage_of(found.get("usage"), self.usage)
            reason = found["delta"].get("stop_reason")
            if reason:
                self._finish = finish_of(reason, self._who)
        elif kind == "message_stop":
            self.ended = True
        elif kind == "error":
            raise stream_refusal(self._who, found, self._key)
        return None

    def finished(self) -> bool:
        """See StreamReader."""
        return self._finish is not None

    def reply(self) -> Reply:
        """See StreamReader."""
        assert self._finish is not None, "reply() before finished()"
        calls = [ToolCall(id, name, arguments or "{}") for _, (id, name, arguments) in sorted(self._calls.items())]
        return _reply("".join(self._texts), calls, self._finish, self.usage, self._model, self._answers)

    def _take_start(self, index: int, block: Any) -> None:
        if not isinstance(index, int) or not 0 <= index < _BLOCKS:
            raise ValueError("a block's number that is none")
        if block["type"] == "tool_use":
            self._calls[index] = [str(block["id"]), str(block["name"]), ""]
        elif block["type"] == "text" and block.get("text"):
            self._texts.append(block["text"])

    def _take_delta(self, index: int, delta: Any) -> Part | None:
        kind = delta["type"]
        if kind == "text_delta":
            text = delta["text"]
            self._texts.append(text)
            return Part(text) if text else None
        if kind == "input_json_delta":
            call = self._calls[index]
            call[2] += delta["partial_json"]
            if self._answers and call[1] == _ANSWER_TOOL and delta["partial_json"]:
                return Part(delta["partial_json"])
        elif kind == "thinking_delta":
            self._thinking.append(delta["thinking"])
        return None


def forces_tool(schema: Mapping[str, Any] | None, prompt: Prompt) -> bool:
    """Whether a schema can be held by a tool that must be called: it is an object, and the prompt has no tools of its own."""
    return schema is not None and schema.get("type") == "object" and not prompt.tools


def turns_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation without its system prompt. Results of tools are a user's turn; turns of one role that follow each other are one."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message.role in ("system", "developer"):
            continue
        role = "assistant" if message.role == "assistant" else "user"
        blocks = _blocks(message)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    for turn in turns:
        only = turn["content"]
        if len(only) == 1 and only[0]["type"] == "text":
            turn["content"] = only[0]["text"]
    return turns


def usage_of(used: Any, before: Usage | None) -> Usage | None:
    """The vendor's count, over what it said `before` in the same stream. Input counts what was read from its cache and written to it."""
    if not used:
        return before
    before = before or Usage()
    if used.get("input_tokens") is None:
        return Usage(before.input, count(used.get("output_tokens") or 0), before.cached)
    cached = count(used.get("cache_read_input_tokens") or 0)
    total = count(used["input_tokens"]) + cached + count(used.get("cache_creation_input_tokens") or 0)
    return Usage(total, count(used.get("output_tokens") or 0), cached)


def _blocks(message: Message) -> list[dict[str, Any]]:
    if message.role == "tool":
        return [{"type": "tool_result", "tool_use_id": message.tool_call_id, "content": message.content}]
    blocks: list[dict[str, Any]] = [_image(image) for image in message.images]
    if message.content or not (blocks or message.tool_calls):
        blocks.append({"type": "text", "text": message.content})
    for call in message.tool_calls:
        try:
            arguments = json.loads(call.arguments or "{}")
        except (ValueError, RecursionError):
            raise InvalidArgument(f"The arguments of the call of {call.name!r} are no JSON.", field="messages.tool_calls") from None
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
    return blocks


def _image(image: Image) -> dict[str, Any]:
    if image.url:
        return {"type": "image", "source": {"type": "url", "url": image_url(image)}}
    data = base64.b64encode(image.data).decode()
    return {"type": "image", "source": {"type": "base64", "media_type": image_type(image), "data": data}}


def _reply(text: str, calls: list[ToolCall], finish: FinishReason, usage: Usage | None, model: object, answers: bool) -> Reply:
    """A call of our own tool is the answer's text."""
    if answers and len(calls) == 1 and calls[0].name == _ANSWER_TOOL:
        finish = FinishReason.STOP if finish == FinishReason.TOOL_CALLS else finish
        text, calls = calls[0].arguments, []
    return Reply(text, finish, usage, model if isinstance(model, str) else "", tuple(calls))
