"""`python -m trainer.curate curate|export SKILL`: what curation makes of the lake's rows, as a report or as a file. Nothing is trained."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

# As in trainer.__main__: threads of BLAS that spin take the cores from a server nearby, and ONNX Runtime reports to nobody.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from server.config import Config
    from trainer.curate.rows import Curated

FORMATS = ("openai", "sharegpt", "alpaca", "kto", "dpo", "jsonl")
PARTS = ("train", "held_out", "all")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = _parser().parse_args(arguments)

    from server.config import load_config
    from server.errors import UnderstudyError

    try:
        flags = dict(_pair(text) for text in options.set)
        config = load_config(options.config, flags=flags)
        curated = _curated(config, options.skill)
        return _report(curated, options) if options.verb == "curate" else _export(config, curated, options)
    except (UnderstudyError, ValueError) as error:
        print(f"understudy {options.verb}: {getattr(error, 'message', error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trainer.curate", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    curate = verbs.add_parser("curate", help="say which rows would be learnt from, and why the others would not")
    export = verbs.add_parser("export", help="write the rows as a file for other trainers")
    export.add_argument("--format", choices=FORMATS, default="openai")
    export.add_argument("--part", choices=PARTS, default="train")
    export.add_argument("--out", type=Path, required=True)
    for one in (curate, export):
        one.add_argument("skill")
        one.add_argument("--config", help="TOML file, as for the server")
        one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; repeatable")
        one.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return parser


def _curated(config: Config, skill: str) -> Curated:
    from rich.console import Console
    from rich.progress import Progress

    from server.registry.registry import Registry
    from trainer.context import JobContext
    from trainer.curate.pipeline import curate

    registry = Registry(config.registry)
    bars = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    tasks: dict[str, Any] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    try:
        with bars, tempfile.TemporaryDirectory() as folder:
            return curate(config, skill, JobContext("", Path(folder), progress=progress), registry)
    finally:
        registry.close()


def _report(curated: Curated, options: argparse.Namespace) -> int:
    report = curated.report()
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, side in (("step", "left"), ("rows", "right"), ("dropped", "right"), ("why", "left"), ("seconds", "right")):
        table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    for step in report["steps"]:
        reasons = sorted(step["dropped"].items(), key=lambda item: -item[1]) or [("", "")]
        notes = "; ".join(f"{key}: {value}" for key, value in step["notes"].items())
        for number, (why, count) in enumerate(reasons):
            first = number == 0
            example = f"  e.g. {step['examples'][why][0]}" if step["examples"].get(why) else ""
            shown = f"{step['seconds']:.2f}" if first else ""
            table.add_row(step["name"] if first else "", str(step["after"]) if first else "", str(count), f"{why or notes}{example}", shown)
        if notes and reasons[0][0]:
            table.add_row("", "", "", notes, "")
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)
    print(
        f"{options.skill}: {report['read']} rows read, {report['kept']} kept: {report['train_rows']} to train on, "
        f"{report['held_out_rows']} held out; {report['corrected_rows']} were corrected by people"
    )
    print("answers by: " + (", ".join(f"{who} {count}" for who, count in report["sources"].items()) or "nobody"))
    return 0


def _export(config: Config, curated: Curated, options: argparse.Namespace) -> int:
    from server.routing.skills import read_skill
    from trainer.curate import files

    skill = read_skill(options.skill, config.skills[options.skill])
    done = files.write(options.out, curated.rows, skill, options.format, options.part)
    if options.json:
        print(json.dumps({"out": str(done.path), "lines": done.lines, "rows": done.rows, "skipped": done.skipped, **curated.report()}))
    else:
        more = f"; {done.skipped} rows have nothing for this format" if done.skipped else ""
        print(f"{done.path}: {done.lines} lines of {done.rows} rows of {curated.read} read{more}")
    return 0


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text!r} has no value; expected section.key=value")
    return key.strip(), value


if __name__ == "__main__":
    sys.exit(main())
