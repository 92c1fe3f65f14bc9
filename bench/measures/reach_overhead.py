"""Bar `overhead`: what the gateway adds to a unary call and takes from streams, by one client that asks both ways in turns.

The client is gateway/cmd/reachload, on the same two cores as server and gateway: what the three share is part of the figure. Streams are of
the 135M shape of `make bench-generate`, greedy, so that a token is what a small real model's costs.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

from bench.generation_models import shape
from bench.harness import BUILD, ROOT, STARTER, Row, median, part, row_of, serve
from tests.gateway_process import GatewayProcess, build_gateway

OVERHEAD = "the gateway adds p50 <= 0.6 ms to a unary call, and costs <= 5 % of the tokens a second of 32 streams"
ADDED_MS, SHARE = 0.6, 0.95
STREAMS = 32


@contextlib.contextmanager
def gateway(server: str) -> Iterator[str]:
    """The gateway in front of the server at this address, with its usual settings; gives its base URL."""
    build_gateway()
    running = GatewayProcess(server, "--access-log=false")
    try:
        yield running.url
    finally:
        running.stop()


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
