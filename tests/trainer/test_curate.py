"""Each row that falls away is counted under its reason, held-out texts are held out for ever, and people are believed before models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import Cancelled
from server.settings import CurationConfig
from trainer.context import JobContext
from trainer.curate import answers, drafts, duplicates, licences, pipeline
from trainer.curate.pipeline import Task, refine
from trainer.curate.rows import Curated, Row, is_held_out, normalised

LABELS = ("card", "transfer")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
# Steps that find likenesses are tested in files of their own.
PLAIN = CurationConfig(near_duplicates=1.0, label_errors="off", pii="off")


def row(number: int, text: str, label: str | None = "card", **more: Any) -> dict[str, Any]:
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


def written(number: int, text: str, answer: str | None = "an answer", **more: Any) -> dict[str, Any]:
    return row(number, text, None, teacher_text=answer, output_text=answer, **more)


# Since when the skill of these tests has a quality model of its own: before everything.
LONG = datetime(2020, 1, 1, tzinfo=UTC)


def curated(rows: Sequence[Mapping[str, Any]], settings: CurationConfig = PLAIN, labels: tuple[str, ...] = LABELS) -> Curated:
    found = refine(rows, Task(labels, measured=LONG), settings)
    assert found.read == len(rows) == len(found.rows) + sum(found.dropped.values()), "each row is used or counted"
    assert sum(found.dropped.values()) == sum(sum(step.dropped.values()) for step in found.steps)
    assert all(step.before - step.after == sum(step.dropped.values()) for step in found.steps)
    return found


def one(raw: Mapping[str, Any], settings: CurationConfig = PLAIN, labels: tuple[str, ...] = ()) -> Row | str:
    """The row, or why it fell away."""
    found = curated([raw], settings, labels)
    return found.rows[0] if found.rows else next(iter(found.dropped))


def test_every_row_is_used_or_counted() -> None:
    found = curated([
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
        row(12, "bad answer", "card", thumb="down"),
        row(13, "corrected", "card", thumb="down", correction="Transfer"),
        row(14, "corrected and not allowed", None, training_allowed=False, correction="card"),
        row(15, "corrected to nonsense", "card", thumb="up", correction="weather"),
        row(16, "corrected to nonsense alone", "card", correction="weather"),
    ])  # fmt: skip
    kept = {one.text: one.label for one in found.rows}
    assert kept.pop("Where is  my CARD?") == "card", "of equal texts the newest stays"
    assert kept == {
        "send money": "transfer",
        "majority": "transfer",
        "corrected": "transfer",
        "corrected and not allowed": "card",
        "corrected to nonsense": "card",
    }
    assert found.dropped == {
        answers.NO_TEACHER: 1,
        licences.NOT_ALLOWED: 1,
        answers.FOREIGN_LABEL: 1,
        answers.DISPUTED: 2,
        answers.OUTVOTED: 1,
        duplicates.REPEATED: 2,
        answers.THUMBS_DOWN: 2,
    }
    assert found.sources == {"big": 6, "a person": 2}
    report = found.report()
    assert json.loads(json.dumps(report))["kept"] == 6 and [step["name"] for step in report["steps"]][:2] == ["input", "sources"]
    assert len(report["steps"]) == pipeline.STEPS
    assert next(s for s in found.steps if s.name == "agreement").examples[answers.OUTVOTED] == ["i9"]


@given(st.lists(st.tuples(st.sampled_from(["a", "A ", "b", "c?", "c"]), st.sampled_from(["card", "transfer", None, "x"])), max_size=20))
def test_nothing_vanishes_and_no_text_is_twice(pairs: list[tuple[str, str | None]]) -> None:
    rows = [row(number, text, label) for number, (text, label) in enumerate(pairs)]
    found = curated(rows)
    texts = [normalised(one.text) for one in found.rows]
    assert len(set(texts)) == len(texts)
    assert curated(list(reversed(rows))).fingerprint == found.fingerprint, "the order of files does not matter"


@given(st.text(min_size=1))
def test_spellings_of_a_text_are_on_the_same_side(text: str) -> None:
    assert is_held_out(text) == is_held_out(f"  {text} ") == is_held_out(normalised(text))


def test_one_text_in_five_is_held_out() -> None:
    share = sum(is_held_out(f"text number {number}") for number in range(5000)) / 5000
    assert 0.18 < share < 0.22


def test_by_user_all_texts_of_one_are_on_one_side_and_none_leaks() -> None:
    rows = [row(n, f"text {n % 150}", LABELS[n % 150 % 2], user_hash=f"u{n % 37}") for n in range(600)]
    found = curated(rows, PLAIN.model_copy(update={"split_by": "user"}))
    sides = {(one.group, one.held_out) for one in found.rows}
    assert len(sides) == len({group for group, _ in sides})
    held = {normalised(one.text) for one in found.rows if one.held_out}
    assert held and not held & {normalised(one.text) for one in found.rows if not one.held_out}
    assert found.dropped[duplicates.LEAKS] > 0


def test_feedback_is_about_the_answer_that_was_seen() -> None:
    # The student's answer was delivered and put down; the teacher, asked for comparison, said something else.
    seen = written(1, "write", "the teacher's", local=True, student_text="the student's", thumb="down") | {"output_text": "the student's"}
    both = one(seen)
    assert isinstance(both, Row) and (both.answer, both.rejected, both.thumb) == ("the teacher's", "the student's", "down")
    agreed = one({**seen, "teacher_text": "the student's"})
    assert isinstance(agreed, Row) and (agreed.answer, agreed.rejected) == ("", "the student's"), "known not to be wanted, for KTO"
    labels = row(2, "where", "card", local=True, student_label="transfer", labels=["transfer"], thumb="down")
    found = one(labels, labels=LABELS)
    assert isinstance(found, Row) and found.label == "card"
    assert one({**labels, "teacher_label": "transfer"}, labels=LABELS) == answers.THUMBS_DOWN


def test_a_correction_makes_a_pair_and_needs_nobodys_terms() -> None:
    found = one(written(1, "write", "bad", correction="good", training_allowed=False))
    assert isinstance(found, Row) and (found.answer, found.rejected, found.corrected) == ("good", "bad", True)
    assert found.weight == 1 + PLAIN.feedback_bonus
    same = one(written(1, "write", "good", correction="Good "))
    assert isinstance(same, Row) and same.rejected == "", "a correction that repeats the answer rejects nothing"


def test_a_students_own_answer_counts_where_a_person_liked_it() -> None:
    mine = row(1, "where", None, local=True, student_label="card", labels=["card"], candidate="local:intent@1")
    assert one(mine, labels=LABELS) == answers.NO_TEACHER
    assert one({**mine, "teacher_label": "card", "training_allowed": False}, labels=LABELS) == licences.NOT_ALLOWED
    liked = one({**mine, "rating": 5}, labels=LABELS)
    assert isinstance(liked, Row) and liked.label == "card"
    assert one({**mine, "rating": 3}, labels=LABELS) == answers.NO_TEACHER
    off = PLAIN.model_copy(update={"own_answers": False})
    assert one({**mine, "rating": 5}, off, LABELS) == answers.NO_TEACHER


def test_what_nobody_answered_is_kept_without_a_label() -> None:
    def unanswered(n: int, text: str, **more: Any) -> dict[str, Any]:
        return row(n, text, None, local=True, student_label="card", labels=["card"], **more)

    texts = [f"where is the parcel number {n} of this week" for n in range(40)]
    held, free = [text for text in texts if is_held_out(text)], [text for text in texts if not is_held_out(text)]
    rows = [
        row(1, free[0]),
        row(2, held[0], "transfer"),
        unanswered(3, free[0].upper()),  # has a label
        unanswered(4, free[1]),
        unanswered(5, free[1] + " "),
        unanswered(6, held[1]),
        unanswered(7, held[0] + "!"),
        unanswered(8, held[0][:-1] + "kk"),  # nearly the held-out text
        unanswered(9, "write to anna@example.org about it"),
        row(10, free[2], training_allowed=False),  # an answer that may not be learnt from is no lack of an answer
        unanswered(11, free[3], thumb="down"),
    ]
    found = curated(rows, PLAIN.model_copy(update={"pii": "scrub"}))
    kept = {one.text: one for one in found.unlabelled}
    assert set(kept) == {free[1] + " ", "write to <EMAIL_ADDRESS_1> about it"}
    assert not any(one.label or one.answer or one.held_out for one in found.unlabelled)
    assert found.report()["unlabelled_rows"] == 2 and found.dropped[answers.NO_TEACHER] == 7
    without = curated(rows, PLAIN.model_copy(update={"pii": "drop"}))
    assert {one.text for one in without.unlabelled} == {free[1] + " "}
    plenty = [row(100 + n, f"question {n} about {n * 7919} things", LABELS[n % 2]) for n in range(80)]
    assert not curated([*rows, *plenty]).unlabelled


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"quality": 0.7}, answers.LOW_QUALITY),
        ({"quality": 0.71}, ""),
        ({"quality": None}, ""),
        ({"quality": 0.1, "correction": "better"}, ""),
        ({"rating": 3}, answers.LOW_RATING),
        ({"rating": 4}, ""),
        ({"rating": 1, "correction": "better"}, ""),
        ({"quality": 0.1, "local": True, "output_text": "the student's"}, ""),
    ],
)
def test_what_was_found_bad_is_left_out(more: dict[str, Any], expected: str) -> None:
    found = one(written(1, "write") | more)
    assert found == expected if expected else isinstance(found, Row)


def test_a_quality_that_was_never_measured_on_the_skill_leaves_no_teacher_out() -> None:
    low = written(1, "write", quality=0.1)
    assert len(refine([low], Task(), PLAIN).rows) == 1
    later = Task(measured=low["time"] + timedelta(seconds=1))
    assert len(refine([low], later, PLAIN).rows) == 1, "it was given before the skill had a model of its own"
    assert refine([low], Task(measured=low["time"]), PLAIN).rows == []


def test_agreement_and_liking_give_weight() -> None:
    liked = one(written(1, "write", thumb="up"))
    agreed = one(row(1, "where", student_label="card"), labels=LABELS)
    assert isinstance(liked, Row) and liked.weight == 1.5 and isinstance(agreed, Row) and agreed.weight == 1.25
    repeated = curated([row(1, "where"), row(2, "Where?")]).rows
    assert [one.weight for one in repeated] == [1.25]


@pytest.mark.parametrize(
    ("model", "allowed", "settings", "expected"),
    [
        ("gpt-4o", True, {}, ""),
        ("gpt-4o", False, {}, licences.NOT_ALLOWED),
        ("mistralai/Mistral-7B-Instruct-v0.3", False, {}, licences.NOT_ALLOWED),
        ("mistralai/Mistral-7B-Instruct-v0.3", False, {"licence_is_enough": True}, ""),
        ("CohereForAI/c4ai-command-r-v01", True, {}, licences.FORBIDDEN),
        ("CohereForAI/c4ai-command-r-v01", True, {"allowed_licences": ["CC-BY-NC-4.0"]}, ""),
        ("acme/giant-2", True, {"licences": {"acme/giant*": "cc-by-nc-4.0"}}, licences.FORBIDDEN),
        ("acme/giant-2", False, {"licences": {"acme/giant*": "mit"}, "licence_is_enough": True}, ""),
        ("meta-llama/Meta-Llama-3-70B-Instruct", True, {}, licences.FORBIDDEN),
        ("meta-llama/Llama-3.3-70B-Instruct", True, {}, ""),
    ],
)
def test_terms_and_licences_are_heard(model: str, allowed: bool, settings: dict[str, Any], expected: str) -> None:
    found = one(written(1, "write", source_model=model, training_allowed=allowed), PLAIN.model_copy(update=settings))
    assert found == expected if expected else isinstance(found, Row)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (written(1, ""), drafts.EMPTY),
        (written(1, " \n\t"), drafts.EMPTY),
        (written(1, "\x00\x01\x02"), drafts.EMPTY),
        (written(1, "x" * 70_000), drafts.TOO_LONG),
        (written(1, "write", "y" * 70_000), drafts.TOO_LONG),
        (written(1, "{not json", input_kind="pair"), drafts.UNREADABLE),
        (written(1, '{"text": 1, "text_pair": []}', input_kind="pair"), drafts.UNREADABLE),
        (written(1, "[" * 100_000, input_kind="chat", training_allowed=False), drafts.UNREADABLE),
        (written(1, '"a text"', input_kind="chat"), drafts.UNREADABLE),
        (written(1, '[{"role": "king", "content": "hm"}]', input_kind="chat"), drafts.UNREADABLE),
        (written(1, '[{"role": "user", "content": "see", "images": 2}]', input_kind="chat"), drafts.IMAGES),
        (written(1, "write", input_kind="hologram"), drafts.UNREADABLE),
        (written(1, "write", parameters="{lies", instruction=None, quality=float("nan"), rating=None), ""),
        (written(1, "be\x00ll \x1b[31mred"), ""),
    ],
)
def test_hostile_rows_are_counted_and_stop_nothing(raw: dict[str, Any], expected: str) -> None:
    found = one(raw)
    assert found == expected if expected else isinstance(found, Row) and found.text.isprintable()


@given(st.dictionaries(st.sampled_from(drafts.COLUMNS), st.none() | st.text(max_size=20) | st.integers(-9, 9) | st.booleans(), max_size=12))
def test_no_row_of_any_content_stops_it(raw: dict[str, Any]) -> None:
    curated([{"input": "a", "teacher_text": "b", "training_allowed": True} | raw], labels=())


def test_conversations_and_pairs_keep_what_was_asked() -> None:
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "now write"}]
    chat = one(written(1, json.dumps(talk), input_kind="chat", parameters='{"target_language": "fr"}', instruction="be brief"))
    assert isinstance(chat, Row) and chat.text == "now write" and chat.messages[1] == ("assistant", "hi")
    assert chat.parameters == (("target_language", "fr"),) and chat.instruction == "be brief"
    pair = one(written(1, json.dumps({"text": "who", "text_pair": "he"}), input_kind="pair"))
    assert isinstance(pair, Row) and json.loads(pair.text)["text_pair"] == "he" and pair.messages == ()


def test_the_newest_held_out_rows_are_a_split_of_their_own() -> None:
    found = curated([row(n, f"text {n}") for n in range(500)])
    newest = found.newest(0.2)
    held = [one for one in found.rows if one.held_out]
    assert len(newest) == round(len(held) * 0.2) and min(one.time for one in newest) > max(one.time for one in held if one not in newest)


def test_a_cancelled_job_stops_between_steps(tmp_path: Any) -> None:
    context = JobContext("job", tmp_path, is_cancelled=lambda: True)
    with pytest.raises(Cancelled):
        refine([row(1, "text")], Task(LABELS), PLAIN, context)
