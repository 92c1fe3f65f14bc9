"""How good a skill's qualities are: AUROC, ECE, Brier, risk at coverage, as JSON and as one HTML page with both curves drawn in SVG."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from server.core import FloatArray
from server.quality.calibration import MIN_ROWS, BoolArray, Float64Array, expected_error

COVERAGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SIDE, _EDGE = 320, 40  # of a plot, in pixels


@dataclass(slots=True, frozen=True)
class Report:
    """Measures of qualities against judgements. `auroc` and `auroc_interval` (95 %, bootstrap over groups) are None where all were judged
    alike.

    `aurc`: the area under the risk-coverage curve (Geifman and El-Yaniv 2017), less is better; `aurc_best` that of a perfect order.
    `risk`: the share of unacceptable answers among the best `coverage`. `bins`: (mean quality, share acceptable, rows) of equal counts.
    """

    name: str
    rows: int
    acceptable: float
    auroc: float | None
    auroc_interval: tuple[float, float] | None
    ece: float
    brier: float
    aurc: float
    aurc_best: float
    risk: dict[str, float]
    bins: tuple[tuple[float, float, int], ...]


def report(name: str, qualities: FloatArray, acceptable: BoolArray, groups: Sequence[int] | None = None, seed: int = 0) -> Report:
    """Measures qualities float32[n] that were made without their own rows, against bool[n]; `groups` as in `curve.fit_calibration`."""
    q, good = np.asarray(qualities, np.float64), np.asarray(acceptable, bool)
    assert len(q) == len(good) > 0, "a quality for each judged answer"
    risks = _risks(q, good)
    place = np.maximum((np.array(COVERAGES) * len(q)).astype(int), 1) - 1
    return Report(
        name=name,
        rows=len(q),
        acceptable=float(good.mean()),
        auroc=auroc(q, good),
        auroc_interval=_interval(q, good, groups, seed),
        ece=expected_error(qualities, good),
        brier=float(np.mean((q - good) ** 2)),
        aurc=float(risks.mean()),
        aurc_best=float(_risks(good.astype(np.float64), good).mean()),
        risk={f"{c:g}": float(risks[p]) for c, p in zip(COVERAGES, place.tolist(), strict=True)},
        bins=_bins(q, good),
    )


def auroc(scores: npt.ArrayLike, good: BoolArray) -> float | None:
    """The probability that an acceptable answer scores above one that is not, ties counted half; None where there are no two kinds."""
    values = np.asarray(scores, np.float64)
    above = int(good.sum())
    if above in (0, len(good)):
        return None
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((ranks[which][good].sum() - above * (above + 1) / 2) / (above * (len(good) - above)))


def write(reports: Sequence[Report], folder: Path) -> tuple[Path, Path]:
    """quality.json and quality.html in a folder that exists; the page needs nothing from elsewhere."""
    data, page = folder / "quality.json", folder / "quality.html"
    data.write_text(json.dumps([asdict(one) for one in reports], indent=1) + "\n", encoding="utf-8")
    page.write_text(to_html(reports), encoding="utf-8")
    return data, page


def to_html(reports: Sequence[Report]) -> str:
    """The page: for each report its figures, the reliability diagram and the risk-coverage curve."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Quality</title>",
        "<style>body{font:14px sans-serif;margin:2em;max-width:60em}svg{margin:0 2em 1em 0}td,th{padding:2px 10px;text-align:left}</style>",
        "<h1>Quality of answers</h1>",
    ]
    for one in reports:
        parts.append(f"<h2>{html.escape(one.name)}</h2>{_figures(one)}{_reliability(one)}{_risk_coverage(one)}")
    return "\n".join(parts) + "</html>\n"


def _interval(q: Float64Array, good: BoolArray, groups: Sequence[int] | None, seed: int, draws: int = 200) -> tuple[float, float] | None:
    """Percentiles 2.5 and 97.5 of the AUROC over groups drawn with replacement."""
    if not 0 < good.sum() < len(good):
        return None
    _, which = np.unique(np.arange(len(q)) if groups is None else np.asarray(groups), return_inverse=True)
    order = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[order], np.arange(which.max() + 2))
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        drawn = rng.integers(0, len(starts) - 1, len(starts) - 1)
        sizes = starts[drawn + 1] - starts[drawn]
        rows = order[np.repeat(starts[drawn] - np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes) + np.arange(sizes.sum())]
        value = auroc(q[rows], good[rows])
        if value is not None:
            found.append(value)
    return (float(np.percentile(found, 2.5)), float(np.percentile(found, 97.5))) if found else None


def _risks(q: Float64Array, good: BoolArray) -> Float64Array:
    """The share of unacceptable answers among the k best, for k = 1 to n; answers of one quality share their errors evenly."""
    order = np.argsort(-q, kind="stable")
    _, first, counts = np.unique(-q[order], return_index=True, return_counts=True)
    wrong = (~good[order]).astype(np.float64)
    means = np.add.reduceat(wrong, first) / counts
    return np.asarray(np.cumsum(np.repeat(means, counts)) / np.arange(1, len(q) + 1))


def _bins(q: Float64Array, good: BoolArray) -> tuple[tuple[float, float, int], ...]:
    parts = np.array_split(np.argsort(q, kind="stable"), max(min(10, len(q) // MIN_ROWS), 1))
    return tuple((float(q[rows].mean()), float(good[rows].mean()), len(rows)) for rows in parts)


def _figures(one: Report) -> str:
    area = "not defined: all were judged alike"
    if one.auroc is not None and one.auroc_interval is not None:
        area = f"{one.auroc:.3f} ({one.auroc_interval[0]:.3f} to {one.auroc_interval[1]:.3f})"
    rows: Mapping[str, str] = {
        "answers judged": f"{one.rows}, {one.acceptable:.1%} acceptable",
        "AUROC": area,
        "ECE": f"{one.ece:.3f}",
        "Brier": f"{one.brier:.3f}",
        "area under risk-coverage": f"{one.aurc:.3f} (a perfect order: {one.aurc_best:.3f})",
    }
    return "<table>" + "".join(f"<tr><th>{key}<td>{value}" for key, value in rows.items()) + "</table>"


def _reliability(one: Report) -> str:
    dots = "".join(f'<circle cx="{_x(q):.1f}" cy="{_y(share):.1f}" r="4" fill="#06c"/>' for q, share, _ in one.bins)
    line = " ".join(f"{_x(q):.1f},{_y(share):.1f}" for q, share, _ in one.bins)
    ideal = f'<line x1="{_x(0)}" y1="{_y(0)}" x2="{_x(1)}" y2="{_y(1)}" stroke="#999" stroke-dasharray="4"/>'
    return _plot(f'{ideal}<polyline points="{line}" fill="none" stroke="#06c"/>{dots}', "quality", "share acceptable")


def _risk_coverage(one: Report) -> str:
    points = [(float(c), r) for c, r in one.risk.items()]
    line = " ".join(f"{_x(c):.1f},{_y(r):.1f}" for c, r in points)
    dots = "".join(f'<circle cx="{_x(c):.1f}" cy="{_y(r):.1f}" r="3" fill="#c30"/>' for c, r in points)
    return _plot(f'<polyline points="{line}" fill="none" stroke="#c30"/>{dots}', "coverage", "share not acceptable")


def _plot(inner: str, across: str, up: str) -> str:
    full = _SIDE + 2 * _EDGE
    frame = f'<rect x="{_EDGE}" y="{_EDGE}" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="#333"/>'
    marks = "".join(
        f'<text x="{_x(v):.0f}" y="{_y(0) + 16:.0f}" text-anchor="middle">{v:g}</text>'
        f'<text x="{_EDGE - 6}" y="{_y(v) + 4:.0f}" text-anchor="end">{v:g}</text>'
        for v in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    names = f'<text x="{full / 2:.0f}" y="{full - 6}" text-anchor="middle">{across}</text><text x="{_EDGE}" y="{_EDGE - 10}">{up}</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{full}" height="{full}" font-size="11">{frame}{marks}{names}{inner}</svg>'


def _x(value: float) -> float:
    return _EDGE + _SIDE * value


def _y(value: float) -> float:
    return _EDGE + _SIDE * (1 - value)
