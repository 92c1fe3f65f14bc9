"""The client's package builds from its own source distribution, outside of the repository, and needs nothing of the server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def build(folder: Path, kind: str, out: Path) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(folder)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # the repository has a folder named build
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return next(path for path in out.iterdir() if path.name.endswith(".whl" if kind == "wheel" else ".tar.gz"))


def test_sdist_to_wheel_to_import(tmp_path: Path) -> None:
    generated = shutil.ignore_patterns("*_pb2*", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "clients" / "python", tmp_path / "repo" / "clients" / "python", ignore=generated)
    shutil.copytree(ROOT / "protos", tmp_path / "repo" / "protos", ignore=generated)
    archive = build(tmp_path / "repo" / "clients" / "python", "sdist", tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    wheel = build(next((tmp_path / "unpacked").iterdir()), "wheel", tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as package:
        names = package.namelist()
        package.extractall(tmp_path / "site")
    assert "understudy/py.typed" in names
    assert "understudy/v1/inference_service_pb2.py" in names
    assert "understudy/oip/open_inference_pb2.pyi" in names
    assert not [name for name in names if name.endswith(".proto") or name.startswith(("server", "tests", "protos"))]
    check = (
        "import sys; sys.path.insert(0, sys.argv[1]); import understudy.client, understudy.aio;"
        "assert understudy.client.__file__.startswith(sys.argv[1]);"
        "assert not {'server', 'native', 'onnxruntime', 'tokenizers', 'pydantic', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check, str(tmp_path / "site")], check=True, cwd=tmp_path, env={})
