"""Every command of every page of the documentation is run as it stands there, against a real server with a gateway, or says why not."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import docs_pages
from tests.docs_pages import Block
from tests.gateway_process import GatewayProcess, build_gateway
from tests.providers.loopback import OpenAIServer, Reply
from tests.server_process import ROOT, ServerProcess
from tests.trainer_lake import texts
from understudy.client import Client

PAGES = docs_pages.pages()
RUN = [page for page in PAGES if any(block.mark == "run" for block in docs_pages.blocks(page))]
GOLD = dict(texts(400, seed=3))
FIRST = "quickstart.md"  # trains the student that the other pages speak of
PAGE_S, WAIT_S = 120.0, 60.0
CONFIG = """
[lake]
flush_s = 0.3
[providers.openai]
base_url = "{url}"
api_key_env = "OPENAI_API_KEY"
training_allowed = true
[skills.support-intent]
task = "text-classification"
labels = ["card", "password", "transfer"]
teacher = "openai/gpt-4o-mini"
base = "all-minilm-l6-v2"
method = "linear-head"
min_rows = 50
[skills.reply]
task = "text-generation"
instruction = "Answer in one sentence."
teacher = "openai/gpt-4o-mini"
[rollout]
poll_s = 0.1
[curation]
label_errors = "off"
"""
# What stands in the documentation for commands that find the server by their defaults.
SHIM = """#!/bin/sh
case "$1 $*" in
  rollout*--server*|health*--address*|run*--address*) ;;
  rollout*) set -- "$@" --server {server} ;;
  health*|run*) set -- "$@" --address {server} ;;
esac
exec {python} -m server.cli "$@"
"""


def test_every_block_of_commands_says_whether_it_is_run() -> None:
    silent = [f"{block.page}:{block.line}" for page in PAGES for block in docs_pages.blocks(page) if not block.mark]
    assert not silent, "put <!-- run --> or <!-- not run: why --> above these"
    unsaid = [
        f"{block.page}:{block.line}" for page in PAGES for block in docs_pages.blocks(page) if block.mark == "not run" and not block.more
    ]
    assert not unsaid, "say why these are not run"


def test_most_commands_are_run() -> None:
    marks = [block.mark for page in PAGES for block in docs_pages.blocks(page)]
    assert marks.count("run") > 2 * marks.count("not run") > 0


class Stage:
    """A folder with what an operator has: configuration, models, lake, registry; a server with a student on its way, a gateway."""

    def __init__(self, folder: Path, ends: ExitStack) -> None:
        self.folder = folder / "server"
        self.teacher = OpenAIServer(lambda number, text: Reply(GOLD.get(text, "card")))
        ends.callback(self.teacher.close)
        shutil.copytree(ROOT / "models" / "all-minilm-l6-v2", self.folder / "models" / "all-minilm-l6-v2", copy_function=_link)
        self.server = ServerProcess(self.folder, CONFIG.format(url=self.teacher.base_url), env={"OPENAI_API_KEY": "secret"})
        ends.callback(self.server.stop, allow_errors=True)
        self.server.wait_ready()
        self.gateway = GatewayProcess(self.server.address)
        ends.callback(self.gateway.stop)
        self.other = _free_port()

    def run(self, page: Path) -> None:
        """A page's blocks in order, in one shell."""
        script = "set -euo pipefail\n" + "\n".join(self._step(block) for block in docs_pages.blocks(page) if block.mark == "run")
        done = self._bash(script)
        assert done.returncode == 0, f"{page.name}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def fill(self) -> None:
        """Traffic, and what is recorded of it."""
        with Client(self.server.address) as client:
            works = list(GOLD)
            for begin in range(0, len(works), 100):
                client.run("support-intent", works[begin : begin + 100], user=f"user {begin}")
            client.run("support-intent", ["I lost my wallet"], user="ada")
            written = client.run("reply", ["How do I get a new card?"])[0]
            client.feedback(written.interaction_id, thumb="down", correction="Order one in the app.")
        self._until("curl -fsS 'localhost:8080/v1/interactions?pageSize=500' | grep -o inputKind | wc -l | grep -qx 402")
        self._until("curl -fsS 'localhost:8080/v1/interactions?withFeedback=true' | grep -q interactionId")

    def train(self) -> None:
        """Sees to a student that is on its way: the page that trains the first one may not have run."""
        status = self._bash("understudy rollout status support-intent").stdout
        if "version" not in status:
            done = self._bash("understudy train support-intent")
            assert done.returncode == 0, done.stdout + done.stderr
        self._until("understudy rollout status support-intent | grep -q version")

    def _until(self, command: str) -> None:
        end = time.monotonic() + WAIT_S
        while (done := self._bash(command)).returncode:
            assert time.monotonic() < end, f"{command}\n{done.stdout}{done.stderr}"

    def _step(self, block: Block) -> str:
        place = f'echo "== {block.page}:{block.line}" >&2'
        if block.until:
            return f"{place}\n{_ended(block.text, block.until)}"
        return f"{place}\npython - <<'END_OF_PYTHON'\n{block.text}\nEND_OF_PYTHON" if block.kind == "python" else f"{place}\n{block.text}"

    def _bash(self, script: str) -> subprocess.CompletedProcess[str]:
        for port, real in (("50051", self.server.address), ("8080", self.gateway.address)):
            script = re.sub(rf"(localhost|127\.0\.0\.1):{port}\b", real, script)
        script = script.replace("50052", str(self.other))
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("UNDERSTUDY_", "OTEL_"))}
        env = {
            **inherited,
            "PATH": f"{self._tools()}{os.pathsep}{inherited['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")]),
            "OPENAI_API_KEY": "secret",
            "BROWSER": "true",  # what would open a page ends at once
        }
        return subprocess.run(["bash", "-c", script], cwd=self.folder, env=env, capture_output=True, text=True, timeout=PAGE_S)

    def _tools(self) -> Path:
        tools = self.folder.parent / "bin"
        if not tools.exists():
            tools.mkdir()
            (tools / "understudy").write_text(SHIM.format(server=self.server.address, python=sys.executable))
            (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # a link would lose its environment
            for name in ("understudy", "python"):
                (tools / name).chmod(0o755)
            for name in ("grpcurl", "grpcui"):
                built = ROOT / ".tools" / "bin" / name
                found = str(built) if built.exists() else shutil.which(name)
                assert found, "run the suite by `make test`, which builds grpcurl and grpcui"
                (tools / name).symlink_to(found)
        return tools


def _ended(command: str, words: str) -> str:
    """Runs a command that goes on until its output has these words, or fails."""
    return f"""{command} > going.log 2>&1 &
GOING=$!
for _ in $(seq 300); do grep -q {shlex.quote(words)} going.log && break; kill -0 $GOING; sleep 0.05; done
grep -q {shlex.quote(words)} going.log
kill $GOING && wait $GOING || true"""


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
    return target


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    build_gateway()
    with ExitStack() as ends:
        made = Stage(tmp_path_factory.mktemp("docs"), ends)
        made.fill()
        yield made


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_pages_commands_work(page: Path, stage: Stage) -> None:
    if page.name != FIRST:
        stage.train()
    stage.run(page)
