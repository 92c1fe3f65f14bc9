"""`understudy run`: from a running server and in its own process, a prompt and a conversation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.runtime.repository import Repository
from tests import generation_models as scripted
from tests.server_process import ROOT, ServerProcess

TOLD = "".join(scripted.STORY[1:])
GREEDY = ("--temperature", "0", "--max-tokens", "8")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    repository = Repository(root / "models")
    scripted.publish(repository, root)
    return repository.root


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    running = ServerProcess(tmp_path_factory.mktemp("server"), "[generation]\nkv_cache_bytes = 33554432", models=models)
    running.wait_ready()
    yield running
    running.stop(allow_errors=True)


def understudy(*arguments: str, said: str = "", folder: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])}
    command = [sys.executable, "-m", "server.cli", "run", *arguments]
    return subprocess.run(command, input=said, capture_output=True, text=True, env=env, cwd=folder, timeout=120)


def test_a_prompt(server: ServerProcess, tmp_path: Path) -> None:
    address = ("--address", server.address)
    done = understudy(scripted.NAME, "tell", *address, *GREEDY, "--verbose", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, TOLD + "\n"), done.stderr
    assert "8 written" in done.stderr
    piped = understudy(scripted.NAME, *address, *GREEDY, "--stop", "about", said="tell", folder=tmp_path)
    assert piped.stdout == TOLD.partition("about")[0] + "\n"


def test_a_conversation(server: ServerProcess, tmp_path: Path) -> None:
    done = understudy(scripted.NAME, "--chat", "--temperature", "0", "--address", server.address, said="hello\nagain\n", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, (scripted.ANSWER + scripted.CALL + "\n") * 2), done.stderr


def test_without_a_server(models: Path, tmp_path: Path) -> None:
    local = ("--local", "--models", str(models), "--set", "generation.kv_cache_bytes=33554432")
    done = understudy(f"{scripted.NAME}@1", "tell", *local, *GREEDY, folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, TOLD + "\n"), done.stderr


def test_refusals_are_one_line(server: ServerProcess, tmp_path: Path) -> None:
    for arguments, says in (
        (("nothing", "tell", "--address", server.address), "nothing"),
        ((scripted.NAME, "tell", "--address", "127.0.0.1:1"), "--local"),
        ((scripted.NAME, "tell", "--address", server.address, "--temperature", "9"), "sampling.temperature"),
        ((scripted.NAME, "--address", server.address), "prompt"),
    ):
        done = understudy(*arguments, folder=tmp_path)
        assert done.returncode == 1, arguments
        assert says in done.stderr
        assert "Traceback" not in done.stderr
