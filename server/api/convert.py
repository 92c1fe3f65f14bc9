"""Nouns of server/core.py to messages of understudy.v1. The embedding's way is written by hand: its bytes are the floats' own."""

from __future__ import annotations

from typing import Any

import numpy as np

from server.api.status import to_status
from server.core import Entity, FloatArray, Label, Results, Span, Timings, Usage
from understudy.v1 import common_pb2, inference_pb2, inference_service_pb2

_LITTLE_ENDIAN = np.dtype("<f4")


def timings(value: Timings) -> common_pb2.StageTimings:
    """Seconds to durations."""
    message = common_pb2.StageTimings()
    for duration, seconds in (
        (message.queue, value.queue),
        (message.tokenize, value.tokenize),
        (message.run, value.run),
        (message.post, value.post),
    ):
        duration.seconds = whole = int(seconds)
        duration.nanos = int((seconds - whole) * 1e9)
    return message


def usage(value: Usage) -> common_pb2.Usage:
    """Tokens."""
    return common_pb2.Usage(input_tokens=value.input, output_tokens=value.output, cached_input_tokens=value.cached)


def tail(results: Results[Any]) -> dict[str, Any]:
    """The fields that all responses share: model, usage, timings."""
    return {
        "model": common_pb2.ModelUsed(name=results.model, version=results.version),
        "usage": usage(results.usage),
        "timings": timings(results.timings),
    }


def truncated(results: Results[Any], index: int) -> bool:
    """Whether item `index` was cut."""
    return bool(results.truncated) and bool(results.truncated[index])


def label(value: Label) -> inference_pb2.Label:
    """A class and its score."""
    return inference_pb2.Label(name=value.name, score=value.score)


def entity(value: Entity) -> inference_pb2.Entity:
    """A named thing."""
    return inference_pb2.Entity(label=value.label, score=value.score, text=value.text, start=value.start, end=value.end)


def answer(value: Span) -> inference_pb2.Answer:
    """A span of the context."""
    return inference_pb2.Answer(text=value.text, score=value.score, start=value.start, end=value.end)


def embed_response(results: Results[FloatArray]) -> bytes:
    """An EmbedResponse in its wire format.

    A packed repeated float is its little-endian bytes after a tag and a length, and a vector is 1.5 KB of them: building Python floats and
    a message for each costs ten times as much as the rest of a call's answer.
    """
    parts: list[bytes] = []
    cut = results.truncated
    for index, item in enumerate(results.items):
        if isinstance(item, Exception):
            inner = inference_pb2.EmbedResult(error=to_status(item)).SerializeToString()
            parts += (b"\x0a", _varint(len(inner)), inner)
            continue
        floats = item.astype(_LITTLE_ENDIAN, copy=False).tobytes()
        flag = b"\x10\x01" if cut and cut[index] else b""
        length = _varint(len(floats))
        parts += (b"\x0a", _varint(1 + len(length) + len(floats) + len(flag)), b"\x0a", length, floats, flag)
    parts.append(inference_service_pb2.EmbedResponse(**tail(results)).SerializeToString())
    return b"".join(parts)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
