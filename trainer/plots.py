"""Plots of a job as SVG text: curves, reliability, what is confused, left out and tried. Without matplotlib there are none."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

_INK, _SECOND, _GRID = "#2158a8", "#d07a16", "#e3e8ee"
_MOST_CURVES = 24
_MOST_BARS = 15
_SIZE = (4.6, 3.0)  # inches
Draw = Callable[[Any], None]


def curves(found: Mapping[str, Sequence[tuple[int, float]]]) -> list[str]:
    """One plot for each group of curves: "lora/loss" and "lora/validation" are of two groups, since their scales differ."""
    drawn = {name: points for name, points in found.items() if len(points) > 1}
    return [plot(name, "step", "", _curve(points)) for name, points in list(drawn.items())[:_MOST_CURVES]] if _can() else []


def of_report(report: Mapping[str, Any]) -> list[str]:
    """The plots of what a report holds; of parts that it lacks there are none."""
    if not _can():
        return []
    details = report.get("details") or {}
    found: list[str] = []
    if (bins := _entries(details, "reliability", "promised", "kept")) is not None:
        found.append(plot("Reliability of the quality", "promised", "kept", _reliability(bins)))
    if (pairs := _entries(details, "confused", "label", "taken_for", "rows")) is not None:
        found.append(
            _bars("Taken for one another most", [(f"{one['label']} → {one['taken_for']}", one["rows"]) for one in pairs], "held-out rows")
        )
        found.append(plot("Confusion of those labels", "taken for", "label", _confusion(pairs)))
    if (labels := _entries(details, "by_label", "label", "accuracy")) is not None:
        found.append(_bars("Labels that go worst", [(one["label"], one["accuracy"]) for one in labels], "agrees on", limit=1.0))
    if dropped := report.get("dropped"):
        found.append(_bars("Rows left out", sorted(dropped.items(), key=lambda item: -item[1]), "rows"))
    tried = [one for one in report.get("tried") or () if isinstance(one.get("accuracy"), int | float)]
    if tried:
        bars = [(str(one["method"]), float(one["accuracy"])) for one in tried]
        if report.get("present_accuracy") is not None:
            bars.append((f"present, {report.get('present_version', '')}", float(report["present_accuracy"])))
        found.append(_bars("Agreement with the teacher", bars, "of held-out rows", limit=1.0))
    return found


def plot(title: str, x: str, y: str, draw: Draw, *, size: tuple[float, float] = _SIZE) -> str:
    """An SVG element. Text stays text, and nothing in it depends on the time or on chance."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "font.family": "sans-serif", "axes.axisbelow": True}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(color=_GRID)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)


def _can() -> bool:
    return find_spec("matplotlib") is not None


def _entries(details: Any, name: str, *keys: str) -> list[Mapping[str, Any]] | None:
    """The entries of a table of details that has these columns, or None."""
    found = details.get(name) if isinstance(details, Mapping) else None
    if not isinstance(found, list) or not found or not all(isinstance(one, Mapping) and set(keys) <= set(one) for one in found):
        return None
    return found


def _curve(points: Sequence[tuple[int, float]]) -> Draw:
    def draw(axes: Any) -> None:
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(steps, values, color=_INK, linewidth=1.3, marker="." if len(points) < 40 else None)

    return draw


def _reliability(bins: Sequence[Mapping[str, Any]]) -> Draw:
    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color="#8a94a2", linestyle=":", linewidth=1)
        axes.plot([one["promised"] for one in bins], [one["kept"] for one in bins], color=_INK, marker="o", linewidth=1.2)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)

    return draw


def _confusion(pairs: Sequence[Mapping[str, Any]]) -> Draw:
    """A matrix of the labels that occur in the pairs; the cells count held-out rows."""
    names = list(dict.fromkeys(str(name) for one in pairs for name in (one["label"], one["taken_for"])))[:_MOST_BARS]

    def draw(axes: Any) -> None:
        cells = [[0.0] * len(names) for _ in names]
        for one in pairs:
            if one["label"] in names and one["taken_for"] in names:
                cells[names.index(one["label"])][names.index(one["taken_for"])] += one["rows"]
        axes.grid(visible=False)
        axes.imshow(cells, cmap="Blues", aspect="auto")
        axes.set_xticks(range(len(names)), [_cut(name, 14) for name in names], rotation=90, fontsize=6)
        axes.set_yticks(range(len(names)), [_cut(name, 22) for name in names], fontsize=6)

    return draw


def _bars(title: str, bars: Sequence[tuple[str, float]], unit: str, *, limit: float | None = None) -> str:
    shown = list(reversed(bars[:_MOST_BARS]))

    def draw(axes: Any) -> None:
        axes.barh(range(len(shown)), [value for _, value in shown], color=_SECOND if limit is None else _INK, height=0.7)
        axes.set_yticks(range(len(shown)), [_cut(str(name), 34) for name, _ in shown], fontsize=7)
        if limit is not None:
            axes.set_xlim(0, limit)
        for place, (_, value) in enumerate(shown):
            axes.annotate(f" {value:.3g}", (value, place), va="center", fontsize=7)

    return plot(title, unit, "", draw, size=(_SIZE[0], max(1.6, 0.22 * len(shown) + 0.9)))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
