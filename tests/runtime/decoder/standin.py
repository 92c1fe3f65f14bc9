"""The graph for CUDA with each PagedAttention spelled out in plain operators, so that a processor runs it, over the same caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write_standin(source: Path, target: Path) -> Path:
    """Rewrites a graph; its weights stay where they are, so `target` lies in the same folder."""
    model = onnx.load(str(source), load_external_data=False)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for i, node in enumerate(nodes):
        if node.op_type == "PagedAttention":
            made = _Attention(f"standin{i}", {a.name: helper.get_attribute_value(a) for a in node.attribute})
            made.write(list(node.input), list(node.output))
            model.graph.node.extend(made.nodes)
            model.graph.initializer.extend(made.constants)
        else:
            model.graph.node.append(node)
    target.write_bytes(model.SerializeToString())
    return target


class _Attention:
    def __init__(self, name: str, attributes: dict[str, Any]) -> None:
        self.name, self.attributes = name, attributes
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{self.name}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def number(self, value: Any, kind: Any = np.int64) -> str:
        name = f"{self.name}.constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, kind), name))
        return name

    def cast(self, x: str, to: int) -> str:
        return self.op("Cast", x, to=to)

    def column(self, x: str) -> str:
        return self.op("Unsqueeze", x, self.number([1]))

    def write(self, inputs: list[str], outputs: list[str]) -> None:
        qkv, cos, sin = inputs[0], inputs[8], inputs[9]
        heads, kv = self.attributes["num_heads"], self.attributes["kv_num_heads"]
        cu, past, table = (self.cast(one, TensorProto.INT64) for one in inputs[5:8])
        place, rows = self.places(qkv, cu, past, table)
        page = self.op("Gather", self.op("Shape", inputs[3]), self.number(1))
        block = self.op("GatherElements", rows, self.column(self.op("Div", place, page)), axis=1)
        slot = self.op("Add", self.op("Mul", block, page), self.column(self.op("Mod", place, page)))
        wide = self.op("Reshape", self.cast(qkv, TensorProto.FLOAT), self.number([0, heads + 2 * kv, -1]))
        parts = [f"{self.name}.{part}" for part in "qkv"]
        self.nodes.append(helper.make_node("Split", [wide, self.number([heads, kv, kv])], parts, axis=1))
        angles = [self.column(self.cast(self.op("Gather", one, place), TensorProto.FLOAT)) for one in (cos, sin)]
        q, k = (self.rotate(one, *angles) for one in parts[:2])
        inside = self.op("Range", self.number(0), page, self.number(1))
        seen = self.op("Add", self.op("Unsqueeze", self.op("Mul", rows, page), self.number([2])), inside)
        seen = self.op("Reshape", seen, self.number([0, -1]))
        keys = self.cached(inputs[3], slot, k, seen, outputs[1])
        values = self.cached(inputs[4], slot, parts[2], seen, outputs[2])
        scale = self.number(self.attributes["scale"], np.float32)
        grouped = self.op("Reshape", self.op("Mul", q, scale), self.number([0, kv, heads // kv, -1]))
        score = self.op("Einsum", grouped, keys, equation="tkgd,tckd->tkgc")
        hidden = self.op("Unsqueeze", self.hidden(place, seen), self.number([1, 2]))
        score = self.op("Softmax", self.op("Where", hidden, self.number(-1e9, np.float32), score), axis=-1)
        context = self.op("Reshape", self.op("Einsum", score, values, equation="tkgc,tckd->tkgd"), self.number([0, -1]))
        self.op("Cast", context, output=outputs[0], to=TensorProto.FLOAT16)

    def places(self, qkv: str, cu: str, past: str, table: str) -> tuple[str, str]:
        """Each token's position, and its sequence's row of the table."""
        tokens = self.op("Gather", self.op("Shape", qkv), self.number(0))
        index = self.op("Range", self.number(0), tokens, self.number(1))
        ends = self.op("Slice", cu, self.number([1]), self.number([1 << 30]))
        behind = self.cast(self.op("GreaterOrEqual", self.column(index), ends), TensorProto.INT64)
        sequence = self.op("ReduceSum", behind, self.number([1]), keepdims=0)
        start = self.op("Sub", self.op("Gather", past, sequence), self.op("Gather", cu, sequence))
        return self.op("Add", index, start), self.op("Gather", table, sequence)

    def rotate(self, x: str, cos: str, sin: str) -> str:
        a, b = f"{x}.a", f"{x}.b"
        self.nodes.append(helper.make_node("Split", [x], [a, b], axis=2))
        first = self.op("Sub", self.op("Mul", a, cos), self.op("Mul", b, sin))
        second = self.op("Add", self.op("Mul", b, cos), self.op("Mul", a, sin))
        return self.op("Concat", first, second, axis=2)

    def cached(self, cache: str, slot: str, rows: str, seen: str, output: str) -> str:
        shape = self.op("Shape", cache)
        flat = self.op(
            "Reshape", cache, self.op("Concat", self.number([-1]), self.op("Slice", shape, self.number([2]), self.number([4])), axis=0)
        )
        written = self.op("ScatterND", flat, slot, self.cast(rows, TensorProto.FLOAT16))
        self.op("Reshape", written, shape, output=output)
        return self.cast(self.op("Gather", written, seen), TensorProto.FLOAT)

    def hidden(self, place: str, seen: str) -> str:
        context = self.op("Range", self.number(0), self.op("Gather", self.op("Shape", seen), self.number(1)), self.number(1))
        at = self.column(place)
        later = self.op("Greater", context, at)
        window = self.attributes["local_window_size"]
        if window <= 0:
            return later
        return self.op("Or", later, self.op("LessOrEqual", context, self.op("Sub", at, self.number(window))))
