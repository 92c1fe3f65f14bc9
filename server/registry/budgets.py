"""The ledger of budgets: what was spent and what is reserved, by scope and window, over all servers of one database.

A server process is a *holder*. For each window that it uses it has one row, which nobody else writes, with the absolute amounts that it
keeps in memory: writing a row twice changes nothing, so a transaction whose end is unknown is simply written again. A reservation is one
statement, which adds to all its windows' rows or to none: it looks at the rows of all holders and refuses where one window has no room.
What a holder reserved counts until its rows expire; it renews them while it lives, so a killed server's reservations vanish by themselves.

What keeps two servers from reserving the same room at once: on SQLite the one writer, on PostgreSQL an advisory lock, taken before the
statement looks. Both are held for a transaction, and a transaction takes as many reservations as wait (`exchange`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from server.errors import Unavailable

if TYPE_CHECKING:
    from server.registry.registry import Registry

Key = tuple[str, str]  # scope and period
_LOCK = 0x756E646572737475  # PostgreSQL's advisory lock of the ledger: a number that nobody else takes
_KEEP_MS = 400 * 86_400_000  # windows that ended so long ago are deleted
_GONE_MS = 86_400_000  # a holder that wrote nothing for so long has ended; those that live write more often
_MANY = 100  # windows a statement
_PATIENCE_MS = 10_000  # how long a statement may take on PostgreSQL, waiting for the lock included; on SQLite the engine's


@dataclass(slots=True, frozen=True)
class Window:
    """A scope's limit over one day or month. Amounts in 1e-6 US dollars; times in milliseconds since 1970.

    Nothing is reserved once `stop` is used, nor what would pass `limit`; `alert` is for those who watch. `kind` is "day" or "month",
    `period` the local date.
    """

    scope: str
    kind: str
    period: str
    ends_ms: int
    limit: int
    stop: int
    alert: int = 0

    @property
    def key(self) -> Key:
        """What tells it from others in the tables."""
        return self.scope, self.period


class Used(NamedTuple):
    """What a window has used, in 1e-6 US dollars; `reserved` is of reservations that are alive."""

    spent: int = 0
    reserved: int = 0

    @property
    def total(self) -> int:
        return self.spent + self.reserved


class Wish(NamedTuple):
    """A reservation that is asked for, of more than 0."""

    windows: tuple[Window, ...]
    amount: int


class Settlement(NamedTuple):
    """The end of a reservation of `reserved`: `spent` was paid in truth."""

    windows: tuple[Window, ...]
    reserved: int
    spent: int


class Refusal(NamedTuple):
    """Why a wish was not granted: this window, which has used so much."""

    window: Window
    used: Used


@dataclass(slots=True)
class _Own:
    """The row of this holder: the truth, of which the table has a copy."""

    window: Window
    spent: int = 0
    reserved: int = 0


class Ledger:
    """Blocking; for one thread. Every method that reaches the database raises Unavailable where it cannot.

    `clock` gives milliseconds since 1970; without one it is this machine's, set by the database's where that is PostgreSQL, so that servers
    agree on what has expired.
    """

    def __init__(self, registry: Registry, *, lease_s: float, clock: Callable[[], int] | None = None) -> None:
        self.holder = secrets.token_hex(8)
        self._registry = registry
        self._lease_ms = int(lease_s * 1000)
        self._clock = clock
        self._skew_ms = 0
        self._connection: Any = None
        self._mark = "?"
        self._own: dict[Key, _Own] = {}
        self._others: dict[Key, Used] = {}
        self._unwritten: set[Key] = set()

    def now(self) -> int:
        """Milliseconds since 1970; from any thread."""
        return self._clock() if self._clock is not None else time.time_ns() // 1_000_000 + self._skew_ms

    def seen(self, key: Key) -> Used:
        """What a window has used as far as is known without asking: others as of the last look, this holder exactly. From any thread."""
        own, others = self._own.get(key), self._others.get(key, Used())
        return Used(others.spent + own.spent, others.reserved + own.reserved) if own is not None else others

    def exchange(self, settlements: Iterable[Settlement], wishes: Sequence[Wish]) -> list[Refusal | None]:
        """Settles, then reserves, in one transaction; one entry a wish, None where it was granted.

        Settlements count at once and are written, if not now, with the next transaction that succeeds: they must not be handed in again.
        """
        for settlement in settlements:
            for window in settlement.windows:
                own = self._row(window)
                own.spent += settlement.spent
                own.reserved -= settlement.reserved
                self._unwritten.add(window.key)
        if not wishes and not self._unwritten:
            return []
        groups: dict[tuple[Window, ...], list[int]] = {}
        for index, wish in enumerate(wishes):
            groups.setdefault(wish.windows, []).append(index)
        refusals: list[Refusal | None] = [None] * len(wishes)
        granted: list[tuple[tuple[Window, ...], int]] = []
        now = self.now()
        try:
            with self._transaction() as cursor:
                for windows, members in groups.items():
                    amounts = [wishes[index].amount for index in members]
                    for index, refusal in zip(members, self._reserve(cursor, windows, amounts, now, granted), strict=True):
                        refusals[index] = refusal
                # A reservation has written its rows with what was settled in them.
                self._write(cursor, self._unwritten.difference(window.key for windows, _ in granted for window in windows), now)
        except BaseException:
            for windows, amount in granted:
                for window in windows:
                    self._own[window.key].reserved -= amount
                    self._unwritten.add(window.key)  # the transaction may have been kept all the same
            raise
        self._unwritten.clear()
        return refusals

    def renew(self) -> None:
        """Keeps this holder's rows alive: call it thrice a lease, at least, while anything is reserved."""
        now = self.now()
        self._unwritten.update(key for key, own in self._own.items() if own.reserved or own.window.ends_ms > now)
        self.exchange((), ())

    def look(self, windows: Iterable[Window]) -> None:
        """Brings `seen` up to date for these windows."""
        now, wanted = self.now(), list(windows)
        with self._reading() as cursor:
            for start in range(0, len(wanted), _MANY):
                self._look(cursor, wanted[start : start + _MANY], now)
        self._forget(now, {window.key for window in wanted})

    def scopes(self, periods: Sequence[str], prefix: str) -> list[str]:
        """Scopes that begin with `prefix` and were used in these periods."""
        marks = ", ".join("?" * len(periods))
        with self._reading() as cursor:
            statement = f"SELECT DISTINCT scope FROM budget_windows WHERE period IN ({marks}) AND scope LIKE ? ORDER BY scope"
            self._execute(cursor, statement, [*periods, prefix + "%"])
            return [row[0] for row in cursor.fetchall()]

    def claim_alert(self, window: Window, level: str) -> bool:
        """True for one caller alone over all servers: that one gives the alert."""
        statement = "INSERT INTO budget_alerts (scope, period, level, create_ms) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING RETURNING level"
        with self._transaction() as cursor:
            self._execute(cursor, statement, [*window.key, level, self.now()])
            return bool(cursor.fetchall())

    def tidy(self) -> None:
        """Sums up the rows of holders that are long gone, and deletes windows that ended over a year ago."""
        now = self.now()
        gone = "holder NOT IN ('', ?) AND expires_ms < ?"
        who = [self.holder, now - _GONE_MS - self._lease_ms]
        with self._transaction() as cursor:
            self._execute(cursor, "DELETE FROM budget_windows WHERE ends_ms < ?", [now - _KEEP_MS])
            self._execute(cursor, "DELETE FROM budget_alerts WHERE create_ms < ?", [now - _KEEP_MS])
            self._execute(cursor, _SUM_UP.format(gone=gone), who)
            self._execute(cursor, f"DELETE FROM budget_windows WHERE {gone}", who)

    def close(self) -> None:
        """Closes the connection; what is reserved expires by itself."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.close()

    def _row(self, window: Window) -> _Own:
        own = self._own.get(window.key)
        if own is None:
            own = self._own[window.key] = _Own(window)
        return own

    def _write(self, cursor: Any, unwritten: Iterable[Key], now: int) -> None:
        keys = list(unwritten)
        for start in range(0, len(keys), _MANY):
            values: list[object] = []
            for key in keys[start : start + _MANY]:
                own = self._own[key]
                values += [*key, self.holder, own.window.ends_ms, own.spent, own.reserved, now + self._lease_ms]
            self._execute(cursor, _write_statement(len(keys[start : start + _MANY])), values)

    def _reserve(
        self,
        cursor: Any,
        windows: tuple[Window, ...],
        amounts: Sequence[int],
        now: int,
        granted: list[tuple[tuple[Window, ...], int]],
    ) -> list[Refusal | None]:
        """Grants what fits in the order of asking: all together if possible, else those that fit, found by looking."""
        if self._try(cursor, windows, amounts, now, granted):
            return [None] * len(amounts)
        self._look(cursor, windows, now)
        used = [self.seen(window.key) for window in windows]
        refusals: list[Refusal | None] = []
        fitting: list[int] = []
        taken = 0
        for amount in amounts:
            full = [
                Refusal(window, Used(one.spent, one.reserved + taken))
                for window, one in zip(windows, used, strict=True)
                if one.total + taken >= window.stop or one.total + taken + amount > window.limit
            ]
            refusals.append(max(full, key=lambda one: one.window.ends_ms) if full else None)
            if not full:
                fitting.append(amount)
                taken += amount
        if fitting:
            fits = self._try(cursor, windows, fitting, now, granted)
            assert fits, "nobody else writes during the transaction"
        return refusals

    def _try(
        self,
        cursor: Any,
        windows: tuple[Window, ...],
        amounts: Sequence[int],
        now: int,
        granted: list[tuple[tuple[Window, ...], int]],
    ) -> bool:
        """Reserves the sum in every window, or nothing. One after the other would do the same."""
        total = sum(amounts)
        values: list[object] = []
        for window in windows:
            own = self._row(window)
            values += [window.scope, window.period, window.ends_ms, own.spent, own.reserved + total, window.limit, window.stop]
        values += [self.holder, now + self._lease_ms, now, self.holder, amounts[-1]]
        self._execute(cursor, _reserve_statement(len(windows)), values)
        if not cursor.fetchall():
            return False
        for window in windows:
            self._own[window.key].reserved += total
        granted.append((windows, total))
        return True

    def _look(self, cursor: Any, windows: Sequence[Window], now: int) -> None:
        values = [now, self.holder, *(part for window in windows for part in window.key)]
        self._execute(cursor, _look_statement(len(windows)), values)
        found = {(scope, period): Used(int(spent), int(reserved)) for scope, period, spent, reserved in cursor.fetchall()}
        for window in windows:
            self._others[window.key] = found.get(window.key, Used())

    def _forget(self, now: int, wanted: set[Key]) -> None:
        """Drops this holder's rows of windows that ended a day ago, and what is known of others' that nobody looks at."""
        for key in [key for key, own in self._own.items() if not own.reserved and own.window.ends_ms < now - _GONE_MS]:
            if key not in self._unwritten:
                del self._own[key]
        for key in [key for key in self._others if key not in wanted and key not in self._own]:
            del self._others[key]

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        """A cursor while nobody else writes to the ledger; kept at the end, dropped with the connection after an error."""
        with self._reading() as cursor:
            if self._mark == "?":
                cursor.execute("BEGIN IMMEDIATE")
            else:
                cursor.execute(f"BEGIN ISOLATION LEVEL READ COMMITTED; SELECT pg_advisory_xact_lock({_LOCK})", prepare=False)
            yield cursor
            cursor.execute("COMMIT")

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        """A cursor outside of transactions. The driver's errors become Unavailable, and the next use opens another connection."""
        dialect = self._registry.engine().dialect
        driver: Any = dialect.loaded_dbapi
        try:
            if self._connection is None:
                self._connect(dialect.name)
            cursor = self._connection.cursor()
            try:
                yield cursor
            finally:
                cursor.close()
        except driver.Error as error:
            self.close()
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            message = f"The budget's database does not answer: {said}. Look at registry.url and at the database."
            raise Unavailable(message, retry_after_s=1.0) from None
        except BaseException:
            self.close()
            raise

    def _connect(self, dialect: str) -> None:
        """The driver's own connection: SQLAlchemy's statements would cost more than the database's work."""
        from sqlalchemy.exc import DBAPIError

        try:
            pooled = self._registry.engine().raw_connection()
        except DBAPIError as error:
            assert error.orig is not None
            raise error.orig from None
        connection: Any = pooled.driver_connection
        pooled.detach()
        if dialect == "sqlite":
            connection.isolation_level = None
        else:
            connection.autocommit = True
            # Nobody waits for the disk: after a crash of the database's machine, holders that live write their rows again.
            connection.execute("SET synchronous_commit TO off")
            # Nor for ever for a holder that was stopped with the lock in its hand: the database takes it away.
            connection.execute(f"SET idle_in_transaction_session_timeout TO {_PATIENCE_MS // 2}")
            connection.execute(f"SET statement_timeout TO {_PATIENCE_MS}")
            self._mark = "%s"
            if self._clock is None:
                self._skew_ms = _skew_ms(connection)
        self._connection = connection
        self._unwritten.update(self._own)

    def _execute(self, cursor: Any, statement: str, values: Sequence[object]) -> None:
        cursor.execute(statement if self._mark == "?" else statement.replace("?", self._mark), values)


def _skew_ms(connection: Any) -> int:
    """How far the database's clock is ahead of this machine's."""
    before = time.time_ns()
    row = connection.execute("SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)").fetchone()
    return int(row[0]) - (before + time.time_ns()) // 2_000_000


_BIG = "CAST(? AS BIGINT)"
_SET = """ON CONFLICT (scope, period, holder)
DO UPDATE SET spent = excluded.spent, reserved = excluded.reserved, expires_ms = excluded.expires_ms"""
_SUM_UP = """INSERT INTO budget_windows (scope, period, holder, ends_ms, spent, reserved, expires_ms)
SELECT scope, period, '', MAX(ends_ms), SUM(spent), 0, 0 FROM budget_windows WHERE {gone} GROUP BY scope, period
ON CONFLICT (scope, period, holder) DO UPDATE SET spent = budget_windows.spent + excluded.spent"""


@cache
def _write_statement(rows: int) -> str:
    """Sets this holder's rows to what they are."""
    values = ", ".join(["(?, ?, ?, ?, ?, ?, ?)"] * rows)
    return f"INSERT INTO budget_windows (scope, period, holder, ends_ms, spent, reserved, expires_ms) VALUES {values} {_SET}"


@cache
def _reserve_statement(windows: int) -> str:
    """The same, of all windows or of none: none where one has used its stop before the last amount, or would pass its limit with it.

    Returns a row a window where it was granted.
    """
    values = ", ".join([f"(CAST(? AS VARCHAR), CAST(? AS VARCHAR), {_BIG}, {_BIG}, {_BIG}, {_BIG}, {_BIG})"] * windows)
    return f"""INSERT INTO budget_windows (scope, period, holder, ends_ms, spent, reserved, expires_ms)
WITH mine (scope, period, ends_ms, spent, reserved, most, stop) AS (VALUES {values})
SELECT scope, period, CAST(? AS VARCHAR), ends_ms, spent, reserved, {_BIG} FROM mine WHERE NOT EXISTS (
    SELECT 1 FROM (
        SELECT most, stop, mine.spent + mine.reserved + (
            SELECT COALESCE(SUM(w.spent + CASE WHEN w.expires_ms > {_BIG} THEN w.reserved ELSE 0 END), 0) FROM budget_windows AS w
            WHERE w.scope = mine.scope AND w.period = mine.period AND w.holder <> ?
        ) AS used FROM mine
    ) AS full_ones WHERE used > most OR used - {_BIG} >= stop
)
{_SET}
RETURNING scope"""


@cache
def _look_statement(windows: int) -> str:
    """What the other holders spent, and what of theirs is reserved and alive."""
    keys = ", ".join(["(?, ?)"] * windows)
    return f"""SELECT scope, period, SUM(spent), SUM(CASE WHEN expires_ms > ? THEN reserved ELSE 0 END) FROM budget_windows
WHERE holder <> ? AND (scope, period) IN (VALUES {keys}) GROUP BY scope, period"""
