from __future__ import annotations

import subprocess
import sys

from tests.server_process import ServerProcess


def _health(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "server.cli", "health", *arguments], capture_output=True, text=True, timeout=60)


def test_says_serving_and_exits_0(server: ServerProcess) -> None:
    done = _health("--address", server.address, "--service", "understudy.v1.InferenceService")
    assert (done.returncode, "SERVING" in done.stdout) == (0, True)


def test_no_server_is_exit_code_1() -> None:
    done = _health("--address", "127.0.0.1:1", "--timeout", "0.5")
    assert done.returncode == 1
    assert "no answer" in done.stderr
    assert "Traceback" not in done.stderr
