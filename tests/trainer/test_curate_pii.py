"""Personal data: what is found, what is left alone, and that placeholders are the same all over a row."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.harness import SHARED
from server.config import load_config
from server.errors import InvalidArgument, ModelNotFound
from server.settings import CurationConfig
from trainer.curate import names, pii, pipeline
from trainer.curate.pipeline import Task, refine
from trainer.curate.rows import Row

SCRUBBER = pii.Scrubber.of(pii.OURS)


def found(text: str) -> list[tuple[str, str]]:
    return [(text[start:end], kind) for start, end, kind in SCRUBBER.find(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to Ann.B+x@mail.example.co.uk.", [("Ann.B+x@mail.example.co.uk", "EMAIL_ADDRESS")]),
        ("see https://a.example/x?y=1, or www.b.example", [("https://a.example/x?y=1", "URL"), ("www.b.example", "URL")]),
        ("on shop.example.com today", [("shop.example.com", "URL")]),
        ("from 192.168.0.12 and 2001:db8::1", [("192.168.0.12", "IP_ADDRESS"), ("2001:db8::1", "IP_ADDRESS")]),
        ("IBAN de89 3704 0044 0532 0130 00 is mine", [("de89 3704 0044 0532 0130 00", "IBAN_CODE")]),
        ("card 4111 1111 1111 1111 was stolen", [("4111 1111 1111 1111", "CREDIT_CARD")]),
        ("my ssn: 219-09-9998", [("219-09-9998", "US_SSN")]),
        ("call +44 20 7946 0958 or (212) 555-0187", [("+44 20 7946 0958", "PHONE_NUMBER"), ("(212) 555-0187", "PHONE_NUMBER")]),
        ("my number is 5550187234", [("5550187234", "PHONE_NUMBER")]),
    ],
)
def test_patterns_with_checks(text: str, expected: list[tuple[str, str]]) -> None:
    assert found(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "I paid 1,234,567.89 on 2024-03-15 10:30 for order 100200300",
        "version 1.2.3 of 12/05/2023",
        "card 4111 1111 1111 1112",
        "DE89370400440532013001 fails its checksum",
        "ssn 000-12-3456 and 666-12-3456 are nobody's",
        "999.1.1.1 is no address; it costs 3.50; ends here.how do I go on",
        "between 10:30 and 11:45, rooms 12::13 :: x",
        "a@b and @name, e.g. this",
        "",
    ],
)
def test_what_looks_alike_is_left_alone(text: str) -> None:
    assert found(text) == []


def test_placeholders_are_the_same_all_over_a_row() -> None:
    before = Row(
        "i",
        "I am a@x.org, not b@x.org",
        "",
        False,
        answer='{"mail": "A@x.org"}',
        rejected="b@x.org",
        messages=(("system", "x"), ("user", "I am a@x.org, not b@x.org; call +44 20 7946 0958")),
    )
    after, kinds = SCRUBBER.scrub(before)
    assert after.text == "I am <EMAIL_ADDRESS_1>, not <EMAIL_ADDRESS_2>"
    assert after.answer == '{"mail": "<EMAIL_ADDRESS_1>"}' and after.rejected == "<EMAIL_ADDRESS_2>"
    assert after.messages[1][1].endswith("<EMAIL_ADDRESS_2>; call <PHONE_NUMBER_1>")
    assert kinds == {"EMAIL_ADDRESS": 2, "PHONE_NUMBER": 1}
    again, none = SCRUBBER.scrub(after)
    assert again == after and none == {}


def test_names_come_from_a_token_classifier() -> None:
    row = Row("i", "Ann asked whether Anna is in", "", False, answer="Tell Ann: yes")
    after, kinds = SCRUBBER.scrub(row, ["Ann"])
    assert after.text == "<PERSON_1> asked whether Anna is in" and after.answer == "Tell <PERSON_1>: yes" and kinds == {"PERSON": 1}


def test_a_classifier_of_the_repository_is_asked_for_names(small_models: Path) -> None:
    config = load_config(flags={"models.path": str(small_models)}, environ={})
    rows = [Row(f"i{n}", "card lost where", "", False, answer="who") for n in range(3)]
    steps: list[tuple[int, int]] = []
    people = names.finder(config, "tagger")(rows, lambda done, total: steps.append((done, total)))
    assert set(people) == {"i0", "i1", "i2"} and steps[-1] == (6, 6)
    with pytest.raises(ModelNotFound):
        names.finder(config, "nobody")(rows, lambda done, total: None)


@pytest.mark.skipif("UNDERSTUDY_TEST_PRESIDIO" not in os.environ, reason="importing Presidio takes longer than all tests of this folder")
def test_other_kinds_are_presidios() -> None:
    with pytest.raises(InvalidArgument, match="UK_NHSS"):
        pii.Scrubber.of(["UK_NHSS"])
    scrubber = pii.Scrubber.of(["UK_NHS", "EMAIL_ADDRESS"])
    after, kinds = scrubber.scrub(Row("i", "my number there is 401-023-2137, a@x.org", "", False))
    assert kinds == {"UK_NHS": 1, "EMAIL_ADDRESS": 1} and "401" not in after.text


@given(st.text(alphabet="0123456789 -.()+@:/abx", max_size=200))
def test_no_text_breaks_or_stalls_it(text: str) -> None:
    spans = SCRUBBER.find(text)
    assert all(0 <= a < b <= len(text) for a, b, _ in spans)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))


@pytest.mark.parametrize("text", ["1 ", "a@", "1.1.", "a.", ":", "www.", "AA11", "1-"])
def test_long_texts_take_no_more_than_their_length(text: str) -> None:
    begun = time.process_time()
    SCRUBBER.find(text * (60_000 // len(text)))
    assert time.process_time() - begun < 5.0


@pytest.mark.parametrize("mode", ["scrub", "drop", "off"])
def test_the_step_counts_what_it_does(mode: str) -> None:
    raws: Sequence[Mapping[str, Any]] = [
        {"interaction_id": f"i{n}", "input": f"question {n} of u{n}@x.org" if n % 2 else f"question {n}", "teacher_text": "answer",
         "training_allowed": True, "source_model": "big"}
        for n in range(10)
    ]  # fmt: skip
    settings = CurationConfig(pii=mode, near_duplicates=1.0)
    report = refine(raws, Task(), settings).report()
    step = next(step for step in report["steps"] if step["name"] == "personal data")
    assert step["dropped"] == ({pipeline.PERSONAL: 5} if mode == "drop" else {})
    assert step["notes"] == ({} if mode == "off" else {"rows with personal data": 5, "found": {"EMAIL_ADDRESS": 5}})


def test_it_finds_the_spans_of_a_public_data_set() -> None:
    path = SHARED / "data" / "pii_presidio" / "synth_dataset_v2.json"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    from bench.measures.learn_curation import _spans

    scores = _spans(json.loads(path.read_text(encoding="utf-8")), SCRUBBER.find)
    assert scores["spans"] > 300 and scores["precision"] > 0.97 and scores["recall"] > 0.97
