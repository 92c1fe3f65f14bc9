"""Which form of the weights runs a step: the one for narrow steps below a crossover that is measured when the model is loaded.

A step with a seeded row runs by the wide form, whatever its width: so such a row never changes its form. Splitting the step in two would
read the weights twice, and a few rows more cost the wide form next to nothing.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

from server.runtime.decoder.pace import Pace
from server.runtime.decoder.step import StepRunner

_WIDE = ("int8", "float32", "int4", "cuda")  # the first that the model has
_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
_SIZES_OF_ONE = (1, 8, 32)  # where there is nothing to choose, for the pace alone
_RUNS = 3
# The wide form is nearer to the original: the narrow one runs where it is clearly faster.
MUST_WIN = 0.9
_LONGEST_S = 3.0  # spent on the forms; where it is not enough, the largest size that was tried decides


@dataclass(frozen=True, slots=True)
class Forms:
    """Steps of fewer than `crossover` tokens run by `narrow`, all others by `wide`."""

    narrow: str
    wide: str
    crossover: int = 0

    @classmethod
    def of(cls, names: Collection[str]) -> Forms:
        """The forms of a model, before anything was measured: all steps run by the wide one."""
        wide = next(name for name in _WIDE if name in names)
        return cls("int4" if "int4" in names else wide, wide)

    def choose(self, tokens: int, *, seeded: bool) -> str:
        """The form for a step of so many tokens; `seeded`: a row of it must stay with the wide form."""
        return self.narrow if tokens < self.crossover and not seeded else self.wide


def measure(forms: Forms, runner: StepRunner, pace: Pace) -> Forms:
    """Finds the crossover by running both forms at growing sizes, and tells `pace` what steps take. Blocks for a second or two."""
    began = time.monotonic()
    one = forms.narrow == forms.wide
    limit = min(runner.limits.sequences, runner.pool.shape[1])
    crossover = 0
    for size in [size for size in (_SIZES_OF_ONE if one else _SIZES) if size <= limit]:
        wide, narrow = _seconds(runner, (forms.wide, forms.narrow), size, 1)
        pace.learn(size, min(wide, narrow))
        if not one and narrow < wide:
            crossover = size + 1
        if time.monotonic() - began > _LONGEST_S or (not one and size > 2 * crossover):
            break
    some, more = (min(tokens, runner.limits.tokens, runner.limits.positions - 1) for tokens in (16, 64))
    if more > some and limit * runner.page >= more:
        (short, _), (long, _) = (_seconds(runner, (forms.wide, forms.wide), 1, tokens) for tokens in (some, more))
        pace.learn_token((long - short) / (more - some))
    return Forms(forms.narrow, forms.wide, crossover)


def _seconds(runner: StepRunner, forms: tuple[str, str], rows: int, tokens: int) -> tuple[float, float]:
    """The least of a few runs of each form, in turns: what others do on the machine only ever adds."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_RUNS):
        for place in range(2 if forms[0] != forms[1] else 1):
            began = time.perf_counter()
            runner.probe(forms[place], rows, tokens)
            times[place].append(time.perf_counter() - began)
    return min(times[0]), min(times[1] or times[0])
