"""A checkpoint of any known architecture, brought into one form with one set of names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from server.core import FloatArray, Task
from server.errors import ModelRejected, TaskNotSupported
from server.runtime.graphs.architecture import HEAD_OF_TASK, HeadKind
from server.runtime.graphs.config import EncoderConfig, read_config
from server.runtime.graphs.mpnet import BUCKETS, relative_bias
from server.runtime.graphs.tensors import Tensors, open_tensors
from server.runtime.manifest import LoraLayout


@dataclass(frozen=True)
class Dense:
    """y = x @ weight + bias. `weight` float32[in, out], C-contiguous (checkpoints keep [out, in]); `activation` "tanh", "relu" or ""."""

    weight: FloatArray
    bias: FloatArray
    activation: str = ""


@dataclass(frozen=True)
class Norm:
    gamma: FloatArray
    beta: FloatArray


@dataclass(frozen=True)
class Layer:
    """`qkv` is query, key and value side by side: float32[H, 3H], each head-major."""

    qkv: Dense
    out: Dense
    norm1: Norm
    up: Dense
    down: Dense
    norm2: Norm


@dataclass(frozen=True)
class Checkpoint:
    """The whole model. `position` starts at a sequence's first token. `token_type` is None where there is nothing to choose.

    `relative_bias` float32[heads, 2R-1] as in the PackedAttention operator, or None. `head`: dense layers after the encoder. `lora`: where
    adapters lie in the bank, for a graph that takes them.
    """

    config: EncoderConfig
    word: FloatArray
    position: FloatArray
    token_type: FloatArray | None
    embed_norm: Norm
    layers: tuple[Layer, ...]
    relative_bias: FloatArray | None
    kind: HeadKind
    head: tuple[Dense, ...]
    lora: LoraLayout | None = None

    def products(self) -> dict[str, Dense]:
        """The matrix products of the encoder by name, in the order of the graph."""
        parts = (
            (f"layer{i}.{name}", dense)
            for i, layer in enumerate(self.layers)
            for name, dense in (("qkv", layer.qkv), ("out", layer.out), ("up", layer.up), ("down", layer.down))
        )
        return dict(parts)


def read_checkpoint(folder: Path, task: Task) -> Checkpoint:
    """Reads config.json and the safetensors of `folder` for `task`.

    Raises:
        ModelRejected: config or tensors are broken, or of no known architecture.
        TaskNotSupported: the checkpoint's head is another task's.
    """
    config = read_config(folder)
    kind = HEAD_OF_TASK.get(task)
    if kind is None:
        raise TaskNotSupported(f"No graph is written for task {task.value!r}; expected one of {', '.join(HEAD_OF_TASK)}.", task=task.value)
    has = config.head_in_checkpoint()
    if kind is not HeadKind.HIDDEN and has is not None and has is not kind:
        tasks = [t.value for t, k in HEAD_OF_TASK.items() if k is has]
        raise TaskNotSupported(
            f"The checkpoint is a {config.architecture}, which has no head for {task.value!r}; it can do {', '.join(tasks)}.",
            task=task.value,
        )
    return _Reader(config, open_tensors(folder)).read(kind)


class _Reader:
    def __init__(self, config: EncoderConfig, tensors: Tensors) -> None:
        self.config = config
        self.names = config.names
        self.tensors = tensors
        prefixed = f"{self.names.prefix}.{self.names.tensors['word']}.weight"
        # A bare encoder is saved without the prefix, one with a head with it.
        self.prefix = f"{self.names.prefix}." if prefixed in tensors else ""

    def read(self, kind: HeadKind) -> Checkpoint:
        c = self.config
        position = self._take("position", (c.positions, c.hidden))[c.position_offset :]
        token_type = self._take("token_type", (c.token_types, c.hidden)) if c.token_types else None
        if token_type is not None and len(token_type) == 1:
            position, token_type = position + token_type[0], None
        shape = (c.hidden,)
        return Checkpoint(
            config=c,
            word=self._take("word", (c.vocabulary, c.hidden)),
            position=np.ascontiguousarray(position),
            token_type=token_type,
            embed_norm=self._norm("embed_norm", shape),
            layers=tuple(self._layer(i) for i in range(c.layers)),
            relative_bias=self._relative_bias() if self.names.relative_bias else None,
            kind=kind,
            head=self._head(kind),
        )

    def _take(self, name: str, shape: tuple[int, ...], i: int = 0) -> FloatArray:
        return self.tensors.take(self.prefix + self.names.tensors[name].format(i=i) + ".weight", shape)

    def _norm(self, name: str, shape: tuple[int, ...], i: int = 0) -> Norm:
        base = self.prefix + self.names.tensors[name].format(i=i)
        # Checkpoints that came from TensorFlow call the two gamma and beta.
        gamma, beta = ("gamma", "beta") if f"{base}.gamma" in self.tensors else ("weight", "bias")
        return Norm(self.tensors.take(f"{base}.{gamma}", shape), self.tensors.take(f"{base}.{beta}", shape))

    def _dense(self, base: str, inputs: int, outputs: int, activation: str = "") -> Dense:
        weight = self.tensors.take(f"{base}.weight", (outputs, inputs))
        return Dense(np.ascontiguousarray(weight.T), self.tensors.take(f"{base}.bias", (outputs,)), activation)

    def _layer(self, i: int) -> Layer:
        h, inner = self.config.hidden, self.config.intermediate

        def dense(name: str, inputs: int, outputs: int) -> Dense:
            return self._dense(self.prefix + self.names.tensors[name].format(i=i), inputs, outputs)

        q, k, v = (dense(name, h, h) for name in ("query", "key", "value"))
        return Layer(
            qkv=Dense(np.concatenate([q.weight, k.weight, v.weight], axis=1), np.concatenate([q.bias, k.bias, v.bias])),
            out=dense("out", h, h),
            norm1=self._norm("norm1", (h,), i),
            up=dense("up", h, inner),
            down=dense("down", inner, h),
            norm2=self._norm("norm2", (h,), i),
        )

    def _relative_bias(self) -> FloatArray:
        return relative_bias(self._take("relative_bias", (BUCKETS, self.config.heads)))

    def _head(self, kind: HeadKind) -> tuple[Dense, ...]:
        if kind is HeadKind.HIDDEN:
            return ()
        dense = self.names.heads[kind].dense
        last = 2 if kind is HeadKind.QUESTION else len(self.config.labels)
        widths = [self.config.hidden] * len(dense) + [last]
        layers = []
        for (base, activation), inputs, outputs in zip(dense, widths, widths[1:], strict=False):
            if f"{base}.weight" not in self.tensors:
                raise ModelRejected(
                    f"The checkpoint ({self.config.architecture or self.config.model_type}) has no tensor '{base}.weight', "
                    "so no head for this task; name the task it was trained for, or use feature-extraction.",
                    tensor=f"{base}.weight",
                )
            layers.append(self._dense(base, inputs, outputs, activation))
        return tuple(layers)
