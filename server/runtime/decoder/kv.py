"""The bytes of pages: one array for all layers, and how K and V of a stored prefix are written into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from server.core import FloatArray
from server.runtime.decoder.contract import page_bytes
from server.runtime.manifest import Decoder

_ALIGN = 64
_TINY = 1e-30
Bytes = npt.NDArray[np.uint8]


class KvLayout:
    """Where K and V of a position lie in a page; stated in words by `contract.page_bytes`."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        expected = page_bytes(decoder.kv_heads, decoder.head_dim, decoder.kv_dtype, decoder.page)
        assert decoder.page_bytes == expected, "the manifest was checked when the model was loaded"

    def allocate(self, pages: int) -> Bytes:
        """uint8[layers, pages, page_bytes], its first byte at a multiple of 64. The system backs it as it is written to."""
        decoder = self.decoder
        size = decoder.layers * pages * decoder.page_bytes
        raw = np.zeros(size + _ALIGN, np.uint8)
        start = -raw.ctypes.data % _ALIGN
        return raw[start : start + size].reshape(decoder.layers, pages, decoder.page_bytes)

    def write(self, pool: Bytes, pages: Sequence[int], keys: FloatArray, values: FloatArray) -> None:
        """Writes K and V [layers, kv_heads, positions, head_dim] from the first page's first position on."""
        decoder = self.decoder
        page, positions = decoder.page, keys.shape[2]
        for index, number in enumerate(pages):
            count = min(page, positions - index * page)
            part = slice(index * page, index * page + count)
            for layer in range(decoder.layers):
                for head in range(decoder.kv_heads):
                    k, v, k_scale, v_scale = self._views(pool[layer, number], head)
                    self._store(k.T[:count], k_scale[:count], keys[layer, head, part])
                    self._store(v[:count], v_scale[:count], values[layer, head, part])

    def _views(self, page: Bytes, head: int) -> tuple[Any, Any, Any, Any]:
        """K [head_dim, page], V [page, head_dim] and, of int8, their scales [page]."""
        decoder = self.decoder
        each = decoder.page_bytes // decoder.kv_heads
        raw = page[head * each : (head + 1) * each]
        dtype = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}[decoder.kv_dtype]
        size = decoder.head_dim * decoder.page * np.dtype(dtype).itemsize
        k = raw[:size].view(dtype).reshape(decoder.head_dim, decoder.page)
        v = raw[size : 2 * size].view(dtype).reshape(decoder.page, decoder.head_dim)
        scales = raw[2 * size :].view(np.float32)
        return k, v, scales[: decoder.page], scales[decoder.page :]

    def _store(self, target: Any, scales: Any, rows: FloatArray) -> None:
        kind = self.decoder.kv_dtype
        if kind == "float32":
            target[...] = rows
        elif kind == "bfloat16":
            bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
            target[...] = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        else:
            peak = np.maximum(np.abs(rows).max(axis=1), _TINY)
            scales[...] = peak / 127
            target[...] = np.rint(rows * (127 / peak)[:, None])
