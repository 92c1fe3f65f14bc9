"""ONNX Runtime sessions: one thread pool for all of them, creation off the event loop, cancellable runs, memory really given back.

On CPUs sessions go through ONNX Runtime's C API (`native.session`), which shares a pool whose threads sleep when idle. Other execution
providers, graphs with text or non-tensor values, and builds of the package that lack the C library, go through its Python API.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib.util
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from native import session as native
from server.errors import Cancelled, InternalError, InvalidTensor, ModelRejected, OutOfMemory, UnderstudyError
from server.runtime.ort import import_ort

Array = npt.NDArray[Any]
_CPU = ("CPUExecutionProvider",)
_INVALID_ARGUMENT = 2  # OrtErrorCode


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """`threads` of the shared pool, the calling thread included; 0: one a usable core. `providers` in order of preference.

    `spinning` threads answer a little sooner on idle cores; on cores that others need too they cost them up to 60 % more time.
    """

    threads: int = 0
    providers: tuple[str, ...] = _CPU
    spinning: bool = False


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output. `shape` has a name (symbolic) or None (unknown) where the size may vary; `dtype` None: not a tensor of ours."""

    name: str
    dtype: np.dtype[Any] | None
    onnx_type: str
    shape: tuple[int | str | None, ...]


_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
}


class Stop(Protocol):
    """Ends one run from another thread, between two nodes of its graph; the run then raises Cancelled. For one run only."""

    @property
    def is_set(self) -> bool: ...

    def set(self) -> None: ...


class Binding(Protocol):
    """Arrays that stay bound to a session from run to run. Places count the inputs first, in the graph's order, then the bound outputs."""

    def put(self, place: int, array: Array) -> None:
        """Binds another contiguous array to a place, in full."""

    def shape(self, place: int, sizes: tuple[int, ...]) -> None:
        """From now on the first elements of the place's array, with this shape."""

    def run(self) -> None:
        """Runs the graph; the outputs' arrays hold what it gave. The GIL is free meanwhile. Raises as `Session.run`."""


class Session(ABC):
    """One loaded graph. `run` may be called from several threads at once; none may be inside it when `close` is called."""

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @abstractmethod
    def stop(self) -> Stop:
        """A new flag for one run."""

    @abstractmethod
    def close(self) -> None:
        """Drops the graph; `release_memory` afterwards gives its pages back to the system. May be called again."""

    @abstractmethod
    def bind(self, inputs: Sequence[Array], outputs: Mapping[str, Array]) -> Binding:
        """Keeps an array for each input, in the graph's order, and for some outputs. An input may be changed in place by the graph."""

    @abstractmethod
    def _run(self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None) -> list[Array]: ...

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None) -> list[Array]:
        """Runs the graph; the GIL is free meanwhile. The arrays returned are the caller's.

        Raises Cancelled when `stop` was set, OutOfMemory, InvalidTensor when ONNX Runtime refuses the feeds, else InternalError.
        """
        try:
            return self._run(feeds, outputs, stop)
        except Exception as error:
            raise translated(error, stop, self.path) from error


# A constant of malloc.h.
_M_MMAP_THRESHOLD = -3
LARGE_BLOCK_BYTES = 256 << 10


class Sessions:
    """Opens sessions with one set of settings. The pool is the process's: the first session decides its size."""

    _lock = threading.Lock()
    _environment: native.Environment | None = None

    def __init__(self, settings: SessionSettings | None = None) -> None:
        self.settings = settings or SessionSettings()
        _keep_large_blocks_apart()

    def open(self, path: Path) -> Session:
        """Loads a graph; blocks, with the GIL free, for up to seconds. Raises ModelRejected when ONNX Runtime refuses the file."""
        try:
            if self.settings.providers == _CPU and (environment := self._shared_environment()) is not None:
                session = _NativeSession(environment, path)
                if all(spec.dtype is not None for spec in (*session.inputs, *session.outputs)):
                    return session
                session.close()
            return _PythonSession(self.settings, path)
        except UnderstudyError:
            raise
        except Exception as error:
            raise ModelRejected(
                f"ONNX Runtime refused {path.name}: {error}; expected a valid graph of operators that it knows. Export the model again",
                file=path.name,
            ) from error

    async def open_async(self, path: Path) -> Session:
        """`open` in a thread; the event loop goes on meanwhile."""
        return await asyncio.to_thread(self.open, path)

    def _shared_environment(self) -> native.Environment | None:
        with Sessions._lock:
            if Sessions._environment is None and (library := _ort_library()) is not None:
                threads = self.settings.threads or usable_cores()
                Sessions._environment = native.Environment(library, threads, self.settings.spinning)
                _share_threads(threads)
            return Sessions._environment


class _NativeSession(Session):
    def __init__(self, environment: native.Environment, path: Path) -> None:
        self.path = path
        self._environment = environment
        self._native = native.NativeSession(environment, str(path), _kernels())
        self.inputs = tuple(spec_of(*one) for one in self._native.inputs)
        self.outputs = tuple(spec_of(*one) for one in self._native.outputs)
        self._places = {spec.name: i for i, spec in enumerate(self.outputs)}

    def stop(self) -> Stop:
        return native.Stop(self._environment)

    def close(self) -> None:
        self._native.close()

    def bind(self, inputs: Sequence[Array], outputs: Mapping[str, Array]) -> Binding:
        return _NativeBinding(self.path, self._native, list(inputs), [(self._places[name], array) for name, array in outputs.items()])

    def _run(self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None) -> list[Array]:
        assert stop is None or isinstance(stop, native.Stop), "made by another session's kind"
        values = self._native.run([feeds[spec.name] for spec in self.inputs], [self._places[name] for name in outputs], stop)
        return [np.asarray(value) for value in values]


class _NativeBinding:
    def __init__(self, path: Path, session: native.NativeSession, inputs: list[Array], outputs: list[tuple[int, Array]]) -> None:
        self._path = path
        try:
            self._native = native.Binding(session, inputs, outputs)
        except Exception as error:
            raise translated(error, None, path) from error
        self.put = self._native.put
        self.shape = self._native.shape

    def run(self) -> None:
        try:
            self._native.run()
        except Exception as error:
            raise translated(error, None, self._path) from error


class _PythonStop:
    def __init__(self) -> None:
        self.options = import_ort().RunOptions()
        self.options.log_severity_level = 4

    @property
    def is_set(self) -> bool:
        return bool(self.options.terminate)

    def set(self) -> None:
        self.options.terminate = True


class _PythonSession(Session):
    def __init__(self, settings: SessionSettings, path: Path) -> None:
        from server.runtime import kernels

        ort = import_ort()
        options = ort.SessionOptions()
        options.intra_op_num_threads = settings.threads or usable_cores()
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.spinning else "0")
        options.enable_mem_pattern = False  # a pattern is kept for every input shape ever seen, and packed batches hardly repeat one
        options.log_severity_level = 4  # errors are raised with their text; fatal ones alone are printed
        kernels.register(options)
        self.path = path
        self._native: Any = ort.InferenceSession(str(path), options, providers=list(settings.providers))
        self.inputs = tuple(spec_of(node.name, node.type, node.shape) for node in self._native.get_inputs())
        self.outputs = tuple(spec_of(node.name, node.type, node.shape) for node in self._native.get_outputs())

    def stop(self) -> Stop:
        return _PythonStop()

    def close(self) -> None:
        self._native = None

    def bind(self, inputs: Sequence[Array], outputs: Mapping[str, Array]) -> Binding:
        return _PythonBinding(self, inputs, outputs)

    def _run(self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None) -> list[Array]:
        assert stop is None or isinstance(stop, _PythonStop), "made by another session's kind"
        result: list[Array] = self._native.run(list(outputs), dict(feeds), None if stop is None else stop.options)
        return result


class _PythonBinding:
    """The same by a plain run a time: for the processor, where a run reads its inputs in place, and copies of the outputs."""

    def __init__(self, session: _PythonSession, inputs: Sequence[Array], outputs: Mapping[str, Array]) -> None:
        self._session = session
        self._arrays = [*inputs, *outputs.values()]
        self._views = list(self._arrays)
        self._names = list(outputs)

    def put(self, place: int, array: Array) -> None:
        self._arrays[place] = self._views[place] = array

    def shape(self, place: int, sizes: tuple[int, ...]) -> None:
        size = int(np.prod(sizes))
        flat = self._arrays[place].reshape(-1)
        if size > flat.size:
            raise ValueError(f"{sizes} is more than the array holds")
        self._views[place] = flat[:size].reshape(sizes)

    def run(self) -> None:
        specs = self._session.inputs
        feeds = {spec.name: view for spec, view in zip(specs, self._views, strict=False)}
        for place, result in enumerate(self._session.run(feeds, self._names), len(specs)):
            np.copyto(self._views[place], result)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def release_memory() -> None:
    """Collects garbage and gives free heap pages back to the system; call after dropping a session. Takes some milliseconds."""
    gc.collect()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _keep_large_blocks_apart() -> None:
    """Has weights mapped one by one, so that unloading a model leaves no holes between what other models and requests still use.

    glibc raises its own threshold each time that a large block is freed, and then puts weights on the heap, where they scatter:
    after 20 swaps of a 58 MB model the process had grown by 10 % without this, by 1 % with it.
    """
    options = _glibc("mallopt")
    if options is not None:
        options(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def _glibc(name: str) -> Any:
    """A function of glibc's allocator, or None on other systems."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _ort_library() -> str | None:
    """ONNX Runtime's shared library inside its Python package, which is not imported for it; None where the package has none."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library makes its environment
    spec = importlib.util.find_spec("onnxruntime")
    folders = spec.submodule_search_locations if spec is not None else None
    found = [path for folder in folders or () for path in sorted((Path(folder) / "capi").glob("libonnxruntime*")) if _is_main(path.name)]
    return str(found[0]) if found else None


def _is_main(name: str) -> bool:
    return name.startswith(("libonnxruntime.so", "libonnxruntime.dylib", "libonnxruntime.1"))


def _share_threads(threads: int) -> None:
    from server.runtime import kernels

    kernels.share_threads(threads)


def _kernels() -> str:
    from server.runtime import kernels

    kernels.isa_name()  # says why, where no build can run here
    return str(kernels.library_path())


def spec_of(name: str, onnx_type: str, sizes: Sequence[Any]) -> TensorSpec:
    """What ONNX Runtime says of an input or output."""
    dtype = _DTYPES.get(onnx_type)
    shape = tuple(size if isinstance(size, (int, str)) else None for size in sizes)
    return TensorSpec(name, None if dtype is None else np.dtype(dtype), onnx_type, shape)


def translated(error: Exception, stop: Stop | None, path: Path) -> UnderstudyError:
    """Our error for one that a run of ONNX Runtime raised; `stop`: that run's flag."""
    text = str(error)
    if stop is not None and stop.is_set:
        return Cancelled("the run was ended because every caller of its batch had left")
    if "Failed to allocate memory" in text or "bad_alloc" in text or isinstance(error, MemoryError):
        return OutOfMemory(f"not enough memory to run {path.name} on this input; send less at a time", retry_after_s=1.0)
    if isinstance(error, ValueError) or "INVALID_ARGUMENT" in text or getattr(error, "code", 0) == _INVALID_ARGUMENT:
        return InvalidTensor(f"the graph does not take this input: {text.split('INVALID_ARGUMENT', 1)[-1].lstrip(' :')}")
    return InternalError(f"{path.name} failed to run: {text}")
