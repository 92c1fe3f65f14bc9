"""The part of the kernels' self-test that proves beam search's operators against their twins."""

from __future__ import annotations

import numpy as np

from native.kernels import twins_beam
from server.errors import FailedPrecondition
from server.runtime.kernels import Feeds, expect_close, run_op


def self_test() -> None:
    """Runs both operators in each of their forms; FailedPrecondition names the first that is wrong."""
    random = np.random.default_rng(9)

    def floats(*shape: int) -> twins_beam.Floats:
        return random.standard_normal(shape).astype(np.float32)

    rows, heads, inner, slots = 5, 3, 3 * 24, 40
    pool, lengths = floats(slots, 4 * inner), random.integers(1, 19, rows).astype(np.int32)
    table = random.integers(0, 20, (rows, 18)).astype(np.int32)
    table[np.arange(rows), lengths - 1] = 20 + np.arange(rows)
    spans = np.stack([random.integers(0, slots - 18, rows), lengths], axis=1).astype(np.int32)
    own: Feeds = {"x": floats(rows, 3 * inner), "bias": floats(3 * inner), "pool": pool, "table": table}
    own |= {"lengths": lengths, "relative": floats(heads, 7)}
    cross: Feeds = {"x": floats(rows, inner), "bias": floats(inner), "pool": pool, "table": spans}
    for feeds, form in ((own, 1), (cross, 0)):
        attributes = {"num_heads": heads, "scale": 0.2, "column": 2 * inner, "own": form}
        expected, after = twins_beam.beam_attention(**feeds, num_heads=heads, scale=0.2, column=2 * inner, own=form)
        changed = pool.copy()
        expect_close("BeamAttention", run_op("BeamAttention", {**feeds, "pool": changed}, ["y"], attributes)[0], expected, 1e-5)
        expect_close("BeamAttention", changed, after, 1e-6)
    logits = floats(4, 1003) * 5
    lse, values, ids = twins_beam.top_tokens(logits, 9)
    got = run_op("TopTokens", {"logits": logits, "k": np.array([9], np.int64)}, ["lse", "values", "ids"], {})
    expect_close("TopTokens", got[0], lse, 1e-6)
    if not np.array_equal(got[1], values) or not np.array_equal(got[2], ids):
        raise FailedPrecondition("the kernel TopTokens finds other tokens than its twin; set UNDERSTUDY_KERNEL_ISA=base", op="TopTokens")
