"""An answer's quality: the shipped model, findings, files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.core import FinishReason, Task
from server.errors import ModelRejected
from server.quality.curve import Curve
from server.quality.model import COLD_START, QualityModel, cold_start
from server.quality.scorer import INVALID, Observed, names, raw, score

QUESTION = "who got the first nobel prize in physics"
GOOD = "The first Nobel Prize in Physics was awarded to Wilhelm Röntgen in 1901."
REFUSED = "I'm sorry, but as an AI language model I don't have access to this information."


def value(answer: str, prompt: str = QUESTION, **more: Any) -> float:
    found = score(cold_start(), Observed(prompt, answer, **more)).value
    assert found is not None
    return found


def test_the_shipped_model_is_small_sound_and_of_known_origin() -> None:
    assert COLD_START.stat().st_size < 300_000
    model = cold_start()
    assert not model.calibrated and len(model.second) == 5 and model.curve.ece < 0.05
    assert all(data["licence"] == "Apache-2.0" for data in model.about["data"])


def test_the_shipped_model_knows_good_from_bad() -> None:
    good = value(GOOD)
    assert 0.6 < good < 1
    assert value(REFUSED) < good - 0.2
    assert value(GOOD, finish=FinishReason.LENGTH) < good
    assert value(GOOD, agreement=0.0) < value(GOOD, agreement=0.5) < value(GOOD, agreement=0.9)
    assert value("") == value("  \n") == value('{"a": 1', valid=False) == INVALID


def test_a_skill_s_own_curve_calibrates() -> None:
    observed = Observed(QUESTION, GOOD)
    assert not score(cold_start(), observed).calibrated
    own = Curve("platt", (0.0, -1.0), (), 0.01, 500)
    found = score(cold_start(), observed, own)
    assert found.calibrated and found.value == pytest.approx(1 / (1 + np.e), abs=1e-5)
    assert found.features.shape == (len(names()),) and np.isfinite(found.features).all()
    assert np.isfinite(raw(cold_start(), observed))


@pytest.mark.parametrize(
    ("observed", "finding"),
    [
        (Observed(QUESTION, ""), "the answer was empty"),
        (Observed(QUESTION, "The first was", finish=FinishReason.LENGTH), "the answer was cut off"),
        (Observed("as JSON", '{"a": 1,}', valid=False, reason="trailing comma"), "not valid JSON: trailing comma"),
        (Observed("as JSON", '{"a": 1}', valid=False, reason="b is missing"), "not in the form that was asked for: b is missing"),
        (Observed("as JSON", '{"a": 1,}'), "not valid JSON"),
        (Observed(QUESTION, REFUSED), "it refused, or said that it cannot answer"),
        (Observed(QUESTION, "again and again " * 20), "it repeats itself"),
        (Observed("write code", "```py\nprint()"), "a code block is not closed"),
        (Observed(QUESTION, "and then there was a " * 3 + "very long list of things that one might have told about the"), "not finished"),
        (Observed("17 cats sat. 4 left.", "71 cats sat, 4 left.", Task.SUMMARIZATION), "a number that is not in the source: 71"),
        (Observed(QUESTION, GOOD, agreement=0.1), "other answers to the same question say something else"),
    ],
)
def test_findings(observed: Observed, finding: str) -> None:
    found = score(cold_start(), observed).findings
    assert any(finding in one for one in found), found


def test_a_sound_answer_has_no_findings() -> None:
    for observed in (
        Observed(QUESTION, GOOD),
        Observed("1,000 cats", "1000 cats", Task.SUMMARIZATION),
        Observed("x", '{"a": [1]}', valid=True),
    ):
        assert score(cold_start(), observed).findings == ()


def test_hostile_answers_get_a_quality() -> None:
    rows = np.array([np.nan, np.inf, -np.inf, 0], np.float64)
    for text in ("\ud800" * 100, "a" * 2**20, "{" * 10_000, "\0", "```", "１２３" * 99):
        found = score(
            cold_start(),
            Observed(text, text, logprobs=rows.astype(np.float32), margins=rows[::2].astype(np.float32), agreement=float("nan")),
        )
        assert found.value is not None and 0 <= found.value <= 1


def test_a_model_survives_its_file_and_altered_ones_are_refused(tmp_path: Path) -> None:
    model, path = cold_start(), tmp_path / "model.json"
    model.save(path)
    again = QualityModel.load(path)
    assert again.to_json() == json.loads(path.read_text())
    observed = Observed(QUESTION, GOOD, agreement=0.4)
    assert score(again, observed).value == pytest.approx(score(model, observed).value, abs=1e-3)
    data = json.loads(path.read_text())
    change: dict[str, Any]
    for change in ({"bias": 9.0}, {"sha256": "0" * 64}, {"features": {}}, {"about": {"x": 1}}):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ModelRejected):
            QualityModel.load(path)
    for text in ("", "[]", "{", "[" * 100_000, "null"):
        path.write_text(text)
        with pytest.raises(ModelRejected):
            QualityModel.load(path)
    with pytest.raises(ModelRejected):
        QualityModel.load(tmp_path / "missing.json")


def signed(data: dict[str, Any]) -> dict[str, Any]:
    from server.quality.model import _sha256

    content = {key: inner for key, inner in data.items() if key != "sha256"}
    return {**content, "sha256": _sha256(content)}


def test_a_signed_file_of_nonsense_is_refused() -> None:
    data = cold_start().to_json()
    nonsense: list[dict[str, Any]] = [
        {"format": 2}, {"features": {"x": [0, 1, 1]}}, {"hashed": {"scale": 1.0, "steps": "AAAA"}},
        {"hashed": {"scale": 1.0, "steps": "?"}},
        {"second": [1.0]}, {"bias": None}, {"curve": {}}, {"second_curve": {"kind": "x"}}, {"about": 3},
        {"features": {**data["features"], "chars": [0, "x", 1]}},
    ]  # fmt: skip
    for change in nonsense:
        with pytest.raises(ModelRejected):
            QualityModel.from_json(signed({**data, **change}))
    assert QualityModel.from_json(signed(data)).bias == data["bias"]
