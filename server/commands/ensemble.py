"""`understudy ensemble SKILL "text" --member ...`: several models of the running server asked for one answer, and what each said."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server.commands.shared import new_table, show
from server.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from understudy.ensembles import EnsembleAnswer, Member

_MEMBER = re.compile(r"(?P<model>[^*=]+)(\*(?P<samples>\d+))?(=(?P<accuracy>[0-9.]+))?")
_SHOWN = 60
STRATEGIES = ("consensus", "weighted", "best_of_n", "specialist")


@dataclass(frozen=True, slots=True)
class EnsembleOptions:
    """What the command line asks for. `options` are keyword arguments of the client's `ensemble`."""

    skill: str
    text: str
    members: Sequence[str]
    address: str = "127.0.0.1:50051"
    as_json: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def ensemble(asked: EnsembleOptions) -> int:
    """Prints the answer and a table of the calls; returns the exit code. Raises InvalidArgument."""
    from understudy.client import Client
    from understudy.errors import UnderstudyError

    text = asked.text or (sys.stdin.read() if not sys.stdin.isatty() else "")
    if not text.strip():
        raise InvalidArgument("there is no input. Give a text, or pipe one in.", field="text")
    members = [member_of(one) for one in asked.members]
    strategy = asked.options.get("strategy", "consensus")
    if strategy not in STRATEGIES:
        raise InvalidArgument(f"--strategy {strategy!r} is unknown; {', '.join(STRATEGIES)} are.", field="strategy")
    with Client(asked.address, timeout_s=600) as client:
        try:
            found = client.ensemble(asked.skill, text, members, **asked.options)
        except UnderstudyError as error:
            hint = " Start one with `understudy serve`." if error.code == "UNAVAILABLE" and not error.reason else ""
            print(f"understudy: {error.message}{hint}", file=sys.stderr)
            return 1
    if asked.as_json:
        _print_json(found)
        return 0
    print(found.text, flush=True)
    show(_table(found))
    print(_story(found))
    return 0


def member_of(text: str) -> Member:
    """A member as it is written on the command line: MODEL, MODEL*SAMPLES, MODEL=ACCURACY or MODEL*SAMPLES=ACCURACY.

    Raises InvalidArgument.
    """
    from understudy.ensembles import Member

    match = _MEMBER.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        accuracy = None if match["accuracy"] is None else float(match["accuracy"])
        return Member(match["model"], int(match["samples"] or 1), accuracy)
    except ValueError:
        message = f"--member {text!r} cannot be read; expected MODEL, MODEL*SAMPLES or MODEL*SAMPLES=ACCURACY, as openai/gpt-4o-mini*3=0.8."
        raise InvalidArgument(message, field="member") from None


def _table(found: EnsembleAnswer) -> Any:
    table = new_table("member", "wave", "outcome", "answer", "agreement", "quality", "seconds", "dollars")
    for one in found.members:
        said = " ".join((one.text or one.reason).split())
        table.add_row(
            f"{one.model} #{one.sample + 1}" if one.sample else one.model,
            str(one.wave or "-"),
            one.outcome,
            said if len(said) <= _SHOWN else said[: _SHOWN - 1] + "…",
            f"{one.agreement:.2f}" if one.text else "-",
            "-" if one.quality is None else f"{one.quality:.2f}",
            f"{one.elapsed_s:.2f}" if one.wave else "-",
            f"{one.cost_usd:.6f}".rstrip("0").rstrip(".") or "0",
        )
    return table


def _story(found: EnsembleAnswer) -> str:
    sure = "" if found.confidence is None else f", confidence {found.confidence:.2f}"
    whose = "the skill's route" if found.fell_back else found.strategy.replace("_", " ")
    waves = f"{found.waves} wave{'' if found.waves == 1 else 's'}"
    return f"[{whose}: {found.answer.candidate}{sure}; {waves}, {found.stop_reason}; {found.answer.cost_usd:.6f} US dollars]"


def _print_json(found: EnsembleAnswer) -> None:
    import json
    from dataclasses import asdict

    print(json.dumps(asdict(found), ensure_ascii=False, indent=2))
