"""`understudy train`: a job of the trainer, run here as a process of its own, or queued; the server's packages never import it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from server.commands.training import ConfigOption, ServerOption, SetOption, training

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    skill: Annotated[str, typer.Argument(help="Name of the skill, as the configuration has it.")],
    method: Annotated[str, typer.Option(help="auto, linear-head, lora, full, prefix or prompt; without it as the skill says.")] = "",
    seed: Annotated[int, typer.Option(help="The same seed and rows give the same student.", min=0)] = 0,
    hub_repo: Annotated[str, typer.Option(help="Hub repository that the student is pushed to as well.")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Queues the job for a trainer (`understudy jobs work`) and returns.")] = False,
    server: ServerOption = "",
    config: ConfigOption = None,
    settings: SetOption = None,
    report: Annotated[str | None, typer.Option("--json", help='Write the report there as JSON; "-" prints it.')] = None,
) -> None:
    """Trains a skill's student from what the lake holds and publishes it if it is good. Exit code 3: trained, and not published."""
    if detach or server:
        _queue(skill, {"method": method, "seed": seed, "hub_repo": hub_repo}, server, config, settings)
        return
    if find_spec("trainer") is None:
        typer.echo("understudy train: the package `trainer` is not installed. Run: pip install 'understudy-server[learn]'", err=True)
        raise typer.Exit(1)
    command = [sys.executable, "-m", "trainer", "train", skill]
    spec = {key: value for key, value in (("method", method), ("seed", seed), ("hub_repo", hub_repo)) if value}
    command += ["--spec", json.dumps(spec)] if spec else []
    command += ["--config", config] if config else []
    for setting in settings or ():
        command += ["--set", setting]
    command += ["--json", report] if report else []
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def _queue(skill: str, spec: dict[str, object], server: str, config: str | None, settings: list[str] | None) -> None:
    from understudy.v1 import training_pb2
    from understudy.v1 import training_service_pb2 as pb

    with training(server, config, settings) as desk:
        job = training_pb2.TrainingJob(skill=f"skills/{skill}", **spec)  # type: ignore[arg-type]
        made = desk.CreateTrainingJob(pb.CreateTrainingJobRequest(training_job=job)).training_job
    number = made.name.partition("/")[2]
    typer.echo(number)
    typer.echo(f"queued for a trainer; follow it: understudy jobs logs -f {number[:12]}", err=True)
