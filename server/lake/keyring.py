"""Keys that processes seal their logs with: one a process, named by a file in the log's folder that is locked while its process lives.

Once the process is gone and all its segments are rows, the key is deleted from the registry: nobody reads a copy of those segments again.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

from server.lake import log, schema
from server.lake.sealing import LogSealer

if TYPE_CHECKING:
    from server.registry.keys import UserKeys


class LogKey:
    """The key of this process, made in the registry. Raises Unavailable where that does not answer."""

    def __init__(self, lake: Path, keys: UserKeys) -> None:
        name, key = keys.new_log_key()
        self.sealer = LogSealer(name, key)
        folder = lake / "log" / "keys"
        folder.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def release(self) -> None:
        """Says that nothing will be sealed with it any more."""
        os.close(self._fd)


def drop_idle_log_keys(lake: Path, keys: UserKeys) -> int:
    """Deletes keys of processes that are gone, if no segment or rejected record is left that may need one; returns how many."""
    folder = lake / "log" / "keys"
    dropped = 0
    for path in sorted(folder.glob("log-*")) if folder.exists() else []:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # its process lives
            if _in_need(lake):
                break
            keys.drop_log_key(path.name)
            path.unlink(missing_ok=True)
            dropped += 1
        finally:
            os.close(fd)
    return dropped


def _in_need(lake: Path) -> bool:
    """Whether some record waits that a key of a dead process may have sealed. Open segments of the dead become sealed ones here."""
    for name in schema.TABLES:
        folder = lake / "log" / name
        if folder.exists():
            log.recover(folder)
            if any(folder.glob("*.sealed")) or any(folder.glob("*.damaged")):
                return True
    rejected = lake / "log" / "rejected"
    return rejected.exists() and any(rejected.iterdir())
