"""What the Open Inference Protocol shows of models: metadata, configuration, statistics."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from server.api.open_inference_codec import DATATYPES
from server.api.open_inference_text import TextTensor, form_of
from server.core import Timings
from server.runtime.manifest import Manifest
from server.runtime.sessions import TensorSpec
from understudy.oip import open_inference_pb2 as pb

PLATFORM = "onnxruntime_onnx"
_TO_CONFIG = {name: getattr(pb, f"TYPE_{'STRING' if name == 'BYTES' else name}") for name in [*DATATYPES, "BF16"]}
_ONNX_TYPES = {"tensor(string)": "BYTES", "tensor(bfloat16)": "BF16", "tensor(float16)": "FP16", "tensor(float)": "FP32"}
_ONNX_TYPES |= {"tensor(double)": "FP64", "tensor(bool)": "BOOL"}
_ONNX_TYPES |= {f"tensor({sign}int{bits})": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


class RawModel(Protocol):
    """The part of `server.runtime.tensor_engine.TensorEngine` that is shown. `batched`: the first axis joins callers."""

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...

    @property
    def outputs(self) -> Sequence[TensorSpec]: ...

    @property
    def batched(self) -> bool: ...


def datatype(spec: TensorSpec) -> str:
    """The wire's name of a tensor's type; its ONNX type where the wire has none."""
    return _ONNX_TYPES.get(spec.onnx_type, spec.onnx_type)


def shape(spec: TensorSpec) -> list[int]:
    """Sizes, -1 where any is taken."""
    return [size if isinstance(size, int) and size >= 0 else -1 for size in spec.shape]


def metadata(manifest: Manifest, model: RawModel | None, versions: Sequence[str]) -> pb.ModelMetadataResponse:
    """Inputs and outputs of the graph, where it takes raw tensors, then those of the text form."""
    response = pb.ModelMetadataResponse(name=manifest.name, versions=versions, platform=PLATFORM)
    for target, specs in ((response.inputs, model.inputs), (response.outputs, model.outputs)) if model is not None else ():
        for spec in specs:
            target.add(name=spec.name, datatype=datatype(spec), shape=shape(spec))
    form = form_of(manifest)
    if form is not None:
        for target, tensors in ((response.inputs, form.inputs), (response.outputs, form.outputs)):
            for tensor in tensors:
                target.add(name=tensor.name, datatype=tensor.datatype, shape=[-1, *tensor.shape])
    return response


def config(manifest: Manifest, model: RawModel | None, max_items: int) -> pb.ModelConfigResponse:
    """How the model is set up; shapes leave the batch axis out where there is one."""
    form = form_of(manifest)
    batched = model is not None and model.batched
    found = pb.ModelConfig(
        name=manifest.name,
        platform=PLATFORM,
        backend="onnxruntime",
        default_model_filename="model.onnx",
        max_batch_size=max_items if batched else 0,
        instance_group=[pb.ModelInstanceGroup(name=manifest.name, count=1, kind=pb.ModelInstanceGroup.KIND_CPU)],
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=manifest.form == "decoder"),
    )
    if batched or form is not None:
        found.dynamic_batching.priority_levels = 3
        found.dynamic_batching.default_priority_level = 2
    begin = 1 if batched else 0
    text = [] if form is None else form.inputs
    for spec in model.inputs if model is not None else ():
        found.input.add(name=spec.name, data_type=_data_type(datatype(spec)), dims=shape(spec)[begin:], optional=form is not None)
    for tensor in text:
        found.input.add(name=tensor.name, data_type=_data_type(tensor.datatype), dims=_dims(tensor, batched), optional=True)
    for spec in model.outputs if model is not None else ():
        found.output.add(name=spec.name, data_type=_data_type(datatype(spec)), dims=shape(spec)[begin:])
    for tensor in [] if form is None else form.outputs:
        found.output.add(name=tensor.name, data_type=_data_type(tensor.datatype), dims=_dims(tensor, batched))
    facts: Mapping[str, object] = {
        "task": manifest.task.value,
        "form": manifest.form,
        "dtype": manifest.dtype,
        "architecture": manifest.architecture,
        "max_tokens": manifest.max_tokens if form is not None else "",
        "version": manifest.version,
        "license": manifest.license,
    }
    for key, value in facts.items():
        if value:
            found.parameters[key].string_value = str(value)
    return pb.ModelConfigResponse(config=found)


def _dims(tensor: TextTensor, batched: bool) -> list[int]:
    return [*tensor.shape] if batched else [-1, *tensor.shape]


def _data_type(name: str) -> int:
    return int(_TO_CONFIG.get(name, pb.TYPE_INVALID))


@dataclass(slots=True)
class Counted:
    """What one model version answered through this protocol. Counts, and seconds all together."""

    last_ms: int = 0
    entries: int = 0
    success: int = 0
    success_s: float = 0.0
    fail: int = 0
    fail_s: float = 0.0
    stages: Timings = field(default_factory=Timings)

    def answered(self, entries: int, seconds: float, timings: Timings) -> None:
        """One more request with `entries` along its batch axis."""
        self.last_ms = time.time_ns() // 1_000_000
        self.entries += entries
        self.success += 1
        self.success_s += seconds
        stages = self.stages
        stages.queue += timings.queue
        stages.tokenize += timings.tokenize
        stages.run += timings.run
        stages.post += timings.post

    def failed(self, seconds: float) -> None:
        """One more request that got an error."""
        self.fail += 1
        self.fail_s += seconds

    def show(self, name: str, version: str, memory_bytes: int) -> pb.ModelStatistics:
        """The protocol's message. Each stage counts the requests that were answered."""

        def took(count: int, seconds: float) -> pb.StatisticDuration:
            return pb.StatisticDuration(count=count, ns=int(seconds * 1e9))

        return pb.ModelStatistics(
            name=name,
            version=version,
            last_inference=self.last_ms,
            inference_count=self.entries,
            execution_count=self.success,
            inference_stats=pb.InferStatistics(
                success=took(self.success, self.success_s),
                fail=took(self.fail, self.fail_s),
                queue=took(self.success, self.stages.queue),
                compute_input=took(self.success, self.stages.tokenize),
                compute_infer=took(self.success, self.stages.run),
                compute_output=took(self.success, self.stages.post),
            ),
            memory_usage=[pb.MemoryUsage(type="CPU", byte_size=memory_bytes)] if memory_bytes else [],
        )
