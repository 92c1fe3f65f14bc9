"""Which budgets a call falls under: scopes, and calendar days and months in the budget's time zone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from decimal import Decimal
from zoneinfo import ZoneInfo

from server.registry.budgets import Window
from server.settings import BudgetConfig

KeyLimits = Callable[[str], Mapping[str, int]]
"""A key's own limits by window ("day", "month"), in 1e-6 US dollars; from any thread. They never change."""
TOTAL = "total"
_CACHED = 4096  # combinations of scopes; keys are the callers' to choose
_KEY_LENGTH = 128


@dataclass(slots=True, frozen=True)
class Scopes:
    """Who answers, for which skill, for whose key; "" where there is none."""

    provider: str = ""
    skill: str = ""
    key: str = ""


@dataclass(slots=True, frozen=True)
class Period:
    """A local day ("2026-11-21") or month ("2026-11") that begins at `starts_ms` and ends before `ends_ms`, since 1970 in UTC."""

    kind: str
    name: str
    starts_ms: int
    ends_ms: int


def periods(now_ms: int, zone: tzinfo) -> tuple[Period, Period]:
    """The day and the month of an instant. A midnight that a change of clocks leaves out is the instant of the change."""
    today = datetime.fromtimestamp(now_ms / 1000, zone).date()
    first = today.replace(day=1)
    following = (first + timedelta(days=32)).replace(day=1)
    return (
        Period("day", today.isoformat(), _midnight(today, zone), _midnight(today + timedelta(days=1), zone)),
        Period("month", today.isoformat()[:7], _midnight(first, zone), _midnight(following, zone)),
    )


def rfc3339(ms: int) -> str:
    """An instant as text, in UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _midnight(day: date, zone: tzinfo) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp() * 1000)


class Windows:
    """The windows of a configuration; looked up for every paid call, and so kept until the day ends. For one thread at a time.

    A key's own limits (`key_limits`) take the place of the default of keys, window by window; beside one that the configuration names for
    the key, the smaller holds.
    """

    def __init__(self, config: BudgetConfig, key_limits: KeyLimits | None = None) -> None:
        self._zone: tzinfo = UTC if config.time_zone == "UTC" else ZoneInfo(config.time_zone)
        self._stop_at, self._alert_at = Decimal(repr(config.stop_at)), Decimal(repr(config.alert_at))
        tables = {"provider": config.providers, "skill": config.skills, "key": config.keys}
        named = {f"{kind}:{name}": one for kind, table in tables.items() for name, one in table.items()}
        limits = {scope: one.micro_usd() for scope, one in {TOTAL: config.total, **named}.items()}
        # A key that is named without a limit has none; others fall back on the default.
        self._limits = {scope: one for scope, one in limits.items() if one or scope.startswith("key:")}
        self._default_key = config.default_key.micro_usd()
        self._key_limits = key_limits
        self._periods: tuple[Period, ...] = ()
        self._cache: dict[Scopes, tuple[Window, ...]] = {}

    def of(self, scopes: Scopes, now_ms: int) -> tuple[Window, ...]:
        """The windows that a call counts in: two a scope at most; () where nothing limits it."""
        self.turn(now_ms)
        found = self._cache.get(scopes)
        if found is None:
            names = [TOTAL, *(f"{kind}:{name}" for kind, name in (("provider", scopes.provider), ("skill", scopes.skill)) if name)]
            if scopes.key:
                names.append(key_scope(scopes.key))
            if len(self._cache) >= _CACHED:
                self._cache.clear()
            found = self._cache[scopes] = self.named(names)
        return found

    def configured(self) -> tuple[Window, ...]:
        """The windows of every scope that the configuration names."""
        return self.named(self._limits)

    def named(self, scopes: Iterable[str]) -> tuple[Window, ...]:
        """The windows of scopes by name, of those that have a limit."""
        return tuple(
            Window(
                scope,
                period.kind,
                period.name,
                period.ends_ms,
                limit,
                self._share(self._stop_at, limit),
                self._share(self._alert_at, limit),
            )
            for scope in scopes
            for kind, limit in self._of_scope(scope).items()
            for period in self._periods
            if period.kind == kind
        )

    def is_named(self, scope: str) -> bool:
        """Whether the configuration names a scope; other keys share a default."""
        return scope in self._limits

    @property
    def has_unnamed_keys(self) -> bool:
        """Whether keys that the configuration does not name may have a limit."""
        return bool(self._default_key) or self._key_limits is not None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the current day and month."""
        return tuple(period.name for period in self._periods)

    def turn(self, now_ms: int) -> bool:
        """Goes on to the day and month of an instant; says whether they are others than before."""
        if self._periods and all(period.starts_ms <= now_ms < period.ends_ms for period in self._periods):
            return False
        self._periods = periods(now_ms, self._zone)
        self._cache = {}
        return True

    def _of_scope(self, scope: str) -> dict[str, int]:
        named = self._limits.get(scope)
        if not scope.startswith("key:"):
            return named or {}
        own = self._key_limits(scope.removeprefix("key:")) if self._key_limits is not None else {}
        if named is None:
            return {**self._default_key, **own}
        return {window: min(named.get(window, limit), limit) for window, limit in {**named, **own}.items()}

    def _share(self, share: Decimal, limit: int) -> int:
        return math.ceil(share * limit)


def key_scope(key: str) -> str:
    """The scope of a caller's key; a very long one is replaced by its SHA-256."""
    return f"key:{key if len(key) <= _KEY_LENGTH else hashlib.sha256(key.encode()).hexdigest()}"
