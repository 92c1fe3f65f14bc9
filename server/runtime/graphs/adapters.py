"""Where LoRA adapters of an encoder lie in the bank, and which columns of which product they change."""

from __future__ import annotations

from collections.abc import Mapping

from server.core import IntArray
from server.runtime.graphs.checkpoint import Checkpoint
from server.runtime.lora.layout import Linear, make_layout, rows_of
from server.runtime.manifest import LoraLayout

# Our product -> the layers that it joins side by side, by our names of them (server/runtime/graphs/architecture.py).
_PARTS = {"qkv": ("query", "key", "value"), "out": ("out",), "up": ("up",), "down": ("down",)}


def lora_layout(model: Checkpoint) -> LoraLayout:
    """Every linear layer of every block, by its path in the checkpoint without the prefix of a head's class. The bank is float32."""
    return make_layout([linear for parts in _linears(model).values() for linear in parts])


def lora_rows(model: Checkpoint, layout: LoraLayout) -> Mapping[str, IntArray]:
    """The constant input lora_layout int64[parts, 6] of each product."""
    known = {target.name: target for target in layout.targets}
    rows = {}
    for product, parts in _linears(model).items():
        column, found = 0, []
        for linear in parts:
            found.append((known[linear.name], column))
            column += linear.outputs
        rows[product] = rows_of(found)
    return rows


def _linears(model: Checkpoint) -> dict[str, list[Linear]]:
    tensors = model.config.names.tensors
    found = {}
    for name, dense in model.products().items():
        layer, kind = name.removeprefix("layer").split(".")
        inputs, outputs = dense.weight.shape
        parts = _PARTS[kind]
        found[name] = [Linear(tensors[part].format(i=layer), inputs, outputs // len(parts)) for part in parts]
    return found
