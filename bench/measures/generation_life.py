"""Bars `steadiness`, `prefix` and `cancel`: what running answers feel of others, through gRPC on the SmolLM2-135M shape."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc

from bench.generation_models import Shape, shape
from bench.harness import EMBED, PROTO, ROOT, STARTER, Asked, Row, Server, embed_requests, free_port, ghz, median, part, row_of, short_texts
from bench.measures.generation_speed import client, gaps_of, our_server, plan_of, prompts, requests_of, spread

STEADINESS = (
    "a 1,500-token prompt arriving does not push the others' inter-token p99 above 3x their median; embeddings beside generation neither"
)
PREFIX = "512-token shared prefix: time to first token <= 0.15 of cold, no page copied"
CANCEL = (
    "a left client frees its slot within one step; out of slots -> queue -> RESOURCE_EXHAUSTED, never memory growth; a failing run kills"
    " its batch's requests with a clear status and the engine goes on"
)


KV_BYTES = 128 << 20


def _with_starter(model: Shape) -> Shape:
    """The same repository with the starter model beside it, for embeddings."""
    if not (model.models / STARTER).is_dir():
        command = [sys.executable, "-m", "server.cli", "models", "pull", "starter", "--models", str(model.models)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return model


def steadiness(rounds: int = 3) -> Row:
    model = _with_starter(shape("smollm2-135m"))
    seen: dict[str, list[float]] = {}
    figures: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(our_server(model, **{"models.load": [model.name, STARTER]}))
        load, other = client(), client()
        stack.callback(load.close)
        stack.callback(other.close)
        load.ask(**plan_of(server, model, 8, requests_of(model, 8, 1, 1, tokens=32)))
        for i in range(rounds):
            for name in ("alone", "long prompts", "embeddings"):
                reports = _beside(name, server, model, (load, other), 10 * i)
                gaps = _steady(reports)
                ratio = gaps[int(len(gaps) * 0.99)] / median(gaps)
                seen.setdefault(name, []).append(ratio)
                figures[name] = spread(gaps)
    parts = []
    for name in ("long prompts", "embeddings"):
        worst = round(median(seen[name]), 2)
        parts.append(part(f"p99 / median beside {name}", "<= 3", worst, worst <= 3, rounds=[round(r, 2) for r in seen[name]]))
    parts.append(
        {"name": "milliseconds between tokens, last round", "measured": figures, "alone": [round(r, 2) for r in seen["alone"]], "met": True}
    )
    return row_of("steadiness", STEADINESS, parts)


def _beside(name: str, server: Server, model: Shape, clients: tuple[Asked, Asked], seed: int) -> list[dict[str, Any]]:
    """Eight answers of 300 tokens, and beside them nothing, three prompts of 1,500 tokens, or embeddings of 8 texts a call."""
    load, other = clients
    plan = plan_of(server, model, 8, requests_of(model, 8, 1, 50 + seed, tokens=300))
    done: list[Any] = []
    running = threading.Thread(target=lambda: done.append(load.ask(**plan)))
    running.start()
    if name == "long prompts":
        long = [{"prompt": p, "tokens": 4, "at": 2.0 + 3.0 * i} for i, p in enumerate(prompts(3, 1500, model.vocabulary, seed + 3))]
        other.ask(**plan_of(server, model, 0, long))
    elif name == "embeddings":
        ghz(server.address, EMBED, embed_requests(short_texts(2000), 8), proto=PROTO, concurrency=1, seconds=8.0)
    running.join()
    return list(done[0])


def _steady(reports: list[dict[str, Any]]) -> list[float]:
    """Milliseconds between tokens from the moment when all answers had begun."""
    begun = max(r["arrivals"][0][0] for r in reports)
    kept = [{**r, "arrivals": [a for a in r["arrivals"] if a[0] >= begun]} for r in reports]
    return gaps_of(kept)[1]


def prefix(rounds: int = 7) -> Row:
    model = shape("smollm2-135m")
    cold, warm = [], []
    port = free_port()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(our_server(model, **{"server.metrics_port": port}))
        load = client()
        stack.callback(load.close)
        before = {}
        for i in range(rounds + 1):
            shared = prompts(1, 512, model.vocabulary, 900 + i)[0]
            tails = prompts(2, 16, model.vocabulary, 950 + i)
            times = []
            for tail in tails:
                first, _ = gaps_of(load.ask(**plan_of(server, model, 1, [{"prompt": [*shared, *tail], "tokens": 1}])))
                times.append(first[0])
            if i:
                cold.append(times[0])
                warm.append(times[1])
            else:
                before = metrics(port)
        after = metrics(port)
    ratio = round(median([w / c for w, c in zip(warm, cold, strict=True)]), 3)
    parts = [
        part(
            "time to first token, shared of cold",
            "<= 0.15",
            ratio,
            ratio <= 0.15,
            cold_ms=round(median(cold), 1),
            warm_ms=round(median(warm), 1),
        )
    ]
    copied = _sum(after, "generation_pages_copied_total") - _sum(before, "pages_copied")
    hits = _sum(after, "generation_prefix_hit_tokens_total") - _sum(before, "generation_prefix_hit_tokens_total")
    parts.append(part("pages copied", "0", copied, copied == 0 and hits >= rounds * 512, prompt_tokens_found=hits))
    return row_of("prefix", PREFIX, parts)


def metrics(port: int) -> dict[str, float]:
    """The server's Prometheus page: each sample's name with its labels, and its value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line and not line.startswith("#")}


def _sum(seen: dict[str, float], metric: str) -> float:
    """The metric's samples together, over all of its labels."""
    return sum(value for name, value in seen.items() if name.split("{")[0] == f"understudy_{metric}")


@contextlib.contextmanager
def _calls(server: Server, model: Shape, count: int, tokens: int) -> Iterator[list[Any]]:
    """Calls in flight, each started and none read further than its first message."""
    from understudy.v1 import inference_service_pb2 as service
    from understudy.v1 import inference_service_pb2_grpc as stubs

    with grpc.insecure_channel(server.address) as channel:
        stub = stubs.InferenceServiceStub(channel)
        calls = []
        for prompt in prompts(count, 64, model.vocabulary, count):
            request = service.GenerateRequest(
                model={"name": model.name}, token_ids={"ids": prompt}, sampling={"max_tokens": tokens, "ignore_eos": True}
            )
            calls.append(stub.Generate(request, timeout=120))
        yield calls
        for call in calls:
            call.cancel()


def cancel() -> Row:
    model = shape("smollm2-135m")
    port = free_port()
    parts = []
    settings = {"server.metrics_port": port, "generation.max_sequences": 8, "generation.max_waiting": 32}
    settings["generation.kv_cache_bytes"] = KV_BYTES  # small enough that the prefix cache fills it: from then on nothing may grow
    with our_server(model, **settings) as server:
        parts.append(_leaving(server, model, port))
        parts.append(_flood(server, model))
    parts.append(_failing())
    return row_of("cancel", CANCEL, parts)


def _leaving(server: Server, model: Shape, port: int) -> dict[str, Any]:
    """Eight answers run; four callers leave. Steps from the leaving until four sequences run, by the server's own counts."""
    with _calls(server, model, 8, 900) as calls:
        for call in calls:
            next(iter(call))
        before = metrics(port)
        pages = _sum(before, "generation_pages")
        for call in calls[:4]:
            call.cancel()
        left = time.monotonic()
        steps_at_leaving = _sum(metrics(port), "generation_step_seconds_count")
        while _sum(now := metrics(port), "generation_running") > 4 and time.monotonic() - left < 10:
            pass
        steps = _sum(now, "generation_step_seconds_count") - steps_at_leaving
        measured = {"steps": steps, "pages_before": pages, "pages_after": _sum(now, "generation_pages")}
    # The page is read over HTTP while the steps go on: the reading itself may see one step more.
    return part("steps until four that left are gone", "<= 2 (one, and one while the counts are read)", measured, steps <= 2)


def _flood(server: Server, model: Shape) -> dict[str, Any]:
    """200 calls at once on 8 places and a queue of 32, time and again: the rest is refused at once, and memory stays."""
    codes: dict[str, int] = {}
    reasons = set()
    before = 0
    for i in range(8):
        with _calls(server, model, 200, 24) as calls:
            for call in calls:
                try:
                    for _ in call:
                        pass
                    codes["OK"] = codes.get("OK", 0) + 1
                except grpc.RpcError as error:
                    code = error.code().name
                    codes[code] = codes.get(code, 0) + 1
                    reasons.add(f"{code}: {error.details()[:120]}")
        if i == 3:
            before = server.rss()
    growth = round(server.rss() / before, 3)
    met = set(codes) == {"OK", "RESOURCE_EXHAUSTED"} and codes["OK"] >= 8 * 32 and growth <= 1.02
    return part(
        "800 calls on 8 places",
        "OK or RESOURCE_EXHAUSTED, memory <= 1.03",
        {"codes": codes, "memory": growth},
        met,
        messages=sorted(reasons)[:2],
    )


def _failing() -> dict[str, Any]:
    """The engine's own test of a run that fails, on a real graph: its requests end with a clear status, and the next ones are answered."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/runtime/decoder", "-k", "failing_run or run_that_fails"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
    return part("a failing run", "its requests fail clearly, the engine goes on", last, done.returncode == 0)
