"""What a user gets from `pip install`: the wheel holds the product and nothing of the workshop."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    # The environment holds the build requirements already; isolation would download them again.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_no_sources_and_no_tests(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert not [n for n in names if n.endswith((".c", ".h", ".pyx", ".pxd", ".proto"))]
    assert not [n for n in names if re.search(r"(^|/)(tests?|bench)/", n)]


def test_holds_what_serving_needs(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "native/kernels/libunderstudy_kernels.so" in names
    assert any(n.startswith("native/batching.") and n.endswith(".so") for n in names)
    assert {
        "server/app.py",
        "understudy/v1/inference_service_pb2.py",
        "understudy/oip/open_inference_pb2.py",
        "understudy/client.py",
    } <= names
    assert any(n.endswith("calibration.txt") for n in names)


def test_no_absolute_path_of_the_builder(wheel: zipfile.ZipFile) -> None:
    here = str(ROOT).encode()
    for name in wheel.namelist():
        assert not name.startswith("/")
        assert here not in wheel.read(name), f"{name} holds the builder's path"
