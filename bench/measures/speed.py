"""Bars `throughput` and `latency`: everything in one run on one machine, rounds interleaved, medians."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.harness import (
    EMBED,
    PROTO,
    STARTER,
    Asked,
    Row,
    Server,
    embed_requests,
    ghz,
    median,
    part,
    row_of,
    serve,
    short_texts,
    texts_of_length,
)
from bench.peers.start import litserve, pytriton, stock_model

THROUGHPUT = (
    "against raw = stock graph, sorted batches of 32, no server: engine alone in arrival order >= 1.2; single-text calls,"
    " 64 in flight >= 0.9; 32 texts a call >= 1.15; "
    "128 tokens >= 1.3; lengths mixed from 8 to 400 in arrival order >= 1.15; pytriton behind by >= 2.3x and LitServe by "
    ">= 2.8x at 64 in flight"
)
LATENCY = "one call at a time: p50 <= raw at batch 1 + 0.7 ms"


def contestant(*arguments: str) -> Asked:
    return Asked([sys.executable, "-m", "bench.contestant", *arguments])


@contextlib.contextmanager
def contestants() -> Iterator[tuple[Asked, Asked]]:
    raw, engine = contestant("raw", str(stock_model())), contestant("engine", STARTER)
    try:
        yield raw, engine
    finally:
        raw.close()
        engine.close()


def text_sets() -> dict[str, list[str]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(stock_model() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    mixed = np.random.default_rng(5).integers(8, 401, 512).tolist()
    return {"short": short_texts(3000), "tokens128": texts_of_length([128] * 512, tokenizer), "mixed": texts_of_length(mixed, tokenizer)}


def throughput(rounds: int = 5, seconds: float = 4.0) -> Row:
    sets = text_sets()
    seen: dict[str, list[float]] = {}
    notes: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        raw, engine = stack.enter_context(contestants())
        server = stack.enter_context(serve())
        for name, texts in sets.items():
            raw.ask(do="load", set=name, texts=texts, batch=32)
            engine.ask(do="load", set=name, texts=texts)
        competitors: dict[str, Callable[[], float]] = {}
        for name in sets:
            competitors[f"raw {name}"] = lambda n=name: raw.ask(do="run", set=n, seconds=seconds)  # type: ignore[misc]
            competitors[f"engine {name}"] = lambda n=name: engine.ask(do="run", set=n, seconds=seconds)  # type: ignore[misc]
        single, bulk = embed_requests(sets["short"]), embed_requests(sets["short"], 32)
        for flight in (1, 8, 64, 256):
            competitors[f"single calls, {flight} in flight"] = lambda f=flight: _calls(server, single, f, seconds, notes)  # type: ignore[misc]
        competitors["32 texts a call"] = lambda: 32 * _calls(server, bulk, 4, seconds, notes, "bulk")
        for name, start in (("pytriton", pytriton), ("litserve", litserve)):
            try:
                load = stack.enter_context(start())
            except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
                notes[name] = f"did not start: {error}"
                continue
            competitors[name] = lambda peer=load: peer(sets["short"], 64, seconds).per_s  # type: ignore[misc]
        for name, compete in competitors.items():
            notes.setdefault("warm-up", {})[name] = round(compete(), 1)
        for _ in range(rounds):
            for name, compete in competitors.items():
                seen.setdefault(name, []).append(compete())
    return _judge(seen, notes)


def _calls(
    server: Server, requests: list[dict[str, Any]], flight: int, seconds: float, notes: dict[str, Any], kind: str = "single"
) -> float:
    before = server.cpu_s()
    load = ghz(server.address, EMBED, requests, proto=PROTO, concurrency=flight, seconds=seconds)
    assert set(load.codes) == {"OK"}, load.codes
    cpu_ms = (server.cpu_s() - before) * 1e3 / max(load.ok, 1)
    notes[f"{kind}, {flight} in flight"] = {
        "p50_ms": round(load.p50, 2),
        "p95_ms": round(load.p95, 2),
        "p99_ms": round(load.p99, 2),
        "server_cpu_ms_a_call": round(cpu_ms, 3),
    }
    return load.per_s


def _ratio(seen: dict[str, list[float]], a: str, b: str) -> float:
    """Median over rounds of a/b, each pair from the same round."""
    return round(median([x / y for x, y in zip(seen[a], seen[b], strict=True)]), 3)


def _judge(seen: dict[str, list[float]], notes: dict[str, Any]) -> Row:
    flight64 = "single calls, 64 in flight"
    parts = []
    for name, a, b, least in (
        ("engine alone, arrival order", "engine short", "raw short", 1.2),
        ("single-text calls, 64 in flight", flight64, "raw short", 0.9),
        ("32 texts a call", "32 texts a call", "raw short", 1.15),
        ("128 tokens", "engine tokens128", "raw tokens128", 1.3),
        ("8 to 400 tokens, arrival order", "engine mixed", "raw mixed", 1.15),
        ("pytriton behind", flight64, "pytriton", 2.3),
        ("LitServe behind", flight64, "litserve", 2.8),
    ):
        if b not in seen:
            parts.append(part(name, f">= {least}", notes.get(b, "not measured"), False))
            continue
        value = _ratio(seen, a, b)
        parts.append(part(name, f">= {least}", value, value >= least))
    row = row_of("throughput", THROUGHPUT, parts)
    row.parts.append(
        {
            "name": "texts or calls a second, median (min - max)",
            "measured": {k: f"{median(v):.0f} ({min(v):.0f} - {max(v):.0f})" for k, v in seen.items()},
            "notes": notes,
        }
    )
    return row


def latency(rounds: int = 9, calls: int = 200) -> Row:
    texts = short_texts(3000)
    with contestants() as (raw, engine), serve() as server:
        engine.close()
        gaps, ours, stock = [], [], []
        for i in range(rounds + 1):
            chunk = texts[(i * calls) % 2000 :][:calls]
            mine = ghz(server.address, EMBED, embed_requests(chunk), proto=PROTO, concurrency=1, seconds=2.0)
            alone = median(raw.ask(do="latency", texts=chunk))
            if i:  # the first round warms up
                ours.append(mine.p50)
                stock.append(alone)
                gaps.append(mine.p50 - alone)
    gap = round(median(gaps), 3)
    measured = {"p50_ms": round(median(ours), 3), "raw_batch_1_ms": round(median(stock), 3), "difference_ms": gap}
    return Row("latency", LATENCY, measured, gap <= 0.7)
