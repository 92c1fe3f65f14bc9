"""The decoders in NumPy: what a graph's answers are checked against where torch is not installed, and where calibration looks inside.

Written from the papers' formulas (pre-norm RMS decoder, rotary positions, grouped heads, gated feed-forward), not from the graph writer,
and shares nothing with it but the checkpoint. One layer's weights are in memory at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from server.core import FloatArray, IntArray
from server.runtime.graphs.decoder.checkpoint import DecoderCheckpoint, Layer, Product
from server.runtime.graphs.decoder.config import DecoderConfig
from server.runtime.graphs.reference import gelu

# Computes a product, bias included: (product, x float32[T, K]) -> float32[T, N].
Multiply = Callable[[Product, FloatArray], FloatArray]
# Columns of a weight that are in memory at once.
COLUMNS = 16_384


@dataclass(frozen=True)
class Sequences:
    """Token sequences end to end: ids int64[T]; cu int32[S+1], where sequence s is rows cu[s]:cu[s+1]."""

    ids: IntArray
    cu: np.ndarray

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Sequences:
        ids = np.concatenate([np.asarray(one, dtype=np.int64) for one in sequences])
        return cls(ids, np.cumsum([0, *map(len, sequences)], dtype=np.int32))

    def split(self) -> list[list[int]]:
        """The sequences one by one."""
        return [self.ids[start:end].tolist() for start, end in itertools.pairwise(self.cu)]


def exact(product: Product, x: FloatArray) -> FloatArray:
    """The product as it is written down."""
    if product.outputs <= COLUMNS:
        y = x @ product.weight()
    else:
        y = np.empty((len(x), product.outputs), np.float32)
        for start in range(0, product.outputs, COLUMNS):
            end = min(start + COLUMNS, product.outputs)
            y[:, start:end] = x @ product.columns(start, end)
    bias = product.bias()
    if bias is not None:
        y += bias
    return y


def forward(model: DecoderCheckpoint, batch: Sequences, multiply: Multiply = exact) -> FloatArray:
    """What the head reads: hidden states after the last norm, float32[T, hidden]. `multiply` computes the layers' products."""
    config = model.config
    positions = int(np.diff(batch.cu).max())
    tables = [rope.tables(positions) for rope in config.ropes]
    x = model.embed(batch.ids)
    for i in range(config.layers):
        layer = model.layer(i)
        qkv = multiply(layer.qkv, norm(x, layer.norm1, config.epsilon))
        context = _attention(qkv, batch.cu, config, layer, tables[layer.kind.rope])
        x = x + _inner(multiply(layer.out, context), layer.inner1, config.epsilon)
        gate_up = multiply(layer.gate_up, norm(x, layer.norm2, config.epsilon))
        gate, up = np.split(gate_up, 2, axis=1)
        x = x + _inner(multiply(layer.down, activate(gate, config.activation) * up), layer.inner2, config.epsilon)
    return norm(x, model.final_norm(), config.epsilon)


def logits(model: DecoderCheckpoint, hidden: FloatArray, multiply: Multiply = exact) -> FloatArray:
    """float32[R, vocabulary] of rows of `forward`."""
    y = multiply(model.head(), hidden)
    cap = np.float32(model.config.final_softcap)
    return np.asarray(np.tanh(y / cap) * cap) if cap else y


def greedy(model: DecoderCheckpoint, prompt: Sequence[int], tokens: int) -> list[int]:
    """The `tokens` likeliest ones after `prompt`, each by a whole forward pass: short texts of small models only."""
    ids = list(prompt)
    for _ in range(tokens):
        hidden = forward(model, Sequences.of([ids]))[-1:]
        ids.append(int(logits(model, hidden).argmax()))
    return ids[len(prompt) :]


def norm(x: FloatArray, gamma: FloatArray, epsilon: float) -> FloatArray:
    """RMS norm over the last axis (arXiv 1910.07467)."""
    power = np.square(x).mean(axis=-1, keepdims=True, dtype=np.float64)
    y: FloatArray = x * (1 / np.sqrt(power + epsilon)).astype(np.float32) * gamma
    return y


def _inner(y: FloatArray, gamma: FloatArray | None, epsilon: float) -> FloatArray:
    return y if gamma is None else norm(y, gamma, epsilon)


def activate(x: FloatArray, kind: int) -> FloatArray:
    """`kind` as in the operator GatedAct."""
    if kind:
        return gelu(x, approximate=kind == 1)
    y: FloatArray = x / (1 + np.exp(-np.maximum(x, np.float32(-80))))
    return y


def _attention(qkv: FloatArray, cu: np.ndarray, config: DecoderConfig, layer: Layer, tables: tuple[FloatArray, FloatArray]) -> FloatArray:
    size, group = config.head_dim, config.heads // config.kv_heads
    parts = qkv.reshape(len(qkv), config.heads + 2 * config.kv_heads, size)
    out = np.empty((len(qkv), config.heads, size), np.float32)
    for start, end in itertools.pairwise(cu):
        q, k, v = np.split(parts[start:end].transpose(1, 0, 2), [config.heads, config.heads + config.kv_heads])
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = norm(q, layer.q_norm, config.epsilon), norm(k, layer.k_norm, config.epsilon)
        if layer.kind.rotary:
            q, k = (_rotate(one, *(table[: end - start] for table in tables)) for one in (q, k))
        k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
        out[start:end] = _attend(q, k, v, config, layer.kind.window).transpose(1, 0, 2)
    return out.reshape(len(qkv), config.q_width)


def _attend(q: FloatArray, k: FloatArray, v: FloatArray, config: DecoderConfig, window: int) -> FloatArray:
    """[heads, n, size] each."""
    scores = (q @ k.transpose(0, 2, 1)) * np.float32(config.scale)
    if config.softcap:
        scores = np.tanh(scores / np.float32(config.softcap)) * np.float32(config.softcap)
    at = np.arange(q.shape[1])
    back = at[:, None] - at[None, :]
    scores[:, (back < 0) | (back >= (window or math.inf))] = -np.inf
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    y: FloatArray = scores @ v
    return y


def _rotate(x: FloatArray, cos: FloatArray, sin: FloatArray) -> FloatArray:
    """Turns the first dimensions of [heads, n, size], halves against each other."""
    half = cos.shape[1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], axis=-1)
