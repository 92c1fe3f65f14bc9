"""A trained encoder becomes a version of our own graph in a repository of the job, is loaded by the server's runtime, and is compared."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from server.core import FloatArray, Task
from server.runtime.graphs.build import build
from server.runtime.repository import ModelFiles, Repository
from trainer.classify.source import Source
from trainer.context import JobContext

# The share of rows on which the served file and the torch model may give different labels; a row is always forgiven.
MAX_DIFFERENT = 0.005
_CALIBRATION_TEXTS = 256


@dataclass(slots=True, frozen=True)
class Parity:
    """The served file against the torch model, on `rows` rows: labels that differ, and cosines of the vectors."""

    rows: int
    different: int
    cosine_mean: float
    cosine_min: float

    @property
    def agreement(self) -> float:
        """Share of equal labels."""
        return 1.0 - self.different / max(self.rows, 1)

    @property
    def passed(self) -> bool:
        """Whether what is served is what was trained."""
        return self.different <= max(1, math.floor(MAX_DIFFERENT * self.rows))


def compare(trained: FloatArray, served: FloatArray, weight: FloatArray, bias: FloatArray) -> Parity:
    """Vectors float32[n, H] of both, under the same head."""
    one, other = ((vectors @ weight.T + bias).argmax(axis=1) for vectors in (trained, served))
    lengths = np.linalg.norm(trained, axis=1) * np.linalg.norm(served, axis=1)
    cosines = (trained * served).sum(axis=1) / np.maximum(lengths, 1e-12)
    return Parity(len(trained), int((one != other).sum()), float(cosines.mean()), float(cosines.min()))


def write_draft(folder: Path, source: Source, root: Path, name: str, texts: Sequence[str], form: str, context: JobContext) -> ModelFiles:
    """The encoder in `folder` as the next version of model `name` in the repository `root`, in `form` ("int8" or "float32").

    The int8 scales are fitted to a sample of `texts`, those that it was trained on. Raises ModelRejected: out of tolerance.
    """
    sample = random.Random(0).sample(list(texts), min(_CALIBRATION_TEXTS, len(texts)))
    repository = Repository(root)
    with repository.staging() as staged:
        built = build(
            folder,
            staged,
            task=Task.FEATURE_EXTRACTION,
            form="int8" if form == "int8" else "float32",
            calibration=sample,
            progress=lambda stage, share: context.progress(f"export {stage}", round(100 * share), 100),
        )
        (staged / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        of_base = source.manifest
        fields = dict(built.manifest) | {
            "task": Task.FEATURE_EXTRACTION.value,
            "pooling": source.pooling,
            "normalize": True,
            "max_tokens": min(int(built.manifest["max_tokens"]), of_base.max_tokens),
            "license": of_base.license,
            "source": {"kind": "trainer", "id": f"{source.base}@{of_base.version}", "revision": context.job},
        }
        return repository.publish(staged, name, fields)
