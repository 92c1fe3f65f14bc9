"""OpenAI's chat completions, as spoken by OpenAI and by every vendor that imitates it."""

from __future__ import annotations

import asyncio
import importlib
import math
import random
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from server.core import Usage
from server.errors import DeadlineExceeded, Overloaded, ProviderUnavailable, UnderstudyError, Unimplemented
from server.providers.base import Completion, Embeddings, Health, Part, Prompt
from server.providers.breaker import Breaker
from server.providers.prices import Price
from server.settings import ProviderConfig

if TYPE_CHECKING:
    from openai import AsyncOpenAI

# Requests that wait for their turn, for each one that may run: beyond it "not now" is the better answer.
_WAITING_PER_SLOT = 256
_FIRST_DELAY_S = 0.25
_LONGEST_DELAY_S = 8.0
# What a chat template adds around the messages, generously.
_TEMPLATE_TOKENS = 32
_REPEATABLE = frozenset({408, 409, 429, 500, 502, 503, 504, 529})


class OpenAIProvider:
    """See `server.providers.base.Provider`. The `openai` library is imported at the first request, in a thread: it takes a second."""

    def __init__(self, name: str, config: ProviderConfig, *, environ: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.training_allowed = config.training_allowed
        self._config = config
        self._key = config.read_api_key(environ)
        self._prices = {model: Price(p.input_per_million_usd, p.output_per_million_usd) for model, p in config.prices.items()}
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._waiting = 0
        self._breaker = Breaker()
        self._client: AsyncOpenAI | None = None
        self._opening: asyncio.Lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"OpenAIProvider({self.name!r})"

    def open_circuit(self) -> str:
        """See Provider."""
        rest = self._breaker.open_for_s()
        return f"failed again and again; it is asked again in {rest:.1f} s" if rest else ""

    def worst_cost_micro_usd(self, model: str, prompt: Prompt) -> int | None:
        """See Provider. A token is at least one byte."""
        price = self._prices.get(model)
        if price is None:
            return None
        bound = sum(len(m.content.encode()) for m in prompt.messages) + _TEMPLATE_TOKENS
        return price.cost_micro_usd(Usage(bound, prompt.max_tokens))

    async def complete(self, model: str, prompt: Prompt, deadline: float | None) -> Completion:
        """See Provider."""
        limit = self._config.max_concurrent * _WAITING_PER_SLOT
        if self._waiting >= limit:
            message = f"{limit} requests wait for the provider {self.name} already. Try again later."
            raise Overloaded(message, retry_after_s=1.0, limit=limit)
        self._waiting += 1
        try:
            async with asyncio.timeout(None if deadline is None else max(deadline - time.monotonic(), 0.0)), self._slots:
                return await self._with_retries(await self._open(), model, prompt, deadline)
        except TimeoutError:
            raise DeadlineExceeded(f"The deadline passed while {self.name}/{model} was asked.", stage="provider") from None
        finally:
            self._waiting -= 1

    async def stream(self, model: str, prompt: Prompt, deadline: float | None) -> AsyncGenerator[Part, None]:
        """See Provider; one piece for now."""
        completion = await self.complete(model, prompt, deadline)
        yield Part(completion.text)
        yield Part(completion=completion)

    async def embed(self, model: str, texts: Sequence[str], deadline: float | None) -> Embeddings:
        """See Provider."""
        raise Unimplemented(f"{self.name} has no embeddings yet.")

    def health(self) -> Health:
        """See Provider."""
        rest = self._breaker.open_for_s()
        return Health("open" if rest else "closed", rest, waiting=self._waiting)

    async def close(self) -> None:
        """See Provider."""
        if self._client is not None:
            await self._client.close()

    async def _open(self) -> AsyncOpenAI:
        async with self._opening:
            if self._client is None:
                library = await asyncio.to_thread(importlib.import_module, "openai")
                self._client = library.AsyncOpenAI(
                    api_key=self._key or "none",
                    base_url=self._config.base_url or "https://api.openai.com/v1",
                    timeout=self._config.timeout_s,
                    max_retries=0,  # repeating is ours: the library would repeat what may have been charged
                )
            return self._client

    async def _with_retries(self, client: AsyncOpenAI, model: str, prompt: Prompt, deadline: float | None) -> Completion:
        attempt = 0
        while True:
            if not self._breaker.admits():
                raise ProviderUnavailable(f"The provider {self.name} {self.open_circuit()}.", retry_after_s=self._breaker.open_for_s())
            attempt += 1
            try:
                completion = await self._ask(client, model, prompt, attempt)
            except _Refusal as refusal:
                if not refusal.repeatable or attempt > self._config.max_retries:
                    raise refusal.error from None
                delay = refusal.delay_s if refusal.delay_s is not None else _backoff(attempt)
                left = math.inf if deadline is None else deadline - time.monotonic()
                if delay > min(left, self._config.timeout_s):  # waiting would help nobody: the next candidate is due
                    raise refusal.error from None
                await asyncio.sleep(delay)
            else:
                self._breaker.succeeded()
                return completion

    async def _ask(self, client: AsyncOpenAI, model: str, prompt: Prompt, attempt: int) -> Completion:
        """One request. Raises _Refusal; DeadlineExceeded is not its business."""
        import openai

        try:
            answer = await client.chat.completions.create(
                model=model,
                messages=[{"role": m.role, "content": m.content} for m in prompt.messages],  # type: ignore[misc]
                max_tokens=prompt.max_tokens,
                temperature=prompt.temperature,
            )
            return self._completion(model, prompt, answer, attempt)
        except openai.APIStatusError as error:
            if error.status_code >= 500:
                self._breaker.failed()
            else:
                self._breaker.succeeded()
            raise _status_refusal(f"{self.name}/{model}", error.status_code, error.response.headers) from None
        except openai.APITimeoutError:
            self._breaker.failed()
            message = f"{self.name}/{model} did not answer within timeout_s = {self._config.timeout_s:g}. Raise it or ask another model."
            raise _Refusal(ProviderUnavailable(message), repeatable=False) from None
        except openai.APIConnectionError as error:
            self._breaker.failed()
            cause = type(error.__cause__ or error).__name__
            message = f"{self.name} cannot be reached at its base_url ({cause}). Look at the address and at the network."
            raise _Refusal(ProviderUnavailable(message), repeatable=cause == "ConnectError") from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError) as error:
            self._breaker.failed()
            message = f"{self.name}/{model} answered something that is no chat completion ({type(error).__name__}). Look at its base_url."
            raise _Refusal(ProviderUnavailable(message), repeatable=False) from None

    def _completion(self, model: str, prompt: Prompt, answer: Any, attempts: int) -> Completion:
        """Reads the fields that we need; the library does not check that they are there."""
        choice = answer.choices[0]
        text = choice.message.content
        if not isinstance(text, str):
            raise ValueError("no text")
        if answer.usage is not None:
            usage = Usage(int(answer.usage.prompt_tokens), int(answer.usage.completion_tokens))
        else:  # some servers keep silent; four bytes a token is the usual size
            usage = Usage((sum(len(m.content.encode()) for m in prompt.messages)) // 4 + _TEMPLATE_TOKENS, len(text.encode()) // 4 + 1)
        price = self._prices.get(model)
        source = answer.model if isinstance(answer.model, str) and answer.model else model
        return Completion(text, usage, source, price.cost_micro_usd(usage) if price else 0, attempts)


class _Refusal(Exception):
    """Why one request came to nothing, and whether another may follow after `delay_s` (None: our own choice)."""

    def __init__(self, error: UnderstudyError, *, repeatable: bool, delay_s: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.repeatable = repeatable
        self.delay_s = delay_s


def _status_refusal(who: str, status: int, headers: Mapping[str, str]) -> _Refusal:
    """The vendor's own words are left out: they may repeat the key or the text."""
    delay = _retry_after(headers)
    hint = {
        400: "Look at the model's name and limits.",
        401: "Look at the key that api_key_env or api_key_file names.",
        403: "Look at what the key is allowed to do.",
        404: "Look at the model's name and at base_url.",
        429: "Ask for a higher rate limit, or lower max_concurrent.",
    }.get(status, "Try again later.")
    error = ProviderUnavailable(f"{who} refused the request with HTTP status {status}. {hint}", retry_after_s=delay, status=status)
    return _Refusal(error, repeatable=status in _REPEATABLE, delay_s=delay)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            delay = float(headers[name]) * scale
        except (KeyError, ValueError):  # an HTTP date is not worth a parser here: our own delay does
            continue
        if 0 <= delay < 3600:
            return delay
    return None


def _backoff(attempt: int) -> float:
    """Full jitter over an interval that doubles."""
    return random.uniform(0.5, 1.0) * min(_FIRST_DELAY_S * 2.0 ** (attempt - 1), _LONGEST_DELAY_S)
