"""The parts of training encoders: answers read, figures measured, the loop that resumes bit for bit."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from server.errors import Cancelled
from trainer.context import JobContext
from trainer.curate.rows import Row
from trainer.encoders import examples, measure
from trainer.encoders.contrastive import Embedder
from trainer.encoders.examples import Example, read_entities, read_pair, read_score
from trainer.encoders.fit import CHECKPOINT, Fit, Recipe, fit
from trainer.encoders.judge import Judge, compared, verdict
from trainer.encoders.run import split
from trainer.encoders.tagging import spans_of, targets

TEXT = "Ada met Ada Lovelace in London"


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ('[{"text": "London", "label": "place"}]', ((24, 30, "place"),)),
        ('{"entities": [{"text": "London", "label": "place"}]}', ((24, 30, "place"),)),
        ('```json\n[{"text": "London", "label": "place"}]\n```', ((24, 30, "place"),)),
        ("place: London; person: Ada", ((0, 3, "person"), (24, 30, "place"))),
        ("[]", ()),
        ('[{"text": "Ada", "label": "person"}, {"text": "Ada Lovelace", "label": "person"}]', ((0, 3, "person"), (8, 20, "person"))),
        ('[{"text": "Ada", "label": "person", "start": 8}]', ((8, 11, "person"),)),
        ('[{"text": "Ada", "label": "person", "start": 9}]', ((0, 3, "person"),)),
        ('[{"text": "Ada", "label": "person", "start": -5}]', ((0, 3, "person"),)),
        ('[{"text": "Ada", "label": "person", "start": true}]', ((0, 3, "person"),)),
        ('[{"text": "Paris", "label": "place"}]', examples.NOT_IN_TEXT),
        ('[{"text": "Ada", "label": "p"}, {"text": "Ada", "label": "p"}, {"text": "Ada", "label": "p"}]', examples.NOT_IN_TEXT),
        ('[{"text": "London", "label": "city"}]', examples.FOREIGN_LABEL),
        ('[{"text": 3, "label": "place"}]', examples.NO_JSON),
        ('["London"]', examples.NO_JSON),
        ('{"entities": "London"}', examples.NO_JSON),
        ("There is a place, London.", examples.NO_JSON),
        ("[[[[", examples.NO_JSON),
        ("[" * 100_000, examples.NO_JSON),
        ("null", examples.NO_JSON),
        ("17", examples.NO_JSON),
    ],
)
def test_entities_are_read_from_what_teachers_and_people_write(answer: str, wanted: Any) -> None:
    labels = ("place", "person") if wanted == examples.FOREIGN_LABEL else ()
    assert read_entities(answer, TEXT, labels) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [("0.8", 0.8), ("1", 1.0), ('{"score": 0.25}', 0.25), (" Relevant ", 1.0), ("no", 0.0), ("true", 1.0)]
    + [(bad, None) for bad in ("", "1.5", "-0.1", "NaN", "Infinity", '{"score": true}', "[0.5]", "very", '{"score": "1"}')],
)
def test_scores_are_read(answer: str, wanted: float | None) -> None:
    assert read_score(answer) == wanted


def test_pairs_are_read() -> None:
    assert read_pair('{"text": "a", "text_pair": "b"}') == ("a", "b")
    for bad in ("a", '{"text": "a"}', '{"text": "a", "text_pair": " "}', '{"text": 1, "text_pair": "b"}', "[]", "null"):
        assert read_pair(bad) is None


def row(number: int, text: str, answer: str, **more: Any) -> Row:
    return Row(f"i{number}", text, "", False, answer=answer, **more)


def test_a_person_s_answer_counts_for_equal_texts_and_queries_are_on_one_side() -> None:
    mine = json.dumps([{"text": "London", "label": "place"}])
    found = examples.read(examples.ENTITIES, [row(1, TEXT, mine, corrected=True), row(2, TEXT, "[]"), row(3, TEXT + " now", "what?")])
    assert [(one.id, one.spans) for one in found.rows] == [("i1", ((24, 30, "place"),))]
    assert found.dropped == {examples.REPEATED: 1, examples.NO_JSON: 1}

    pairs = [row(q * 10 + d, json.dumps({"text": f"query {q}", "text_pair": f"document {d}"}), "0.5") for q in range(60) for d in range(3)]
    parts = split(examples.read(examples.RANKING, pairs).rows)
    sides = [{one.text for one in side} for side in (parts.train, parts.validation, parts.held_out)]
    assert all(sides) and sum(map(len, sides)) == 60 == len(set.union(*sides))
    assert len(parts.documents) == 3


def test_feature_extraction_learns_from_corrections_and_scores() -> None:
    rows = [
        row(1, "a text", "another", corrected=True),
        row(2, json.dumps({"text": "x", "text_pair": "y"}), "0", corrected=True),
        row(3, "a text alone", ""),
    ]
    found = examples.read(examples.EMBEDDING, rows)
    assert [(one.text, one.pair, one.score) for one in found.rows] == [("a text", "another", 1.0), ("x", "y", 0.0)]
    assert found.dropped == {examples.NO_PAIR: 1}


def test_token_labels_there_and_back() -> None:
    offsets = [(0, 0), (0, 3), (4, 7), (8, 11), (12, 16), (16, 20), (21, 23), (24, 30), (0, 0)]
    special = [1, 0, 0, 0, 0, 0, 0, 0, 1]
    spans = ((0, 3, "person"), (8, 20, "person"), (24, 30, "place"))
    labels = targets(offsets, special, spans)
    assert labels == [None, "B-person", "O", "B-person", "I-person", "I-person", "O", "B-place", None]
    assert spans_of([label for label in labels if label], offsets[1:-1]) == spans
    assert spans_of(["I-a", "B-a", "I-b", "O", "I-b"], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]) == (
        (0, 1, "a"),
        (1, 2, "a"),
        (2, 3, "b"),
        (4, 5, "b"),
    )


def test_figures_are_those_of_the_definitions() -> None:
    from scipy.stats import spearmanr
    from sklearn.metrics import ndcg_score, roc_auc_score

    rng = np.random.default_rng(1)
    wanted, got = rng.integers(0, 4, 80) / 3, rng.integers(0, 9, 80) / 8
    assert measure.spearman(wanted.tolist(), got.tolist()) == pytest.approx(spearmanr(wanted, got).statistic)
    statistic, units = measure.concordance_statistic((wanted > 0.5).astype(float).tolist(), got.tolist())
    assert units == 80 and statistic(np.arange(80)) == pytest.approx(roc_auc_score(wanted > 0.5, got), abs=1e-6)
    gains, scores = rng.integers(0, 2, (6, 20)).astype(float), rng.permutation(120).reshape(6, 20).astype(float)
    assert measure.ranking(list(gains), list(scores)).ndcg.mean() == pytest.approx(ndcg_score(gains, scores, k=10))
    assert measure.ranking([np.array([0.0, 1.0])], [np.array([3.0, 1.0])]).reciprocal.tolist() == [0.5]
    assert measure.ranking([np.array([0.0, 1.0])], [np.array([1.0, 1.0])]).reciprocal.tolist() == [0.5], "a tie is no merit"

    counts = measure.entity_counts([((0, 1, "a"), (2, 3, "b")), ()], [((0, 1, "a"), (2, 3, "a")), ()])
    assert counts.tolist() == [[1, 1, 1], [0, 0, 0]] and measure.f1(counts) == 0.5
    assert measure.f1(np.zeros((2, 3), np.int64)) == 1.0


def test_a_paired_comparison_sees_what_two_intervals_do_not() -> None:
    rng = np.random.default_rng(3)
    rows = [Example(str(i), "t", spans=((0, 1, "a"),)) for i in range(300)]
    hard = rng.random(300) < 0.5
    one = [() if hard[i] else rows[i].spans for i in range(300)]
    other = [one[i] if i % 20 else rows[i].spans for i in range(300)]  # right wherever the other is, and in a few more
    judge = Judge(examples.ENTITIES, rows)
    worse, better = judge.judge(one), judge.judge(other)
    difference = compared(better, worse)
    assert difference.low > 0 and better.quality.interval.low < worse.quality.interval.high
    assert verdict(better, difference, 0.5, "s@1") == "" and "against s@1" in verdict(worse, compared(worse, better), 0.5, "s@1")
    assert "the bar 0.99" in verdict(better, None, 0.99, "")


def test_the_student_is_set_beside_what_callers_got_where_people_judged() -> None:
    wanted = json.dumps([{"text": "London", "label": "place"}])
    rows = [
        Example(str(i), TEXT, spans=((24, 30, "place"),), corrected=i < 10, rejected="[]" if i < 10 else "", agreed=i >= 10)
        for i in range(30)
    ]
    said = Judge(examples.ENTITIES, rows).said([one.spans for one in rows])
    assert said["said/rows"] == 30 and said["said/student"] == 1.0 and said["said/delivered"] == pytest.approx(0.8)
    assert said["said/difference_low"] > 0
    assert Judge(examples.ENTITIES, rows[:15]).said([one.spans for one in rows[:15]]) == {}
    pairs = [Example(str(i), "q", f"d{i}", float(i % 2), corrected=True, rejected=wanted if i == 0 else str(1 - i % 2)) for i in range(24)]
    assert Judge(examples.RANKING, pairs).said([one.score for one in pairs])["said/delivered"] == 0.0


class Line:
    """A learner as small as can be, with dropout, so that every draw must be the same."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1))
        self.after_step = lambda: None

    def loss(self, batch: Sequence[list[float]], /) -> Any:
        self.after_step()
        rows = torch.tensor(batch)
        return ((self.model(rows)[:, 0] - rows.sum(dim=1)) ** 2).mean()

    def validate(self, rows: Sequence[list[float]], /) -> float:
        return -float(self.loss(rows))

    def length(self, row: list[float], /) -> int:
        return int(abs(row[0]) * 10)

    def weights(self) -> bytes:
        return b"".join(value.detach().numpy().tobytes() for value in self.model.parameters())


RECIPE = Recipe("full", 0.01, epochs=6, batch=4, accumulate=2, patience=3)
NUMBERS = np.random.default_rng(5).standard_normal((70, 4)).astype(np.float32).tolist()


def line(folder: Path, learner: Line, **more: Any) -> Fit:
    return fit(learner, NUMBERS[:60], NUMBERS[60:], RECIPE, JobContext("j", folder, seed=3, checkpoint_s=0.0, **more), key="k")


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 30])
def test_a_cancelled_run_makes_the_same_steps_when_it_is_taken_up(tmp_path: Path, steps: int) -> None:
    whole, learner = Line(), Line()
    wanted = line(tmp_path / "whole", whole)
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1

    learner.after_step = count
    with pytest.raises(Cancelled):
        line(tmp_path / "cut", learner, is_cancelled=lambda: seen >= 2 * steps)
    found = line(tmp_path / "cut", again := Line())
    assert found == wanted and again.weights() == whole.weights()
    assert math.isfinite(found.best) and found.losses[-1][1] < found.losses[0][1]
    assert line(tmp_path / "cut", Line()) == wanted, "a run that is done is not done again"


def _killed(folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    learner, seen = Line(), 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == 2 * steps:
            os.kill(os.getpid(), signal.SIGKILL)

    learner.after_step = count
    line(folder, learner)


def test_a_killed_run_makes_the_same_steps_when_it_is_taken_up(tmp_path: Path) -> None:
    wanted = line(tmp_path / "whole", whole := Line())
    victim = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path / "cut", 19))
    victim.start()
    victim.join(60)
    assert victim.exitcode == -signal.SIGKILL and (tmp_path / "cut" / "full" / CHECKPOINT).is_file()
    logs: list[str] = []
    assert line(tmp_path / "cut", again := Line(), log=logs.append) == wanted
    assert again.weights() == whole.weights() and "taken up at step 18" in logs[0]


def test_a_checkpoint_that_is_broken_or_of_another_run_is_passed_over(tmp_path: Path) -> None:
    wanted = line(tmp_path, first := Line())
    file = tmp_path / "full" / CHECKPOINT
    for broken in (b"", b"no checkpoint", file.read_bytes()[:-30]):
        file.write_bytes(broken)
        logs: list[str] = []
        assert line(tmp_path, again := Line(), log=logs.append) == wanted and again.weights() == first.weights()
        assert "cannot be read" in logs[0]
    logs = []
    fit(Line(), NUMBERS[:60], NUMBERS[60:], RECIPE, JobContext("j", tmp_path, seed=4, log=logs.append), key="k")
    assert "of another run" in logs[0]


def test_early_stopping_keeps_the_best_weights_and_time_ends_it(tmp_path: Path) -> None:
    class Worse(Line):
        """Good at first, then ever worse."""

        figures = iter([0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
        kept: bytes = b""

        def validate(self, rows: Sequence[list[float]], /) -> float:
            figure = next(self.figures)
            if figure == 0.9:
                self.kept = self.weights()
            return figure

    found = line(tmp_path / "a", learner := Worse())
    assert (found.best, found.best_epoch, found.ended) == (0.9, 2, "no better validation figure in 3 epochs")
    assert learner.weights() == learner.kept
    late = fit(Line(), NUMBERS[:60], NUMBERS[60:], RECIPE, JobContext("j", tmp_path / "b", deadline=-1.0))
    assert (late.steps, late.ended) == (0, "the time was up")


class Table(torch.nn.Module):
    """A vector for each text, in the form of an encoder with one token."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.places = {text: place for place, text in enumerate(texts)}
        self.vectors = torch.nn.Embedding(len(texts), 8)
        self.pooling, self.query_prefix, self.passage_prefix = "mean", "", ""

    def forward(self, ids: Any, attention_mask: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.vectors(ids)[:, None, :])

    def encode(self, texts: Sequence[str]) -> Sequence[str]:
        return texts

    def tensors(self, texts: Sequence[str], device: str) -> dict[str, Any]:
        return {"ids": torch.tensor([self.places[text] for text in texts]), "attention_mask": torch.ones(len(texts), 1)}


def embedder(task: str, rows: Sequence[Example]) -> Embedder:
    table = Table(sorted({text for row in rows for text in (row.text, row.pair)}))
    return Embedder(table, table, task, "cpu")  # type: ignore[arg-type]


def test_infonce_is_its_formula_and_spares_what_is_right_too() -> None:
    rows = [Example("1", "a", "x", 1.0), Example("2", "b", "x", 1.0), Example("3", "c", "y", 1.0), Example("4", "a", "z", 0.0)]
    learner = embedder(examples.EMBEDDING, rows)
    chosen = learner.prepare(rows)
    assert [row.id for row in chosen] == ["1", "2", "3"]
    with torch.no_grad():
        got = float(learner.loss(chosen))
    cosine = learner.matrix(["a", "b", "c"], ["x", "y", "z"]).astype(np.float64) * 20
    # "x" stands twice in the batch and is right for both; "z" is known as wrong for "a", for the others the nearest wrong one is taken.
    extra = [learner._wrong[query][0] for query in ("a", "b", "c") if query in learner._wrong]
    assert extra[0] == "z"
    wanted = 0.0
    for place, own in enumerate("xxy"):
        others = [document for document in ["x", "x", "y", *extra] if document != own]
        logits = np.array([cosine[place]["xyz".index(document)] for document in [own, *others]])
        wanted += float(np.log(np.exp(logits - logits[0]).sum())) / 3
    assert got == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("task", [examples.EMBEDDING, examples.SIMILARITY])
def test_vectors_of_what_belongs_together_are_drawn_near(tmp_path: Path, task: str) -> None:
    rows = [Example(f"{q}{d}", f"query {q}", f"document {d}", float(q % 4 == d)) for q in range(16) for d in range(4) if q % 4 >= d - 1]
    learner = embedder(task, rows)
    before = learner.validate(rows)
    recipe = Recipe("full", 0.05, epochs=15, batch=8, patience=15)
    found = fit(learner, learner.prepare(rows), rows, recipe, JobContext("j", tmp_path, checkpoint_s=1e9))
    assert before < found.best - 0.1 and found.best > (0.9 if task == examples.EMBEDDING else 0.7)
