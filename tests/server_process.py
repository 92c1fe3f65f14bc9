"""The real server as a process: started on a free port, stopped by SIGTERM, its log at hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START_S = 60.0


class ServerProcess:
    """`address` and `metrics` are set once `start` returns; `lines` grows while it runs."""

    def __init__(self, folder: Path, config: str = "", *, models: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        """`config` is TOML; `folder` becomes the working directory."""
        self.address = ""
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._listening = threading.Event()
        self._ready = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "understudy.toml"
        file.write_text(config)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("UNDERSTUDY_", "OTEL_"))}
        paths = os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])
        command = [sys.executable, "-m", "server.cli", "serve", "--config", str(file), "--port", "0"]
        command += ["--models", str(models)] if models else []
        command += ["--set", "log.format=json"]
        command += [] if "metrics_port" in config else ["--set", "server.metrics_port=0"]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={**inherited, "PYTHONPATH": paths, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
            if '"event": "listening"' in line:
                self.address = json.loads(line)["address"]
                self._listening.set()
            elif '"event": "ready"' in line:
                self._ready.set()
        self._listening.set()
        self._ready.set()

    def wait_listening(self) -> str:
        """The address; models may still be loading."""
        assert self._listening.wait(START_S), "".join(self.lines)
        assert self.address, "".join(self.lines)
        return self.address

    def wait_ready(self) -> str:
        """The address, once everything is loaded. Fails where the server ended instead."""
        assert self._ready.wait(START_S), "".join(self.lines)
        assert self.process.poll() is None and self.address, "".join(self.lines)
        return self.address

    @property
    def closed(self) -> bool:
        """Whether its end was seen by `wait` or `stop`."""
        return self.process.stdout is None or self.process.stdout.closed

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log lines with this `event`, so far."""
        found = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [line for line in found if line.get("event") == name]

    def wait_event(self, name: str, count: int = 1, **fields: object) -> list[dict[str, Any]]:
        """Waits until the log has `count` lines with this `event` and these fields; returns them."""

        def found() -> list[dict[str, Any]]:
            return [one for one in self.events(name) if fields.items() <= one.items()]

        with self._news:
            assert self._news.wait_for(lambda: len(found()) >= count, START_S), "".join(self.lines)
        return found()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 60.0) -> int:
        """The exit code; every line has been read then."""
        code = self.process.wait(timeout)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def stop(self, *, allow_errors: bool = False) -> None:
        """SIGTERM, and a clean end: exit code 0, no traceback, no error in the log."""
        if self.process.poll() is None:
            self.signal()
        try:
            code = self.wait()
        finally:
            self.process.kill()
        text = "".join(self.lines)
        assert code == 0, text
        assert "Traceback" not in text, text
        if not allow_errors:
            assert '"level": "error"' not in text, text
