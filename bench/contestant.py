"""A contestant without a server, in a process of its own: it prints a line when it is ready, then answers each line of JSON with one.

`python -m bench.contestant raw FOLDER` is ONNX Runtime alone on the stock graph (optimum's export, fused, dynamic int8): texts
sorted by length, batches of 32 padded to their longest. `python -m bench.contestant engine MODEL` is the engine alone, in arrival
order. Both get tokens, not texts, and both give pooled, normalised vectors.
Commands: {"do": "load", "set": name, "texts": [...], "batch": n}, {"do": "run", "set": name, "seconds": s}, and for raw
{"do": "latency", "texts": [...]}.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import ROOT
from server.core import Call
from server.runtime.ort import import_ort


class Raw:
    """Stock ONNX Runtime, fed as well as it can be."""

    def __init__(self, folder: str) -> None:
        from tokenizers import Tokenizer

        ort = import_ort()
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(512)
        options = ort.SessionOptions()
        options.intra_op_num_threads = os.cpu_count() or 1
        self.session = ort.InferenceSession(str(Path(folder) / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.names = [i.name for i in self.session.get_inputs()]
        self.batches: dict[str, list[tuple[dict[str, Any], int]]] = {}

    def load(self, name: str, texts: list[str], batch: int) -> None:
        ids = sorted((e.ids for e in self.tokenizer.encode_batch(texts)), key=len)
        self.batches[name] = [(self.feed(ids[i : i + batch]), len(ids[i : i + batch])) for i in range(0, len(ids), batch)]

    def feed(self, ids: list[list[int]]) -> dict[str, Any]:
        longest = max(map(len, ids))
        tokens = np.zeros((len(ids), longest), np.int64)
        mask = np.zeros_like(tokens)
        for r, row in enumerate(ids):
            tokens[r, : len(row)], mask[r, : len(row)] = row, 1
        return {
            k: v
            for k, v in {"input_ids": tokens, "attention_mask": mask, "token_type_ids": np.zeros_like(tokens)}.items()
            if k in self.names
        }

    def vectors_of(self, feed: dict[str, Any]) -> np.ndarray[Any, Any]:
        hidden = self.session.run(None, feed)[0]
        mask = feed["attention_mask"][:, :, None].astype(np.float32)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    def run(self, name: str, seconds: float) -> float:
        """Texts a second over whole rounds of the set's batches, in an order that mixes lengths over time."""
        order = np.random.default_rng(0).permutation(len(self.batches[name]))
        done, start = 0, time.perf_counter()
        while True:
            for i in order:
                feed, count = self.batches[name][i]
                self.vectors_of(feed)
                done += count
                if time.perf_counter() - start > seconds:
                    return done / (time.perf_counter() - start)

    def latency(self, texts: list[str]) -> list[float]:
        """Milliseconds of one text at a time, tokenization included."""
        out = []
        for text in texts:
            start = time.perf_counter()
            self.vectors_of(self.feed([self.tokenizer.encode(text).ids]))
            out.append((time.perf_counter() - start) * 1e3)
        return out


class EngineAlone:
    """Our engine, no gRPC, texts as they come, 8 callers with 32 texts each."""

    def __init__(self, model: str) -> None:
        from tokenizers import Tokenizer

        from server.runtime.engine import Engine, EngineSettings, GraphForm
        from server.runtime.loader import MOST_LANES
        from server.runtime.repository import Repository
        from server.runtime.sessions import Sessions, SessionSettings, usable_cores

        files = Repository(ROOT / "models").open(model)
        self.tokenizer = Tokenizer.from_file(str(files.tokenizer))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(512)
        self.loop = asyncio.new_event_loop()
        settings = EngineSettings(lanes=min(usable_cores(), MOST_LANES))
        session = Sessions(SessionSettings()).open(files.model)
        self.engine = self.loop.run_until_complete(self._open(lambda: Engine(session, GraphForm.of(files.manifest), settings)))
        self.sets: dict[str, list[Any]] = {}

    async def _open(self, make: Any) -> Any:
        return make()

    def load(self, name: str, texts: list[str], batch: int) -> None:
        from server.runtime.engine import Encoded

        self.sets[name] = [Encoded(np.asarray(e.ids, np.int64)) for e in self.tokenizer.encode_batch(texts)]

    def run(self, name: str, seconds: float, in_flight: int = 8, per_call: int = 32) -> float:
        return float(self.loop.run_until_complete(self._run(self.sets[name], seconds, in_flight, per_call)))

    async def _run(self, rows: list[Any], seconds: float, in_flight: int, per_call: int) -> float:
        from server.runtime.engine import Pool

        pool = Pool("mean", True)
        position = done = 0
        start = time.perf_counter()

        async def caller() -> None:
            nonlocal position, done
            while time.perf_counter() - start < seconds:
                chunk = rows[position : position + per_call]
                position = (position + per_call) % max(1, len(rows) - per_call)
                await self.engine.run(chunk, Call("bench"), pool)
                done += len(chunk)

        await asyncio.gather(*(caller() for _ in range(in_flight)))
        return done / (time.perf_counter() - start)


def main() -> None:
    kind, argument = sys.argv[1:3]
    contestant: Raw | EngineAlone = Raw(argument) if kind == "raw" else EngineAlone(argument)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "load":
            contestant.load(command["set"], command["texts"], command.get("batch", 32))
            reply: Any = None
        elif command["do"] == "run":
            reply = contestant.run(command["set"], command["seconds"])
        else:
            assert isinstance(contestant, Raw)
            reply = contestant.latency(command["texts"])
        print(json.dumps({"reply": reply}), flush=True)


if __name__ == "__main__":
    main()
