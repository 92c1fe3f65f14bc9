"""The text features to use: the compiled ones, or the twin where UNDERSTUDY_NO_EXTENSIONS is set (debugging, no C compiler).

Chosen when imported and not changed later. A missing extension is an error, not a silent slowdown.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from native.text_features_py import FORMS, MAX_BYTES, VERSION

if TYPE_CHECKING or os.environ.get("UNDERSTUDY_NO_EXTENSIONS"):
    from native.text_features_py import extract
else:
    from native.text_features import extract

__all__ = ["FORMS", "MAX_BYTES", "VERSION", "extract"]
