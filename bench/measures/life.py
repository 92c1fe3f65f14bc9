"""Bars `overload`, `drain` and `swap`: what callers see while the server is over its limit, stopping, or changing models."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc

from bench.harness import EMBED, PROTO, ROOT, STARTER, Row, Server, embed_requests, ghz, median, part, row_of, serve, short_texts

OVERLOAD = "at 4x capacity for 60 s: goodput >= 0.9 of peak, the rest RESOURCE_EXHAUSTED with RetryInfo, memory flat"
DRAIN = "SIGTERM under load: no accepted call fails"
SWAP = "load v2 and unload v1 under load: no failed call; resident memory after 20 cycles within 10 % of the first"
PER_CALL = 32


def overload(seconds: float = 60.0) -> Row:
    requests = embed_requests(short_texts(3000), PER_CALL)
    # A queue of about two seconds of work: what does not fit is refused at once instead of growing late.
    with serve(extra={"runtime.queue_sequences": 2048}) as server:
        ghz(server.address, EMBED, requests, proto=PROTO, concurrency=4, seconds=3)
        peaks = [ghz(server.address, EMBED, requests, proto=PROTO, concurrency=8, seconds=6).per_s for _ in range(4)]
        before = server.rss()
        result = asyncio.run(_open_loop(server, requests, median(peaks) * 4, seconds))
        after = server.rss()
        peaks += [ghz(server.address, EMBED, requests, proto=PROTO, concurrency=8, seconds=6).per_s for _ in range(4)]
    reference = median(peaks)  # of closed loops before and after: the machine's speed drifts
    goodput = result["codes"].get("OK", 0) / result["seconds"]
    refused = sum(v for k, v in result["codes"].items() if k != "OK")
    clean = refused == result["codes"].get("RESOURCE_EXHAUSTED", 0) == result["with_retry_info"] and refused > 0
    growth = max(result["rss"]) / max(before, result["rss_early"])
    return row_of(
        "overload",
        OVERLOAD,
        [
            part(
                "goodput / peak",
                ">= 0.9",
                round(goodput / reference, 3),
                goodput >= 0.9 * reference,
                calls_a_second=round(goodput, 1),
                peak=round(reference, 1),
            ),
            part(
                "offered / peak", "4", round(result["offered"] / reference, 2), result["offered"] >= 3.6 * reference, texts_a_call=PER_CALL
            ),
            part(
                "refused with RESOURCE_EXHAUSTED and RetryInfo",
                "all",
                f"{result['with_retry_info']} of {refused}",
                clean,
                codes=result["codes"],
            ),
            part("largest resident / early in the load", "<= 1.1", round(growth, 3), growth <= 1.1, after_mb=round(after / 1e6)),
        ],
    )


async def _open_loop(server: Server, requests: list[dict[str, Any]], rate: float, seconds: float) -> dict[str, Any]:
    """Sends at a fixed rate whatever comes back; requests are serialized once, answers are not decoded: this side must not be what is
    slow.
    """
    from google.protobuf import json_format
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    from understudy.v1 import inference_service_pb2 as pb

    payloads = [json_format.ParseDict(r, pb.EmbedRequest()).SerializeToString() for r in requests]
    codes: Counter[str] = Counter()
    with_retry_info = 0
    rss: list[int] = []
    early = 0
    tasks: set[asyncio.Task[None]] = set()
    async with grpc.aio.insecure_channel(server.address, options=[("grpc.max_concurrent_streams", 10000)]) as channel:
        call = channel.unary_unary("/understudy.v1.InferenceService/Embed")

        async def one(payload: bytes) -> None:
            nonlocal with_retry_info
            try:
                await call(payload, timeout=30)
                codes["OK"] += 1
            except grpc.aio.AioRpcError as error:
                codes[error.code().name] += 1
                status = rpc_status.from_call(error)
                if status and any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in status.details):
                    with_retry_info += 1

        start = time.perf_counter()
        sent = 0
        while (now := time.perf_counter() - start) < seconds:
            while sent < now * rate:
                task = asyncio.create_task(one(payloads[sent % len(payloads)]))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                sent += 1
            if len(rss) <= now:
                rss.append(server.rss())
                if len(rss) == 6:
                    early = rss[-1]
            await asyncio.sleep(0.005)
        offered = sent / (time.perf_counter() - start)
        await asyncio.gather(*tasks)
        total = time.perf_counter() - start
    return {
        "codes": dict(codes),
        "with_retry_info": with_retry_info,
        "offered": offered,
        "seconds": total,
        "rss": rss,
        "rss_early": early or rss[0],
    }


class Callers:
    """Closed-loop callers without retries. A call is accepted once the server has sent its initial headers or an answer; refusals are
    counted apart.
    """

    def __init__(self, address: str, in_flight: int = 32) -> None:
        self.address, self.in_flight = address, in_flight
        self.answered = 0
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.stop = False

    async def run(self) -> None:
        from understudy.v1 import common_pb2
        from understudy.v1 import inference_service_pb2 as pb

        texts = short_texts(500)
        payloads = [pb.EmbedRequest(model=common_pb2.ModelSelector(name=STARTER), texts=[t]).SerializeToString() for t in texts]

        async def caller(i: int) -> None:
            async with grpc.aio.insecure_channel(
                self.address, options=[("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
            ) as channel:
                method = channel.unary_unary("/understudy.v1.InferenceService/Embed")
                n = i
                while not self.stop:
                    n += 1
                    try:
                        await method(payloads[n % len(payloads)], timeout=30)
                        self.answered += 1
                    except grpc.aio.AioRpcError as error:
                        self._count(error)
                        if self.refused:
                            return

        await asyncio.gather(*(caller(i) for i in range(self.in_flight)))

    def _count(self, error: grpc.aio.AioRpcError) -> None:
        """UNAVAILABLE before the server took the call (closed port, GOAWAY, DRAINING) is a refusal; anything else is a failure."""
        details = (error.details() or "").lower()
        if error.code() == grpc.StatusCode.UNAVAILABLE and any(s in details for s in ("connect", "refused", "drain", "goaway", "stopping")):
            self.refused[details[:60]] += 1
        else:
            self.failed[f"{error.code().name}: {details[:80]}"] += 1


def drain(rounds: int = 10) -> Row:
    answered, failed, refused, exits = 0, Counter[str](), 0, []
    for _ in range(rounds):
        with serve() as server:
            callers = Callers(server.address)

            async def scene(server: Server = server, callers: Callers = callers) -> None:
                task = asyncio.create_task(callers.run())
                await asyncio.sleep(1.0)
                server.popen.send_signal(signal.SIGTERM)
                await asyncio.wait_for(task, 60)

            asyncio.run(scene())
            exits.append(server.popen.wait(60))
            answered += callers.answered
            failed += callers.failed
            refused += sum(callers.refused.values())
    measured = {
        "stops": rounds,
        "answered": answered,
        "failed": dict(failed),
        "refused after the signal": refused,
        "exit codes": sorted(set(exits)),
    }
    return Row("drain", DRAIN, measured, not failed and set(exits) == {0} and answered > 0)


def swap(cycles: int = 20) -> Row:
    models = Path(tempfile.mkdtemp(prefix="understudy-models-"))
    source = ROOT / "models" / STARTER
    shutil.copytree(source / "1", models / STARTER / "1")
    shutil.copytree(source / "1", models / STARTER / "2")
    manifest = models / STARTER / "2" / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": "2"}))
    try:
        with serve(models, extra={"models.load": [f"{STARTER}@1"]}) as server:
            callers = Callers(server.address, 16)
            sizes = asyncio.run(_swap_scene(server, callers, cycles))
    finally:
        shutil.rmtree(models, ignore_errors=True)
    growth = sizes[-1] / sizes[0]
    failures = callers.failed + callers.refused
    return row_of(
        "swap",
        SWAP,
        [
            part("failed calls", "0", sum(failures.values()), not failures, answered=callers.answered, kinds=dict(failures)),
            part(
                "resident after 20 cycles / after the first",
                "<= 1.1",
                round(growth, 3),
                growth <= 1.1,
                first_mb=round(sizes[0] / 1e6),
                last_mb=round(sizes[-1] / 1e6),
            ),
        ],
    )


async def _swap_scene(server: Server, callers: Callers, cycles: int) -> list[int]:
    from understudy.v1 import model_service_pb2 as pb
    from understudy.v1 import model_service_pb2_grpc as rpc

    sizes = []
    task = asyncio.create_task(callers.run())
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = rpc.ModelServiceStub(channel)
        for cycle in range(cycles):
            new, old = ("2", "1") if cycle % 2 == 0 else ("1", "2")
            await stub.LoadModel(pb.LoadModelRequest(name=f"models/{STARTER}/versions/{new}"), timeout=60)
            await stub.UnloadModel(pb.UnloadModelRequest(name=f"models/{STARTER}/versions/{old}"), timeout=60)
            await asyncio.sleep(0.3)
            sizes.append(server.rss())
    callers.stop = True
    await task
    return sizes
