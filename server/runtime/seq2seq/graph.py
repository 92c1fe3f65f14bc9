"""Writes an encoder-decoder as two ONNX graphs in which texts of any lengths and answers of any ages run together, unpadded.

encoder, with T tokens of S texts end to end:

| input        | type, shape         | meaning                                           |
|--------------|---------------------|---------------------------------------------------|
| input_ids    | int64[T]            | tokens                                            |
| position_ids | int64[T]            | from 0 in each text; absent in T5                 |
| cu_seqlens   | int32[S+1]          | where each text begins                            |

Its output is memory float32[T, W]: for each decoder layer in turn, the K and the V that its cross-attention reads, W = layers * 2 * heads
* head_dim. decoder, with R rows (a row is one beam of one text, with one new token):

| input        | type, shape         | meaning                                           |
|--------------|---------------------|---------------------------------------------------|
| input_ids    | int64[R]            | the newest token of each row                      |
| position_ids | int64[R]            | its position; absent in T5                        |
| past         | float32[slots, W]   | K and V of generated tokens; changed in place     |
| table        | int32[R, P]         | slot of each position of each row                 |
| lengths      | int32[R]            | positions of each row, the new one included       |
| memory       | float32[places, W]  | rows of the encoder's output                      |
| spans        | int32[R, 2]         | first place and number of places of the row's text|
| top          | int64[1]            | k                                                 |

Outputs: logits float32[R, V], lse float32[R] (log of the sum of exponentials), values float32[R, k] and ids int64[R, k], the best logits.
A row's results depend on its own tokens alone. Stock exports keep the past as one tensor for all rows, without a mask, so that only
answers of the same age can share a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from server.runtime.seq2seq.checkpoint import Checkpoint, Dense, Norm, Side

ENCODER = "encoder_model.onnx"
DECODER = "decoder_model.onnx"
WEIGHTS = "weights.onnx_data"
DOMAIN = "understudy"
OPSET = 17
_ALIGN = 4096  # so that ONNX Runtime can map a tensor instead of copying it
_EXTERNAL_BYTES = 1024
_Spec = tuple[str, int, list[int | str]]
_APPROXIMATE = {"gelu": 0, "gelu_tanh": 1}


def write_graphs(model: Checkpoint, folder: Path) -> None:
    """Writes both graphs to `folder`, and the weights to one file beside them, those that both need once."""
    with (folder / WEIGHTS).open("wb") as data:
        store = _Store(data)
        for side, name in (("encoder", ENCODER), ("decoder", DECODER)):
            writer = _Writer(model, side, store)  # type: ignore[arg-type]
            proto = writer.encoder() if side == "encoder" else writer.decoder()
            (folder / name).write_bytes(proto.SerializeToString())


@dataclass
class _Store:
    """The weights' file. `places`: tensors that are in it, by their shared name."""

    data: BinaryIO
    places: dict[str, TensorProto] = field(default_factory=dict)

    def put(self, name: str, value: npt.NDArray[Any]) -> TensorProto:
        offset = -(-self.data.tell() // _ALIGN) * _ALIGN
        self.data.seek(offset)
        self.data.write(np.ascontiguousarray(value).data)
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(value.dtype), dims=value.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(value.nbytes))):
            tensor.external_data.add(key=key, value=text)
        return tensor


class _Writer:
    """One side's graph. Names of values end up in the file, so that errors of ONNX Runtime tell where they come from."""

    def __init__(self, model: Checkpoint, side: Side, store: _Store) -> None:
        self.model = model
        self.config = model.config
        self.side: Side = side
        self.store = store
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.inner = self.config.heads[side] * self.config.head_dim

    def encoder(self) -> onnx.ModelProto:
        c = self.config
        x = self._embed()
        bias = self._constant("relative", self.model.relative("encoder")) if c.t5 else ""
        for i in range(c.layers["encoder"]):
            x = self._around(x, i, "self", lambda h, i=i: self._packed(h, i, bias))  # type: ignore[misc]
            x = self._around(x, i, "feed", lambda h, i=i: self._feed(h, i))  # type: ignore[misc]
        if c.pre_norm:
            x = self._norm("last", x, self.model.last_norm("encoder"))
        cross = [self.model.attention("decoder", i, "cross", "kv") for i in range(c.layers["decoder"])]
        biases = [dense.bias for dense in cross if dense.bias is not None]
        dense = Dense(np.concatenate([d.weight for d in cross], axis=1), np.concatenate(biases) if biases else None)
        self._dense("memory", x, dense)
        inputs: list[_Spec] = [("input_ids", TensorProto.INT64, ["tokens"])]
        inputs += [] if c.t5 else [("position_ids", TensorProto.INT64, ["tokens"])]
        inputs += [("cu_seqlens", TensorProto.INT32, ["texts_and_one"])]
        return self._model(inputs, [("memory", TensorProto.FLOAT, ["tokens", dense.weight.shape[1]])])

    def decoder(self) -> onnx.ModelProto:
        c = self.config
        x = self._embed()
        bias = self._constant("relative", self.model.relative("decoder")) if c.t5 else ""
        for i in range(c.layers["decoder"]):
            x = self._around(x, i, "self", lambda h, i=i: self._own(h, i, bias))  # type: ignore[misc]
            x = self._around(x, i, "cross", lambda h, i=i: self._cross(h, i))  # type: ignore[misc]
            x = self._around(x, i, "feed", lambda h, i=i: self._feed(h, i))  # type: ignore[misc]
        if c.pre_norm:
            x = self._norm("last", x, self.model.last_norm("decoder"))
        self._head(x)
        width = c.layers["decoder"] * 2 * self.inner
        inputs: list[_Spec] = [("input_ids", TensorProto.INT64, ["rows"])]
        inputs += [] if c.t5 else [("position_ids", TensorProto.INT64, ["rows"])]
        inputs += [
            ("past", TensorProto.FLOAT, ["slots", width]),
            ("table", TensorProto.INT32, ["rows", "steps"]),
            ("lengths", TensorProto.INT32, ["rows"]),
            ("memory", TensorProto.FLOAT, ["places", width]),
            ("spans", TensorProto.INT32, ["rows", 2]),
            ("top", TensorProto.INT64, [1]),
        ]
        outputs: list[_Spec] = [
            ("logits", TensorProto.FLOAT, ["rows", c.vocabulary]),
            ("lse", TensorProto.FLOAT, ["rows"]),
            ("values", TensorProto.FLOAT, ["rows", "k"]),
            ("ids", TensorProto.INT64, ["rows", "k"]),
        ]
        return self._model(inputs, outputs)

    def _model(self, inputs: list[_Spec], outputs: list[_Spec]) -> onnx.ModelProto:
        given, made = ([helper.make_tensor_value_info(*one) for one in some] for some in (inputs, outputs))
        graph = helper.make_graph(self.nodes, f"{self.config.model_type}_{self.side}", given, made, self.initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="understudy")

    # Building blocks.

    def _constant(self, name: str, value: npt.NDArray[Any], shared: str = "") -> str:
        """An initializer; with `shared`, one that both graphs may name."""
        if value.nbytes < _EXTERNAL_BYTES:
            tensor = numpy_helper.from_array(np.asarray(value, order="C"), name)
        elif shared and shared in self.store.places:
            tensor = TensorProto()
            tensor.CopyFrom(self.store.places[shared])
            tensor.name = name
        else:
            tensor = self.store.put(name, value)
            if shared:
                self.store.places[shared] = tensor
        self.initializers.append(tensor)
        return name

    def _node(self, op: str, inputs: list[str], name: str, domain: str = "", **attributes: Any) -> str:
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def _dense(self, name: str, x: str, dense: Dense) -> str:
        if dense.bias is None:
            return self._node("MatMul", [x, self._constant(f"{name}.weight", dense.weight)], name)
        product = self._node("MatMul", [x, self._constant(f"{name}.weight", dense.weight)], f"{name}.product")
        return self._node("Add", [product, self._constant(f"{name}.bias", dense.bias)], name)

    def _norm(self, name: str, x: str, norm: Norm, residual: str = "") -> str:
        beta = "" if norm.beta is None else self._constant(f"{name}.beta", norm.beta)
        inputs = [x, "", "", residual, self._constant(f"{name}.gamma", norm.gamma), beta]
        return self._node("AddNorm", inputs, f"{name}.norm", DOMAIN, epsilon=self.config.epsilon, rms=int(self.config.t5))

    def _embed(self) -> str:
        c, side = self.config, self.side
        table = self.model.embedding(side)
        shared: str = (
            "embedding" if c.source_vocabulary == c.vocabulary and np.array_equal(table, self.model.embedding("encoder")) else side
        )
        x = self._node("Gather", [self._constant("embedding", table, shared), "input_ids"], "embedded")
        if c.embed_scale != 1.0:
            x = self._node("Mul", [x, self._constant("embed_scale", np.full(1, c.embed_scale, np.float32))], "embedded.scaled")
        positions = self.model.positions(side)
        if positions is not None:
            shared = "" if c.position_kind == "learned" else "positions"
            places = self._node("Gather", [self._constant("positions", positions, shared), "position_ids"], "placed")
            x = self._node("Add", [x, places], "embedded.placed")
        return self._norm("embed", x, self.model.embed_norm(side)) if c.embed_norm else x

    def _around(self, x: str, i: int, part: str, body: Any) -> str:
        """The sum x + body(norm(x)), or norm(x + body(x))."""
        norm, name = self.model.norm(self.side, i, part), f"layer{i}.{part}"
        if not self.config.pre_norm:
            return self._norm(name, body(x), norm, residual=x)
        return self._node("Add", [x, body(self._norm(name, x, norm))], f"{name}.sum")

    def _attention_dense(self, x: str, i: int, part: str, names: str) -> str:
        return self._dense(f"layer{i}.{part}.{names}", x, self.model.attention(self.side, i, part, names))

    def _packed(self, x: str, i: int, bias: str) -> str:
        qkv = self._attention_dense(x, i, "self", "qkv")
        heads, scale = self.config.heads["encoder"], self.config.attention_scale
        y = self._node("PackedAttention", [qkv, "cu_seqlens", "", "", bias], f"layer{i}.context", DOMAIN, num_heads=heads, scale=scale)
        return self._attention_dense(y, i, "self", "o")

    def _own(self, x: str, i: int, bias: str) -> str:
        qkv = self._attention_dense(x, i, "self", "qkv")
        y = self._beam(f"layer{i}.context", [qkv, "", "past", "table", "lengths", bias], i, own=1)
        return self._attention_dense(y, i, "self", "o")

    def _cross(self, x: str, i: int) -> str:
        q = self._attention_dense(x, i, "cross", "q")
        y = self._beam(f"layer{i}.read", [q, "", "memory", "spans"], i, own=0)
        return self._attention_dense(y, i, "cross", "o")

    def _beam(self, name: str, inputs: list[str], i: int, own: int) -> str:
        heads, scale = self.config.heads["decoder"], self.config.attention_scale
        return self._node("BeamAttention", inputs, name, DOMAIN, num_heads=heads, scale=scale, column=i * 2 * self.inner, own=own)

    def _feed(self, x: str, i: int) -> str:
        up, gate, out = self.model.feed(self.side, i)
        name = f"layer{i}.feed"
        if gate is None:
            y = self._activation(f"{name}.active", self._dense(f"{name}.up", x, up))
        else:
            opened = self._activation(f"{name}.active", self._dense(f"{name}.gate", x, gate))
            y = self._node("Mul", [opened, self._dense(f"{name}.up", x, up)], f"{name}.gated")
        return self._dense(f"{name}.down", y, out)

    def _activation(self, name: str, x: str) -> str:
        kind = self.config.activation
        if kind == "relu":
            return self._node("Relu", [x], name)
        if kind == "silu":
            return self._node("Mul", [x, self._node("Sigmoid", [x], f"{name}.sigmoid")], name)
        return self._node("BiasGelu", [x], name, DOMAIN, approximate=_APPROXIMATE[kind])

    def _head(self, x: str) -> None:
        own = self.model.head()
        weight = "embedding" if own is None else self._constant("head.weight", own)
        bias = self.model.head_bias()
        inputs = [x, weight] + ([] if bias is None else [self._constant("head.bias", bias)])
        # The rows of the table are the columns of the product: one copy of it serves as embedding and as head.
        self._node("Gemm", inputs, "logits", transB=1, alpha=float(self.config.head_scale))
        self.nodes.append(helper.make_node("TopTokens", ["logits", "top"], ["lse", "values", "ids"], name="top_tokens", domain=DOMAIN))
