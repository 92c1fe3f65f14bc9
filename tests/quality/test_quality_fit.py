"""Fitting a quality model on judged answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from server.errors import TooLittleData
from server.quality.model import QualityModel
from server.quality.report import auroc
from server.quality.scorer import Observed, score
from trainer.quality import Judged, fit, judged_of, main, with_priors, with_support

CITIES = ["Lyon", "Paris", "Oslo", "Turin", "Graz", "Kyiv"]


def answers(questions: int, seed: int) -> list[Judged]:
    """Three answers a question; those that refuse are wrong, and wrong names are scattered while right ones agree."""
    rng = np.random.default_rng(seed)
    rows = []
    for group in range(questions):
        truth = str(rng.choice(CITIES))
        for _ in range(3):
            good = bool(rng.random() < 0.65)
            refuses = not good and rng.random() < 0.5
            name = truth if good else str(rng.choice([c for c in CITIES if c != truth]))
            text = "I'm sorry, I don't know." if refuses else f"It is {name}, I think, in the year {rng.integers(1000, 2000)}."
            rows.append(Judged(Observed(f"Where did case {group} take place?", text), good, group))
    return rows


def test_a_fit_learns_and_is_calibrated_on_answers_that_it_did_not_see() -> None:
    judged = with_support(answers(400, 0))
    fitted = fit(judged, bits=10, calibrated=True)
    good = np.array([j.acceptable for j in judged])
    alone, agreed = auroc(fitted.alone, good), auroc(fitted.agreed, good)
    assert alone is not None and agreed is not None and alone > 0.7 and agreed > alone
    model = fitted.model
    assert model.calibrated and model.curve.ece < 0.06 and model.second_curve is not None and model.second_curve.ece < 0.12
    fresh = with_support(answers(100, 1))
    values = np.array([score(model, j.observed).value for j in fresh], np.float32)
    found = auroc(values, np.array([j.acceptable for j in fresh]))
    assert found is not None and found > 0.75


def test_without_other_answers_there_is_no_second_step() -> None:
    fitted = fit(answers(100, 2), bits=8)
    assert len(fitted.agreed) == 0 and len(fitted.model.second) == 0
    one = answers(1, 3)[0].observed
    assert score(fitted.model, replace(one, agreement=0.0)).value == score(fitted.model, one).value


def test_priors_touch_only_what_was_never_seen() -> None:
    model = with_priors(fit(answers(60, 4), bits=8).model, {"cut": -1.0, "refusal": -9.0})
    assert model.about["priors"] == {"cut": -1.0}


def test_too_little_data_is_refused() -> None:
    with pytest.raises(TooLittleData):
        fit(answers(5, 0))
    with pytest.raises(TooLittleData):
        fit([replace(j, acceptable=True) for j in answers(100, 0)])


def test_the_command_writes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "judged.jsonl", tmp_path / "model.json"
    lines = [{"question": j.observed.prompt, "answer": j.observed.answer, "acceptable": j.acceptable} for j in answers(60, 5)]
    data.write_text("\n".join(map(json.dumps, lines)))
    assert main([str(data), "--out", str(out), "--bits", "8", "--names", '{"prompt": "question"}', "--about", '{"data": []}']) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 180
    assert QualityModel.load(out).about == {"data": []}
    data.write_text(json.dumps(lines[0]))
    assert main([str(data), "--out", str(out), "--names", '{"prompt": "question"}']) == 1


def test_rows_of_files_become_groups() -> None:
    rows = judged_of([{"prompt": p, "answer": None, "acceptable": ok} for p, ok in (("a", "yes"), ("b", False), ("a", 1))])
    assert [r.group for r in rows] == [0, 1, 0] and [r.acceptable for r in rows] == [True, False, True]
