"""How processes that trained end."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The destructor of a capsule that stands where SWIG's table of types does tells when it runs.
CODE = """
import ctypes, sys, types
from trainer.endings import keep_swig_types

said = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: print("destroyed", flush=True))
new = ctypes.pythonapi.PyCapsule_New
new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
table = types.ModuleType("swig_runtime_data4")
table.type_pointer_capsule = new(1, None, ctypes.cast(said, ctypes.c_void_p))
sys.modules[table.__name__] = table
if {keep}:
    keep_swig_types()
del sys.modules[table.__name__], table
"""


@pytest.mark.parametrize("keep", [True, False])
def test_swigs_table_outlives_the_interpreters_modules(keep: bool) -> None:
    done = subprocess.run([sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, text=True, check=True)
    assert ("destroyed" in done.stdout) is not keep
