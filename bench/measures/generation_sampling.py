"""Bar `sampling`: the compiled sampler against its NumPy twin, against the exact distribution, and against itself in other batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.harness import Row, median, part, row_of
from server.runtime.decoder.contract import Sampling

SAMPLING = "native >= 20x the twin at 32 x 49,152; chi-square against the exact distribution passes; seeds reproducible in any batch"
ROWS, VOCABULARY = 32, 49_152
MIXED = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.8, top_p=0.95, seed=1),
    Sampling(temperature=1.0, top_k=50, seed=2),
    Sampling(temperature=0.7, min_p=0.05, repetition_penalty=1.1, seed=3),
    Sampling(temperature=1.2, top_k=200, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.2, logit_bias={7: 3.0}, seed=4),
    Sampling(temperature=1.0, seed=5, logprobs=True, top_logprobs=5),
)


def _logits(rows: int, vocabulary: int, seed: int) -> Any:
    return (np.random.default_rng(seed).standard_normal((rows, vocabulary)) * 3).astype(np.float32)


def _time(module: Any, kinds: tuple[Sampling, ...], repeats: int, threads: int) -> float:
    prompt = np.arange(64, dtype=np.int32)
    states = [module.RowState(kinds[i % len(kinds)], prompt, VOCABULARY) for i in range(ROWS)]
    out = module.SampleBuffers(ROWS, 20, threads)
    times = []
    for i in range(repeats + 1):
        logits = _logits(ROWS, VOCABULARY, i)
        start = time.perf_counter()
        module.sample(logits, states, None, out)
        if i:
            times.append(time.perf_counter() - start)
    return median(times)


def sampling() -> Row:
    from scipy import stats

    from native import sampling as compiled
    from native import sampling_py as twin

    parts = []
    for name, kinds in (("mixed", MIXED), ("greedy", MIXED[:1])):
        slow, fast = _time(twin, kinds, 3, 1), _time(compiled, kinds, 15, 1)
        ratio = round(slow / fast, 1)
        shown = {"native_ms": round(fast * 1e3, 2), "twin_ms": round(slow * 1e3, 1), "threads": 1}
        parts.append(part(f"twin's time over ours, {name}", ">= 20", ratio, ratio >= 20, **shown))
    parts.append(_chi_square(compiled, twin, stats.chisquare))
    parts.append(_seeds(compiled))
    return row_of("sampling", SAMPLING, parts)


def _chi_square(compiled: Any, twin: Any, chisquare: Callable[..., Any], draws: int = 40_000) -> dict[str, Any]:
    """Each kind of sampling over 600 tokens: what is drawn by as many seeds against the twin's exact distribution; rare tokens pooled."""
    least = 1.0
    prompt = np.array([1, 2, 3, 3, 500], np.int32)
    for kind in MIXED[1:]:
        logits = _logits(1, 600, 99)
        exact = twin.distribution(logits[0].copy(), twin.RowState(kind, prompt, 600), None)
        counts = np.zeros(600)
        out = compiled.SampleBuffers(200, 20, 1)
        fields = {f: getattr(kind, f) for f in Sampling.__dataclass_fields__ if f != "seed"}
        for block in range(draws // 200):
            states = [compiled.RowState(Sampling(**fields, seed=block * 200 + i), prompt, 600) for i in range(200)]
            compiled.sample(np.repeat(logits, 200, axis=0), states, None, out)
            np.add.at(counts, out.tokens[:200], 1)
        assert counts[exact == 0].sum() == 0, "a token of probability 0 was drawn"
        expected = exact * draws
        common = expected >= 10
        seen, wanted = np.append(counts[common], counts[~common].sum()), np.append(expected[common], expected[~common].sum())
        keep = wanted > 0
        least = min(least, float(chisquare(seen[keep], wanted[keep] * seen[keep].sum() / wanted[keep].sum()).pvalue))
    return part("least p of five kinds, 40,000 draws each", ">= 0.001", round(least, 4), least >= 0.001)


def _seeds(compiled: Any) -> dict[str, Any]:
    """A seeded row alone, and in batches of other rows in other orders: the same token each time."""
    prompt = np.arange(20, dtype=np.int32)
    wrong = 0
    rng = np.random.default_rng(1)
    for trial in range(200):
        logits = _logits(8, 2048, trial)
        kind = MIXED[1 + trial % 5]
        alone = compiled.SampleBuffers(1, 20, 1)
        compiled.sample(logits[:1].copy(), [compiled.RowState(kind, prompt, 2048)], None, alone)
        order = rng.permutation(8)
        states = [compiled.RowState(kind if row == 0 else Sampling(temperature=1.0), prompt, 2048) for row in order]
        batch = compiled.SampleBuffers(8, 20, 2)
        compiled.sample(np.ascontiguousarray(logits[order]), states, None, batch)
        wrong += int(batch.tokens[int(np.where(order == 0)[0][0])] != alone.tokens[0])
    return part("seeded rows that differ between batches, of 200", "0", wrong, wrong == 0)
