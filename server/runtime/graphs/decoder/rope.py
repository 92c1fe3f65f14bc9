"""Rotary positions: frequencies of each scaling that transformers knows, and the tables of cosines and sines.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753), Llama 3.1's scaling (model card).
Angles are computed in float32, as the models were trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from server.core import FloatArray
from server.errors import ModelRejected

if TYPE_CHECKING:
    from server.runtime.graphs.decoder.config import Fields


@dataclass(frozen=True)
class Rope:
    """`frequencies` float32[dims / 2], radians a position; `factor` on cosines and sines."""

    frequencies: FloatArray
    factor: float = 1.0

    @classmethod
    def plain(cls, theta: float, dims: int) -> Rope:
        """Frequencies theta ** (-2i / dims)."""
        return cls(_plain(theta, dims).astype(np.float32))

    @property
    def dims(self) -> int:
        """Dimensions of a head that turn."""
        return 2 * len(self.frequencies)

    def tables(self, positions: int) -> tuple[FloatArray, FloatArray]:
        """Cosines and sines, float32[positions, dims / 2] each."""
        cos = np.empty((positions, len(self.frequencies)), np.float32)
        sin = np.empty_like(cos)
        for start in range(0, positions, 8192):  # bounds the float64 in between
            end = min(start + 8192, positions)
            angle = (np.arange(start, end, dtype=np.float32)[:, None] * self.frequencies).astype(np.float64)
            cos[start:end], sin[start:end] = np.cos(angle) * self.factor, np.sin(angle) * self.factor
        return cos, sin


def _plain(theta: float, dims: int) -> FloatArray:
    powers = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return np.asarray(np.float32(1) / np.float32(theta) ** powers, np.float32)


def read_rope(fields: Fields, theta: float, dims: int, positions: int) -> tuple[Rope, int]:
    """The rotation of config.json's rope_scaling, and the positions it is good for.

    Raises:
        ModelRejected: an unknown scaling, or one whose numbers are missing.
    """
    scaling = fields.raw.get("rope_scaling")
    if scaling is None:
        return Rope.plain(theta, dims), positions
    if not isinstance(scaling, dict):
        raise _wrong(scaling, "an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    plain = _plain(theta, dims)
    if kind == "default":
        return Rope(plain), positions
    if kind == "linear":
        return Rope((plain / np.float32(_number(scaling, "factor"))).astype(np.float32)), positions
    if kind == "llama3":
        return Rope(_llama3(plain, scaling)), positions
    if kind == "yarn":
        return _yarn(scaling, theta, dims, positions), positions
    if kind in ("longrope", "su"):
        return _longrope(fields, scaling, theta, dims, positions)
    raise _wrong(str(kind)[:40], "default, linear, llama3, yarn or longrope")


def _wrong(got: object, expected: str) -> ModelRejected:
    return ModelRejected(f"config.json: rope_scaling is {str(got)[:80]!r}; expected {expected}.", field="rope_scaling")


def _number(scaling: dict[str, Any], key: str, default: float | None = None) -> float:
    value = scaling.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise _wrong(f"{key}={value}", "positive numbers")
    return float(value)


def _llama3(plain: FloatArray, scaling: dict[str, Any]) -> FloatArray:
    factor, low, high = (_number(scaling, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    old = _number(scaling, "original_max_position_embeddings")
    if high <= low:
        raise _wrong(f"high_freq_factor={high}", f"more than low_freq_factor, {low}")
    waves = 2 * math.pi / plain.astype(np.float64)
    smooth = np.clip((old / waves - low) / (high - low), 0, 1)
    return np.asarray((1 - smooth) * plain / factor + smooth * plain, np.float32)


def _yarn(scaling: dict[str, Any], theta: float, dims: int, positions: int) -> Rope:
    factor = _number(scaling, "factor")
    old = _number(scaling, "original_max_position_embeddings", float(positions))

    def gain(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        default = gain(_number(scaling, "mscale")) / gain(_number(scaling, "mscale_all_dim"))
    else:
        default = gain(1.0)

    def dimension(rotations: float) -> float:
        return dims * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(_number(scaling, "beta_fast", 32.0)), dimension(_number(scaling, "beta_slow", 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / ((high - low) or 0.001), 0, 1)
    plain = _plain(theta, dims).astype(np.float64)
    frequencies = plain / factor * ramp + plain * (1 - ramp)
    return Rope(frequencies.astype(np.float32), _number(scaling, "attention_factor", default))


def _longrope(fields: Fields, scaling: dict[str, Any], theta: float, dims: int, positions: int) -> tuple[Rope, int]:
    """With the short factors, so for the positions of the first training: one table cannot change with a text's length."""
    stated = fields.get("original_max_position_embeddings")
    old = fields.whole("original_max_position_embeddings", positions, default=positions)
    factor = positions / old if stated is not None else _number(scaling, "factor", 1.0)
    default = math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0
    short = scaling.get("short_factor")
    if not isinstance(short, list) or len(short) != dims // 2 or not all(isinstance(v, int | float) and 0 < v < 1e9 for v in short):
        raise _wrong(f"short_factor={short}", f"{dims // 2} positive numbers in short_factor")
    frequencies = _plain(theta, dims) / np.asarray(short, np.float32)
    return Rope(frequencies.astype(np.float32), _number(scaling, "attention_factor", default)), old
