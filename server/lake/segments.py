"""Sealed log segments become rows of a Delta table, each segment exactly once, and are then dropped.

A Parquet file that the table's log does not name is invisible, so a death at any point leaves either the segment or the commit, or both;
the segment's id is recorded in the commit as an application transaction, and a segment whose id the table already holds is dropped unread.
Converters of several machines commit to one table, each the segments of its own log: a commit that lost a race is tried again.
"""

from __future__ import annotations

import base64
import fcntl
import json
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import UnderstudyError
from server.lake import log, schema, table
from server.lake.place import Place
from server.lake.sealing import LogSealer, Sealers, log_key_name

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable

    from server.registry.keys import UserKeys

# One commit takes at most so much log, so that a long backlog does not have to fit in memory.
COMMIT_BYTES = 24 << 20
TRIES = 8
# A replayed segment is at most as old as a backup; ids older than that may be forgotten by the table.
_PROPERTIES = {"delta.setTransactionRetentionDuration": "interval 90 days", "delta.logRetentionDuration": "interval 30 days"}
_STATS = "delta.dataSkippingStatsColumns"
_STATS_COLUMNS = ("interaction_id", "date", "time", "skill", "candidate", "local", "cost_micro_usd", "feedback_id", "role")

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Converter:
    """Turns a table's segments into rows. `keys`: the registry's, which know who was erased; `encrypt`: whether payloads are sealed.

    Without `keys` nobody is asked about users, and sealed segments cannot be read.
    """

    place: Place
    keys: UserKeys | None = None
    encrypt: bool = False
    _openers: dict[str, LogSealer | None] = field(default_factory=dict, repr=False)

    def run(self, name: str, *, wait: bool = False) -> int:
        """Turns all sealed segments of a table (and those of dead writers) into rows; returns how many rows it committed.

        Does nothing where another process is at it, unless `wait`. Raises Unavailable, OSError or deltalake's errors where a store or the
        registry does not answer: what is not committed stays in the log. A segment that itself cannot be converted is set aside.
        """
        folder = self.place.log(name)
        if not folder.exists():
            return 0
        with only_one(folder, ".convert.lock", wait=wait) as mine:
            if not mine:
                return 0
            log.recover(folder)
            total = 0
            for batch in _batches(log.sealed_segments(folder)):
                total += self._convert(name, batch)
            return total

    def _convert(self, name: str, batch: list[Path]) -> int:
        from deltalake.exceptions import DeltaError

        try:
            return self._commit(name, batch)
        except (UnderstudyError, OSError, DeltaError):
            raise
        except Exception:
            if len(batch) > 1:  # find out which, so that it holds up no other
                return sum(self._convert(name, [path]) for path in batch)
            _log.exception("log segment %s cannot be converted; it is set aside", batch[0].name)
            batch[0].rename(batch[0].with_suffix(".damaged"))
            return 0

    def _commit(self, name: str, segments: list[Path]) -> int:
        current = table.open_table(self.place, name)
        fresh = [path for path in segments if current is None or current.transaction_version(path.stem) is None]
        payloads: list[bytes] = []
        for path in fresh:
            payloads += _intact(path)
        rows = 0
        if fresh:
            clear, refused = self._opened(payloads)
            data, rejected = schema.from_payloads(name, clear)
            if rejected or refused:
                _keep_rejected(self.place.path, name, fresh[0].stem, self._shown(rejected, payloads, clear), refused)
            data = self._with_users(name, data)
            rows = int(data.num_rows)
            if rows:
                self._write(name, data, fresh)
        for path in segments:
            path.unlink(missing_ok=True)
        return rows

    def _write(self, name: str, data: pa.Table, segments: list[Path]) -> None:
        """Commits rows with their segments' ids. After a failure whose outcome is unknown, what the table holds decides."""
        from deltalake import CommitProperties, Transaction, write_deltalake
        from deltalake.exceptions import DeltaError

        uri, options = self.place.table(name), dict(self.place.options)
        mark = CommitProperties(app_transactions=[Transaction(app_id=path.stem, version=1) for path in segments])
        for left in reversed(range(TRIES)):
            current = table.open_table(self.place, name)
            if current is not None and current.transaction_version(segments[0].stem) is not None:
                break
            before = int(current.version()) if current is not None else -1
            evolve = current is not None and prepare(current, name)
            try:
                write_deltalake(
                    uri,
                    data,
                    mode="append",
                    partition_by=["date"],
                    configuration=properties(name) if current is None else None,
                    schema_mode="merge" if evolve else None,
                    storage_options=options,
                    commit_properties=mark,
                )
            except (DeltaError, OSError) as error:
                if not left or not _raced(error):
                    raise
                time.sleep(random.uniform(0.01, 0.2) * (TRIES - left))  # another writer was first; both trying at once would meet again
                continue
            if self.place.local:
                _sync(Path(uri), before)
            break

    def _opened(self, payloads: list[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Records in clear, and those that nobody can open."""
        clear, refused = [], []
        for payload in payloads:
            key = log_key_name(payload)
            if not key:
                clear.append(payload)
                continue
            opener = self._opener(key)
            try:
                if opener is None:
                    raise ValueError
                clear.append(opener.open(payload))
            except ValueError:
                refused.append(payload)
        return clear, refused

    def _opener(self, key: str) -> LogSealer | None:
        if key not in self._openers:
            found = self.keys.find([key]).get(key) if self.keys is not None else None
            self._openers[key] = LogSealer(key, found) if found else None
        return self._openers[key]

    def _shown(self, rejected: list[bytes], payloads: list[bytes], clear: list[bytes]) -> list[bytes]:
        """Rejected records in the form in which they stood in the log: what was sealed stays so."""
        if clear == payloads or not rejected:
            return rejected
        sealed = {opened: payload for payload in payloads for opened in self._opened([payload])[0]}
        return [sealed[one] for one in rejected]

    def _with_users(self, name: str, data: pa.Table) -> pa.Table:
        """The rows with nothing of erased users, and sealed where the lake is encrypted."""
        import pyarrow as pa

        if self.keys is None:
            return data
        users = data["user_hash"].to_pylist()
        named = {user for user in users if user}
        if not named:
            return data
        keys = self.keys.make(named) if self.encrypt else self.keys.find(named)
        gone = {user for user, key in keys.items() if key is None}
        if not self.encrypt and not gone:
            return data
        sealers = Sealers(keys)
        ids = [str(one or "") for one in data["interaction_id"].to_pylist()]
        places = [index for index, user in enumerate(users) if user and (self.encrypt or user in gone)]
        for column in schema.PAYLOADS[name]:
            values = data[column].to_pylist()
            for index in places:
                sealer = None if users[index] in gone else sealers.get(users[index])
                values[index] = sealer.seal(name, column, ids[index], values[index]) if sealer is not None else None
            at = data.schema.get_field_index(column)
            data = data.set_column(at, data.schema.field(at), pa.array(values, data.schema.field(at).type))
        marks: list[str | None] = [None] * len(users)
        for index in places:
            marks[index] = None if users[index] in gone else "v1"
        at = data.schema.get_field_index("sealed")
        return data.set_column(at, data.schema.field(at), pa.array(marks, pa.string()))


def properties(name: str) -> dict[str, str]:
    """Delta properties of a table. Statistics are of columns without payload only: the table's log keeps them in clear, for long."""
    have = schema.columns(name)
    return {**_PROPERTIES, _STATS: ",".join(column for column in _STATS_COLUMNS if column in have)}


def prepare(current: DeltaTable, name: str) -> bool:
    """Gives a table of an older release today's properties; returns whether it lacks columns."""
    if current.metadata().configuration.get(_STATS) != properties(name)[_STATS]:
        current.alter.set_table_properties(properties(name))
    return {one.name for one in current.schema().fields} != set(schema.columns(name))


@contextmanager
def only_one(folder: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process may go on: one at a time a folder and name, and the lock falls with its holder."""
    fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(fd)


def _batches(segments: list[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    size = 0
    for path in segments:
        batch.append(path)
        size += path.stat().st_size
        if size >= COMMIT_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _raced(error: Exception) -> bool:
    """Whether an error says that another writer was first, or leaves the outcome open."""
    words = str(error).lower()
    return any(word in words for word in ("conflict", "concurrent", "already exists", "version", "transaction", "timed out", "timeout"))


def _sync(folder: Path, before: int) -> None:
    """Forces the files of all commits after `before` to the disk, and their folders: the segments are dropped next."""
    entries = sorted((folder / "_delta_log").glob("*.json"))
    commits = [path for path in entries if path.stem.isdigit() and int(path.stem) > before]
    files = list(commits)
    for path in commits:
        for line in path.read_text(encoding="utf-8").splitlines():
            if "add" in (action := json.loads(line)):
                files.append(folder / action["add"]["path"])
    for path in [*files, *{path.parent for path in files}, folder]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # compacted or erased meanwhile
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _intact(path: Path) -> list[bytes]:
    """The records that can be read. A sealed segment is whole; where a disk damaged it, it is kept for a person to look at."""
    intact, bad = log.salvage(path)
    if bad:
        damaged = path.with_suffix(".damaged")
        if not damaged.exists():
            os.link(path, damaged)
        _log.error("log segment %s is damaged: %d bytes cannot be read; kept it as %s", path.name, bad, damaged.name)
    return intact


def _keep_rejected(lake: Path, name: str, segment: str, records: list[bytes], refused: list[bytes]) -> None:
    folder = lake / "log" / "rejected"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}-{segment}.jsonl"
    draft = target.with_suffix(".part")
    lines = [line(record) for record in [*records, *refused]]
    draft.write_bytes(b"".join(lines))
    draft.rename(target)
    _log.error("%d records of log segment %s do not fit the table %s or do not open; kept them in %s", len(lines), segment, name, target)


def line(record: bytes) -> bytes:
    """A record as a line of a file of rejected ones: itself, or {"sealed": base64 of it}."""
    if log_key_name(record):
        record = json.dumps({"sealed": base64.b64encode(record).decode()}).encode()
    return record.replace(b"\n", b" ") + b"\n"


def rejected_record(text: Mapping[str, Any]) -> bytes | None:
    """The sealed record of a line of such a file; None for one in clear."""
    return base64.b64decode(str(text["sealed"])) if set(text) == {"sealed"} else None
