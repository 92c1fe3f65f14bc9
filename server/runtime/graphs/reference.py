"""The encoders in NumPy: what a graph's answers are checked against where torch is not installed, and where calibration looks inside.

Written from the papers' formulas (post-norm transformer encoder, exact GELU), not from the graph writer, and shares nothing with it but
the checkpoint.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from server.core import FloatArray, IntArray
from server.runtime.graphs.architecture import HeadKind
from server.runtime.graphs.checkpoint import Checkpoint, Dense, Norm

# Computes the product of that name: (name, x float32[T, K], its weights) -> float32[T, N], bias included.
Multiply = Callable[[str, FloatArray, Dense], FloatArray]


@dataclass(frozen=True)
class Packed:
    """Token sequences end to end. ids, types and positions int64[T]; cu int32[S+1], where sequence s is rows cu[s]:cu[s+1]."""

    ids: IntArray
    types: IntArray
    positions: IntArray
    cu: np.ndarray

    @classmethod
    def of(cls, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Packed:
        """From (ids, type ids) pairs."""
        lengths = [len(ids) for ids, _ in sequences]
        return cls(
            ids=np.concatenate([np.asarray(ids, dtype=np.int64) for ids, _ in sequences]),
            types=np.concatenate([np.asarray(types, dtype=np.int64) for _, types in sequences]),
            positions=np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]),
            cu=np.cumsum([0, *lengths], dtype=np.int32),
        )

    def feed(self, token_types: bool) -> dict[str, np.ndarray]:
        """Inputs of a packed graph."""
        feed = {"input_ids": self.ids, "position_ids": self.positions, "cu_seqlens": self.cu}
        return {**feed, "token_type_ids": self.types} if token_types else feed


def exact(_name: str, x: FloatArray, dense: Dense) -> FloatArray:
    """The product as it is written down."""
    y: FloatArray = x @ dense.weight
    y += dense.bias
    return y


def forward(model: Checkpoint, batch: Packed, multiply: Multiply = exact) -> tuple[FloatArray, FloatArray]:
    """Hidden states float32[T, H] and the output of the model's head (the hidden states again where it has none).

    `multiply` computes the encoder's products, so that calibration can look at their inputs.
    """
    config = model.config
    x = model.word[batch.ids] + model.position[batch.positions]
    if model.token_type is not None:
        x = x + model.token_type[batch.types]
    x = _norm(x, model.embed_norm, config.epsilon)
    for i, layer in enumerate(model.layers):
        qkv = multiply(f"layer{i}.qkv", x, layer.qkv)
        context = _attention(qkv, batch.cu, config.heads, model.relative_bias)
        x = _norm(x + multiply(f"layer{i}.out", context, layer.out), layer.norm1, config.epsilon)
        inner = gelu(multiply(f"layer{i}.up", x, layer.up), config.approximate)
        x = _norm(x + multiply(f"layer{i}.down", inner, layer.down), layer.norm2, config.epsilon)
    out = x[batch.cu[:-1]] if model.kind is HeadKind.SEQUENCE else x
    for dense in model.head:
        out = exact("", out, dense)
        out = np.tanh(out) if dense.activation == "tanh" else np.maximum(out, 0) if dense.activation == "relu" else out
    return x, out


def _norm(x: FloatArray, norm: Norm, epsilon: float) -> FloatArray:
    centred = x - x.mean(axis=-1, keepdims=True, dtype=np.float64).astype(np.float32)
    variance = np.square(centred).mean(axis=-1, keepdims=True, dtype=np.float64)
    y: FloatArray = centred * (1 / np.sqrt(variance + epsilon)).astype(np.float32) * norm.gamma + norm.beta
    return y


def _attention(qkv: FloatArray, cu: np.ndarray, heads: int, bias: FloatArray | None) -> FloatArray:
    tokens, width = qkv.shape[0], qkv.shape[1] // 3
    parts = qkv.reshape(tokens, 3, heads, width // heads)
    out = np.empty((tokens, heads, width // heads), dtype=np.float32)
    for start, end in itertools.pairwise(cu):
        q, k, v = (np.ascontiguousarray(parts[start:end, j].transpose(1, 0, 2)) for j in range(3))
        scores = (q @ k.transpose(0, 2, 1)) / np.float32(math.sqrt(width // heads))
        if bias is not None:
            reach = (bias.shape[1] + 1) // 2
            at = np.arange(end - start)
            scores += bias[:, np.clip(at[None, :] - at[:, None], 1 - reach, reach - 1) + reach - 1]
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        out[start:end] = (scores @ v).transpose(1, 0, 2)
    return out.reshape(tokens, width)


def gelu(x: FloatArray, approximate: bool) -> FloatArray:
    """GELU of Hendrycks & Gimpel (arXiv 1606.08415): x Phi(x), or its tanh approximation."""
    if approximate:
        tanh: FloatArray = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        return 0.5 * x * (1 + tanh)
    y: FloatArray = 0.5 * x * (1 + _erf(x * np.float32(math.sqrt(0.5))))
    return y


def _erf(x: FloatArray) -> FloatArray:
    """Error function to 1.5e-7 (Abramowitz & Stegun, Handbook of Mathematical Functions, 7.1.26)."""
    magnitude = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * magnitude)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * np.float32(1.061405429)))))
    y: FloatArray = np.copysign(1 - poly * np.exp(-np.square(magnitude)), x).astype(np.float32)
    return y
