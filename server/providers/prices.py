"""What a model costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from server.core import Usage


@dataclass(slots=True, frozen=True)
class Price:
    """US dollars a million tokens, which are also millionths of a dollar a token."""

    input: float
    output: float

    def cost_micro_usd(self, usage: Usage) -> int:
        """Rounded up, so that a sum of costs is never less than the bill."""
        # The product of a price like 0.15 and a count is a hair above the true value: without rounding first, ceil would add a unit.
        return math.ceil(round(usage.input * self.input + usage.output * self.output, 6))
