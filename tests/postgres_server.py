"""A PostgreSQL of our own on a free port, where its binaries are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_READY_S = 60.0


def postgres_binaries() -> Path | None:
    """The folder of initdb and postgres, the newest where there are several."""
    for folder in [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path(shutil.which("initdb") or "/-").parent]:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    return None


def why_no_postgres() -> str:
    """Why none can be started, or ""."""
    missing = postgres_binaries() is None or find_spec("psycopg") is None
    return "PostgreSQL's server binaries or psycopg are not installed" if missing else ""


@contextmanager
def postgres_server(*options: str) -> Iterator[str]:
    """Runs one with new data; gives its URL. `options` are of the command postgres: "-c", "fsync=off"."""
    # A folder of its own below /tmp: pytest closes its folders to other users whenever one more pytest starts.
    with (
        tempfile.TemporaryDirectory(prefix="understudy-postgres-", ignore_cleanup_errors=True) as folder,
        _running(Path(folder), options) as url,
    ):
        yield url


@contextmanager
def _running(folder: Path, options: tuple[str, ...]) -> Iterator[str]:
    binaries = postgres_binaries()
    assert binaries is not None
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid}
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    data = folder / "data"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
    subprocess.run([binaries / "initdb", "-D", data, "-U", "understudy", "-A", "trust", "--no-sync"], check=True, **quiet, **user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(binaries / "postgres"),
        "-D",
        str(data),
        "-p",
        str(port),
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        "unix_socket_directories=",
    ]
    server = subprocess.Popen([*command, *options], **quiet, **user)
    try:
        ready = [str(binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-t", "1"]
        ends = time.monotonic() + _READY_S
        while subprocess.run(ready, check=False, **quiet).returncode != 0:
            assert server.poll() is None, "PostgreSQL ended"
            assert time.monotonic() < ends, "PostgreSQL does not answer"
        yield f"postgresql+psycopg://understudy@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait()
