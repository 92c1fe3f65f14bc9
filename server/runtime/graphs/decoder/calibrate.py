"""A float32 pass over calibration text that chooses a form for every product on the inputs it sees, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from server.core import FloatArray
from server.runtime.graphs.decoder.checkpoint import DecoderCheckpoint, Product
from server.runtime.graphs.decoder.int4 import quantize_int4
from server.runtime.graphs.decoder.int8 import EFFORTS, Choice, Rows, Weights, quantize_int8
from server.runtime.graphs.decoder.parity import Expected
from server.runtime.graphs.decoder.reference import COLUMNS, Sequences, forward

Choices = dict[str, Choice]


class Scratch:
    """Arrays in files of a folder, mapped: they take no memory, and the folder's owner removes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def keep(self, array: np.ndarray) -> np.ndarray:
        """The same content, read-only."""
        self._count += 1
        path = self.folder / f"{self._count}.bin"
        array.tofile(path)
        return np.memmap(path, dtype=array.dtype, mode="r", shape=array.shape)


class Chooser:
    """Multiplies as the reference does, and on the way quantizes each product on the first `count` rows of its inputs."""

    def __init__(self, forms: tuple[str, ...], effort: str, count: int, scratch: Scratch) -> None:
        self.effort = EFFORTS[effort]
        self.count = count
        self.scratch = scratch
        self.wanted = [form for form in forms if form != "float32"]
        self.chosen: dict[str, Choices] = {form: {} for form in self.wanted}

    def multiply(self, product: Product, x: FloatArray) -> FloatArray:
        """See reference.Multiply."""
        weight = product.weight()
        self.look(Weights(product, weight), x[: self.count])
        y = x @ weight
        bias = product.bias()
        return y if bias is None else np.asarray(y + bias)

    def look(self, weights: Weights, x: FloatArray) -> None:
        """Chooses the forms of one product."""
        rows, keep, name = Rows(x, self.effort.rows), self.scratch.keep, weights.product.name
        if "int4" in self.wanted:
            self.chosen["int4"][name] = quantize_int4(rows, weights, self.effort, keep)
        if "int8" in self.wanted:
            choice = quantize_int8(rows, weights, self.effort, keep)
            other = self.chosen.get("int4", {}).get(name)
            self.chosen["int8"][name] = other if other is not None and other.error < choice.error else choice


def choose_forms(
    model: DecoderCheckpoint, texts: tuple[Sequences, Sequences], chooser: Chooser, progress: Callable[[str, float], None]
) -> Expected:
    """Fills `chooser` on the first of `texts`; what the reference says to the second, which goes through the same pass."""
    used, held = texts
    total = sum(1 for _ in model.products())
    done = 0

    def multiply(product: Product, x: FloatArray) -> FloatArray:
        nonlocal done
        y = chooser.multiply(product, x)
        done += 1
        progress("quantize", done / total)
        return y

    both = Sequences(np.concatenate([used.ids, held.ids]), np.concatenate([used.cu, held.cu[1:] + used.cu[-1]]))
    hidden = forward(model, both, multiply)
    head = model.head()
    chooser.look(Weights(head, head.weight() if head.outputs <= COLUMNS else None), hidden[: len(used.ids)])
    progress("quantize", 1.0)
    return Expected.of(model, held, hidden[len(used.ids) :])
