"""Writes a decoder of the Llama family as a float16 graph of ONNX Runtime's own operators, for its CUDA execution provider.

Never executed on a GPU. The operators are used as their schemas in ONNX Runtime 1.31 and docs/contrib_ops/cuda/paged_attention.md of its
sources state them; the graph was compared with the float32 form through NumPy versions of them alone.

| input              | type, shape                                 | meaning                                                            |
|--------------------|---------------------------------------------|--------------------------------------------------------------------|
| input_ids          | int64[T]                                    | as in server/runtime/decoder/contract.py; no extra rows            |
| cu_seqlens         | int32[S+1]                                  | the same                                                           |
| past_lens          | int32[S]                                    | the same                                                           |
| block_table        | int32[S, W]                                 | the same; unused entries must be page numbers too                  |
| logit_rows         | int64[R]                                    | the same                                                           |
| attention_metadata | int32[2], in the processor's memory         | most new tokens of a sequence, most positions of one, or more      |
| key_cache.i        | float16[pages, page, kv_heads, head_dim]    | K of layer i, value_cache.i likewise; changed in place             |

Outputs are logits float32[R, vocabulary], and key_cache_out.i and value_cache_out.i, which must be bound to the inputs' memory.
`page` is a power of two from 16 on and whoever runs the graph chooses it. There are no adapters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from server.core import FloatArray
from server.errors import ModelRejected
from server.runtime.graphs.decoder.checkpoint import DecoderCheckpoint, Layer, Product
from server.runtime.graphs.decoder.config import DecoderConfig
from server.runtime.graphs.decoder.forms import EXTERNAL_BYTES, DataFile, embedded, save
from server.runtime.graphs.decoder.reference import COLUMNS

DOMAIN = "com.microsoft"
GRAPH, COPY = "model.cuda.onnx", "copy.cuda.onnx"
FAMILY = ("llama", "mistral", "qwen2")
# Rotary tables of the operator turn whole heads of such sizes alone.
HEAD_MULTIPLE = 16
_MOST = float(np.finfo(np.float16).max)


def check_cuda(config: DecoderConfig) -> None:
    """Raises ModelRejected for a decoder that has no CUDA form."""
    if config.model_type not in FAMILY:
        raise ModelRejected(
            f"a decoder of type {config.model_type!r} has no form for CUDA; expected one of {', '.join(FAMILY)}. Leave the form out.",
            field="model_type",
        )
    if config.head_dim % HEAD_MULTIPLE or config.ropes[0].dims != config.head_dim:
        raise ModelRejected(
            f"heads of {config.head_dim} with {config.ropes[0].dims} dimensions turned have no form for CUDA; "
            f"expected multiples of {HEAD_MULTIPLE} that turn as a whole. Leave the form out.",
            field="head_dim",
        )


def write_cuda(model: DecoderCheckpoint, out: Path) -> None:
    """Writes `out/model.cuda.onnx` with its weights beside it, and `out/copy.cuda.onnx`, which copies a page in all layers.

    Raises ModelRejected: see `check_cuda`, or a weight is too large for float16.
    """
    check_cuda(model.config)
    path = out / GRAPH
    data = DataFile(path.with_name(path.name + ".data"))
    try:
        save(_Writer(model, data).write(), path, DOMAIN)
    finally:
        data.close()
    save(_copy_graph(model.config), out / COPY, DOMAIN)


def _caches(config: DecoderConfig, suffix: str = "") -> list[onnx.ValueInfoProto]:
    shape: list[str | int] = ["pages", "page", config.kv_heads, config.head_dim]
    names = [f"{kind}_cache{suffix}.{i}" for i in range(config.layers) for kind in ("key", "value")]
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in names]


def _copy_graph(config: DecoderConfig) -> onnx.GraphProto:
    """Inputs source int64[1], target int64[1, 1] and all caches; its outputs must be bound to the caches' memory too."""
    nodes = []
    for before, after in zip(_caches(config), _caches(config, "_out"), strict=True):
        page = f"{before.name}.page"
        nodes.append(helper.make_node("Gather", [before.name, "source"], [page], name=page, axis=0))
        nodes.append(helper.make_node("ScatterND", [before.name, "target", page], [after.name], name=after.name))
    places = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in (("source", [1]), ("target", [1, 1]))]
    return helper.make_graph(nodes, "copy_page", [*places, *_caches(config)], _caches(config, "_out"))


class _Writer:
    def __init__(self, model: DecoderCheckpoint, data: DataFile) -> None:
        self.model = model
        self.config = model.config
        self.data = data
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []

    def write(self) -> onnx.GraphProto:
        c, model = self.config, self.model
        table = self._table()
        cos, sin = (self._constant(name, one) for name, one in zip(("cos", "sin"), c.ropes[0].tables(c.positions), strict=True))
        x = self._node("Gather", [table, "input_ids"], ["embeddings"], axis=0)
        gamma = self._constant("layer0.norm1.gamma", model.layer(0).norm1)
        y = self._node("SimplifiedLayerNormalization", [x, gamma], ["layer0.norm1"], axis=-1, epsilon=c.epsilon, stash_type=1)
        for i in range(c.layers):
            following = model.layer(i + 1).norm1 if i + 1 < c.layers else model.final_norm()
            x, y = self._layer(i, model.layer(i), (x, y), (cos, sin), following)
        if c.tied:
            head = self._node("Gemm", [y, table], ["head"], transB=1)
        else:
            head = self._node("MatMul", [y, self._weight(model.head())], ["head"])
        self._node("Cast", [head], ["logits"], to=TensorProto.FLOAT)
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", c.vocabulary])
        return helper.make_graph(self.nodes, c.model_type, self._inputs(), [logits, *_caches(c, "_out")], self.initializers)

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        ints, longs = TensorProto.INT32, TensorProto.INT64
        listed: list[tuple[str, int, list[str | int]]] = [
            ("input_ids", longs, ["tokens"]),
            ("cu_seqlens", ints, ["sequences_and_one"]),
            ("past_lens", ints, ["sequences"]),
            ("block_table", ints, ["sequences", "table_width"]),
            ("logit_rows", longs, ["rows"]),
            ("attention_metadata", ints, [2]),
        ]
        return [helper.make_tensor_value_info(*one) for one in listed] + _caches(self.config)

    def _layer(self, i: int, layer: Layer, states: tuple[str, str], ropes: tuple[str, str], following: FloatArray) -> tuple[str, str]:
        """`states`: the sum of all before and its norm; both behind this layer are returned."""
        x, y = states
        name, inner = f"layer{i}", self.config.intermediate
        context = self._attention(i, layer, y, ropes)
        if i + 1 == self.config.layers:
            x, context = (self._node("Gather", [one, "logit_rows"], [f"{one}.wanted"], axis=0) for one in (x, context))
        x, y = self._product_and_norm(f"{name}.norm2", layer.out, context, x, layer.norm2)
        both = self._biased(layer.gate_up, self._product(layer.gate_up, y))
        sizes = self._whole(f"{name}.halves", [inner, inner])
        self._node("Split", [both, sizes], [f"{name}.gate", f"{name}.up"], axis=1)
        act = self._node("Mul", [self._activation(f"{name}.gate"), f"{name}.up"], [f"{name}.act"])
        return self._product_and_norm(f"{name}.next", layer.down, act, x, following)

    def _activation(self, gate: str) -> str:
        kind = self.config.activation
        if kind == 0:
            return self._node("Mul", [gate, self._node("Sigmoid", [gate], [f"{gate}.sigmoid"])], [f"{gate}.silu"])
        return self._node("FastGelu" if kind == 1 else "Gelu", [gate], [f"{gate}.gelu"], DOMAIN)

    def _attention(self, i: int, layer: Layer, y: str, ropes: tuple[str, str]) -> str:
        c = self.config
        qkv = self._biased(layer.qkv, self._product(layer.qkv, y))
        # Q, K and V come as one, so that key and value are absent; what lies between the tables and the metadata is not used.
        inputs = [qkv, "", "", f"key_cache.{i}", f"value_cache.{i}", "cu_seqlens", "past_lens", "block_table", *ropes]
        return self._node(
            "PagedAttention",
            [*inputs, *[""] * 6, "attention_metadata"],
            [f"layer{i}.context", f"key_cache_out.{i}", f"value_cache_out.{i}"],
            DOMAIN,
            num_heads=c.heads,
            kv_num_heads=c.kv_heads,
            scale=float(c.scale),
            local_window_size=layer.kind.window or -1,
            do_rotary=1,
            rotary_interleaved=0,
        )

    def _product_and_norm(self, name: str, product: Product, left: str, x: str, gain: FloatArray) -> tuple[str, str]:
        bias = product.bias()
        inputs = [self._product(product, left), x, self._constant(f"{name}.gamma", gain)]
        if bias is not None:
            inputs.append(self._constant(f"{product.name}.bias", bias))
        self._node("SkipSimplifiedLayerNormalization", inputs, [name, "", "", f"{name}.sum"], DOMAIN, epsilon=self.config.epsilon)
        return f"{name}.sum", name

    def _product(self, product: Product, left: str) -> str:
        return self._node("MatMul", [left, self._weight(product)], [f"{product.name}.product"])

    def _biased(self, product: Product, y: str) -> str:
        bias = product.bias()
        return y if bias is None else self._node("Add", [y, self._constant(f"{product.name}.bias", bias)], [f"{product.name}.biased"])

    def _table(self) -> str:
        c = self.config
        table = np.empty((c.vocabulary, c.hidden), np.float16)
        for start in range(0, c.vocabulary, COLUMNS):
            end = min(start + COLUMNS, c.vocabulary)
            table[start:end] = _half("embedding", self.model.embed_rows(start, end))
        return self._put("embedding", table)

    def _weight(self, product: Product) -> str:
        weight = np.empty((product.inputs, product.outputs), np.float16)
        for start in range(0, product.outputs, COLUMNS):
            end = min(start + COLUMNS, product.outputs)
            weight[:, start:end] = _half(product.name, product.columns(start, end))
        return self._put(f"{product.name}.weight", weight)

    def _constant(self, name: str, value: FloatArray) -> str:
        return self._put(name, _half(name, value))

    def _whole(self, name: str, values: list[int]) -> str:
        return self._put(name, np.array(values, np.int64))

    def _put(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(self.data.add(name, array) if array.nbytes >= EXTERNAL_BYTES else embedded(name, array))
        return name

    def _node(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]


def _half(name: str, value: FloatArray) -> np.ndarray:
    if not np.abs(value).max(initial=0.0) <= _MOST:
        raise ModelRejected(
            f"weights of {name} reach beyond float16's {_MOST:.0f}; the form for CUDA cannot hold them. Leave it out.", field=name
        )
    return value.astype(np.float16)
