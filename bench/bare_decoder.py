"""The decoder engine without a server, in a process of its own: `python -m bench.bare_decoder MODELS NAME`.

It answers as bench.generation_load does, from the engine's own times: no gRPC, no text, nothing between the caller and the loop.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from server.config import load_config
from server.core import Call
from server.runtime.decoder.contract import Job, Sampling
from server.runtime.decoder.engine import GenerationEngine
from server.runtime.decoder.load import LoadedDecoder
from server.runtime.loader import make_loader
from server.runtime.observer import NullObserver
from server.runtime.repository import Repository


async def _one(engine: GenerationEngine, request: dict[str, Any]) -> dict[str, Any]:
    sent = time.monotonic()
    arrivals, ids = [], []
    job = Job(prompt=request["prompt"], sampling=Sampling(temperature=0.0), max_tokens=request["tokens"], call=Call("bench"))
    async for pieces in engine.submit(job):
        tokens = [token.id for piece in pieces for token in piece.tokens]
        if tokens:
            arrivals.append((time.monotonic(), len(tokens)))
            ids += tokens
    return {"sent": sent, "arrivals": arrivals, "ids": ids, "error": ""}


async def serve(models: Path, name: str) -> None:
    loop = asyncio.get_running_loop()
    config = load_config(environ={})

    async def in_thread(function: Any) -> Any:
        return await loop.run_in_executor(None, function)

    files = await in_thread(lambda: Repository(models).open(name))
    model = await make_loader(config.runtime, NullObserver(), config.generation)(files, in_thread)
    assert isinstance(model, LoadedDecoder)
    engine = model.engine
    print(json.dumps({"reply": "ready"}), flush=True)
    while line := await in_thread(sys.stdin.readline):
        plan = json.loads(line)
        waiting, reports = deque(plan["requests"]), []

        async def caller(waiting: deque[Any] = waiting, reports: list[Any] = reports) -> None:
            while waiting:
                reports.append(await _one(engine, waiting.popleft()))

        await asyncio.gather(*(caller() for _ in range(plan["streams"])))
        print(json.dumps({"reply": reports}), flush=True)
    await model.close(drain=True)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2]))
