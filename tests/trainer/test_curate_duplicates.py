"""Near duplicates: every pair that a slow comparison finds, the best of them stays, and no held-out text is trained on."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.curate import balance, duplicates
from trainer.curate.rows import Row

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SENTENCE = "please tell me where my new card is, it should have come on monday"


def make(number: int, text: str, label: str = "card", **more: object) -> Row:
    values: dict[str, object] = {"held_out": False, "answer": label, "time": NOW + timedelta(seconds=number), **more}
    return Row(f"i{number}", text, label, **values)  # type: ignore[arg-type]


def written(number: int, text: str, answer: str, **more: object) -> Row:
    return make(number, text, "", answer=answer, **more)


def near(rows: list[Row], threshold: float = 0.85) -> tuple[set[str], Counter[str]]:
    dropped: Counter[str] = Counter()
    left = duplicates.near(rows, threshold, lambda row, reason: dropped.update([reason]), lambda: None)
    assert [row for row in rows if row in left] == left, "in the order that they came"
    return {row.interaction_id for row in left}, dropped


def shingles(text: str) -> set[str]:
    return {text[n : n + 5] for n in range(max(len(text) - 4, 1))}


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def test_it_finds_what_comparing_all_pairs_finds() -> None:
    rng = random.Random(3)
    words = ["card", "money", "lost", "found", "where", "when", "transfer", "account", "number", "late", "early", "please", "help"]
    texts = [" ".join(rng.choices(words, k=rng.randint(6, 14))) for _ in range(150)]
    texts += [" ".join([*text.split(), rng.choice(words)]) for text in texts[:75]]
    for threshold in (0.8, 0.9):
        runs = [shingles(text) for text in texts]
        slow = {(i, j) for j, b in enumerate(runs) for i, a in enumerate(runs[:j]) if len(a & b) >= threshold * len(a | b)}
        found = list(duplicates.similar(texts, threshold))
        assert set(found) <= slow and len(found) >= 0.97 * len(slow) and len(slow) > 15
        assert found == list(duplicates.similar(texts, threshold)) == sorted(found), "the same each time"


def test_a_thousand_copies_are_quick_and_leave_one() -> None:
    rows = [make(number, f"{SENTENCE} {number % 7}") for number in range(1000)]
    kept, dropped = near(rows)
    assert len(kept) < 40 and dropped[duplicates.NEAR] == 1000 - len(kept)


def test_the_best_of_near_rows_stays_and_labels_keep_them_apart() -> None:
    plain, corrected = make(1, SENTENCE), make(2, f"{SENTENCE} ok", corrected=True)
    newest, other, held = make(3, f"{SENTENCE} so"), make(4, SENTENCE, "transfer"), make(5, SENTENCE, held_out=True)
    kept, _ = near([plain, corrected, newest, other, held])
    assert kept == {"i2", "i4", "i5"}
    assert near([plain, corrected], threshold=1.0)[0] == {"i1", "i2"}


def test_cases_of_one_form_are_no_duplicates() -> None:
    form = "extract the fields of this order: order {}, 3 boxes of screws to be sent to the warehouse in the north of the town"
    orders = [written(n, form.format(1000 + n), f'{{"order": {1000 + n}}}') for n in range(20)]
    assert len(near(orders)[0]) == 20
    again = [written(100, form.format(1001) + " ", '{"order":  1001}')]
    assert len(near([*orders, *again])[0]) == 20
    left = duplicates.decontaminated([replace(orders[0], held_out=True), *orders[1:]], 0.85, lambda row, reason: None, lambda: None)
    assert len(left) == 20, "another order is another case, not a leak"


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["a b c d e f g", "a b c d e f g h", "A B C d e f g!", "x", "", "x y"]), st.booleans()), max_size=12)
)
def test_nothing_that_is_held_out_is_trained_on(pairs: list[tuple[str, bool]]) -> None:
    rows = [make(number, text, held_out=held) for number, (text, held) in enumerate(pairs)]
    dropped: list[Row] = []
    left = duplicates.decontaminated(rows, 0.7, lambda row, reason: dropped.append(row), lambda: None)
    assert len(left) + len(dropped) == len(rows) and not any(row.held_out for row in dropped)
    for row in left:
        if not row.held_out:
            assert not any(
                jaccard(duplicates.normalised(row.text), duplicates.normalised(other.text)) >= 0.7 for other in left if other.held_out
            )


def test_exact_ones_are_one_a_side_and_answer() -> None:
    rows = [
        written(1, "write", "a"),
        written(2, "Write.", "A"),
        written(3, "write", "b"),
        written(4, "write", "a", messages=(("user", "first"), ("assistant", "so"), ("user", "write"))),
        written(5, "write", "a", parameters=(("target_language", "fr"),)),
        written(6, "write", "a", held_out=True),
    ]
    dropped: list[str] = []
    duplicates.exact(rows, lambda row, reason: dropped.append(row.interaction_id))
    assert dropped == ["i1"], "only the very same question with the very same answer repeats another"


def test_labels_are_capped_and_weighed() -> None:
    rows = [make(n, f"text {n}", "card", weight=1.5 if n < 3 else 1.0) for n in range(8)]
    rows += [make(8, "rare", "transfer"), make(9, "held", "card", held_out=True)]
    gone: list[str] = []
    left = balance.capped(rows, 3, lambda row, reason: gone.append(row.interaction_id))
    assert gone == [f"i{n}" for n in range(3, 8)] and left[-1].held_out
    assert balance.capped(rows, None, lambda row, reason: None) == rows
    even = balance.weighted(rows, 1.0)
    totals = {label: sum(row.weight for row in even if row.label == label and not row.held_out) for label in ("card", "transfer")}
    assert abs(totals["transfer"] - 4.5) < 1e-9 and even[-1].weight == 1.0
    assert balance.weighted(rows, 0.0) == rows
