"""Text generation through the Open Inference Protocol: what a request may say, and Triton's own client against the real server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.api import open_inference_generate as generation
from server.errors import InvalidArgument, InvalidTensor
from server.runtime.repository import Repository
from tests import generation_models as scripted
from tests.server_process import ServerProcess


def test_the_real_client(tmp_path: Path) -> None:
    """Its own process: its description of the protocol and ours cannot be loaded together."""
    repository = Repository(tmp_path / "models")
    scripted.publish(repository, tmp_path)
    running = ServerProcess(tmp_path / "server", "[generation]\nkv_cache_bytes = 33554432", models=repository.root)
    running.wait_ready()
    checks = Path(__file__).with_name("with_triton_generation.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, env={**os.environ, "UNDERSTUDY_TEST_ADDRESS": running.address}, capture_output=True, text=True)
    running.stop(allow_errors=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]


def text(value: str) -> Any:
    return np.array([value.encode()], np.object_)


@pytest.mark.parametrize(
    "parameters",
    [
        '{"n": true}',
        '{"n": 1.5}',
        '{"stop": [1]}',
        '{"stop_token_ids": "1"}',
        '{"logit_bias": {"a": 1}}',
        '{"guided_decoding": {"json": {}, "regex": "a"}}',
        '{"guided_decoding": {"poem": 1}}',
        "[]",
        "{",
        "[" * 100000,
        '{"temperature": "hot"}',
        '{"max_tokens": 1e400}',
    ],
)
def test_parameters_that_cannot_be(parameters: str) -> None:
    with pytest.raises(InvalidArgument):
        generation.read({"text_input": text("a"), "sampling_parameters": text(parameters)})


def test_parameters_as_older_clients_send_them() -> None:
    ask = generation.read(
        {
            "text_input": text("a"),
            "sampling_parameters": text('{"temperature": "0.5", "max_tokens": "7", "top_k": -1, "stop": "x", "lora_name": "poet"}'),
        }
    )
    assert (ask.request.sampling.temperature, ask.request.max_tokens, ask.request.sampling.top_k) == (0.5, 7, 0)
    assert (list(ask.request.stop), ask.request.adapter, ask.prepend) == (["x"], "poet", True)
    guided = generation.read({"text_input": text("a"), "sampling_parameters": text('{"guided_decoding": {"json": {"type": "object"}}}')})
    assert guided.request.format is not None
    assert guided.request.format.kind == "json_schema"


@pytest.mark.parametrize("bad", [{}, {"text_input": np.zeros(1)}, {"text_input": text("a"), "stream": text("a")}, {"tokens": text("a")}])
def test_tensors_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidTensor):
        generation.read(bad)
