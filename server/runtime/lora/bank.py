"""The adapters' weights where the graph reads them: one array for all slots, bound once and changed in place between requests."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from server.core import FloatArray
from server.errors import ModelRejected
from server.runtime.lora.layout import check_layout
from server.runtime.lora.weights import LoraWeights
from server.runtime.manifest import LoraLayout

_ALIGN = 64
_BREATH_S = 0.001


class Breath:
    """Called between small pieces of work in a thread: once a millisecond it lets the interpreter go, for whoever waits to take a step."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def __call__(self) -> None:
        if time.perf_counter() - self._last > _BREATH_S:
            time.sleep(0)
            self._last = time.perf_counter()


class AdapterBank:
    """`weights` float32 or uint16 (bfloat16 bits) [slots, rank, width] and `ranks` int32[slots, targets], as `LoraLayout` says.

    All memory is reserved when it is made; pages that no adapter has used are not backed yet. The bank knows nothing of who uses a slot:
    `write` and `clear` may be called from any thread for a slot that no running token names, and for different slots at once.
    With `slots` 0 it has one slot of rank 1 that nobody may use, so that a graph's inputs can be bound.
    """

    def __init__(self, layout: LoraLayout, slots: int, rank: int) -> None:
        """Raises ManifestInvalid for a layout that contradicts itself."""
        assert slots >= 0 and rank >= 1, (slots, rank)
        check_layout(layout)
        self.layout = layout
        self.slots = slots
        self.rank = rank if slots else 1
        shape = (max(slots, 1), self.rank, layout.width)
        self.weights: npt.NDArray[Any] = _zeros(shape, np.dtype(np.float32 if layout.dtype == "float32" else np.uint16))
        self.ranks: npt.NDArray[np.int32] = np.zeros(
            (max(slots, 1), max(1, max((t.index + 1 for t in layout.targets), default=1))), np.int32
        )
        self._backed: set[int] = set()
        self._targets = {target.name: target for target in layout.targets}

    @property
    def nbytes(self) -> int:
        """Bytes reserved for good."""
        return int(self.weights.nbytes + self.ranks.nbytes)

    def feeds(self) -> dict[str, npt.NDArray[Any]]:
        """The graph's inputs by name; the arrays are the bank's own."""
        return {"lora_bank": self.weights, "lora_ranks": self.ranks}

    def check(self, weights: LoraWeights, name: str) -> None:
        """Raises ModelRejected where an adapter does not fit the layout or the rank of the bank."""
        if weights.rank > self.rank:
            raise ModelRejected(
                f"adapter {name!r} has rank {weights.rank}; this server keeps room for rank {self.rank}. "
                f"Set generation.adapter_rank to {weights.rank} or more.",
                adapter=name,
                rank=weights.rank,
                limit=self.rank,
            )
        for layer, delta in weights.deltas.items():
            target = self._targets.get(layer)
            if target is None or delta.a.shape[1] != target.inputs or delta.b.shape[0] != target.outputs:
                wanted = "no such layer" if target is None else f"{target.inputs} inputs and {target.outputs} outputs"
                raise ModelRejected(
                    f"adapter {name!r} changes {layer!r} with {delta.a.shape[1]} inputs and {delta.b.shape[0]} outputs; "
                    f"the base has {wanted}. Convert the adapter again for this base.",
                    adapter=name,
                    tensor=layer,
                )

    def write(self, slot: int, weights: LoraWeights) -> None:
        """Puts a checked adapter into a slot. The interpreter is let go between layers, so that running streams keep their pace."""
        assert 0 <= slot < self.slots, (slot, self.slots)
        encode = to_bfloat16 if self.layout.dtype == "bfloat16" else np.asarray
        rows, breathe = self.weights[slot], Breath()
        self.ranks[slot] = 0
        if slot not in self._backed:  # pages in order come twice as fast as those that scattered rows ask for
            rows.fill(0)
            self._backed.add(slot)
        for name, delta in weights.deltas.items():
            target, rank = self._targets[name], delta.rank
            rows[:rank, target.a : target.a + target.inputs] = encode(delta.a)
            rows[:rank, target.b : target.b + target.outputs] = encode(delta.b * np.float32(delta.scale)).T
            breathe()
        for name, delta in weights.deltas.items():
            self.ranks[slot, self._targets[name].index] = delta.rank

    def clear(self, slot: int) -> None:
        """Makes a slot the adapter that changes nothing."""
        self.ranks[slot] = 0

    def read(self, slot: int) -> dict[str, tuple[FloatArray, FloatArray]]:
        """What a slot adds, by layer: A float32[rank, inputs] and B float32[outputs, rank] with the scale in it; for checks."""
        found = {}
        for target in self.layout.targets:
            rank = int(self.ranks[slot, target.index])
            if rank:
                a = self.weights[slot, :rank, target.a : target.a + target.inputs]
                b = self.weights[slot, :rank, target.b : target.b + target.outputs]
                found[target.name] = (_decode(a), np.ascontiguousarray(_decode(b).T))
        return found


def to_bfloat16(values: FloatArray) -> npt.NDArray[np.uint16]:
    """The upper halves of float32, rounded to nearest, ties to even. Finite values only."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    return rounded.astype(np.uint16)


def _decode(values: npt.NDArray[Any]) -> FloatArray:
    if values.dtype == np.float32:
        return np.array(values, np.float32)
    wide = values.astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Zeros whose first byte lies at a multiple of 64."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(size + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + size].view(dtype).reshape(shape)
