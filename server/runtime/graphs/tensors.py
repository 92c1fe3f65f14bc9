"""Tensors of safetensors files, read without torch and with nothing taken on trust.

Format: 8 bytes little-endian length, a JSON header of that length, then the data (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from server.core import FloatArray
from server.errors import ModelRejected
from server.runtime.graphs.config import read_json

MAX_HEADER_BYTES = 100 << 20
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
HOW_TO_CONVERT = (
    'convert them with torch on a machine that trusts them: python -c "from transformers import AutoModel as A; '
    "A.from_pretrained('IN').save_pretrained('OUT', safe_serialization=True)\" (AutoModelFor... for a model with a head)"
)


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Tensors:
    """The tensors of a checkpoint's folder, by name; data is read when it is taken."""

    def __init__(self, entries: dict[str, _Entry]) -> None:
        self._entries = entries
        self._maps: dict[Path, np.ndarray] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its name."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def take(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        """The tensor as float32 of exactly `shape`.

        Raises:
            ModelRejected: it is absent, has another shape or no float type, or holds NaN or infinity; metadata `tensor`.
        """
        return self.rows(name, shape, 0, shape[0] if shape else 1)

    def rows(self, name: str, shape: tuple[int, ...], start: int, end: int) -> FloatArray:
        """Rows [start, end) of the tensor of `shape` as float32; raises as `take`."""
        entry = self.check(name, shape)
        row = (entry.end - entry.start) // max(shape[0] if shape else 1, 1)
        raw = self._map(entry.file)[entry.start + start * row : entry.start + end * row]
        values = _decode(raw, entry.dtype).reshape((end - start, *shape[1:]) if shape else ())
        if not np.isfinite(values).all():
            raise ModelRejected(f"Tensor {name!r} holds NaN or infinity; the checkpoint is damaged or its training diverged.", tensor=name)
        return values

    def bits(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The bits uint16 of a bfloat16 tensor, as a view of its file; None for other types."""
        entry = self.check(name, shape)
        return np.memmap(entry.file, dtype="<u2", mode="r", offset=entry.start, shape=shape) if entry.dtype == "BF16" else None

    def _map(self, file: Path) -> np.ndarray:
        """A file as bytes, mapped once: opening it again for each of many small tensors takes longer than reading them."""
        if file not in self._maps:
            self._maps[file] = np.memmap(file, dtype=np.uint8, mode="r").view(np.ndarray)
        return self._maps[file]

    def check(self, name: str, shape: tuple[int, ...]) -> _Entry:
        """The header's entry of a float tensor of exactly `shape`; raises ModelRejected."""
        entry = self._entries.get(name)
        if entry is None:
            near = [n for n in self._entries if n.rsplit(".", 2)[-2:] == name.rsplit(".", 2)[-2:]][:3]
            seen = f" (the file has, for example, {', '.join(near)})" if near else ""
            raise ModelRejected(f"Tensor {name!r} is not in the checkpoint{seen}; use a checkpoint that was saved with it.", tensor=name)
        if entry.shape != shape:
            raise ModelRejected(f"Tensor {name!r} has shape {entry.shape}; config.json asks for {shape}.", tensor=name)
        if entry.dtype not in _FLOATS:
            raise ModelRejected(f"Tensor {name!r} has type {entry.dtype}; expected one of {', '.join(_FLOATS)}.", tensor=name)
        return entry


def _decode(raw: Any, dtype: str) -> FloatArray:
    if dtype == "BF16":
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
    with np.errstate(over="ignore"):
        return np.frombuffer(raw, dtype=kind).astype(np.float32)


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors file; raises ModelRejected where its header lies about it."""
    return Tensors(_read_header(path))


def open_tensors(folder: Path) -> Tensors:
    """The checkpoint in `folder`: `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises:
        ModelRejected: there is none, or a header lies about its file. Pickled checkpoints are never opened.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return Tensors(_read_header(single))
    if index.is_file():
        shards = read_json(index).get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
                raise ModelRejected(
                    f"model.safetensors.index.json names {name[:80]!r}, which is no safetensors file beside it.", field=index.name
                )
        return Tensors({key: entry for name in names for key, entry in _read_header(folder / name).items()})
    pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
    if pickled:
        raise ModelRejected(
            f"{pickled[0]} is a pickle, and opening a pickle runs whatever it contains; only safetensors are read. "
            f"Look for model.safetensors in the repository, or {HOW_TO_CONVERT}.",
            field=pickled[0],
        )
    raise ModelRejected("There is no model.safetensors in the model's folder; copy it from where the weights came.", field=single.name)


def _read_header(path: Path) -> dict[str, _Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(path, f"its header claims {length} bytes of a file of {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    return {str(name): _entry(path, str(name), value, 8 + length, size) for name, value in header.items()}


def _entry(path: Path, name: str, value: Any, data: int, size: int) -> _Entry:
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        sound = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in [*shape, start, end]) and len(shape) <= 8
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise _damaged(path, f"the entry of {name[:80]!r} lacks its type, shape or offsets")
    if not start <= end <= size - data:
        raise _damaged(path, f"{name[:80]!r} lies outside the file")
    if dtype in _FLOATS and math.prod(shape) * _FLOATS[dtype] != end - start:
        raise _damaged(path, f"{name[:80]!r} has shape {tuple(shape)} but {end - start} bytes")
    return _Entry(path, dtype, tuple(shape), data + start, data + end)


def _damaged(path: Path, what: str) -> ModelRejected:
    return ModelRejected(f"{path.name} is damaged: {what}. Download it again and compare its SHA-256.", field=path.name)
