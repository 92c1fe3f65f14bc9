"""The ledger of budgets: nothing is promised twice, whoever asks, dies, or loses the database meanwhile."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import Unavailable
from server.registry import budgets
from server.registry.budgets import Ledger, Settlement, Used, Window, Wish
from server.registry.registry import Registry
from server.settings import RegistryConfig

LEASE_S = 120.0
DAY_MS = 86_400_000
START_MS = 1_795_000_000_000


class Clock:
    def __init__(self) -> None:
        self.ms = START_MS

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def registry(registry_url: str) -> Iterator[Registry]:
    opened = Registry(RegistryConfig(url=registry_url))
    yield opened
    opened.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(registry: Registry, clock: Clock) -> Iterator[Callable[[], Ledger]]:
    """Makes holders, as many server processes would."""
    made: list[Ledger] = []

    def one() -> Ledger:
        made.append(Ledger(registry, lease_s=LEASE_S, clock=clock))
        return made[-1]

    yield one
    for ledger in made:
        ledger.close()


def window(limit: int, *, name: str = "", kind: str = "day", stop: int | None = None) -> Window:
    """Of a scope that no other test has."""
    period = "2026-11-21" if kind == "day" else "2026-11"
    return Window(f"skill:{name or secrets.token_hex(6)}", kind, period, START_MS + DAY_MS, limit, limit if stop is None else stop)


def granted(ledger: Ledger, windows: tuple[Window, ...], *amounts: int) -> list[bool]:
    return [refusal is None for refusal in ledger.exchange((), [Wish(windows, amount) for amount in amounts])]


def used(ledger: Ledger, one: Window) -> Used:
    ledger.look([one])
    return ledger.seen(one.key)


def test_a_reservation_takes_all_its_windows_or_none(make: Callable[[], Ledger]) -> None:
    ledger = make()
    wide, narrow = window(1000), window(100)
    assert granted(ledger, (wide, narrow), 60) == [True]
    (refusal,) = ledger.exchange((), [Wish((wide, narrow), 60)])
    assert refusal is not None and refusal.window == narrow and refusal.used == Used(0, 60)
    assert [used(make(), one) for one in (wide, narrow)] == [Used(0, 60), Used(0, 60)], "as another server sees it"


def test_holders_see_each_other_at_once(make: Callable[[], Ledger]) -> None:
    first, second, one = make(), make(), (window(100),)
    assert granted(first, one, 60) == [True]
    assert granted(second, one, 60) == [False]
    first.exchange([Settlement(one, 60, 10)], ())
    assert granted(second, one, 60) == [True]
    assert used(first, one[0]) == Used(10, 60)


def test_what_fits_is_granted_in_the_order_of_asking(make: Callable[[], Ledger]) -> None:
    ledger, one = make(), (window(100),)
    assert granted(ledger, one, 50, 60, 40, 20, 10) == [True, False, True, False, True]
    assert used(make(), one[0]) == Used(0, 100)


def test_nothing_begins_from_the_stop_on(make: Callable[[], Ledger]) -> None:
    ledger, one = make(), (window(700, stop=665),)
    assert granted(ledger, one, *[7] * 120).count(True) == 95
    assert granted(ledger, one, 1) == [False]
    assert granted(make(), (window(700, stop=665),), 664, 36, 1) == [True, True, False], "one that begins before the stop may end beyond it"
    assert granted(ledger, (window(0),), 1) == [False]


def test_reservations_of_the_dead_expire_and_late_settlements_count(make: Callable[[], Ledger], clock: Clock) -> None:
    dead, alive, one = make(), make(), (window(100),)
    assert granted(dead, one, 90) == [True]
    clock.ms += int(LEASE_S * 1000) - 1
    assert granted(alive, one, 90) == [False]
    clock.ms += 1
    assert granted(alive, one, 90) == [True]
    dead.exchange([Settlement(one, 90, 80)], ())  # it only slept
    assert used(alive, one[0]) == Used(80, 90)
    assert granted(alive, one, 1) == [False]


def test_who_renews_keeps_what_it_holds(make: Callable[[], Ledger], clock: Clock) -> None:
    holder, other, one = make(), make(), (window(100),)
    assert granted(holder, one, 90) == [True]
    for _ in range(6):
        clock.ms += int(LEASE_S * 400)
        holder.renew()
    assert granted(other, one, 90) == [False]


def test_a_lost_connection_loses_and_doubles_nothing(make: Callable[[], Ledger]) -> None:
    ledger, one = make(), (window(100),)
    assert granted(ledger, one, 60) == [True]
    assert ledger._connection is not None
    ledger._connection.close()
    with pytest.raises(Unavailable):
        ledger.exchange([Settlement(one, 60, 30)], [Wish(one, 50)])
    assert ledger.exchange((), ()) == [], "the settlement is written with the next transaction"
    assert used(make(), one[0]) == Used(30, 0)
    assert granted(ledger, one, 70) == [True]


def test_a_transaction_whose_end_is_unknown_is_written_again(make: Callable[[], Ledger], monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, one = make(), (window(100),)
    real = ledger._transaction

    def cut() -> object:
        from contextlib import contextmanager

        @contextmanager
        def kept_but_not_told() -> Iterator[object]:
            with real() as cursor:
                yield cursor
            raise Unavailable("the line broke after COMMIT")

        return kept_but_not_told()

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_transaction", cut)
        with pytest.raises(Unavailable):
            ledger.exchange((), [Wish(one, 80)])
    assert used(make(), one[0]) == Used(0, 80), "the table believes in the reservation"
    ledger.exchange((), ())
    assert used(make(), one[0]) == Used(0, 0)


def test_a_stopped_holder_of_the_lock_stops_nobody_for_ever(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP between BEGIN and COMMIT: the others are told soon, and the database takes the lock away."""
    monkeypatch.setattr(budgets, "_PATIENCE_MS", 600)
    registry = Registry(RegistryConfig(url=postgres))
    stopped, waiting = (Ledger(registry, lease_s=LEASE_S, clock=Clock()) for _ in range(2))
    one = (window(100),)
    assert granted(stopped, one, 10) == [True]
    with pytest.raises(Unavailable), stopped._transaction() as cursor:
        began = time.monotonic()
        assert granted(waiting, one, 80) == [True]
        assert time.monotonic() - began < 5
        cursor.execute("SELECT 1")
    assert granted(stopped, one, 10) == [True]
    for ledger in (stopped, waiting):
        ledger.close()
    registry.close()


def test_one_caller_alone_gives_an_alert(make: Callable[[], Ledger]) -> None:
    one = window(100)
    assert [make().claim_alert(one, "alert") for _ in range(3)] == [True, False, False]
    assert make().claim_alert(one, "stopped")


def test_rows_of_holders_that_are_gone_are_summed_up(make: Callable[[], Ledger], clock: Clock) -> None:
    month = Window(f"skill:{secrets.token_hex(6)}", "month", "2026-11", START_MS + 20 * DAY_MS, 1000, 950)
    for _ in range(3):
        gone = make()
        gone.exchange((), [Wish((month,), 10)])
        gone.exchange([Settlement((month,), 10, 7)], ())
    clock.ms += 2 * DAY_MS
    alive = make()
    alive.exchange((), [Wish((month,), 5)])
    for _ in range(2):
        make().tidy()
    assert used(make(), month) == Used(21, 5)
    with alive._reading() as cursor:
        alive._execute(cursor, "SELECT holder FROM budget_windows WHERE scope = ? ORDER BY holder", [month.scope])
        assert [row[0] for row in cursor.fetchall()] == ["", alive.holder]
    clock.ms += 500 * DAY_MS
    make().tidy()
    assert used(make(), month) == Used(0, 0)


def test_a_killed_process_leaves_nothing_behind(registry: Registry, registry_url: str, make: Callable[[], Ledger], clock: Clock) -> None:
    one = window(100)
    script = f"""
import sys, time
from server.registry.budgets import Ledger, Window, Wish
from server.registry.registry import Registry
from server.settings import RegistryConfig
ledger = Ledger(Registry(RegistryConfig(url={registry_url!r})), lease_s={LEASE_S}, clock=lambda: {clock.ms})
window = Window({one.scope!r}, "day", {one.period!r}, {one.ends_ms}, 100, 100)
assert ledger.exchange((), [Wish((window,), 80)]) == [None]
print("held", flush=True)
sys.stdin.read()
"""
    root = Path(__file__).resolve().parents[2]
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    ledger = make()
    assert granted(ledger, (one,), 80) == [False]
    clock.ms += int(LEASE_S * 1000)
    assert granted(ledger, (one,), 80) == [True]


STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),  # the holder
        st.lists(st.tuples(st.booleans(), st.integers(1, 60)), max_size=5),  # wishes: of both windows or of the second, the amount
        st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), max_size=3),  # settlements: which, the share that was paid
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def file_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    opened = Registry(RegistryConfig(url=f"sqlite:///{tmp_path_factory.mktemp('ledger')}/registry.db"))
    yield opened
    opened.close()


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, limit=st.integers(0, 200), share=st.integers(50, 100))
def test_never_over_and_never_less_than_what_fits(
    file_registry: Registry, steps: list[tuple[int, list[tuple[bool, int]], list[tuple[int, float]]]], limit: int, share: int
) -> None:
    """Three holders against a model that adds up in one place."""
    holders = [Ledger(file_registry, lease_s=LEASE_S, clock=Clock()) for _ in range(3)]
    windows = (window(limit, stop=limit * share // 100), window(300))
    spent, open_ = [0, 0], list[tuple[int, tuple[Window, ...], int]]()
    for who, wishes, settled in steps:
        settlements = []
        for index, part in settled:
            mine = [one for one in open_ if one[0] == who]
            if mine:
                chosen = mine[index % len(mine)]
                open_.remove(chosen)
                paid = int(chosen[2] * part)
                settlements.append(Settlement(chosen[1], chosen[2], paid))
                for place, one in enumerate(windows):
                    spent[place] += paid if one in chosen[1] else 0
        asked = [Wish(windows if both else windows[1:], amount) for both, amount in wishes]
        grouped = sorted(range(len(asked)), key=lambda index: [wish.windows for wish in asked].index(asked[index].windows))
        answers = holders[who].exchange(settlements, asked)
        for index in grouped:
            wish = asked[index]
            total = [spent[place] + sum(o[2] for o in open_ if windows[place] in o[1]) for place in (0, 1)]
            fits = all(
                total[place] < one.stop and total[place] + wish.amount <= one.limit
                for place, one in enumerate(windows)
                if one in wish.windows
            )
            assert (answers[index] is None) == fits
            if fits:
                open_.append((who, wish.windows, wish.amount))
    for place, one in enumerate(windows):
        held = sum(o[2] for o in open_ if one in o[1])
        assert spent[place] + held <= one.limit
        assert {used(holder, one) for holder in holders} == {Used(spent[place], held)}
    for holder in holders:
        holder.close()
