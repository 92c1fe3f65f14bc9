"""OpenAI's chat completions and embeddings, as spoken by OpenAI and by every vendor that imitates them."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from server.core import FinishReason, FloatArray, Message, TokenLogprob, ToolCall, Usage
from server.errors import Unimplemented
from server.providers.base import Embeddings, Part, Prompt
from server.providers.failures import stream_refusal
from server.providers.presets import Preset, presets
from server.providers.remote import RemoteProvider
from server.providers.wire import ClientSettings, Reply, StreamReader, check_wishes, count, finish_of, image_url, schema_in_words, schema_of
from server.settings import ProviderConfig

# Pieces of one stream may name this many calls of tools.
_TOOL_CALLS = 128


class OpenAIProvider(RemoteProvider):
    """See `server.providers.base.Provider`."""

    def __init__(self, name: str, config: ProviderConfig, *, environ: Mapping[str, str] | None = None) -> None:
        preset = presets()[config.kind]
        super().__init__(name, config, OpenAIWire(preset), os.environ if environ is None else environ)
        self._has_embeddings = preset.embeddings
        self._base64 = preset.embeddings_base64

    async def embed(self, model: str, texts: Sequence[str], deadline: float | None) -> Embeddings:
        """See Provider. Texts go in one request; the vendor's limit of texts holds."""
        if not self._has_embeddings:
            raise Unimplemented(f"{self.name} has no embeddings. Ask a local model or another provider.", provider=self.name)
        if not texts:
            return Embeddings(np.zeros((0, 0), np.float32), Usage(), model, 0, 0)
        body: dict[str, Any] = {"model": model, "input": list(texts)}
        if self._base64:
            body["encoding_format"] = "base64"
        asked = self._asked(model, Usage(sum(len(text.encode()) for text in texts) // 3 + len(texts)), deadline)

        def read(answer: Any) -> tuple[tuple[FloatArray, str], Usage]:
            usage = usage_of(answer.get("usage")) or asked.exposure
            return (vectors_of(answer["data"], len(texts)), str(answer.get("model") or model)), usage

        (vectors, source), usage = await self._unary(asked, "/embeddings", lambda: body, read)
        return Embeddings(vectors, usage, source, self._prices.cost_micro_usd(model, usage), asked.attempts)


class OpenAIWire:
    """See `server.providers.wire.Wire`."""

    sdk = "openai"
    path = "/chat/completions"

    def __init__(self, preset: Preset) -> None:
        self._preset = preset

    def open(self, sdk: Any, settings: ClientSettings) -> Any:
        """See Wire. The organization and project of the environment go to OpenAI alone."""
        ours = settings.base_url == presets()["openai"].base_url
        left_out = {} if ours else {"OpenAI-Organization": sdk.Omit(), "OpenAI-Project": sdk.Omit()}
        return sdk.AsyncOpenAI(
            api_key=settings.api_key or "none",
            base_url=settings.base_url,
            timeout=settings.http.timeout,
            max_retries=0,  # repeating is ours: the library would repeat what may have been charged
            http_client=settings.http,
            default_headers=left_out,
        )

    def gives_logprobs(self, model: str) -> bool:
        """See Wire."""
        return self._preset.logprobs and self._preset.samples_freely(model)

    def body(self, model: str, prompt: Prompt, *, stream: bool) -> dict[str, Any]:
        """See Wire."""
        preset = self._preset
        free = preset.samples_freely(model)
        schema = schema_of(prompt)
        messages = [self._message(message) for message in prompt.messages]
        body: dict[str, Any] = {"model": model, "messages": messages}
        body["max_tokens" if free or not preset.max_completion_tokens else "max_completion_tokens"] = prompt.max_tokens
        if free and prompt.temperature is not None:
            body["temperature"] = prompt.temperature
        if free and prompt.top_p is not None:
            body["top_p"] = prompt.top_p
        check_wishes(model, prompt, penalties=free and preset.penalties, logprobs=self.gives_logprobs(model))
        wishes = ("presence_penalty", "frequency_penalty", "logprobs", "top_logprobs")
        body |= {name: value for name in wishes if (value := getattr(prompt, name))}
        if prompt.stop:
            body["stop"] = list(prompt.stop)
        if prompt.seed is not None and preset.seed:
            body["seed"] = prompt.seed
        if prompt.tools:
            body["tools"] = [
                {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.parameters}}
                for t in prompt.tools
            ]
            if prompt.tool_choice in ("none", "required"):
                body["tool_choice"] = prompt.tool_choice
            elif prompt.tool_choice:
                body["tool_choice"] = {"type": "function", "function": {"name": prompt.tool_choice}}
        if schema is not None and preset.schema == "json_schema":
            form = {"name": "answer", "schema": schema, "strict": is_strict(schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        elif prompt.format is not None:
            body["response_format"] = {"type": "json_object"}
            body["messages"] = [{"role": "system", "content": schema_in_words(schema)}, *messages]
        if stream:
            body["stream"] = True
            if preset.stream_usage:
                body["stream_options"] = {"include_usage": True}
        return body

    def read(self, answer: Any, prompt: Prompt, who: str) -> Reply:
        """See Wire."""
        choice = answer["choices"][0]
        message = choice["message"]
        text = message.get("content")
        if isinstance(text, list):  # Mistral's thinking models give typed pieces
            text = "".join(piece.get("text", "") for piece in text if piece.get("type") == "text")
        calls = tuple(
            ToolCall(str(call.get("id") or f"call_{index}"), call["function"]["name"], _arguments(call["function"].get("arguments")))
            for index, call in enumerate(message.get("tool_calls") or ())
        )
        if text is not None and not isinstance(text, str):
            raise TypeError("a text that is none")
        source = answer.get("model")
        return Reply(
            text or "",
            _finish(choice.get("finish_reason"), calls, who),
            usage_of(answer.get("usage")),
            source if isinstance(source, str) else "",
            calls,
            _logprobs(choice.get("logprobs")),
        )

    def reader(self, who: str, key: str, prompt: Prompt) -> StreamReader:
        """See Wire."""
        return ChunkReader(who, key)

    def _message(self, message: Message) -> dict[str, Any]:
        role = message.role if message.role != "developer" or self._preset.names else "system"
        content: Any = message.content
        if message.images:
            content = [{"type": "text", "text": message.content}] if message.content else []
            content += [{"type": "image_url", "image_url": {"url": image_url(image)}} for image in message.images]
        found: dict[str, Any] = {"role": role, "content": content}
        if message.tool_calls:
            found["content"] = content or None
            found["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        if message.tool_call_id:
            found["tool_call_id"] = message.tool_call_id
        if message.name and self._preset.names and role != "tool":
            found["name"] = message.name
        return found


class ChunkReader:
    """See `server.providers.wire.StreamReader`. Calls of tools are given whole, when the answer ends: their pieces help nobody."""

    def __init__(self, who: str, key: str) -> None:
        self.usage: Usage | None = None
        self.ended = False
        self._who = who
        self._key = key
        self._texts: list[str] = []
        self._thinking: list[str] = []
        self._calls: dict[int, list[str]] = {}
        self._logprobs: list[TokenLogprob] = []
        self._finish: FinishReason | None = None
        self._model = ""

    @property
    def text(self) -> str:
        """What was received so far, thinking and the arguments of calls included: what was paid for."""
        return "".join(self._texts) + "".join(self._thinking) + "".join("".join(call) for call in self._calls.values())

    def take(self, event: str, data: str) -> Part | None:
        """See StreamReader."""
        if data == "[DONE]":
            self.ended = True
            return None
        chunk = json.loads(data)
        if event == "error" or chunk.get("error"):
            raise stream_refusal(self._who, chunk, self._key)
        if not self._model and isinstance(chunk.get("model"), str):
            self._model = chunk["model"]
        if chunk.get("usage"):
            self.usage = usage_of(chunk["usage"])
        if not chunk.get("choices"):
            return None
        choice = chunk["choices"][0]
        delta = choice.get("delta") or {}
        text = delta.get("content") or ""
        if isinstance(text, list):
            text = "".join(piece.get("text", "") for piece in text if piece.get("type") == "text")
        if not isinstance(text, str):
            raise TypeError("a text that is none")
        if text:
            self._texts.append(text)
        thinking = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(thinking, str):
            self._thinking.append(thinking)
        for piece in delta.get("tool_calls") or ():
            self._take_call(piece)
        self._logprobs += _logprobs(choice.get("logprobs"))
        if choice.get("finish_reason"):
            self._finish = finish_of(choice["finish_reason"], self._who)
        return Part(text) if text else None

    def finished(self) -> bool:
        """See StreamReader."""
        return self._finish is not None

    def reply(self) -> Reply:
        """See StreamReader."""
        assert self._finish is not None, "reply() before finished()"
        calls = tuple(
            ToolCall(id or f"call_{index}", name, arguments or "{}") for index, (id, name, arguments) in sorted(self._calls.items())
        )
        finish = FinishReason.TOOL_CALLS if calls and self._finish == FinishReason.STOP else self._finish
        return Reply("".join(self._texts), finish, self.usage, self._model, calls, tuple(self._logprobs))

    def _take_call(self, piece: Any) -> None:
        index = piece.get("index")
        if index is None:  # some servers send each call whole and do not number it
            index = len(self._calls)
        if not isinstance(index, int) or not 0 <= index < _TOOL_CALLS:
            raise ValueError("a call's number that is none")
        call = self._calls.setdefault(index, ["", "", ""])
        function = piece.get("function") or {}
        call[0] = call[0] or str(piece.get("id") or "")
        call[1] = call[1] or str(function.get("name") or "")
        arguments = function.get("arguments")
        call[2] += arguments if isinstance(arguments, str) else json.dumps(arguments) if arguments else ""


def usage_of(used: Any) -> Usage | None:
    """The vendor's count. Thinking that some leave out of completion_tokens is in the total, and on the bill."""
    if not used:
        return None
    prompt, output = count(used["prompt_tokens"]), count(used.get("completion_tokens") or 0)
    output = max(output, count(used.get("total_tokens") or 0) - prompt)
    details = used.get("prompt_tokens_details") or {}
    cached = count(details.get("cached_tokens") or used.get("prompt_cache_hit_tokens") or 0)
    return Usage(prompt, output, min(cached, prompt))


def is_strict(schema: Any) -> bool:
    """Whether OpenAI's strict mode takes the schema: every object closed, every property required."""
    if isinstance(schema, list):
        return all(is_strict(item) for item in schema)
    if not isinstance(schema, dict):
        return True
    properties = schema.get("properties")
    if schema.get("type") == "object" or isinstance(properties, dict):
        names = set(properties) if isinstance(properties, dict) else set()
        if schema.get("additionalProperties") is not False or set(schema.get("required") or ()) != names:
            return False
    return all(is_strict(value) for value in schema.values() if isinstance(value, (dict, list)))


def vectors_of(data: Any, expected: int) -> FloatArray:
    """float32[texts, size] in the order of the texts. Raises ValueError, TypeError or LookupError."""
    if len(data) != expected:
        raise ValueError(f"{len(data)} vectors for {expected} texts")
    rows: list[Any] = [None] * expected
    for place, item in enumerate(data):
        vector = item["embedding"]
        row = np.frombuffer(base64.b64decode(vector, validate=True), "<f4") if isinstance(vector, str) else np.asarray(vector, np.float32)
        index = item.get("index", place)
        if not isinstance(index, int) or not 0 <= index < expected or rows[index] is not None:
            raise ValueError("a vector's number that is none")
        rows[index] = row
    stacked = np.stack(rows).astype(np.float32)
    if stacked.ndim != 2 or not stacked.size or not np.isfinite(stacked).all():
        raise ValueError("vectors that are none")
    return stacked


def _finish(reason: object, calls: tuple[ToolCall, ...], who: str) -> FinishReason:
    found = finish_of(reason, who)
    return FinishReason.TOOL_CALLS if calls and found == FinishReason.STOP else found


def _arguments(value: object) -> str:
    return (value or "{}") if isinstance(value, str) else json.dumps(value or {})


def _logprobs(found: Any) -> tuple[TokenLogprob, ...]:
    return tuple(map(_token, found.get("content") or ())) if isinstance(found, dict) else ()


def _token(said: Any) -> TokenLogprob:
    top = tuple(_likely(other) for other in said.get("top_logprobs") or ())
    return TokenLogprob(*_likely(said), top)


def _likely(said: Any) -> tuple[str, float]:
    text, logprob = said["token"], float(said["logprob"])
    if not isinstance(text, str) or not math.isfinite(logprob):
        raise ValueError("a token's log-probability that is none")
    return text.encode("utf-8", "replace").decode(), logprob  # half a character may come as half a surrogate pair
