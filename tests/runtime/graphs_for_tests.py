"""Small graphs of stock operators, in the forms that the engines take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper, save

WORDS, WIDTH = 50, 6
TABLE = np.random.default_rng(0).standard_normal((WORDS, WIDTH)).astype(np.float32)


def write(path: Path, nodes: list, inputs: list, outputs: list, constants: dict[str, np.ndarray]) -> Path:
    """Saves a checked model of opset 17."""
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(model)
    save(model, path)
    return path


def value(name: str, kind: int, shape: list) -> object:
    return helper.make_tensor_value_info(name, kind, shape)


def packed_hidden(path: Path, *, layers: int = 0) -> Path:
    """input_ids, position_ids, token_type_ids, cu_seqlens -> hidden[T, WIDTH] = table[id] + position + 10 * type; `layers` make it slow."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["word"]),
        helper.make_node("Cast", ["position_ids"], ["position"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["token_type_ids"], ["kind"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["kind", "ten"], ["kind10"]),
        helper.make_node("Add", ["position", "kind10"], ["offset"]),
        helper.make_node("Unsqueeze", ["offset", "one"], ["column"]),
        helper.make_node("Shape", ["cu_seqlens"], ["unused"]),
        helper.make_node("Add", ["word", "column"], ["x0"]),
    ]
    constants = {"table": TABLE, "ten": np.array(10, np.float32), "one": np.array([1])}
    nodes += slow(constants, "x0", "hidden", layers)
    ints = [value(name, TensorProto.INT64, ["T"]) for name in ("input_ids", "position_ids", "token_type_ids")]
    inputs = [*ints, value("cu_seqlens", TensorProto.INT32, ["S1"])]
    return write(path, nodes, inputs, [value("hidden", TensorProto.FLOAT, ["T", WIDTH])], constants)


def slow(constants: dict[str, np.ndarray], source: str, target: str, layers: int) -> list:
    """`layers` x 4 MFLOP a row that leave the values as they were (a widening product times zero is added)."""
    nodes, at = [], source
    if layers:
        constants["up"], constants["square"] = np.ones((WIDTH, 1000), np.float32), np.ones((1000, 1000), np.float32)
        constants["down"] = np.zeros((1000, WIDTH), np.float32)
        nodes.append(helper.make_node("MatMul", [source, "up"], ["wide0"]))
        for i in range(layers):
            nodes.append(helper.make_node("MatMul", [f"wide{i}", "square"], [f"raw{i}"]))
            nodes.append(helper.make_node("Sign", [f"raw{i}"], [f"wide{i + 1}"]))
        nodes.append(helper.make_node("MatMul", [f"wide{layers}", "down"], ["nothing"]))
        nodes.append(helper.make_node("Add", [source, "nothing"], [target]))
        return nodes
    return [helper.make_node("Identity", [at], [target])]


def padded_hidden(path: Path) -> Path:
    """input_ids, attention_mask [B, L] -> hidden[B, L, WIDTH] = table[id] * mask."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["word"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "two"], ["mask3"]),
        helper.make_node("Mul", ["word", "mask3"], ["hidden"]),
    ]
    inputs = [value(name, TensorProto.INT64, ["B", "L"]) for name in ("input_ids", "attention_mask")]
    outputs = [value("hidden", TensorProto.FLOAT, ["B", "L", WIDTH])]
    return write(path, nodes, inputs, outputs, {"table": TABLE, "two": np.array([2])})


def packed_logits(path: Path) -> Path:
    """input_ids, position_ids, cu_seqlens -> logits[S, WIDTH] = table[first token of each sequence]."""
    nodes = [
        helper.make_node("Slice", ["cu_seqlens", "zero", "minus_one", "zero"], ["starts"]),
        helper.make_node("Gather", ["input_ids", "starts"], ["first"]),
        helper.make_node("Gather", ["table", "first"], ["logits"]),
        helper.make_node("Shape", ["position_ids"], ["unused"]),
    ]
    inputs = [value("input_ids", TensorProto.INT64, ["T"]), value("position_ids", TensorProto.INT64, ["T"])]
    inputs.append(value("cu_seqlens", TensorProto.INT32, ["S1"]))
    constants = {"table": TABLE, "zero": np.array([0]), "minus_one": np.array([-1])}
    return write(path, nodes, inputs, [value("logits", TensorProto.FLOAT, ["S", WIDTH])], constants)
