"""`understudy lake`: what the lake holds, upkeep, export, erasure and verification. Each takes --json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.commands.shared import JsonOption, new_table, show
from server.errors import InvalidArgument

if TYPE_CHECKING:
    from server.config import Config

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The lake of interactions: stats, compact, export, erase, verify.",
)
ConfigOption = Annotated[str | None, typer.Option("--config", "-c", help="TOML file; else UNDERSTUDY_CONFIG, else understudy.toml here.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Any setting, e.g. --set lake.path=data/lake; repeatable.")]
SinceOption = Annotated[str | None, typer.Option(help="From this day or time on, e.g. 2026-11-01 or 2026-11-01T12:00:00+01:00.")]
UntilOption = Annotated[str | None, typer.Option(help="Before this day or time.")]
SkillOption = Annotated[str | None, typer.Option(help="Of this skill alone.")]


@app.command()
def stats(
    since: SinceOption = None,
    until: UntilOption = None,
    skill: SkillOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rows, bytes and files; by day and skill: interactions, the share answered here, cost, quality; what waits in the log."""
    from server.lake.place import Place
    from server.lake.stats import stats as count

    found = count(Place.of(_load(config, settings).lake), since=_time(since), until=_time(until), skill=skill)
    if as_json:
        _print(found.as_dict())
        return
    tables = new_table("table", "rows", "files", "MB", "version")
    for name, one in found.tables.items():
        tables.add_row(name, f"{one.rows:,}", str(one.files), f"{one.bytes / 1e6:.1f}", str(one.version))
    show(tables)
    for title, groups in (("day", found.days), ("skill", found.skills)):
        rows = new_table(title, "interactions", "local", "cost USD", "errors", "quality", "ms")
        for group in groups:
            quality = "" if group.mean_quality is None else f"{group.mean_quality:.2f}"
            numbers = (
                f"{group.interactions:,}",
                f"{group.local_share:.0%}",
                f"{group.cost_usd:.4f}",
                str(group.errors),
                quality,
                f"{group.mean_ms:.1f}",
            )
            rows.add_row(group.name, *numbers)
        show(rows)
    log = found.backlog
    typer.echo(
        f"log: {log.segments} segments wait ({log.bytes / 1e6:.1f} MB), {log.damaged} damaged, {log.rejected} files of rejected records"
    )


@app.command()
def compact(
    keep_hours: Annotated[
        int, typer.Option(min=0, help="Files that went out of use stay so long, for those who read an old version.")
    ] = 168,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Joins small files, deletes rows older than lake.retention_days, removes files that are out of use. Servers go on meanwhile."""
    from server.lake import maintenance, schema
    from server.lake.place import Place

    loaded = _load(config, settings)
    place, days = Place.of(loaded.lake), loaded.lake.retention_days
    done = [maintenance.compact(place, name, retention_days=days, keep_hours=keep_hours) for name in schema.TABLES]
    if as_json:
        _print([one.as_dict() for one in done])
        return
    rows = new_table("table", "files before", "files after", "rows expired", "files removed", "")
    for one in done:
        busy = "another process is at it" if one.busy else ""
        rows.add_row(one.table, str(one.files_before), str(one.files_after), str(one.expired), str(one.removed_files), busy)
    show(rows)


@app.command()
def export(
    target: Annotated[Path, typer.Argument(help="The file to write; its ending says the format.")],
    kind: Annotated[str | None, typer.Option("--format", help="parquet, jsonl or csv; else by the file's ending.")] = None,
    skill: SkillOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    columns: Annotated[str | None, typer.Option(help="Columns with commas between; else all (docs/lake.md names them).")] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Interactions with their feedback and later answers as one file, payloads in clear, without erased users."""
    from server.lake.exporting import format_of, write
    from server.lake.reading import LakeReader

    form = format_of(target, kind)
    wanted = [name.strip() for name in columns.split(",")] if columns else None
    reader = LakeReader(_load(config, settings))
    rows = reader.interactions(skill=skill, since=_time(since), until=_time(until), columns=wanted)
    number = write(rows, target, form)
    if as_json:
        _print({"rows": number, "path": str(target), "format": form, "version": reader.version()})
        return
    typer.echo(f"{number} rows to {target}; only you can read it, and erasing a user does not reach it")


@app.command()
def erase(
    user: Annotated[str | None, typer.Option(help="The user's id, as requests name it.")] = None,
    user_hash: Annotated[str | None, typer.Option(help="Or the keyed hash that the lake has for it.")] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Deletes a user's key, rows and what was derived from them, and names the adapters to train again.

    Exit code 3: something is left (a running job, a segment that a server still writes to); erase again then.
    """
    from server.lake.erasing import Eraser
    from server.lake.ids import IdKey
    from server.registry.keys import UserKeys
    from server.registry.registry import Registry

    loaded = _load(config, settings)
    if bool(user) == bool(user_hash):
        raise InvalidArgument("Give either --user or --user-hash.", field="user")
    name = user_hash or IdKey.open(Path(loaded.lake.path) / "id.key").pseudonym(user or "")
    if len(name) != 32 or set(name) - set("0123456789abcdef"):
        raise InvalidArgument("--user-hash is 32 hexadecimal digits, as column user_hash has it.", field="user_hash")
    registry = Registry(loaded.registry)
    try:
        done = Eraser(loaded, UserKeys(registry)).erase(name)
    finally:
        registry.close()
    if as_json:
        _print(done.as_dict())
    else:
        for line in _told(done.as_dict()):
            typer.echo(line)
    raise typer.Exit(0 if done.complete else 3)


@app.command()
def verify(config: ConfigOption = None, settings: SetOption = None, as_json: JsonOption = False) -> None:
    """Reads every Parquet file whole, counts ids, and looks through the log. Exit code 3: something is damaged or there twice."""
    from server.lake.checking import verify as look
    from server.lake.place import Place

    check = look(Place.of(_load(config, settings).lake))
    if as_json:
        _print(check.as_dict())
    else:
        rows = new_table("table", "rows", "by its log", "files", "unreadable", "repeated ids", "")
        for name, one in check.tables.items():
            numbers = (one.rows, one.expected, one.files, len(one.unreadable), one.repeated)
            rows.add_row(name, *map(str, numbers), "sound" if one.sound else "DAMAGED")
        show(rows)
        typer.echo(f"log: {check.segments} segments wait, {check.rejected} files of rejected records; damaged: {_list(check.damaged)}")
        for one in check.tables.values():
            for path in one.unreadable:
                typer.echo(f"unreadable: {path}")
    raise typer.Exit(0 if check.sound else 3)


def _told(done: dict[str, Any]) -> Iterable[str]:
    rows = ", ".join(f"{number} of {name}" for name, number in done["rows"].items())
    yield f"erased user {done['user_hash']}: rows {rows}; {done['files_removed']} files removed"
    yield f"also: {done['log_files']} files of the log, {done['remembered']} remembered feedbacks, {done['job_folders']} job folders"
    yield f"train again, for they learned from this user: {_list(done['retrain'])}"
    if done["jobs_running"]:
        yield f"NOT DONE: cancel these running jobs and erase again: {_list(done['jobs_running'])}"
    if done["waiting"]:
        yield f"NOT DONE: {done['waiting']} log segments are still being written; erase again when their servers have closed them"


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _load(config: str | None, settings: list[str] | None) -> Config:
    from server.cli import _flags
    from server.config import load_config

    return load_config(config, flags=_flags(settings, {}))


def _time(text: str | None) -> datetime | None:
    """A day or time; without a zone it is UTC."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidArgument(f"{text!r} is no day or time; expected e.g. 2026-11-01 or 2026-11-01T12:00:00.", field="since") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _print(document: Any) -> None:
    typer.echo(json.dumps(document, ensure_ascii=False, indent=1))
