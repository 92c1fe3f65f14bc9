"""Encoder-decoder checkpoints: config.json and safetensors of each family, reduced to one description and one set of names.

Two families cover them: BART's (BART, mBART, Marian, Pegasus, M2M100 and NLLB differ in where they normalise and how they count
positions) and T5's (T5, mT5, FLAN-T5). Weights are read without torch, one at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from server.core import FloatArray, IntArray
from server.errors import ModelRejected, near_names
from server.runtime.graphs.config import read_json
from server.runtime.graphs.tensors import Tensors, open_tensors

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
Side = Literal["encoder", "decoder"]
_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
# model_type -> (norm before each part, norm of the embeddings, positions)
_BART_LIKE: dict[str, tuple[bool, bool, str]] = {
    "bart": (False, True, "learned"),
    "mbart": (True, True, "learned"),
    "marian": (False, False, "sinusoidal"),
    "pegasus": (True, False, "sinusoidal"),
    "m2m_100": (True, False, "offset"),
}
_T5_LIKE = ("t5", "mt5")
ARCHITECTURES = tuple(sorted((*_BART_LIKE, *_T5_LIKE)))
LEARNED_OFFSET = 2  # rows before the first position in BART's and M2M100's tables, whatever the configuration says
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Config:
    """Sizes and switches. `positions`: tokens a side takes, 0 where nothing bounds them (T5). `embed_scale`, `head_scale`: factors of
    embeddings and of what reaches the head. `pre_norm`: each part normalises what it reads, and a last norm follows.
    """

    model_type: str
    t5: bool
    hidden: int
    head_dim: int
    heads: dict[Side, int]
    layers: dict[Side, int]
    inner: dict[Side, int]
    vocabulary: int
    source_vocabulary: int
    positions: int
    position_kind: str
    pre_norm: bool
    embed_norm: bool
    embed_scale: float
    head_scale: float
    activation: Activation
    gated: bool
    epsilon: float
    tied: bool
    buckets: int
    max_distance: int
    pad_token_id: int
    raw: dict[str, Any]

    @property
    def attention_scale(self) -> float:
        return 1.0 if self.t5 else self.head_dim**-0.5


def read_config(folder: Path) -> Config:
    """Reads `folder/config.json`; raises ModelRejected (with `field`) for other architectures and sizes that make no sense."""
    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    if kind in _T5_LIKE:
        return _t5(raw)
    if kind in _BART_LIKE:
        return _bart(raw)
    known = list(ARCHITECTURES)
    raise ModelRejected(
        f"config.json: model_type is {str(kind)[:64]!r}; encoder-decoders of these architectures are served: {', '.join(known)}; "
        f"{near_names(str(kind)[:64], known)}",
        field="model_type",
    )


def _number(raw: dict[str, Any], key: str, limit: int, default: int | None = None, least: int = 1) -> int:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= limit:
        raise ModelRejected(f"config.json: {key} is {str(value)[:40]!r}; expected a whole number from {least} to {limit}.", field=key)
    return value


def _activation(name: object, key: str) -> Activation:
    found = _ACTIVATIONS.get(name) if isinstance(name, str) else None
    if found is None:
        raise ModelRejected(f"config.json: {key} is {str(name)[:40]!r}; expected one of {', '.join(sorted(_ACTIVATIONS))}.", field=key)
    return found


def _bart(raw: dict[str, Any]) -> Config:
    pre_norm, embed_norm, positions = _BART_LIKE[str(raw["model_type"])]
    hidden = _number(raw, "d_model", 16_384)
    heads: dict[Side, int] = {side: _number(raw, f"{side}_attention_heads", 1024) for side in ("encoder", "decoder")}
    if any(hidden % n or hidden // n > MAX_HEAD_DIM for n in heads.values()):
        raise ModelRejected(
            f"config.json: heads {heads} do not divide d_model {hidden}, or are wider than {MAX_HEAD_DIM}.", field="d_model"
        )
    if heads["encoder"] != heads["decoder"]:
        raise ModelRejected(
            f"config.json: the two sides have {heads} heads; models with equal numbers are served.", field="decoder_attention_heads"
        )
    vocabulary = _number(raw, "vocab_size", 4_000_000)
    return Config(
        model_type=str(raw["model_type"]),
        t5=False,
        hidden=hidden,
        head_dim=hidden // heads["encoder"],
        heads=heads,
        layers={side: _number(raw, f"{side}_layers", 256) for side in ("encoder", "decoder")},
        inner={side: _number(raw, f"{side}_ffn_dim", 131_072) for side in ("encoder", "decoder")},
        vocabulary=_number(raw, "decoder_vocab_size", 4_000_000, vocabulary) if raw.get("decoder_vocab_size") else vocabulary,
        source_vocabulary=vocabulary,
        positions=_number(raw, "max_position_embeddings", 1_000_000, 1024),
        position_kind=positions,
        pre_norm=pre_norm,
        embed_norm=embed_norm,
        embed_scale=math.sqrt(hidden) if raw.get("scale_embedding", raw["model_type"] == "m2m_100") is True else 1.0,
        head_scale=1.0,
        activation=_activation(raw.get("activation_function", "relu" if raw["model_type"] == "m2m_100" else "gelu"), "activation_function"),
        gated=False,
        epsilon=1e-5,
        tied=raw.get("tie_word_embeddings", True) is not False,
        buckets=0,
        max_distance=0,
        pad_token_id=_number(raw, "pad_token_id", 4_000_000, 1, least=0),
        raw=raw,
    )


def _t5(raw: dict[str, Any]) -> Config:
    feed_forward = str(raw.get("feed_forward_proj", "relu"))
    gated = feed_forward.startswith("gated-")
    # transformers reads "gated-gelu" as the tanh form, for checkpoints older than the name "gelu_new".
    name = "gelu_new" if feed_forward == "gated-gelu" else feed_forward.removeprefix("gated-")
    hidden = _number(raw, "d_model", 16_384)
    layers, heads, inner = _number(raw, "num_layers", 256), _number(raw, "num_heads", 1024), _number(raw, "d_ff", 131_072)
    vocabulary = _number(raw, "vocab_size", 4_000_000)
    tied = raw.get("tie_word_embeddings", True) is not False
    return Config(
        model_type=str(raw["model_type"]),
        t5=True,
        hidden=hidden,
        head_dim=_number(raw, "d_kv", MAX_HEAD_DIM),
        heads={"encoder": heads, "decoder": heads},
        layers={"encoder": layers, "decoder": _number(raw, "num_decoder_layers", 256) if raw.get("num_decoder_layers") else layers},
        inner={"encoder": inner, "decoder": inner},
        vocabulary=vocabulary,
        source_vocabulary=vocabulary,
        positions=0,
        position_kind="relative",
        pre_norm=True,
        embed_norm=False,
        embed_scale=1.0,
        head_scale=hidden**-0.5 if tied else 1.0,
        activation=_activation(name, "feed_forward_proj"),
        gated=gated,
        epsilon=float(raw.get("layer_norm_epsilon", 1e-6)),
        tied=tied,
        buckets=_number(raw, "relative_attention_num_buckets", 1024, 32, least=4),
        max_distance=_number(raw, "relative_attention_max_distance", 100_000, 128, least=2),
        pad_token_id=_number(raw, "pad_token_id", 4_000_000, 0, least=0),
        raw=raw,
    )


@dataclass(frozen=True)
class Dense:
    """y = x @ weight + bias; weight float32[inputs, outputs], bias float32[outputs] or None."""

    weight: FloatArray
    bias: FloatArray | None


@dataclass(frozen=True)
class Norm:
    """Gain and, unless the norm is RMS, bias; float32[hidden] each."""

    gamma: FloatArray
    beta: FloatArray | None


_BART_PARTS = {"self": "self_attn", "cross": "encoder_attn"}
_BART_NORMS = {"self": "self_attn_layer_norm", "cross": "encoder_attn_layer_norm", "feed": "final_layer_norm"}
_T5_PARTS = {"self": "layer.0.SelfAttention", "cross": "layer.1.EncDecAttention"}


class Checkpoint:
    """Weights of one folder by what they are for. Each call reads from the disk; raises ModelRejected for what is absent or misshapen."""

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        self._tensors: Tensors = open_tensors(folder)
        self._prefix = "model." if "model.shared.weight" in self._tensors or "model.encoder.embed_tokens.weight" in self._tensors else ""

    def _take(self, name: str, *shape: int) -> FloatArray:
        return self._tensors.take(self._prefix + name, shape)

    def _first(self, names: tuple[str, ...], *shape: int) -> FloatArray:
        """The first of `names` that the checkpoint has: tied weights are stored once, under any of them."""
        found = next((name for name in names if name in self._tensors), names[0])
        return self._tensors.take(found, shape)

    def embedding(self, side: Side) -> FloatArray:
        """float32[vocabulary of the side, hidden]."""
        c, p = self.config, self._prefix
        rows = c.source_vocabulary if side == "encoder" else c.vocabulary
        return self._first((f"{p}{side}.embed_tokens.weight", f"{p}shared.weight", "lm_head.weight"), rows, c.hidden)

    def head(self) -> FloatArray | None:
        """float32[vocabulary, hidden] of an output layer of its own, None where it is the decoder's embedding."""
        return None if self.config.tied else self._tensors.take("lm_head.weight", (self.config.vocabulary, self.config.hidden))

    def head_bias(self) -> FloatArray | None:
        """float32[vocabulary], or None where there is none or it is zero."""
        if "final_logits_bias" not in self._tensors:
            return None
        bias = self._tensors.take("final_logits_bias", (1, self.config.vocabulary))[0]
        return bias if bias.any() else None

    def positions(self, side: Side) -> FloatArray | None:
        """float32[positions, hidden], the first position's row first; None for T5."""
        c = self.config
        name = f"{self._prefix}{side}.embed_positions.weight"
        if c.position_kind == "relative":
            return None
        if c.position_kind == "learned":
            return self._tensors.take(name, (c.positions + LEARNED_OFFSET, c.hidden))[LEARNED_OFFSET:]
        if c.position_kind == "offset":
            return _sinusoids_of_m2m(c.positions, c.hidden, c.pad_token_id)
        if name in self._tensors:
            return self._tensors.take(name, (c.positions, c.hidden))
        return _sinusoids(c.positions, c.hidden)

    def norm(self, side: Side, layer: int, part: str) -> Norm:
        """`part`: "self", "cross" or "feed"."""
        if self.config.t5:
            number = {"self": 0, "cross": 1, "feed": 1 if side == "encoder" else 2}[part]
            return Norm(self._take(f"{side}.block.{layer}.layer.{number}.layer_norm.weight", self.config.hidden), None)
        return self._layer_norm(f"{side}.layers.{layer}.{_BART_NORMS[part]}")

    def embed_norm(self, side: Side) -> Norm:
        return self._layer_norm(f"{side}.layernorm_embedding")

    def last_norm(self, side: Side) -> Norm:
        if self.config.t5:
            return Norm(self._take(f"{side}.final_layer_norm.weight", self.config.hidden), None)
        return self._layer_norm(f"{side}.layer_norm")

    def _layer_norm(self, base: str) -> Norm:
        return Norm(self._take(f"{base}.weight", self.config.hidden), self._take(f"{base}.bias", self.config.hidden))

    def attention(self, side: Side, layer: int, part: str, names: str) -> Dense:
        """The projections that `names` has letters for ("qkv", "q", "kv", "o"), side by side. `part`: "self" or "cross"."""
        c = self.config
        width = c.heads[side] * c.head_dim
        parts = [self._projection(side, layer, part, letter, width) for letter in names]
        biases = [p.bias for p in parts if p.bias is not None]
        return Dense(np.concatenate([p.weight for p in parts], axis=1), np.concatenate(biases) if biases else None)

    def _projection(self, side: Side, layer: int, part: str, letter: str, width: int) -> Dense:
        inputs, outputs = (width, self.config.hidden) if letter == "o" else (self.config.hidden, width)
        if self.config.t5:
            return self._dense(f"{side}.block.{layer}.{_T5_PARTS[part]}.{letter}", inputs, outputs, bias=False)
        name = "out_proj" if letter == "o" else f"{letter}_proj"
        return self._dense(f"{side}.layers.{layer}.{_BART_PARTS[part]}.{name}", inputs, outputs)

    def feed(self, side: Side, layer: int) -> tuple[Dense, Dense | None, Dense]:
        """The layer into the inner width, the one it is gated by (or None), the layer out of it."""
        c = self.config
        if not c.t5:
            base = f"{side}.layers.{layer}"
            return self._dense(f"{base}.fc1", c.hidden, c.inner[side]), None, self._dense(f"{base}.fc2", c.inner[side], c.hidden)
        base = f"{side}.block.{layer}.layer.{1 if side == 'encoder' else 2}.DenseReluDense"
        out = self._dense(f"{base}.wo", c.inner[side], c.hidden, bias=False)
        if not c.gated:
            return self._dense(f"{base}.wi", c.hidden, c.inner[side], bias=False), None, out
        gate, up = (self._dense(f"{base}.wi_{i}", c.hidden, c.inner[side], bias=False) for i in (0, 1))
        return up, gate, out

    def _dense(self, base: str, inputs: int, outputs: int, *, bias: bool = True) -> Dense:
        weight = np.ascontiguousarray(self._take(f"{base}.weight", outputs, inputs).T)
        return Dense(weight, self._take(f"{base}.bias", outputs) if bias else None)

    def relative(self, side: Side) -> FloatArray:
        """T5's bias by distance. Encoder: float32[heads, 2 * span - 1], column span - 1 + key - query; decoder: [heads, span], by
        query - key. Beyond `max_distance` the bucket no longer changes.
        """
        c = self.config
        table = self._take(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", c.buckets, c.heads[side])
        span = c.max_distance + 1
        offsets = np.arange(-(span - 1), span) if side == "encoder" else -np.arange(span)
        return np.ascontiguousarray(table[_bucket(offsets, c.buckets, c.max_distance, side == "encoder")].T)


def _bucket(offsets: IntArray, buckets: int, max_distance: int, both: bool) -> IntArray:
    """T5's bucket of key - query (Raffel et al. 2020, 2.1): exact while near, then logarithmic."""
    first = np.zeros(offsets.shape, np.int64)
    if both:
        buckets //= 2
        first += np.where(offsets > 0, buckets, 0)
    distance = np.abs(offsets) if both else np.maximum(-offsets, 0)
    exact = buckets // 2
    far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    far_bucket = np.minimum(exact + (far * np.float32(buckets - exact)).astype(np.int64), buckets - 1)
    found: IntArray = first + np.where(distance < exact, distance, far_bucket)
    return found


def _sinusoids(rows: int, width: int) -> FloatArray:
    """Marian's and Pegasus' positions: sines in the first half of a row, cosines in the second."""
    angles = np.arange(rows)[:, None] / np.power(10000, 2 * (np.arange(width) // 2) / width)
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1).astype(np.float32)


def _sinusoids_of_m2m(rows: int, width: int, pad: int) -> FloatArray:
    """M2M100's positions as fairseq makes them, from the row after the padding's on; all in float32, as the original."""
    half = width // 2
    steps = np.exp(np.arange(half, dtype=np.float32) * np.float32(-(math.log(10000) / (half - 1))))
    angles = np.arange(pad + 1, pad + 1 + rows, dtype=np.float32)[:, None] * steps
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(table, ((0, 0), (0, width % 2)))
