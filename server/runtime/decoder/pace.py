"""How many prompt tokens may enter a step while answers run, from measured times. Arithmetic alone."""

from __future__ import annotations

_DECAY = 0.97
_LEAST_SPREAD = 4.0
_SLOWEST = 3.0  # however many prompts wait, a step takes at most so much longer than without them


class Line:
    """y = offset + slope * x by least squares over recent points; older ones fade. Both are at least 0."""

    def __init__(self, slope: float = 0.0, offset: float = 0.0) -> None:
        self.slope = slope
        self.offset = offset
        self.points = 0
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def record(self, x: float, y: float) -> None:
        """One more point."""
        if self.points >= 8:  # a pause of the machine is no cost of the model
            y = min(y, 3.0 * self.at(x))
        self.points += 1
        self._n = self._n * _DECAY + 1.0
        self._x = self._x * _DECAY + x
        self._y = self._y * _DECAY + y
        self._xx = self._xx * _DECAY + x * x
        self._xy = self._xy * _DECAY + x * y
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x * mean_x
        if spread > _LEAST_SPREAD:
            self.slope = max(0.0, (self._xy / self._n - mean_x * mean_y) / spread)
        elif self.points == 1 and self.slope == 0.0 and x > 0.0:
            self.slope = y / x  # nothing else is known: as if all of it were proportional
        self.offset = mean_y - self.slope * mean_x
        if self.offset < 0.0:
            self.offset, self.slope = 0.0, mean_y / mean_x if mean_x > 0.0 else self.slope

    def at(self, x: float) -> float:
        """The value expected there."""
        return self.offset + self.slope * x


class Pace:
    """What a step of decode rows takes, and what tokens of prompts add to it.

    `share`: prompts may add this share of the time of the decode rows, times prompts over answers where prompts are more.
    """

    def __init__(self, share: float, least: int) -> None:
        self._share = share
        self._least = least
        self._decode = Line()
        self._chunk = Line()

    def record(self, rows: int, chunk: int, seconds: float) -> None:
        """A step of `rows` decode rows and `chunk` prompt tokens took `seconds`."""
        if chunk == 0:
            self._decode.record(rows, seconds)
        else:
            base = self._decode.at(rows) if rows and self._decode.points else 0.0
            self._chunk.record(chunk, max(0.0, seconds - base))

    def decode_seconds(self, rows: int) -> float:
        """What a step of so many decode rows takes; 0 before anything was measured."""
        return self._decode.at(rows)

    def chunk(self, rows: int, prompts: int) -> int:
        """Prompt tokens that may enter a step of `rows` answers while `prompts` prompts have not been run."""
        base = self._decode.at(rows)
        if base <= 0.0 or self._chunk.slope <= 0.0:
            return self._least
        extra = min(_SLOWEST, self._share * max(1.0, prompts / rows)) * base
        return max(self._least, int((extra - self._chunk.offset) / self._chunk.slope))
