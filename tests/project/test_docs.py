"""What the documents promise is there: the README's lines run, every command, setting, RPC and metric that exists is named."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GRPCURL = ROOT / ".tools" / "bin" / "grpcurl"
# Lines that change the server, or need a provider, are tested where those parts are.
ELSEWHERE = ("LoadModel", "UnloadModel", "/Run")


def readme_lines() -> list[str]:
    lines = re.findall(r"^    (grpcurl .+)$", README, flags=re.MULTILINE)
    return [line for line in lines if not line.endswith(ELSEWHERE)]


@pytest.mark.parametrize("line", readme_lines())
def test_grpcurl_line_answers(line: str, server: ServerProcess) -> None:
    tool = str(GRPCURL) if GRPCURL.exists() else shutil.which("grpcurl")
    assert tool, "run the suite by `make test`, which builds grpcurl"
    command = line.replace("grpcurl", tool, 1).replace("localhost:50051", server.address)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_readme_shows_working_lines_early() -> None:
    assert "make run" in "\n".join(README.splitlines()[:30])


def test_every_make_target_of_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        for target in re.findall(r"make ([a-z][a-z-]*)", re.sub(r"make the same|make no", "", (ROOT / name).read_text(encoding="utf-8"))):
            if re.search(rf"`make {target}|^    make {target}", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE):
                assert target in targets, f"{name} names `make {target}`"


def test_example_configuration_shows_every_setting() -> None:
    from server.config import known_keys

    example = (ROOT / "understudy.example.toml").read_text(encoding="utf-8")
    shown = set(re.findall(r'^#?\s*"?([a-z][a-z_-]*)"?(?: =|:|\.)', example, flags=re.MULTILINE))
    missing = [key for key in known_keys() if key.rpartition(".")[2] not in shown]
    assert not missing, f"understudy.example.toml does not show {missing}"


def test_every_package_is_on_the_map() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for folder in sorted(p.name for p in (ROOT / "server").iterdir() if p.is_dir() and p.name not in ("__pycache__", "commands")):
        assert f"`server/{folder}`" in text
