"""Schedules' words, and the times that follow from them, by integers: no clock of the machine is asked."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidArgument
from server.registry.schedules import When, parse

OSLO = ZoneInfo("Europe/Oslo")


def ms(text: str, zone: ZoneInfo | None = None) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=zone or UTC).timestamp()) * 1000


@pytest.mark.parametrize(
    ("words", "after", "due"),
    [
        ("daily at 02:30", "2026-11-28T02:29:59", "2026-11-28T02:30:00"),
        ("daily at 02:30", "2026-11-28T02:30:00", "2026-11-29T02:30:00"),
        ("Daily  at 2:30", "2026-12-31T23:00:00", "2027-01-01T02:30:00"),
        ("weekly", "2026-11-28T12:00:00", "2026-11-30T02:30:00"),
        ("weekly on sunday at 04:00", "2026-11-28T12:00:00", "2026-11-29T04:00:00"),
        ("weekly on sunday at 04:00", "2026-11-29T04:00:00", "2026-12-06T04:00:00"),
        ("30 2 * * 1-5", "2026-11-28T12:00:00", "2026-11-30T02:30:00"),
        ("0 0 29 2 *", "2026-11-28T12:00:00", "2028-02-29T00:00:00"),
        ("*/15 * * * *", "2026-11-28T12:01:00", "2026-11-28T12:15:00"),
    ],
)
def test_the_next_time(words: str, after: str, due: str) -> None:
    assert parse(words).next_ms(ms(after), UTC) == ms(due)


def test_times_are_local_ones_and_clocks_that_change_skip_and_repeat_none() -> None:
    when = parse("daily at 02:30")
    assert when.next_ms(ms("2026-07-01T12:00:00"), OSLO) == ms("2026-07-02T00:30:00")
    # 29 March 2026: 02:00 becomes 03:00, and 02:30 is not there; 25 October: 03:00 becomes 02:00, and 02:30 is there twice.
    spring = when.next_ms(ms("2026-03-28T12:00:00"), OSLO)
    assert spring == ms("2026-03-29T01:30:00"), "as far after the gap"
    assert spring is not None and when.next_ms(spring, OSLO) == ms("2026-03-30T00:30:00")
    autumn = when.next_ms(ms("2026-10-24T12:00:00"), OSLO)
    assert autumn == ms("2026-10-25T00:30:00")
    assert autumn is not None and when.next_ms(autumn, OSLO) == ms("2026-10-26T01:30:00"), "once, not twice"


@given(
    after=st.integers(1_700_000_000_000, 1_900_000_000_000),
    words=st.sampled_from(["daily at 23:59", "weekly on friday at 00:00", "weekly"]),
)
def test_the_next_time_is_later_and_the_first(after: int, words: str) -> None:
    when = parse(words)
    due = when.next_ms(after, OSLO)
    assert due is not None and due > after
    assert when.next_ms(due - 1000, OSLO) == due
    assert due - after <= (8 if when.weekday is not None else 2) * 86_400_000


def test_rows_have_no_time() -> None:
    assert parse("when 500 new good rows") == When(rows=500) == parse("When 500 new rows")
    assert parse("when 1 new good row").next_ms(0, UTC) is None


@pytest.mark.parametrize(
    "words",
    ["", "hourly", "daily at 24:00", "daily at 02:60", "daily on monday", "weekly on someday", "when 0 new good rows",
     "when many new good rows",
     "61 * * * *", "* * * *", "* * * * * *", "0 0 31 2 *", "h h * * *", "@daily", "a b c d e", "daily at 02:30; drop table"],
)  # fmt: skip
def test_what_is_no_schedule_is_refused_with_what_is_allowed(words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(words)
    assert "daily at HH:MM" in caught.value.message and caught.value.metadata["field"] == "schedule"
