"""A job's page: one HTML file with everything in it, plots included, and the same as JSON.

It loads nothing from anywhere: the plots are SVG in the text. Without matplotlib the figures are there as tables alone.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.registry.jobs import Job, JobError, Point
from trainer import plots

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; background: #fff }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dee6 }
table { border-collapse: collapse; margin: .6rem 0 } th { text-align: left; font-weight: 600 }
td, th { padding: .2rem .9rem .2rem 0; vertical-align: top } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.state { display: inline-block; padding: .1rem .6rem; border-radius: 1rem; color: #fff }
.succeeded { background: #1a7f4b } .rejected { background: #a86400 } .failed { background: #b3261e } .cancelled { background: #5f6b7a }
.meta { color: #5f6b7a } .plots { display: flex; flex-wrap: wrap; gap: 1rem } .plots svg { max-width: 100%; height: auto }
pre { background: #f4f6f8; padding: .7rem; overflow-x: auto; white-space: pre-wrap }
"""
_MOST_CELLS = 60  # rows of a table of details
_PLAIN = ("skill", "job", "state", "reason", "version", "method", "base", "model", "read", "train_rows", "held_out_rows", "labels")


def write_page(folder: Path, job: Job, state: str, report: Mapping[str, Any], error: JobError | None, points: Sequence[Point]) -> None:
    """Writes report.json and report.html into the job's folder, each whole or not at all."""
    document: dict[str, Any] = {"job": job.id, "skill": job.skill, "kind": job.kind, "state": state, "spec": dict(job.spec)}
    document |= {"attempt": job.attempt, "create_ms": job.create_ms, "start_ms": job.start_ms, "report": dict(report)}
    document |= {"error": asdict(error) if error is not None else None, "curves": curves(points)}
    _replace(folder / "report.json", json.dumps(document, indent=1, default=str))
    _replace(folder / "report.html", page(document))


def curves(points: Sequence[Point]) -> dict[str, list[tuple[int, float]]]:
    """Points by curve, in the order of steps."""
    found: dict[str, list[tuple[int, float]]] = {}
    for point in points:
        found.setdefault(point.name, []).append((point.step, point.value))
    return {name: sorted(steps) for name, steps in sorted(found.items())}


def page(document: Mapping[str, Any]) -> str:
    """The page of what report.json holds."""
    title = f"{document['skill']}: {document['kind']} job {document['job'][:12]}"
    body = "\n".join(_sections(document))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body>\n<h1>{_text(title)}</h1>\n{body}\n</body></html>\n"


def _sections(document: Mapping[str, Any]) -> Iterator[str]:
    report, state = document["report"], document["state"]
    yield f'<p><span class="state {state}">{state}</span> <span class="meta">{_text(_times(document))}</span></p>'
    if document["error"]:
        yield f"<pre>{_text(document['error']['reason'])}: {_text(document['error']['message'])}</pre>"
    if report.get("reason"):
        yield f"<p>Not published: {_text(report['reason'])}</p>"
    asked = {f"asked for {key}": value for key, value in document["spec"].items()}
    known = {
        key.replace("_", " "): report[key] for key in _PLAIN if report.get(key) not in (None, "", 0, 0.0) and key not in ("job", "reason")
    }
    yield _pairs({**known, **asked})
    if report.get("metrics"):
        yield "<h2>Measured on held-out rows, with the files that are served</h2>" + _pairs(report["metrics"])
        yield _comparison(report)
    if report.get("tried"):
        yield "<h2>What was tried</h2>" + _rows([_short(one) for one in report["tried"]])
    drawn = [*plots.curves(document["curves"]), *plots.of_report(report)]
    if drawn:
        yield '<h2>Curves and figures</h2><div class="plots">' + "\n".join(drawn) + "</div>"
    if report.get("dropped"):
        yield f"<h2>{report.get('read', 0)} rows were read; left out were</h2>" + _pairs(report["dropped"])
    for name, value in _tables(report):
        yield f"<h2>{_text(name)}</h2>{value}"
    if report.get("seconds"):
        yield "<h2>Seconds by stage</h2>" + _pairs(report["seconds"])
    if report.get("card"):
        yield f"<h2>Model card</h2><pre>{_text(report['card'])}</pre>"


def _times(document: Mapping[str, Any]) -> str:
    made = datetime.fromtimestamp(document["create_ms"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    again = f", attempt {document['attempt']}" if document["attempt"] > 1 else ""
    return f"made {made}{again}"


def _comparison(report: Mapping[str, Any]) -> str:
    """The new student beside the present one and the teacher's own ceiling, where they are known."""
    metrics = report["metrics"]
    rows = [{"": "this student", "agrees with the teacher": metrics.get("accuracy")}]
    if report.get("present_accuracy") is not None:
        rows.append(
            {"": f"present student, version {report.get('present_version')}", "agrees with the teacher": report["present_accuracy"]}
        )
    return _rows(rows) if len(rows) > 1 else ""


def _tables(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the methods tell of themselves: lists of alike entries as tables, the rest as pairs."""
    for part in ("details", "parameters", "curation"):
        found = report.get(part)
        if not isinstance(found, Mapping):
            continue
        plain = {key: value for key, value in found.items() if not isinstance(value, list | Mapping)}
        if plain:
            yield part, _pairs(plain)
        for key, value in found.items():
            if isinstance(value, Mapping) and value:
                yield f"{part}: {key}".replace("_", " "), _pairs(value)
            elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
                yield f"{part}: {key}".replace("_", " "), _rows(value)
            elif isinstance(value, list) and value:
                yield f"{part}: {key}".replace("_", " "), f"<p>{_text(', '.join(map(str, value[:_MOST_CELLS])))}</p>"


def _short(one: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `tried` in one line: its own numbers, and those of the tables in it."""
    found: dict[str, Any] = {}
    for key, value in one.items():
        if isinstance(value, Mapping):
            found |= {name: inner for name, inner in value.items() if not isinstance(inner, list | Mapping)}
        elif not isinstance(value, list):
            found[key] = value
    return found


def _pairs(values: Mapping[str, Any]) -> str:
    lines = [f"<tr><th>{_text(key)}</th>{_cell(value)}</tr>" for key, value in list(values.items())[:_MOST_CELLS]]
    return f"<table>{''.join(lines)}</table>" if lines else ""


def _rows(entries: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for entry in entries for key in entry))
    head = "".join(f"<th>{_text(column.replace('_', ' '))}</th>" for column in columns)
    lines = ["".join(_cell(entry.get(column, "")) for column in columns) for entry in entries[:_MOST_CELLS]]
    more = f"<p class='meta'>and {len(entries) - _MOST_CELLS} more in report.json</p>" if len(entries) > _MOST_CELLS else ""
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>{more}"


def _cell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return f"<td>{'' if value is None else 'yes' if value else 'no'}</td>"
    if isinstance(value, int | float):
        return f'<td class="n">{value:.4g}</td>' if isinstance(value, float) else f'<td class="n">{value:,}</td>'
    said = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | Mapping) else value
    return f"<td>{_text(said)}</td>"


def _text(value: object) -> str:
    return html.escape(str(value))


def _replace(file: Path, text: str) -> None:
    draft = file.with_name(f".{file.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)
