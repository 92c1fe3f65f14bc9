"""Which layers of a base adapters may change, where each one's rows lie in the bank, and what identifies the base."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from server.core import IntArray
from server.errors import ManifestInvalid
from server.runtime.adapter_folder import Base
from server.runtime.manifest import LoraLayout, LoraTarget, Manifest
from server.runtime.verify import MODEL

# Files of a version that decide what the model computes; the others are text around it.
_WEIGHTS = (".onnx", ".onnx_data", ".onnx.data", ".safetensors")
# Rows of A and B begin at multiples of this many values, so that vectors of 64 bytes never straddle two layers.
ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer by the base's own module path: y float[outputs] of x float[inputs]."""

    name: str
    inputs: int
    outputs: int


def make_layout(layers: Sequence[Linear], dtype: Literal["float32", "bfloat16"] = "float32") -> LoraLayout:
    """One target a layer, in their order."""
    at = 0
    targets = []
    for index, layer in enumerate(layers):
        b = at + _aligned(layer.inputs)
        targets.append(LoraTarget(name=layer.name, inputs=layer.inputs, outputs=layer.outputs, a=at, b=b, index=index))
        at = b + _aligned(layer.outputs)
    return LoraLayout(dtype=dtype, width=at, targets=targets)


def rows_of(targets: Sequence[tuple[LoraTarget, int]]) -> IntArray:
    """The operators' input `lora_layout` int64[n, 6] of one product, from its targets and the first column that each one writes."""
    rows = [(t.a, t.b, column, t.outputs, t.index, t.inputs) for t, column in targets]
    return np.asarray(rows, dtype=np.int64).reshape(-1, 6)


def check_layout(layout: LoraLayout) -> None:
    """Raises ManifestInvalid where targets lie outside of the bank's rows, or two of them have one name or number."""
    names, numbers = {target.name for target in layout.targets}, {target.index for target in layout.targets}
    outside = [t for t in layout.targets if max(t.a + t.inputs, t.b + t.outputs) > layout.width or t.index >= len(layout.targets)]
    if outside or len(names) != len(layout.targets) or len(numbers) != len(layout.targets):
        what = f"{outside[0].name[:128]!r} lies outside of it" if outside else "two targets have one name or index"
        raise ManifestInvalid(
            f"the manifest's layout of adapters is {layout.width} wide and has {len(layout.targets)} targets, but {what}. "
            "Pull the model again.",
            key="lora",
        )


def layout_of(manifest: Manifest) -> LoraLayout | None:
    """The layout of a model that takes LoRA adapters, else None."""
    return manifest.decoder.lora if manifest.decoder is not None else manifest.lora


def base_sha256(manifest: Manifest) -> str:
    """What an adapter's manifest calls its base's SHA-256: that of model.onnx, or where weights lie in other files too, that of the lines
    "<sha256>  <name>" of all of them by name, as `sha256sum` prints them.
    """
    files = {name: entry.sha256 for name, entry in manifest.files.items() if name.endswith(_WEIGHTS)}
    if set(files) == {MODEL}:
        return files[MODEL]
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def base_of(manifest: Manifest) -> Base:
    """The entry `base` of an adapter's manifest."""
    return Base(name=manifest.name, version=manifest.version, sha256=base_sha256(manifest))


class Targets:
    """Finds targets by the module paths of a checkpoint that may have more or fewer wrappers around it than the base was read with."""

    def __init__(self, layout: LoraLayout) -> None:
        self.by_name: Mapping[str, LoraTarget] = {target.name: target for target in layout.targets}
        suffixes: dict[str, LoraTarget | None] = {}
        for target in layout.targets:
            for suffix in _suffixes(target.name):
                suffixes[suffix] = None if suffix in suffixes else target
        self._suffixes = suffixes

    def find(self, module: str) -> LoraTarget | None:
        """The target of this very path, or the only one that agrees with it from the right; at least a layer's number must agree."""
        if module in self.by_name:
            return self.by_name[module]
        for suffix in _suffixes(module):
            found = self._suffixes.get(suffix)
            if found is not None and (suffix in (found.name, module)):
                return found
        return None


def _suffixes(path: str) -> list[str]:
    """The path and what is left of it without leading parts, longest first, as long as there is a number among the parts."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts)) if any(part.isdigit() for part in parts[i:])]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
