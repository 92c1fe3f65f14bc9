"""Erasing a user: first the key, which no copy survives; then their rows, the files that held them, and what was derived from them.

A Delta table keeps old versions; here the files that go out of use are removed at once, so that no version brings the rows back. Whoever
reads an old version at that moment gets an error and reads again.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.config import Config
from server.lake import schema, table
from server.lake.maintenance import ROW_GROUP, writer
from server.lake.place import Place
from server.lake.sealing import LogSealer, log_key_name
from server.lake.segments import TRIES, Converter, only_one, rejected_record
from server.registry.keys import UserKeys

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Erasure:
    """What was erased. `rows` by table; `retrain`: adapters and models, "name@version", that learned from the user and still do what they
    learned; `jobs_running`: such jobs that have not ended: cancel them, and erase again; `waiting`: segments of a living server that were
    not closed in time: erase again.
    """

    user_hash: str
    rows: dict[str, int] = field(default_factory=dict)
    files_removed: int = 0
    log_files: int = 0
    remembered: int = 0
    job_folders: int = 0
    retrain: list[str] = field(default_factory=list)
    jobs_running: list[str] = field(default_factory=list)
    waiting: int = 0

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do but retraining."""
        return not self.jobs_running and not self.waiting

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "complete": self.complete}


class Eraser:
    """Blocking, for a command of its own. May be run again at any time: what is gone stays gone.

    `patience_s`: how long to wait until living servers of this machine have closed the segments that they write to.
    """

    def __init__(self, config: Config, keys: UserKeys, *, patience_s: float | None = None) -> None:
        self._place = Place.of(config.lake)
        self._keys = keys
        self._encrypt = config.lake.encrypt
        self._jobs = Path(config.training.path)
        self._patience_s = patience_s if patience_s is not None else 2 * config.lake.flush_s + 30.0

    def erase(self, user_hash: str) -> Erasure:
        """Erases the user with this keyed hash. Raises Unavailable where the registry does not answer, deltalake's errors where a store
        does not; then nothing is half done: the mark is set first, and running it again does the rest.
        """
        done = Erasure(user_hash)
        self._keys.erase(user_hash)
        done.waiting = self._settle_log()
        pending = self._place.path / "erasing" / user_hash
        own = self._interactions_of(user_hash)
        if pending.exists():
            own |= set(pending.read_text(encoding="utf-8").split())
        pending.parent.mkdir(exist_ok=True)
        pending.write_text("\n".join(sorted(own)), encoding="utf-8")  # ids alone, for the next run where this one cannot end it
        done.log_files = self._clean_log(user_hash, own)
        for name in schema.TABLES:
            done.rows[name] = self._delete(name, user_hash, own)
            done.files_removed += self._purge(name)
        done.remembered = self._keys.forget_feedback(own)
        self._forget_jobs(done, own)
        if done.complete:
            pending.unlink()
        return done

    def _settle_log(self) -> int:
        """Makes rows of all that is in the log now; returns how many segments could not be closed in time."""
        folders = [self._place.log(name) for name in schema.TABLES]
        now = {path.with_suffix("") for folder in folders if folder.exists() for path in [*folder.glob("*.open"), *folder.glob("*.sealed")]}
        end = time.monotonic() + self._patience_s
        while True:
            for name in schema.TABLES:
                Converter(self._place, self._keys, self._encrypt).run(name, wait=True)
            left = [path for path in now if path.with_suffix(".open").exists() or path.with_suffix(".sealed").exists()]
            if not left or time.monotonic() > end:
                return len(left)
            time.sleep(0.2)  # their writers close them within lake.flush_s

    def _interactions_of(self, user_hash: str) -> set[str]:
        own: set[str] = set()
        for name in (schema.INTERACTIONS, schema.SHADOWS):
            own |= set(
                table.read(self._place, name, equals={"user_hash": user_hash}, names=["interaction_id"])["interaction_id"].to_pylist()
            )
        return own - {None}

    def _clean_log(self, user_hash: str, own: Collection[str]) -> int:
        """Removes damaged segments, whose readable records are rows by now, and the user's from the rejected; returns how many files."""
        touched = 0
        for name in schema.TABLES:
            for path in self._place.log(name).glob("*.damaged"):
                _log.warning("removed damaged log segment %s: what cannot be read in it may be the user's", path.name)
                path.unlink()
                touched += 1
        for path in (self._place.path / "log" / "rejected").glob("*"):
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if not self._is_theirs(line, user_hash, own)]
            if len(kept) < len(lines):
                _replace(path, b"".join(kept))
                touched += 1
        return touched

    def _is_theirs(self, line: bytes, user_hash: str, own: Collection[str]) -> bool:
        """Whether a rejected record is the user's, or cannot be read and may be."""
        try:
            record = json.loads(line)
            sealed = rejected_record(record) if isinstance(record, dict) else None
            if sealed is not None:
                name = log_key_name(sealed)
                key = self._keys.find([name]).get(name)
                record = json.loads(LogSealer(name, key).open(sealed)) if key else None
        except ValueError:
            return True
        if not isinstance(record, dict):
            return True
        return record.get("user_hash") == user_hash or record.get("interaction_id") in own

    def _delete(self, name: str, user_hash: str, own: Collection[str]) -> int:
        """Deletes the user's rows, and what others said of them; returns how many.

        Day by day, by writing what stays: deltalake's own delete leaves files of a kind of string that pandas does not read in lists.
        """
        found = table.open_table(self._place, name)
        if found is None:
            return 0
        rows = table.scan(found, name, names=["date", "user_hash", "interaction_id"])
        days = sorted(set(rows.filter(_theirs(rows, user_hash, own))["date"].to_pylist()))
        return sum(self._rewrite(name, day, user_hash, own) for day in days)

    def _rewrite(self, name: str, day: str, user_hash: str, own: Collection[str]) -> int:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.dataset as ds
        from deltalake import write_deltalake
        from deltalake.exceptions import CommitFailedError

        for left in reversed(range(TRIES)):
            found = table.open_table(self._place, name)
            assert found is not None, "it has rows of that day"
            data = found.to_pyarrow_dataset()
            batches = data.scanner(filter=ds.field("date") == day, batch_size=ROW_GROUP).to_batches()
            gone = 0

            def staying(batches: Iterator[pa.RecordBatch] = batches) -> Iterator[pa.RecordBatch]:
                nonlocal gone
                for batch in batches:
                    stay = batch.filter(pc.invert(_theirs(batch, user_hash, own)))
                    gone += batch.num_rows - stay.num_rows
                    yield stay

            try:
                stream = pa.RecordBatchReader.from_batches(data.schema, staying())
                options = {"writer_properties": writer(), "storage_options": dict(self._place.options)}
                write_deltalake(found, stream, mode="overwrite", predicate=f"date = '{day}'", **options)
                return gone
            except CommitFailedError:  # rows of that day were added or joined meanwhile
                if not left:
                    raise
                time.sleep(random.uniform(0.05, 0.5))
        raise AssertionError("not reached")

    def _purge(self, name: str) -> int:
        """Removes the files of older versions, and those that a dead process wrote and never committed."""
        with self._alone(name):
            found = table.open_table(self._place, name)
            if found is None:
                return 0
            removed = _vacuum(found, 0, full=False)
            # Files that no version names may be of a commit that is under way: here nobody commits now, elsewhere not for an hour.
            return removed + _vacuum(found, 0 if self._place.local else 1, full=True)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """While no other process of this machine commits to a table."""
        folder = self._place.log(name)
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(only_one(folder, ".convert.lock", wait=True))
            stack.enter_context(only_one(self._place.path, f".{name}.compact.lock", wait=True))
            yield

    def _forget_jobs(self, done: Erasure, own: Collection[str]) -> None:
        """Removes the folders of ended jobs that hold rows of the user, or may: those that wrote no data set down."""
        trained = self._keys.trained_on(own)
        done.retrain = trained.made
        done.jobs_running = [job for job in trained.jobs if job not in trained.ended]
        for folder in sorted(self._jobs.iterdir()) if self._jobs.exists() else []:
            job = folder.name
            theirs = job in trained.jobs or job not in trained.recorded
            if folder.is_dir() and not folder.is_symlink() and theirs and job in trained.ended:
                shutil.rmtree(folder)
                done.job_folders += 1


def _theirs(rows: pa.Table | pa.RecordBatch, user_hash: str, own: Collection[str]) -> pa.Array:
    """Which rows are the user's, or about an interaction of theirs."""
    import pyarrow as pa
    import pyarrow.compute as pc

    by_user = pc.fill_null(pc.equal(rows["user_hash"], user_hash), False)
    return pc.or_(by_user, pc.is_in(rows["interaction_id"], pa.array(sorted(own), pa.string())))


def _replace(path: Path, data: bytes) -> None:
    """Gives a file other contents, or removes it where there are none."""
    if not data:
        path.unlink()
        return
    draft = path.with_name(f".{path.name}.part")
    draft.write_bytes(data)
    draft.rename(path)


def _vacuum(found: DeltaTable, hours: int, *, full: bool) -> int:
    return len(found.vacuum(retention_hours=hours, dry_run=False, enforce_retention_duration=False, full=full))
