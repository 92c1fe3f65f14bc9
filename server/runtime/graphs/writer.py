"""Writes an encoder as an ONNX graph over packed tokens, with our operators between the matrix products.

Shapes: T tokens of all sequences end to end, S sequences. Inputs and outputs are stated in server/runtime/manifest.py. A product is either
fp32 (MatMul) or int8; its bias, and in the per-row form its row scales, are applied by whatever reads it. The int8 product is ours
(Int8Gemm) where that is the faster one, else ONNX Runtime's (MatMulIntegerToFloat): same inputs, same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from server.core import FloatArray
from server.runtime import kernels
from server.runtime.graphs.adapters import lora_rows
from server.runtime.graphs.architecture import HeadKind
from server.runtime.graphs.checkpoint import Checkpoint, Dense, Norm

DOMAIN = "understudy"
OPSET = 17
# A protobuf message ends at 2 GiB; above this the weights go to a file beside the graph.
MAX_EMBEDDED_BYTES = 1_900_000_000


@dataclass(frozen=True)
class QuantizedProduct:
    """An int8 product: activations u8[T, K], q = rint(x * mult / row scale) + zero_point; weights int8[K, N] with a scale per column.

    `row`: scales per row, computed while running; then `scale` is 1 and `zero_point` 128. `bias` float32[N] replaces the product's own: it
    carries the mean error of quantization with the sign turned.
    """

    row: bool
    mult: FloatArray
    scale: float
    zero_point: int
    weight: np.ndarray
    weight_scale: FloatArray
    bias: FloatArray


Plan = Mapping[str, QuantizedProduct]


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

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        # asarray(order="C") and not ascontiguousarray, which would make a vector of a scalar.
        self.initializers.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def node(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0] or outputs[-1], domain=domain, **attributes))
        return outputs[0]


def write_graph(model: Checkpoint, plan: Plan, path: Path) -> tuple[Path, ...]:
    """Writes `model` to `path`, products named in `plan` in int8 and the rest in fp32; returns the files it wrote.

    With `model.lora`, every product adds the adapters of its tokens, and the graph takes adapter_ids, lora_bank and lora_ranks too, as
    server/runtime/decoder/contract.py states them. Weights beyond a protobuf's size go to one file `<path>.data`.
    """
    proto = _Writer(model, plan).write()
    size = sum(len(t.raw_data) for t in proto.graph.initializer)
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)  # onnx would append to it
    if size <= MAX_EMBEDDED_BYTES:
        onnx.save(proto, path)
        return (path,)
    onnx.save(proto, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data.name, size_threshold=4096)
    return (path, data)


class _Writer:
    def __init__(self, model: Checkpoint, plan: Plan) -> None:
        self.model = model
        self.plan = plan
        self.rows = lora_rows(model, model.lora) if model.lora is not None else {}
        self.graph = _Graph()
        self.products = model.products()
        self.relative_bias = ""

    def write(self) -> onnx.ModelProto:
        if self.model.relative_bias is not None:
            self.relative_bias = self.graph.constant("relative_bias", self.model.relative_bias)
        hidden = self._encoder()
        width = self._head(hidden)
        ints, cu = TensorProto.INT64, TensorProto.INT32
        inputs = [helper.make_tensor_value_info(name, ints, ["tokens"]) for name in ("input_ids", "position_ids")]
        if self.model.token_type is not None:
            inputs.append(helper.make_tensor_value_info("token_type_ids", ints, ["tokens"]))
        inputs.append(helper.make_tensor_value_info("cu_seqlens", cu, ["sequences_and_one"]))
        lora = self.model.lora
        if lora is not None:
            bank = TensorProto.FLOAT if lora.dtype == "float32" else TensorProto.UINT16
            inputs.append(helper.make_tensor_value_info("adapter_ids", cu, ["tokens"]))
            inputs.append(helper.make_tensor_value_info("lora_bank", bank, ["slots", "rank", lora.width]))
            inputs.append(helper.make_tensor_value_info("lora_ranks", cu, ["slots", len(lora.targets)]))
        rows = "sequences" if self.model.kind is HeadKind.SEQUENCE else "tokens"
        name = "hidden" if self.model.kind is HeadKind.HIDDEN else "logits"
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width])
        graph = helper.make_graph(self.graph.nodes, self.model.config.model_type, inputs, [output], self.graph.initializers)
        domains = [("", OPSET), (DOMAIN, 1), ("com.microsoft", 1)]
        opsets = [helper.make_opsetid(domain, version) for domain, version in domains]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="understudy")

    def _encoder(self) -> str:
        x, operand = self._embed()
        for i, layer in enumerate(self.model.layers):
            last = i + 1 == len(self.model.layers)
            qkv = self._product(f"layer{i}.qkv", operand)
            context = self._attention(f"layer{i}", qkv)
            out = self._product(f"layer{i}.out", context)
            x, operand = self._add_norm(f"layer{i}.norm1", out, x, layer.norm1, f"layer{i}.up")
            up = self._product(f"layer{i}.up", operand)
            inner = self._gelu(f"layer{i}.gelu", up, f"layer{i}.down")
            down = self._product(f"layer{i}.down", inner)
            x, operand = self._add_norm(f"layer{i}.norm2", down, x, layer.norm2, "" if last else f"layer{i + 1}.qkv")
        return x

    def _emit(self, op: str, inputs: list[str], y: str, following: str, *, keep: bool = True, **attributes: Any) -> _Operand:
        """Adds `op`, in its quantizing form if the product `following` is int8; `keep`: its float result is needed beside that."""
        quantized = self.plan.get(following)
        if quantized is None:
            self.graph.node(op, inputs, [y], DOMAIN, **attributes)
            return _Operand(y)
        mult = self.graph.constant(f"{following}.mult", quantized.mult)
        q, scale = f"{y}.q", f"{y}.scale" if quantized.row else ""
        outputs = [*([y] if keep else []), q, *([scale] if scale else [])]
        # Inputs are positional: absent ones before mult stay as empty names.
        attributes |= {"zero_point": quantized.zero_point, "per_row": int(quantized.row)}
        self.graph.node(f"{op}Q", [*inputs, mult], outputs, DOMAIN, **attributes)
        return _Operand(q, scale)

    def _norm_inputs(self, name: str, norm: Norm) -> list[str]:
        return [self.graph.constant(f"{name}.gamma", norm.gamma), self.graph.constant(f"{name}.beta", norm.beta)]

    def _embed(self) -> tuple[str, _Operand]:
        model, constant = self.model, self.graph.constant
        types = model.token_type is not None
        inputs = ["input_ids", "position_ids", "token_type_ids" if types else ""]
        inputs += [constant("word", model.word), constant("position", model.position)]
        inputs.append(constant("token_type", model.token_type) if model.token_type is not None else "")
        inputs += self._norm_inputs("embed_norm", model.embed_norm)
        return "embeddings", self._emit("EmbedNorm", inputs, "embeddings", "layer0.qkv", epsilon=model.config.epsilon)

    def _attention(self, layer: str, qkv: _Raw) -> _Operand:
        inputs = [qkv.name, "cu_seqlens", qkv.row_scale, qkv.bias, self.relative_bias]
        heads = self.model.config.heads
        return self._emit("PackedAttention", inputs, f"{layer}.context", f"{layer}.out", keep=False, num_heads=heads, scale=0.0)

    def _add_norm(self, name: str, x: _Raw, residual: str, norm: Norm, following: str) -> tuple[str, _Operand]:
        inputs = [x.name, x.row_scale, x.bias, residual, *self._norm_inputs(name, norm)]
        y = name if following or self.model.kind is not HeadKind.HIDDEN else "hidden"
        return y, self._emit("AddNorm", inputs, y, following, epsilon=self.model.config.epsilon, rms=0)

    def _gelu(self, name: str, x: _Raw, following: str) -> _Operand:
        inputs = [x.name, x.row_scale, x.bias]
        return self._emit("BiasGelu", inputs, name, following, keep=False, approximate=int(self.model.config.approximate))

    def _product(self, name: str, left: _Operand) -> _Raw:
        dense, quantized = self.products[name], self.plan.get(name)
        constant = self.graph.constant
        lora = ["adapter_ids", "lora_bank", "lora_ranks", constant(f"{name}.lora_layout", self.rows[name])] if self.rows else []
        if quantized is None and lora:
            y = self.graph.node("FloatGemm", [left.name, constant(f"{name}.weight", dense.weight), *lora], [f"{name}.product"], DOMAIN)
            return _Raw(y, "", constant(f"{name}.bias", dense.bias))
        if quantized is None:
            y = self.graph.node("MatMul", [left.name, constant(f"{name}.weight", dense.weight)], [f"{name}.product"])
            return _Raw(y, "", constant(f"{name}.bias", dense.bias))
        inputs = [
            left.name,
            constant(f"{name}.weight", quantized.weight),
            constant(f"{name}.scale", np.float32(quantized.scale)),
            constant(f"{name}.weight_scale", quantized.weight_scale),
            constant(f"{name}.zero_point", np.uint8(quantized.zero_point)),
        ]
        if lora:  # the adapters need the activations as they were before they became u8: mult as the operator before had it
            inputs += [*lora, f"{name}.mult", left.row_scale]
        own = bool(lora) or kernels.has_fast_product()
        y = self.graph.node("Int8Gemm" if own else "MatMulIntegerToFloat", inputs, [f"{name}.product"], DOMAIN if own else "com.microsoft")
        return _Raw(y, left.row_scale, constant(f"{name}.bias", quantized.bias))

    def _head(self, hidden: str) -> int:
        """Adds the head in stock operators; returns the width of the graph's output."""
        model, graph = self.model, self.graph
        if model.kind is HeadKind.HIDDEN:
            return model.config.hidden
        x = hidden
        if model.kind is HeadKind.SEQUENCE:
            bounds = {"zero": 0, "minus_one": -1}
            for name, value in bounds.items():
                graph.constant(name, np.array([value], dtype=np.int64))
            first = graph.node("Slice", ["cu_seqlens", "zero", "minus_one"], ["first_tokens"])
            x = graph.node("Gather", [hidden, first], ["first_hidden"], axis=0)
        for j, dense in enumerate(model.head):
            x = self._head_layer(j, dense, x, last=j + 1 == len(model.head))
        return int(model.head[-1].bias.size)

    def _head_layer(self, j: int, dense: Dense, x: str, *, last: bool) -> str:
        graph = self.graph
        weight, bias = graph.constant(f"head{j}.weight", dense.weight), graph.constant(f"head{j}.bias", dense.bias)
        y = graph.node("Gemm", [x, weight, bias], ["logits" if last else f"head{j}"])
        if dense.activation:
            y = graph.node("Tanh" if dense.activation == "tanh" else "Relu", [y], [f"head{j}.activation"])
        return y
