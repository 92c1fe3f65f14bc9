"""Bars `speed` and `prefill` of generation: our server and llama.cpp's in turns, on the same weights, prompts and client.

Every server gets token ids and generates greedily a fixed number of tokens. llama.cpp runs with as many slots as there are streams; its
better form of Q4_0 and Q8_0 counts, for each number of streams anew.
"""

from __future__ import annotations

import contextlib
import csv
import random
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.generation_models import Shape, shape
from bench.harness import BUILD, SHARED, Asked, Row, Server, median, part, row_of, serve
from bench.peers.llama import Llama, llama_server, weights
from bench.peers.start import environment

SPEED = (
    "SmolLM2-135M shape through gRPC, 64-token prompts, 128 new tokens: >= 0.9 of the bare engine loop; llama.cpp's server (best form)"
    " level or behind at 1 stream, behind by >= 1.6x at 8 and >= 1.8x at 32; the 1B shape: level at 1, behind by >= 1.4x at 8 and >= 1.5x"
    " at 32"
)
PREFILL = "512 tokens: llama.cpp behind by >= 1.7x; time to first token p95 under the trace better than llama.cpp's server at equal load"
PROMPT, TOKENS = 64, 128
BARS = {"smollm2-135m": {1: 1.0, 8: 1.6, 32: 1.8}, "llama-3.2-1b": {1: 1.0, 8: 1.4, 32: 1.5}}
RATES = (0.15, 0.4)
TRACE_SECONDS = 35.0
TRACE_CONTEXT = 4096


def prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(f"{seed} {length}")
    return [[rng.randrange(10, vocabulary) for _ in range(length)] for _ in range(count)]


def requests_of(model: Shape, streams: int, waves: int, seed: int, tokens: int = TOKENS, length: int = PROMPT) -> list[dict[str, Any]]:
    return [{"prompt": p, "tokens": tokens} for p in prompts(streams * waves, length, model.vocabulary, seed)]


def client() -> Asked:
    return Asked([sys.executable, "-m", "bench.generation_load"])


def plan_of(server: Server | Llama, model: Shape, streams: int, requests: list[dict[str, Any]]) -> dict[str, Any]:
    where = {"server": "llama", "port": server.port} if isinstance(server, Llama) else {"server": "ours", "address": server.address}
    return {**where, "model": model.name, "streams": streams, "requests": requests}


def rate_of(reports: list[dict[str, Any]]) -> float:
    """Generated tokens a second from the first request to the last token."""
    errors = [r["error"] for r in reports if r["error"]]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(reports)} requests failed: {errors[0]}")
    begun, ended = min(r["sent"] for r in reports), max(r["arrivals"][-1][0] for r in reports)
    return sum(n for r in reports for _, n in r["arrivals"]) / float(ended - begun)


def gaps_of(reports: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Milliseconds (to the first token; between tokens, a message of several counted as often)."""
    first, between = [], []
    for r in reports:
        if not r["arrivals"]:
            continue
        first.append((r["arrivals"][0][0] - r["sent"]) * 1e3)
        for (before, _), (now, n) in zip(r["arrivals"], r["arrivals"][1:], strict=False):
            between += [(now - before) * 1e3 / n] * n
    return sorted(first), sorted(between)


def spread(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {k: round(values[min(len(values) - 1, int(len(values) * q))], 1) for k, q in at.items()} if values else {}


@contextlib.contextmanager
def our_server(model: Shape, **extra: Any) -> Iterator[Server]:
    with serve(model.models, extra={"models.load": [model.name], **extra}) as server:
        yield server


def speed() -> Row:
    parts: list[dict[str, Any]] = []
    for name, bars, counts, rounds in (
        ("smollm2-135m", BARS["smollm2-135m"], (1, 4, 8, 16, 32), 3),
        ("llama-3.2-1b", BARS["llama-3.2-1b"], (1, 8, 32), 2),  # one round at 32: it takes minutes
    ):
        parts += _shape_speed(shape(name), bars, counts, rounds)
    return row_of("speed", SPEED, parts)


def _shape_speed(model: Shape, bars: dict[int, float], counts: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    files = weights(model.checkpoint)
    parts: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    small = model.name == "smollm2-135m"
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(our_server(model))
        load = client()
        stack.callback(load.close)
        bare = Asked([sys.executable, "-m", "bench.bare_decoder", str(model.models), model.name]) if small else None
        if bare is not None:
            stack.callback(bare.close)
        for streams in counts:
            seen = _rounds(model, streams, rounds if small or streams < 32 else 1, (ours, files, load, bare))
            figures[f"{streams} streams"] = seen["figures"]
            against = median([max(a, b) for a, b in zip(seen["Q4_0"], seen["Q8_0"], strict=True)])
            ratio = round(median(seen["ours"]) / against, 3)
            if streams in bars:
                parts.append(
                    part(f"{model.name}, {streams} streams, llama.cpp behind", f">= {bars[streams]}", ratio, ratio >= bars[streams])
                )
            else:
                figures[f"{streams} streams"]["llama.cpp behind"] = ratio
            if bare is not None:
                share = round(median([a / b for a, b in zip(seen["ours"], seen["bare"], strict=True)]), 3)
                if streams in bars:
                    parts.append(part(f"{model.name}, {streams} streams, gRPC of the bare loop", ">= 0.9", share, share >= 0.9))
                else:
                    figures[f"{streams} streams"]["of the bare loop"] = share
        figures["memory_mb"] = {"ours": round(ours.rss() / 1e6)}
    figures |= _others(model, counts) if small else {}
    parts.append({"name": f"{model.name}: tokens a second, milliseconds", "measured": figures, "met": True})
    return parts


def _rounds(model: Shape, streams: int, rounds: int, contestants: Any) -> dict[str, Any]:
    """Rates of each contestant in each round, the first round being a warm-up, and what the last round saw in detail."""
    ours, files, load, bare = contestants
    seen: dict[str, Any] = {"figures": {}}
    waves = 3 if streams == 1 else 1
    with contextlib.ExitStack() as stack:
        runs: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {}
        runs["ours"] = lambda r: load.ask(**plan_of(ours, model, streams, r))
        for form, file in files.items():
            server = stack.enter_context(llama_server(file, streams, 256))
            runs[form] = lambda r, s=server: load.ask(**plan_of(s, model, streams, r))  # type: ignore[misc]
            seen["figures"].setdefault("memory_mb", {})[form] = round(server.memory_mb())
        if bare is not None:
            runs["bare"] = lambda r: bare.ask(requests=r, streams=streams)
        for i in range(rounds + 1):
            for name, run in runs.items():
                short = i == 0
                reports = run(requests_of(model, streams, 1 if short else waves, 100 * streams + i, 32 if short else TOKENS))
                if i:
                    seen.setdefault(name, []).append(rate_of(reports))
                if i == rounds:
                    first, between = gaps_of(reports)
                    figures = {"tokens_s": round(median(seen[name]), 1), "first_ms": spread(first), "between_ms": spread(between)}
                    seen["figures"][name] = figures
    return seen


def _others(model: Shape, counts: tuple[int, ...]) -> dict[str, Any]:
    """onnxruntime-genai's generator (int4) and transformers (float32), as batches of equal prompts without a server."""
    found: dict[str, Any] = {}
    here = Path(__file__).resolve().parents[1] / "peers"
    for name, command in (
        ("onnxruntime-genai", lambda: [str(_genai()), str(here / "genai_app.py"), str(_genai_model(model))]),
        ("transformers", lambda: [sys.executable, str(here / "transformers_app.py"), str(model.checkpoint)]),
    ):
        try:
            peer = Asked(command())  # type: ignore[no-untyped-call]
        except (SystemExit, OSError, RuntimeError) as error:
            found[name] = f"did not run: {error}"
            continue
        for streams in (counts[0], counts[-1]):
            ask = {"streams": streams, "prompt": PROMPT, "tokens": 32, "vocabulary": model.vocabulary}
            reply = peer.ask(**ask)
            found.setdefault(name, {})[f"{streams} streams"] = round(reply["tokens"] / reply["seconds"], 1)
        found[name]["memory_mb"] = round(peer.memory_mb())
        peer.close()
    return found


def _genai() -> Path:
    return environment("genai", ["onnxruntime-genai==0.11.4", "onnxruntime==1.24.1"])


def _genai_model(model: Shape) -> Path:
    """int4 by its own builder, which wants torch and transformers: those of this environment."""
    import os
    import subprocess

    out = BUILD / f"genai-{model.name}"
    if not (out / "genai_config.json").is_file():
        python = _genai()
        path = f"{next(python.parents[1].glob('lib/python*/site-packages'))}:{next(Path(sys.prefix).glob('lib/python*/site-packages'))}"
        command = [str(python), "-m", "onnxruntime_genai.models.builder", "-m", str(model.checkpoint), "-i", str(model.checkpoint), "-o"]
        command += [str(out), "-p", "int4", "-e", "cpu", "--extra_options", "int4_accuracy_level=4"]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"its builder failed: {done.stderr[-300:]}")
    return out


def prefill(rounds: int = 5) -> Row:
    model = shape("smollm2-135m")
    files = weights(model.checkpoint)
    parts: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(our_server(model))
        load = client()
        stack.callback(load.close)
        peers = {form: stack.enter_context(llama_server(file, 1, 1024)) for form, file in files.items()}
        seen: dict[str, list[float]] = {}
        for i in range(rounds + 1):
            for name, server in {"ours": ours, **peers}.items():
                requests = requests_of(model, 1, 4, 7000 + i, tokens=1, length=512)
                first, _ = gaps_of(load.ask(**plan_of(server, model, 1, requests)))
                if i:
                    seen.setdefault(name, []).append(median(first))
        best = median([min(a, b) for a, b in zip(seen["Q4_0"], seen["Q8_0"], strict=True)])
        ratio = round(best / median(seen["ours"]), 3)
        shown = {name: round(512e3 / median(times)) for name, times in seen.items()}
        parts.append(part("512 tokens, llama.cpp behind", ">= 1.7", ratio, ratio >= 1.7, tokens_a_second=shown))
        better = min(peers, key=lambda form: median(seen[form]))
    parts += _trace(model, files[better], better)
    return row_of("prefill", PREFILL, parts)


def trace(rate: float, model: Shape) -> list[dict[str, Any]]:
    """Requests of the Azure conversation trace, its time stretched so that `rate` of them come a second; lengths as they are, bounded."""
    source = SHARED / "data" / "llm_request_traces" / "AzureLLMInferenceTrace_conv.csv"
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[: int(rate * TRACE_SECONDS) + 1]
    times = [datetime.fromisoformat(r["TIMESTAMP"][:26]).timestamp() for r in rows]
    stretch = TRACE_SECONDS / (times[-1] - times[0])
    rng = random.Random(11)
    return [
        {
            "at": (at - times[0]) * stretch,
            "prompt": [rng.randrange(10, model.vocabulary) for _ in range(min(int(r["ContextTokens"]), TRACE_CONTEXT - 512))],
            "tokens": min(int(r["GeneratedTokens"]), 256),
        }
        for at, r in zip(times, rows, strict=True)
    ]


def _trace(model: Shape, file: Path, form: str) -> list[dict[str, Any]]:
    if not (SHARED / "data" / "llm_request_traces").is_dir():
        return [part("trace", "better p95", "the trace is not at hand", False)]
    parts = []
    slots = 8
    for rate in RATES:
        requests = trace(rate, model)
        seen: dict[str, Any] = {}
        with our_server(model) as ours, llama_server(file, slots, TRACE_CONTEXT) as peer:
            for name, server in (("ours", ours), (form, peer)):
                load = client()
                reports = load.ask(**plan_of(server, model, 0, requests))
                load.close()
                first, between = gaps_of(reports)
                errors = sum(1 for r in reports if r["error"])
                memory = round(server.rss() / 1e6) if isinstance(server, Server) else round(server.memory_mb())
                seen[name] = {
                    "first_ms": spread(first),
                    "between_ms": spread(between),
                    "tokens_s": round(sum(n for r in reports for _, n in r["arrivals"]) / TRACE_SECONDS, 1),
                    "errors": errors,
                    "memory_mb": memory,
                }
        met = seen["ours"]["first_ms"]["p95"] < seen[form]["first_ms"]["p95"] and not seen["ours"]["errors"]
        measured = {name: s["first_ms"]["p95"] for name, s in seen.items()}
        parts.append(part(f"trace at {rate} a second: first token p95, ms", "better than llama.cpp", measured, met, seen=seen))
    return parts
