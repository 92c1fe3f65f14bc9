"""The one door to ONNX Runtime: telemetry is off before its first import, and our kernels are in every session."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any


def import_ort() -> ModuleType:
    """ONNX Runtime's module. Its wheels phone home by default, and read this variable once, at import."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    module: ModuleType = onnxruntime
    return module


def session_options(threads: int = 0) -> Any:
    """Options of a session that knows our operators. `threads`: of the session's own pool; 0 leaves ONNX Runtime's default."""
    from server.runtime import kernels

    options = import_ort().SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    kernels.register(options)
    return options
