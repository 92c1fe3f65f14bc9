"""`understudy schedule ...`: when skills are trained without being told to."""

from __future__ import annotations

from typing import Annotated

import typer

from server.commands.shared import JsonOption, new_table, show
from server.commands.training import ConfigOption, ServerOption, SetOption, as_json, training, when
from understudy.v1 import training_pb2
from understudy.v1 import training_service_pb2 as pb

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="When skills are trained without being told to.")
SkillArgument = Annotated[str, typer.Argument(help="Name of the skill.")]


@app.command(name="list")
def list_schedules(server: ServerOption = "", config: ConfigOption = None, settings: SetOption = None, json: JsonOption = False) -> None:
    """Shows the schedules, who gave them, and when they are due."""
    with training(server, config, settings) as desk:
        found = desk.ListSchedules(pb.ListSchedulesRequest())
    if json:
        typer.echo(as_json(found))
        return
    if not found.schedules:
        typer.echo('No schedules. Give one: understudy schedule set SKILL "when 500 new good rows"')
        return
    table = new_table("skill", "schedule", "from", "next (UTC)", "last (UTC)")
    for one in found.schedules:
        table.add_row(_skill(one.name), one.spec or "never", one.origin, when(one.next_time) or "-", when(one.last_time) or "-")
    show(table)


@app.command(name="set")
def set_schedule(
    skill: SkillArgument,
    spec: Annotated[str, typer.Argument(help='"daily at 02:30", "weekly on sunday at 02:30", "when 500 new good rows", cron; "": never.')],
    server: ServerOption = "",
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Gives a skill a schedule, over what the configuration says, until `remove`."""
    with training(server, config, settings) as desk:
        asked = training_pb2.Schedule(name=f"skills/{skill}/schedule", spec=spec)
        found = desk.SetSchedule(pb.SetScheduleRequest(schedule=asked)).schedule
    due = f", next at {when(found.next_time)} UTC" if found.next_time.seconds else ""
    typer.echo(f"{skill}: {found.spec or 'never'}{due}. A trainer makes the jobs: understudy jobs work")


@app.command()
def remove(skill: SkillArgument, server: ServerOption = "", config: ConfigOption = None, settings: SetOption = None) -> None:
    """Takes back what `set` said; the configuration holds again."""
    with training(server, config, settings) as desk:
        desk.DeleteSchedule(pb.DeleteScheduleRequest(name=f"skills/{skill}/schedule"))
        left = {_skill(one.name): one.spec for one in desk.ListSchedules(pb.ListSchedulesRequest()).schedules}
    typer.echo(f"{skill}: {left.get(skill) or 'no schedule'}")


def _skill(name: str) -> str:
    return name.removeprefix("skills/").removesuffix("/schedule")
