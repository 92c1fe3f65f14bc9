"""The command `understudy`. Sub-commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from server.errors import UnderstudyError

# Command groups that live in modules of their own, imported when they are named: (module, attribute, help).
_LAZY = {
    "models": ("server.commands.models", "app", "The model repository: pull, add, export, list, verify, remove, bench."),
    "adapters": ("server.commands.adapters", "app", "Adapters of the models: add, list, verify, remove."),
    "keys": ("server.commands.keys", "app", "API keys: create, list, revoke; and the audit log."),
    "lake": ("server.commands.lake", "app", "The lake of interactions: stats, compact, export, erase, verify."),
    "rollout": ("server.commands.rollout", "app", "Where a skill's rollout is, and moving it by hand."),
    "train": ("server.commands.train", "app", "Train a skill's student from what the lake holds."),
    "jobs": ("server.commands.jobs", "app", "The trainer's jobs: list, show, logs, cancel, curve, work."),
    "schedule": ("server.commands.schedule", "app", "When skills are trained without being told to: list, set, remove."),
    "finetune": ("server.commands.finetune", "app", "Fine-tune a vendor's model on a skill's rows, or train its student here."),
    "assess": ("server.commands.assess", "app", "Refit a skill's quality and difficulty on judged answers; check its student."),
    "curate": ("server.commands.export", "curate_app", "Say what of a skill's rows would be learnt from, and why the rest would not."),
    "export": ("server.commands.export", "app", "Write a skill's curated rows as a file for other trainers."),
}


class _Group(TyperGroup):
    """Knows the lazy groups by name and help, and loads one only to run it."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_LAZY]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _LAZY:
            return super().get_command(ctx, cmd_name)
        module, attribute, text = _LAZY[cmd_name]
        if "--help" in sys.argv and cmd_name not in sys.argv[1:]:
            return TyperCommand(cmd_name, help=text)
        return typer.main.get_command(getattr(import_module(module), attribute))


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A gRPC inference server whose local models learn to replace the API models that you pay for.",
)
ConfigOption = Annotated[str | None, typer.Option("--config", "-c", help="TOML file; else UNDERSTUDY_CONFIG, else understudy.toml here.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Any setting, e.g. --set runtime.threads=2; repeatable.")]


@app.command()
def serve(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    models: Annotated[str | None, typer.Option(help="Model repository.")] = None,
    settings: SetOption = None,
) -> None:
    """Starts the server; SIGTERM drains it."""
    from server.commands.serve import serve as run

    raise typer.Exit(run(config, _flags(settings, {"server.host": host, "server.port": port, "models.path": models})))


@app.command()
def run(
    model: Annotated[str, typer.Argument(help='A text-generation model, "name" or "name@version"; with --skill, a skill.')],
    prompt: Annotated[str, typer.Argument(help="What to go on with; without it, standard input.")] = "",
    skill: Annotated[bool, typer.Option("--skill", help="Asks a skill: its student, its teacher; -v tells who answered, and why.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="A conversation by the model's chat template, line by line.")] = False,
    system: Annotated[str, typer.Option(help="The conversation's system message.")] = "",
    address: Annotated[str, typer.Option(help="Where the server listens, without TLS.")] = "127.0.0.1:50051",
    local: Annotated[bool, typer.Option("--local", help="Loads the model in this process; no server is needed.")] = False,
    models: Annotated[str | None, typer.Option(help="Model repository, with --local.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer; 0: as many as fit.")] = 0,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token; 1 without it.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Likeliest tokens that reach this probability together.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    adapter: Annotated[str, typer.Option(help='"name" or "name@version".')] = "",
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer; repeatable.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tells tokens and times.")] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Generates text on the terminal, from a running server or with --local in this process."""
    from server.commands.run import RunOptions
    from server.commands.run import run as answer

    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "adapter": adapter, "stop": stop or ()}
    asked = RunOptions(model, prompt, chat, system, address, local, verbose, skill, options)
    raise typer.Exit(answer(asked, config, _flags(settings, {"models.path": models})))


@app.command()
def ensemble(
    skill: Annotated[str, typer.Argument(help='A skill, or a task as such, e.g. "text-generation".')],
    text: Annotated[str, typer.Argument(help="What to work on; without it, standard input.")] = "",
    member: Annotated[
        list[str] | None,
        typer.Option("--member", "-m", help='"local:NAME" or "PROVIDER/MODEL", *N for N samples, =P for its accuracy; repeatable.'),
    ] = None,
    strategy: Annotated[str, typer.Option(help="consensus, weighted, best_of_n or specialist.")] = "consensus",
    wave_size: Annotated[int, typer.Option(help="Calls at once; 0: as many as could decide.")] = 0,
    quorum: Annotated[int, typer.Option(help="Answers that are enough; 0: until more could not change the result.")] = 0,
    threshold: Annotated[float | None, typer.Option(help="Lowest confidence that is delivered.")] = None,
    members_only: Annotated[bool, typer.Option("--members-only", help="An error instead of the skill's route.")] = False,
    max_cost: Annotated[float | None, typer.Option(help="US dollars, all calls together.")] = None,
    max_latency: Annotated[float | None, typer.Option(help="Seconds after which what has come decides.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the members' answers.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer; 0: the skill's own.")] = 0,
    address: Annotated[str, typer.Option(help="Where the server listens, without TLS.")] = "127.0.0.1:50051",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Asks several models of a running server for one answer, and shows what each of them said."""
    from server.commands.ensemble import EnsembleOptions
    from server.commands.ensemble import ensemble as ask

    named = {"threshold": threshold, "max_cost_usd": max_cost, "max_latency_s": max_latency, "temperature": temperature}
    options: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    options |= {"strategy": strategy, "wave_size": wave_size, "quorum": quorum, "members_only": members_only, "max_tokens": max_tokens}
    raise typer.Exit(ask(EnsembleOptions(skill, text, member or (), address, as_json, options)))


@app.command()
def doctor(config: ConfigOption = None, settings: SetOption = None) -> None:
    """Checks this machine and configuration: kernels, ONNX Runtime, repository, ports. Exit code 1 where something is wrong."""
    from server.commands.doctor import doctor as run

    raise typer.Exit(run(config, _flags(settings, {})))


@app.command()
def health(
    address: Annotated[str, typer.Option(help="Where the server listens, without TLS.")] = "127.0.0.1:50051",
    service: Annotated[str, typer.Option(help="A service, e.g. understudy.v1.InferenceService; empty: the server as a whole.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 2.0,
) -> None:
    """Asks a running server whether it serves. Exit code 0: it does."""
    from server.commands.health import health as run

    raise typer.Exit(run(address, service, timeout))


@app.command()
def version() -> None:
    """Prints the release."""
    from importlib.metadata import version as installed

    typer.echo(installed("understudy-server"))


def _flags(settings: list[str] | None, named: dict[str, object]) -> dict[str, object]:
    flags: dict[str, object] = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"{setting!r} has no value; expected section.key=value", param_hint="--set")
        flags[key.strip()] = value
    return {**flags, **{key: value for key, value in named.items() if value is not None}}


def main() -> None:
    """Entry point: an error of ours is one readable paragraph and exit code 1."""
    try:
        app()
    except UnderstudyError as error:
        print(f"understudy: {error.message}", file=sys.stderr)
        raise SystemExit(1) from None
    except SystemExit as end:
        if sys.argv[1:2] == ["lake"] and isinstance(end.code, int | None):
            _end_at_once(end.code or 0)
        raise


def _end_at_once(code: int) -> None:
    """Ends without waiting for the libraries' threads: one of them now and then aborts a process that was about to end well."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
