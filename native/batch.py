"""The batching functions to use: the compiled ones, or the twins where UNDERSTUDY_NO_EXTENSIONS is set (debugging, no C compiler).

Chosen when imported and not changed later. A missing extension is an error, not a silent hundredfold slowdown.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING or os.environ.get("UNDERSTUDY_NO_EXTENSIONS"):
    from native.batching_py import CLS, LAST, MEAN, NONE, BatchQueue, pack, pack_padded, pool, sigmoid, softmax, top_k
else:
    from native.batching import CLS, LAST, MEAN, NONE, BatchQueue, pack, pack_padded, pool, sigmoid, softmax, top_k

__all__ = ["CLS", "LAST", "MEAN", "NONE", "BatchQueue", "pack", "pack_padded", "pool", "sigmoid", "softmax", "top_k"]
