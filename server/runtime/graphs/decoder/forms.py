"""Forms of a matrix product's weights, and the files that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from server.core import FloatArray
from server.runtime.graphs.decoder.checkpoint import Product
from server.runtime.graphs.decoder.reference import COLUMNS

# Initializers of this size and more lie in a file beside the graph, where ONNX Runtime maps them; each begins at a page of memory.
EXTERNAL_BYTES = 16_384
ALIGNMENT = 4096


@dataclass(frozen=True)
class Int8:
    """Activations u8[T, K], q = rint(x * mult / row scale) + zero_point; weights int8[K, N] with a scale a column.

    `row`: scales per row, found while running; then `scale` is 1 and `zero_point` 128. `shift` float32[N] is taken off the bias: the mean
    error of quantization.
    """

    row: bool
    mult: FloatArray
    scale: float
    zero_point: int
    weight: np.ndarray
    weight_scale: FloatArray
    shift: FloatArray | None = None


@dataclass(frozen=True)
class Int4:
    """`data` and `scale` as Int4Gemm reads them; activations stay float."""

    data: np.ndarray
    scale: np.ndarray
    block: int


# Product -> its form; one that is not named is float32.
Plan = Mapping[str, Int8 | Int4]


class DataFile:
    """Tensors one after the other in one file beside a graph."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")

    def close(self) -> None:
        """Nothing may be added afterwards; an empty file is removed."""
        empty = self._file.tell() == 0
        self._file.close()
        if empty:
            self.path.unlink()

    def add(self, name: str, value: np.ndarray) -> TensorProto:
        """Writes a tensor; the initializer that points to it."""
        offset = self._align()
        value = np.asarray(value, order="C")
        value.tofile(self._file)
        return _external(name, value.dtype, value.shape, (self.path.name, offset, value.nbytes))

    def add_weight(self, name: str, product: Product) -> TensorProto:
        """Writes a product's float32 weight, some columns of it at a time."""
        if product.outputs <= COLUMNS:
            return self.add(name, product.weight())
        shape = (product.inputs, product.outputs)
        offset, size = self._align(), 4 * product.inputs * product.outputs
        self._file.truncate(offset + size)
        target = np.memmap(self.path, dtype=np.float32, mode="r+", offset=offset, shape=shape)
        for start in range(0, product.outputs, COLUMNS):
            end = min(start + COLUMNS, product.outputs)
            target[:, start:end] = product.columns(start, end)
        target.flush()
        self._file.seek(offset + size)
        return _external(name, np.dtype(np.float32), shape, (self.path.name, offset, size))

    def _align(self) -> int:
        at = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.flush()
        self._file.truncate(at)
        self._file.seek(at)
        return at


def _external(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], place: tuple[str, int, int]) -> TensorProto:
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(dtype), dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in zip(("location", "offset", "length"), place, strict=True):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def embedded(name: str, value: Any) -> TensorProto:
    """An initializer inside the graph's own file."""
    # asarray(order="C") and not ascontiguousarray, which would make a vector of a scalar.
    return numpy_helper.from_array(np.asarray(value, order="C"), name)


def save(graph: onnx.GraphProto, path: Path, domain: str = "understudy") -> None:
    """Writes the graph, with operators of `domain`; its external tensors are in their files already."""
    opsets = [helper.make_opsetid(name, version) for name, version in (("", 17), (domain, 1))]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="understudy").SerializeToString())
