"""Linear heads: adapters that turn a base's embedding into class probabilities.

A head is a folder: `adapter.safetensors` (weight float32[labels, H], bias float32[labels]), the same as `head.onnx`
(embedding float32[B, H] -> probabilities float32[B, labels]) and `manifest.json`. What is served is the answer of the ONNX file; the
safetensors are there for further training, and to check it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.core import FloatArray
from server.errors import InvalidArgument, ModelRejected
from server.runtime.adapter_folder import MANIFEST as MANIFEST
from server.runtime.adapter_folder import WEIGHTS as WEIGHTS
from server.runtime.adapter_folder import Base as Base
from server.runtime.adapter_folder import read_manifest, verify_files, write_folder
from server.runtime.manifest import FileEntry, FileName, Name, Version
from server.runtime.onnx_scan import scan_onnx
from server.runtime.ort import import_ort
from server.runtime.tasks.classification import sigmoid, softmax
from server.runtime.verify import entry_of

GRAPH = "head.onnx"
INPUT, OUTPUT = "embedding", "probabilities"
MAX_LABELS = 10_000
_OPERATORS = {("", "Gemm"), ("", "Div"), ("", "Softmax"), ("", "Sigmoid")}
_PROBE_ROWS = 8
_PROBE_TOLERANCE = 1e-5  # and what float32 sums of these weights may differ by besides


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Features(_Part):
    """How the base's tokens become the vector that the head reads; `size` is its length."""

    pooling: Literal["mean", "cls", "last"]
    normalize: bool
    size: int = Field(ge=1, le=65_536)


class HeadSpec(_Part):
    """Everything that a manifest says but the files. Logits are divided by `temperature` (calibration) before softmax or sigmoid."""

    schema_version: Literal[1] = 1
    kind: Literal["linear-head"] = "linear-head"
    name: Name
    version: Version
    base: Base
    features: Features
    labels: list[str] = Field(min_length=1, max_length=MAX_LABELS)
    multi_label: bool = False
    temperature: float = Field(default=1.0, gt=0.0, le=1e6, allow_inf_nan=False)
    metrics: dict[str, float] = {}
    calibration: dict[str, Any] = {}  # server.quality.calibration.Calibration.to_json(); empty: not measured, so it may not answer callers
    lineage: dict[str, Any] = {}
    license: str = ""
    created: str = ""  # RFC 3339

    @model_validator(mode="after")
    def _check_labels(self) -> HeadSpec:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label occurs twice")
        if len(self.labels) < 2 and not self.multi_label:
            raise ValueError("labels that exclude each other are at least two")
        return self


class AdapterManifest(HeadSpec):
    """`manifest.json` of a head's folder."""

    files: dict[FileName, FileEntry]

    @model_validator(mode="after")
    def _check_files(self) -> AdapterManifest:
        if set(self.files) != {WEIGHTS, GRAPH}:
            raise ValueError(f"files must be {WEIGHTS} and {GRAPH}")
        return self


class LinearHead:
    """A head that was verified and loaded. `predict` may be called from any thread."""

    def __init__(self, manifest: AdapterManifest, session: Any) -> None:
        self.manifest = manifest
        self._session = session

    @classmethod
    def load(cls, folder: Path, *, base_sha256: str | None) -> LinearHead:
        """Verifies and loads the head in `folder`.

        `base_sha256` is the SHA-256 of the model.onnx that will feed it; None skips that check alone. Raises ManifestInvalid, or
        ModelRejected: another base, a wrong hash or size, foreign files, broken weights, an ONNX file that is not these weights.
        """
        manifest = read_adapter_manifest(folder)
        if base_sha256 is not None and manifest.base.sha256 != base_sha256:
            raise ModelRejected(
                f"Head {manifest.name!r} version {manifest.version} was trained on {manifest.base.name!r} with model.onnx SHA-256 "
                f"{manifest.base.sha256}; the loaded base has {base_sha256}. Load that base, or train the head again on this one.",
                adapter=manifest.name,
                expected=manifest.base.sha256,
                got=base_sha256,
            )
        verify_files(folder, manifest.files, "head")
        weight, bias = _read_weights(folder / WEIGHTS, manifest)
        head = cls(manifest, _open_session(folder / GRAPH))
        probe = np.random.default_rng(0).standard_normal((_PROBE_ROWS, manifest.features.size)).astype(np.float32)
        if manifest.features.normalize:  # what it will read: longer vectors would make every answer 0 or 1
            probe /= np.linalg.norm(probe, axis=1, keepdims=True)
        difference = float(np.abs(head.predict(probe) - reference(manifest, weight, bias, probe)).max())
        allowed = _PROBE_TOLERANCE + _rounding(manifest, weight, bias, probe)
        if not difference <= allowed:
            raise ModelRejected(
                f"{GRAPH} and {WEIGHTS} of head {manifest.name!r} differ by {difference:.2g} in probability; expected at most "
                f"{allowed:.2g}. Write the head again.",
                adapter=manifest.name,
                file=GRAPH,
            )
        return head

    def predict(self, vectors: FloatArray) -> FloatArray:
        """Vectors float32[B, H] -> probabilities float32[B, labels]. Raises ModelRejected when the file's answer is no such array."""
        size, labels = self.manifest.features.size, len(self.manifest.labels)
        assert vectors.dtype == np.float32 and vectors.ndim == 2 and vectors.shape[1] == size, (vectors.dtype, vectors.shape, size)
        try:
            (answer,) = self._session.run([OUTPUT], {INPUT: vectors})
        except Exception as error:  # ONNX Runtime's exceptions have no public base
            raise ModelRejected(f"{GRAPH} of head {self.manifest.name!r} does not run: {str(error)[:300]}", file=GRAPH) from None
        if answer.dtype != np.float32 or answer.shape != (len(vectors), labels):
            raise ModelRejected(
                f"{GRAPH} of head {self.manifest.name!r} gives {answer.dtype}{list(answer.shape)}; expected float32"
                f"[{len(vectors)}, {labels}]. Write the head again.",
                file=GRAPH,
            )
        return np.asarray(answer, dtype=np.float32)


def reference(spec: HeadSpec, weight: FloatArray, bias: FloatArray, vectors: FloatArray) -> FloatArray:
    """What a head's ONNX file must answer, in NumPy: float32[B, H] -> float32[B, labels]."""
    logits = ((vectors.astype(np.float64) @ weight.T.astype(np.float64) + bias) / spec.temperature).astype(np.float32)
    return sigmoid(logits) if spec.multi_label else softmax(logits)


def _rounding(spec: HeadSpec, weight: FloatArray, bias: FloatArray, vectors: FloatArray) -> float:
    """How far float32 arithmetic may move a probability: half of a logit's error, which grows with the sum of the products' magnitudes.

    A product's and a sum's relative error is half an epsilon; so many sums in vector registers come to about one of the whole in practice
    (the bound of Higham 2002, section 3.1, grows with their number and is never met).
    """
    magnitude = (np.abs(vectors.astype(np.float64)) @ np.abs(weight.T.astype(np.float64)) + np.abs(bias)) / spec.temperature
    return float(0.5 * np.finfo(np.float32).eps * magnitude.max())


def write_linear_head(folder: Path, spec: HeadSpec, weight: FloatArray, bias: FloatArray) -> AdapterManifest:
    """Writes a head's folder, at once and only once: a reader sees all of it or nothing.

    `weight` float32[labels, H], `bias` float32[labels]. Raises AlreadyExists, and InvalidArgument for weights that are not of `spec`.
    """
    problem = _weights_problem(spec, {"weight": weight, "bias": bias})
    if problem:
        raise InvalidArgument(f"{problem} Expected float32 weights of the labels and the features' size.")
    from safetensors.numpy import save_file

    def fill(part: Path) -> None:
        save_file({"weight": np.ascontiguousarray(weight), "bias": np.ascontiguousarray(bias)}, part / WEIGHTS)
        (part / GRAPH).write_bytes(_graph(spec, weight, bias))
        manifest = AdapterManifest(**dict(spec), files={name: entry_of(part / name) for name in (WEIGHTS, GRAPH)})
        (part / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")

    write_folder(folder, fill)
    return read_adapter_manifest(folder)


def read_adapter_manifest(folder: Path) -> AdapterManifest:
    """The manifest in `folder`, without a look at the files. Raises ManifestInvalid."""
    return read_manifest(folder, AdapterManifest, "head")


def _read_weights(path: Path, manifest: AdapterManifest) -> tuple[FloatArray, FloatArray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    # Header, weight and bias: what is larger is something else, and is not read.
    limit = 4 * len(manifest.labels) * (manifest.features.size + 1) + (1 << 20)
    if path.stat().st_size > limit:
        raise ModelRejected(f"{path} has {path.stat().st_size} bytes; these labels and features have at most {limit}.", file=path.name)
    try:
        tensors = load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelRejected(f"{path} is no safetensors file: {str(error)[:200]}. Write the head again.", file=path.name) from None
    problem = _weights_problem(manifest, tensors)
    if problem:
        raise ModelRejected(f"{path}: {problem} Write the head again.", file=path.name)
    return tensors["weight"], tensors["bias"]


def _weights_problem(spec: HeadSpec, tensors: dict[str, Any]) -> str:
    """What is wrong with a head's tensors, or nothing."""
    shapes: dict[str, tuple[int, ...]] = {"weight": (len(spec.labels), spec.features.size), "bias": (len(spec.labels),)}
    if set(tensors) != set(shapes):
        return f"the tensors are {', '.join(sorted(tensors))[:200] or 'none'}; expected weight and bias."
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.dtype != np.float32 or tensor.shape != shape:
            return f"{name} is {tensor.dtype}{list(tensor.shape)}; expected float32{list(shape)}."
        if not math.isfinite(float(np.abs(tensor).max())):
            return f"{name} has values that are not finite."
    return ""


def _open_session(path: Path) -> Any:
    summary = scan_onnx(path)
    operators = {(domain if domain != "ai.onnx" else "", name) for domain, name in summary.operators}
    if operators - _OPERATORS or summary.functions or summary.external or summary.inputs != [INPUT] or summary.outputs != [OUTPUT]:
        raise ModelRejected(
            f"{path} is no linear head: it has inputs {summary.inputs[:4]}, outputs {summary.outputs[:4]} and operators "
            f"{sorted(name for _, name in operators)[:8]}; expected one product from {INPUT!r} to {OUTPUT!r}. Write the head again.",
            file=path.name,
        )
    ort = import_ort()
    options = ort.SessionOptions()
    # A product of a few hundred thousand values: threads would cost more than they give.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no public base
        raise ModelRejected(f"{path} is refused by ONNX Runtime: {str(error)[:300]}. Write the head again.", file=path.name) from None


def _graph(spec: HeadSpec, weight: FloatArray, bias: FloatArray) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Gemm", [INPUT, "weight", "bias"], ["raw"], transB=1),
        helper.make_node("Div", ["raw", "temperature"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], [OUTPUT])
        if spec.multi_label
        else helper.make_node("Softmax", ["logits"], [OUTPUT], axis=-1),
    ]
    values = {"weight": weight, "bias": bias, "temperature": np.asarray(spec.temperature, dtype=np.float32)}
    graph = helper.make_graph(
        nodes,
        f"{spec.name}-{spec.version}",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", spec.features.size])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", len(spec.labels)])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="understudy")
    return bytes(model.SerializeToString())
