"""`python -m trainer work` works on jobs, `python -m trainer train SKILL` runs one at once.

Exit codes of train: 0: published; 3: trained, not better, not published; 1: an error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

# Read by OpenBLAS when NumPy is first imported. Its threads spin while they wait: beside a busy server on few cores a product of these
# sizes takes thirty times as long with two of them as with one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Read by OpenMP, torch's threads, for the same reason.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Its own telemetry setting, before anything imports it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from trainer.endings import keep_swig_types

if TYPE_CHECKING:
    from server.config import Config
    from trainer.report import Report
    from trainer.work import Ended

REJECTED_CODE = 3


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)

    from server.config import load_config
    from server.errors import UnderstudyError

    try:
        config = load_config(options.config, flags=dict(_pair(parser, text) for text in options.set))
        return _work(config, options) if options.verb == "work" else _train(config, options)
    except UnderstudyError as error:
        print(f"understudy {options.verb}: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        keep_swig_types()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trainer", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train", help="train a skill's student from what the lake holds, here and now")
    train.add_argument("skill")
    train.add_argument("--kind", default="train", help="train, assess or finetune")
    train.add_argument("--spec", default="{}", metavar="JSON", help='what the job does otherwise than the skill says: {"method": "lora"}')
    train.add_argument("--json", metavar="PATH", help='write the report there as JSON; "-" prints it')
    work = verbs.add_parser("work", help="work on the jobs of the registry, and make those that schedules ask for, until SIGTERM")
    work.add_argument("--once", action="store_true", help="end when no job is left")
    for one in (train, work):
        one.add_argument("--config", help="TOML file, as for the server")
        one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; repeatable")
    return parser


def _work(config: Config, options: argparse.Namespace) -> int:
    from server.logs import configure
    from trainer.work import Worker

    configure(config.log)
    worker = Worker(config)

    def on_signal(number: int, _frame: object) -> None:
        worker.stop()
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once; its lease will tell the others

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    worker.work(once=options.once)
    return 0


def _train(config: Config, options: argparse.Namespace) -> int:
    # An end from outside is an exception like any other, so that the job is closed and not left running for ever.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with _Bars() as progress:
        ended = _run(config, options, progress)
    if ended.report is None:
        said = ended.error.message if ended.error is not None else f"job {ended.job} was {ended.state}"
        print(f"understudy train: {said}", file=sys.stderr)
        return 1
    text = json.dumps(ended.report.to_json(), indent=2)
    if options.json == "-":
        print(text)
    else:
        print(in_words(ended.report))
        print(f"job {ended.job}; its page: {config.training.path}/{ended.job}/report.html")
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                file.write(text + "\n")
    return 0 if ended.state == "succeeded" else REJECTED_CODE


def _run(config: Config, options: argparse.Namespace, progress: _Bars) -> Ended:
    """One job, from its row in the registry to its end."""
    from server.registry.job_requests import checked_spec
    from server.registry.jobs import JobStore
    from server.registry.registry import Registry
    from trainer.work import new_holder, run_job

    spec = checked_spec(config, options.skill, options.kind, json.loads(options.spec))
    registry, holder = Registry(config.registry), new_holder()
    store = JobStore(registry)
    try:
        job = store.begin(options.skill, options.kind, spec, holder, config.training.lease_s)
        return run_job(config, store, job, threading.Event(), progress)
    except BaseException:  # a signal; whoever ran it by hand does not want another trainer to take it up
        store.abandon(holder)
        raise
    finally:
        registry.close()


def in_words(report: Report) -> str:
    """The report for people."""
    lines = [f"{report.skill}: {report.read} rows read from the lake"]
    lines += [f"  - {count:6d}  {why}" for why, count in sorted(report.dropped.items(), key=lambda item: -item[1])]
    lines.append(f"  = {report.train_rows + report.held_out_rows:6d}  used: {report.train_rows} to train, {report.held_out_rows} held out")
    if report.labels_without_rows:
        lines.append(f"  labels that no row has, and the student cannot give: {', '.join(report.labels_without_rows[:10])}")
    lines.append(f"{report.method} on {report.base}" + (f", {report.labels} labels" if report.labels else ""))
    lines += _figures(report.metrics)
    if report.present_accuracy is not None:
        lines.append(f"  the present student, version {report.present_version}, agrees on {report.present_accuracy:.1%}")
    lines.append("  " + ", ".join(f"{stage} {value:.1f} s" for stage, value in report.seconds.items()))
    if report.state == "succeeded":
        lines.append(f"published as version {report.version}; a running server takes it over by itself")
    else:
        lines.append(f"not published: {report.reason}")
    return "\n".join(lines)


def _figures(metrics: dict[str, float]) -> list[str]:
    if not {"accuracy", "ece", "local_share", "local_accuracy"} <= set(metrics):
        return [f"  {name} {value:.4g}" for name, value in sorted(metrics.items())]
    return [
        f"  agrees with the teacher on {metrics['accuracy']:.1%} of the held-out rows (calibration error {metrics['ece']:.3f})",
        f"  {metrics['local_share']:.1%} of them reach the bar; of those it agrees on {metrics['local_accuracy']:.1%}",
    ]


class _Bars:
    """Progress bars on standard error where a person looks at it, else nothing."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)


def _pair(parser: argparse.ArgumentParser, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        parser.error(f"--set {text!r} has no value; expected section.key=value")
    return key.strip(), value


if __name__ == "__main__":
    sys.exit(main())
