"""An append-only log of records in segment files: what has been appended survives `kill -9`.

A segment is a magic number and then records, each `<u32 length><u32 crc32(payload)><payload>`, little-endian; a payload is a JSON object
in UTF-8. `<id>.open` is being written and locked (flock) by its writer; `<id>.sealed` is complete, synced and waits to become Parquet.
A segment whose writer died is recovered by whoever looks next: its torn tail is cut off, and it is sealed.

Appending is one write() into the page cache; fsync, sealing and closing happen in `tick`, on the thread of the owner's choice. Where the
lake is encrypted a payload is sealed with the key of its writer's process (server.lake.sealing.LogSealer).
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"USLOG\x00\x00\x01"
_FRAME = struct.Struct("<II")
# No record of ours comes near it; a torn length would otherwise ask for gigabytes.
MAX_RECORD_BYTES = 64 << 20

_log = logging.getLogger(__name__)
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def frame(payload: bytes) -> bytes:
    """A record as it stands in a segment."""
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def encode(record: Mapping[str, Any]) -> bytes:
    """A record as JSON. Raises TypeError or ValueError for what JSON does not hold."""
    text = _encode(record)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which a provider's JSON may spell
        return text.encode(errors="replace")


def read_payloads(path: Path) -> Iterator[tuple[bytes, int]]:
    """Each intact payload of a segment with the offset after it; stops at the first record that is torn or altered."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return
        end = len(MAGIC)
        while len(head := file.read(_FRAME.size)) == _FRAME.size:
            length, crc = _FRAME.unpack(head)
            if length > MAX_RECORD_BYTES:
                return
            payload = file.read(length)
            if len(payload) != length or zlib.crc32(payload) != crc:
                return
            end += _FRAME.size + length
            yield payload, end


def salvage(path: Path) -> tuple[list[bytes], int]:
    """What can be read of a segment that should be whole, and how many of its bytes cannot.

    A record that was altered is stepped over where the next one stands at the place that its length tells.
    """
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        return [], len(data)
    intact: list[bytes] = []
    at, bad = len(MAGIC), 0
    while at < len(data):
        length, crc = _FRAME.unpack_from(data, at) if at + _FRAME.size <= len(data) else (MAX_RECORD_BYTES + 1, 0)
        end = at + _FRAME.size + length
        if length > MAX_RECORD_BYTES or end > len(data):
            return intact, bad + len(data) - at
        payload = data[at + _FRAME.size : end]
        if zlib.crc32(payload) == crc:
            intact.append(payload)
        else:
            bad += end - at
        at = end
    return intact, bad


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The intact records of a segment, decoded."""
    for payload, _ in read_payloads(path):
        yield json.loads(payload)


def recover(folder: Path) -> list[Path]:
    """Seals the segments of dead writers, cutting torn tails; returns the sealed paths. Segments of living writers stay as they are."""
    sealed = []
    for path in sorted(folder.glob("*.open")):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            if not path.exists():  # its writer sealed it between the listing and the lock
                continue
            ends = [end for _, end in read_payloads(path)]
            end = ends[-1] if ends else 0
            size = os.fstat(fd).st_size
            if not ends:
                path.unlink()
                continue
            if size > end:
                _log.warning("cut %d bytes of an incomplete record from log segment %s", size - end, path.name)
                os.ftruncate(fd, end)
            os.fsync(fd)
            target = path.with_suffix(".sealed")
            path.rename(target)
            sealed.append(target)
        finally:
            os.close(fd)
    return sealed


def sealed_segments(folder: Path) -> list[Path]:
    """Sealed segments, oldest first."""
    return sorted(folder.glob("*.sealed"))


@dataclass(slots=True)
class _Segment:
    path: Path
    fd: int
    opened: float
    size: int = len(MAGIC)
    records: int = 0
    dirty: bool = True


class Log:
    """The writer of one folder's segments. Thread-safe; several processes may each have a Log on one folder.

    `append` never waits for a device. A full disk raises OSError and leaves the segment as it was before the call.
    """

    def __init__(self, folder: Path, *, max_bytes: int = 16 << 20, max_age_s: float = 15.0) -> None:
        self.folder = folder
        self._seal: Callable[[bytes], bytes] | None = None
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._lock = threading.Lock()
        self._current: _Segment | None = None
        self._full: list[_Segment] = []
        self._closed = False
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends records with one write(); when it returns they survive the death of this process.

        Raises:
            OSError: the file system refused; none of the records is kept.
        """
        self.append_frames(self.frames(records))

    def seal_with(self, seal: Callable[[bytes], bytes]) -> None:
        """Seals every record from now on."""
        self._seal = seal

    def frames(self, records: Iterable[Mapping[str, Any]]) -> bytes:
        """Records as they are to stand in a segment. Raises TypeError or ValueError for what JSON does not hold."""
        seal = self._seal
        if seal is None:
            return b"".join([frame(encode(record)) for record in records])
        return b"".join([frame(seal(encode(record))) for record in records])

    def append_frames(self, data: bytes) -> None:
        """As `append`, of what `frames` made."""
        if not data:
            return
        with self._lock:
            assert not self._closed, "append to a closed log"
            segment = self._current or self._open()
            try:
                written = os.write(segment.fd, data)
                while written < len(data):
                    written += os.write(segment.fd, memoryview(data)[written:])
            except OSError:
                os.ftruncate(segment.fd, segment.size)
                os.lseek(segment.fd, segment.size, os.SEEK_SET)
                raise
            segment.size += len(data)
            segment.records += 1
            segment.dirty = True
            if segment.size >= self._max_bytes:
                self._full.append(segment)
                self._current = None

    def tick(self, *, seal: bool = False) -> int:
        """Syncs what was written and seals what is full or old (or everything, with `seal`); returns how many segments it sealed.

        Waits for the device: call it from a thread of its own.
        """
        with self._lock:
            current = self._current
            if current and (seal or time.monotonic() - current.opened >= self._max_age_s):
                self._full.append(current)
                self._current = current = None
            full, self._full = self._full, []
            if current and current.dirty:
                current.dirty = False
            else:
                current = None
            synced = os.dup(current.fd) if current else None
        if synced is not None:
            try:
                os.fsync(synced)
            finally:
                os.close(synced)
        sealed = 0
        try:
            for segment in full:
                os.fsync(segment.fd)
                segment.path.rename(segment.path.with_suffix(".sealed"))
                os.close(segment.fd)
                sealed += 1
        except OSError:
            with self._lock:
                self._full = full[sealed:] + self._full
            raise
        return sealed

    def close(self) -> None:
        """Seals what is open. Appending after it is a mistake; closing twice is not."""
        self.tick(seal=True)
        self._closed = True

    def _open(self) -> _Segment:
        path = self.folder / f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}.open"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # A recovering process that is quicker than this lock finds no record and removes the empty file: then begin again.
        fcntl.flock(fd, fcntl.LOCK_EX)
        if not path.exists():
            os.close(fd)
            return self._open()
        try:
            if os.write(fd, MAGIC) < len(MAGIC):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            path.unlink()
            os.close(fd)
            raise
        self._current = _Segment(path, fd, time.monotonic())
        return self._current
