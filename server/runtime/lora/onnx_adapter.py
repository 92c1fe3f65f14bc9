"""The same weights as a `.onnx_adapter` file, which any user of ONNX Runtime can load (ort.AdapterFormat, RunOptions.add_active_adapter).

Parameters of a LoRA, all float32: "<layer>.lora_A.weight" [inputs, rank] and "<layer>.lora_B.weight" [rank, outputs] with the scale in it,
so that a graph adds (x @ A) @ B to the layer's y; `<layer>` is the base's own module path. Of prefix tuning "prefix.keys" and
"prefix.values" [layers, kv_heads, positions, head_dim]; of prompt tuning "prompt.rows" [positions, H].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from server.core import FloatArray
from server.runtime.lora.weights import LoraWeights, PrefixWeights, Weights
from server.runtime.ort import import_ort


def parameters(weights: Weights) -> dict[str, FloatArray]:
    """The file's parameters by name, as the module says."""
    if isinstance(weights, LoraWeights):
        found: dict[str, FloatArray] = {}
        for layer, delta in weights.deltas.items():
            found[f"{layer}.lora_A.weight"] = np.ascontiguousarray(delta.a.T)
            found[f"{layer}.lora_B.weight"] = np.ascontiguousarray(delta.b.T * np.float32(delta.scale))
        return found
    if isinstance(weights, PrefixWeights):
        return {"prefix.keys": weights.keys, "prefix.values": weights.values}
    return {"prompt.rows": weights.rows}


def write_onnx_adapter(path: Path, weights: Weights, *, adapter_version: int, model_version: int) -> None:
    """Writes the file; both versions are whole numbers that ONNX Runtime hands back to whoever reads it."""
    ort = import_ort()
    arrays = parameters(weights)  # ONNX Runtime takes no copy: they must outlive the export
    values = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in arrays.items()}
    file = ort.AdapterFormat()
    file.set_adapter_version(adapter_version)
    file.set_model_version(model_version)
    file.set_parameters(values)
    file.export_adapter(str(path))
