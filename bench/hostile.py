"""Sends thousands of bad requests to a running server, and bad model folders to the repository: each must get the right code and reason.

`python -m bench.hostile ADDRESS [--count N] [--seed S]` prints the figures as JSON; what was wrong comes first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from bench import hostile_files
from bench.hostile_case import Case, Target, methods
from bench.hostile_requests import cases
from understudy.aio import AsyncClient
from understudy.errors import from_rpc_error, from_status
from understudy.oip import open_inference_pb2 as oip

PROBES = ["Where is my card?", "I was charged twice for one transfer.", "naïve ∂"]
AT_ONCE = 24
SHARE_OF_FILES = 0.1  # of all that is sent
KEEP = 20  # wrong answers that are shown


def measure(address: str, *, count: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Figures of one run: `sent`, `wrong` (how many had another code or reason than is right), `correct_after`, and the codes seen."""
    return asyncio.run(_measure(address, count, seed))


async def _measure(address: str, count: int, seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    async with (
        AsyncClient(address) as client,
        grpc.aio.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as channel,
    ):
        target = await find_target(client, channel)
        before = await client.embed(PROBES, model=target.embedder)
        files = int(count * SHARE_OF_FILES)
        sockets = _throw_at_socket(address)
        seen = Seen()
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(case: Case) -> None:
            try:
                code, reason, problem = await send(channel, case)
            finally:
                gate.release()
            seen.add(case, code, reason, problem)

        async with asyncio.TaskGroup() as group:
            for case in cases(count - files - sockets, seed, target):
                await gate.acquire()
                group.create_task(one(case))
        with tempfile.TemporaryDirectory() as folder:
            wrong_files, sent_files = await asyncio.to_thread(hostile_files.run, Path(folder), files, seed)
        after = await client.embed(PROBES, model=target.embedder)
        correct = bool(np.abs(after - before).max() <= 1e-6) and not (await client.status()).draining
    wrong = [*seen.wrong, *wrong_files]
    return {
        "sent": seen.sent + sent_files + sockets,
        "wrong": len(wrong),
        "wrong_shown": wrong[:KEEP],
        "internal_or_unknown": seen.codes["INTERNAL"] + seen.codes["UNKNOWN"],
        "correct_after": correct,
        "codes": dict(seen.codes),
        "kinds": {**seen.kinds, "files": sent_files, "sockets": sockets},
        "seconds": round(time.perf_counter() - start, 1),
    }


class Seen:
    """Counts answers and keeps those that were wrong."""

    def __init__(self) -> None:
        self.sent = 0
        self.codes: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.wrong: list[str] = []

    def add(self, case: Case, code: str, reason: str, problem: str) -> None:
        self.sent += 1
        self.codes[code] += 1
        self.kinds[case.kind] += 1
        if reason not in case.allowed.get(code, frozenset()):
            right = ", ".join(f"{c}/{'|'.join(sorted(r))}" for c, r in case.allowed.items())
            problem = problem or f"expected {right}"
        elif code != "OK":
            problem = ""
        if problem:
            shown = case.data[:200].hex()
            self.wrong.append(f"{case.kind} {case.method}: {code}/{reason}; {problem[:300]}; {len(case.data)} bytes {shown}")


async def find_target(client: AsyncClient, channel: grpc.aio.Channel) -> Target:
    """What the server has loaded: one embedding model, and the tensors of each."""
    models = await client.models.list(loaded_only=True)
    embedder = next(model for model in models if model.task == "feature-extraction")
    raw = {}
    describe: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")
    for model in models:
        data = await describe(oip.ModelMetadataRequest(name=model.name).SerializeToString(), timeout=10)
        raw[model.name] = oip.ModelMetadataResponse.FromString(data)
    return Target(embedder.name, embedder.max_tokens, raw)


_RESPONSES = {f"/{method.containing_service.full_name}/{method.name}": GetMessageClass(method.output_type) for method in methods()}


async def send(channel: grpc.aio.Channel, case: Case) -> tuple[str, str, str]:
    """Code, reason, and what is wrong with an answer that has the code OK."""
    more: dict[str, Any] = {"timeout": 60, "metadata": case.metadata}
    if case.gzip:
        more["compression"] = grpc.Compression.Gzip
    try:
        if case.stream:
            stream: Any = channel.stream_stream(case.method)(iter([case.data]), **more)
            answers = [data async for data in stream]
        else:
            answers = [await channel.unary_unary(case.method)(case.data, **more)]
    except grpc.aio.AioRpcError as raised:
        error = from_rpc_error(raised)
        return error.code, error.reason, error.message
    return "OK", "", _items_wrong(case, answers)


def _items_wrong(case: Case, answers: list[bytes]) -> str:
    if not case.item_reasons:
        return ""
    if case.stream:
        texts = [oip.ModelStreamInferResponse.FromString(data).error_message for data in answers]
        good = len(texts) == 1 and any(texts[0].startswith(f"[{reason}]") for reason in case.item_reasons)
        return "" if good else f"the stream answered {texts}"
    try:
        response: Any = _RESPONSES[case.method].FromString(answers[0])
    except DecodeError:
        return "the response does not parse"
    for item in response.results:
        reason = from_status(item.error).reason if item.HasField("error") else "no error"
        if reason not in case.item_reasons:
            return f"an item has {reason}"
    return "" if len(response.results) else "no results"


# What is no gRPC at all: thrown at the port, whose answer may be anything but the end of the server.
_NOISE = (
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /understudy.v1.InferenceService/Embed HTTP/1.1\r\nContent-Type: text/html\r\nContent-Length: 3\r\n\r\nabc",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
    b"\x00" * 1000,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    b"SSH-2.0-x\r\n",
    b"",
)


def http2_call(content_type: bytes, path: bytes = b"/understudy.v1.InferenceService/Embed") -> bytes:
    """A call by hand: preface, settings, headers as plain literals, one empty message."""

    def literal(name: bytes, value: bytes) -> bytes:
        return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    headers = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x"), (b"te", b"trailers")]
    block = b"".join(literal(name, value) for name, value in [*headers, (b"content-type", content_type)])
    start = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    return start + frame(1, 4, 1, block) + frame(0, 1, 1, b"\x00\x00\x00\x00\x00")


def _throw_at_socket(address: str) -> int:
    """Returns how many were thrown."""
    host, port = address.rsplit(":", 1)
    wrong_types = [http2_call(kind) for kind in (b"text/html", b"application/json", b"", b"application/grpc+\xff")]
    thrown = [*_NOISE, *wrong_types, http2_call(b"application/grpc", b"no-slash"), http2_call(b"application/grpc", b"/")]
    for noise in thrown:
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.settimeout(0.2)
            try:
                connection.sendall(noise)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
            except OSError:
                pass
    return len(thrown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.address, count=arguments.count, seed=arguments.seed), indent=1))


if __name__ == "__main__":
    main()
