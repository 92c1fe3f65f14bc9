"""Server and gateway together, for `make run`.

    python -m server.commands.up --gateway PROGRAM [--port N] [--http-port N] [options of serve]

Prints one line each for server, gateway and console once all are ready. SIGINT and SIGTERM stop the gateway first, whose running requests
end, then the server. Where one of the two ends by itself the other is stopped, and the exit code is not 0.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from types import FrameType

POLL_S = 0.1
PATIENCE_S = 60.0  # more than either's grace time
ANSWER_S = 5.0


class Supervisor:
    """Starts both, says when they are ready, and stops both."""

    def __init__(self) -> None:
        self._signals = 0
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._tick = threading.Event()

    def run(self, server: Sequence[str], gateway: Sequence[str], ready: Callable[[], bool], lines: str) -> int:
        """Prints `lines` when `ready`. 0: a signal came, and both ended well."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        for name, command in (("server", server), ("gateway", gateway)):
            # In a session of its own, so that Ctrl-C reaches it through us alone, in order.
            self._children[name] = subprocess.Popen(command, start_new_session=True)
        if self._until(ready):
            print(lines, flush=True)
            self._until(lambda: False)
        return self._end()

    def _until(self, done: Callable[[], bool]) -> bool:
        """Waits for `done`; False when a signal came or a process ended before."""
        while not self._signals and all(child.poll() is None for child in self._children.values()):
            if done():
                return True
            self._tick.wait(POLL_S)
        return False

    def _end(self) -> int:
        died = [name for name, child in self._children.items() if child.poll() is not None]
        codes = {name: self._stop(child) for name, child in reversed(self._children.items())}
        for name in died:
            print(f"the {name} ended by itself, with exit code {codes[name]}; so the other was stopped.", file=sys.stderr)
        return 0 if self._signals and not died and not any(codes.values()) else 1

    def _stop(self, child: subprocess.Popen[bytes]) -> int:
        """SIGTERM, and after a long while SIGKILL; returns the exit code."""
        if child.poll() is None:
            child.terminate()
        try:
            return child.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        self._tick.set()
        if self._signals > 1:  # a second one ends both at once
            for child in self._children.values():
                child.kill()


def main(arguments: Sequence[str]) -> int:
    """What is not ours goes to `understudy serve`; the gateway reads its other settings from UNDERSTUDY_GATEWAY_*."""
    parser = argparse.ArgumentParser(prog="make run", add_help=False, allow_abbrev=False)
    parser.add_argument("--gateway", required=True)
    parser.add_argument("--port", type=int, default=50051)
    parser.add_argument("--http-port", type=int, default=8080)
    ours, rest = parser.parse_known_args(arguments)
    if not os.access(ours.gateway, os.X_OK):
        print(f"{ours.gateway} is not there; expected the gateway's program: `make gateway` builds it.", file=sys.stderr)
        return 1
    port, http_port = ours.port or _free_port(), ours.http_port or _free_port()
    address, url = f"127.0.0.1:{port}", f"http://127.0.0.1:{http_port}"
    server = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), *rest]
    # The server writes an access line of each call; a second one of the same request would say nothing new.
    gateway = [ours.gateway, "--server", address, "--listen", f"127.0.0.1:{http_port}", "--access-log=false"]
    lines = f"server   {address}\ngateway  {url}\nconsole  {url}/"
    return Supervisor().run(server, gateway, lambda: _ready(url), lines)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=ANSWER_S):
            return True
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
