"""`python -m trainer train SKILL`: one training run. Exit code 0: published; 3: trained, not better, not published; 1: an error."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

# Read by OpenBLAS when NumPy is first imported. Its threads spin while they wait: beside a busy server on few cores a product of these
# sizes takes thirty times as long with two of them as with one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Its own telemetry setting, before anything imports it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from server.config import Config
    from trainer.report import Report


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="trainer", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train", help="train a skill's student from what the lake holds")
    train.add_argument("skill")
    train.add_argument("--config", help="TOML file, as for the server")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; repeatable")
    train.add_argument("--json", metavar="PATH", help='write the report there as JSON; "-" prints it')
    options = parser.parse_args(arguments)

    from server.config import load_config
    from server.errors import UnderstudyError

    # An end from outside is an exception like any other, so that the job is closed as failed and not left running for ever.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        config = load_config(options.config, flags=dict(_pair(parser, text) for text in options.set))
        with _Bars() as progress:
            report = _run(config, options.skill, progress)
    except UnderstudyError as error:
        print(f"understudy train: {error.message}", file=sys.stderr)
        return 1
    text = json.dumps(asdict(report), indent=2)
    if options.json == "-":
        print(text)
    else:
        print(in_words(report))
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                file.write(text + "\n")
    return 0 if report.state == "succeeded" else 3


def _run(config: Config, skill: str, progress: _Bars) -> Report:
    """One job, from its row in the registry to its end."""
    import tempfile
    from contextlib import suppress
    from pathlib import Path

    from server.errors import UnderstudyError
    from server.registry.registry import Registry
    from trainer.context import JobContext
    from trainer.train import train

    registry = Registry(config.registry)
    job = registry.start_job(skill, "train")
    try:
        with tempfile.TemporaryDirectory(prefix="understudy-job-") as folder:
            report = train(config, skill, JobContext(job, Path(folder), progress=progress), {})
    except BaseException as error:
        text = error.message if isinstance(error, UnderstudyError) else type(error).__name__
        with suppress(UnderstudyError):
            registry.end_job(job, "failed", error=text)
        raise
    registry.end_job(job, report.state, report=asdict(report))
    registry.close()
    return report


def in_words(report: Report) -> str:
    """The report for people."""
    lines = [f"{report.skill}: {report.read} rows read from the lake"]
    lines += [f"  - {count:6d}  {why}" for why, count in sorted(report.dropped.items(), key=lambda item: -item[1])]
    lines.append(f"  = {report.train_rows + report.held_out_rows:6d}  used: {report.train_rows} to train, {report.held_out_rows} held out")
    if report.labels_without_rows:
        lines.append(f"  labels that no row has, and the student cannot give: {', '.join(report.labels_without_rows[:10])}")
    metrics = report.metrics
    lines += [
        f"{report.method} on {report.base}, {report.labels} labels",
        f"  agrees with the teacher on {metrics['accuracy']:.1%} of the held-out rows (calibration error {metrics['ece']:.3f})",
        f"  {metrics['local_share']:.1%} of them reach the bar; of those it agrees on {metrics['local_accuracy']:.1%}",
    ]
    if report.present_accuracy is not None:
        lines.append(f"  the present student, version {report.present_version}, agrees on {report.present_accuracy:.1%}")
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in report.seconds.items())
    lines.append(f"  {seconds}")
    if report.state == "succeeded":
        lines.append(f"published as version {report.version}; a running server takes it over by itself")
    else:
        lines.append(f"not published: {report.reason}")
    return "\n".join(lines)


class _Bars:
    """Progress bars on standard error where a person looks at it, else nothing."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        from rich.progress import TaskID

        self._progress.update(TaskID(self._tasks[stage]), completed=done, total=total)


def _pair(parser: argparse.ArgumentParser, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        parser.error(f"--set {text!r} has no value; expected section.key=value")
    return key.strip(), value


if __name__ == "__main__":
    sys.exit(main())
