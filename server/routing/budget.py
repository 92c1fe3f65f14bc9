"""Budgets: the worst case is reserved before a provider is asked, what it cost is settled after.

One thread owns the ledger. It takes all that wait at a time, so that concurrent callers share one transaction; the event loop never waits
for the disk. Where nothing is limited nothing runs.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from server.errors import BudgetExceeded, UnderstudyError
from server.registry.budgets import Ledger, Refusal, Settlement, Used, Window, Wish
from server.registry.registry import Registry
from server.routing.budget_windows import KeyLimits, Scopes, Windows, rfc3339
from server.routing.webhook import Webhook
from server.settings import BudgetConfig

_LOG = logging.getLogger(__name__)
_LOOK_S = 1.0  # how often, at least, the use by other servers is looked at
_WATCHED_KEYS = 1024
_SOON_S = 1.0  # when to come again where only reservations of running calls are in the way


class BudgetObserver(Protocol):
    """Who counts. Called from any thread; does not block."""

    def budget_used(self, scope: str, window: str, ratio: float) -> None:
        """The share of a limit that is spent, over all servers."""
        ...

    def budget_refused(self, scope: str, window: str) -> None:
        """A call was refused; keys without a limit of their own are "key:*"."""
        ...


@dataclass(slots=True, frozen=True)
class BudgetStatus:
    """A limit and its use over all servers, in 1e-6 US dollars. `resets_at_ms` is since 1970.

    `state`: ok, alert (the share `alert_at` is spent), stopped (the share `stop_at` is spent or reserved: no paid call begins), exhausted
    (all is spent).
    """

    scope: str
    window: str
    limit_micro_usd: int
    spent_micro_usd: int
    reserved_micro_usd: int
    state: str
    resets_at_ms: int

    @property
    def remaining_micro_usd(self) -> int:
        """What is neither spent nor reserved."""
        return max(0, self.limit_micro_usd - self.spent_micro_usd - self.reserved_micro_usd)

    @property
    def used_ratio(self) -> float:
        """The share that is spent; 1 where the limit is 0."""
        return self.spent_micro_usd / self.limit_micro_usd if self.limit_micro_usd else 1.0


class Reservation:
    """A promise of `amount_micro_usd`; hand it to `settle` or `release`. The first of them counts, later ones do nothing."""

    __slots__ = ("_end", "amount_micro_usd", "windows")

    def __init__(self, amount_micro_usd: int, windows: tuple[Window, ...] = (), end: Callable[[Settlement], None] | None = None) -> None:
        self.amount_micro_usd = amount_micro_usd
        self.windows = windows
        self._end = end

    def close(self, spent_micro_usd: int) -> None:
        """Hands the truth in, once. For Budget."""
        end, self._end = self._end, None
        if end is not None:
            end(Settlement(self.windows, self.amount_micro_usd, spent_micro_usd))

    def __del__(self) -> None:
        if self._end is not None:
            _LOG.error("a reservation was lost, and counts as spent", extra={"amount_micro_usd": self.amount_micro_usd})
            self.close(self.amount_micro_usd)


class _Ask(NamedTuple):
    wish: Wish
    future: asyncio.Future[Reservation | Refusal]


class _Do(NamedTuple):
    work: Callable[[], Any]
    future: asyncio.Future[Any]


class Budget:
    """One a process; its methods are for the event loop, any number of calls at once. `clock` is for tests: milliseconds since 1970.

    `key_limits`: the limits that keys carry themselves, by key and window; None where callers have no keys.
    """

    def __init__(
        self,
        config: BudgetConfig,
        registry: Registry,
        *,
        observer: BudgetObserver | None = None,
        clock: Callable[[], int] | None = None,
        key_limits: KeyLimits | None = None,
    ) -> None:
        """Raises InvalidArgument where the webhook's place holds none."""
        self.limited = config.limited or key_limits is not None
        self.config = config
        self._observer = observer
        self._ledger = Ledger(registry, lease_s=config.lease_s, clock=clock)
        self._windows = Windows(config, key_limits)  # the event loop's
        url = config.read_webhook_url()
        self._webhook = Webhook(url) if url else None
        self._queue: queue.SimpleQueue[_Ask | Settlement | _Do | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # Of the thread alone:
        self._watch = Windows(config, key_limits)
        self._keys: dict[str, None] = {}  # scopes of keys without a limit of their own, the last used last
        self._alerted: set[tuple[str, str, str]] = set()
        self._renewed_ms = 0
        self._away = False

    async def start(self) -> None:
        """Looks at what is spent already. A database that is away is no reason not to serve: paid calls fail until it is back."""
        if self.limited:
            await self._do(lambda: None)

    async def reserve(self, amount_micro_usd: int, scopes: Scopes) -> Reservation:
        """Promises an amount in all windows of the scopes, or in none. Amounts of 0 are always promised.

        Raises:
            BudgetExceeded: metadata `scope`, `window`, `resets_at`; `retry_after_s` until it resets, or a moment where only the
                reservations of running calls are in the way.
            Unavailable: the database does not answer; without it nothing is promised.
        """
        assert amount_micro_usd >= 0
        if not self.limited:
            return _FREE
        windows = self._windows.of(scopes, self._ledger.now())
        if not windows:
            return _FREE
        if not amount_micro_usd:
            return Reservation(0, windows, self._queue.put)
        for window in windows:
            used = self._ledger.seen(window.key)
            if used.spent >= window.stop or used.spent + amount_micro_usd > window.limit:  # what is spent stays spent: no need to ask
                raise self._refused(Refusal(window, used), amount_micro_usd)
        loop = self._running()
        future: asyncio.Future[Reservation | Refusal] = loop.create_future()
        self._queue.put(_Ask(Wish(windows, amount_micro_usd), future))
        try:
            answer = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                answer = future.result()
                if isinstance(answer, Reservation):
                    answer.close(0)
            raise
        if isinstance(answer, Refusal):
            raise self._refused(answer, amount_micro_usd)
        return answer

    def bounds(self, scopes: Scopes) -> bool:
        """Whether a paid call must have a known worst cost: where the configuration limits anything, or the key itself."""
        return self.config.limited or bool(self.limited and self._windows.of(scopes, self._ledger.now()))

    async def settle(self, reservation: Reservation, spent_micro_usd: int) -> None:
        """Replaces the promise by what was paid, in the windows of its time, even after its lease or its day ended.

        Returns at once: it is written with the next transaction, and again until that succeeds.
        """
        assert spent_micro_usd >= 0
        if spent_micro_usd > reservation.amount_micro_usd and reservation.windows:
            extra = {"reserved_micro_usd": reservation.amount_micro_usd, "spent_micro_usd": spent_micro_usd}
            _LOG.error("a call cost more than its worst case; a price or a limit of tokens is wrong", extra=extra)
        reservation.close(spent_micro_usd)

    async def release(self, reservation: Reservation) -> None:
        """Gives a promise back: nothing was paid."""
        reservation.close(0)

    def blocked(self, scopes: Scopes) -> str:
        """Why no paid call may begin at the moment, or "". As of the last look, which is at most a second old; `reserve` knows exactly."""
        if not self.limited:
            return ""
        for window in self._windows.of(scopes, self._ledger.now()):
            if self._ledger.seen(window.key).total >= window.stop:
                share = f"{self.config.stop_at * 100:g} %"
                return f"{share} of the budget of {_spoken(window)} is spent or reserved; it resets at {rfc3339(window.ends_ms)}"
        return ""

    async def report(self) -> list[BudgetStatus]:
        """Every limit with its use, keys without a limit of their own among them where they have spent. Raises Unavailable."""
        return await self._do(self._report) if self.limited else []

    async def close(self) -> None:
        """Writes what was settled, and stops. What is still reserved expires."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            await asyncio.to_thread(thread.join)
        if self._webhook is not None:
            await self._webhook.close()

    async def _do(self, work: Callable[[], Any]) -> Any:
        future: asyncio.Future[Any] = self._running().create_future()
        self._queue.put(_Do(work, future))
        return await future

    def _running(self) -> asyncio.AbstractEventLoop:
        """The event loop, with the thread beside it."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._work, name="budget", daemon=True)
            self._thread.start()
        assert self._loop is not None
        return self._loop

    def _refused(self, refusal: Refusal, amount: int) -> BudgetExceeded:
        window = refusal.window
        shown = window.scope if self._windows.is_named(window.scope) else "key:*"
        if self._observer is not None:
            self._observer.budget_refused(shown, window.kind)
        resets = rfc3339(window.ends_ms)
        message = (
            f"The budget of {_spoken(window)} has no room for a call that may cost {amount / 1e6:g} US dollars; it resets at {resets}."
        )
        final = refusal.used.spent >= window.stop or refusal.used.spent + amount > window.limit
        wait = max(0.0, (window.ends_ms - self._ledger.now()) / 1000) if final else _SOON_S
        return BudgetExceeded(message, retry_after_s=wait, scope=window.scope, window=window.kind, resets_at=resets)

    # The thread's:

    def _work(self) -> None:
        next_look = time.monotonic()
        with suppress(UnderstudyError):
            self._ledger.tidy()
        while True:
            if time.monotonic() >= next_look:
                self._look()
                next_look = time.monotonic() + min(_LOOK_S, self.config.lease_s / 3)
            if not self._turn(next_look - time.monotonic()):
                break
        self._ledger.close()

    def _turn(self, wait_s: float) -> bool:
        """One transaction for all that waits; False at the end. Nothing of it is kept: a reservation that is forgotten must be noticed."""
        items = self._take(wait_s)
        asks = [item for item in items if isinstance(item, _Ask) and not item.future.done()]  # the others' callers have left
        answers = self._exchange(asks, [item for item in items if isinstance(item, Settlement)])
        answers += [(item.future, _result(item.work)) for item in items if isinstance(item, _Do)]
        if answers:
            self._tell(answers)
        return None not in items

    def _take(self, wait_s: float) -> list[_Ask | Settlement | _Do | None]:
        """All that waits, or what comes first within a time."""
        items: list[_Ask | Settlement | _Do | None] = []
        with suppress(queue.Empty):
            items.append(self._queue.get(timeout=max(0.0, wait_s)))
            while True:
                items.append(self._queue.get_nowait())
        return items

    def _exchange(self, asks: Sequence[_Ask], settlements: Sequence[Settlement]) -> list[tuple[asyncio.Future[Any], Any]]:
        """Settles and reserves; each future with its reservation or error."""
        wishes = [ask.wish for ask in asks]
        for scope in {window.scope for wish in wishes for window in wish.windows if window.scope.startswith("key:")}:
            self._watch_key(scope)
        try:
            refusals = self._ledger.exchange(settlements, wishes)
        except UnderstudyError as error:
            self._say_away(error)
            return [(ask.future, type(error)(error.message, retry_after_s=error.retry_after_s)) for ask in asks]
        except Exception as error:  # our own mistake; whoever waits must not wait for ever
            _LOG.exception("the ledger of budgets failed")
            return [(ask.future, RuntimeError(f"the ledger failed: {type(error).__name__}")) for ask in asks]
        return [
            (ask.future, Reservation(ask.wish.amount, ask.wish.windows, self._queue.put) if refusal is None else refusal)
            for ask, refusal in zip(asks, refusals, strict=True)
        ]

    def _tell(self, answers: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, answers)
        except RuntimeError:  # the loop has ended, and nobody waits
            for _, answer in answers:
                if isinstance(answer, Reservation):
                    answer.close(0)

    def _deliver(self, answers: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
        """On the event loop."""
        for future, answer in answers:
            if future.done():  # the caller has left
                if isinstance(answer, Reservation):
                    answer.close(0)
            elif isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _look(self) -> None:
        """Once a second: what others used, alerts, metrics, the lease."""
        now = self._ledger.now()
        if self._watch.turn(now):
            self._alerted.clear()
        windows = [*self._watch.configured(), *self._watch.named(self._keys)]
        try:
            if now - self._renewed_ms >= self.config.lease_s * 1000 / 3:
                self._ledger.renew()
                self._renewed_ms = now
            self._ledger.exchange((), ())
            self._ledger.look(windows)
            for window in windows:
                self._watch_over(window, self._ledger.seen(window.key))
        except UnderstudyError as error:
            self._say_away(error)
            return
        except Exception:
            _LOG.exception("the ledger of budgets failed")
            return
        if self._away:
            self._away = False
            _LOG.warning("the budget's database answers again")

    def _watch_over(self, window: Window, used: Used) -> None:
        if self._observer is not None and self._watch.is_named(window.scope):
            self._observer.budget_used(window.scope, window.kind, _status(window, used).used_ratio)
        for level, mark in (("alert", window.alert), ("stopped", window.stop)):
            if window.limit and used.spent >= mark and (*window.key, level) not in self._alerted:
                first = self._ledger.claim_alert(window, level)
                self._alerted.add((*window.key, level))
                if first:
                    self._alert(window, used, level)

    def _alert(self, window: Window, used: Used, level: str) -> None:
        status = _status(window, used)
        event = {
            "event": f"budget.{level}",
            "scope": window.scope,
            "window": window.kind,
            "period": window.period,
            "limit_micro_usd": window.limit,
            "spent_micro_usd": used.spent,
            "used_ratio": round(status.used_ratio, 4),
            "resets_at": rfc3339(window.ends_ms),
        }
        _LOG.warning("a budget is nearly used up" if level == "alert" else "a budget is used up: paid calls stop", extra=dict(event))
        if self._webhook is not None and self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._webhook.post, event)

    def _watch_key(self, scope: str) -> None:
        if not self._watch.is_named(scope):
            self._keys.pop(scope, None)
            self._keys[scope] = None
            if len(self._keys) > _WATCHED_KEYS:
                del self._keys[next(iter(self._keys))]

    def _say_away(self, error: UnderstudyError) -> None:
        if not self._away:
            self._away = True
            _LOG.error("the budget's database does not answer; paid calls fail", extra={"error": error.message})

    def _report(self) -> list[BudgetStatus]:
        self._watch.turn(self._ledger.now())
        windows = list(self._watch.configured())
        if self._watch.has_unnamed_keys:
            found = self._ledger.scopes(self._watch.names, "key:")
            windows += self._watch.named(scope for scope in found if not self._watch.is_named(scope))
        self._ledger.look(windows)
        return [_status(window, self._ledger.seen(window.key)) for window in windows]


_FREE = Reservation(0)  # where nothing is limited


def _result(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        return error


def _status(window: Window, used: Used) -> BudgetStatus:
    state = "ok"
    if used.spent >= window.limit:
        state = "exhausted"
    elif used.total >= window.stop:
        state = "stopped"
    elif used.spent >= window.alert:
        state = "alert"
    return BudgetStatus(window.scope, window.kind, window.limit, used.spent, used.reserved, state, window.ends_ms)


def _spoken(window: Window) -> str:
    """As a part of a sentence: skill 'triage' for the day."""
    kind, _, name = window.scope.partition(":")
    return f"{kind} {name!r} for the {window.kind}" if name else f"all calls for the {window.kind}"
