"""The sampling functions to use: the compiled ones, or the twins where UNDERSTUDY_NO_EXTENSIONS is set (debugging, no C compiler).

Chosen when imported and not changed later. A missing extension is an error, not a silent slowdown.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from native.sampling_py import TOP_MOST, rank

if TYPE_CHECKING or os.environ.get("UNDERSTUDY_NO_EXTENSIONS"):
    from native.sampling_py import RowState, SampleBuffers, sample
else:
    from native.sampling import RowState, SampleBuffers, sample

__all__ = ["TOP_MOST", "RowState", "SampleBuffers", "rank", "sample"]
