"""`understudy curate` and `understudy export`: started as a process of their own; the server's packages never import the trainer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from server.commands.shared import JsonOption

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
curate_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_Skill = Annotated[str, typer.Argument(help="Name of the skill, as the configuration has it.")]
_Config = Annotated[str | None, typer.Option("--config", "-c", help="TOML file; else UNDERSTUDY_CONFIG, else understudy.toml here.")]
_Set = Annotated[list[str] | None, typer.Option("--set", help="Any setting, e.g. --set curation.pii=off; repeatable.")]


@app.command()
def export(
    skill: _Skill,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file; one of that name is replaced when all is written.")],
    form: Annotated[
        Literal["openai", "sharegpt", "alpaca", "kto", "dpo", "jsonl"], typer.Option("--format", "-f", help="Who is to read it.")
    ] = "openai",
    part: Annotated[Literal["train", "held_out", "all"], typer.Option(help="Held-out rows are for evaluation.")] = "train",
    config: _Config = None,
    settings: _Set = None,
    as_json: JsonOption = False,
) -> None:
    """Writes a skill's curated rows as a file for other trainers."""
    raise typer.Exit(_run("export", skill, config, settings, as_json, ("--format", form, "--part", part, "--out", str(out))))


@curate_app.command()
def curate(skill: _Skill, config: _Config = None, settings: _Set = None, as_json: JsonOption = False) -> None:
    """Says which of a skill's rows would be learnt from, and how many fell away at which step and why. Nothing is trained."""
    raise typer.Exit(_run("curate", skill, config, settings, as_json, ()))


def _run(verb: str, skill: str, config: str | None, settings: list[str] | None, as_json: bool, more: Sequence[str]) -> int:
    if find_spec("trainer") is None:
        typer.echo(f"understudy {verb}: the package `trainer` is not installed. Run: pip install 'understudy-server[learn]'", err=True)
        return 1
    command = [sys.executable, "-m", "trainer.curate", verb, skill, *more]
    command += ["--config", config] if config else []
    for setting in settings or ():
        command += ["--set", setting]
    command += ["--json"] if as_json else []
    return subprocess.run(command, check=False).returncode
