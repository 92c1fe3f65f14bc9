"""Text that a model makes itself: what it will see when it generates, so what its int8 form should be fitted to and checked with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from server.runtime.graphs.decoder.checkpoint import DecoderCheckpoint
from server.runtime.graphs.decoder.parity import Runner
from server.runtime.graphs.decoder.writer import Options, write_graph, write_shared

# Larger models would take minutes to write text, in float32 and on a CPU.
MOST_WEIGHTS = 200_000_000
SEQUENCES, LENGTH = 48, 96


def affordable(model: DecoderCheckpoint) -> bool:
    """Whether the model is small enough to write its own calibration text."""
    return sum(product.inputs * product.outputs for product in model.products()) <= MOST_WEIGHTS


def write_texts(model: DecoderCheckpoint, starts: Sequence[Sequence[int]], scratch: Path) -> list[list[int]]:
    """Token sequences that go on from `starts`, sampled from the float32 model; always the same ones."""
    folder = scratch / "float"
    folder.mkdir()
    path = folder / "model.onnx"
    write_graph(model, {}, path, write_shared(model, folder), Options("float32", "float32"))
    length = min(LENGTH, model.config.positions)
    texts = [list(one[: length // 4 + 1]) for one in starts]
    runner = Runner(path, model, sequences=len(texts), length=length, kv_dtype="float32")
    rng = np.random.default_rng(0)
    everyone = range(len(texts))
    try:
        last = np.cumsum([len(text) for text in texts]) - 1
        logits = runner.run(everyone, texts, last.tolist())
        for _ in range(length - max(map(len, texts))):
            # The largest of logits with Gumbel noise is a sample of their distribution.
            drawn = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
            for text, token in zip(texts, drawn.tolist(), strict=True):
                text.append(token)
            logits = runner.run(everyone, [text[-1:] for text in texts])
    finally:
        runner.close()
    return texts
