"""Texts to tokens to a plan: which form each matrix product takes, by its error on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from server.core import FloatArray, Task
from server.errors import InvalidArgument, ModelRejected
from server.runtime.graphs.checkpoint import Checkpoint, Dense
from server.runtime.graphs.quantize import Choice, quantize_product
from server.runtime.graphs.reference import Packed, exact, forward

Progress = Callable[[str, float], None]

# Enough tokens for a stable second moment of 4096 channels; more only costs time.
MAX_TOKENS = 8192
MAX_TOKENS_A_TEXT = 256
SAMPLE_ROWS = 768
MIN_TEXTS = 16
# Every fifth text is kept out of calibration, for the parity check.
HELD_OUT = 5
_PAIRS = (Task.TEXT_RANKING, Task.QUESTION_ANSWERING, Task.ZERO_SHOT_CLASSIFICATION)


def default_texts() -> list[str]:
    """Our own calibration text: short and long English of many kinds, some other languages, code and fragments."""
    return resources.files("server.runtime.graphs").joinpath("calibration.txt").read_text("utf-8").splitlines()


def encode(folder: Path, texts: Sequence[str], task: Task, limit: int) -> tuple[Packed, Packed]:
    """Tokens to calibrate on, and tokens held out for the parity check, by `folder/tokenizer.json`.

    Tasks that take two texts get each text with the next one. Sequences are cut at `limit` tokens.

    Raises:
        InvalidArgument: fewer than 16 texts.
        ModelRejected: there is no sound tokenizer.json, or it makes tokens that the model does not have.
    """
    import tokenizers

    if len(texts) < MIN_TEXTS:
        raise InvalidArgument(
            f"{len(texts)} calibration texts; expected at least {MIN_TEXTS}, some hundred are better. Give more, or none for our own.",
            field="calibration",
            limit=MIN_TEXTS,
        )
    path = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelRejected(f"tokenizer.json cannot be read ({error}); int8 needs it for calibration.", field="tokenizer.json") from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(limit, MAX_TOKENS_A_TEXT))
    items = list(zip(texts, [*texts[1:], texts[0]], strict=True)) if task in _PAIRS else list(texts)
    encoded = [(e.ids, e.type_ids) for e in tokenizer.encode_batch(items) if e.ids]
    used = [e for i, e in enumerate(encoded) if i % HELD_OUT]
    held = [e for i, e in enumerate(encoded) if not i % HELD_OUT]
    return Packed.of(_bounded(used, MAX_TOKENS)), Packed.of(_bounded(held, MAX_TOKENS // 4))


def check_tokens(model: Checkpoint, batch: Packed) -> None:
    """Refuses tokens that the model's tables do not have: a tokenizer of another model."""
    kinds = 1 if model.token_type is None else len(model.token_type)
    if batch.ids.max() >= len(model.word) or (kinds > 1 and batch.types.max() >= kinds):
        raise ModelRejected(
            f"tokenizer.json makes token {batch.ids.max()} of type {batch.types.max()}, "
            f"but the model has {len(model.word)} tokens and {kinds} types; take the tokenizer that belongs to these weights.",
            field="tokenizer.json",
        )


def choose_forms(model: Checkpoint, batch: Packed, progress: Progress) -> dict[str, Choice]:
    """Quantizes every product of the encoder on the inputs that it sees in a float32 pass over `batch`."""
    total = len(model.products())
    chosen: dict[str, Choice] = {}
    rows = np.random.default_rng(0).choice(len(batch.ids), min(SAMPLE_ROWS, len(batch.ids)), replace=False)
    rows.sort()

    def look(name: str, x: FloatArray, dense: Dense) -> FloatArray:
        chosen[name] = quantize_product(x, dense, rows)
        progress("quantize", len(chosen) / total)
        return exact(name, x, dense)

    forward(model, batch, look)
    return chosen


def _bounded(encoded: list[tuple[list[int], list[int]]], budget: int) -> list[tuple[list[int], list[int]]]:
    """As many sequences as fit `budget` tokens, spread over the whole list."""
    total = sum(len(ids) for ids, _ in encoded)
    if total <= budget:
        return encoded
    step = total / budget
    return [encoded[int(i * step)] for i in range(max(1, int(len(encoded) / step)))]
