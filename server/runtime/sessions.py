"""ONNX Runtime sessions: threads that do not spin, creation off the event loop, cancellable runs, memory really given back."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from server.errors import Cancelled, InternalError, InvalidTensor, ModelRejected, OutOfMemory, UnderstudyError
from server.runtime.ort import import_ort

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """`threads` of the shared pool, the calling thread included; 0: one a usable core. `providers` in order of preference."""

    threads: int = 0
    providers: tuple[str, ...] = ("CPUExecutionProvider",)


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


class Stop:
    """Ends one run from another thread; the run then raises Cancelled. For one run only."""

    def __init__(self) -> None:
        self._options = import_ort().RunOptions()

    def set(self) -> None:
        """Takes effect between two nodes of the graph."""
        self._options.terminate = True

    @property
    def is_set(self) -> bool:
        return bool(self._options.terminate)

    @property
    def options(self) -> Any:
        return self._options


class Session:
    """One loaded graph. `run` may be called from several threads at once; none may be inside it when `close` is called."""

    def __init__(self, native: Any, path: Path) -> None:
        self._native: Any = native
        self.path = path
        self.inputs = tuple(_spec(node) for node in native.get_inputs())
        self.outputs = tuple(_spec(node) for node in native.get_outputs())

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None) -> list[Array]:
        """Runs the graph; the GIL is free meanwhile. The arrays returned are the caller's.

        Raises Cancelled when `stop` was set, OutOfMemory, InvalidTensor when ONNX Runtime refuses the feeds, else InternalError.
        """
        try:
            result: list[Array] = self._native.run(list(outputs), dict(feeds), None if stop is None else stop.options)
        except Exception as error:
            raise _translated(error, stop, self.path) from error
        return result

    def close(self) -> None:
        """Drops the graph; `release_memory` afterwards gives its pages back to the system."""
        self._native = None


class Sessions:
    """Opens sessions with one set of settings."""

    def __init__(self, settings: SessionSettings | None = None) -> None:
        self.settings = settings or SessionSettings()

    def open(self, path: Path) -> Session:
        """Loads a graph; blocks (hashing and optimising take up to seconds). Raises ModelRejected when ONNX Runtime refuses the file."""
        ort = import_ort()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.settings.threads or usable_cores()
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_mem_pattern = False  # a pattern is kept for every input shape ever seen, and packed batches hardly repeat one
        options.log_severity_level = 4  # errors are raised with their text; fatal ones alone are printed
        if _uses_our_operators(path):
            from server.runtime import kernels

            kernels.register(options)
        try:
            native = ort.InferenceSession(str(path), options, providers=list(self.settings.providers))
        except Exception as error:
            raise ModelRejected(
                f"ONNX Runtime refused {path.name}: {error}; expected a valid graph of operators that it knows. Export the model again",
                file=path.name,
            ) from error
        return Session(native, path)

    async def open_async(self, path: Path) -> Session:
        """`open` in a thread; the event loop goes on meanwhile."""
        return await asyncio.to_thread(self.open, path)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def release_memory() -> None:
    """Collects garbage and gives free heap pages back to the system; call after dropping a session. Takes some milliseconds."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def _uses_our_operators(path: Path) -> bool:
    """Whether the graph's file names our operator domain; a file that merely contains the word gets the kernels registered for nothing."""
    import mmap

    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"understudy") != -1


def _spec(node: Any) -> TensorSpec:
    dtype = _DTYPES.get(node.type)
    shape = tuple(size if isinstance(size, (int, str)) else None for size in node.shape)
    return TensorSpec(node.name, None if dtype is None else np.dtype(dtype), node.type, shape)


def _translated(error: Exception, stop: Stop | None, path: Path) -> UnderstudyError:
    text = str(error)
    if stop is not None and stop.is_set:
        return Cancelled("the run was ended because every caller of its batch had left")
    if "Failed to allocate memory" in text or "bad_alloc" in text or isinstance(error, MemoryError):
        return OutOfMemory(f"not enough memory to run {path.name} on this input; send less at a time", retry_after_s=1.0)
    if "INVALID_ARGUMENT" in text:
        return InvalidTensor(f"the graph does not take this input: {text.split('INVALID_ARGUMENT', 1)[1].lstrip(' :')}")
    return InternalError(f"{path.name} failed to run: {text}")
