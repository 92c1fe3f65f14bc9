"""A client of one vendor: turns, limits, retries, the circuit, timeouts, costs. What is said on the wire is the wire format's business."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import math
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from server.core import Usage
from server.errors import DeadlineExceeded, Overloaded, ProviderUnavailable, UnderstudyError
from server.providers.base import Completion, Health, Part, Prompt
from server.providers.breaker import Breaker
from server.providers.failures import Refusal, backoff_s, refusal_of, status_refusal
from server.providers.limits import Place, Rates
from server.providers.presets import key_of, presets
from server.providers.prices import Prices, input_estimate, output_estimate
from server.providers.quiet import keep_quiet
from server.providers.stats import Stats
from server.providers.streams import LiveStream, Origin, Times, nothing_said
from server.providers.wire import ClientSettings, Reply, Wire
from server.settings import ProviderConfig

if TYPE_CHECKING:
    from server.providers.transport import Transport

T = TypeVar("T")
# Requests that wait for their turn, for each one that may run: beyond it "not now" is the better answer.
_WAITING_PER_SLOT = 256
# A deadline that passed says something of the vendor only where the vendor had this long.
_PATIENCE_S = 1.0
_KEEPALIVE_S = 30.0


class Asked:
    """One call while it is being answered. `exposure`: the tokens it takes at most, in all likelihood; `sent_at` 0: nothing is out."""

    __slots__ = ("attempts", "deadline", "exposure", "model", "place", "sent_at", "started", "who")

    def __init__(self, who: str, model: str, exposure: Usage, deadline: float | None) -> None:
        self.who = who
        self.model = model
        self.exposure = exposure
        self.deadline = deadline
        self.started = time.monotonic()
        self.sent_at = 0.0
        self.attempts = 0
        self.place: Place | None = None

    def left_s(self) -> float | None:
        """Seconds until the deadline, never negative; None without one."""
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)


class RemoteProvider:
    """See `server.providers.base.Provider`. The vendor's library is imported at the first request, in a thread: it takes a second."""

    def __init__(self, name: str, config: ProviderConfig, wire: Wire, environ: Mapping[str, str]) -> None:
        preset = presets()[config.kind]
        self.name = name
        self.training_allowed = config.training_allowed
        self._config = config
        self._wire = wire
        self._key = key_of(config, preset, environ)
        self._base_url = config.base_url.rstrip("/") or preset.base_url
        self._prices = Prices(config, preset)
        self._rates = Rates(config)
        self._breaker = Breaker(config.circuit_failures, config.circuit_rest_s)
        self._times = Times(config.first_token_timeout_s, config.between_tokens_timeout_s, config.timeout_s)
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._stats = Stats()
        self._opening = asyncio.Lock()
        self._client: Any = None  # the library's
        self._http: Any = None  # the one below it
        self._headers: Any = None
        self._transport: Transport | None = None  # ours, unless a proxy is asked
        self._sdk: ModuleType | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def open_circuit(self) -> str:
        """See Provider."""
        rest = self._breaker.open_for_s()
        return f"failed again and again; it is asked again in {rest:.1f} s" if rest else ""

    def health(self) -> Health:
        """See Provider."""
        return self._stats.health(self._breaker.state(), self._breaker.open_for_s(), self._rates.room())

    def gives_logprobs(self, model: str) -> bool:
        """See Provider."""
        return self._wire.gives_logprobs(model)

    def worst_cost_micro_usd(self, model: str, prompt: Prompt) -> int | None:
        """See Provider. A token is at least one byte."""
        return self._prices.worst_micro_usd(model, prompt)

    def aborted_cost_micro_usd(self, model: str, prompt: Prompt, text: str) -> int:
        """See Provider."""
        return self._prices.cost_micro_usd(model, Usage(input_estimate(prompt), output_estimate(text)))

    async def complete(self, model: str, prompt: Prompt, deadline: float | None) -> Completion:
        """See Provider."""
        asked = self._asked(model, Usage(input_estimate(prompt), prompt.max_tokens), deadline)

        def read(answer: Any) -> tuple[Reply, Usage]:
            reply = self._wire.read(answer, prompt, asked.who)
            if not reply.text and not reply.tool_calls:
                raise nothing_said(asked.who, reply)
            return reply, self._usage(asked, reply)

        reply, usage = await self._unary(asked, self._wire.path, lambda: self._wire.body(model, prompt, stream=False), read)
        return self._completion(asked, reply, usage, time.monotonic())

    async def stream(self, model: str, prompt: Prompt, deadline: float | None) -> AsyncGenerator[Part, None]:
        """See Provider."""
        asked = self._asked(model, Usage(input_estimate(prompt), prompt.max_tokens), deadline)
        live = await self._begin(asked, prompt)
        completion: Completion | None = None
        blame: bool | None = None
        try:
            while (parts := await live.more()) is not None:
                for part in parts:
                    yield part
            reply = live.reader.reply()
            completion = self._completion(asked, reply, self._usage(asked, reply), live.first_at or time.monotonic())
        except Refusal as refusal:
            blame = refusal.blame
            raise self._error(asked, refusal) from None
        except DeadlineExceeded as error:
            blame = self._patient(asked) or None
            error.spent_micro_usd = self._prices.cost_micro_usd(model, live.received())
            raise
        finally:
            self._end(asked, live, completion, blame)
            await live.close()
        if completion.tool_calls:
            yield Part(tool_calls=completion.tool_calls)
        yield Part(completion=completion)

    async def close(self) -> None:
        """See Provider."""
        if self._client is not None:
            await self._client.close()

    def _asked(self, model: str, exposure: Usage, deadline: float | None) -> Asked:
        return Asked(f"{self.name}/{model}", model, exposure, deadline)

    async def _unary(
        self, asked: Asked, path: str, body: Callable[[], dict[str, Any]], read: Callable[[Any], tuple[T, Usage]]
    ) -> tuple[T, Usage]:
        """One answer in one piece. `read` raises Refusal, ValueError, TypeError, AttributeError or LookupError on garbage."""

        async def send(data: bytes) -> tuple[T, Usage]:
            try:
                async with asyncio.timeout(self._config.timeout_s) as scope:
                    response = await self._post(asked, path, data)
            except TimeoutError:
                if not scope.expired():
                    raise
                message = f"{asked.who} did not answer within timeout_s = {self._config.timeout_s:g}. Raise it or ask another model."
                raise Refusal(ProviderUnavailable(message, cause="timeout_s"), charged=True) from None
            return read(json.loads(response.content))

        result, usage = await self._served(asked, body, send)
        self._breaker.succeeded()
        self._stats.answered(time.monotonic() - asked.sent_at)
        self._leave(asked, usage)
        return result, usage

    async def _begin(self, asked: Asked, prompt: Prompt) -> LiveStream:
        """A stream that has its first token; its place is held until `_end`."""

        async def send(data: bytes) -> LiveStream:
            assert self._sdk is not None
            origin = Origin(asked.who, self._sdk, self._key, asked.deadline, asked.exposure.input)
            live = LiveStream(self._wire.reader(asked.who, self._key, prompt), self._times, origin)
            return await live.open(self._post(asked, self._wire.path, data, stream=True))

        live = await self._served(asked, lambda: self._wire.body(asked.model, prompt, stream=True), send)
        self._breaker.answering()
        return live

    async def _post(self, asked: Asked, path: str, data: bytes, *, stream: bool = False) -> Any:
        """The response to one request that the library's client describes. Raises Refusal where its status is no success.

        The library's own `post` builds each request anew out of its options, which takes more processor time than sending and reading it;
        the client below it looks for redirections, cookies and more that is not wanted here.
        """
        url = f"{self._base_url}{path}"
        if self._transport is None:
            response = await self._http.send(self._http.build_request("POST", url, headers=self._headers, content=data), stream=stream)
        else:
            response = await self._transport.post(url, self._headers, data)
            if not stream:
                await response.aread()
        if response.is_success:
            return response
        try:
            body = await response.aread()
        finally:
            await response.aclose()
        raise status_refusal(asked.who, response.status_code, response.headers, body, self._key)

    def _end(self, asked: Asked, live: LiveStream, completion: Completion | None, blame: bool | None) -> None:
        """Of a stream; `blame` None and no completion: its reader left."""
        if blame:
            self._breaker.failed()
            self._stats.failed()
        elif blame is not None or completion is not None:
            self._breaker.succeeded()
        if completion is not None:
            self._stats.answered(time.monotonic() - asked.sent_at, completion.first_token_s)
        self._leave(asked, live.received() if completion is None else completion.usage)

    async def _served(self, asked: Asked, body: Callable[[], dict[str, Any]], send: Callable[[bytes], Awaitable[T]]) -> T:
        """Waits for a turn, then sends as often as is safe. After a success the turn is still held; `_leave` ends it."""
        try:
            if asked.left_s() == 0:
                raise TimeoutError  # nothing is sent that nobody waits for
            async with asyncio.timeout(asked.left_s()):
                if self._client is None:
                    await self._open()
                data = json.dumps(body()).encode()
                self._refuse_early(asked)
                await self._turn()
                try:
                    return await self._repeat(asked, data, send)
                except BaseException:
                    self._leave(asked, None)
                    raise
        except TimeoutError:
            error = DeadlineExceeded(f"The deadline passed while {asked.who} was asked.", stage="provider")
            if asked.sent_at:
                error.spent_micro_usd = self._prices.cost_micro_usd(asked.model, asked.exposure)
            raise error from None

    async def _turn(self) -> None:
        limit = self._config.max_concurrent * _WAITING_PER_SLOT
        if self._stats.waiting >= limit:
            message = f"{limit} requests wait for the provider {self.name} already. Try again later."
            raise Overloaded(message, retry_after_s=1.0, limit=limit)
        self._stats.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._stats.waiting -= 1
        self._stats.in_flight += 1

    def _leave(self, asked: Asked, usage: Usage | None) -> None:
        """Ends a turn; `usage` None: what the place was taken for may have been used."""
        self._slots.release()
        self._stats.in_flight -= 1
        if asked.place is not None and usage is not None:
            self._rates.settle(asked.place, usage.input + usage.output)

    async def _repeat(self, asked: Asked, data: bytes, send: Callable[[bytes], Awaitable[T]]) -> T:
        while True:
            await self._room(asked)
            if not self._breaker.admits():
                if asked.place is not None:
                    self._rates.give_back(asked.place)
                raise self._resting()
            asked.attempts += 1
            refusal = None
            try:
                return await self._attempt(asked, data, send)
            except Refusal as error:
                refusal = error
            if refusal.blame:
                self._breaker.failed()
                self._stats.failed()
            else:
                self._breaker.succeeded()
            if not refusal.charged:
                asked.sent_at = 0.0
                if asked.place is not None:
                    self._rates.settle(asked.place, 0)
            delay = refusal.delay_s if refusal.delay_s is not None else backoff_s(asked.attempts)
            # Waiting longer than anyone would helps nobody: the next candidate is due.
            if not refusal.repeatable or asked.attempts > self._config.max_retries or delay > self._patience(asked):
                raise self._error(asked, refusal)
            await asyncio.sleep(delay)

    async def _attempt(self, asked: Asked, data: bytes, send: Callable[[bytes], Awaitable[T]]) -> T:
        """One request. Raises Refusal."""
        assert self._sdk is not None
        asked.sent_at = time.monotonic()
        try:
            return await send(data)
        except Exception as error:
            refusal = refusal_of(error, self._sdk, asked.who, self._key)
        except BaseException:  # the deadline, or a caller that left
            if self._patient(asked):
                self._breaker.failed()
                self._stats.failed()
            else:
                self._breaker.undecided()
            raise
        # Raised out here: the library's exception, which holds the request and its key, stays behind.
        raise refusal

    async def _room(self, asked: Asked) -> None:
        """Waits until the vendor's limits have room. Raises Overloaded where that comes too late."""
        if not self._rates.limited:
            return
        tokens = asked.exposure.input + asked.exposure.output
        wait = self._rates.wait_s(tokens)
        if wait > self._patience(asked):
            raise self._full(wait)
        asked.place = self._rates.take(tokens, wait)
        if wait:
            try:
                await asyncio.sleep(wait)
            except BaseException:
                self._rates.give_back(asked.place)
                asked.place = None
                raise

    def _refuse_early(self, asked: Asked) -> None:
        """Whatever can be said without a turn is not waited for."""
        if self._breaker.refuses():
            raise self._resting()
        if self._rates.limited:
            wait = self._rates.wait_s(asked.exposure.input + asked.exposure.output)
            if wait > self._patience(asked):
                raise self._full(wait)

    def _patience(self, asked: Asked) -> float:
        """The longest that waiting makes sense, in seconds."""
        left = asked.left_s()
        return min(math.inf if left is None else left, self._config.timeout_s)

    def _patient(self, asked: Asked) -> bool:
        """Whether the deadline has passed, and the vendor had had the time for an answer."""
        if asked.deadline is None or time.monotonic() < asked.deadline - 0.01:
            return False
        return time.monotonic() - asked.sent_at >= max(_PATIENCE_S, 4 * self._stats.median_s())

    def _resting(self) -> UnderstudyError:
        rest = self._breaker.open_for_s()
        return ProviderUnavailable(f"The provider {self.name} {self.open_circuit() or 'is being probed'}.", retry_after_s=rest)

    def _full(self, wait: float) -> UnderstudyError:
        message = f"The rate limits of the provider {self.name} have room in {wait:.1f} s. Try again then, or raise its limits."
        return Overloaded(message, retry_after_s=wait, provider=self.name)

    def _error(self, asked: Asked, refusal: Refusal) -> UnderstudyError:
        """The refusal's error with what was paid all the same."""
        if refusal.charged:
            refusal.error.spent_micro_usd = self._prices.cost_micro_usd(asked.model, refusal.usage or asked.exposure)
        return refusal.error

    def _usage(self, asked: Asked, reply: Reply) -> Usage:
        if reply.usage is not None:
            return reply.usage
        said = reply.text + "".join(call.name + call.arguments for call in reply.tool_calls)
        return Usage(asked.exposure.input, output_estimate(said))

    def _completion(self, asked: Asked, reply: Reply, usage: Usage, first_at: float) -> Completion:
        return Completion(
            reply.text,
            usage,
            reply.source_model or asked.model,
            self._prices.cost_micro_usd(asked.model, usage),
            asked.attempts,
            reply.finish,
            reply.tool_calls,
            reply.logprobs,
            first_at - asked.started,
        )

    async def _open(self) -> None:
        async with self._opening:
            if self._client is None:
                client = await asyncio.to_thread(self._make_client)
                named = {**client.auth_headers, **client.default_headers}
                self._headers = self._http.headers.copy()
                self._headers.update({name: value for name, value in named.items() if isinstance(value, str)})  # others say: leave it out
                self._client = client
                gc.freeze()  # the library's hundred thousand objects stay: walking them again and again stalls every call for 40 ms

    def _make_client(self) -> Any:
        """In a thread: imports, and certificates read from the disk."""
        self._sdk = importlib.import_module(self._wire.sdk)
        import httpx2

        from server.providers.transport import Transport

        tls = httpx2.create_ssl_context() if self._base_url.startswith("https://") else None
        address = urlsplit(self._base_url)
        proxies = getproxies()
        # A proxy of the environment is httpx2's business.
        through_proxy = not proxy_bypass(address.netloc) and (proxies.get(address.scheme) or proxies.get("all"))
        places = self._config.max_concurrent
        self._transport = None if through_proxy else Transport(tls, self._config.connect_timeout_s, _KEEPALIVE_S)
        self._http = httpx2.AsyncClient(
            transport=self._transport,
            verify=tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # the second trusts nobody: nothing is to be encrypted
            # Answers have timeouts of our own, which cost one timer a request instead of one a read.
            timeout=httpx2.Timeout(None, connect=self._config.connect_timeout_s),
            limits=httpx2.Limits(max_connections=places, max_keepalive_connections=places, keepalive_expiry=_KEEPALIVE_S),
            follow_redirects=False,  # texts and keys go to the address that was configured, and nowhere else
        )
        keep_quiet(self._key)
        return self._wire.open(self._sdk, ClientSettings(self._key, self._base_url, self._http))
