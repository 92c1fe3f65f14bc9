"""The check after each build: does the graph answer as the float32 reference does? If not, there is no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from server.core import FloatArray
from server.errors import ModelRejected
from server.runtime.graphs.architecture import HeadKind
from server.runtime.graphs.checkpoint import Checkpoint
from server.runtime.graphs.reference import Packed
from server.runtime.ort import import_ort, session_options

# Figure -> (limit, is the limit the least allowed value?).
Tolerances = Mapping[str, tuple[float, bool]]
FLOAT32: Tolerances = {"max_error": (1e-4, False), "cosine_min": (0.9999, True)}
INT8_HIDDEN: Tolerances = {"cosine_mean": (0.9975, True), "cosine_min": (0.99, True)}
INT8_LOGITS: Tolerances = {"logit_error": (0.1, False), "agreement": (0.97, True)}


def tolerances(kind: HeadKind, form: str, rows: int) -> Tolerances:
    """The limits of a check on so many rows. One row that answers otherwise is no evidence: of 20 it would be 5 %."""
    if form == "float32":
        return FLOAT32
    if kind is HeadKind.HIDDEN:
        return INT8_HIDDEN
    least = INT8_LOGITS["agreement"][0]
    return {**INT8_LOGITS, "agreement": (min(least, 1.0 - 1.5 / max(rows, 2)), True)}


def run_graph(path: Path, model: Checkpoint, batch: Packed) -> FloatArray:
    """The graph's one output for `batch`."""
    session = import_ort().InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
    feeds = batch.feed(model.token_type is not None)
    if model.lora is not None:  # one slot that no token names
        dtype = np.float32 if model.lora.dtype == "float32" else np.uint16
        feeds["adapter_ids"] = np.full(len(batch.ids), -1, np.int32)
        feeds["lora_bank"] = np.zeros((1, 1, model.lora.width), dtype)
        feeds["lora_ranks"] = np.zeros((1, len(model.lora.targets)), np.int32)
    output: FloatArray = session.run(None, feeds)[0]
    return output


def measure(kind: HeadKind, got: FloatArray, want: FloatArray, cu: np.ndarray) -> dict[str, float]:
    """Figures of agreement between two outputs of a packed graph.

    max_error: largest difference over the largest value. For hidden states, cosines of each sequence's mean vector. For logits,
    logit_error: RMS of the differences over RMS of the values; agreement: share of rows whose greatest class is the same, not counting
    rows where the two best are closer together than twice the RMS difference.
    """
    difference = got.astype(np.float64) - want
    figures = {"max_error": float(np.abs(difference).max() / max(np.abs(want).max(), 1e-30))}
    if kind is HeadKind.HIDDEN:
        cosine = _cosine(_means(got, cu), _means(want, cu))
        return {**figures, "cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())}
    rms = float(np.sqrt(np.square(difference).mean()))
    figures["logit_error"] = rms / max(float(np.sqrt(np.square(want, dtype=np.float64).mean())), 1e-30)
    figures["cosine_min"] = float(_cosine(got.reshape(1, -1), want.reshape(1, -1))[0])
    # The two outputs of question answering, start and end, are no classes.
    figures["agreement"] = _agreement(got, want, rms) if kind is not HeadKind.QUESTION else 1.0
    return figures


def _agreement(got: FloatArray, want: FloatArray, rms: float) -> float:
    if want.shape[1] < 2:
        return 1.0
    best = np.sort(want, axis=1)
    clear = best[:, -1] - best[:, -2] > 2 * rms
    return float((got.argmax(axis=1) == want.argmax(axis=1))[clear].mean()) if clear.any() else 1.0


def failures(figures: Mapping[str, float], limits: Tolerances) -> list[str]:
    """What is out of tolerance, in words; a NaN is."""
    return [
        f"{name} is {figures[name]:.3g}, {'at least' if least else 'at most'} {limit:g} is allowed"
        for name, (limit, least) in limits.items()
        if not (figures[name] >= limit if least else figures[name] <= limit)
    ]


def require(figures: Mapping[str, float], limits: Tolerances, mend: str) -> None:
    """Raises ModelRejected, with all figures in metadata `figures`, if any is out of tolerance."""
    wrong = failures(figures, limits)
    if wrong:
        shown = ", ".join(f"{name}={value:.6g}" for name, value in figures.items())
        raise ModelRejected(f"The exported graph does not answer as the original: {'; '.join(wrong)}. {mend}", figures=shown)


def _means(hidden: FloatArray, cu: np.ndarray) -> npt.NDArray[np.float64]:
    return np.asarray(np.add.reduceat(hidden.astype(np.float64), cu[:-1], axis=0) / np.diff(cu)[:, None])


def _cosine(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1, dtype=np.float64) / np.maximum(norms, 1e-30))
