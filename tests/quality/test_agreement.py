"""What several answers say together: votes, medoids, support."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.quality.agreement import agree, kind_of, medoid, normal, support, vote


@pytest.mark.parametrize(
    "same",
    [
        ("1,000 km", "1000 kilometers", "1000.0 km."),
        ("The answer is 42.", "#### 42", "42", "forty-two is wrong, so the final answer: 42", r"so \boxed{42}"),
        ("(B) Paris", "B", "b)", "B."),
        ("50%", "50 percent", "50 per cent"),
        ("$5", "5 dollars", "5 USD"),
        ("½", "1/2", "0.5", ".5"),
        ("seven", "7", "7.00"),
        ('{"b": 1.0, "a": "X "}', '{"a":"x","b":1}', '```json\n{"a": "x", "b": 1}\n```'),
        ("The Beatles", "beatles!", "BEATLES"),
    ],
)
def test_answers_that_say_the_same_are_written_alike(same: tuple[str, ...]) -> None:
    assert len({normal(answer) for answer in same}) == 1, [normal(answer) for answer in same]


@pytest.mark.parametrize(
    "different",
    [("17", "71"), ("yes", "no"), ("-5", "5"), ("1.5", "15"), ("5 km", "5 m"), ('{"a": 1}', '{"a": 2}'), ("A", "B"), ("東京", "京都")],
)  # fmt: skip
def test_answers_that_differ_stay_apart(different: tuple[str, str]) -> None:
    assert normal(different[0]) != normal(different[1])


@given(st.text(max_size=80))
def test_any_answer_has_a_form(answer: str) -> None:
    normal(answer)
    assert kind_of(answer) in ("closed", "text")
    assert vote([answer, answer]).share == 1.0


def test_hostile_answers() -> None:
    for answer in ("[" * 100_000, "9" * 100_000, "1/0", "1" + "/" * 1000, "\x00\ud800", "{" + '"a":' * 50_000, "1e999999999"):
        assert vote([answer, "x"]).index == 0
        assert 0 <= medoid([answer, "x"], np.ones((2, 4), np.float32)).share <= 1


def test_a_vote_counts_and_says_who_differs() -> None:
    found = vote(["Lyon", "Paris", "paris.", "The Paris"])
    assert (found.index, found.share, found.margin, found.tie) == (1, 0.75, 0.5, False)
    assert found.shares == (0.25, 0.75, 0.75, 0.75) and found.dissent == ("answer 1 says 'lyon', not 'paris'",)
    tied = vote(["a red one", "a blue one"])
    assert tied.tie and tied.index == 0 and tied.share == 0.5
    assert not vote(["x"]).tie and vote(["x"]).share == vote(["x"]).margin == 1


def test_one_who_is_right_far_more_often_outvotes_two() -> None:
    assert vote(["Lyon", "Paris", "Paris"], [0.95, 0.6, 0.6]).index == 0
    assert vote(["Lyon", "Paris", "Paris"], [0.7, 0.7, 0.7]).index == 1
    extreme = vote(["Lyon", "Paris"], [1.0, 0.0])
    assert extreme.index == 0 and extreme.shares[1] > 0


def test_a_vote_beats_its_members() -> None:
    """Seven independent members, each right on 60 % of numbers, wrong ones scattered."""
    rng = np.random.default_rng(0)
    right, members = 0, np.zeros(7)
    for truth in rng.integers(10, 99, 500).tolist():
        said = [str(truth) if rng.random() < 0.6 else str(truth + int(rng.integers(1, 9))) for _ in range(7)]
        members += [answer == str(truth) for answer in said]
        right += said[vote([f"The answer is {answer}." for answer in said]).index] == str(truth)
    assert right / 500 > members.max() / 500 + 0.2


def unit(*rows: list[float]) -> Any:
    table = np.array(rows, np.float32)
    return table / np.linalg.norm(table, axis=1, keepdims=True)


# The embedder hardly tells these apart; the odd one even lies nearest to the middle.
FLIPPED = [
    "The bridge was opened in 1917 and has 17 arches.",
    "Opened in 1917, the bridge has 71 arches.",
    "The bridge has 17 arches (1917).",
]
CLOSE = unit([1, 0.1, 0], [1, 0, 0], [1, -0.1, 0])


def test_the_medoid_rejects_a_flipped_number() -> None:
    plain = CLOSE @ CLOSE.T
    assert plain.sum(axis=1).argmax() == 1, "by embeddings alone the wrong one would be chosen"
    found = medoid(FLIPPED, CLOSE)
    assert found.index in (0, 2) and found.shares[1] < 0.6 < found.share
    assert any("answer 2" in why and "71" in why for why in found.dissent) and found.margin > 0.1


def test_the_medoid_rejects_a_negation() -> None:
    said = ["The drug is safe for children.", "The drug is not safe for children.", "It is safe for children to take the drug."]
    found = medoid(said, CLOSE)
    assert found.index in (0, 2) and any("negates" in why for why in found.dissent)


def test_the_medoid_of_what_is_alike() -> None:
    found = medoid(["a cat sat", "a dog ran far", "one cat sat"], unit([1, 0.1], [0, 1], [1, 0.2]))
    assert found.index in (0, 2) and len(found.dissent) == 1 and "little alike" in found.dissent[0]
    assert medoid(["x"], unit([1.0, 0.0])).share == 1
    assert medoid(["x", "y"], np.zeros((2, 3), np.float32)).share == 0


def test_kinds() -> None:
    assert [kind_of(a) for a in ("Paris", "42", "(C)", json.dumps({"a": [1] * 100}), "yes", "a " * 40 + "#### 17")] == ["closed"] * 6
    assert [kind_of(a) for a in ("A long sentence about the many things that one may see in town.", "two\nlines")] == ["text"] * 2
    assert agree(["Paris", "paris"]).share == 1
    assert agree(FLIPPED, CLOSE).index != 1


def test_support_finds_a_name_in_a_sentence() -> None:
    question = "who got the first nobel prize in physics"
    answers = [
        "Wilhelm Röntgen",
        "The first Nobel Prize in Physics was awarded to Wilhelm Röntgen in 1901.",
        "Wilhelm Conrad Röntgen, a German physicist, got it in 1901.",
        "Albert Einstein",
    ]
    found = support(question, answers)
    assert found.argmin() == 3 and found[3] == 0 and (found[:3] > 0.5).all() and (found <= 1).all()
    assert np.isnan(support(question, answers[:1])).all() and support(question, []).shape == (0,)
