"""`understudy assess`: recalibrates a skill from what was said of its answers; by the trainer as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def assess(
    skill: Annotated[str, typer.Argument(help="Name of the skill, as the configuration has it.")],
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="TOML file; else UNDERSTUDY_CONFIG, else understudy.toml here.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting, e.g. --set lake.path=data/lake; repeatable.")] = None,
    report: Annotated[str | None, typer.Option("--json", help='Write the report there as JSON; "-" prints it.')] = None,
) -> None:
    """Refits a skill's quality and difficulty on judged answers and checks its student. Exit code 3: there was too little to go by."""
    if find_spec("trainer") is None:
        typer.echo("understudy assess: the package `trainer` is not installed. Run: pip install 'understudy-server[learn]'", err=True)
        raise typer.Exit(1)
    command = [sys.executable, "-m", "trainer.assess", skill]
    command += ["--config", config] if config else []
    for setting in settings or ():
        command += ["--set", setting]
    command += ["--json", report] if report else []
    raise typer.Exit(subprocess.run(command, check=False).returncode)
