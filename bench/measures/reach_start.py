"""Bar `start`: `make run` in a clean clone ends with server, gateway and console up, and a line for each."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench.harness import ROOT, Row, free_port, part, row_of

START = "`make run` from a clean clone ends with server, gateway and console up, and one printed line for each"
_LIMIT_S = 900.0
_LINE = re.compile(r"(server|gateway|console) +(\S+)")


def start() -> Row:
    """Clones, runs, asks each, ends it by SIGINT as a person would."""
    folder = Path(tempfile.mkdtemp(prefix="understudy-clone-"))
    try:
        clone = folder / "understudy"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        first = _run(clone)
        again = _run(clone)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = first["lines"]
    return row_of(
        "start",
        START,
        [
            part("lines", "server, gateway, console, one each", lines, sorted(lines) == ["console", "gateway", "server"]),
            part("answers", "200 from all", first["answers"], set(first["answers"].values()) == {200}),
            part("ends by SIGINT, exit code", "0", first["code"], first["code"] == 0),
            part("clean clone to the last line, s (packages' caches as they were)", "told", round(first["seconds"], 1), True),
            part("the second time, s", "told", round(again["seconds"], 1), True),
        ],
    )


def _run(clone: Path) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    begun = time.monotonic()
    command = ["make", "run", f"PORT={free_port()}", f"HTTP_PORT={free_port()}", "ARGS=--set server.metrics_port=0"]
    process = subprocess.Popen(
        command,
        cwd=clone,
        env={**environment, "UNDERSTUDY_GATEWAY_METRICS_LISTEN": "127.0.0.1:0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    found: dict[str, str] = {}
    lines: list[str] = []
    for line in process.stdout:
        if match := _LINE.fullmatch(line.strip()):
            found[match[1]] = match[2]
            lines.append(match[1])
        if "console" in found or time.monotonic() - begun > _LIMIT_S:
            break
    seconds = time.monotonic() - begun
    pages = {"gateway": "/v1/status", "console": ""}
    answers = {name: _status(found[name].rstrip("/") + path) for name, path in pages.items() if name in found}
    os.killpg(process.pid, signal.SIGINT)
    process.stdout.read()
    return {"lines": lines, "answers": answers, "seconds": seconds, "code": process.wait(60)}


def _status(url: str) -> int:
    with urllib.request.urlopen(url, timeout=10) as response:
        return int(response.status)
