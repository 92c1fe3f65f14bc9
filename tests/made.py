"""`make` from tests: what a test needs and make can build. Tests run side by side, and two makes must not write the same files at once."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs make at the root once no other test's does; its output is text, and its exit code the caller's to judge."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / ".make.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def built(*targets: str) -> None:
    """Targets that must be there; those that are up to date cost nothing."""
    done = make(*targets)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-20_000:]
