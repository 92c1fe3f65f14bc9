"""A run of the flywheel as a picture: who answered, how well, for how much and how fast, day by day."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.flywheel import Day, Outcome

_LOCAL, _CALLERS, _TEACHER, _STUDENT, _COST = "#1f77b4", "#2ca02c", "#7f7f7f", "#9467bd", "#d62728"


def draw(outcome: Outcome, path: Path, *, turn: int | None = None) -> None:
    """Writes an SVG, the same for the same figures; `turn` marks the day on which something changed."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "understudy", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 1, figsize=(8.0, 9.5), sharex=True)
    days = outcome.days
    for axis, paint in zip(axes, (_shares, _accuracies, _costs, _latencies), strict=True):
        paint(axis, days)
        axis.grid(alpha=0.3)
        axis.legend(loc="best", fontsize=8, frameon=False)
        if turn is not None:
            axis.axvline(turn - 0.5, color="black", linewidth=0.8, linestyle=":")
    axes[0].set_title(f"{outcome.name}: Banking77's training texts as ten days of requests; the API model is a SIMULATION", fontsize=9)
    axes[-1].set_xlabel("day")
    axes[-1].set_xticks([day.number for day in days])
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def _shares(axis: Any, days: list[Day]) -> None:
    numbers = [day.number for day in days]
    axis.bar(numbers, [100 * day.local_share for day in days], color=_LOCAL, alpha=0.75, label="answered locally")
    for day in days:
        axis.text(day.number, 3, f"{day.stage} v{day.student}" if day.student else day.stage or "no student", ha="center", rotation=90)
    axis.set_ylim(0, 100)
    axis.set_ylabel("% of requests")


def _accuracies(axis: Any, days: list[Day]) -> None:
    numbers = [day.number for day in days]
    axis.plot(numbers, [100 * day.teacher_accuracy for day in days], color=_TEACHER, marker="s", label="teacher alone")
    axis.plot(numbers, [100 * day.accuracy for day in days], color=_CALLERS, marker="o", label="what callers got")
    known = [day for day in days if day.probe is not None]
    axis.plot(
        [day.number for day in known], [100 * (day.probe or 0) for day in known], color=_STUDENT, marker="^", label="student, test texts"
    )
    axis.set_ylabel("% right (gold labels)")


def _costs(axis: Any, days: list[Day]) -> None:
    numbers = [day.number for day in days]
    axis.bar(numbers, [day.usd_alone * 1e3 for day in days], color=_TEACHER, alpha=0.4, label="teacher alone")
    axis.bar(numbers, [day.usd * 1e3 for day in days], color=_COST, alpha=0.8, label="paid, comparisons included")
    axis.set_ylabel("10⁻³ US dollars")


def _latencies(axis: Any, days: list[Day]) -> None:
    numbers = [day.number for day in days]
    axis.plot(numbers, [day.p50_ms for day in days], color=_TEACHER, marker="s", label="p50, all")
    axis.plot(numbers, [day.p95_ms for day in days], color=_TEACHER, linestyle="--", label="p95, all")
    known = [day for day in days if day.local_p50_ms is not None]
    axis.plot([day.number for day in known], [day.local_p50_ms for day in known], color=_LOCAL, marker="o", label="p50, local")
    axis.set_yscale("log")
    axis.set_ylabel("ms")
