"""Curves from score to probability, bars that mean an accepted-error rate, and reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.errors import ModelRejected, TooLittleData
from server.quality.calibration import expected_error
from server.quality.curve import Curve, bar_for, fit_calibration, upper_bound
from server.quality.report import auroc, report, to_html, write


def scored(rows: int, seed: int, shape: str = "logistic") -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=rows)
    truth = 1 / (1 + np.exp(-2 * x - 0.5)) if shape == "logistic" else np.where(x > 0, 0.9, 0.4)
    return x * 7 + 3, rng.random(rows) < truth


@pytest.mark.parametrize(("shape", "kind"), [("logistic", "platt"), ("steps", "isotonic")])
def test_the_better_kind_is_chosen_and_holds_on_new_rows(shape: str, kind: str) -> None:
    curve, crossed = fit_calibration(*scored(3000, 0, shape))
    assert curve.kind == kind and curve.ece < 0.05 and crossed.shape == (3000,)
    x, good = scored(20_000, 1, shape)
    assert expected_error(curve.quality(x), good) < 0.03
    assert (np.diff(curve.quality(np.sort(x))) >= 0).all()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_labels_of_one_kind_give_finite_curves(share: float) -> None:
    curve, crossed = fit_calibration(np.arange(100.0), np.full(100, bool(share)))
    assert np.isfinite(crossed).all() and abs(float(curve.quality(50.0)) - share) < 0.1
    assert Curve.from_json(json.loads(json.dumps(curve.to_json()))) == curve


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(TooLittleData):
        fit_calibration(np.arange(10.0), np.ones(10, bool))


def test_groups_stay_together() -> None:
    """Rows of a group are copies: apart, isotonic regression would learn them by heart."""
    rng = np.random.default_rng(3)
    x, good = np.repeat(rng.normal(size=200), 10), np.repeat(rng.random(200) < 0.5, 10)
    _, crossed = fit_calibration(x, good, np.repeat(np.arange(200), 10).tolist())
    found = auroc(crossed, good)
    assert found is not None and found < 0.6


def test_broken_curves_are_refused() -> None:
    good = Curve("isotonic", (0.0, 1.0), (0.2, 0.9), 0.01, 100).to_json()
    change: dict[str, Any]
    for change in ({"ys": [0.9, 0.2]}, {"xs": [0]}, {"kind": "spline"}, {"ece": None}, {"ys": [0.1, float("nan")]}, {"xs": [], "ys": []}):
        with pytest.raises(ModelRejected):
            Curve.from_json({**good, **change})
    with pytest.raises(ModelRejected):
        Curve.from_json({})


def test_the_bound_is_clopper_and_pearson_s() -> None:
    assert upper_bound(0, 59, 0.95) == pytest.approx(1 - 0.05 ** (1 / 59), abs=1e-9)
    assert upper_bound(5, 100, 0.95) == pytest.approx(0.10225, abs=1e-4)
    assert upper_bound(3, 3, 0.95) == 1


def test_a_bar_keeps_what_it_promises() -> None:
    """Over many draws the true error among accepted answers is above the promise no more often than the confidence allows."""
    broken = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        q = rng.random(2000).astype(np.float32)
        bar = bar_for(q, rng.random(2000) < q, 0.2)
        assert bar.error <= bar.error_bound <= 0.2
        broken += bar.threshold <= 1 and (1 - bar.threshold) / 2 > 0.2  # mean error of q uniform above the bar
    assert broken <= 8
    assert bar.coverage > 0.25


def test_no_bar_where_none_is_safe() -> None:
    q = np.full(1000, 0.9, np.float32)
    bar = bar_for(q, np.arange(1000) % 2 == 0, 0.1)
    assert bar.threshold > 1 and bar.coverage == 0
    assert bar_for(q, np.ones(1000, bool), 0.1).coverage == 1
    assert bar_for(q[:5], np.ones(5, bool), 0.1).threshold > 1, "five answers prove nothing"


def test_a_report_and_its_page(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    q = rng.random(2000).astype(np.float32)
    found = report("my <skill>", q, rng.random(2000) < q, groups=(np.arange(2000) // 4).tolist())
    assert found.auroc is not None and found.auroc_interval is not None
    assert found.auroc == pytest.approx(5 / 6, abs=0.03)
    assert found.auroc_interval[0] < found.auroc < found.auroc_interval[1]
    assert (
        found.ece < 0.05
        and found.aurc_best < found.aurc < 1 - found.acceptable
        and list(found.risk.values()) == sorted(found.risk.values())
    )
    assert auroc([1, 1, 2], np.array([True, False, True])) == pytest.approx(0.75)
    alike = report("alike", q, np.ones(2000, bool))
    assert alike.auroc is None and alike.auroc_interval is None
    data, page = write([found, alike], tmp_path)
    assert json.loads(data.read_text())[0]["rows"] == 2000
    text = page.read_text()
    assert "&lt;skill&gt;" in text and text.count("<svg") == 4 and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert to_html([]).startswith("<!doctype")
