"""Calibration text as tokens: what to fit to, and what to check with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from server.errors import InvalidArgument, ModelRejected
from server.runtime.graphs.calibrate import HELD_OUT, MIN_TEXTS, default_texts
from server.runtime.graphs.decoder.config import DecoderConfig
from server.runtime.graphs.decoder.reference import Sequences

# Our own texts are single sentences; a decoder sees longer ones.
_JOINED = 6
MAX_TOKENS_A_TEXT = 256


def encode(folder: Path, texts: Sequence[str] | None, config: DecoderConfig) -> list[list[int]]:
    """Tokens of `texts`, by default our own, by `folder/tokenizer.json`.

    Raises:
        InvalidArgument: fewer than 16 texts.
        ModelRejected: there is no sound tokenizer.json, or it makes tokens that the model does not have.
    """
    if texts is None:
        lines = default_texts()
        texts = ["\n".join(lines[i : i + _JOINED]) for i in range(0, len(lines), _JOINED)]
    if len(texts) < MIN_TEXTS:
        raise InvalidArgument(
            f"{len(texts)} calibration texts; expected at least {MIN_TEXTS}, some hundred are better. Give more, or none for our own.",
            field="calibration",
            limit=MIN_TEXTS,
        )
    tokenizer = open_tokenizer(folder / "tokenizer.json")
    tokenizer.no_padding()
    tokenizer.enable_truncation(max(1, min(config.positions, MAX_TOKENS_A_TEXT)))
    encoded = [list(one.ids) for one in tokenizer.encode_batch(list(texts)) if one.ids]
    highest = max((max(ids) for ids in encoded), default=-1)
    if not 0 <= highest < config.vocabulary:
        raise ModelRejected(
            f"tokenizer.json makes token {highest}, but the model has {config.vocabulary}; take the one that belongs to these weights.",
            field="tokenizer.json",
        )
    return encoded


def split(encoded: Sequence[Sequence[int]], budget: int) -> tuple[Sequences, Sequences]:
    """At most `budget` tokens to calibrate on, and a quarter as many that are held out."""
    used = [ids for i, ids in enumerate(encoded) if i % HELD_OUT]
    held = [ids for i, ids in enumerate(encoded) if not i % HELD_OUT]
    return Sequences.of(_bounded(used, budget)), Sequences.of(_bounded(held, max(budget // 4, 256)))


def random_sequences(config: DecoderConfig) -> Sequences:
    """Sequences of one to many random tokens; needs no tokenizer, and reaches every kind of token."""
    rng = np.random.default_rng(0)
    return Sequences.of([rng.integers(0, config.vocabulary, min(n, config.positions)).tolist() for n in (1, 2, 17, 40, 150)])


def open_tokenizer(path: Path) -> Any:
    """The tokenizer; raises ModelRejected."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelRejected(
            f"tokenizer.json cannot be read ({str(error)[:200]}); take the one that belongs to these weights.", field="tokenizer.json"
        ) from None


def _bounded(encoded: list[Sequence[int]], budget: int) -> list[Sequence[int]]:
    """As many sequences as fit `budget` tokens, spread over the whole list."""
    step = max(1.0, sum(map(len, encoded)) / budget)
    return [encoded[int(i * step)] for i in range(max(1, int(len(encoded) / step)))]
