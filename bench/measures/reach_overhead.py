"""Bar `overhead`: what the gateway adds to a unary call and takes from streams, by one client that asks both ways in turns.

The client is gateway/cmd/reachload, on the same two cores as server and gateway: what the three share is part of the figure. Streams are of
the 135M shape of `make bench-generate`, greedy, so that a token is what a small real model's costs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

from bench.generation_models import shape
from bench.harness import BUILD, ROOT, STARTER, Row, free_port, median, part, row_of, serve

OVERHEAD = "the gateway adds p50 <= 0.6 ms to a unary call, and costs <= 5 % of the tokens a second of 32 streams"
ADDED_MS, SHARE = 0.6, 0.95
GATEWAY = ROOT / "build" / "gateway" / "understudy-gateway"
STREAMS = 32


@contextlib.contextmanager
def gateway(server: str) -> Iterator[str]:
    """The gateway in front of the server at this address, with its usual settings; gives its base URL."""
    subprocess.run(["make", "gateway"], cwd=ROOT, check=True, capture_output=True)
    port = free_port()
    flags = ["--server", server, "--listen", f"127.0.0.1:{port}", "--metrics-listen", f"127.0.0.1:{free_port()}"]
    process = subprocess.Popen([str(GATEWAY), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(f"http://127.0.0.1:{port}/readyz")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def overhead() -> Row:
    """Unary calls, then streams."""
    parts: list[dict[str, Any]] = []
    with serve(extra={"models.load": [STARTER]}) as server, gateway(server.address) as url:
        for mode in ("status", "embed"):
            runs = [_load(server.address, url, STARTER, mode) for _ in range(3)]
            added = round(median([run["added_p50_ms"] for run in runs]), 3)
            name = {"status": "added to GetBudget, p50 ms", "embed": "added to Embed of one text, p50 ms"}[mode]
            parts.append(part(name, f"<= {ADDED_MS}", added, added <= ADDED_MS, runs=runs))
    model = shape("smollm2-135m")
    with serve(model.models, extra={"models.load": [model.name]}) as server, gateway(server.address) as url:
        rates = _load(server.address, url, model.name, "stream")["tokens_per_s"]
    for way, name in (("rest", "REST lines"), ("openai", "OpenAI completions")):
        share = round(median([through / direct for through, direct in zip(rates[way], rates["direct"], strict=True)]), 3)
        parts.append(part(f"{STREAMS} streams, {name}, of direct gRPC", f">= {SHARE}", share, share >= SHARE, tokens_per_s=rates))
    return row_of("overhead", OVERHEAD, parts)


def _load(server: str, url: str, model: str, mode: str) -> Any:
    program = BUILD / "reachload"
    environment = {**os.environ, "GOFLAGS": "-mod=mod"}
    subprocess.run(["go", "build", "-o", str(program), "./cmd/reachload"], cwd=ROOT / "gateway", check=True, env=environment)
    command = [str(program), "-grpc", server, "-http", url, "-model", model, "-mode", mode, "-streams", str(STREAMS)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _wait(url: str) -> None:
    """Until the gateway says that it is ready, 30 seconds at most."""
    import time
    import urllib.error
    import urllib.request

    end = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
