"""A folder with config.json and safetensors becomes a packed ONNX graph that is known to answer as the original does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from server.core import Task
from server.errors import ModelRejected
from server.runtime.graphs import parity
from server.runtime.graphs.adapters import lora_layout
from server.runtime.graphs.architecture import HeadKind
from server.runtime.graphs.calibrate import Progress, check_tokens, choose_forms, default_texts, encode
from server.runtime.graphs.checkpoint import Checkpoint, read_checkpoint
from server.runtime.graphs.config import read_config, supported_architectures
from server.runtime.graphs.quantize import Choice
from server.runtime.graphs.reference import Packed, forward
from server.runtime.graphs.writer import write_graph
from server.runtime.manifest import Quantization

__all__ = ["Built", "build", "read_config", "supported_architectures"]

GRAPH = "model.onnx"
METHOD = "w8a8-smoothed-compensated-pair-safe"
# How often the worst products may be sent back to float32 before the build gives up, and which share of them each time.
RETRIES = 3
BACK_TO_FLOAT = 0.125


@dataclass(frozen=True)
class Built:
    """What a build made. `files`: the graph and, above 2 GB, its weights. `manifest`: fields of the manifest that follow from the build."""

    model: Path
    files: tuple[Path, ...]
    manifest: Mapping[str, Any]
    parity: Mapping[str, float]


def build(
    folder: Path,
    out: Path,
    *,
    task: Task,
    form: Literal["float32", "int8"],
    calibration: Sequence[str] | None = None,
    progress: Progress | None = None,
    adapters: bool = False,
) -> Built:
    """Writes `out/model.onnx` for the checkpoint in `folder`; `out` must exist.

    int8 is calibrated on `calibration` (at least 16 texts; by default our own), through `folder/tokenizer.json`. `progress` is called with
    a stage ("read", "quantize", "write", "check") and the share of it that is done. With `adapters`, the graph has places for them.

    Raises:
        ModelRejected: config, tensors or tokenizer are broken or unknown, or the graph's answers are out of tolerance.
        TaskNotSupported: the checkpoint does another task.
        InvalidArgument: too few calibration texts.
    """
    report = progress or (lambda _stage, _share: None)
    report("read", 0.0)
    model = read_checkpoint(folder, task)
    if adapters:
        model = replace(model, lora=lora_layout(model))
    report("read", 1.0)
    if form == "float32":
        return _build_float(model, out, task, report)
    texts = default_texts() if calibration is None else calibration
    used, held = encode(folder, texts, task, model.config.max_tokens)
    check_tokens(model, used)
    check_tokens(model, held)
    chosen = choose_forms(model, used, report)
    return finish_int8(model, out, task, chosen, held, report)


def _require(files: Sequence[Path], figures: Mapping[str, float], limits: parity.Tolerances, mend: str) -> None:
    """Raises ModelRejected where the figures are out of tolerance, and leaves nothing of the graph."""
    try:
        parity.require(figures, limits, mend)
    except ModelRejected:
        for file in files:
            file.unlink()
        raise


def _build_float(model: Checkpoint, out: Path, task: Task, report: Progress) -> Built:
    report("write", 0.0)
    files = write_graph(model, {}, out / GRAPH)
    report("check", 0.0)
    batch = _random_batch(model)
    figures = _figures(model, files[0], batch)
    _require(files, figures, parity.FLOAT32, "Please report it with the model's config.json.")
    report("check", 1.0)
    return Built(files[0], files, _manifest(model, task, figures, None), figures)


def finish_int8(model: Checkpoint, out: Path, task: Task, chosen: dict[str, Choice], held: Packed, report: Progress) -> Built:
    """Writes and checks the graph with the products in `chosen` in int8.

    While the check fails, the worst of them go back to float32, a few at a time.
    """
    want = forward(model, held)[1]
    limits = parity.tolerances(model.kind, "int8", len(want))
    worst = sorted(chosen, key=lambda name: chosen[name].error, reverse=True)
    floats: set[str] = set()
    for attempt in range(RETRIES + 1):
        floats = set(worst[: int(np.ceil(attempt * BACK_TO_FLOAT * len(worst)))])
        report("write", attempt / (RETRIES + 1))
        files = write_graph(model, {name: c.product for name, c in chosen.items() if name not in floats}, out / GRAPH)
        report("check", attempt / (RETRIES + 1))
        figures = parity.measure(model.kind, parity.run_graph(files[0], model, held), want, held.cu)
        if not parity.failures(figures, limits):
            break
    _require(files, figures, limits, "Calibrate on text like the traffic, or serve the model in float32.")
    report("check", 1.0)
    layers = {name: "fp32" if name in floats else choice.form for name, choice in chosen.items()}
    quantization = Quantization(method=METHOD, weight_bits=8, layers=layers)
    return Built(files[0], files, _manifest(model, task, figures, quantization), figures)


def _figures(model: Checkpoint, path: Path, batch: Packed) -> dict[str, float]:
    return parity.measure(model.kind, parity.run_graph(path, model, batch), forward(model, batch)[1], batch.cu)


def _random_batch(model: Checkpoint) -> Packed:
    """Sequences of one to many random tokens; needs no tokenizer, and reaches every kind of token."""
    rng = np.random.default_rng(0)
    kinds = 1 if model.token_type is None else len(model.token_type)
    lengths = [min(n, model.config.max_tokens) for n in (1, 2, 9, 33, 150, 300)]
    return Packed.of([(rng.integers(0, len(model.word), n).tolist(), rng.integers(0, kinds, n).tolist()) for n in lengths])


def _manifest(model: Checkpoint, task: Task, figures: Mapping[str, float], quantization: Quantization | None) -> dict[str, Any]:
    config = model.config
    has_classes = model.kind in (HeadKind.SEQUENCE, HeadKind.TOKEN)
    return {
        "task": task,
        "form": "packed",
        "architecture": config.model_type,
        "dtype": "float32" if quantization is None else "int8",
        "quantization": quantization,
        "hidden_size": config.hidden,
        "max_tokens": config.max_tokens,
        "token_types": model.token_type is not None,
        "labels": list(config.labels) if has_classes else [],
        "multi_label": config.multi_label and has_classes,
        "lora": model.lora,
        "parity": dict(figures),
    }
