"""Drives the running server with the real client of the Open Inference Protocol, sync and aio."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.small_models import serve_small


def test_the_real_client(tmp_path: Path) -> None:
    """Its own process: its description of the protocol and ours cannot be loaded together. See with_triton_client.py for what is held."""
    checks = Path(__file__).with_name("with_triton_client.py")
    with serve_small(tmp_path) as server:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(checks)]
        done = subprocess.run(command, env={**os.environ, "UNDERSTUDY_TEST_ADDRESS": server.address}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:] + server.log.read_text()[-4000:]
        assert server.popen.poll() is None
    assert server.popen.returncode == 0
