"""Timelines and pages out of a large lake: right by a count of the same rows in plain Python, in bounded memory, reading little of it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from server.config import Config, load_config
from server.lake import maintenance, schema, table
from server.lake.browsing import Browser, Mark, Wanted
from server.lake.ids import IdKey
from server.lake.place import Place
from server.lake.scanning import Scan
from server.lake.schema import FEEDBACK, INTERACTIONS, SHADOWS
from server.lake.timeline import Span, Timeline
from server.registry.keys import UserKeys
from server.registry.registry import Registry

END = datetime(2026, 6, 10, 12, tzinfo=UTC)
ROWS, DAYS = 120_000, 4
SEED = 7


def nothing() -> None:
    """A reader that is never stopped."""


def config_of(folder: Path) -> Config:
    flags = {"lake.path": str(folder / "lake"), "registry.url": f"sqlite:///{folder}/registry.db"}
    return load_config(environ={}, flags=flags)


def write(lake: Path, name: str, rows: list[dict[str, Any]]) -> None:
    from deltalake import write_deltalake

    whole = [schema.to_row(name, row) for row in rows]
    data = pa.Table.from_pylist(whole, schema=schema.arrow_schema(name))
    write_deltalake(str(lake / name), data, mode="append", partition_by=["date"])


def item(number: int, chance: random.Random) -> dict[str, Any]:
    who = chance.choices(["local", "provider", "nobody"], [6, 3, 1])[0]
    return {
        "time_ns": int((END - timedelta(days=DAYS) * (number + 0.5) / ROWS).timestamp() * 1e6) * 1000,
        "interaction_id": f"i{number:06d}",
        "skill": chance.choice(["a", "b"]),
        "local": who == "local",
        "error": "PROVIDER_UNAVAILABLE" if who == "nobody" else None,
        "cost_micro_usd": chance.randrange(50, 150) if who == "provider" else 0,
        "quality": chance.random() if who == "local" else None,
        "total_ms": 10.0 if who == "local" else 1000.0,
        "input": "Where is my card? " * 8,
        "user_hash": f"{number % 500:032x}",
    }


class Filled:
    """A lake with its rows as they were written, newest first."""

    def __init__(self, folder: Path) -> None:
        self.config = config_of(folder)
        self.lake = folder / "lake"
        chance = random.Random(SEED)
        self.rows = [item(number, chance) for number in range(ROWS)]
        for begin in range(0, ROWS, 30_000):
            write(self.lake, INTERACTIONS, self.rows[begin : begin + 30_000])
        maintenance.compact(Place.at(self.lake), INTERACTIONS)  # one large file a day


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    return Filled(tmp_path_factory.mktemp("large"))


@pytest.fixture
def registry(filled: Filled) -> Iterator[Registry]:
    made = Registry(filled.config.registry)
    yield made
    made.close()


def delivered(rows: list[dict[str, Any]]) -> list[float]:
    return sorted(row["total_ms"] for row in rows if row["error"] is None)


def test_a_timeline_counts_what_plain_python_counts(filled: Filled) -> None:
    span = Span(END - timedelta(days=2), END, 3600)
    began = time.perf_counter()
    points = Timeline(Place.at(filled.lake), span, "a", nothing).points()
    took = time.perf_counter() - began
    assert took < 10, "60,000 rows of some columns"
    since = span.since.timestamp() * 1e9
    mine = [row for row in filled.rows if row["skill"] == "a" and row["time_ns"] >= since]
    assert len(points) == 48 and sum(one.requests for one in points) == len(mine) > 20_000
    for one in points[::7]:
        begin = one.time.timestamp() * 1e9
        rows = [row for row in mine if begin <= row["time_ns"] < begin + 3600e9]
        assert one.requests == len(rows) and one.local == sum(row["local"] for row in rows)
        assert one.failed == sum(row["error"] is not None for row in rows)
        assert one.cost_micro_usd == sum(row["cost_micro_usd"] for row in rows)
        known = [row["quality"] for row in rows if row["quality"] is not None]
        assert one.quality == pytest.approx(sum(known) / len(known))
        assert one.latency_p50_s == pytest.approx(delivered(rows)[len(delivered(rows)) // 2] / 1e3, rel=0.03)
        assert one.latency_p95_s == pytest.approx(1.0, rel=0.03)
        prices = [row["cost_micro_usd"] for row in rows if not row["local"] and row["error"] is None]
        assert one.saved_micro_usd == pytest.approx(one.local * sum(prices) / len(prices), rel=0.15), "by the answers of late"


def test_both_skills_together_are_the_sum_of_each(filled: Filled) -> None:
    span, place = Span(END - timedelta(days=DAYS), END, 86_400), Place.at(filled.lake)
    both, a, b = (Timeline(place, span, skill, nothing).points() for skill in ("", "a", "b"))
    assert [one.time.hour for one in both] == [0] * len(both), "days begin at midnight, UTC"
    for name in ("requests", "local", "failed", "cost_micro_usd"):
        assert [getattr(one, name) for one in both] == [getattr(x, name) + getattr(y, name) for x, y in zip(a, b, strict=True)]
    assert sum(one.requests for one in both) == ROWS


def test_pages_go_through_everything_once_newest_first_and_new_rows_move_nothing(filled: Filled, registry: Registry) -> None:
    browser = Browser(filled.config, registry)
    wanted = Wanted(END - timedelta(hours=1), END + timedelta(days=1), "b", "local", max_quality=0.3)
    since = wanted.since.timestamp() * 1e9
    right = [
        row["interaction_id"]
        for row in filled.rows
        if row["time_ns"] >= since and row["skill"] == "b" and row["local"] and row["quality"] <= 0.3
    ]
    assert len(right) > 50
    seen: list[str] = []
    after: Mark | None = None
    while True:
        page = browser.page(wanted, 20, after, nothing)
        seen += [one.interaction["interaction_id"] for one in page]
        assert all(one.interaction["input"].startswith("Where is my card?") for one in page)
        if len(page) < 20:
            break
        if after is None:  # between two pages, as a server would add them
            late = {**filled.rows[0], "skill": "b", "local": True, "error": None, "quality": 0.1}
            write(filled.lake, INTERACTIONS, [{**late, "interaction_id": f"late{n}", "time_ns": late["time_ns"] + 10**9} for n in range(7)])
        after = page[-1].mark
    assert seen == right
    again = browser.page(wanted, 20, None, nothing)
    assert [one.interaction["interaction_id"] for one in again] == [*(f"late{n}" for n in range(6, -1, -1)), *right[:13]]


def test_a_page_opens_the_newest_row_groups_only(filled: Filled, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    whole = Scan.read

    def counted(scan: Scan, piece: Any, names: Any, where: Any) -> Iterator[pa.Table]:
        read.append(piece.count_rows())
        yield from whole(scan, piece, names, where)

    monkeypatch.setattr(Scan, "read", counted)
    began = time.perf_counter()
    page = Browser(filled.config, registry).page(Wanted(END - timedelta(days=DAYS), END + timedelta(days=1)), 50, None, nothing)
    assert len(page) == 50 and time.perf_counter() - began < 5
    assert sum(read) <= 3 * maintenance.ROW_GROUP <= ROWS / 2, "one for the order, one for the columns, and files of few rows"


def test_a_reader_stops_where_it_is_told_to(filled: Filled) -> None:
    checks = 0

    def stop() -> None:
        nonlocal checks
        checks += 1
        if checks > 2:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        Timeline(Place.at(filled.lake), Span(END - timedelta(days=DAYS), END, 86_400), "", stop).points()
    assert checks == 3


def small(tmp_path: Path, rows: list[dict[str, Any]], shadows: list[dict[str, Any]], feedback: list[dict[str, Any]]) -> Place:
    for name, part in ((INTERACTIONS, rows), (SHADOWS, shadows), (FEEDBACK, feedback)):
        write(tmp_path / "lake", name, part)
    return Place.at(tmp_path / "lake")


def at(minute: float) -> int:
    return int((END + timedelta(minutes=minute)).timestamp()) * 10**9


def row(key: str, minute: float, *, local: bool, cost: int = 0, **more: Any) -> dict[str, Any]:
    base = {"time_ns": at(minute), "interaction_id": key, "skill": "s", "local": local, "cost_micro_usd": cost, "total_ms": 5.0}
    return {**base, "quality": None, "error": None, **more}


def test_shadows_feedback_and_savings(tmp_path: Path) -> None:
    said = [
        ("x", 1, {"rating": 1}),
        ("x", 2, {"thumb": "up"}),
        ("y", 3, {"rating": 2}),
        ("y", 4, {"rating": 3}),
        ("other", 5, {"rating": 5}),
    ]
    place = small(
        tmp_path,
        [row("w", -600, local=False, cost=500), row("x", 0, local=True), row("y", 0, local=True), row("z", 10, local=True)],
        [
            {"time_ns": at(1), "interaction_id": "x", "skill": "s", "role": "teacher", "cost_micro_usd": 300},
            {"time_ns": at(11), "interaction_id": "z", "skill": "s", "role": "student", "cost_micro_usd": 0},
            {"time_ns": at(12), "interaction_id": "z", "skill": "s", "role": "teacher", "cost_micro_usd": 7, "error": "TIMEOUT"},
        ],
        [{"time_ns": at(minute), "interaction_id": key, "feedback_id": f"f{minute}", **more} for key, minute, more in said],
    )
    points = Timeline(place, Span(END, END + timedelta(hours=1), 60), "s", nothing).points()
    assert [one.time for one in points] == [END, END + timedelta(minutes=10)]
    assert [one.cost_micro_usd for one in points] == [300, 7], "what came a minute later belongs to the request before"
    assert [one.saved_micro_usd for one in points] == [600, 300], "the teacher's answer for comparison says what one costs"
    assert [(one.liked, one.disliked) for one in points] == [(1, 1), (0, 0)], "the last verdict of each, and three stars are none"
    alone = Timeline(place, Span(END + timedelta(minutes=5), END + timedelta(hours=1), 60), "s", nothing).points()
    assert [one.saved_micro_usd for one in alone] == [400], "nothing in that time says what one costs: the mean of the days before"


def test_an_empty_lake_has_no_points_and_no_pages(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    registry = Registry(config.registry)
    try:
        assert Timeline(Place.of(config.lake), Span(END - timedelta(days=1), END, 60), "", nothing).points() == []
        browser = Browser(config, registry)
        assert browser.page(Wanted(END, END + timedelta(days=1)), 5, None, nothing) == []
        assert browser.page(Wanted(END, END + timedelta(days=1), with_feedback=True), 5, None, nothing) == []
        assert browser.one(IdKey.open(tmp_path / "lake" / "id.key").new(), nothing) is None
    finally:
        registry.close()


def test_pages_join_what_came_later_and_leave_erased_users_out(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    now = time.time_ns()
    shadow = {"interaction_id": "b", "skill": "s", "role": "teacher", "label": "card", "training_allowed": True, "source_model": "m"}
    rows = [
        {**row(key, 0, local=True, user_hash=user), "time_ns": now + n} for n, (key, user) in enumerate([("a", "u"), ("b", "v"), ("c", "")])
    ]
    small(
        tmp_path,
        rows,
        [{"time_ns": now + 10**9, **shadow}],
        [{"time_ns": now + n * 10**9, "interaction_id": "b", "feedback_id": f"f{n}", "rating": n} for n in (2, 1, 2)],
    )
    registry = Registry(config.registry)
    try:
        UserKeys(registry).erase("u")
        browser = Browser(config, registry)
        wanted = Wanted(datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(hours=1))
        page = browser.page(wanted, 10, None, nothing)
        assert [one.interaction["interaction_id"] for one in page] == ["c", "b"]
        assert page[1].interaction["teacher_label"] == "card" and page[1].interaction["training_allowed"]
        assert [one["rating"] for one in page[1].feedback] == [1, 2], "once each, the oldest first"
        only = browser.page(Wanted(wanted.since, wanted.until, with_feedback=True), 10, None, nothing)
        assert [one.interaction["interaction_id"] for one in only] == ["b"]
        assert json.dumps(only[0].interaction, default=str)
    finally:
        registry.close()


def test_older_tables_without_a_column_read_as_null(tmp_path: Path) -> None:
    from deltalake import write_deltalake

    data = pa.Table.from_pylist([schema.to_row(INTERACTIONS, row("a", 0, local=True))], schema=schema.arrow_schema(INTERACTIONS))
    write_deltalake(str(tmp_path / "lake" / INTERACTIONS), data.drop_columns(["quality", "tenant"]), partition_by=["date"])
    (point,) = Timeline(Place.at(tmp_path / "lake"), Span(END, END + timedelta(hours=1), 60), "", nothing).points()
    assert point.requests == 1 and point.quality is None
    assert table.count(tmp_path / "lake", INTERACTIONS) == 1
