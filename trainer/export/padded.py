"""Encoders that we write no graph for: exported by optimum, fused by ONNX Runtime, quantized, and checked against the original.

int8 here means 8-bit weights in blocks of 32, multiplied with rows that are quantized block by block as they come (MatMulNBits): no row's
answer depends on its neighbours, as it would with the scale over the whole batch that optimum's own int8 uses (`stock`, kept as a baseline
to measure against).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from server.core import Task
from server.errors import ModelRejected
from server.runtime.adopt import adopt
from server.runtime.graphs.config import read_json
from server.runtime.ort import import_ort
from trainer.export.check import Figures, compare

_OPTIMUM_TASK = {Task.TEXT_RANKING: "text-classification", Task.ZERO_SHOT_CLASSIFICATION: "text-classification"}
_BLOCK = 32
# Figures of the fused and the quantized graph against torch; a graph outside is not written.
FLOAT32_ERROR = 1e-3
INT8_ERROR = 0.1


@dataclass(frozen=True)
class ExportOptions:
    """`stock` gives the peer of the benchmarks: optimum's dynamic int8 for this CPU."""

    task: Task
    dtype: Literal["float32", "int8"] = "float32"
    stock: bool = False


def export(source: Path, out: Path, options: ExportOptions) -> Figures:
    """Writes model.onnx, tokenizer.json and manifest.json to `out`; returns how the graph compares with the original.

    Raises:
        ModelRejected: optimum cannot export the source, or the graph's answers are out of tolerance.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="understudy-export-") as place:
        folder = Path(place)
        plain = _through_optimum(source, folder / "plain", options.task)
        fused = _fuse(plain, folder / "fused.onnx", source)
        graph = fused
        if options.stock:
            graph = _quantize_as_optimum(fused, folder / "stock.onnx")
        elif options.dtype == "int8":
            graph = _quantize_blocks(fused, folder / "int8.onnx")
        fields = adopt(graph, out, options.task)
        _copy_tokenizer(source, plain.parent, out)
        figures = compare(source, out, options.task)
        limit = FLOAT32_ERROR if graph is fused else INT8_ERROR
        # The baseline is measured, not served: its error is reported and not held against it.
        if not options.stock and not figures["error"] <= limit:
            shutil.rmtree(out)
            raise ModelRejected(
                f"The exported graph does not answer as the original: its relative error is {figures['error']:.3g}, "
                f"at most {limit:g} is allowed. Export it in float32, or convert it elsewhere and pull the ONNX file.",
                figures=", ".join(f"{name}={value:.6g}" for name, value in figures.items()),
            )
    config = read_json(source / "config.json")
    manifest: dict[str, Any] = {
        **fields,
        "task": options.task.value,
        "architecture": str(config.get("model_type", ""))[:64],
        "parity": figures,
    }
    if graph is not fused:
        method = "dynamic-per-tensor" if options.stock else "weights-8-bit-blocks"
        manifest |= {"dtype": "int8", "quantization": {"method": method, "weight_bits": 8, "layers": {}}}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return figures


def _through_optimum(source: Path, folder: Path, task: Task) -> Path:
    if not any(source.glob("*.safetensors")):
        raise ModelRejected(f"There is no safetensors file in {source}; pickled checkpoints are not opened. Convert it, then export again.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import_ort()
    from optimum.exporters.onnx import main_export

    try:
        main_export(
            str(source),
            str(folder),
            task=_OPTIMUM_TASK.get(task, task.value),
            library_name="transformers",
            do_validation=False,
            local_files_only=True,
        )
    except Exception as error:  # optimum and torch share no base class of errors
        raise ModelRejected(f"optimum cannot export this model: {type(error).__name__}: {str(error)[:400]}") from error
    return folder / "model.onnx"


def _fuse(plain: Path, target: Path, source: Path) -> Path:
    """The graph with attention, norms and GELU as single operators; unfused where ONNX Runtime finds nothing that it knows."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    config = read_json(source / "config.json")
    heads = config.get("num_attention_heads") or config.get("n_heads") or 0
    hidden = config.get("hidden_size") or config.get("dim") or 0
    # The order of optimum's level O2: ONNX Runtime's own basic passes, then the patterns of BERT, which are those of most encoders.
    model = optimize_model(
        str(plain), model_type="bert", num_heads=heads, hidden_size=hidden, optimization_options=FusionOptions("bert"), opt_level=1
    )
    model.save_model_to_file(str(target), use_external_data_format=plain.with_name("model.onnx_data").exists())
    return target


def _quantize_blocks(fused: Path, target: Path) -> Path:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    settings = DefaultWeightOnlyQuantConfig(block_size=_BLOCK, is_symmetric=True, accuracy_level=4, bits=8)
    quantizer = MatMulNBitsQuantizer(onnx.load(str(fused)), algo_config=settings)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=False)
    return target


def _quantize_as_optimum(fused: Path, target: Path) -> Path:
    """What optimum's configurations "avx512_vnni" and "avx2" ask of ONNX Runtime.

    Not called through optimum, which gives no way to state the type of fused nodes' results.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    vnni = any(flag in _cpu_flags() for flag in ("avx512_vnni", "avx_vnni"))
    quantize_dynamic(
        str(fused),
        str(target),
        per_channel=True,
        reduce_range=not vnni,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT, "WeightSymmetric": True, "ActivationSymmetric": False},
    )
    return target


def _cpu_flags() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return []


def _copy_tokenizer(source: Path, exported: Path, out: Path) -> None:
    for folder in (source, exported):
        if (folder / "tokenizer.json").is_file():
            shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")
            return
    raise ModelRejected("The model has no tokenizer.json and transformers could not make one; save its fast tokenizer, then export again.")
