"""Writes a decoder as an ONNX graph over packed tokens and paged K and V, with our operators between the matrix products.

Inputs and the output are stated in server/runtime/decoder/contract.py. A product's bias, and in the per-row form its row scales, are
applied by whatever reads it. Every product of a layer adds the adapters of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from server.core import FloatArray
from server.runtime.decoder.contract import page_bytes
from server.runtime.graphs.decoder.checkpoint import HEAD, DecoderCheckpoint, Layer, Product
from server.runtime.graphs.decoder.config import DecoderConfig
from server.runtime.graphs.decoder.forms import EXTERNAL_BYTES, DataFile, Int4, Int8, Plan, embedded, save

DOMAIN = "understudy"
PAGE = 16
KV_CODES = {"float32": 0, "bfloat16": 1, "int8": 2}
EMBEDDING = "embedding.onnx.data"


@dataclass(frozen=True)
class Shared:
    """Initializers that all forms have in common, in one file: the embedding table, and cosines and sines of each rotation."""

    table: TensorProto
    ropes: tuple[tuple[TensorProto, TensorProto], ...]


@dataclass(frozen=True)
class Options:
    """`kv_dtype` of the pages; `bank_dtype`, "float32" or "bfloat16", of the adapters."""

    kv_dtype: str
    bank_dtype: str


def write_shared(model: DecoderCheckpoint, out: Path) -> Shared:
    """Writes `out/embedding.onnx.data`: the table as bfloat16 bits where the checkpoint has it so, else float32."""
    file = DataFile(out / EMBEDDING)
    bits = model.embed_bits()
    table = file.add("embedding", bits if bits is not None else model.embed_rows(0, model.config.vocabulary))
    ropes = []
    for i, rope in enumerate(model.config.ropes):
        cos, sin = rope.tables(model.config.positions)
        ropes.append((file.add(f"cos{i}", cos), file.add(f"sin{i}", sin)))
    file.close()
    return Shared(table, tuple(ropes))


def write_graph(model: DecoderCheckpoint, plan: Plan, path: Path, shared: Shared, options: Options) -> tuple[Path, ...]:
    """Writes one form of `model` to `path` and its weights to `<path>.data`; returns the files it wrote."""
    data = DataFile(path.with_name(path.name + ".data"))
    try:
        save(_Writer(model, plan, data, shared, options).write(), path)
    finally:
        data.close()
    return (path, data.path) if data.path.exists() else (path,)


def with_kv_dtype(path: Path, target: Path, config: DecoderConfig, kv_dtype: str) -> None:
    """Copies a graph (not its weights) with pages of another type."""
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "kv_dtype":
                attribute.i = KV_CODES[kv_dtype]
    pool = next(value for value in model.graph.input if value.name == "kv_pool")
    pool.type.tensor_type.shape.dim[2].dim_value = page_bytes(config.kv_heads, config.head_dim, kv_dtype, PAGE)
    target.write_bytes(model.SerializeToString())


@dataclass(frozen=True)
class _Operand:
    """A product's left side: `name` of the float or u8 tensor, and of the row scales ("" without)."""

    name: str
    row_scale: str = ""


@dataclass(frozen=True)
class _Raw:
    """A product's result before its bias and row scales: what the prologue of the next operator takes."""

    name: str
    row_scale: str
    bias: str


@dataclass
class _Graph:
    """Collects nodes and initializers."""

    data: DataFile
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    known: set[str] = field(default_factory=set)

    def put(self, tensor: TensorProto) -> str:
        if tensor.name not in self.known:
            self.known.add(tensor.name)
            self.initializers.append(tensor)
        return str(tensor.name)

    def constant(self, name: str, value: Any) -> str:
        if name in self.known:
            return name
        array = np.asarray(value)
        return self.put(self.data.add(name, array) if array.nbytes >= EXTERNAL_BYTES else embedded(name, array))

    def node(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        name = next(output for output in outputs if output)
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return name


class _Writer:
    def __init__(self, model: DecoderCheckpoint, plan: Plan, data: DataFile, shared: Shared, options: Options) -> None:
        self.model = model
        self.config = model.config
        self.plan = plan
        self.shared = shared
        self.options = options
        self.graph = _Graph(data)
        self.lora: Mapping[str, np.ndarray] = model.lora_layout(options.bank_dtype)[1]
        self.adapter_ids = "adapter_ids"

    def write(self) -> onnx.GraphProto:
        self._decoder()
        inputs = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in self._inputs()]
        output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", self.config.vocabulary])
        return helper.make_graph(self.graph.nodes, self.config.model_type, inputs, [output], self.graph.initializers)

    def _inputs(self) -> list[tuple[str, int, list[str | int]]]:
        c, ints, longs = self.config, TensorProto.INT32, TensorProto.INT64
        bank = TensorProto.FLOAT if self.options.bank_dtype == "float32" else TensorProto.UINT16
        width = self.model.lora_layout(self.options.bank_dtype)[0].width
        targets = sum(len(rows) for rows in self.lora.values())
        pool: list[str | int] = [c.layers, "pages", page_bytes(c.kv_heads, c.head_dim, self.options.kv_dtype, PAGE)]
        return [
            ("input_ids", longs, ["tokens"]),
            ("cu_seqlens", ints, ["sequences_and_one"]),
            ("past_lens", ints, ["sequences"]),
            ("block_table", ints, ["sequences", "table_width"]),
            ("logit_rows", longs, ["rows"]),
            ("kv_pool", TensorProto.UINT8, pool),
            ("extra_rows", TensorProto.FLOAT, ["extra", c.hidden]),
            ("adapter_ids", ints, ["tokens"]),
            ("lora_bank", bank, ["slots", "rank", width]),
            ("lora_ranks", ints, ["slots", targets]),
        ]

    def _decoder(self) -> None:
        c, graph = self.config, self.graph
        inputs = ["input_ids", graph.put(self.shared.table), "extra_rows"]
        x = graph.node("EmbedTokens", inputs, ["embeddings"], DOMAIN, multiplier=float(c.multiplier))
        operand = self._first_norm(x)
        for i in range(c.layers):
            layer = self.model.layer(i)
            following = (f"layer{i + 1}.qkv", self.model.layer(i + 1).norm1) if i + 1 < c.layers else (HEAD, self.model.final_norm())
            x, operand = self._layer(i, layer, x, operand, following)
        self._head(operand)

    def _layer(self, i: int, layer: Layer, x: str, operand: _Operand, following: tuple[str, FloatArray]) -> tuple[str, _Operand]:
        c, name = self.config, f"layer{i}"
        context = self._attention(i, layer, self._product(layer.qkv, operand))
        if i + 1 == c.layers:
            x, context = self._wanted_rows(x, context)
        out = self._product(layer.out, context)
        x, operand = self._skip_norm(f"{name}.norm2", out, x, layer.inner1, (layer.gate_up.name, layer.norm2))
        act = self._product(layer.gate_up, operand)
        inputs = [act.name, act.row_scale, act.bias]
        inner = self._emit("GatedAct", inputs, f"{name}.act", layer.down.name, kind=c.activation)
        down = self._product(layer.down, inner)
        return self._skip_norm(f"{name}.next", down, x, layer.inner2, following, last=i + 1 == c.layers)

    def _wanted_rows(self, x: str, context: _Operand) -> tuple[str, _Operand]:
        """Behind the last attention only the rows that need logits go on."""

        def gather(name: str) -> str:
            return self.graph.node("Gather", [name, "logit_rows"], [f"{name}.wanted"], axis=0) if name else ""

        self.adapter_ids = gather("adapter_ids")
        return gather(x), _Operand(gather(context.name), gather(context.row_scale))

    def _emit(self, op: str, inputs: list[str], y: str, following: str, *, before: tuple[str, ...] = (), **attributes: Any) -> _Operand:
        """Adds `op`, in its quantizing form if the product `following` is int8. `before`: outputs ahead of the one that is read."""
        form = self.plan.get(following)
        if not isinstance(form, Int8):
            self.graph.node(op, inputs, [*before, y], DOMAIN, **attributes)
            return _Operand(y)
        mult = self.graph.constant(f"{following}.mult", form.mult)
        scale = f"{y}.scale" if form.row else ""
        outputs = [*before, f"{y}.q", *([scale] if scale else [])]
        # Inputs are positional: absent ones before mult stay as empty names.
        attributes |= {"zero_point": form.zero_point, "per_row": int(form.row)}
        self.graph.node(f"{op}Q", [*inputs, mult], outputs, DOMAIN, **attributes)
        return _Operand(f"{y}.q", scale)

    def _first_norm(self, x: str) -> _Operand:
        gamma = self.graph.constant("layer0.norm1.gamma", self.model.layer(0).norm1)
        inputs = [x, "", "", "", "", gamma]
        return self._emit("SkipNorm", inputs, "layer0.norm1", "layer0.qkv", before=("",), epsilon=self.config.epsilon)

    def _skip_norm(
        self, name: str, x: _Raw, residual: str, inner: FloatArray | None, following: tuple[str, FloatArray], *, last: bool = False
    ) -> tuple[str, _Operand]:
        gamma = self.graph.constant(f"{name}.gamma", following[1])
        inner_gamma = "" if inner is None else self.graph.constant(f"{name}.inner", inner)
        inputs = [x.name, x.row_scale, x.bias, residual, inner_gamma, gamma]
        total = "" if last else f"{name}.sum"
        return total, self._emit("SkipNorm", inputs, name, following[0], before=(total,), epsilon=self.config.epsilon)

    def _attention(self, i: int, layer: Layer, qkv: _Raw) -> _Operand:
        c, graph = self.config, self.graph
        cos, sin = (graph.put(table) for table in self.shared.ropes[layer.kind.rope])
        gammas = [
            "" if gamma is None else graph.constant(f"layer{i}.{name}", gamma)
            for name, gamma in (("q_gamma", layer.q_norm), ("k_gamma", layer.k_norm))
        ]
        inputs = [qkv.name, "cu_seqlens", "past_lens", "block_table", "kv_pool", cos, sin, qkv.row_scale, qkv.bias, *gammas]
        return self._emit(
            "PagedAttention",
            inputs,
            f"layer{i}.context",
            layer.out.name,
            layer=i,
            num_heads=c.heads,
            kv_heads=c.kv_heads,
            scale=float(c.scale),
            window=layer.kind.window,
            softcap=float(c.softcap),
            kv_dtype=KV_CODES[self.options.kv_dtype],
            page=PAGE,
            epsilon=float(c.epsilon),
            rotary=int(layer.kind.rotary),
        )

    def _product(self, product: Product, left: _Operand) -> _Raw:
        name, form, graph = product.name, self.plan.get(product.name), self.graph
        lora = self._lora(name)
        y, bias = f"{name}.product", product.bias()
        if isinstance(form, Int8):
            inputs = [
                left.name,
                graph.constant(f"{name}.weight", form.weight),
                graph.constant(f"{name}.scale", np.float32(form.scale)),
                graph.constant(f"{name}.weight_scale", form.weight_scale),
                graph.constant(f"{name}.zero_point", np.uint8(form.zero_point)),
                *lora,
            ]
            if lora:
                inputs += [graph.constant(f"{name}.mult", form.mult), left.row_scale]
            graph.node("Int8Gemm", inputs, [y], DOMAIN)
            if form.shift is not None:
                bias = -form.shift if bias is None else bias - form.shift
        elif isinstance(form, Int4):
            weight, scale = graph.constant(f"{name}.weight", form.data), graph.constant(f"{name}.weight_scale", form.scale)
            sizes = {"depth": product.inputs, "cols": product.outputs, "block": form.block}
            graph.node("Int4Gemm", [left.name, weight, scale, *lora], [y], DOMAIN, **sizes)
        else:
            weight = graph.put(graph.data.add_weight(f"{name}.weight", product))
            graph.node("FloatGemm", [left.name, weight, *lora], [y], DOMAIN)
        return _Raw(y, left.row_scale, "" if bias is None else graph.constant(f"{name}.bias", bias))

    def _lora(self, name: str) -> list[str]:
        if name not in self.lora:
            return []
        return [self.adapter_ids, "lora_bank", "lora_ranks", self.graph.constant(f"{name}.lora_layout", self.lora[name])]

    def _head(self, operand: _Operand) -> None:
        """The head's product and what stock operators have to do behind it."""
        graph, cap = self.graph, self.config.final_softcap
        raw = self._product(self.model.head(), operand)
        steps: list[tuple[str, list[str]]] = []
        if raw.row_scale:
            axis = graph.constant("last_axis", np.array([-1], np.int64))
            steps.append(("Mul", [graph.node("Unsqueeze", [raw.row_scale, axis], ["head.row_scale"])]))
        if raw.bias:
            steps.append(("Add", [raw.bias]))
        if cap:
            steps += [("Div", [graph.constant("final_softcap", np.float32(cap))]), ("Tanh", []), ("Mul", ["final_softcap"])]
        x = raw.name
        if not steps:
            graph.nodes[-1].output[0] = graph.nodes[-1].name = "logits"
        for j, (op, others) in enumerate(steps):
            x = graph.node(op, [x, *others], ["logits" if j + 1 == len(steps) else f"head.{j}"])
