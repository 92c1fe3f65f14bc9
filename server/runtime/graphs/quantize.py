"""One matrix product in int8: smoothing, scales, rounding, and the error that each choice makes on calibration rows.

Activations u8, weights s8. Before AVX-512 VNNI, x86 adds u8 x s8 products in pairs into 16 bits with saturation (vpmaddubsw), which is
usually answered by 7-bit weights. We keep 8 bits and hold a weaker bound that is enough: of the rows (2i, 2i+1) that form a pair, positive
weights sum to at most 128 and negative ones to at least -128, so that 255 * sum stays within 16 bits. Few pairs come near it, and one file
is exact on every CPU.

Sources: SmoothQuant (arXiv 2211.10438, eq. 4) for the migration, GPTQ (arXiv 2210.17323, alg. 1) for the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.core import FloatArray
from server.runtime.graphs.checkpoint import Dense
from server.runtime.graphs.writer import QuantizedProduct

TINY = np.float32(1e-8)
ALPHAS: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Candidates are compared on this many columns of the product: the error is a mean over columns, and the order of candidates settles early.
SAMPLE_COLUMNS = 256
CLIPS: Sequence[float] = (1.0, 0.9, 0.8, 0.7, 0.6)
# Above 1 the steps are wider than the range needs, and fewer pairs come near their bound.
WEIGHT_CLIPS: Sequence[float] = (0.8, 1.0, 1.2, 1.35, 1.5, 1.65, 1.85)
COARSE_CLIPS: Sequence[float] = (1.0, 1.3, 1.6)
# Scales per row cost the producing operator a pass for the maximum and its reader a multiplication, so they must win by this much.
ROW_MUST_WIN = 0.75
# Rounding the weights one after the other takes time; it is done where their error is more than this share of the activations'.
COMPENSATE_ABOVE = 0.7
PAIR = 128


@dataclass(frozen=True)
class Choice:
    """The form chosen for a product: "static" or "row". `error`: ||y_int8 - y||^2 / ||y||^2 on the calibration rows."""

    form: str
    error: float
    product: QuantizedProduct


@dataclass(frozen=True)
class StaticRows:
    """Static quantization of smoothed rows: u8 = rint(x / scale) + zero_point."""

    scale: float
    zero_point: int

    def round(self, x: FloatArray) -> FloatArray:
        """The values that the u8 stand for."""
        q = np.clip(np.rint(x * np.float32(1 / self.scale)) + np.float32(self.zero_point), 0, 255)
        values: FloatArray = (q - np.float32(self.zero_point)) * np.float32(self.scale)
        return values


def quantize_product(x: FloatArray, dense: Dense, sample: np.ndarray, forms: Sequence[str] = ("static", "row")) -> Choice:
    """The best int8 form of `x @ dense.weight + dense.bias`.

    x float32[T, K]: the product's inputs on calibration text. `sample`: indices of the rows on which candidates are compared.
    """
    low, top = x.min(axis=0), x.max(axis=0)
    high = np.maximum(np.maximum(top, -low), TINY)
    weight_high = np.maximum(np.abs(dense.weight).max(axis=1), TINY)
    columns = slice(None, None, max(1, dense.weight.shape[1] // SAMPLE_COLUMNS))
    part = np.ascontiguousarray(dense.weight[:, columns])
    rows, thin = x[sample], x[:: max(1, len(x) // len(sample))]
    want = rows @ part
    power = _power(want)
    square = np.square(x).mean(axis=0)
    best: dict[str, tuple[float, float]] = {}
    for alpha in ALPHAS:
        smooth = smoothing(high, weight_high, alpha)
        weight = part * smooth[:, None]
        q, scale = round_weights(weight, square / smooth**2, COARSE_CLIPS)
        rounded = q * scale
        smoothed = rows / smooth
        for form in forms:
            static = fit_static(thin / smooth, (low / smooth, top / smooth), weight) if form == "static" else None
            got = round_rows(smoothed, static) @ rounded
            error = _distance(got, want) / power
            if form not in best or error < best[form][0]:
                best[form] = (error, alpha)
    form = forms[0] if len(forms) == 1 else ("row" if best["row"][0] < ROW_MUST_WIN * best["static"][0] else "static")
    return _finish(x, dense, smoothing(high, weight_high, best[form][1]), form, sample)


def _distance(got: FloatArray, want: FloatArray) -> float:
    return float(np.square(got - want, dtype=np.float64).sum())


def _power(want: FloatArray) -> float:
    return max(float(np.square(want, dtype=np.float64).sum()), 1e-30)


def smoothing(high: FloatArray, weight_high: FloatArray, alpha: float) -> FloatArray:
    s = high**alpha / weight_high ** (1 - alpha)
    # Only ratios between channels matter; a channel that calibration never saw must not get a huge factor.
    s /= np.exp(np.log(s).mean())
    return np.clip(s, 1e-4, 1e4).astype(np.float32)


def round_rows(rows: FloatArray, static: StaticRows | None) -> FloatArray:
    """Smoothed rows as int8 gives them back: with static scales, or with scales per row where `static` is None."""
    if static is not None:
        return static.round(rows)
    scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), TINY) / 127
    values: FloatArray = np.rint(rows / scale) * scale
    return values


def fit_static(thin: FloatArray, bounds: tuple[FloatArray, FloatArray], weight: FloatArray) -> StaticRows:
    """Scale and zero point by least error on the smoothed rows `thin`, each channel's weighted by what the weights make of it.

    `bounds`: least and greatest value of each channel over all rows.
    """
    low, high = min(float(bounds[0].min()), 0.0), max(float(bounds[1].max()), 0.0)
    gain = np.square(weight).sum(axis=1)
    best = (np.inf, StaticRows(1.0, 128))
    for clip in CLIPS:
        scale = max((high - low) * clip, 1e-20) / 255
        rows = StaticRows(scale, int(np.clip(np.rint(-low * clip / scale), 0, 255)))
        error = float(np.square(rows.round(thin) - thin).mean(axis=0) @ gain)
        if error < best[0]:
            best = (error, rows)
    return best[1]


def round_weights(
    weight: FloatArray, importance: FloatArray, clips: Sequence[float] = WEIGHT_CLIPS, limit: int = 127
) -> tuple[np.ndarray, FloatArray]:
    """Pair-safe s8 weights float32[K, N] (whole numbers, at most `limit` in size) and their scale float32[N].

    Scales are those of least error, the error of row k counting `importance[k]` times.
    """
    high = np.maximum(np.abs(weight).max(axis=0), TINY)
    best_error = np.full(weight.shape[1], np.inf, dtype=np.float32)
    best_scale = high / limit
    for clip in clips:
        scale = (high * np.float32(clip) / limit).astype(np.float32)
        q = pair_safe(np.clip(np.rint(weight / scale), -limit, limit))
        error = importance @ np.square(q * scale - weight)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
    best_scale = best_scale.astype(np.float32)
    return pair_safe(np.clip(np.rint(weight / best_scale), -limit, limit)), best_scale


def pair_safe(q: np.ndarray) -> np.ndarray:
    """Shrinks the pairs of rows (2i, 2i+1) of `q` [K, N] that break the bound, both members alike."""
    even = len(q) // 2 * 2
    pairs = q[:even].reshape(even // 2, 2, q.shape[1])
    a, b = pairs[:, 0], pairs[:, 1]
    over = np.where(a * b > 0, np.maximum(np.abs(a + b) - PAIR, 0), 0)
    if not over.any():
        return q
    out = q.copy()
    safe = out[:even].reshape(even // 2, 2, q.shape[1])
    first = np.where(np.abs(a) >= np.abs(b), np.ceil(over / 2), np.floor(over / 2))
    safe[:, 0] -= np.sign(a) * first
    safe[:, 1] -= np.sign(b) * (over - first)
    return out


def compensated(weight: FloatArray, scale: FloatArray, hessian: np.ndarray) -> np.ndarray:
    """Rounds row after row, pushing each row's error onto the rows still to come (GPTQ); pair-safe float32[K, N] whole numbers.

    `hessian` float32[K, K]: X^T X of the smoothed calibration rows.
    """
    return compensated_by(weight, scale, inverse_factor(hessian))


def inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """The upper factor of a hessian's inverse, float32[K, K]; the hessian is damped so far that float32 carries the factorisation."""
    size = len(hessian)
    damped = hessian + np.eye(size, dtype=np.float32) * np.float32(0.01 * np.trace(hessian) / size + 1e-12)
    # R R^T = H with R upper triangular, by Cholesky of the matrix turned round; R^-1 is then the upper factor of H^-1.
    return _invert_upper(np.ascontiguousarray(np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]))


def _invert_upper(upper: np.ndarray) -> np.ndarray:
    """Inverse of an upper triangular matrix, by halves: a sixth of what a general inverse costs."""
    size = len(upper)
    if size <= 128:
        return np.triu(np.linalg.inv(upper))
    half = size // 2
    out = np.zeros_like(upper)
    out[:half, :half], out[half:, half:] = _invert_upper(upper[:half, :half]), _invert_upper(upper[half:, half:])
    out[:half, half:] = -out[:half, :half] @ upper[:half, half:] @ out[half:, half:]
    return out


def compensated_by(weight: FloatArray, scale: FloatArray, upper: np.ndarray, limit: int = 127) -> np.ndarray:
    """As `compensated`, with the factor that `inverse_factor` gives: it is the same for all columns. `limit`: size of a weight at most."""
    size, block = len(weight), 128
    left = weight.copy()
    q = np.empty_like(left)
    inverse = 1 / scale
    for start in range(0, size, block):
        end = min(start + block, size)
        part = left[start:end]
        errors = np.empty_like(part)
        for j in range(end - start):
            k = start + j
            low, high = -float(limit), float(limit)
            if k % 2:
                low, high = np.maximum(low, -PAIR - np.minimum(q[k - 1], 0)), np.minimum(high, PAIR - np.maximum(q[k - 1], 0))
            q[k] = np.clip(np.rint(part[j] * inverse), low, high)
            errors[j] = (part[j] - q[k] * scale) / upper[k, k]
            if j + 1 < end - start:
                part[j + 1 :] -= upper[k, k + 1 : end, None] * errors[j]
        left[end:] -= upper[start:end, end:].T @ errors
    return q


def _finish(x: FloatArray, dense: Dense, smooth: FloatArray, form: str, sample: np.ndarray) -> Choice:
    """The chosen form with compensated weights and a bias without the mean error."""
    smoothed = x / smooth
    weight = dense.weight * smooth[:, None]
    rows = smoothed[sample]
    want = rows @ weight
    static = fit_static(rows, (smoothed.min(axis=0), smoothed.max(axis=0)), weight) if form == "static" else None
    rounded = round_rows(rows, static)
    q, weight_scale = round_weights(weight, np.square(smoothed).mean(axis=0))
    if _distance(rows @ (q * weight_scale), want) > COMPENSATE_ABOVE * _distance(rounded @ weight, want):
        q = compensated(weight, weight_scale, smoothed.T @ smoothed)
    got = rounded @ (q * weight_scale)
    shift = (got - want).mean(axis=0, dtype=np.float64).astype(np.float32)
    scales = static or StaticRows(1.0, 128)
    product = QuantizedProduct(
        row=static is None,
        mult=(1 / (smooth * np.float32(scales.scale))).astype(np.float32),
        scale=scales.scale,
        zero_point=scales.zero_point,
        weight=q.astype(np.int8),
        weight_scale=weight_scale,
        bias=dense.bias - shift,
    )
    return Choice(form, _distance(got - shift, want) / _power(want), product)
