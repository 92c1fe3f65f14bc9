"""`understudy keys`: makes, lists and revokes API keys, and reads the audit log. On the registry itself: the first key needs no server."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from server.commands.shared import JsonOption, new_table, show
from server.errors import InvalidArgument, UnderstudyError

if TYPE_CHECKING:
    from server.registry.api_keys import ApiKey, ApiKeys
    from server.registry.audit import AuditLog

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="API keys, and what was done with them.")
ConfigOption = Annotated[str | None, typer.Option("--config", "-c", help="TOML file; else UNDERSTUDY_CONFIG, else understudy.toml here.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Any setting, e.g. --set registry.url=...; repeatable.")]
_UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


class _Desk(NamedTuple):
    keys: ApiKeys
    audit: AuditLog


@app.command()
def create(
    role: Annotated[str, typer.Option(help="viewer, user, operator or admin; each may do what those before it may.")],
    name: Annotated[str, typer.Option(help="What it is for, in words.")] = "",
    skill: Annotated[list[str] | None, typer.Option(help="A skill that it may ask, of a viewer or user; repeatable. None: all.")] = None,
    expires: Annotated[str, typer.Option(help='After how long it ends, e.g. "90d" or "12h", or a date; empty: never.')] = "",
    rate: Annotated[int, typer.Option(help="Most calls in a minute; 0: no limit.")] = 0,
    day_usd: Annotated[float | None, typer.Option(help="Most US dollars that its calls may cost in a day.")] = None,
    month_usd: Annotated[float | None, typer.Option(help="The same in a month.")] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Makes a key and prints it, once: standard output holds the key alone, the rest is on standard error."""
    from server.core import Role
    from server.registry.api_keys import COMMAND_LINE, KeySettings

    if role.upper() not in Role.__members__:
        raise InvalidArgument(f"--role is {role!r}; expected one of {', '.join(one.name.lower() for one in Role)}.", field="role")
    wish = KeySettings(
        Role[role.upper()],
        name,
        tuple(dict.fromkeys(one.removeprefix("skills/") for one in skill or ())),
        _end(expires),
        rate,
        _micro_usd(day_usd, "--day-usd"),
        _micro_usd(month_usd, "--month-usd"),
    )
    with _desk(config, settings) as desk, _noted(desk, "create") as about:
        key, text = desk.keys.create(wish, COMMAND_LINE)
        about.append(key.name)
    if as_json:
        typer.echo(json.dumps({**_plain(key), "key": text}))
        return
    typer.echo(f"{key.name}: {key.settings.role.name.lower()}. This is the key; it is not shown again:", err=True)
    typer.echo(text)


@app.command(name="list")
def list_keys(as_json: JsonOption = False, config: ConfigOption = None, settings: SetOption = None) -> None:
    """Shows the keys, the newest first, without their secrets."""
    with _desk(config, settings) as desk:
        found: list[ApiKey] = []
        while page := desk.keys.page(1000, (found[-1].create_ms, found[-1].id) if found else None):
            found += page
    if as_json:
        typer.echo(json.dumps([_plain(key) for key in found]))
        return
    if not found:
        typer.echo("No keys. Make one: understudy keys create --role admin", err=True)
        return
    now = _now()
    table = new_table("id", "role", "name", "state", "skills", "per minute", "day USD", "month USD", "made (UTC)", "ends (UTC)", "last use")
    for key in found:
        given = key.settings
        budgets = ["" if one is None else f"{one / 1e6:g}" for one in (given.budget_day, given.budget_month)]
        times = [_when(one) for one in (key.create_ms, given.expire_ms, key.last_use_ms)]
        rate = str(given.requests_per_minute or "")
        table.add_row(key.id, given.role.name.lower(), given.display_name, key.state(now), ", ".join(given.skills), rate, *budgets, *times)
    show(table)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help='Its id, for example "7f3k2m9q": the first part of the key.')],
    last_admin: Annotated[bool, typer.Option("--last-admin", help="Also where it is the last key of an admin.")] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Ends a key for good, on every server of the registry within seconds."""
    from server.registry.api_keys import NAMES, read_name, split_key

    whole = split_key(key)  # who has the key in hand may give it whole
    name = NAMES + (whole[0] if whole is not None else key.removeprefix(NAMES))
    with _desk(config, settings) as desk, _noted(desk, "revoke") as about:
        about.append(name)
        found = desk.keys.revoke(read_name(name), last_admin=last_admin)
    typer.echo(f"{found.name}: revoked {_when(found.revoke_ms)} UTC")


@app.command()
def audit(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Most events.")] = 50,
    actor: Annotated[str, typer.Option(help='Of this one alone: "apiKeys/7f3k2m9q", "anonymous", "command line".')] = "",
    since: Annotated[str, typer.Option(help="From this day or time on, e.g. 2026-11-01 or 2026-11-01T12:00:00+01:00.")] = "",
    as_json: JsonOption = False,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Shows what was changed and by whom, and what was refused, the newest first."""
    with _desk(config, settings) as desk:
        found = desk.audit.page(limit, actor=actor, since_ms=_time(since, "--since") if since else None)
    if as_json:
        for event in found:
            values = {"time": _when(event.time_ms), "actor": event.actor, "method": event.method, "resource": event.resource}
            typer.echo(json.dumps({**values, "code": event.code, "request_id": event.request_id, "peer": event.peer}))
        return
    table = new_table("time (UTC)", "actor", "what", "resource", "code", "request", "from")
    for event in found:
        table.add_row(_when(event.time_ms), event.actor, event.method, event.resource, event.code, event.request_id, event.peer)
    show(table)


@contextmanager
def _desk(config: str | None, settings: list[str] | None) -> Iterator[_Desk]:
    from server.commands.training import flags
    from server.config import load_config
    from server.registry.api_keys import ApiKeys
    from server.registry.audit import AuditLog
    from server.registry.registry import Registry

    registry = Registry(load_config(config, flags=flags(settings)).registry)
    try:
        yield _Desk(ApiKeys(registry), AuditLog(registry))
    finally:
        registry.close()


@contextmanager
def _noted(desk: _Desk, command: str) -> Iterator[list[str]]:
    """Writes the command into the audit log, done or refused; what it was about is put into the list."""
    from server.registry.api_keys import COMMAND_LINE
    from server.registry.audit import event_of

    about: list[str] = []

    def note(code: str) -> None:
        desk.audit.add([event_of(COMMAND_LINE, f"understudy keys {command}", "".join(about), code, peer=_login())])

    try:
        yield about
    except UnderstudyError as error:
        with suppress(UnderstudyError):  # the first error is the one to be told
            note(error.code)
        raise
    note("OK")


def _login() -> str:
    import getpass
    import socket

    with suppress(Exception):  # a container may know no name for its user
        return f"{getpass.getuser()}@{socket.gethostname()}"
    return ""


def _end(text: str) -> int | None:
    if not text:
        return None
    if length := re.fullmatch(r"(\d{1,6})([mhdw])", text):
        return _now() + int(length[1]) * _UNITS[length[2]] * 1000
    return _time(text, "--expires")


def _time(text: str, option: str) -> int:
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        message = f"{option} is {text!r}; expected a date such as 2026-12-31 or 2026-12-31T12:00:00+01:00."
        raise InvalidArgument(f"{message} Without a zone it is UTC.", field=option) from error
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1000)


def _micro_usd(usd: float | None, option: str) -> int | None:
    if usd is None:
        return None
    if not 0 <= usd <= 1e9:
        raise InvalidArgument(f"{option} is {usd}; expected 0 to 1e9 US dollars.", field=option)
    return round(usd * 1_000_000)


def _plain(key: ApiKey) -> dict[str, Any]:
    given = key.settings
    return {
        "name": key.name,
        "display_name": given.display_name,
        "role": given.role.name.lower(),
        "state": key.state(_now()),
        "skills": list(given.skills),
        "requests_per_minute": given.requests_per_minute,
        "budget_day_micro_usd": given.budget_day,
        "budget_month_micro_usd": given.budget_month,
        "creator": key.creator,
        "create_time": _when(key.create_ms),
        "expire_time": _when(given.expire_ms),
        "last_use_time": _when(key.last_use_ms),
        "revoke_time": _when(key.revoke_ms),
    }


def _when(ms: int | None) -> str:
    """RFC 3339 in UTC, to the second; "" for never."""
    return "" if ms is None else datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _now() -> int:
    return time.time_ns() // 1_000_000
