"""Each row that falls away is counted under its reason, and held-out texts are held out for ever."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trainer.curate import pipeline as curate
from trainer.curate.pipeline import Saying

LABELS = {"card", "transfer"}
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def row(number: int, text: str, label: str | None = "card", **more: Any) -> Mapping[str, object]:
    return {
        "interaction_id": f"i{number}",
        "time": NOW + timedelta(seconds=number),
        "input_kind": "text",
        "input": text,
        "teacher_label": label,
        "training_allowed": True,
        "source_model": "big",
        **more,
    }


def test_every_row_is_used_or_counted() -> None:
    rows = [
        row(1, "where is my card"),
        row(2, "Where is  my CARD?"),
        row(3, "send money", "transfer"),
        row(4, "no teacher", None),
        row(5, "not allowed", training_allowed=False),
        row(6, "foreign", "weather"),
        row(7, "disputed", "card"),
        row(8, "disputed", "transfer"),
        row(9, "majority", "card"),
        row(10, "majority", "transfer"),
        row(11, "majority", "transfer"),
        row(12, "bad answer", "card"),
        row(13, "corrected", "card"),
        row(14, "corrected and not allowed", None, training_allowed=False),
        row(15, "corrected to nonsense", "card"),
    ]
    said = {
        "i12": Saying(None, "down"),
        "i13": Saying("transfer", "down"),
        "i14": Saying("card", None),
        "i15": Saying("weather", "up"),
    }
    found = curate.curate(rows, LABELS, said)
    kept = {one.text: one.label for one in found.rows}
    assert kept == {
        "where is my card": "card",
        "send money": "transfer",
        "majority": "transfer",
        "corrected": "transfer",
        "corrected and not allowed": "card",
        "corrected to nonsense": "card",
    } or kept == {**kept, "Where is  my CARD?": "card"}
    assert found.dropped == {
        curate.NO_TEACHER: 1,
        curate.NOT_ALLOWED: 1,
        curate.FOREIGN_LABEL: 1,
        curate.DISPUTED: 2,
        curate.REPEATED: 3,
        curate.THUMBS_DOWN: 1,
    }
    assert found.read == len(rows) == len(found.rows) + sum(found.dropped.values())


@given(st.lists(st.tuples(st.sampled_from(["a", "A ", "b", "c?", "c"]), st.sampled_from(["card", "transfer", None, "x"])), max_size=20))
def test_nothing_vanishes_and_no_text_is_twice(pairs: list[tuple[str, str | None]]) -> None:
    rows = [row(number, text, label) for number, (text, label) in enumerate(pairs)]
    found = curate.curate(rows, LABELS, {})
    assert len(found.rows) + sum(found.dropped.values()) == len(rows)
    texts = [curate.normalised(one.text) for one in found.rows]
    assert len(set(texts)) == len(texts)
    assert curate.curate(list(reversed(rows)), LABELS, {}).fingerprint == found.fingerprint, "the order of files does not matter"


@given(st.text(min_size=1))
def test_spellings_of_a_text_are_on_the_same_side(text: str) -> None:
    assert curate.is_held_out(text) == curate.is_held_out(f"  {text} ") == curate.is_held_out(curate.normalised(text))


def test_one_text_in_five_is_held_out() -> None:
    share = sum(curate.is_held_out(f"text number {number}") for number in range(5000)) / 5000
    assert 0.18 < share < 0.22
