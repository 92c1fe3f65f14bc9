"""A SIMULATION of an API model: a real HTTP server on loopback that speaks OpenAI's chat completions and answers from a file of labels.

It errs on purpose, on a share of the texts that is chosen by a hash of the text, so that the same text gets the same answer every time;
a wrong answer is one of the labels whose names share the most words with the right one, as a real model's mistakes do.

`python -m bench.teacher_simulation --labels FILE.jsonl` prints one JSON line with its address and serves until it is stopped. Lines of the
file: {"text": ..., "label": ...}. POST /control takes {"accuracy", "latency_ms"} while it runs; GET /bill tells what it would have
charged for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

MODEL = "simulated-teacher"
_NEAR = 4


class SimulatedTeacher:
    """Answers by text. `accuracy` is the share of texts that it answers rightly."""

    def __init__(self, labels: Mapping[str, str], accuracy: float) -> None:
        self._labels = dict(labels)
        self.accuracy = accuracy
        names = sorted(set(labels.values()))
        self._near = {name: _confusable(name, names) for name in names}

    def answer(self, text: str) -> str:
        """The label it gives to a text; a refusal in words for a text that it does not know."""
        gold = self._labels.get(text)
        if gold is None:
            return "I am a simulation and have no label for this text."
        number = int.from_bytes(hashlib.sha256(b"teacher\0" + text.encode()).digest()[:8], "big")
        if number / 2**64 < self.accuracy or not self._near[gold]:
            return gold
        return self._near[gold][number % len(self._near[gold])]


def _confusable(name: str, names: Sequence[str]) -> list[str]:
    words = set(name.split("_"))
    return sorted((other for other in names if other != name), key=lambda other: (-len(words & set(other.split("_"))), other))[:_NEAR]


class HttpServer:
    """HTTP/1.1 with keep-alive, as little of it as the protocol needs: the simulation's own load is not what is to be measured."""

    def __init__(self, teacher: SimulatedTeacher, latency_s: float) -> None:
        self.requests = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._teacher = teacher
        self._latency_s = latency_s

    async def start(self, port: int) -> int:
        """Listens on loopback; returns the port."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        return int(server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.split("\r\n")
                headers = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                status, answer = await self._respond(first, body)
                data = json.dumps(answer).encode()
                writer.write(f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _respond(self, first: str, body: bytes) -> tuple[str, dict[str, object]]:
        if first.startswith("POST /control "):
            return self._control(body)
        if first.startswith("GET /bill "):
            counted = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
            return "200 OK", {"requests": self.requests, "accuracy": self._teacher.accuracy, **counted}
        if not first.startswith("POST ") or not first.split(" ")[1].endswith("/chat/completions"):
            return "404 Not Found", {"error": {"message": "this simulation knows POST /v1/chat/completions alone"}}
        try:
            request = json.loads(body)
            text = request["messages"][-1]["content"]
            prompt = sum(len(message["content"]) for message in request["messages"]) // 4
        except (ValueError, KeyError, TypeError, IndexError):
            return "400 Bad Request", {"error": {"message": "no chat completion request"}}
        self.requests += 1
        await asyncio.sleep(self._latency_s)
        answer = self._teacher.answer(text)
        written = max(len(answer) // 4, 1)
        self.prompt_tokens += prompt
        self.completion_tokens += written
        return "200 OK", {
            "id": f"chatcmpl-simulation-{self.requests}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": MODEL,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written},
        }

    def _control(self, body: bytes) -> tuple[str, dict[str, object]]:
        """A vendor's model changes under its name without notice; here it does so when told."""
        wanted = json.loads(body)
        self._teacher.accuracy = float(wanted.get("accuracy", self._teacher.accuracy))
        self._latency_s = float(wanted.get("latency_ms", self._latency_s * 1e3)) / 1e3
        return "200 OK", {"accuracy": self._teacher.accuracy, "latency_ms": self._latency_s * 1e3}


def read_labels(path: Path) -> dict[str, str]:
    """Text to label."""
    with path.open(encoding="utf-8") as file:
        return {row["text"]: row["label"] for row in map(json.loads, file)}


async def _main(options: argparse.Namespace) -> None:
    server = HttpServer(SimulatedTeacher(read_labels(options.labels), options.accuracy), options.latency_ms / 1e3)
    port = await server.start(options.port)
    note = "SIMULATION of an API model: answers come from a file of labels"
    print(json.dumps({"base_url": f"http://127.0.0.1:{port}/v1", "model": MODEL, "note": note}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True, help='JSON lines {"text", "label"}')
    parser.add_argument("--accuracy", type=float, default=0.91)
    parser.add_argument("--latency-ms", type=float, default=30.0)
    parser.add_argument("--port", type=int, default=0)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(parser.parse_args()))
