"""The command `understudy`: help, errors, doctor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def understudy(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("UNDERSTUDY_")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])
    command = [sys.executable, "-m", "server.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_help_names_every_command_and_imports_nothing_heavy(tmp_path: Path) -> None:
    shown = understudy(tmp_path, "--help")
    assert shown.returncode == 0
    for command in ("serve", "run", "doctor", "version", "models", "train"):
        assert command in shown.stdout
    probe = "import sys, server.cli; print(sorted({'grpc', 'onnxruntime', 'numpy', 'pyarrow', 'openai'} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--set", "server.prot=1"], "'port'"),
        (["serve", "--set", "server.port"], "has no value"),
        (["serve", "--config", "absent.toml"], "absent.toml"),
    ],
)
def test_errors_are_one_readable_paragraph(tmp_path: Path, arguments: list[str], says: str) -> None:
    done = understudy(tmp_path, *arguments)
    assert done.returncode != 0
    assert says in done.stderr and "Traceback" not in done.stderr


def test_doctor_finds_what_is_wrong(tmp_path: Path, small_models: Path) -> None:
    free_ports = ("--set", "server.port=0", "--set", "server.metrics_port=0")
    well = understudy(tmp_path, "doctor", "--set", f"models.path={small_models}", *free_ports)
    assert well.returncode == 0, well.stdout + well.stderr
    assert "every kernel agrees with its twin" in well.stdout and "all verified" in well.stdout
    (tmp_path / "understudy.toml").write_text('[providers.p]\napi_key_env = "SURELY_NOT_SET"\n[server]\nmetrics_port = 0\nport = 0\n')
    ill = understudy(tmp_path, "doctor")
    assert ill.returncode == 1 and "SURELY_NOT_SET" in ill.stdout
