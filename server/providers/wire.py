"""What the two wire formats have in common: a body out of a prompt, an answer out of JSON, a stream out of server-sent events."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from server.core import FinishReason, Image, TokenLogprob, ToolCall, Usage
from server.errors import InvalidArgument, ProviderUnavailable
from server.providers.base import Part, Prompt
from server.providers.failures import Refusal

_IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif")
# An event of a stream, or what has come of one, may not be larger.
_EVENT_BYTES = 8 << 20
_FINISHES = {
    "stop": FinishReason.STOP,
    "eos": FinishReason.STOP,
    "end_turn": FinishReason.STOP,
    "stop_sequence": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "max_tokens": FinishReason.LENGTH,
    "model_length": FinishReason.LENGTH,
    "model_context_window_exceeded": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "tool_use": FinishReason.TOOL_CALLS,
}
# The vendor stopped the answer: what there is of it is not to be delivered.
_STOPPED = frozenset({"content_filter", "refusal", "safety", "error", "insufficient_system_resource", "pause_turn"})


@dataclass(slots=True, frozen=True)
class Reply:
    """A whole answer as the vendor gave it. `usage` None: it did not say."""

    text: str
    finish: FinishReason
    usage: Usage | None = None
    source_model: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class StreamReader(Protocol):
    """Takes one stream's events in order. Its methods raise ValueError, TypeError or LookupError on garbage, and Refusal on errors in it.

    `usage` is what the vendor said so far; `ended`: nothing follows.
    """

    usage: Usage | None
    ended: bool

    @property
    def text(self) -> str:
        """Everything that was received so far and is paid for."""
        ...

    def take(self, event: str, data: str) -> Part | None:
        """What one event adds, or None where it adds nothing that a reader sees."""
        ...

    def finished(self) -> bool:
        """Whether the vendor said that the answer is complete."""
        ...

    def reply(self) -> Reply:
        """Everything together, once `finished`."""
        ...


class Wire(Protocol):
    """A wire format. `sdk`: the library's import name; `path`: where prompts go, below base_url."""

    sdk: str
    path: str

    def open(self, sdk: Any, settings: ClientSettings) -> Any:
        """The library's asynchronous client; called in a thread."""
        ...

    def body(self, model: str, prompt: Prompt, *, stream: bool) -> dict[str, Any]:
        """The request. Raises InvalidArgument where the format cannot say what the prompt asks."""
        ...

    def gives_logprobs(self, model: str) -> bool:
        """Whether the request may ask for log-probabilities."""
        ...

    def read(self, answer: Any, prompt: Prompt, who: str) -> Reply:
        """The answer in parsed JSON; raises as StreamReader does."""
        ...

    def reader(self, who: str, key: str, prompt: Prompt) -> StreamReader:
        """For one stream."""
        ...


@dataclass(slots=True, frozen=True)
class ClientSettings:
    """What a client is opened with. `http` is the httpx2.AsyncClient that carries it."""

    api_key: str
    base_url: str
    http: Any

    def __repr__(self) -> str:
        return f"ClientSettings({self.base_url!r})"


def finish_of(reason: object, who: str) -> FinishReason:
    """The vendor's word as ours. An unknown word means that the answer ended; one that says it was stopped is a failure that was paid."""
    word = reason.lower() if isinstance(reason, str) else ""
    if word in _STOPPED:
        message = f"{who} stopped its answer: {word}. Ask another model, or change what is asked."
        raise Refusal(ProviderUnavailable(message, vendor_finish=word), blame=False, charged=True)
    return _FINISHES.get(word, FinishReason.STOP)


def image_url(image: Image) -> str:
    """An https URL, or the picture itself as a data URL. Raises InvalidArgument."""
    if image.url:
        if not image.url.startswith("https://"):
            raise InvalidArgument("An image's url must begin with https://; send others as data.", field="images.url")
        return image.url
    return f"data:{image_type(image)};base64,{base64.b64encode(image.data).decode()}"


def image_type(image: Image) -> str:
    """The media type of an image that is sent as data. Raises InvalidArgument where no vendor reads it."""
    if not image.data or image.media_type not in _IMAGE_TYPES:
        message = f"An image needs data and one of the media types {', '.join(_IMAGE_TYPES)}, or an https url."
        raise InvalidArgument(message, field="images.media_type", media_type=image.media_type)
    return image.media_type


def check_wishes(model: str, prompt: Prompt, *, penalties: bool, logprobs: bool) -> None:
    """Refuses what the model has not, as the arguments say: another candidate may, and an answer without it is not what was asked for."""
    asked = {
        "presence_penalty": (prompt.presence_penalty, penalties),
        "frequency_penalty": (prompt.frequency_penalty, penalties),
        "logprobs": (prompt.logprobs, logprobs),
    }
    for name, (value, has) in asked.items():
        if value and not has:
            raise InvalidArgument(f"{model} has no {name}. Leave it out, or ask another model.", field=name)


def schema_of(prompt: Prompt) -> dict[str, Any] | None:
    """The JSON Schema that the answer must follow, or None. Raises InvalidArgument for formats that no vendor has, and broken schemas."""
    if prompt.format is None or prompt.format.kind == "json_object":
        return None
    if prompt.format.kind != "json_schema":
        message = f"Providers cannot hold answers to a {prompt.format.kind}; they can to a json_schema, or ask a local model."
        raise InvalidArgument(message, field="format", kind=prompt.format.kind)
    try:
        schema = json.loads(prompt.format.source)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"The JSON Schema of the format is no JSON: {error}.", field="format") from None
    if not isinstance(schema, dict):
        raise InvalidArgument("The JSON Schema of the format must be an object.", field="format")
    return schema


def schema_in_words(schema: Mapping[str, Any] | None) -> str:
    """What a model is told whose API promises JSON at most."""
    if schema is None:
        return "Answer with one JSON object and nothing else."
    return f"Answer with one JSON object and nothing else. It must follow this JSON Schema:\n{json.dumps(schema, ensure_ascii=False)}"


class Events:
    """Server-sent events out of bytes that arrive in any pieces (WHATWG HTML, 9.2.6; ids, retries and comments are passed over)."""

    def __init__(self) -> None:
        self._rest = b""
        self._event = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[tuple[str, str]]:
        """The events, as (event, data), that the chunk completes. Raises ValueError on what is no UTF-8 or has no end."""
        lines = (self._rest + chunk).replace(b"\r\n", b"\n").split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > _EVENT_BYTES:
            raise ValueError("an event that does not end")
        found = []
        for line in lines:
            if not line or line == b"\r":
                if self._data:
                    found.append((self._event, "\n".join(self._data)))
                self._event, self._data = "", []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").decode())
            elif line.startswith(b"event:"):
                self._event = line[6:].strip().decode()
        return found


def count(value: object) -> int:
    """A number of tokens. Raises ValueError where it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 40:
        raise ValueError("a number of tokens that is none")
    return value
