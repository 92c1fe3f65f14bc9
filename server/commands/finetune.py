"""`understudy finetune`: a vendor's model, or the local student, trained on a skill's rows; by the trainer as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def finetune(
    skill: Annotated[str, typer.Argument(help="Name of the skill, as the configuration has it.")],
    provider: Annotated[str, typer.Option(help='"local", or a provider of the configuration of the kind openai.')] = "local",
    model: Annotated[str, typer.Option(help="The vendor's model; without it the one that is known to be fine-tuned there.")] = "",
    epochs: Annotated[int, typer.Option(help="Passes over the rows; each is charged.", min=1, max=50)] = 3,
    seed: Annotated[int, typer.Option(help="Of the training.", min=0)] = 0,
    yes: Annotated[bool, typer.Option("--yes", help="Agrees to the cost that is told first.")] = False,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="TOML file; else UNDERSTUDY_CONFIG, else understudy.toml here.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting, e.g. --set lake.path=data/lake; repeatable.")] = None,
    report: Annotated[str | None, typer.Option("--json", help='Write the report there as JSON; "-" prints it.')] = None,
) -> None:
    """Tells what a fine-tuning costs, asks, and sees it through; `--provider local` trains the skill's student here instead."""
    common = ["--config", config] if config else []
    for setting in settings or ():
        common += ["--set", setting]
    spec: dict[str, object] = {"provider": provider, "seed": seed}
    if provider != "local":
        worst = _agreed(skill, [*common, "--provider", provider, "--model", model, "--epochs", str(epochs)], yes)
        spec |= {"model": model, "epochs": epochs, "max_cost_usd": worst}
    kind = ["--kind", "finetune", "--spec", json.dumps(spec)]
    output = ["--json", report] if report else []
    raise typer.Exit(_trainer("trainer", ["train", skill, *kind, *common, *output]).returncode)


def _agreed(skill: str, options: list[str], yes: bool) -> float:
    """US dollars that the caller agrees to spend at most."""
    told = _trainer("trainer.hosted", [skill, *options], captured=True)
    if told.returncode != 0:
        raise typer.Exit(told.returncode)
    plan = json.loads(told.stdout)
    typer.echo(plan["words"], err=True)
    if not yes:
        if not sys.stdin.isatty():
            typer.echo("understudy finetune: nobody is here to agree to the cost. Say --yes.", err=True)
            raise typer.Exit(1)
        typer.confirm(f"Spend up to {plan['worst_usd']:.2f} US dollars?", abort=True)
    return float(plan["worst_usd"])


def _trainer(module: str, arguments: list[str], *, captured: bool = False) -> subprocess.CompletedProcess[str]:
    if find_spec("trainer") is None:
        typer.echo("understudy finetune: the package `trainer` is not installed. Run: pip install 'understudy-server[learn]'", err=True)
        raise typer.Exit(1)
    return subprocess.run([sys.executable, "-m", module, *arguments], check=False, text=True, stdout=subprocess.PIPE if captured else None)
