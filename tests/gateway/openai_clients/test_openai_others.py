"""The clients of others: OpenAI's for Node.js, LiteLLM, LangChain. Each in a process of its own, as its users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import generation_models as scripted
from tests.made import built

HERE = Path(__file__).parent
NODE = HERE.parent / "openai_node"
SAID = scripted.ANSWER + scripted.CALL


def run(command: list[str], **env: str) -> None:
    paths = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])  # where PyPI's Node.js is
    done = subprocess.run(command, env={**os.environ, "PATH": paths, **env}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_openais_client_for_node(site: Any) -> None:
    built("tests/gateway/openai_node/node_modules/.package-lock.json")
    run(["node", str(NODE / "client.mjs"), site.base_url, SAID, scripted.ANSWER])


def test_litellm(site: Any) -> None:
    # Without the variable it asks GitHub for prices when it is imported.
    run([sys.executable, str(HERE / "with_litellm.py"), site.base_url, SAID], LITELLM_LOCAL_MODEL_COST_MAP="True")


def test_langchain(site: Any) -> None:
    run([sys.executable, str(HERE / "with_langchain.py"), site.base_url, SAID, scripted.ANSWER], LANGSMITH_TRACING="false")
