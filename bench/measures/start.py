"""Bar `start`: a clean clone to its first answer, what it installed, and how fast and small later starts are."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import grpc
import psutil

from bench.harness import ROOT, STARTER, Row, free_port, part, row_of

BAR = (
    "clean clone to first answer of `make run` <= 120 s with < 1.5 GB installed, torch absent; later starts answer within 3 s"
    " with MiniLM int8, under 350 MB resident"
)


def measure() -> Row:
    folder = Path(tempfile.mkdtemp(prefix="understudy-clone-"))
    try:
        clone = folder / "understudy"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        first, _ = _answer_time(clone, 600)
        installed = sum(f.stat().st_size for f in (clone / ".venv").rglob("*") if f.is_file() and not f.is_symlink())
        torch_absent = not list((clone / ".venv").glob("lib*/python*/site-packages/torch"))
        later, sizes = zip(*(_answer_time(clone, 60) for _ in range(3)), strict=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row_of(
        "start",
        BAR,
        [
            part("clean clone to first answer, s", "<= 120", round(first, 1), first <= 120),
            part("installed, GB", "< 1.5", round(installed / 1e9, 2), installed < 1.5e9),
            part("torch absent", "true", torch_absent, torch_absent),
            part("later start to first answer, s", "<= 3", round(sorted(later)[1], 2), sorted(later)[1] <= 3),
            part("resident, MB", "< 350", round(max(sizes) / 1e6), max(sizes) < 350e6),
        ],
    )


def _answer_time(clone: Path, limit: float) -> tuple[float, int]:
    """Seconds from `make run` to an answered Embed, and the server's resident bytes after it."""
    from understudy.v1 import common_pb2, inference_service_pb2, inference_service_pb2_grpc

    port = free_port()
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    start = time.perf_counter()
    log = (clone.parent / "run.log").open("wb")
    make = subprocess.Popen(
        ["make", "run", f"PORT={port}", "ARGS=--set server.metrics_port=0"],
        cwd=clone,
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        while True:
            try:
                with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                    stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
                    reply = stub.Embed(
                        inference_service_pb2.EmbedRequest(model=common_pb2.ModelSelector(name=STARTER), texts=["Where is my card?"]),
                        timeout=5,
                    )
                assert len(reply.results[0].embedding) == 384
                break
            except grpc.RpcError:
                if make.poll() is not None or time.perf_counter() - start > limit:
                    raise SystemExit(f"`make run` gave no answer:\n{(clone.parent / 'run.log').read_text()[-3000:]}") from None
                time.sleep(0.05)
        seconds = time.perf_counter() - start
        family = [psutil.Process(make.pid), *psutil.Process(make.pid).children(recursive=True)]
        return seconds, max(p.memory_info().rss for p in family)
    finally:
        os.killpg(make.pid, signal.SIGTERM)
        make.wait(60)
        log.close()
