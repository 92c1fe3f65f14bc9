"""The check after each build: does the written graph, run over pages, answer as the float32 reference does?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from server.core import FloatArray
from server.errors import ModelRejected
from server.runtime.decoder.contract import page_bytes
from server.runtime.graphs.decoder.checkpoint import DecoderCheckpoint
from server.runtime.graphs.decoder.reference import Sequences, forward, logits
from server.runtime.graphs.decoder.writer import PAGE
from server.runtime.graphs.parity import Tolerances, failures
from server.runtime.sessions import Sessions

FLOAT32: Tolerances = {"max_error": (2e-4, False)}
INT8: Tolerances = {"top1": (0.98, True), "kl": (0.01, False)}
INT4: Tolerances = {"kl": (0.3, False)}
# Logits that are compared, in floats; rows beyond them are left out.
MOST_LOGITS = 40_000_000
# Tokens of one run of a graph.
RUN_TOKENS = 512


class Runner:
    """A graph with pages of its own, for checks: few sequences, no engine. Every call to `run` adds tokens to the sequences it names."""

    def __init__(self, path: Path, model: DecoderCheckpoint, *, sequences: int, length: int, kv_dtype: str) -> None:
        config = model.config
        self.config = config
        self._session = Sessions().open(path)
        bank = next(spec for spec in self._session.inputs if spec.name == "lora_bank")
        ranks = next(spec for spec in self._session.inputs if spec.name == "lora_ranks")
        width = -(-length // PAGE)
        # From the end, so that no page has its sequence's number.
        self.tables = np.arange(sequences * width, dtype=np.int32)[::-1].reshape(sequences, width).copy()
        self.past = np.zeros(sequences, np.int32)
        self.adapters: dict[str, np.ndarray] = {
            "lora_bank": np.zeros((1, 1, int(bank.shape[2] or 0)), bank.dtype),
            "lora_ranks": np.zeros((1, int(ranks.shape[1] or 0)), np.int32),
        }
        pool = (config.layers, sequences * width, page_bytes(config.kv_heads, config.head_dim, kv_dtype, PAGE))
        self.pool = np.zeros(pool, np.uint8)

    def run(
        self,
        sequences: Sequence[int],
        tokens: Sequence[Sequence[int]],
        rows: Sequence[int] | None = None,
        *,
        slots: np.ndarray | None = None,
    ) -> FloatArray:
        """Logits of the new `tokens` of each of `sequences`, of all of them or of those at `rows`; `slots`: the adapter of each token."""
        chosen = list(sequences)
        batch = Sequences.of(tokens)
        feeds = {
            "input_ids": batch.ids,
            "cu_seqlens": batch.cu,
            "past_lens": self.past[chosen],
            "block_table": self.tables[chosen],
            "logit_rows": np.arange(len(batch.ids)) if rows is None else np.asarray(rows, np.int64),
            "kv_pool": self.pool,
            "extra_rows": np.zeros((0, self.config.hidden), np.float32),
            "adapter_ids": np.full(len(batch.ids), -1, np.int32) if slots is None else slots.astype(np.int32),
            **self.adapters,
        }
        (output,) = self._session.run(feeds, ["logits"])
        self.past[chosen] += np.diff(batch.cu)
        return np.asarray(output, np.float32)

    def close(self) -> None:
        self._session.close()


class Expected:
    """Held-out text, and what the float32 reference says to some of its tokens."""

    def __init__(self, batch: Sequences, rows: np.ndarray, values: FloatArray) -> None:
        self.batch = batch
        self.rows = rows
        self.values = values

    @classmethod
    def of(cls, model: DecoderCheckpoint, batch: Sequences, hidden: FloatArray | None = None) -> Expected:
        """`hidden`: what `reference.forward` gave for the batch, where it is known."""
        hidden = forward(model, batch) if hidden is None else hidden
        count = max(1, min(len(batch.ids), MOST_LOGITS // model.config.vocabulary))
        rows = np.unique(np.linspace(0, len(batch.ids) - 1, count).astype(np.int64))
        return cls(batch, rows, logits(model, hidden[rows]))

    def answers(self, path: Path, model: DecoderCheckpoint, kv_dtype: str) -> FloatArray:
        """The graph's logits of the same rows."""
        sequences = self.batch.split()
        runner = Runner(path, model, sequences=len(sequences), length=max(map(len, sequences)), kv_dtype=kv_dtype)
        try:
            return np.concatenate([runner.run(group, [sequences[s] for s in group], rows) for group, rows in self._groups()])
        finally:
            runner.close()

    def _groups(self) -> list[tuple[list[int], list[int]]]:
        """Sequences that run together, and their rows that are compared."""
        groups: list[tuple[list[int], list[int]]] = []
        cu, group, first = self.batch.cu, list[int](), 0
        for s in range(len(cu) - 1):
            group.append(s)
            if cu[s + 1] - first >= RUN_TOKENS or s + 2 == len(cu):
                rows = self.rows[(self.rows >= first) & (self.rows < cu[s + 1])] - first
                groups.append((group, rows.tolist()))
                group, first = [], int(cu[s + 1])
        return groups


def measure(got: FloatArray, want: FloatArray) -> dict[str, float]:
    """Figures of agreement between logits.

    max_error: largest difference over the largest value; kl: mean KL(want || got) in nats; kl_p99; top1: share of rows whose
    likeliest token is the same.
    """
    scale = max(float(np.abs(want).max()), 1e-30)
    worst, same, kl = 0.0, 0, []
    for start in range(0, len(want), 64):
        a, b = want[start : start + 64], got[start : start + 64]
        worst = max(worst, float(np.abs(a - b).max()))
        same += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())
        p, q = _log_softmax(a), _log_softmax(b)
        kl.append((np.exp(p) * (p - q)).sum(axis=1, dtype=np.float64))
    divergence = np.concatenate(kl)
    return {
        "max_error": worst / scale,
        "kl": max(float(divergence.mean()), 0.0),
        "kl_p99": max(float(np.quantile(divergence, 0.99)), 0.0),
        "top1": same / len(want),
    }


def _log_softmax(x: FloatArray) -> FloatArray:
    x = x - x.max(axis=1, keepdims=True)
    y: FloatArray = x - np.log(np.exp(x).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return y


def require(form: str, figures: Mapping[str, float], limits: Tolerances, mend: str) -> None:
    """Raises ModelRejected, with all figures in metadata `figures`, if any is out of tolerance."""
    wrong = failures(figures, limits)
    if wrong:
        shown = ", ".join(f"{name}={value:.6g}" for name, value in figures.items())
        raise ModelRejected(f"The exported {form} graph does not answer as the original: {'; '.join(wrong)}. {mend}", figures=shown)
