"""A decoder's checkpoint of any known architecture under one set of names, read layer by layer: no more than one layer is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from server.core import FloatArray
from server.runtime.graphs.decoder.config import DecoderConfig, LayerKind, read_decoder_config
from server.runtime.graphs.tensors import Tensors, open_tensors
from server.runtime.manifest import LoraLayout, LoraTarget

# Adapters' rows begin at multiples of this many floats.
LORA_ALIGNMENT = 16
HEAD = "head"


@dataclass(frozen=True)
class Part:
    """Columns of a product that are one linear layer of the checkpoint; `module` is its path there, which adapters name it by."""

    module: str
    outputs: int
    bias: bool = False


@dataclass(frozen=True)
class Product:
    """A matrix product y = x @ weight (+ bias) of the graph: float32[inputs, outputs], read from the checkpoint whenever it is asked for.

    `parts` stand side by side; checkpoints keep each as [outputs, inputs].
    """

    name: str
    inputs: int
    parts: tuple[Part, ...]
    tensors: Tensors

    @property
    def outputs(self) -> int:
        return sum(part.outputs for part in self.parts)

    def columns(self, start: int, end: int) -> FloatArray:
        """Columns [start, end) of the weight, C-contiguous."""
        out = np.empty((self.inputs, end - start), np.float32)
        at = 0
        for part in self.parts:
            first, last = max(start - at, 0), min(end - at, part.outputs)
            if first < last:
                rows = self.tensors.rows(f"{part.module}.weight", (part.outputs, self.inputs), first, last)
                out[:, at + first - start : at + last - start] = rows.T
            at += part.outputs
        return out

    def weight(self) -> FloatArray:
        """All of it."""
        return self.columns(0, self.outputs)

    def bias(self) -> FloatArray | None:
        """float32[outputs], or None where no part has one."""
        if not any(part.bias for part in self.parts):
            return None
        take = self.tensors.take
        return np.concatenate([take(f"{p.module}.bias", (p.outputs,)) if p.bias else np.zeros(p.outputs, np.float32) for p in self.parts])


@dataclass(frozen=True)
class Layer:
    """Gains of the norms float32[hidden] (`inner1`, `inner2`: after attention and feed-forward; of heads [head_dim]); the products."""

    kind: LayerKind
    norm1: FloatArray
    norm2: FloatArray
    inner1: FloatArray | None
    inner2: FloatArray | None
    q_norm: FloatArray | None
    k_norm: FloatArray | None
    qkv: Product
    out: Product
    gate_up: Product
    down: Product

    def products(self) -> tuple[Product, ...]:
        """In the order of the graph."""
        return (self.qkv, self.out, self.gate_up, self.down)


class DecoderCheckpoint:
    """config.json and the safetensors of a folder. Nothing is kept: what is read twice is read from the file twice."""

    def __init__(self, config: DecoderConfig, tensors: Tensors) -> None:
        self.config = config
        self.tensors = tensors
        names = config.names
        # A bare decoder is saved without the prefix.
        self.prefix = "model." if f"model.{names.tensors['embed']}.weight" in tensors else ""

    @classmethod
    def open(cls, folder: Path) -> DecoderCheckpoint:
        """Raises ModelRejected: config or tensors are broken, or of no known architecture."""
        model = cls(read_decoder_config(folder), open_tensors(folder))
        model.check()
        return model

    def check(self) -> None:
        """Every tensor is there with its shape, by the headers alone; raises ModelRejected."""
        c = self.config
        self.tensors.check(self.embed_name, (c.vocabulary, c.hidden))
        for product in self.products():
            for part in product.parts:
                self.tensors.check(f"{part.module}.weight", (part.outputs, product.inputs))

    @property
    def embed_name(self) -> str:
        """The embedding table's tensor."""
        return f"{self.prefix}{self.config.names.tensors['embed']}.weight"

    def embed_bits(self) -> np.ndarray | None:
        """The embedding table as bfloat16 bits uint16[vocabulary, hidden] where the checkpoint has it so: a view of the file."""
        return self.tensors.bits(self.embed_name, (self.config.vocabulary, self.config.hidden))

    def embed_rows(self, start: int, end: int) -> FloatArray:
        """Rows of the embedding table."""
        return self.tensors.rows(self.embed_name, (self.config.vocabulary, self.config.hidden), start, end)

    def embed(self, ids: np.ndarray) -> FloatArray:
        """float32[T, hidden], scaled as the architecture wants it."""
        bits = self.embed_bits()
        if bits is not None:
            rows = (bits[ids].astype(np.uint32) << 16).view(np.float32)
        else:
            rows = self.tensors.take(self.embed_name, (self.config.vocabulary, self.config.hidden))[ids]
        return np.asarray(rows * np.float32(self.config.multiplier))

    def final_norm(self) -> FloatArray:
        """Gain of the last norm."""
        return self._norm("final_norm")

    def layer(self, i: int) -> Layer:
        """Norms of a layer, read now, and its products, which read when asked."""
        has = self.config.names.tensors
        head = self.config.head_dim
        head_norm = self.config.names.head_norm
        return Layer(
            self.config.kinds[i],
            self._norm("norm1", i),
            self._norm("norm2", i),
            self._norm("inner1", i) if "inner1" in has else None,
            self._norm("inner2", i) if "inner2" in has else None,
            self._norm("q_norm", i, head) if head_norm else None,
            self._norm("k_norm", i, head) if head_norm else None,
            *self._layer_products(i),
        )

    def head(self) -> Product:
        """The product that makes logits."""
        c = self.config
        module = self.embed_name.removesuffix(".weight") if c.tied else "lm_head"
        return Product(HEAD, c.hidden, (Part(module, c.vocabulary),), self.tensors)

    def products(self) -> Iterator[Product]:
        """All of them, in the order of the graph."""
        for i in range(self.config.layers):
            yield from self._layer_products(i)
        yield self.head()

    def lora_layout(self, dtype: str) -> tuple[LoraLayout, Mapping[str, np.ndarray]]:
        """Where adapters of every linear layer lie in the bank, and the products' constant inputs lora_layout int64[parts, 6]."""
        targets: list[LoraTarget] = []
        rows: dict[str, np.ndarray] = {}
        at = 0
        for product in self.products():
            if product.name == HEAD:
                continue
            listed, column = [], 0
            for part in product.parts:
                a = at
                b = a + _aligned(product.inputs)
                at = b + _aligned(part.outputs)
                index = len(targets)
                targets.append(LoraTarget(name=part.module, inputs=product.inputs, outputs=part.outputs, a=a, b=b, index=index))
                listed.append((a, b, column, part.outputs, index, product.inputs))
                column += part.outputs
            rows[product.name] = np.array(listed, np.int64)
        return LoraLayout.model_validate({"dtype": dtype, "width": at, "targets": targets}), rows

    def _layer_products(self, i: int) -> tuple[Product, Product, Product, Product]:
        c = self.config
        q, kv, inner = c.q_width, c.kv_width, c.intermediate
        sizes = {"q": (q, c.qkv_bias), "k": (kv, c.qkv_bias), "v": (kv, c.qkv_bias), "qkv": (q + 2 * kv, c.qkv_bias)}
        sizes |= {"out": (c.hidden, c.out_bias), "down": (c.hidden, c.mlp_bias)}
        sizes |= {"gate": (inner, c.mlp_bias), "up": (inner, c.mlp_bias), "gate_up": (2 * inner, c.mlp_bias)}

        def product(name: str, inputs: int, *parts: str) -> Product:
            fused = (name,) if name in c.names.tensors else parts
            made = tuple(Part(self._name(part, i), *sizes[part]) for part in fused)
            return Product(f"layer{i}.{name}", inputs, made, self.tensors)

        return (
            product("qkv", c.hidden, "q", "k", "v"),
            product("out", q),
            product("gate_up", c.hidden, "gate", "up"),
            product("down", inner),
        )

    def _name(self, name: str, i: int = 0) -> str:
        return self.prefix + self.config.names.tensors[name].format(i=i)

    def _norm(self, name: str, i: int = 0, size: int = 0) -> FloatArray:
        gamma = self.tensors.take(f"{self._name(name, i)}.weight", (size or self.config.hidden,))
        return gamma + np.float32(1) if self.config.names.norm_plus_one else gamma


def _aligned(size: int) -> int:
    return -(-size // LORA_ALIGNMENT) * LORA_ALIGNMENT
