"""Adapters in memory, by kind. All weights are float32 and C-contiguous."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.core import FloatArray


@dataclass(frozen=True, slots=True)
class Delta:
    """What LoRA adds to one linear layer: y += scale * b @ (a @ x), a float32[rank, inputs], b float32[outputs, rank]."""

    a: FloatArray
    b: FloatArray
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """`deltas` by the name of the target in the base's layout."""

    deltas: Mapping[str, Delta]

    @property
    def rank(self) -> int:
        """The largest."""
        return max(delta.rank for delta in self.deltas.values())


@dataclass(frozen=True, slots=True)
class PrefixWeights:
    """Prefix tuning: keys (rotated already) and values that every sequence begins with, [layers, kv_heads, positions, head_dim] each."""

    keys: FloatArray
    values: FloatArray

    @property
    def positions(self) -> int:
        return int(self.keys.shape[2])


@dataclass(frozen=True, slots=True)
class PromptWeights:
    """Prompt tuning: `rows` [positions, H] stand before the tokens' embeddings."""

    rows: FloatArray

    @property
    def positions(self) -> int:
        return len(self.rows)


Weights = LoraWeights | PrefixWeights | PromptWeights
