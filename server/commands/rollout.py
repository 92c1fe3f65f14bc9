"""`understudy rollout`: where a skill's rollout is on a running server, and moving it by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from server.commands.shared import JsonOption, new_table, open_channel, show

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Skill = Annotated[str, typer.Argument(help="Name of the skill.")]
Server = Annotated[str, typer.Option("--server", "--address", help="Where the server listens, without TLS.")]
Reason = Annotated[str, typer.Option(help="Why, for the audit trail.")]
_LOCAL = "127.0.0.1:50051"
_TIMEOUT_S = 30.0


@app.command()
def status(skill: Skill, server: Server = _LOCAL, as_json: JsonOption = False) -> None:
    """Tells the stage, and what the evidence says."""
    _show(server, lambda stub, pb: stub.GetRollout(pb.GetRolloutRequest(name=f"skills/{skill}"), timeout=_TIMEOUT_S).rollout, as_json)


@app.command()
def promote(
    skill: Skill,
    version: Annotated[str, typer.Option(help="Begin with this version, even one that was rolled back.")] = "",
    reason: Reason = "",
    server: Server = _LOCAL,
    as_json: JsonOption = False,
) -> None:
    """Takes the student to the next stage, whatever the evidence says."""
    name = f"skills/{skill}"
    _show(
        server,
        lambda stub, pb: (
            stub.PromoteRollout(pb.PromoteRolloutRequest(name=name, reason=reason, version=version), timeout=_TIMEOUT_S).rollout
        ),
        as_json,
    )


@app.command()
def hold(skill: Skill, reason: Reason = "", server: Server = _LOCAL, as_json: JsonOption = False) -> None:
    """Keeps the rollout where it is until `resume`."""
    _verb(skill, "Hold", reason, server, as_json)


@app.command()
def resume(skill: Skill, reason: Reason = "", server: Server = _LOCAL, as_json: JsonOption = False) -> None:
    """Lets the evidence decide again."""
    _verb(skill, "Resume", reason, server, as_json)


@app.command()
def rollback(skill: Skill, reason: Reason = "", server: Server = _LOCAL, as_json: JsonOption = False) -> None:
    """Takes the student back at once."""
    _verb(skill, "Rollback", reason, server, as_json)


@app.command()
def events(
    skill: Skill,
    most: Annotated[int, typer.Option(help="How many, the newest.")] = 20,
    server: Server = _LOCAL,
    as_json: JsonOption = False,
) -> None:
    """Lists the steps, newest first."""

    def ask(stub: Any, pb: Any) -> Any:
        return stub.ListRolloutEvents(pb.ListRolloutEventsRequest(name=f"skills/{skill}", page_size=most), timeout=_TIMEOUT_S).events

    found = _ask(server, ask)
    if as_json:
        print(json.dumps([_plain(one) for one in found], indent=2))
        return
    table = new_table("time", "by", "from", "to", "student", "why")
    for one in found:
        table.add_row(one.time.ToJsonString(), one.actor, one.from_stage, one.to_stage, one.student or "-", one.reason)
    show(table)


def _verb(skill: str, verb: str, reason: str, server: str, as_json: bool) -> None:
    def ask(stub: Any, pb: Any) -> Any:
        request = getattr(pb, f"{verb}RolloutRequest")(name=f"skills/{skill}", reason=reason)
        return getattr(stub, f"{verb}Rollout")(request, timeout=_TIMEOUT_S).rollout

    _show(server, ask, as_json)


def _show(server: str, ask: Callable[[Any, Any], Any], as_json: bool) -> None:
    found = _ask(server, ask)
    if as_json:
        print(json.dumps(_plain(found), indent=2))
        return
    stage = f"{found.stage} {found.percent} %" if found.stage == "canary" else found.stage
    others = f"version {found.champion}" if found.champion else "the teacher"
    print(f"{found.skill.removeprefix('skills/')}: {stage}{', held by hand' if found.paused else ''}")
    print(f"  student: {f'version {found.student}' if found.student else 'none'}; others: {others if found.stage != 'full' else 'none'}")
    if found.compared:
        print(
            f"  agrees with the teacher on {found.agreed} of {found.compared} answers to be delivered: "
            f"{found.lower:.1%} to {found.upper:.1%}; target {found.target:.1%}, less {found.tolerance:.1%} at most"
        )
    print(f"  {found.reason or 'nothing to compare yet'}")
    print(f"  the teacher is asked beside {found.teacher_share:.0%} of what students answer")
    for alarm in (*found.alarms, *([found.frozen] if found.frozen else [])):
        print(f"  ! {alarm}")


def _ask(server: str, ask: Callable[[Any, Any], Any]) -> Any:
    import grpc
    from grpc_status import rpc_status

    from understudy.v1 import skill_service_pb2
    from understudy.v1.skill_service_pb2_grpc import SkillServiceStub

    with open_channel(server) as channel:
        try:
            return ask(SkillServiceStub(channel), skill_service_pb2)  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            status = rpc_status.from_call(error)  # None: nobody of ours has answered
            hint = "" if status is not None else " Start a server with `understudy serve`, or name it with --server."
            print(f"understudy: {error.details() or error.code().name}{hint}", file=sys.stderr)
            raise typer.Exit(1) from None


def _plain(message: Any) -> Any:
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
