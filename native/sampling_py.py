"""NumPy twin of `native.sampling`: what drawing a token means, in the plainest code; the same tests run on both.

The order is Hugging Face's and vLLM's where they agree: repetition penalty on every token of prompt and answer (positive logits are
divided, others multiplied), frequency and presence penalties on the answer's tokens, logit bias, the grammar's mask, temperature, top_k
(ties with the k-th stay), top_p (the fewest likeliest tokens whose mass reaches it, renormalised after top_k; lower ids first among
equals), min_p relative to the likeliest. Where they differ: a temperature below 1e-5 is greedy (vLLM; Hugging Face refuses it), the bias
comes after the penalties (vLLM, Hugging Face: before), min_p last (Hugging Face; vLLM: first, which lets top_p cut less).

A token is drawn by inverting the distribution, tokens in order of their ids, at a uniform number that Philox 4x32-10 makes of the seed,
the candidate's index and the number of tokens that it has: so the same seed gives the same text in any batch and any order of rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint32]

TOP_MOST = 20
GREEDY_BELOW = float(np.float32(1e-5))


class SamplingLike(Protocol):
    """The fields of `server.runtime.decoder.contract.Sampling` that are read here."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def logit_bias(self) -> Mapping[int, float]: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def top_logprobs(self) -> int: ...


class RowState:
    """How one candidate's tokens are drawn, and what it has of them so far.

    `sample` reads it and changes nothing; the owner calls `commit` with every token that the candidate keeps, drawn or forced. A state
    lives as long as its candidate, also while that is preempted. Raises ValueError for values that no sampling can have.

    `prompt`: token ids; those outside [0, vocabulary), as prompt tuning has, count for nothing. `index`: the candidate's number.
    """

    def __init__(self, sampling: SamplingLike, prompt: npt.ArrayLike, vocabulary: int, index: int = 0) -> None:
        if not (0 < vocabulary < 2**30 and 0 <= index < 2**32):
            raise ValueError("vocabulary must be in [1, 2^30), index in [0, 2^32)")
        self.vocabulary = vocabulary
        self.index = index
        self.temperature = float(np.float32(sampling.temperature))
        self.top_k, self.top_p, self.min_p = sampling.top_k, float(np.float32(sampling.top_p)), float(np.float32(sampling.min_p))
        self.repetition = np.float32(sampling.repetition_penalty)
        self.presence, self.frequency = np.float32(sampling.presence_penalty), np.float32(sampling.frequency_penalty)
        self.top = sampling.top_logprobs
        numbers = [self.temperature, self.top_p, self.min_p, float(self.repetition), float(self.presence), float(self.frequency)]
        if (
            not np.isfinite([*numbers, *sampling.logit_bias.values()]).all()
            or self.temperature < 0
            or self.repetition <= 0
            or self.top_k < 0
        ):
            raise ValueError("temperature, penalties, top_k and biases must be finite and in their ranges")
        if not 0 <= self.top <= TOP_MOST or any(not 0 <= token < vocabulary for token in sampling.logit_bias):
            raise ValueError(f"top_logprobs must be in [0, {TOP_MOST}], biased tokens in the vocabulary")
        self.bias = dict(sampling.logit_bias)
        self.seed = int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed % 2**64
        self.position = 0
        self._counts: dict[int, int] = {}
        if self.repetition != 1:
            self._counts = {token: 0 for token in np.unique(np.asarray(prompt, np.int64)).tolist() if 0 <= token < vocabulary}
        self._counted = bool(self.repetition != 1 or self.presence or self.frequency)

    def commit(self, token: int) -> None:
        """The candidate has got this token: the next number is drawn, and penalties count it."""
        self.position += 1
        if self._counted and 0 <= token < self.vocabulary:
            self._counts[token] = self._counts.get(token, 0) + 1

    def fork(self, index: int) -> RowState:
        """Another candidate of the same request, with what this one has so far and a stream of random numbers of its own."""
        other = object.__new__(RowState)
        other.__dict__.update(self.__dict__)
        other._counts = dict(self._counts)
        other.index = index
        return other


class SampleBuffers:
    """What `sample` fills, a row each: arrays that live as long as this object and are overwritten by the next call.

    `tokens` int32[rows] (-1: nothing is allowed, or the logits hold NaN or +infinity), `logprob`, `entropy` (nats) and `margin`
    float32[rows] of the raw logits, `top_ids` int32[rows, top] and `top_logprobs` float32[rows, top], likeliest first, unused entries -1
    and -infinity. `threads`: how many rows may be worked on at once.
    """

    def __init__(self, rows: int, top: int = TOP_MOST, threads: int = 1) -> None:
        if rows < 1 or not 0 <= top <= TOP_MOST or threads < 1:
            raise ValueError(f"rows and threads must be positive, top in [0, {TOP_MOST}]")
        self.tokens: Int32 = np.full(rows, -1, np.int32)
        self.logprob: Float32 = np.zeros(rows, np.float32)
        self.entropy: Float32 = np.zeros(rows, np.float32)
        self.margin: Float32 = np.zeros(rows, np.float32)
        self.top_ids: Int32 = np.full((rows, top), -1, np.int32)
        self.top_logprobs: Float32 = np.full((rows, top), -np.inf, np.float32)
        self.threads = threads


def sample(logits: Float32, states: Sequence[RowState], masks: Mask | None, out: SampleBuffers, rows: Int32 | None = None) -> None:
    """Draws one token for each state, from logits float32[R, vocabulary], which stay as they are.

    State i draws from row i, or `rows[i]` (several candidates from one row of a prompt's end). `masks`: uint32[states, words], bit set:
    allowed. Raises ValueError where shapes or dtypes do not fit each other.
    """
    check(logits, states, masks, out, rows)
    for i, state in enumerate(states):
        row = logits[i if rows is None else rows[i]]
        mask = None if masks is None else masks[i]
        out.tokens[i] = -1
        out.logprob[i] = out.entropy[i] = out.margin[i] = np.nan
        out.top_ids[i], out.top_logprobs[i] = -1, -np.inf
        if np.isnan(row).any() or not np.isfinite(row.max()):
            continue
        log_probs = row.astype(np.float64) - row.max()
        log_probs -= np.log(np.exp(log_probs).sum())
        out.entropy[i] = -(np.exp(log_probs) * np.maximum(log_probs, -1e4)).sum()
        best = np.sort(row)[-2:]
        out.margin[i] = best[1] - best[0] if len(best) == 2 else np.inf
        top = min(state.top, out.top_ids.shape[1], state.vocabulary)
        order = np.argsort(-row, kind="stable")[:top]
        order = order[row[order] > -np.inf]
        out.top_ids[i, : len(order)], out.top_logprobs[i, : len(order)] = order, log_probs[order]
        probabilities = distribution(row, state, mask)
        if probabilities is None:
            continue
        mass = np.cumsum(probabilities)
        token = int(np.searchsorted(mass, uniform(state) * mass[-1], side="right"))
        out.tokens[i] = token = min(token, int(np.flatnonzero(probabilities)[-1]))
        out.logprob[i] = log_probs[token]


def distribution(logits: Float32, state: RowState, mask: Mask | None = None) -> Float64 | None:
    """The probabilities float64[vocabulary] that the next token is drawn with, of one row of logits; None where nothing is allowed."""
    x = changed(logits, state, mask)
    if np.isnan(x).any() or not np.isfinite(x.max()):
        return None
    if state.temperature < GREEDY_BELOW:
        greedy: Float64 = np.zeros(len(x))
        greedy[x.argmax()] = 1
        return greedy
    exact = x.astype(np.float64)
    probabilities: Float64 = np.exp((exact - exact.max()) / state.temperature)
    if 0 < state.top_k < len(x):
        probabilities[x < np.partition(x, -state.top_k)[-state.top_k]] = 0
    if state.top_p < 1:
        order = np.argsort(-np.where(probabilities > 0, x, -np.inf), kind="stable")
        before = np.concatenate([[0.0], np.cumsum(probabilities[order])[:-1]])
        dropped = before >= state.top_p * probabilities.sum()
        dropped[0] = False
        probabilities[order[dropped]] = 0
    if state.min_p > 0:
        probabilities[probabilities < min(state.min_p, 1.0) * probabilities.max()] = 0
    probabilities /= probabilities.sum()
    return probabilities


def changed(logits: Float32, state: RowState, mask: Mask | None) -> Float32:
    """The logits after penalties, bias and mask, in single precision."""
    x = logits.astype(np.float32)
    if state._counts:
        seen = np.fromiter(state._counts.keys(), np.int64, len(state._counts))
        counts = np.fromiter(state._counts.values(), np.float32, len(state._counts))
        values = np.where(x[seen] > 0, x[seen] / state.repetition, x[seen] * state.repetition)
        x[seen] = np.where(counts > 0, values - (state.frequency * counts + state.presence), values)
    for token, bias in state.bias.items():
        x[token] += np.float32(bias)
    if mask is not None:
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(x)]
        x[bits == 0] = -np.inf
    return x


def uniform(state: RowState) -> float:
    """The number in [0, 1) that the state's next token is drawn at: 53 bits of Philox 4x32-10 (Salmon et al., 2011)."""
    word = 2**32 - 1
    c0, c1, c2, c3 = state.position & word, state.position >> 32, state.index, 0
    k0, k1 = state.seed & word, state.seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & word, (a >> 32) ^ c3 ^ k1, a & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return ((c1 << 32 | c0) >> 11) * 2.0**-53


def rank(logprobs: Sequence[Sequence[float]]) -> list[int]:
    """Candidates of one request, best first: by the mean log-probability of their tokens, earlier ones first among equals; none: last."""
    means = [float(np.mean(one)) if len(one) else -np.inf for one in logprobs]
    return sorted(range(len(means)), key=lambda i: -means[i])


def check(logits: Float32, states: Sequence[RowState], masks: Mask | None, out: SampleBuffers, rows: Int32 | None) -> None:
    """Raises ValueError unless all of a call's arguments fit each other."""
    if logits.dtype != np.float32 or logits.ndim != 2 or not logits.flags.c_contiguous:
        raise ValueError("logits must be float32 [rows, vocabulary], C-contiguous")
    if len(states) > len(out.tokens):
        raise ValueError(f"{len(states)} states, but the buffers have {len(out.tokens)} rows")
    if any(state.vocabulary != logits.shape[1] for state in states):
        raise ValueError(f"the logits have {logits.shape[1]} columns, which is not every state's vocabulary")
    if rows is None:
        if len(states) > len(logits):
            raise ValueError(f"{len(states)} states, but {len(logits)} rows of logits")
    elif rows.dtype != np.int32 or rows.ndim != 1 or not rows.flags.c_contiguous or len(rows) < len(states):
        raise ValueError("rows must be int32, one for each state")
    elif len(states) and not (int(rows[: len(states)].min()) >= 0 and int(rows[: len(states)].max()) < len(logits)):
        raise ValueError("rows must name rows of logits")
    if masks is not None and (
        masks.dtype != np.uint32
        or masks.ndim != 2
        or not masks.flags.c_contiguous
        or len(masks) < len(states)
        or masks.shape[1] * 32 < logits.shape[1]
    ):
        raise ValueError("masks must be uint32 [states, ceil(vocabulary / 32)], C-contiguous")
