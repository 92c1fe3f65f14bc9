"""Takes over an ONNX encoder that someone else exported: one output under our name, checked inputs, and a trial run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from server.core import Task
from server.errors import ModelRejected
from server.runtime.onnx_scan import scan_onnx
from server.runtime.verify import MODEL

_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})
_HIDDEN = ("last_hidden_state", "token_embeddings", "hidden_states", "hidden")
_INT8 = frozenset(
    {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLinear", "QLinearMatMul", "QAttention", "QGemm"}
)
_IN_PLACE_LIMIT = 1 << 31  # protobuf's own limit for one file


def adopt(source: Path, folder: Path, task: Task) -> dict[str, Any]:
    """Writes `source` as `folder`/model.onnx in the padded form, and gives the manifest's fields that the graph tells.

    The output becomes "hidden" float32[B, L, H], or "logits": [B, labels], [B, L, labels], or [B, L, 2] for question answering.

    Raises:
        ModelRejected: hostile, or its inputs and outputs are not those of an encoder for `task`.
    """
    scan_onnx(source)
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(str(source))
    graph = model.graph
    initialized = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in initialized]
    names = {value.name for value in inputs}
    if "input_ids" not in names or "attention_mask" not in names or names - _INPUTS:
        wanted_inputs = f"input_ids and attention_mask, and at most {', '.join(sorted(_INPUTS))}"
        raise _unfit(source, f"its inputs are {', '.join(sorted(names))[:200]}", wanted_inputs)
    for value in inputs:
        if value.type.tensor_type.elem_type != TensorProto.INT64 or len(value.type.tensor_type.shape.dim) != 2:
            raise _unfit(source, f"its input {value.name} is not int64[B, L]", "int64[B, L] inputs with free sizes")
        if any(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim):
            raise _unfit(source, f"its input {value.name} has a fixed size", "free batch and sequence sizes; export it with dynamic axes")
    outputs = {value.name: value for value in graph.output}
    if task is Task.QUESTION_ANSWERING and {"start_logits", "end_logits"} <= outputs.keys():
        chosen, rank, made = _join(graph, helper), 3, "logits"
        elem = outputs["start_logits"].type.tensor_type.elem_type
    else:
        made = "hidden" if task is Task.FEATURE_EXTRACTION else "logits"
        rank = 3 if task in (Task.FEATURE_EXTRACTION, Task.TOKEN_CLASSIFICATION, Task.QUESTION_ANSWERING) else 2
        wanted = _HIDDEN if made == "hidden" else ("logits",)
        chosen = next((name for name in wanted if name in outputs), "")
        if not chosen:
            raise _unfit(source, f"its outputs are {', '.join(outputs)[:200]}", f"{' or '.join(wanted)} for {task.value}")
        elem = outputs[chosen].type.tensor_type.elem_type
    last = chosen
    if elem != TensorProto.FLOAT or chosen != made:
        target = made if made not in _names(graph) else f"understudy_{made}"
        graph.node.append(helper.make_node("Cast", [last], [target], to=TensorProto.FLOAT, name="understudy_output"))
        last = target
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(last, TensorProto.FLOAT, [None] * rank))
    operators = {node.op_type for node in graph.node}
    target_file = folder / MODEL
    large = model.ByteSize() >= _IN_PLACE_LIMIT or bool(scan_onnx(source).external)
    onnx.save_model(model, str(target_file), save_as_external_data=large, location="model.onnx_data" if large else None)
    return {"form": "padded", "dtype": _dtype(operators, graph), "token_types": "token_type_ids" in names}


def describe_raw(source: Path) -> dict[str, Any]:
    """Fields of a graph that is no text model; raises ModelRejected for hostile ones."""
    scan_onnx(source)
    return {"task": Task.TENSOR.value, "form": "tensor", "dtype": "other"}


def _unfit(source: Path, got: str, wanted: str) -> ModelRejected:
    return ModelRejected(
        f"{source.name} is no encoder that can be served as text: {got}; wanted: {wanted}. "
        "Use --graph own or --graph export, or add it as raw tensors with --task tensor.",
        file=source.name,
    )


def _join(graph: Any, helper: Any) -> str:
    """[B, L] start and end logits as one [B, L, 2]."""
    from onnx import TensorProto

    graph.initializer.append(helper.make_tensor("understudy_last_axis", TensorProto.INT64, [1], [-1]))
    for name in ("start_logits", "end_logits"):
        graph.node.append(helper.make_node("Unsqueeze", [name, "understudy_last_axis"], [f"understudy_{name}"]))
    graph.node.append(helper.make_node("Concat", ["understudy_start_logits", "understudy_end_logits"], ["understudy_logits"], axis=-1))
    return "understudy_logits"


def _names(graph: Any) -> set[str]:
    return {name for node in graph.node for name in (*node.output, *node.input)}


def _dtype(operators: set[str], graph: Any) -> str:
    if "MatMulNBits" in operators:
        return "int4"
    if operators & _INT8:
        return "int8"
    kinds = [tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2]
    return "float16" if kinds and all(kind == 10 for kind in kinds) else "float32"


def try_run(folder: Path, fields: dict[str, Any]) -> None:
    """Runs the adopted graph once on two short rows; raises ModelRejected unless the answer is finite and of the stated size."""
    from server.runtime.ort import import_ort

    ort = import_ort()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
        ids = np.array([[1, 2, 3, 4], [1, 2, 0, 0]], np.int64)
        feeds = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64), "token_type_ids": np.zeros_like(ids)}
        feeds["position_ids"] = np.broadcast_to(np.arange(4), ids.shape).astype(np.int64)
        names = {value.name for value in session.get_inputs()}
        (output,) = session.run(None, {name: value for name, value in feeds.items() if name in names})
    except Exception as error:
        raise ModelRejected(f"{MODEL} does not run: {str(error)[:300]}. Export the model again.", file=MODEL) from None
    task = Task(fields["task"])
    columns = {Task.FEATURE_EXTRACTION: fields.get("hidden_size", 0), Task.QUESTION_ANSWERING: 2}.get(task, len(fields.get("labels", [])))
    shape = (2, columns) if task in (Task.TEXT_CLASSIFICATION, Task.TEXT_RANKING, Task.ZERO_SHOT_CLASSIFICATION) else (2, 4, columns)
    if output.shape != shape or not np.isfinite(output[0]).all():
        raise ModelRejected(
            f"{MODEL} answers {list(output.shape)} where config.json leads to {list(shape)}, or numbers that are not finite. "
            "Export the model again.",
            file=MODEL,
        )
