"""ONNX Runtime sessions through its C API: one thread pool for all, threads that do not spin, no GIL while a graph is loaded or run."""

from typing import Any

API_VERSION: int
TYPES: dict[int, tuple[str, bytes, int]]

class OrtFailure(Exception):
    """What ONNX Runtime says went wrong; `code` is its OrtErrorCode (1 fail, 2 invalid argument, 3 no such file, ...)."""

    code: int

class Environment:
    """ONNX Runtime's library and its thread pool. Lives as long as the process: the library allows one environment."""

    def __init__(self, library: str, threads: int, spinning: bool) -> None: ...
    @property
    def version(self) -> str: ...

class Stop:
    """Ends one run from another thread, between two nodes of its graph."""

    def __init__(self, environment: Environment) -> None: ...
    @property
    def is_set(self) -> bool: ...
    def set(self) -> None: ...

class Value:
    """A tensor that ONNX Runtime allocated, as a buffer; freed with its last view."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

class NativeSession:
    """A loaded graph. `inputs` and `outputs` are (name, ONNX type, sizes: int, str or None) each; a type not in TYPES is "other"."""

    def __init__(self, environment: Environment, path: str, kernels: str = "") -> None: ...
    @property
    def inputs(self) -> list[tuple[str, str, tuple[int | str | None, ...]]]: ...
    @property
    def outputs(self) -> list[tuple[str, str, tuple[int | str | None, ...]]]: ...
    def run(self, arrays: list[Any], wanted: list[int], stop: Stop | None) -> list[Value]: ...
    def close(self) -> None: ...

class Binding:
    """Arrays that stay bound to a session's inputs and outputs from run to run; each may be used in part, with a shape of its own.

    One thread uses it at a time. It keeps the arrays and the session's object alive, and must not run after the session's `close`.
    Places count the inputs first, in order, then `outputs`.
    """

    def __init__(self, session: NativeSession, inputs: list[Any], outputs: list[tuple[int, Any]]) -> None: ...
    def put(self, place: int, array: Any) -> None: ...
    def shape(self, place: int, sizes: tuple[int, ...]) -> None: ...
    def run(self, stop: Stop | None = None) -> None: ...
