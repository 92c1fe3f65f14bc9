"""Steps of a decoder on a device, by ONNX Runtime's own operators: pages stay there, a step's inputs go there, logits come back.

Never executed on a GPU: tests run all of this on the processor, with a graph of plain operators in place of the one for CUDA.
The graph is stated in server/runtime/graphs/decoder/cuda.py. LoRA, prefix tuning and prompt tuning are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from server.core import FloatArray
from server.errors import ModelRejected
from server.runtime.decoder.contract import page_bytes
from server.runtime.decoder.kv import Bytes
from server.runtime.decoder.step import StepLimits, StepRunner
from server.runtime.manifest import Decoder
from server.runtime.ort import import_ort
from server.runtime.sessions import Array, Binding, Session, Stop, spec_of, translated

FORM: Literal["cuda"] = "cuda"
COPY = "copy.cuda.onnx"
CUDA = "CUDAExecutionProvider"
NO_ADAPTERS = "on CUDA models are served without adapters. Serve this model on the processor, or merge the adapter into its weights."
# The operator's scan over sequences has so many places.
_MOST_SEQUENCES = 256
_METADATA = "attention_metadata"


def device_decoder(decoder: Decoder, page: int = 0) -> Decoder:
    """The decoder as its form for CUDA sees it: float16 pages of its own size, no adapters.

    FlashAttention reads pages in tiles that must lie in one page; their size depends on the heads'. On smaller ones ONNX Runtime gathers
    every context before it attends. Source: docs/contrib_ops/cuda/paged_attention.md of ONNX Runtime, 18.1.
    """
    page = page or (256 if decoder.head_dim <= 64 else 128 if decoder.head_dim <= 128 else 64)
    size = page_bytes(decoder.kv_heads, decoder.head_dim, "float16", page)
    graphs = {FORM: decoder.graphs[FORM]}
    return decoder.model_copy(update={"graphs": graphs, "kv_dtype": "float16", "page": page, "page_bytes": size, "lora": None})


class DeviceSession(Session):
    """The graph of a device and the one that copies pages, with the caches that they share. `inputs` and `outputs` leave caches out.

    `device` is "cuda" or "cpu", as ONNX Runtime calls them. Raises ModelRejected where its execution provider cannot be loaded.
    """

    def __init__(self, path: Path, copy: Path, device: str = "cuda") -> None:
        self.path, self._device = path, device
        provider = CUDA if device == "cuda" else "CPUExecutionProvider"
        self._native, self._copy = (_open(one, provider) for one in (path, copy))
        listed = self._native.get_inputs()
        self._cached = [node.name for node in listed if "_cache." in node.name]
        if not self._cached or not self._cached == [node.name for node in self._copy.get_inputs()][2:]:
            raise ModelRejected(
                f"{path.name} and {copy.name} take other caches than each other, or none; expected a decoder's form for CUDA. "
                "Export the model again.",
                file=path.name,
            )
        specs = [spec_of(node.name, node.type, node.shape) for node in listed]
        self.inputs = tuple(spec for spec in specs if spec.name not in {*self._cached, _METADATA})
        self.outputs = tuple(spec_of(node.name, node.type, node.shape) for node in self._native.get_outputs() if "_cache_" not in node.name)
        self._caches: dict[str, Any] = {}
        self._copying: Any = None

    @classmethod
    def of(cls, decoder: Decoder, paths: Mapping[str, Path]) -> DeviceSession:
        """The form for CUDA of a model's files by name. Raises ModelRejected."""
        if COPY not in paths:
            raise ModelRejected(f"the model has a form for CUDA without {COPY}. Export the model again.", file=COPY)
        return cls(paths[decoder.graphs[FORM]], paths[COPY])

    def allocate(self, decoder: Decoder, pages: int) -> None:
        """Makes the caches, all zeros: no page has values that attention could not mask. Raises OutOfMemory."""
        ort = import_ort()
        shape = (pages, decoder.page, decoder.kv_heads, decoder.head_dim)
        try:
            # An array each: on the processor it is the cache's memory.
            for name in self._cached:
                self._caches[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float16), self._device, 0)
            self._copying = self._with_caches(self._copy)
        except Exception as error:
            raise translated(error, None, self.path) from error

    def copy_page(self, source: int, target: int) -> None:
        """Copies a page in all layers, on the device."""
        self._copying.bind_cpu_input("source", np.array([source], np.int64))
        self._copying.bind_cpu_input("target", np.array([[target]], np.int64))
        try:
            _run(self._copy, self._copying)
        except Exception as error:
            raise translated(error, None, self.path) from error

    def stop(self) -> Stop:
        """Not for this one: a step is never ended halfway."""
        raise AssertionError("a decoder's steps are not stopped")

    def close(self) -> None:
        self._native = self._copy = self._copying = None
        self._caches = {}

    def bind(self, inputs: Sequence[Array], outputs: Mapping[str, Array]) -> Binding:
        return _DeviceBinding(self.path, self._native, self._with_caches(self._native), (self._names(), [*inputs, *outputs.values()]))

    def _run(self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None) -> list[Array]:
        raise AssertionError("a decoder runs bound to its caches")

    def _names(self) -> list[str]:
        return [spec.name for spec in (*self.inputs, *self.outputs)]

    def _with_caches(self, session: Any) -> Any:
        assert self._caches, "allocated first"
        binding = session.io_binding()
        for name, value in self._caches.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("_cache.", "_cache_out."), value)
        return binding


class _DeviceBinding:
    """Inputs are copied to the device as they are bound, so each run binds them anew; the logits come back to their array."""

    def __init__(self, path: Path, session: Any, binding: Any, bound: tuple[list[str], list[Array]]) -> None:
        self._path, self._session, self._binding = path, session, binding
        self._names, self._arrays = bound
        self._views = list(self._arrays)

    def put(self, place: int, array: Array) -> None:
        self._arrays[place] = self._views[place] = array

    def shape(self, place: int, sizes: tuple[int, ...]) -> None:
        size = int(np.prod(sizes))
        flat = self._arrays[place].reshape(-1)
        if size > flat.size:
            raise ValueError(f"{sizes} is more than the array holds")
        self._views[place] = flat[:size].reshape(sizes)

    def run(self) -> None:
        try:
            self._bind()
            _run(self._session, self._binding)
        except Exception as error:
            raise translated(error, None, self._path) from error

    def _bind(self) -> None:
        *inputs, logits = zip(self._names, self._views, strict=True)
        views = dict(inputs)
        # The operator does not look at unused entries, but nothing states that it never loads what they point to.
        views["block_table"] = np.maximum(views["block_table"], 0)
        counts = np.diff(views["cu_seqlens"])
        # Known here, so that the device need not be asked for them in every layer.
        views[_METADATA] = np.array([counts.max(), (views["past_lens"] + counts).max()], np.int32)
        for name, view in views.items():
            self._binding.bind_cpu_input(name, view)
        name, view = logits
        self._binding.bind_output(name, "cpu", 0, np.float32, view.shape, view.ctypes.data)


class DeviceRunner(StepRunner):
    """A StepRunner whose pages are a DeviceSession's caches. Raises ModelRejected where a step has too many sequences, OutOfMemory."""

    def __init__(
        self, decoder: Decoder, sessions: Mapping[str, Session], pages: int, limits: StepLimits, bank: Mapping[str, Array] | None = None
    ) -> None:
        session = sessions[FORM]
        assert isinstance(session, DeviceSession) and bank is None, "opened for this runner, without adapters"
        if limits.sequences > _MOST_SEQUENCES:
            raise ModelRejected(
                f"generation.max_sequences is {limits.sequences}; on CUDA a step takes {_MOST_SEQUENCES} sequences. Set it to that or less."
            )
        self._session = session
        session.allocate(decoder, pages)
        super().__init__(decoder, sessions, pages, limits)

    def copy_page(self, source: int, target: int) -> None:
        """Copies a page in all layers, by a small graph on the device."""
        self._session.copy_page(source, target)

    def write_prefix(self, pages: Sequence[int], keys: FloatArray, values: FloatArray) -> None:
        """Refused: raises ModelRejected."""
        raise ModelRejected(NO_ADAPTERS)

    def run_embeddings(self, form: str, pages: Sequence[int], rows: FloatArray) -> None:
        """Refused: raises ModelRejected."""
        raise ModelRejected(NO_ADAPTERS)

    def _make_pool(self, pages: int) -> Bytes:
        return np.empty((self.kv.decoder.layers, pages, 0), np.uint8)


def _run(session: Any, binding: Any) -> None:
    binding.synchronize_inputs()
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()


def _open(path: Path, provider: str) -> Any:
    ort = import_ort()
    options = ort.SessionOptions()
    options.enable_mem_pattern = False  # a pattern is kept for every input shape ever seen, and steps hardly repeat one
    options.log_severity_level = 4
    providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
    try:
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
        failure = None
    except Exception as error:
        session, failure = None, error
    # Where the provider's libraries are missing, ONNX Runtime leaves it out; then the graph finds no kernels, or runs elsewhere.
    if session is None or provider not in session.get_providers():
        raise ModelRejected(
            f"{path.name} could not be opened by {provider}: {failure or 'ONNX Runtime left the provider out'}. It needs a GPU with its "
            "driver, onnxruntime-gpu 1.31 or later in place of onnxruntime, and the CUDA and cuDNN libraries of its release where the "
            "system's loader finds them. Mend that, or set runtime.execution_providers to CPUExecutionProvider.",
            file=path.name,
        ) from failure
    return session
