"""What every vendor's client promises, whatever its wire protocol: the nouns and the contract."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from server.core import FinishReason, FloatArray, Format, Message, TokenLogprob, Tool, ToolCall, Usage


@dataclass(slots=True, frozen=True)
class Prompt:
    """What a provider's model is asked. `max_tokens` bounds what it may write, and so what it may cost.

    `temperature` and `top_p`: None leaves the vendor's default; some models (those that reason) take nothing else and are never sent one.
    `seed` is said where the vendor has it and left out where not. Penalties and `logprobs` (with `top_logprobs` of the likeliest tokens at
    each place) are refused with InvalidArgument where it has none. `format`: json_schema or json_object; others are
    refused with InvalidArgument, because no vendor's API has them. `tool_choice`: "" (the model decides), "none", "required",
    or a tool's name.
    """

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float | None = 0.0
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: str = ""
    format: Format | None = None
    logprobs: bool = False
    top_logprobs: int = 0

    @staticmethod
    def of(system: str, user: str, max_tokens: int) -> Prompt:
        """The usual two messages; an empty `system` is left out."""
        asked = Message("user", user)
        return Prompt((Message("system", system), asked) if system else (asked,), max_tokens)


@dataclass(slots=True, frozen=True)
class Completion:
    """A whole answer.

    `source_model` is the model that the vendor says it ran; `cost_micro_usd` is 0 where the model has no price; `attempts` counts requests,
    the last included; `logprobs` has the answer's tokens, or is empty; `first_token_s` is the time from the call
    to the first token of a stream, and to the whole answer otherwise.
    """

    text: str
    usage: Usage
    source_model: str
    cost_micro_usd: int
    attempts: int
    finish: FinishReason = FinishReason.STOP
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    first_token_s: float = 0.0


@dataclass(slots=True, frozen=True)
class Part:
    """A piece of a stream: new text, or calls of tools, each whole. The last part alone has the `completion`, with everything together."""

    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    completion: Completion | None = None


@dataclass(slots=True, frozen=True)
class Embeddings:
    """`vectors`: float32[texts, size], in the order of the texts; not normalised by us."""

    vectors: FloatArray
    usage: Usage
    source_model: str
    cost_micro_usd: int
    attempts: int


@dataclass(slots=True, frozen=True)
class Health:
    """A provider at this moment, for status and for choosing among candidates.

    `circuit`: closed (asked), open (left alone for `rest_s` more seconds) or half_open (one probe decides). Latencies are seconds over the
    last answers, None before the first: of whole answers, and to the first token of streams. `failures` of the last `recent` requests were
    the vendor's. `room` has for each rate limit that is configured the share that is left, in [0, 1].
    """

    circuit: Literal["closed", "open", "half_open"] = "closed"
    rest_s: float = 0.0
    in_flight: int = 0
    waiting: int = 0
    latency_p50_s: float | None = None
    latency_p95_s: float | None = None
    first_token_p50_s: float | None = None
    recent: int = 0
    failures: int = 0
    room: Mapping[str, float] = field(default_factory=dict)


class Provider(Protocol):
    """A client of one vendor. Used on one event loop; any number of calls at once.

    Every call waits for its turn (concurrency and rate limits) and ends before `deadline` (monotonic seconds) come what may. A request is
    repeated only where the vendor has certainly not charged for it: refused (429), failed (5xx) or never connected; a request that was sent
    and not answered in time is not sent again, and nothing is repeated after the first part of a stream. Calls raise ProviderUnavailable,
    DeadlineExceeded(stage="provider"), Overloaded or InvalidArgument, never an exception of a vendor's library; what was paid all the same
    is in the error's `spent_micro_usd`.
    """

    name: str
    training_allowed: bool

    async def complete(self, model: str, prompt: Prompt, deadline: float | None) -> Completion:
        """The whole answer."""
        ...

    def stream(self, model: str, prompt: Prompt, deadline: float | None) -> AsyncGenerator[Part, None]:
        """The answer as it is written. `aclose()` ends the work and frees the place; so does leaving the task.

        Never empty: a stream that ends without a token, or without saying why it ended, raises ProviderUnavailable.
        """
        ...

    async def embed(self, model: str, texts: Sequence[str], deadline: float | None) -> Embeddings:
        """Raises Unimplemented where the vendor has no embeddings."""
        ...

    def gives_logprobs(self, model: str) -> bool:
        """Whether a prompt may ask the model for log-probabilities."""
        ...

    def worst_cost_micro_usd(self, model: str, prompt: Prompt) -> int | None:
        """What the prompt costs at the very most, or None where the model has no price."""
        ...

    def aborted_cost_micro_usd(self, model: str, prompt: Prompt, text: str) -> int:
        """What a stream cost that its reader left after `text`: an estimate on the safe side; 0 where the model has no price."""
        ...

    def open_circuit(self) -> str:
        """Why the provider is not asked at the moment, or "" where it is."""
        ...

    def health(self) -> Health:
        """Cheap; never asks the vendor."""
        ...

    async def close(self) -> None:
        """Closes connections. Calls in flight fail."""
        ...
