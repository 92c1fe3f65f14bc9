"""What `understudy models bench` measures: one model in this process, one call at a time, at several batch sizes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files as resources
from typing import TYPE_CHECKING, Any

import numpy as np

from server.core import Call, Results, Task
from server.errors import InvalidArgument, TaskNotSupported

if TYPE_CHECKING:
    from server.runtime.encoder import EncoderModel
    from server.runtime.repository import Repository

_WARM_UP = 3


def measure(
    repository: Repository, name: str, version: str | None, batches: list[int], seconds: float, texts: list[str] | None
) -> list[dict[str, float]]:
    """A row a batch size: batch, calls, texts_per_s, tokens_per_s, p50_ms, p95_ms (of a call). Blocks for `seconds` a row.

    Raises InvalidArgument for sizes that are not positive or no texts, and what loading raises.
    """
    if any(not 0 < size <= 100_000 for size in batches):
        raise InvalidArgument("--batch must be from 1 to 100000.", field="batch")
    corpus = texts if texts is not None else default_texts()
    if not corpus:
        raise InvalidArgument("there are no texts to measure with. Give a file with one text a line.", field="texts")
    return asyncio.run(_measure(repository, name, version, batches, seconds, corpus))


def default_texts() -> list[str]:
    """The sentences that int8 is calibrated on by default: short and long, of many domains."""
    text = (resources("server.runtime.graphs") / "calibration.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]


async def _measure(
    repository: Repository, name: str, version: str | None, batches: list[int], seconds: float, corpus: list[str]
) -> list[dict[str, float]]:
    from server.config import load_config
    from server.runtime.loader import make_loader
    from server.runtime.observer import NullObserver
    from server.runtime.runtime import Runtime

    runtime = Runtime(repository, make_loader(load_config().runtime, NullObserver()))
    try:
        status = await runtime.load(name, version)
        with runtime.use(name, None, status.version) as model:
            return [await _row(_caller(model), size, seconds, corpus) for size in batches]
    finally:
        await runtime.close()


async def _row(run: Callable[[list[str]], Awaitable[Results[Any]]], size: int, seconds: float, corpus: list[str]) -> dict[str, float]:
    took: list[float] = []
    tokens = position = 0
    began = time.perf_counter()
    while len(took) < _WARM_UP + 1 or time.perf_counter() - began < seconds:
        if len(took) == _WARM_UP:
            began, tokens = time.perf_counter(), 0
        texts = [corpus[(position + i) % len(corpus)] for i in range(size)]
        position += size
        start = time.perf_counter()
        results = await run(texts)
        took.append(time.perf_counter() - start)
        tokens += results.usage.input
        for item in results.items:
            if isinstance(item, Exception):
                raise item
    elapsed = time.perf_counter() - began
    calls = np.array(took[_WARM_UP:]) * 1e3
    return {
        "batch": size,
        "calls": len(calls),
        "texts_per_s": round(len(calls) * size / elapsed, 2),
        "tokens_per_s": round(tokens / elapsed, 1),
        "p50_ms": round(float(np.percentile(calls, 50)), 3),
        "p95_ms": round(float(np.percentile(calls, 95)), 3),
    }


def _caller(model: EncoderModel) -> Callable[[list[str]], Awaitable[Results[Any]]]:
    """The model's own task, on texts alone. Each call is a request of its own, without a deadline."""
    call = Call("bench")
    match model.manifest.task:
        case Task.FEATURE_EXTRACTION:
            return lambda texts: model.embed(texts, call=call, truncate=True)
        case Task.TEXT_CLASSIFICATION | Task.ZERO_SHOT_CLASSIFICATION:
            return lambda texts: model.classify(texts, call=call, truncate=True)
        case Task.TEXT_RANKING:
            return lambda texts: model.rerank(texts[0], texts, call=call, truncate=True)
        case Task.TOKEN_CLASSIFICATION:
            return lambda texts: model.extract_entities(texts, call=call, truncate=True)
        case Task.QUESTION_ANSWERING:
            return lambda texts: model.answer([("What is this about?", text) for text in texts], call=call)
        case _:
            raise TaskNotSupported(f"model {model.manifest.name!r} takes raw tensors, and only models of text are measured.")
