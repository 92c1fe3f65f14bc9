"""`make run`: server and gateway together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.made import ROOT

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(gateway_binary: Path, small_models: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts what `make run` starts, in an empty folder, on free ports."""
    started: list[subprocess.Popen[str]] = []

    def begin(program: Path = gateway_binary) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "server.commands.up", "--gateway", str(program), "--port", "0", "--http-port", "0"]
        command += ["--models", str(small_models), "--set", "server.metrics_port=0", "--set", 'models.load=["embedder"]']
        env = {key: value for key, value in os.environ.items() if not key.startswith("UNDERSTUDY_")}
        env |= {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")]),
            "UNDERSTUDY_GATEWAY_METRICS_LISTEN": "127.0.0.1:0",
        }
        running = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(running)
        return running

    yield begin
    for running in started:
        if running.poll() is None:
            running.terminate()  # not killed: it has children of its own
        assert running.stdout is not None
        running.stdout.close()
        running.wait()


def ready(running: subprocess.Popen[str]) -> tuple[dict[str, str], list[str]]:
    """The three lines by their first words, and all lines until then."""
    assert running.stdout is not None
    found: dict[str, str] = {}
    lines: list[str] = []
    for line in running.stdout:
        lines.append(line)
        if match := re.fullmatch(r"(server|gateway|console) +(\S+)\n", line):
            found[match[1]] = match[2]
        if "console" in found:
            return found, lines
    raise AssertionError("".join(lines))


def test_one_line_each_when_all_are_ready_and_a_clean_end(start: Start) -> None:
    running = start()
    found, _ = ready(running)
    assert found.keys() == {"server", "gateway", "console"}
    assert httpx.get(f"{found['gateway']}/readyz").status_code == 200
    assert httpx.get(f"{found['gateway']}/v1/status").json()["draining"] is False
    assert httpx.get(found["console"]).status_code == 200
    running.send_signal(signal.SIGTERM)
    rest, _ = running.communicate(timeout=60)
    assert running.returncode == 0, rest
    gateway, server = rest.index('"msg":"stopped"'), rest.index('"event": "stopped"')
    assert gateway < server


@pytest.mark.parametrize("victim", ["understudy-gateway", "server.cli"])
def test_where_one_dies_the_other_is_stopped(start: Start, victim: str) -> None:
    running = start()
    ready(running)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    (child,) = [int(one) for one in children if victim in Path(f"/proc/{one}/cmdline").read_text()]
    os.kill(child, signal.SIGKILL)
    rest, _ = running.communicate(timeout=60)
    assert running.returncode == 1, rest
    assert "ended by itself" in rest
    assert not [one for one in children if Path(f"/proc/{one}").exists()]


def test_a_missing_gateway_says_how_to_make_it(start: Start, tmp_path: Path) -> None:
    running = start(tmp_path / "absent")
    output, _ = running.communicate(timeout=30)
    assert running.returncode == 1
    assert "make gateway" in output


def test_make_run_is_what_was_tested() -> None:
    plan = subprocess.run(
        ["make", "-n", "run", "PORT=1", "HTTP_PORT=2", "ARGS=--x"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"server\.commands\.up --gateway \S+ --port 1 --http-port 2 --x", plan)
