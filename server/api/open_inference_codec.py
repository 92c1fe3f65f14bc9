"""Tensors of the Open Inference Protocol: bytes of a request to NumPy arrays, arrays to bytes of a response.

Nothing is allocated by what a request announces: an announced shape is first held against the bytes that came. Raw contents are
viewed where they lie in the received message; of a response each output is copied once, into the message that is sent.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from server.api import wire
from server.errors import InvalidArgument, InvalidTensor, RequestTooLarge, Unimplemented
from understudy.oip import open_inference_pb2 as pb

Array = npt.NDArray[Any]
Buffer = bytes | memoryview

# Datatype on the wire -> (NumPy type, field of InferTensorContents; empty: raw contents alone).
DATATYPES: dict[str, tuple[npt.DTypeLike, str]] = {
    "BOOL": (np.bool_, "bool_contents"),
    "UINT8": (np.uint8, "uint_contents"),
    "UINT16": (np.uint16, "uint_contents"),
    "UINT32": (np.uint32, "uint_contents"),
    "UINT64": (np.uint64, "uint64_contents"),
    "INT8": (np.int8, "int_contents"),
    "INT16": (np.int16, "int_contents"),
    "INT32": (np.int32, "int_contents"),
    "INT64": (np.int64, "int64_contents"),
    "FP16": (np.float16, ""),
    "FP32": (np.float32, "fp32_contents"),
    "FP64": (np.float64, "fp64_contents"),
    "BYTES": (np.object_, "bytes_contents"),
}
_NAMES = {np.dtype(dtype): name for name, (dtype, _) in DATATYPES.items()}
_RAW_INPUTS_TAG = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2
_RAW_OUTPUTS_TAG = bytes([pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER << 3 | 2])
_STREAM_TAG = bytes([pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER << 3 | 2])
_COPY_BELOW = 16 * 1024  # smaller requests are parsed whole: walking them costs more than the copy
_SLICE = 65_536
MAX_RANK = 16
MAX_DIM = 2**31 - 1
MAX_ELEMENTS = 2**31 - 1
MAX_TEXT_ELEMENTS = 65_536  # elements of a BYTES tensor: each becomes an object
MAX_INPUTS = 256
MAX_ID_BYTES = 1024


@dataclass(slots=True, frozen=True)
class Request:
    """A ModelInferRequest whose raw contents are still views of the received bytes."""

    message: pb.ModelInferRequest
    raw: Sequence[Buffer]


def read_request(data: bytes) -> Request:
    """Parses a request. Raises InvalidArgument for bytes that are none."""
    if len(data) < _COPY_BELOW:
        message = wire.parse(pb.ModelInferRequest, data)
        return Request(message, message.raw_input_contents)
    view = memoryview(data)
    raw: list[Buffer] = []
    rest: list[memoryview] = []
    at = kept = 0
    try:
        while at < len(data):
            start = at
            tag, at = _varint(data, at)
            if tag & 7 != 2:  # the message has no other fields than delimited ones: leave what is odd to the parser
                return _whole(data)
            size, at = _varint(data, at)
            if at + size > len(data):
                return _whole(data)
            if tag == _RAW_INPUTS_TAG:
                rest.append(view[kept:start])
                raw.append(view[at : at + size])
                kept = at + size
            at += size
    except IndexError:
        return _whole(data)
    rest.append(view[kept:])
    return Request(wire.parse(pb.ModelInferRequest, b"".join(rest)), raw)


def _whole(data: bytes) -> Request:
    message = wire.parse(pb.ModelInferRequest, data)
    return Request(message, message.raw_input_contents)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 or shift > 63:
            return value, at
        shift += 7


def check_request(request: pb.ModelInferRequest) -> None:
    """Refuses what no model takes. Raises InvalidArgument, RequestTooLarge, Unimplemented."""
    if len(request.id.encode()) > MAX_ID_BYTES:
        raise InvalidArgument(f"the request's id has more than {MAX_ID_BYTES} bytes; shorten it.", field="id", limit=MAX_ID_BYTES)
    for field, tensors in (("inputs", request.inputs), ("outputs", request.outputs)):
        if len(tensors) > MAX_INPUTS:
            message = f"{field}: {len(tensors)} tensors; a request has at most {MAX_INPUTS}."
            raise RequestTooLarge(message, field=field, limit=MAX_INPUTS)
        names = [tensor.name for tensor in tensors]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidTensor(f"{field}: {_short(twice)} is given twice; give each tensor once.", field=field, tensor=_short(twice))
        for tensor in tensors:
            _check_parameters(field, tensor)


def _check_parameters(field: str, tensor: Any) -> None:
    for key in tensor.parameters:
        if key.startswith("shared_memory_"):
            raise Unimplemented(
                f"{field}: {_short(tensor.name)} lies in shared memory, which this server does not read; send it in the request.",
                tensor=_short(tensor.name),
            )
        if field == "inputs" or key != "classification":
            known = " 'classification' is known here." if field == "outputs" else ""
            message = f"{field}: parameter {_short(key)} of {_short(tensor.name)} is not known;{known} leave it out."
            raise InvalidArgument(message, field=field, tensor=_short(tensor.name))


def read_inputs(request: Request) -> dict[str, Array]:
    """The inputs by name, in row-major order. BYTES become object arrays of `bytes`. Numeric raw contents may be read-only views.

    Raises:
        InvalidTensor: with `tensor`, `expected`, `got` where they apply.
    """
    inputs, raw = request.message.inputs, request.raw
    if raw and len(raw) != len(inputs):
        raise InvalidTensor(
            f"raw_input_contents has {len(raw)} entries for {len(inputs)} inputs; give one for each input, or none.",
            field="raw_input_contents",
            expected=len(inputs),
            got=len(raw),
        )
    return {tensor.name: _read(tensor, raw[i] if raw else None) for i, tensor in enumerate(inputs)}


def _read(tensor: pb.ModelInferRequest.InferInputTensor, raw: Buffer | None) -> Array:
    name = _short(tensor.name)
    if tensor.datatype not in DATATYPES:
        mend = "convert it to FP32." if tensor.datatype == "BF16" else f"use one of {', '.join(DATATYPES)}."
        raise InvalidTensor(f"input {name}: datatype {_short(tensor.datatype)} is not taken; {mend}", tensor=name, got=tensor.datatype)
    shape = tuple(tensor.shape)
    count = _count(shape, name)
    if raw is None:
        array = _from_contents(tensor, count, name)
    elif tensor.HasField("contents"):
        message = f"input {name} has contents and raw_input_contents; give its elements once."
        raise InvalidTensor(message, tensor=name, field="raw_input_contents")
    else:
        array = _from_raw(tensor.datatype, raw, count, name)
    return array if array.shape == shape else array.reshape(shape)


def _count(shape: Sequence[int], name: str) -> int:
    if len(shape) > MAX_RANK:
        raise InvalidTensor(f"input {name} has {len(shape)} axes; at most {MAX_RANK} are taken.", tensor=name, limit=MAX_RANK)
    count = extent = 1
    for size in shape:
        if not 0 <= size <= MAX_DIM:
            message = f"input {name}: shape {_shape(shape)} has an axis of {size}; axes have 0 to {MAX_DIM} elements."
            raise InvalidTensor(message, tensor=name, got=_shape(shape))
        count *= size
        extent *= max(size, 1)
        if extent > MAX_ELEMENTS:
            message = f"input {name}: shape {_shape(shape)} has more than {MAX_ELEMENTS} elements."
            raise InvalidTensor(message, tensor=name, got=_shape(shape), limit=MAX_ELEMENTS)
    return count


def _from_raw(datatype: str, raw: Buffer, count: int, name: str) -> Array:
    if datatype == "BYTES":
        return _objects(list(_split_texts(raw, count, name)))
    dtype = np.dtype(DATATYPES[datatype][0])
    if len(raw) != count * dtype.itemsize:
        message = (
            f"input {name}: {len(raw)} raw bytes; its shape and {datatype} make {count * dtype.itemsize}. Send little-endian, row-major."
        )
        raise InvalidTensor(message, tensor=name, expected=count * dtype.itemsize, got=len(raw))
    if datatype == "BOOL":
        values = np.frombuffer(raw, np.uint8)
        if values.size and values.max() > 1:
            raise InvalidTensor(
                f"input {name}: a BOOL byte is {values.max()}; it is 0 or 1.", tensor=name, expected="0 or 1", got=values.max()
            )
        return values.view(np.bool_)
    return _little_endian(raw, dtype)


def _split_texts(raw: Buffer, count: int, name: str) -> Iterator[bytes]:
    _check_text_count(count, name)
    at = 0
    for index in range(count):
        if at + 4 > len(raw):
            message = f"input {name}: its raw bytes end before element {index} of {count}."
            raise InvalidTensor(message, tensor=name, expected=count, got=index)
        size = int.from_bytes(raw[at : at + 4], "little")
        at += 4
        if at + size > len(raw):
            message = f"input {name}: element {index} announces {size} bytes and {len(raw) - at} are there."
            raise InvalidTensor(message, tensor=name, expected=size, got=len(raw) - at)
        yield bytes(raw[at : at + size])
        at += size
    if at != len(raw):
        message = f"input {name}: {len(raw) - at} bytes follow its {count} elements."
        raise InvalidTensor(message, tensor=name, expected=at, got=len(raw))


def _check_text_count(count: int, name: str) -> None:
    if count > MAX_TEXT_ELEMENTS:
        message = f"input {name}: {count} BYTES elements; at most {MAX_TEXT_ELEMENTS} are taken in one request."
        raise InvalidTensor(message, tensor=name, limit=MAX_TEXT_ELEMENTS, got=count)


def _from_contents(tensor: pb.ModelInferRequest.InferInputTensor, count: int, name: str) -> Array:
    dtype, field = DATATYPES[tensor.datatype]
    if not field:
        message = f"input {name}: {tensor.datatype} has no typed contents; send it in raw_input_contents."
        raise InvalidTensor(message, tensor=name, field="contents")
    for other, _ in tensor.contents.ListFields():
        if other.name != field:
            message = f"input {name}: {tensor.datatype} elements go into contents.{field}, not contents.{other.name}."
            raise InvalidTensor(message, tensor=name, expected=field, got=other.name)
    values = getattr(tensor.contents, field)
    if len(values) != count:
        message = f"input {name}: {len(values)} elements in contents.{field}; its shape {_shape(tensor.shape)} makes {count}."
        raise InvalidTensor(message, tensor=name, expected=count, got=len(values))
    if tensor.datatype == "BYTES":
        _check_text_count(count, name)
        return _objects(list(values))
    if tensor.datatype in ("FP32", "FP64", "BOOL"):
        return _from_packed(tensor.contents.SerializeToString(), np.dtype(dtype), count)
    wide = np.dtype({"int_contents": np.int32, "uint_contents": np.uint32}.get(field, dtype))
    array: Array = np.empty(count, wide)
    for at in range(0, count, _SLICE):  # slices, so that other threads get their turn between them
        array[at : at + _SLICE] = values[at : at + _SLICE]
    if wide != dtype:
        limits = np.iinfo(np.dtype(dtype).type)
        if count and not (limits.min <= array.min() and array.max() <= limits.max):
            message = f"input {name}: an element is outside of {tensor.datatype}, {limits.min} to {limits.max}."
            raise InvalidTensor(message, tensor=name, expected=f"{limits.min} to {limits.max}")
        array = array.astype(dtype)
    return array


def _from_packed(contents: bytes, dtype: np.dtype[Any], count: int) -> Array:
    """Elements of fixed size, from a serialised InferTensorContents that holds them alone: one tag, one length, and their bytes."""
    if not count:
        return np.empty(0, dtype)
    return _little_endian(memoryview(contents)[-count * dtype.itemsize :], dtype)


def _little_endian(raw: Buffer, dtype: np.dtype[Any]) -> Array:
    """Aligned elements of the machine's own byte order: a view of `raw` where that is possible."""
    if sys.byteorder == "big":
        return np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype)
    array = np.frombuffer(raw, dtype)
    return array if array.flags.aligned else array.copy()


def _objects(values: list[Any]) -> Array:
    array = np.empty(len(values), np.object_)
    array[:] = values
    return array


def datatype_of(array: Array) -> str:
    """The wire's name of an array's type: text arrays are BYTES."""
    if array.dtype.kind in "OSU":
        return "BYTES"
    return _NAMES[array.dtype.newbyteorder("=")]


def write_response(header: pb.ModelInferResponse, outputs: Iterable[tuple[str, Array]]) -> bytes:
    """A whole ModelInferResponse, serialised: `header` with the outputs added, their elements as raw contents."""
    parts: list[Any] = [b""]
    for name, array in outputs:
        header.outputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        raw: Any = _join_texts(array) if array.dtype.kind in "OSU" else np.ascontiguousarray(array)
        size = len(raw) if isinstance(raw, bytes) else raw.nbytes
        parts += (_RAW_OUTPUTS_TAG, _varint_bytes(size))
        if size:
            parts.append(raw)
    parts[0] = header.SerializeToString()
    return b"".join(parts)


def stream_response(response: bytes) -> bytes:
    """A ModelStreamInferResponse around a serialised ModelInferResponse."""
    return b"".join((_STREAM_TAG, _varint_bytes(len(response)), response))


def _join_texts(array: Array) -> bytes:
    parts: list[bytes] = []
    for value in array.reshape(-1).tolist():
        text = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        parts += (len(text).to_bytes(4, "little"), text)
    return b"".join(parts)


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def classification(array: Array, k: int, labels: Sequence[str], batched: bool) -> Array:
    """The `k` best elements of each entry (of the whole array where there is no batch axis) as BYTES "score:index[:label]", best first."""
    rows = array.reshape(array.shape[0], -1) if batched and array.ndim > 1 else array.reshape(1, -1)
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :k]

    def show(row: int, index: int) -> bytes:
        label = f":{labels[index]}" if len(labels) == rows.shape[1] else ""
        return f"{rows[row, index]:f}:{index}{label}".encode()

    found = _objects([show(row, int(index)) for row in range(len(rows)) for index in best[row]]).reshape(best.shape)
    return found if batched and array.ndim > 1 else found[0]


def _short(text: str) -> str:
    """A caller's word for a message: quoted, at most 64 characters."""
    return repr(text if len(text) <= 64 else text[:61] + "...")


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(str(size) for size in shape[:MAX_RANK]) + "]"
