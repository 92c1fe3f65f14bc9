"""The fitted numbers behind a quality, and the file that carries them: JSON with a SHA-256 of its content."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from native.score import FEATURES
from server.core import FloatArray
from server.errors import ModelRejected
from server.quality.curve import Curve

FORMAT = 1
COLD_START = Path(__file__).with_name("cold_start.json")
# What only the server knows of an answer, behind the native features.
EXTRAS = ("has_valid", "valid", "has_similarity", "similarity", "has_record", "record")
_NAMES = (*FEATURES, *EXTRAS)
_FLAGS = {"logprob": "has_logprobs", "low": "has_logprobs", "entropy": "has_entropies", "margin": "has_margins"}
HELD = 4.0  # standardised features are held within: what the fit never saw must not decide
_MOST_BYTES = 4 << 20


def _flag_of(name: str) -> int:
    """The place of the flag that says whether this feature was measured, -1 for what always is."""
    flag = _FLAGS.get(name.split("_")[0], f"has_{name}")
    return _NAMES.index(flag) if flag in _NAMES and name != flag else -1


GATES = np.array([_flag_of(name) for name in _NAMES])


def standardised(features: npt.NDArray[Any], mean: npt.NDArray[np.float64], inverse: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """float64 of the shape [.., features]: held within, and 0, which is the mean, where a feature was not measured."""
    present = np.where(GATES >= 0, features[..., GATES], 1.0)
    return np.asarray(np.clip((features - mean) * inverse, -HELD, HELD) * present)


class Dotted(Protocol):
    """The part of `native.scoring.Pair` that is needed here."""

    def dot(self, weights: FloatArray) -> float:
        """Hashed n-grams times weights float32[2^bits]."""


@dataclass(slots=True, frozen=True)
class QualityModel:
    """score = bias + clip((features - mean) * inverse) . weights + bag . hashed + (vectors - centre) . embedded; with agreement g:
    (1, score, g, g^2, score * g) . second.

    `mean`, `inverse`, `weights` float64[len(FEATURES) + len(EXTRAS)]; `hashed` float32[2^bits], or empty; `embedded` float32[2, 2 * H]:
    centre and weights of the embeddings of prompt and answer, or empty: vectors then change nothing; `second` float64[5], or empty:
    agreement then changes nothing. `calibrated`: fitted and calibrated on the answers of the skill that it scores. `about`: where it
    comes from.
    """

    mean: npt.NDArray[np.float64]
    inverse: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    bias: float
    hashed: FloatArray
    curve: Curve
    embedded: FloatArray = field(default_factory=lambda: np.zeros((2, 0), np.float32))
    second: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    second_curve: Curve | None = None
    calibrated: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    def alone(self, features: FloatArray, pair: Dotted, vectors: FloatArray | None = None) -> float:
        """The score of the answer by itself, log-odds before any curve."""
        found = self.bias + float(standardised(features, self.mean, self.inverse) @ self.weights)
        if len(self.hashed):
            found += pair.dot(self.hashed)
        if vectors is not None and vectors.shape == self.embedded[0].shape:
            found += float((vectors - self.embedded[0]) @ self.embedded[1])
        return found

    def raw(self, features: FloatArray, pair: Dotted, agreement: float | None = None, vectors: FloatArray | None = None) -> float:
        """The score, with the agreement of other answers where it is known."""
        alone = self.alone(features, pair, vectors)
        return self.joined(alone, agreement) if self.joins(agreement) else alone

    def joined(self, alone: float, agreement: float | None) -> float:
        """The second step."""
        g = float(np.clip(agreement or 0.0, 0.0, 1.0))
        return float(np.array([1.0, alone, g, g * g, alone * g]) @ self.second)

    def quality(self, score: float, agreement: float | None = None) -> float:
        """The probability in (0, 1) that an answer of this raw score is acceptable; `agreement` as it was given to `raw`."""
        own = self.second_curve if self.joins(agreement) and self.second_curve is not None else self.curve
        return float(own.quality(score))

    def joins(self, agreement: float | None) -> bool:
        """Whether this agreement takes part in the score."""
        return agreement is not None and agreement == agreement and len(self.second) > 0

    def to_json(self) -> dict[str, Any]:
        """Plain values and base64; hashed weights as int8 steps of one scale."""
        scale = float(np.abs(self.hashed).max()) / 127 if len(self.hashed) and self.hashed.any() else 1.0
        steps = np.rint(self.hashed / scale).astype(np.int8)
        content = {
            "format": FORMAT,
            "about": dict(self.about),
            "calibrated": self.calibrated,
            "features": {
                name: [float(f"{value:.6g}") for value in row]
                for name, *row in zip(_NAMES, self.mean.tolist(), self.inverse.tolist(), self.weights.tolist(), strict=True)
            },
            "bias": self.bias,
            "hashed": {"scale": scale, "steps": base64.b64encode(steps.tobytes()).decode()},
            "embedded": [[float(f"{value:.5g}") for value in row] for row in self.embedded.tolist()],
            "curve": self.curve.to_json(),
            "second": self.second.tolist(),
            "second_curve": self.second_curve.to_json() if self.second_curve else None,
        }
        return {**content, "sha256": _sha256(content)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QualityModel:
        """Raises ModelRejected for a file that was altered, is incomplete, or was made for other features."""
        content = {key: value for key, value in data.items() if key != "sha256"}
        if data.get("sha256") != _sha256(content):
            raise ModelRejected("the quality model's content does not match its SHA-256. Fit it again.", field="sha256")
        try:
            if content["format"] != FORMAT:
                raise ModelRejected(f"the quality model has format {content['format']!r}; this server reads {FORMAT}.", field="format")
            rows = content["features"]
            if tuple(rows) != _NAMES:
                raise ModelRejected(
                    "the quality model was fitted on other features than this server measures. Fit it again.", field="features"
                )
            table = np.array([rows[name] for name in _NAMES], np.float64)
            steps = np.frombuffer(base64.b64decode(content["hashed"]["steps"], validate=True), np.int8)
            hashed = steps.astype(np.float32) * np.float32(content["hashed"]["scale"])
            embedded = np.array(content["embedded"], np.float32)
            second = np.array(content["second"], np.float64)
            bias = float(content["bias"])
            second_curve = content["second_curve"] and Curve.from_json(content["second_curve"])
            curve, about = Curve.from_json(content["curve"]), dict(content["about"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ModelRejected("the quality model's file is incomplete. Fit it again.", field="model") from error
        if (
            table.shape != (len(_NAMES), 3)
            or second.shape not in ((0,), (5,))
            or len(hashed) & (len(hashed) - 1)
            or len(hashed) == 1
            or embedded.shape[:-1] != (2,)
        ):
            raise ModelRejected("the quality model's tables have the wrong shape. Fit it again.", field="model")
        if not all(np.isfinite(part).all() for part in (table, hashed, embedded, second, bias)):
            raise ModelRejected("the quality model holds a number that is not finite. Fit it again.", field="model")
        mean, inverse, weights = (np.ascontiguousarray(column) for column in table.T)
        return cls(mean, inverse, weights, bias, hashed, curve, embedded, second, second_curve or None, bool(content["calibrated"]), about)

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> QualityModel:
        """Raises ModelRejected where the file is none, too large, or altered."""
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ModelRejected(f"{path.name} is too large to be a quality model.", field="model")
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelRejected(f"{path.name} is no readable quality model. Fit it again.", field="model") from error
        if not isinstance(data, dict):
            raise ModelRejected(f"{path.name} is no quality model. Fit it again.", field="model")
        return cls.from_json(data)


@cache
def cold_start() -> QualityModel:
    """The model that a skill has before it has labels of its own: fitted on human judgements of answers to open questions."""
    return QualityModel.load(COLD_START)


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
