"""One matrix product of a decoder in int8: as server/runtime/graphs/quantize.py does it for encoders, with two differences.

Rows are weighed. Decoders have tokens (the first one above all) whose activations are hundreds of times those of others (arXiv
2402.17762): they must not decide the scales of all others, nor may they be broken themselves, since every token attends to them. And
products may be large: columns are rounded some at a time, and the cost is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.core import FloatArray
from server.runtime import kernels
from server.runtime.graphs.decoder.checkpoint import Product
from server.runtime.graphs.decoder.forms import Int4, Int8
from server.runtime.graphs.quantize import (
    COARSE_CLIPS,
    COMPENSATE_ABOVE,
    ROW_MUST_WIN,
    TINY,
    WEIGHT_CLIPS,
    StaticRows,
    compensated_by,
    fit_static,
    inverse_factor,
    pair_safe,
    round_rows,
    round_weights,
    smoothing,
)
from server.runtime.sessions import usable_cores

ALPHAS = (0.0, 0.5, 0.65, 0.8, 0.9)
FAST_ALPHAS = (0.5, 0.85)
# Steps to a column's RMS with which few pairs come near their bound, in place of a search; as a share of the largest weight.
FAST_STEPS = 28 / 127
# Without an instruction for whole dot products, four 7-bit products fit 16 bits together and two 8-bit ones do: half the work. Short sums
# average less of the rounding away, and little time goes into them: they keep 8 bits.
SEVEN_BITS, EIGHT_BITS, SHORT = 63, 127, 256
SAMPLE_COLUMNS, SAMPLE_BLOCKS = 256, 8
# The share of the worst row's error that counts, beside the mean over rows.
WORST = 0.05
# Floats of a weight that are rounded at once: what stays near the cores.
CHUNK, COMPENSATED_CHUNK = 1 << 18, 1 << 22

# Puts an array where it does not take memory, and gives it back as it is read.
Keep = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Effort:
    """What may be spent: rows that candidates are compared on, deepest product whose rounding is compensated."""

    name: str
    rows: int
    compensate: int

    @property
    def fast(self) -> bool:
        return self.name == "fast"


EFFORTS = {
    "fast": Effort("fast", 128, 0),
    "normal": Effort("normal", 512, 4096),
    "best": Effort("best", 768, 1 << 20),
}


@dataclass(frozen=True)
class Choice:
    """The form chosen for a product: "static", "row" or "int4". `error`: of its result on calibration rows, see `Rows.error`."""

    form: str
    error: float
    product: Int8 | Int4


class Weights:
    """A product's weight: all of it in memory where that was read anyway, else read by columns."""

    def __init__(self, product: Product, full: FloatArray | None = None) -> None:
        self.product = product
        self.full = full
        self.inputs, self.outputs = product.inputs, product.outputs

    def columns(self, start: int, end: int) -> FloatArray:
        """Columns [start, end)."""
        return self.product.columns(start, end) if self.full is None else self.full[:, start:end]

    def chunks(self, floats: int = CHUNK) -> list[tuple[int, int]]:
        """Ranges of columns of about `floats` elements."""
        step = max(16, floats // self.inputs // 16 * 16)
        return [(start, min(start + step, self.outputs)) for start in range(0, self.outputs, step)]

    def high(self) -> FloatArray:
        """Largest absolute value of each row, float32[inputs]."""
        found = np.zeros(self.inputs, np.float32)
        for start, end in self.chunks(8 * CHUNK):
            part = self.columns(start, end)
            np.maximum(found, np.maximum(part.max(axis=1), -part.min(axis=1)), out=found)
        return found

    def each(self, work: Callable[[int, int], None], *, compensated: bool) -> None:
        """Calls `work` with each range: on all cores, where it does not multiply matrices, which BLAS splits over them itself."""
        chunks = self.chunks(COMPENSATED_CHUNK if compensated else CHUNK)
        if compensated:
            for start, end in chunks:
                work(start, end)
            return
        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(lambda both: work(*both), chunks))

    def sampled(self) -> tuple[np.ndarray, FloatArray]:
        """Numbers of some columns spread over the product, and those columns."""
        if self.outputs <= SAMPLE_COLUMNS:
            return np.arange(self.outputs), np.ascontiguousarray(self.columns(0, self.outputs))
        width = SAMPLE_COLUMNS // SAMPLE_BLOCKS
        starts = np.linspace(0, self.outputs - width, SAMPLE_BLOCKS).astype(int)
        parts = [self.columns(start, start + width) for start in starts.tolist()]
        return np.concatenate([np.arange(start, start + width) for start in starts]), np.concatenate(parts, axis=1)


class Rows:
    """A product's inputs on calibration text, weighed: none counts more than the median one."""

    def __init__(self, x: FloatArray, count: int) -> None:
        power = np.square(x).mean(axis=1)
        self.gain = 1 / np.sqrt(np.maximum(power, max(float(np.median(power)), 1e-30)))
        self.low, self.top = x.min(axis=0), x.max(axis=0)
        levelled: FloatArray = x * self.gain[:, None].astype(np.float32)
        self.high: FloatArray = np.maximum(np.abs(levelled).max(axis=0), TINY)
        self.square: FloatArray = np.square(levelled).mean(axis=0)
        self.levelled = levelled
        self._factor: np.ndarray | None = None
        picked = np.unique(np.linspace(0, len(x) - 1, min(count, len(x))).astype(int))
        # The largest rows are always among those that are looked at.
        picked = np.union1d(picked, np.argsort(power)[-8:])
        self.sample: FloatArray = np.ascontiguousarray(x[picked])

    def factor(self, smooth: FloatArray | None = None) -> np.ndarray:
        """What rounding is compensated by, see quantize.inverse_factor, for inputs divided by `smooth`.

        Factored once, for channels of equal size: so the damping counts the same for each, however large some are.
        """
        size = np.sqrt(np.maximum(self.square, 1e-4 * float(self.square.mean()) + 1e-20))
        if self._factor is None:
            even = self.levelled / size
            self._factor = inverse_factor(even.T @ even)
        return np.asarray(self._factor * ((1 if smooth is None else smooth) / size), np.float32)

    @staticmethod
    def error(got: npt.NDArray[np.floating], want: FloatArray) -> float:
        """Mean over rows of ||got - want||^2 / ||want||^2, and a share of the worst; those below the median count as of its size."""
        power = np.square(want, dtype=np.float64).sum(axis=1)
        each = np.square(got - want, dtype=np.float64).sum(axis=1) / np.maximum(power, max(float(np.median(power)), 1e-30))
        return float(each.mean() + WORST * each.max())


def quantize_int8(rows: Rows, weights: Weights, effort: Effort, keep: Keep) -> Choice:
    """The best int8 form of a product."""
    picked, part = weights.sampled()
    weight_high = np.maximum(weights.high(), TINY)
    want = rows.sample @ part
    best: dict[str, tuple[float, FloatArray]] = {}
    for alpha in FAST_ALPHAS if effort.fast else ALPHAS:
        smooth = smoothing(rows.high, weight_high, alpha) if alpha else np.ones_like(rows.high)
        scaled = part * smooth[:, None]
        q, scale = _round(scaled, _importance(rows, smooth), effort, COARSE_CLIPS)
        back, smoothed = q * scale, rows.sample / smooth
        for form in ("static", "row"):
            static = _static(rows, smoothed, smooth, scaled) if form == "static" else None
            error = rows.error(round_rows(smoothed, static) @ back, want)
            if error < best.get(form, (np.inf,))[0]:
                best[form] = (error, smooth)
    form = "row" if best["row"][0] < ROW_MUST_WIN * best["static"][0] else "static"
    return _finish(rows, weights, (picked, part), (form, best[form][1]), effort, keep)


def _importance(rows: Rows, smooth: FloatArray) -> FloatArray:
    """Mean squares of the smoothed inputs."""
    return np.asarray(rows.square / np.square(smooth), np.float32)


def limit_of(inputs: int) -> int:
    """The largest weight of a product: of 7 bits where that is faster here, else of 8."""
    return SEVEN_BITS if inputs >= SHORT and kernels.has_fast_product() else EIGHT_BITS


def weight_bits(hidden: int) -> int:
    """Bits of the int8 weights of a model of this width, for its manifest."""
    return 7 if limit_of(hidden) == SEVEN_BITS else 8


def _round(weight: FloatArray, importance: FloatArray, effort: Effort, clips: Sequence[float]) -> tuple[np.ndarray, FloatArray]:
    """As quantize.round_weights, for "fast" without a search."""
    limit = limit_of(len(weight))
    if not effort.fast:
        return round_weights(weight, importance, clips, limit)
    rms = np.sqrt(np.square(weight).mean(axis=0))
    scale = np.maximum(np.maximum(np.abs(weight).max(axis=0), TINY) / limit, rms / (FAST_STEPS * limit)).astype(np.float32)
    return pair_safe(np.clip(np.rint(weight / scale), -limit, limit)), scale


def _static(rows: Rows, smoothed: FloatArray, smooth: FloatArray, weight: FloatArray) -> StaticRows:
    return fit_static(smoothed, (rows.low / smooth, rows.top / smooth), weight)


def _finish(
    rows: Rows, weights: Weights, sample: tuple[np.ndarray, FloatArray], choice: tuple[str, FloatArray], effort: Effort, keep: Keep
) -> Choice:
    """Rounds all columns in the chosen form."""
    (picked, part), (form, smooth) = sample, choice
    want, smoothed = rows.sample @ part, rows.sample / smooth
    static = _static(rows, smoothed, smooth, part * smooth[:, None]) if form == "static" else None
    rounded = round_rows(smoothed, static)
    importance = _importance(rows, smooth)
    upper = _compensation(rows, part, smooth, rounded, effort)
    q = np.empty((weights.inputs, weights.outputs), np.int8)
    scale = np.empty(weights.outputs, np.float32)

    def fill(start: int, end: int) -> None:
        scaled = weights.columns(start, end) * smooth[:, None]
        values, scale[start:end] = _round(scaled, importance, effort, WEIGHT_CLIPS)
        q[:, start:end] = values if upper is None else compensated_by(scaled, scale[start:end], upper, limit_of(len(scaled)))

    weights.each(fill, compensated=upper is not None)
    got = np.asarray(rounded @ (q[:, picked] * scale[picked]), np.float32)
    scales = static or StaticRows(1.0, 128)
    product = Int8(
        row=static is None,
        mult=(1 / (smooth * np.float32(scales.scale))).astype(np.float32),
        scale=scales.scale,
        zero_point=scales.zero_point,
        weight=keep(q),
        weight_scale=scale,
    )
    return Choice(form, rows.error(got, want), product)


def _compensation(rows: Rows, part: FloatArray, smooth: FloatArray, rounded: FloatArray, effort: Effort) -> np.ndarray | None:
    """The factor that rounding is compensated by, where the weights' error is worth it and the product is not too deep."""
    if len(part) > effort.compensate:
        return None
    scaled = part * smooth[:, None]
    q, scale = round_weights(scaled, _importance(rows, smooth), limit=limit_of(len(scaled)))
    smoothed, want = rows.sample / smooth, rows.sample @ part
    if rows.error(smoothed @ (q * scale), want) <= COMPENSATE_ABOVE * rows.error(rounded @ scaled, want):
        return None
    return rows.factor(smooth)
