"""How hard an input is for a skill's student, before anybody is asked: learned from labels of that skill, or a prior without.

Two things are predicted of a text. `value`: the probability that the local answer will not be acceptable. `gain`: the expected quality
that asking the teacher instead would add; inputs that both get wrong are hard too, but escalating them is pure cost, so routes that weigh
cost rank by the gain.

A model is a blend of two linear parts, both fitted by ridge regression (trainer/difficulty.py):

- words: hashed n-grams and form features of `native.text`;
- neighbours: Gaussian kernels exp(-gamma |u - c|^2) around up to MAX_LANDMARKS training rows c (Nystroem; Williams and Seeger 2001),
  where u is the text's embedding beside its standardised form features, these times `form_scale`.

The blend's `value` passes a fitted logistic (Platt 1999). Where the embedder is not the one that the model was trained with, or has no
vector of a text, the words answer alone by a blend of their own.

A model is a folder, `manifest.json` and `adapter.safetensors`, written once and verified at load. The landmarks are embeddings of the
skill's logged texts: who may not read the log should not be given the folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from native.text import FORMS, VERSION, extract
from server.core import FloatArray
from server.errors import InvalidArgument, ModelRejected
from server.runtime.adapter_folder import MANIFEST, WEIGHTS, Base, read_manifest, verify_files, write_folder
from server.runtime.heads import Features
from server.runtime.manifest import FileEntry, FileName, Name, Version
from server.runtime.verify import entry_of

MAX_LANDMARKS = 4096
_MAX_FORM = 4.0  # standardised form features are cut there: a text unlike all others is not a thousand times as hard
# The prior: 0.5 at PRIOR_BYTES, half a unit of log-odds a doubling or so, never surer than PRIOR_LEAST on either side.
PRIOR_BYTES, PRIOR_SLOPE, PRIOR_LEAST = 300, 0.5, 0.2
PRIOR_RECOVERED = 0.5  # share of the student's errors that the teacher is assumed to put right
_FAIL, _GAIN = 0, 1


@dataclass(slots=True, frozen=True)
class DifficultyEstimate:
    """`value`: P(the local answer is not acceptable); `gain` in [-1, 1]: expected quality that the teacher adds.

    `basis`: "learned", from `rows` labelled rows of the skill, or "prior", which knows the text's length alone.
    """

    value: float
    gain: float
    basis: Literal["prior", "learned"]
    rows: int = 0


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Blend(_Part):
    """How the parts' outputs become an answer: bias + words * w + neighbours * n a target; `value` is sigmoid(slope * fail + shift)."""

    fail: tuple[float, float, float]
    gain: tuple[float, float, float]
    slope: float
    shift: float

    @model_validator(mode="after")
    def _check_finite(self) -> Blend:
        if not all(map(math.isfinite, (*self.fail, *self.gain, self.slope, self.shift))):
            raise ValueError("a number is not finite")
        return self


class DifficultySpec(_Part):
    """Everything that a manifest says but the files. `base` and `features` are of the embedder, None for a model of words alone."""

    schema_version: Literal[1] = 1
    kind: Literal["difficulty"] = "difficulty"
    name: Name  # the skill
    version: Version
    extractor: int = VERSION
    bits: int = Field(ge=8, le=18)
    runs: float = Field(default=0.0, ge=0.0, le=4.0)  # weight of the runs of characters beside the words; 0: they are not read
    form_scale: float = Field(default=0.2, gt=0.0, le=10.0)
    gamma: float = Field(default=1.0, gt=0.0, le=1e3)
    base: Base | None = None
    features: Features | None = None
    alone: Blend
    both: Blend | None = None
    rows: int = Field(ge=1)
    metrics: dict[str, float] = {}
    lineage: dict[str, Any] = {}
    created: str = ""  # RFC 3339

    @model_validator(mode="after")
    def _check_parts(self) -> DifficultySpec:
        if len({self.base is None, self.features is None, self.both is None}) != 1:
            raise ValueError("base, features and both go together")
        if self.extractor != VERSION:
            raise ValueError(f"features of version {self.extractor} are not those of this program, {VERSION}")
        return self

    @property
    def columns(self) -> int:
        """Of the sparse matrix that the words are."""
        return (2 if self.runs else 1) << self.bits


class DifficultyManifest(DifficultySpec):
    """`manifest.json` of a model's folder."""

    files: dict[FileName, FileEntry]

    @model_validator(mode="after")
    def _check_files(self) -> DifficultyManifest:
        if set(self.files) != {WEIGHTS}:
            raise ValueError(f"files must be {WEIGHTS}")
        return self


@dataclass(slots=True, frozen=True)
class Parameters:
    """The learned arrays, float32; the last axis is (fail, gain). `landmarks` and `around` have no rows without an embedder.

    words [columns, 2], forms [F, 2], bias [2]: words . x + forms . z + bias, z the form features standardised by `mean` and `scale` [F].
    landmarks [m, H + F], around [m, 2], middle [2]: kernels to the landmarks times `around`, + middle.
    """

    words: FloatArray
    forms: FloatArray
    bias: FloatArray
    mean: FloatArray
    scale: FloatArray
    landmarks: FloatArray
    around: FloatArray
    middle: FloatArray


class DifficultyModel:
    """A model of one skill, in memory. `predict` may be called from any thread."""

    def __init__(self, spec: DifficultySpec, parameters: Parameters) -> None:
        """Raises InvalidArgument for parameters that are not of `spec`."""
        problem = _problem(spec, {name: getattr(parameters, name) for name in Parameters.__dataclass_fields__})
        if problem:
            raise InvalidArgument(f"{problem} Expected finite float32 arrays of the model's sizes.")
        self.spec = spec
        self.parameters = parameters
        self._lengths = np.einsum("ij,ij->i", parameters.landmarks, parameters.landmarks)

    @classmethod
    def from_folder(cls, folder: Path) -> DifficultyModel:
        """Verifies and loads. Raises ManifestInvalid, or ModelRejected: wrong hash or size, foreign files, broken arrays."""
        manifest = read_manifest(folder, DifficultyManifest, "difficulty model")
        verify_files(folder, manifest.files, "difficulty model")
        return cls(manifest, _read(folder / WEIGHTS, manifest))

    def save(self, folder: Path) -> DifficultyManifest:
        """Writes the folder, at once and only once. Raises AlreadyExists."""
        from safetensors.numpy import save_file

        spec = {name: getattr(self.spec, name) for name in DifficultySpec.model_fields}

        def fill(part: Path) -> None:
            arrays = {name: np.ascontiguousarray(getattr(self.parameters, name)) for name in Parameters.__dataclass_fields__}
            save_file(arrays, part / WEIGHTS)
            manifest = DifficultyManifest(**spec, files={WEIGHTS: entry_of(part / WEIGHTS)})
            (part / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")

        write_folder(folder, fill)
        return read_manifest(folder, DifficultyManifest, "difficulty model")

    def predict(self, texts: Sequence[str], vectors: FloatArray | None = None) -> list[DifficultyEstimate]:
        """One estimate a text. `vectors` float32[n, H]: embeddings by `spec.base` with `spec.features`; a row of NaN stands for none."""
        values, gains = self.scores(texts, vectors)
        return [DifficultyEstimate(float(value), float(gain), "learned", self.spec.rows) for value, gain in zip(values, gains, strict=True)]

    def scores(self, texts: Sequence[str], vectors: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
        """The same as two arrays float32[n]: values, gains."""
        words, standard = words_part(self.spec, self.parameters, texts)
        blended, value = blend(self.spec.alone, words, None)
        if vectors is not None and self.spec.both is not None:
            assert self.spec.features is not None
            expected = (len(texts), self.spec.features.size)
            assert vectors.dtype == np.float32 and vectors.shape == expected, (vectors.dtype, vectors.shape, expected)
            points = located(self.spec.form_scale, vectors, standard)
            kernel = kernels(points, self.parameters.landmarks, self.spec.gamma, self._lengths)
            near = kernel @ self.parameters.around + self.parameters.middle
            known = np.isfinite(near).all(axis=1)
            both = blend(self.spec.both, words[known], near[known])
            blended[known], value[known] = both
        return value, np.clip(blended[:, _GAIN], -1.0, 1.0)


def prior(texts: Sequence[str]) -> list[DifficultyEstimate]:
    """What is assumed of a skill without labels: longer is harder, 0.5 at 300 bytes, within [0.2, 0.8].

    Length is the one feature that ranked the gain better than chance on every public set that we looked at, and far from well on any; the
    level is a convention, not a measurement. The gain is PRIOR_RECOVERED of the value.
    """
    found = []
    for text in texts:
        # A character has at least one byte, so that a long text need not be encoded whole.
        size = len(text[: 1 << 18].encode("utf-8", "surrogatepass"))
        value = 1 / (1 + math.exp(-PRIOR_SLOPE * (math.log1p(size) - math.log1p(PRIOR_BYTES))))
        value = min(max(value, PRIOR_LEAST), 1 - PRIOR_LEAST)
        found.append(DifficultyEstimate(value, PRIOR_RECOVERED * value, "prior"))
    return found


def standardised(parameters: Parameters, forms: FloatArray) -> FloatArray:
    """Form features float32[n, F] in units of the training rows' spread, cut at 4 of them."""
    return np.asarray(np.clip((forms - parameters.mean) / parameters.scale, -_MAX_FORM, _MAX_FORM), dtype=np.float32)


def words_part(spec: DifficultySpec, parameters: Parameters, texts: Sequence[str]) -> tuple[FloatArray, FloatArray]:
    """float32[n, 2] of the words, and the standardised form features float32[n, F]."""
    indptr, indices, values, forms = extract(texts, spec.bits)
    standard = standardised(parameters, forms)
    width = 1 << spec.bits
    scaled = np.where(indices < width, values, values * np.float32(spec.runs))
    if not spec.runs:  # those columns are not there
        indices = np.where(indices < width, indices, 0)
    # Sums by differences of running sums, in float64, so that empty rows need no care.
    sums = np.zeros((len(indices) + 1, 2))
    np.cumsum(parameters.words[indices] * scaled[:, None], axis=0, dtype=np.float64, out=sums[1:])
    words = (sums[indptr[1:]] - sums[indptr[:-1]]).astype(np.float32)
    return words + standard @ parameters.forms + parameters.bias, standard


def located(form_scale: float, vectors: FloatArray, standard: FloatArray) -> FloatArray:
    """Where texts lie for the kernels: float32[n, H + F]."""
    return np.concatenate([vectors, np.float32(form_scale) * standard], axis=1)


def kernels(points: FloatArray, landmarks: FloatArray, gamma: float, lengths: FloatArray | None = None) -> FloatArray:
    """exp(-gamma |points - landmarks|^2), float32[n, m]; `lengths` float32[m]: |landmarks|^2 where they are known."""
    squares = points @ landmarks.T
    squares *= -2
    squares += np.einsum("ij,ij->i", points, points)[:, None]
    squares += np.einsum("ij,ij->i", landmarks, landmarks) if lengths is None else lengths
    np.maximum(squares, 0, out=squares)
    squares *= np.float32(-gamma)
    return np.asarray(np.exp(squares, out=squares), dtype=np.float32)


def blend(how: Blend, words: FloatArray, near: FloatArray | None) -> tuple[FloatArray, FloatArray]:
    """Blended (fail, gain) float32[n, 2] before calibration, and the calibrated value float32[n]."""
    rows = np.array([how.fail, how.gain])
    blended = rows[:, 0] + words * rows[:, 1]
    if near is not None:
        blended = blended + near * rows[:, 2]
    value = 1 / (1 + np.exp(-np.clip(how.slope * blended[:, _FAIL] + how.shift, -30, 30)))
    return blended.astype(np.float32), value.astype(np.float32)


def _shapes(spec: DifficultySpec, landmarks: int) -> dict[str, tuple[int, ...]]:
    width = spec.features.size + len(FORMS) if spec.features is not None else 0
    forms = (len(FORMS),)
    return {
        "words": (spec.columns, 2),
        "forms": (*forms, 2),
        "bias": (2,),
        "mean": forms,
        "scale": forms,
        "landmarks": (landmarks, width),
        "around": (landmarks, 2),
        "middle": (2,),
    }


def _problem(spec: DifficultySpec, arrays: dict[str, npt.NDArray[Any]]) -> str:
    """What is wrong with a model's arrays, or nothing."""
    landmarks = len(arrays["landmarks"]) if "landmarks" in arrays and arrays["landmarks"].ndim else 0
    shapes = _shapes(spec, landmarks)
    if set(arrays) != set(shapes):
        return f"the tensors are {', '.join(sorted(arrays))[:200] or 'none'}; expected {', '.join(shapes)}."
    if landmarks > MAX_LANDMARKS or (landmarks > 0) != (spec.both is not None):
        return f"there are {landmarks} landmarks; expected 1 to {MAX_LANDMARKS} with an embedder, and none without."
    for name, shape in shapes.items():
        array = arrays[name]
        if array.dtype != np.float32 or array.shape != shape:
            return f"{name} is {array.dtype}{list(array.shape)}; expected float32{list(shape)}."
        if not np.isfinite(array).all():
            return f"{name} has values that are not finite."
    return "" if (arrays["scale"] > 0).all() else "scale has values that are not positive."


def _read(path: Path, spec: DifficultySpec) -> Parameters:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    # What is larger than the largest model of these sizes is something else, and is not read.
    limit = 4 * sum(math.prod(shape) for shape in _shapes(spec, MAX_LANDMARKS).values()) + (1 << 20)
    if path.stat().st_size > limit:
        raise ModelRejected(f"{path} has {path.stat().st_size} bytes; a model of these sizes has at most {limit}.", file=path.name)
    try:
        arrays = load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelRejected(f"{path} is no safetensors file: {str(error)[:200]}. Train the model again.", file=path.name) from None
    problem = _problem(spec, arrays)
    if problem:
        raise ModelRejected(f"{path}: {problem} Train the model again.", file=path.name)
    return Parameters(**arrays)
