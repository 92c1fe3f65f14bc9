"""What a student is judged by: paired tests, the teacher's own accuracy, quality under a teacher that errs. And the card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from server.errors import FailedPrecondition
from server.quality import calibration
from server.quality.calibration import Calibration
from tests.hub_server import hub_server
from trainer import card, evaluate
from trainer.report import Report

LABELS, ROWS = 12, 6000


def world(teacher: float, student: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of a student that knows how sure it may be, the teacher's labels, and the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, LABELS, ROWS)
    hard = rng.random(ROWS) < 2 * (1 - student)  # of hard rows it gets half
    best = np.where(hard & (rng.random(ROWS) < 0.5), (truth + 1 + rng.integers(0, LABELS - 1, ROWS)) % LABELS, truth)
    sure = np.where(hard, rng.uniform(0.3, 0.6, ROWS), rng.uniform(0.9, 0.999, ROWS))
    probabilities = np.repeat(((1 - sure) / (LABELS - 1))[:, None], LABELS, axis=1)
    probabilities[np.arange(ROWS), best] = sure
    wrong = rng.random(ROWS) > teacher
    labels = np.where(wrong, (truth + 1 + rng.integers(0, LABELS - 1, ROWS)) % LABELS, truth)
    return probabilities.astype(np.float32), labels, truth


@pytest.mark.parametrize("teacher", [0.85, 0.91, 1.0])
def test_the_teachers_accuracy_is_found_without_the_truth(teacher: float) -> None:
    probabilities, labels, _ = world(teacher, 0.93)
    assert evaluate.teacher_accuracy(probabilities, labels) == pytest.approx(teacher, abs=0.02)


def test_quality_is_the_probability_of_being_right_and_not_of_agreeing() -> None:
    probabilities, labels, truth = world(0.91, 0.94)
    best = probabilities.argmax(axis=1)
    found, _ = calibration.fit(probabilities, best == labels)
    agreed = found.quality(probabilities)
    assert agreed[best == truth].mean() < 0.92, "by agreement alone even the sure ones look no better than the teacher"
    judged = Calibration(found.weights, found.bias, found.ceiling, found.ece, found.rows, max(found.ceiling, 0.91))
    quality = judged.quality(probabilities)
    delivered = quality >= 0.8
    assert delivered.mean() > 0.85
    assert (best == truth)[delivered].mean() == pytest.approx(quality[delivered].mean(), abs=0.04)
    assert Calibration.from_json(judged.to_json()) == judged
    old = {key: value for key, value in judged.to_json().items() if key != "teacher"}
    assert Calibration.from_json(old).teacher == 1.0


def test_the_paired_test_is_exact() -> None:
    new = np.array([True] * 8 + [False] * 2 + [True] * 50)
    present = np.array([False] * 8 + [True] * 2 + [True] * 50)
    assert evaluate.paired(new, present) == {"gained": 8.0, "lost": 2.0, "p_value": pytest.approx(0.109375)}
    assert evaluate.paired(new, new)["p_value"] == 1.0


def test_tables_of_the_report_count_every_row() -> None:
    given, wanted = ["a", "b", "b", "c", "a"], ["a", "b", "c", "c", "b"]
    assert evaluate.by_label(given, wanted)[0] == {"label": "b", "rows": 2, "accuracy": 0.5}
    assert {(entry["label"], entry["taken_for"]) for entry in evaluate.confused(given, wanted)} == {("c", "b"), ("b", "a")}
    bins = evaluate.reliability(np.linspace(0, 1, 95, dtype=np.float32), np.ones(95, dtype=bool))
    assert sum(entry["rows"] for entry in bins) == 95 and all(entry["kept"] == 1.0 for entry in bins)


def report() -> Report:
    made = Report("intent", "job", version="3", method="lora", base="embedder@1", train_rows=80, held_out_rows=20, labels=3)
    made.metrics = {"accuracy": 0.93, "local_share": 0.95, "ece": 0.01}
    made.sources = {"big": 100}
    return made


def test_a_card_states_results_lineage_licence_and_limits(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    from huggingface_hub import ModelCard

    path = card.write_card(tmp_path, report(), "text-classification", card.Lineage("d1", "f" * 64, 7, "apache-2.0", ("English alone.",)))
    read = ModelCard.load(path)
    assert (read.data.license, read.data.base_model, read.data.pipeline_tag) == ("apache-2.0", "embedder", "text-classification")
    assert {result.metric_type: result.metric_value for result in read.data.eval_results} == {
        "accuracy": 0.93,
        "local_share": 0.95,
        "ece": 0.01,
    }
    for said in ("d1", "f" * 64, "100 rows by `big`", "English alone.", "version 3"):
        assert said in read.text


def test_a_student_is_pushed_to_the_hub_and_a_refusal_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    path = card.write_card(tmp_path / "job", report(), "text-classification", card.Lineage("d1", "f" * 64, 7, "apache-2.0"))
    head = tmp_path / "head"
    head.mkdir()
    (head / "manifest.json").write_text("{}")
    with hub_server() as hub:
        card.push("me/intent", {"head": head}, path, endpoint=hub.endpoint, token="hf_x")
        assert hub.models["me/intent"]["head/manifest.json"] == b"{}" and b"# intent version 3" in hub.models["me/intent"]["README.md"]
        hub.status["/api/models/me/intent/preupload"] = (9, 403, {})
        with pytest.raises(FailedPrecondition, match="me/intent"):
            card.push("me/intent", {"head": head}, path, endpoint=hub.endpoint, token="hf_x")
