"""Bad tensors for the Open Inference Protocol: names, types, shapes, sizes, values, parameters."""

from __future__ import annotations

import random
import struct
from typing import Any

from bench.hostile_case import ARGUMENT, BAD, FINE, MALFORMED, Case, Target, make, text_request
from understudy.oip import open_inference_pb2 as oip


def bad_tensor(rng: random.Random, target: Target) -> Case:
    name = rng.choice(sorted(target.raw))
    metadata = target.raw[name]
    request = oip.ModelInferRequest(model_name=name)
    graph = [tensor for tensor in metadata.inputs if tensor.name not in ("text", "query", "question", "context")]
    rows = rng.randint(1, 3)
    for tensor in graph:
        shape = [rows if size < 0 else size for size in tensor.shape]
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
        request.raw_input_contents.append(zeros(tensor.datatype, shape))
    spoil = rng.choice(list(_SPOILERS.values()))
    spoil(rng, request)
    return make("bad_tensor", "ModelInfer", request, BAD)


def zeros(datatype: str, shape: list[int]) -> bytes:
    count = 1
    for size in shape:
        count *= size
    width = {"BOOL": 1, "BYTES": 4, "BF16": 2, "FP16": 2, "FP32": 4, "FP64": 8}.get(datatype) or int(datatype.lstrip("UINT")) // 8
    return bytes(count * width)


def _first(request: oip.ModelInferRequest) -> Any:
    return request.inputs[0]


def _wrong_type(rng: random.Random, request: oip.ModelInferRequest) -> None:
    others = [t for t in ("FP16", "FP64", "BYTES", "BF16", "FP8", "", "fp32", "UINT8", "BOOL", "x" * 9000) if t != _first(request).datatype]
    _first(request).datatype = rng.choice(others)
    request.raw_input_contents[0] = request.raw_input_contents[0] + b"\7\7\7"


def _wrong_size(rng: random.Random, request: oip.ModelInferRequest) -> None:
    request.raw_input_contents[0] = request.raw_input_contents[0] + rng.randbytes(rng.randint(1, 3))


def _wrong_shape(rng: random.Random, request: oip.ModelInferRequest) -> None:
    del _first(request).shape[:]
    shapes = ([-1], [-(2**63)], [2**62, 4], [2**31, 2**31], [10**9], [1] * 100, [0, 2**63 - 1], [2**32, 2**32], [5, 5, 5, 5, 5])
    _first(request).shape.extend(rng.choice(shapes))


def _missing(_rng: random.Random, request: oip.ModelInferRequest) -> None:
    del request.inputs[0]
    del request.raw_input_contents[0]


def _unknown(rng: random.Random, request: oip.ModelInferRequest) -> None:
    _first(request).name = rng.choice(["nobody", "", "../x", "x" * 70_000, "\0"])


def _twice(_rng: random.Random, request: oip.ModelInferRequest) -> None:
    request.inputs.append(_first(request))
    request.raw_input_contents.append(request.raw_input_contents[0])


def _both(_rng: random.Random, request: oip.ModelInferRequest) -> None:
    _first(request).contents.fp32_contents.append(float("nan"))


def _raw_missing(_rng: random.Random, request: oip.ModelInferRequest) -> None:
    request.raw_input_contents.append(b"")


def _wrong_contents(rng: random.Random, request: oip.ModelInferRequest) -> None:
    del request.raw_input_contents[:]
    rng.choice([_first(request).contents.bytes_contents.append, lambda _: None])(b"x")
    _first(request).contents.uint64_contents.extend([2**64 - 1] * 5)


def _unknown_output(rng: random.Random, request: oip.ModelInferRequest) -> None:
    request.outputs.add(name=rng.choice(["nobody", "", "x" * 10_000]))


def _many_inputs(_rng: random.Random, request: oip.ModelInferRequest) -> None:
    for index in range(300):
        request.inputs.add(name=f"i{index}", datatype="FP32", shape=[1])


_SPOILERS = {
    spoil.__name__: spoil
    for spoil in (
        _wrong_type,
        _wrong_size,
        _wrong_shape,
        _missing,
        _unknown,
        _twice,
        _both,
        _raw_missing,
        _wrong_contents,
        _unknown_output,
        _many_inputs,
    )
}


def odd_ids(rng: random.Random, target: Target) -> Case:
    """Values of the right type and shape that no caller should send: NaN, infinity, ids and tables out of range. Some are legal data."""
    name = rng.choice(sorted(target.raw))
    request = oip.ModelInferRequest(model_name=name)
    rows = rng.randint(1, 4)
    for tensor in target.raw[name].inputs:
        if tensor.name in ("text", "query", "question", "context"):
            continue
        shape = [rows if size < 0 else size for size in tensor.shape]
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
        blank = zeros(tensor.datatype, shape)
        fill = {
            "FP32": struct.pack("<f", rng.choice([float("nan"), float("inf"), -3e38])),
            "FP64": struct.pack("<d", rng.choice([float("nan"), float("-inf"), 1e308])),
            "FP16": b"\x00\x7e",
            "INT64": struct.pack("<q", rng.choice([-1, 2**63 - 1, -(2**63), 10**6])),
            "INT32": struct.pack("<i", rng.choice([-1, 2**31 - 1, -(2**31), 10**6])),
        }.get(tensor.datatype, b"")
        request.raw_input_contents.append(fill * (len(blank) // len(fill)) if fill and rng.random() < 0.8 else blank)
    return make("odd_ids", "ModelInfer", request, {**BAD, **FINE})


def bad_parameter(rng: random.Random, target: Target) -> Case:
    request = text_request(target, [b"card"])
    key, value = rng.choice(
        [
            ("priority", {"int64_param": 77}),
            ("priority", {"string_param": "high"}),
            ("priority", {"int64_param": -1}),
            ("timeout", {"int64_param": -5}),
            ("timeout", {"double_param": float("nan")}),
            ("truncate", {"string_param": "yes"}),
            ("sequence_id", {"int64_param": 4}),
            ("colour", {"string_param": "red"}),
            ("x" * 10_000, {"bool_param": True}),
            ("", {}),
        ]
    )
    request.parameters[key].CopyFrom(oip.InferParameter(**value))
    return make("bad_parameter", "ModelInfer", request, BAD)


def bad_stream(rng: random.Random, target: Target) -> Case:
    """A request that fails on a stream has its error in a message of the stream, which then goes on to its end."""
    if rng.random() < 0.3:
        return make("bad_stream", "ModelStreamInfer", rng.randbytes(40), {**MALFORMED, **FINE})
    return make("bad_stream", "ModelStreamInfer", bad_tensor(rng, target).data, FINE, item_reasons=ARGUMENT)
