"""The scoring functions to use: the compiled ones, or the twins where UNDERSTUDY_NO_EXTENSIONS is set (debugging, no C compiler).

Chosen when imported and not changed later. A missing extension is an error, not a silent slowdown.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from native.scoring_py import FEATURES, LENGTH, STOP, TOOL_CALLS, UNKNOWN_FINISH

if TYPE_CHECKING or os.environ.get("UNDERSTUDY_NO_EXTENSIONS"):
    from native.scoring_py import Pair
else:
    from native.scoring import Pair

__all__ = ["FEATURES", "LENGTH", "STOP", "TOOL_CALLS", "UNKNOWN_FINISH", "Pair"]
