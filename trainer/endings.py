"""What a process that trained has to see to before it ends."""

from __future__ import annotations

import ctypes
import sys


def keep_swig_types() -> None:
    """Keeps the type table of SWIG's modules until the process is gone.

    While the interpreter clears its modules, the destructor of that table may make an object of a type that has been cleared before it, and
    a process that did all its work ends with SIGSEGV (seen with sentencepiece 0.2.1, in SWIG_Python_DestroyModule under Py_FinalizeEx).
    One reference too many, and the destructor never runs; the system takes the memory back.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("swig_runtime_data"):
            for value in list(vars(module).values()):
                if type(value).__name__ == "PyCapsule":
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
