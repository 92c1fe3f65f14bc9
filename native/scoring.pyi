"""Compiled twin of `native.scoring_py`: the same names, arguments, results and errors; documented there."""

from native.scoring_py import Float32, Int32

UNKNOWN_FINISH: int
STOP: int
LENGTH: int
TOOL_CALLS: int
FEATURES: tuple[str, ...]

class Pair:
    def __init__(self, prompt: str, answer: str) -> None: ...
    def features(
        self,
        logprobs: Float32 | None = None,
        entropies: Float32 | None = None,
        margins: Float32 | None = None,
        finish: int = 0,
    ) -> Float32: ...
    def bag(self, bits: int) -> tuple[Int32, Float32]: ...
    def dot(self, weights: Float32) -> float: ...
