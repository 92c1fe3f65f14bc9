"""`understudy jobs ...`: the trainer's jobs, in the configured registry or through a running server."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.commands.shared import JsonOption, new_table, show
from server.commands.training import KINDS, STATES, ConfigOption, ServerOption, SetOption, as_json, flags, name_of, training, when
from server.errors import InvalidArgument
from understudy.v1 import training_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from understudy.v1 import training_pb2

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="The trainer's jobs.")
JobArgument = Annotated[str, typer.Argument(help="The job's id, or as much of its beginning as no other has.")]


@app.command(name="list")
def list_jobs(
    skill: Annotated[str, typer.Option(help="Jobs of this skill alone.")] = "",
    state: Annotated[list[str] | None, typer.Option(help="Jobs in this state alone; repeatable.")] = None,
    limit: Annotated[int, typer.Option(help="Most to show.", min=1, max=1000)] = 20,
    server: ServerOption = "",
    config: ConfigOption = None,
    settings: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Shows jobs, the newest first."""
    states = [_state(word) for word in state or ()]
    wanted = pb.ListTrainingJobsRequest(page_size=limit, skill=f"skills/{skill}" if skill else "", states=states)
    with training(server, config, settings) as desk:
        found = desk.ListTrainingJobs(wanted)
    if json:
        typer.echo(as_json(found))
        return
    if not found.training_jobs:
        typer.echo("No jobs. Make one: understudy train SKILL --detach")
        return
    table = new_table("job", "skill", "kind", "state", "made (UTC)", "seconds", "what came of it")
    for job in found.training_jobs:
        table.add_row(job.name.partition("/")[2][:12], job.skill.partition("/")[2], *_row(job))
    show(table)


@app.command(name="show")
def show_job(
    job: JobArgument, server: ServerOption = "", config: ConfigOption = None, settings: SetOption = None, json: JsonOption = False
) -> None:
    """Shows one job: what was asked, how far it is, what came of it."""
    with training(server, config, settings) as desk:
        found = desk.GetTrainingJob(pb.GetTrainingJobRequest(name=name_of(desk, job))).training_job
    if json:
        typer.echo(as_json(found))
        return
    typer.echo(f"job      {found.name.partition('/')[2]}")
    typer.echo(
        f"skill    {found.skill.partition('/')[2]}, {KINDS[found.kind]}{f', {found.method}' if found.method else ''}, seed {found.seed}"
    )
    state, made, seconds, outcome = _row(found)[1:]
    typer.echo(
        f"state    {state}{f', attempt {found.attempt}' if found.attempt > 1 else ''}, made {made}{f', {seconds} s' if seconds else ''}"
    )
    for stage in found.progress:
        typer.echo(f"         {stage.stage}: {stage.done} of {stage.total}")
    if outcome:
        typer.echo(f"outcome  {outcome}")
    for name, value in sorted(found.metrics.items()):
        typer.echo(f"         {name} {value:.4g}")


@app.command()
def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Goes on until the job ends.")] = False,
    after: Annotated[int, typer.Option(help="Begins after this line's number.", min=0)] = 0,
    server: ServerOption = "",
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Prints what a job said."""
    with training(server, config, settings) as desk:
        request = pb.StreamTrainingJobLogsRequest(name=name_of(desk, job), after=after, no_follow=not follow)
        for response in desk.StreamTrainingJobLogs(request):
            for line in response.lines:
                typer.echo(f"{when(line.time)}  {line.text}")


@app.command()
def cancel(job: JobArgument, server: ServerOption = "", config: ConfigOption = None, settings: SetOption = None) -> None:
    """Ends a job: one that waits at once, one that runs at its next step."""
    with training(server, config, settings) as desk:
        found = desk.CancelTrainingJob(pb.CancelTrainingJobRequest(name=name_of(desk, job))).training_job
    state = STATES[found.state]
    typer.echo(f"{found.name.partition('/')[2]}: {'told to stop' if state == 'running' else state}")


@app.command()
def curve(
    job: JobArgument,
    metric: Annotated[list[str] | None, typer.Option("--metric", "-m", help="These curves alone; repeatable.")] = None,
    server: ServerOption = "",
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Draws a job's curves, also while it runs, and tells where its page is."""
    points: list[training_pb2.TrainingJobMetric] = []
    with training(server, config, settings) as desk:
        name, token = name_of(desk, job), ""
        while True:
            page = desk.ListTrainingJobMetrics(pb.ListTrainingJobMetricsRequest(parent=name, metrics=metric or [], page_token=token))
            points += page.points
            token = page.next_page_token
            if not token:
                break
    curves: dict[str, list[tuple[int, float]]] = {}
    for point in points:
        curves.setdefault(point.metric, []).append((point.step, point.value))
    for title, steps in curves.items():
        typer.echo("\n".join(draw(title, steps)) + "\n")
    if not curves:
        typer.echo("No points yet.")
    if not server:
        from server.config import load_config

        folder = Path(load_config(config, flags=flags(settings)).training.path) / name.partition("/")[2]
        page_file = folder / "report.html"
        typer.echo(f"page: {page_file}" if page_file.exists() else f"page: {page_file}, once the job has ended")
        if (folder / "tensorboard").exists():
            typer.echo(f"TensorBoard: tensorboard --logdir {folder / 'tensorboard'}")


@app.command()
def work(
    once: Annotated[bool, typer.Option("--once", help="Ends when no job is left.")] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Works on jobs, and makes those that schedules ask for, until SIGTERM. As many may run as there are machines."""
    if find_spec("trainer") is None:
        typer.echo("understudy jobs work: the package `trainer` is not installed. Run: pip install 'understudy-server[trainer]'", err=True)
        raise typer.Exit(1)
    command = [sys.executable, "-m", "trainer", "work", *(["--once"] if once else []), *(["--config", config] if config else [])]
    for setting in settings or ():
        command += ["--set", setting]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # in this process's place, so that signals reach the trainer


def draw(title: str, steps: Sequence[tuple[int, float]], *, width: int = 72, height: int = 10) -> list[str]:
    """A curve in characters: the mean of each column's points, the scale at the left."""
    first, last = steps[0][0], steps[-1][0]
    columns: dict[int, list[float]] = {}
    for step, value in steps:
        columns.setdefault(round((step - first) / max(1, last - first) * (width - 1)), []).append(value)
    means = {column: sum(values) / len(values) for column, values in columns.items()}
    low, high = min(means.values()), max(means.values())
    canvas = [[" "] * width for _ in range(height)]
    for column, mean in means.items():
        canvas[height - 1 - round((mean - low) / ((high - low) or 1.0) * (height - 1))][column] = "*"
    shown = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    lines = [f"{title}  (last: {steps[-1][1]:.4g})"]
    lines += [f"{shown.get(number, ''):>10} |{''.join(row).rstrip()}" for number, row in enumerate(canvas)]
    return [*lines, f"{'':>10} +{'-' * width}", f"{'':>12}{first}{last!s:>{width - len(str(first))}}"]


def _state(word: str) -> training_pb2.TrainingJobState:
    known = {name: number for number, name in STATES.items() if number}
    if word not in known:
        raise InvalidArgument(f"--state {word!r} is unknown; expected one of {', '.join(known)}.", field="state")
    return known[word]  # type: ignore[return-value]


def _row(job: training_pb2.TrainingJob) -> tuple[str, str, str, str, str]:
    """Kind, state, when it was made, seconds that it took, what came of it."""
    seconds = job.end_time.seconds - job.start_time.seconds if job.end_time.seconds and job.start_time.seconds else 0
    outcome = f"version {job.version}" if job.version else job.rejection
    if job.HasField("error"):
        outcome = f"{job.error.reason}: {job.error.message}"
    state = STATES[job.state] + (", told to stop" if job.cancel_requested and STATES[job.state] == "running" else "")
    return KINDS[job.kind], state, when(job.create_time), str(seconds) if seconds else "", outcome
