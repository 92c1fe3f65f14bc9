"""What generation's parts promise each other: the graph's inputs, what the engine takes, and what it gives back.

A decoder graph has, whatever the form of its weights, with T tokens, S sequences, R rows that need logits:

| input        | type, shape                          | meaning                                                                        |
|--------------|--------------------------------------|--------------------------------------------------------------------------------|
| input_ids    | int64[T]                             | tokens of all sequences end to end; ids from `vocabulary` on: extra_rows |
| cu_seqlens   | int32[S+1]                           | where each sequence's new tokens begin                                         |
| past_lens    | int32[S]                             | positions of each sequence that are in its pages already                       |
| block_table  | int32[S, W]                          | page numbers of each sequence, in order; unused entries are -1                 |
| logit_rows   | int64[R]                             | which of the T tokens need logits                                              |
| kv_pool      | uint8[layers, pages, page_bytes]     | K and V of every page; changed in place                                        |
| extra_rows   | float32[X, H]                        | embeddings of prompt-tuning adapters while they are being loaded, else X = 0   |
| adapter_ids  | int32[T]                             | slot of each token's adapter in the bank, -1 without                           |
| lora_bank    | float32 or uint16 (bfloat16 bits) [slots, rank, width] | the adapters' weights, see manifest.LoraLayout               |
| lora_ranks   | int32[slots, targets]                | rank of each adapter at each target, 0 where it has none                       |

The one output is logits float32[R, vocabulary]. A token's logits depend on its own sequence alone, to the bit, in every form.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from server.core import Call, FinishReason, FloatArray
from server.runtime.manifest import Decoder


def page_bytes(kv_heads: int, head_dim: int, dtype: str, page: int = 16) -> int:
    """Bytes of one page of one layer.

    For each K/V head in turn: K [head_dim][page], then V [page][head_dim]; int8 has float32 scales behind them, K's [page] and V's [page].
    """
    size = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}[dtype]
    scales = 2 * page * 4 if dtype == "int8" else 0
    return kv_heads * (2 * head_dim * page * size + scales)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; field names and meanings as in OpenAI's and Hugging Face's APIs. Checked by `check_sampling`.

    Order: penalties and bias on the logits, grammar mask, temperature (0: greedy), then top_k, top_p, min_p on the distribution.
    Presence and frequency penalties count generated tokens, the repetition penalty the prompt's too. With `seed`, the text depends on
    request and model alone. `top_logprobs`: alternatives reported a token; log-probabilities are those of the raw logits.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0


@dataclass(slots=True)
class Token:
    """One generated token. `text`: what it added to the text, "" while it is held back (half a character, the start of a stop string).

    `logprob`, `entropy` (nats) and `margin` (log-probability of the likeliest minus the second) are of the raw logits.
    """

    id: int
    text: str
    logprob: float
    entropy: float
    margin: float
    top: Sequence[tuple[int, float]] = ()


@dataclass(slots=True)
class Times:
    """Monotonic seconds of one candidate; 0 until it happened. `steps`: runs of the graph that it took part in."""

    arrival: float = 0.0
    admitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    steps: int = 0


@dataclass(slots=True)
class Piece:
    """What one candidate has got since the piece before. The last one has `finish`; `text_end` is text that was held back until then."""

    index: int
    tokens: list[Token]
    finish: FinishReason | None = None
    text_end: str = ""
    cached: int = 0  # prompt tokens that were found in the prefix cache
    times: Times = field(default_factory=Times)


class TextStream(Protocol):
    """Turns one candidate's tokens into text, on the engine's thread; see server/runtime/decoder/text.py."""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string was met (its text is left out)."""

    def finish(self) -> str:
        """What was held back, when the answer ends otherwise."""


class Matcher(Protocol):
    """One candidate's place in a grammar; see server/runtime/decoder/grammar.py. Used by one thread at a time."""

    def advance(self, token: int) -> None:
        """The token was drawn (it was allowed)."""

    @property
    def complete(self) -> bool:
        """Nothing may follow: the answer ends."""


class Masks(Protocol):
    """Allowed tokens of a step's rows, made while the graph runs."""

    def start(self, matchers: Sequence[Matcher | None]) -> None:
        """Begins to fill one mask a row; returns at once. Every matcher has had its tokens."""

    def wait(self) -> object:
        """uint32[rows, ceil(vocabulary / 32)], bit set: allowed; rows without a matcher are all ones. None where no row has one."""


@dataclass(slots=True)
class AdapterUse:
    """A loaded adapter as one request holds it, until `release`. `key`: name@version, which prefixes are shared under.

    `slot` in the bank, -1 where the adapter has no LoRA. `prefix`: positions that its stored pages hold (prefix and prompt tuning).
    """

    key: str
    slot: int
    prefix: int = 0
    release: Callable[[], None] = lambda: None


@dataclass(slots=True)
class Job:
    """A request to the engine: token ids in, pieces out. `text` and `matcher` make one object a candidate.

    `stop_ids` end an answer and are not part of it. The caller has checked everything but lengths.
    """

    prompt: Sequence[int]
    sampling: Sampling
    max_tokens: int
    call: Call
    n: int = 1
    stop_ids: frozenset[int] = frozenset()
    adapter: AdapterUse | None = None
    text: Callable[[], TextStream] | None = None
    matcher: Callable[[], Matcher] | None = None


class Stream(Protocol):
    """A job's answers. Iterating gives lists of pieces: everything that arrived since the last look, at least one. Errors are raised there.

    Leaving the loop early, or `cancel`, frees the job's pages within one step.
    """

    def __aiter__(self) -> AsyncIterator[list[Piece]]: ...

    def cancel(self) -> None: ...


class DecoderEngine(Protocol):
    """One model's loop. Made and used on the event loop; runs on a thread of its own."""

    decoder: Decoder

    def submit(self, job: Job) -> Stream:
        """Queues a job; never blocks.

        Raises Overloaded (queue full; retry_after_s), Draining, InputTooLong (prompt, limit both in the message and metadata),
        InvalidArgument.
        """

    async def add_prefix(self, key: str, keys: FloatArray, values: FloatArray) -> int:
        """Stores the pages of a prefix-tuning adapter, [layers, kv_heads, positions, head_dim] each; returns the positions."""

    async def add_prompt(self, key: str, rows: FloatArray) -> int:
        """Runs prompt-tuning embeddings [positions, H] once and stores their pages; returns the positions."""

    async def drop_prefix(self, key: str) -> None:
        """Frees the stored pages, and all that the prefix cache holds under `key` (also for adapters without a prefix)."""

    async def close(self, *, drain: bool) -> None:
        """Finishes accepted jobs if `drain`, else fails them with Draining; returns once the thread ended."""
