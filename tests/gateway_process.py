"""The real gateway as a process in front of a server: on free ports, stopped by SIGTERM, its log at hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.made import ROOT, built

BINARY = ROOT / "build" / "gateway" / "understudy-gateway"
START_S = 30.0


def build_gateway() -> Path:
    """`make gateway`, which does nothing where the program is up to date."""
    built("gateway")
    return BINARY


class GatewayProcess:
    """`url` is the base URL, `address` its host and port, `metrics` those of /metrics, `server` the gRPC server's address."""

    def __init__(self, server: str, *flags: str, env: Mapping[str, str] | None = None) -> None:
        """Listens when it returns. `flags` come after those for the addresses, and win."""
        self.server = server
        self.lines: list[str] = []
        self.url = self.address = self.metrics = ""
        self._news = threading.Condition()
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("UNDERSTUDY_")}
        self.command = command = [str(BINARY), "--server", server, "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", *flags]
        self.process = subprocess.Popen(
            command, env={**inherited, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        started = self.wait_event("listening")[0]
        self.url, self.address, self.metrics = started["url"], started["address"], started["metrics"]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log lines with this `msg`, so far; "request" is an access line."""
        found = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [line for line in found if line.get("msg") == name]

    def wait_event(self, name: str, count: int = 1, **fields: object) -> list[dict[str, Any]]:
        """Waits until the log has `count` lines with this `msg` and these fields; returns them."""

        def found() -> list[dict[str, Any]]:
            return [one for one in self.events(name) if fields.items() <= one.items()]

        def over() -> bool:
            return len(found()) >= count or self.process.poll() is not None

        with self._news:
            self._news.wait_for(over, START_S)
        assert len(found()) >= count, "".join(self.lines)
        return found()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 30.0) -> int:
        """The exit code; every line has been read then."""
        code = self.process.wait(timeout)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def stop(self) -> None:
        """SIGTERM, and a clean end: exit code 0, no panic."""
        if self.process.poll() is None:
            self.signal()
        try:
            code = self.wait()
        finally:
            self.process.kill()
        text = "".join(self.lines)
        assert code == 0, text
        assert '"msg":"panic"' not in text, text
