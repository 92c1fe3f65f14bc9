"""How many prompt tokens may enter a step while answers run, from measured times. Arithmetic alone."""

from __future__ import annotations

from bisect import bisect_right

_FADE = 0.9
_RISE = 0.75  # a token that costs more than thought is believed sooner: answers that stall are worse than a prompt that waits
_SLOWEST = 3.0  # however many prompts wait, a step takes at most so much longer than without them
_LOOK_AFTER = 12  # steps with pieces of prompts, until one without them shows again what the answers alone take
_LONGEST_ALONE_S = 0.4
_LEAST_ALONE = 128
_CREDIBLE = 3.0  # a step that took so many times longer than expected shows a pause of the machine, not what it costs


class Pace:
    """What a step of decode rows takes, and what tokens of prompts add to it.

    First runs give the curve over rows and the cost of a token (`learn`, `learn_token`); what steps then take (`record`) gives one factor
    for each: so a few noisy steps cannot bend the curve.
    `share`: prompts may add this share of the time of the decode rows, times prompts over answers where prompts are more.
    """

    def __init__(self, share: float, least: int) -> None:
        self._share = share
        self._least = least
        self._rows: list[int] = []
        self._seconds: list[float] = []
        self._decode = 1.0
        self._token_s = 0.0
        self._chunk_steps = 0

    def learn(self, rows: int, seconds: float) -> None:
        """A step of `rows` decode rows takes so long; called with growing rows. A curve that falls is noise, and is kept level."""
        assert not self._rows or rows > self._rows[-1], "in order"
        self._rows.append(rows)
        self._seconds.append(max(seconds, *self._seconds[-1:]) if self._seconds else seconds)

    def learn_token(self, seconds: float) -> None:
        """A token more of a prompt takes so long."""
        self._token_s = max(seconds, 1e-9)

    def record(self, rows: int, chunk: int, seconds: float) -> None:
        """A step of `rows` decode rows and `chunk` prompt tokens took `seconds`."""
        if chunk == 0:
            self._chunk_steps = 0
            if not self._rows:
                self.learn(rows, seconds)
            factor = min(seconds / self._curve(rows), _CREDIBLE * self._decode)
            self._decode = _FADE * self._decode + (1.0 - _FADE) * factor
        else:
            self._chunk_steps += rows > 0
            each = max(0.0, seconds - (self.decode_seconds(rows) if rows else 0.0)) / chunk
            if self._token_s == 0.0:
                self._token_s = max(each, 1e-9)
            fade = _FADE if each < self._token_s else _RISE
            self._token_s = max(1e-9, fade * self._token_s + (1.0 - fade) * min(each, _CREDIBLE * self._token_s))

    def decode_seconds(self, rows: int) -> float:
        """What a step of so many decode rows takes; 0 before anything was measured."""
        return self._decode * self._curve(rows) if self._rows else 0.0

    def chunk(self, rows: int, prompts: int) -> int:
        """Prompt tokens that may enter a step of `rows` answers while `prompts` prompts have not been run.

        Without answers a step is bounded too, so that whoever comes or leaves meanwhile does not wait for long.
        """
        if rows == 0:
            return max(_LEAST_ALONE, int(_LONGEST_ALONE_S / self._token_s)) if self._token_s else _LEAST_ALONE
        if self._chunk_steps >= _LOOK_AFTER:
            return 0
        base = self.decode_seconds(rows)
        if base <= 0.0 or self._token_s <= 0.0:
            return self._least
        extra = min(_SLOWEST, self._share * max(1.0, prompts / rows)) * base
        return max(self._least, int(extra / self._token_s))

    def _curve(self, rows: int) -> float:
        """Between the learnt points in straight lines, beyond the last one on in the last line's direction."""
        points, seconds = self._rows, self._seconds
        place = bisect_right(points, rows)
        if place == 0 or len(points) == 1:
            return seconds[0]
        place = min(place, len(points) - 1)
        low, high = points[place - 1], points[place]
        return seconds[place - 1] + (seconds[place] - seconds[place - 1]) * (rows - low) / (high - low)
