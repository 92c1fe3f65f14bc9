"""LiteLLM's proxy in an environment of its own: one worker, a list of models, no database, its own logging."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from bench.harness import BUILD, free_port
from bench.peers.start import answers, environment, process

# The newest whose extra `proxy` can be installed from PyPI.
VERSION = "1.106.12"
FOLDER = BUILD / "litellm"


@dataclass(slots=True, frozen=True)
class Gateway:
    """A running proxy. `port` of its HTTP API, `versions` of what it is made of."""

    port: int
    process: psutil.Process
    versions: Mapping[str, str]

    def cpu_s(self) -> float:
        """Seconds of processor time, with its children's."""
        times = [one.cpu_times() for one in (self.process, *self.process.children(recursive=True))]
        return float(sum(one.user + one.system for one in times))


@contextlib.contextmanager
def litellm(models: Mapping[str, str], prices: Mapping[str, float]) -> Iterator[Gateway]:
    """`models`: name -> base URL of a server that speaks OpenAI's format; `prices` of a token, by LiteLLM's names."""
    python = environment("litellm", [f"litellm[proxy]=={VERSION}"])
    port = free_port()
    config = FOLDER / "config.yaml"
    listed: list[dict[str, Any]] = [
        {"model_name": name, "litellm_params": {"model": "openai/mock", "api_base": url, "api_key": "none", **prices}}
        for name, url in models.items()
    ]
    # Ours checks no keys here either. JSON is YAML.
    general = {"dangerously_permit_weak_or_unset_master_key": True}
    config.write_text(json.dumps({"model_list": listed, "general_settings": general}))
    # Without the variable it asks GitHub for prices when it starts.
    command = ["env", "LITELLM_LOCAL_MODEL_COST_MAP=True", str(python.parent / "litellm"), "--config", str(config)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1", "--telemetry", "False"]
    with process(command, lambda: answers(f"http://127.0.0.1:{port}/health/liveliness"), FOLDER / "proxy.log") as popen:
        yield Gateway(port, psutil.Process(popen.pid), _versions(str(python)))


def _versions(python: str) -> dict[str, str]:
    code = "import importlib.metadata as m; print('\\n'.join(f'{n} {m.version(n)}' for n in ('litellm', 'openai', 'uvicorn', 'uvloop')))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())
