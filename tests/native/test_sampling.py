"""Drawing tokens, compiled and twin, under the same cases; the twin against transformers, the compiled one against the twin."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native import sample, sampling, sampling_py
from server.runtime.decoder.contract import Sampling

BOTH = pytest.mark.parametrize("native", [sampling, sampling_py], ids=["compiled", "twin"])
MIXED = [
    Sampling(temperature=0),
    Sampling(),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(top_k=50),
    Sampling(top_k=40, top_p=0.9, temperature=0.8),
    Sampling(min_p=0.05),
    Sampling(temperature=1.3, top_k=2000, top_p=0.8),
    Sampling(top_p=0.5, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3),
    Sampling(temperature=0.5, logit_bias={3: 5.0, 0: -100.0}, top_logprobs=20),
    Sampling(temperature=2, top_p=0.99, min_p=0.02, top_k=300),
    Sampling(top_k=1),
    Sampling(top_p=1e-6),
]
Array = np.ndarray[Any, Any]


def normal(rows: int, vocabulary: int, scale: float = 3.0, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_normal((rows, vocabulary)) * scale).astype(np.float32)


def states_of(native: ModuleType, several: list[Sampling], vocabulary: int, prompt: Any = (), committed: Any = ()) -> list[Any]:
    made = []
    for one in several:
        bias = {token: value for token, value in one.logit_bias.items() if token < vocabulary}
        state = native.RowState(dataclasses.replace(one, logit_bias=bias), prompt, vocabulary)
        for token in committed:
            state.commit(int(token))
        made.append(state)
    return made


def seeded(several: list[Sampling], first: int = 0) -> list[Sampling]:
    return [dataclasses.replace(one, seed=first + i) for i, one in enumerate(several)]


def drawn(native: ModuleType, logits: Array, states: list[Any], masks: Any = None, rows: Any = None, threads: int = 1) -> Any:
    out = native.SampleBuffers(len(states), 20, threads)
    native.sample(logits, states, masks, out, rows)
    return out


def test_compiled_module_is_the_one_in_use() -> None:
    assert sampling.__file__.endswith((".so", ".pyd"))
    if not os.environ.get("UNDERSTUDY_NO_EXTENSIONS"):
        assert sample.sample is sampling.sample
        assert sample.RowState is sampling.RowState


# What is drawn.


def chi_square(counts: Array, expected: Array) -> float:
    """The probability of counts at least as far off; classes below 5 expected are joined."""
    from scipy import stats

    order = np.argsort(expected)
    starts, mass = [0], 0.0
    for at, value in enumerate(expected[order]):
        if mass >= 5:
            starts.append(at)
            mass = 0.0
        mass += value
    got, want = np.add.reduceat(counts[order], starts), np.add.reduceat(expected[order], starts)
    if want[-1] < 5 and len(want) > 1:
        got, want = np.append(got[:-2], got[-2:].sum()), np.append(want[:-2], want[-2:].sum())
    return float(stats.chisquare(got, want).pvalue) if len(got) > 1 else 1.0


@pytest.mark.parametrize(
    ("native", "vocabulary", "draws"), [(sampling, 40, 200), (sampling, 6000, 200), (sampling_py, 40, 40)], ids=["few", "many", "twin"]
)
@pytest.mark.parametrize("which", range(1, 10))
def test_frequencies_are_those_of_the_exact_distribution(native: ModuleType, vocabulary: int, draws: int, which: int) -> None:
    logits, prompt = normal(1, vocabulary, seed=which), [1, 2, 3]
    several = seeded([MIXED[which]] * 100, 1000)
    expected = sampling_py.distribution(logits[0], states_of(sampling_py, [MIXED[which]], vocabulary, prompt)[0])
    assert expected is not None
    # Where a penalty counts the answer's tokens, drawing anew from a fresh state; else along one state's positions.
    counts = np.zeros(vocabulary)
    states = states_of(native, several, vocabulary, prompt)
    rows = np.zeros(len(states), np.int32)
    for draw in range(draws):
        if which == 7:
            states = states_of(native, seeded(several, 100 * draw), vocabulary, prompt)
        out = drawn(native, logits, states, rows=rows)
        counts += np.bincount(out.tokens, minlength=vocabulary)
        for state, token in zip(states, out.tokens.tolist(), strict=True):
            state.commit(token)
    assert counts[expected == 0].sum() == 0
    assert chi_square(counts, expected * counts.sum()) > 1e-4


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 33, 512, 1000, 4097, 49_152])
@pytest.mark.parametrize("kind", ["normal", "rounded", "flat", "peaked"])
def test_compiled_draws_what_the_twin_draws(vocabulary: int, kind: str) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = normal(len(MIXED), vocabulary, {"flat": 0.3, "peaked": 12.0}.get(kind, 3.0), vocabulary)
    if kind == "rounded":  # many ties
        logits = np.round(logits)
    prompt, several = rng.integers(0, vocabulary, 40), seeded(MIXED, vocabulary)
    masks = rng.integers(0, 2**32, (len(MIXED), (vocabulary + 31) // 32), dtype=np.uint32)
    masks[2], masks[5] = 2**32 - 1, 0
    before = logits.copy()
    for given_masks in (None, masks):
        ours = drawn(sampling, logits, states_of(sampling, several, vocabulary, prompt, prompt[:15]), given_masks)
        twin = drawn(sampling_py, logits, states_of(sampling_py, several, vocabulary, prompt, prompt[:15]), given_masks)
        np.testing.assert_array_equal(ours.tokens, twin.tokens)
        np.testing.assert_array_equal(ours.top_ids, twin.top_ids)
        for name in ("logprob", "entropy", "margin", "top_logprobs"):
            np.testing.assert_allclose(getattr(ours, name), getattr(twin, name), rtol=3e-6, atol=2e-5)
    np.testing.assert_array_equal(logits, before)


EXTREME = st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, -0.0, 3e38, -3e38, -np.inf, 1e-40, 88.0, -87.5]))


@settings(max_examples=300, deadline=None)
@given(
    row=st.lists(EXTREME, min_size=1, max_size=300),
    temperature=st.sampled_from([0.0, 1e-6, 1e-5, 0.01, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 100, 513, 2**31 - 1]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.999999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.2, 1.0]),
    seed=st.integers(-(2**63), 2**64 - 1),
)
def test_any_logits_give_a_token_that_may_be_drawn(
    row: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = np.array([row], np.float32)
    one = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    expected, whole = (
        sampling_py.distribution(logits[0], states_of(sampling_py, [asked], len(row))[0])
        for asked in (one, Sampling(temperature=temperature))
    )
    token = int(drawn(sampling, logits, states_of(sampling, [one], len(row))).tokens[0])
    if expected is None or whole is None:
        assert token == -1
    else:
        # Masses that differ in their last bits may fall on either side of a cut.
        assert expected[token] > 0 or whole[token] >= whole[expected > 0].min() * (1 - 1e-4)
        assert row[token] > -np.inf


@pytest.mark.parametrize("one", [replaced for replaced in MIXED[1:10] if not replaced.logit_bias], ids=str)
def test_the_distribution_is_that_of_transformers(one: Sampling) -> None:
    import torch
    from transformers import generation

    logits, prompt = normal(1, 500, seed=5), [3, 3, 8, 120]
    if one.presence_penalty:
        one = dataclasses.replace(one, presence_penalty=0.0, frequency_penalty=0.0)
    processors = [generation.RepetitionPenaltyLogitsProcessor(one.repetition_penalty)] if one.repetition_penalty != 1 else []
    processors += [generation.TemperatureLogitsWarper(float(one.temperature))] if one.temperature != 1 else []
    processors += [generation.TopKLogitsWarper(one.top_k)] if one.top_k else []
    processors += [generation.TopPLogitsWarper(one.top_p)] if one.top_p < 1 else []
    processors += [generation.MinPLogitsWarper(one.min_p)] if one.min_p else []
    scores = generation.LogitsProcessorList(processors)(torch.tensor([prompt]), torch.from_numpy(logits.copy()))
    (state,) = states_of(sampling_py, [one], 500, prompt)
    ours = sampling_py.distribution(logits[0], state)
    assert ours is not None
    np.testing.assert_allclose(ours, scores.double().softmax(-1)[0].numpy(), atol=1e-6)
    assert ((ours > 0) == (scores[0].numpy() > -np.inf)).all()


@BOTH
def test_penalties_and_bias(native: ModuleType) -> None:
    """vLLM's and OpenAI's definitions, by hand: token 0 in the prompt, token 1 drawn twice, token 2 both, token 3 biased."""
    logits = np.array([[2.0, 2.0, -1.0, 0.5, 1.9]], np.float32)
    one = Sampling(temperature=0, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.125, logit_bias={3: 1.25})
    (state,) = states_of(native, [one], 5, prompt=[0, 2, 77, -1], committed=[1, 1, 2])
    (twin,) = states_of(sampling_py, [one], 5, prompt=[0, 2], committed=[1, 1, 2])
    np.testing.assert_allclose(sampling_py.changed(logits[0], twin, None), [1.0, 0.5, -2.375, 1.75, 1.9])
    out = drawn(native, logits, [state])
    assert out.tokens[0] == 4
    # What is reported is of the raw logits.
    exact = logits[0].astype(np.float64) - np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert out.logprob[0] == pytest.approx(exact[4], abs=1e-6)
    assert out.entropy[0] == pytest.approx(-(np.exp(exact) * exact).sum(), abs=1e-6)
    assert out.margin[0] == 0.0


@BOTH
def test_presence_and_frequency_count_the_answer_alone(native: ModuleType) -> None:
    logits = np.array([[1.0, 0.9]], np.float32)
    one = Sampling(temperature=0, presence_penalty=1.0)
    (fresh,) = states_of(native, [one], 2, prompt=[0, 0])
    (used,) = states_of(native, [one], 2, prompt=[0], committed=[0])
    assert drawn(native, logits, [fresh, used], rows=np.zeros(2, np.int32)).tokens.tolist() == [0, 1]


@BOTH
def test_what_cannot_be_drawn_is_said_row_by_row(native: ModuleType) -> None:
    logits = normal(6, 70)
    logits[1, 5] = np.nan
    logits[2, 69] = np.inf
    logits[3] = -np.inf
    masks = np.full((6, 3), 2**32 - 1, np.uint32)
    masks[4] = 0
    masks[5] = [0, 0, 1 << 5]  # token 69
    out = drawn(native, logits, states_of(native, seeded([Sampling()] * 6), 70), masks)
    assert out.tokens[1:5].tolist() == [-1] * 4
    assert out.tokens[0] >= 0
    assert out.tokens[5] == 69
    assert np.isnan(out.logprob[1:5]).all()
    assert np.isfinite(out.entropy[[0, 4, 5]]).all()
    assert np.isnan(out.entropy[1:4]).all()


@BOTH
def test_equal_logits(native: ModuleType) -> None:
    """Greedy takes the lowest id; top_k keeps ties with the k-th; top_p keeps the fewest, lowest ids first."""
    logits = np.zeros((1, 300), np.float32)
    (greedy,) = states_of(native, [Sampling(temperature=0)], 300)
    assert drawn(native, logits, [greedy]).tokens[0] == 0
    rows = np.zeros(200, np.int32)
    by_k = drawn(native, logits, states_of(native, seeded([Sampling(top_k=3)] * 200), 300), rows=rows).tokens
    assert by_k.max() > 250
    by_p = drawn(native, logits, states_of(native, seeded([Sampling(top_p=0.1)] * 200), 300), rows=rows).tokens
    assert 20 <= by_p.max() <= 30  # 30 or, with 0.1 in single precision, 31 tokens


@BOTH
def test_alternatives_are_the_likeliest(native: ModuleType) -> None:
    logits = np.round(normal(3, 900, seed=2), 1)
    several = seeded([Sampling(top_logprobs=k) for k in (0, 3, 20)])
    out = drawn(native, logits, states_of(native, several, 900))
    for row, count in enumerate((0, 3, 20)):
        exact = logits[row].astype(np.float64) - np.log(np.exp(logits[row].astype(np.float64)).sum())
        order = np.argsort(-logits[row], kind="stable")[:count]
        assert out.top_ids[row].tolist() == [*order.tolist(), *[-1] * (20 - count)]
        np.testing.assert_allclose(out.top_logprobs[row, :count], exact[order], atol=1e-5)
        assert (out.top_logprobs[row, count:] == -np.inf).all()
        assert out.margin[row] == pytest.approx(np.sort(logits[row])[-1] - np.sort(logits[row])[-2], abs=1e-6)
    assert drawn(native, logits[:, :2].copy(), states_of(native, [several[2]], 2)).top_ids[0, 2] == -1


# Seeds.


def texts(native: ModuleType, several: list[Sampling], order: list[int], steps: int = 30, threads: int = 1) -> list[list[int]]:
    """Tokens of each candidate, run in one batch in the given order, over logits that depend on the candidate and the step alone."""
    states = states_of(native, several, 700)
    found: list[list[int]] = [[] for _ in several]
    for step in range(steps):
        logits = np.concatenate([normal(1, 700, seed=1000 * i + step) for i in order])
        out = drawn(native, logits, [states[i] for i in order], threads=threads)
        for i, token in zip(order, out.tokens.tolist(), strict=True):
            states[i].commit(token)
            found[i].append(token)
    return found


@BOTH
def test_a_seed_gives_the_same_text_in_any_batch(native: ModuleType) -> None:
    several = seeded(MIXED, 77)
    together = texts(native, several, list(range(len(several))))
    assert texts(native, several, list(reversed(range(len(several)))), threads=2) == together
    alone = texts(native, several, [7])
    assert alone[7] == together[7]


@BOTH
def test_candidates_and_seeds_have_streams_of_their_own(native: ModuleType) -> None:
    logits, rows = np.zeros((1, 10_000), np.float32), np.zeros(40, np.int32)
    (first,) = states_of(native, [Sampling(seed=5)], 10_000)
    family = [first, *(first.fork(i) for i in range(1, 20)), *states_of(native, seeded([Sampling()] * 20, 6), 10_000)]
    tokens = drawn(native, logits, family, rows=rows).tokens.tolist()
    assert len(set(tokens)) > 35
    again = states_of(native, [Sampling(seed=5)], 10_000)[0]
    assert drawn(native, logits, [again, again.fork(3), first.fork(3)], rows=rows[:3]).tokens.tolist() == [tokens[0], tokens[3], tokens[3]]
    without = drawn(native, logits, states_of(native, [Sampling()] * 40, 10_000), rows=rows).tokens
    assert len(set(without.tolist())) > 35


@BOTH
def test_forks_count_apart(native: ModuleType) -> None:
    logits = np.array([[1.0, 0.9, 0.0]], np.float32)
    (parent,) = states_of(native, [Sampling(temperature=0, presence_penalty=5.0, logit_bias={2: -1.0})], 3, committed=[0])
    child = parent.fork(1)
    assert (child.index, child.position, parent.position) == (1, 1, 1)
    parent.commit(1)
    for token in (2, 2, 0):
        child.commit(token)
    del parent
    assert drawn(native, logits, [child]).tokens[0] == 1


@BOTH
def test_random_numbers_are_philox(native: ModuleType) -> None:
    """The known answer of Random123 for counter and key 0, seen through where a flat distribution is cut."""
    (state,) = states_of(native, [Sampling(seed=0)], 2**20)
    expected = (0xE169C58D6627E8D5 >> 11) * 2.0**-53
    (twin,) = states_of(sampling_py, [Sampling(seed=0)], 2**20)
    assert sampling_py.uniform(twin) == expected
    assert drawn(native, np.zeros((1, 2**20), np.float32), [state]).tokens[0] == int(expected * 2**20)


# What does not fit.


@BOTH
def test_arguments_that_do_not_fit_are_refused(native: ModuleType) -> None:
    logits, out = normal(2, 64), native.SampleBuffers(2)
    states = states_of(native, [Sampling()] * 2, 64)
    bad: list[tuple[Any, ...]] = [
        (logits, states * 2, None, out),
        (logits[:1], states, None, out),
        (logits[:, :63].copy(), states, None, out),
        (logits.astype(np.float64), states, None, out),
        (logits[:, ::-1], states, None, out),
        (logits, states, np.zeros((2, 1), np.uint32), out),
        (logits, states, np.zeros((1, 2), np.uint32), out),
        (logits, states, np.zeros((2, 2), np.int64), out),
        (logits, states, None, out, np.array([0, 2], np.int32)),
        (logits, states, None, out, np.array([-1, 0], np.int32)),
        (logits, states, None, out, np.array([0], np.int32)),
        (logits, states, None, out, np.array([0, 1], np.int64)),
    ]
    for arguments in bad:
        with pytest.raises(ValueError):
            native.sample(*arguments)
    native.sample(logits, [], None, out)


@BOTH
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.inf},
        {"top_k": -1},
        {"top_logprobs": 21},
        {"logit_bias": {64: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.nan}},
    ],
)
def test_values_that_no_sampling_has_are_refused(native: ModuleType, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        native.RowState(Sampling(**values), [], 64)


def test_candidates_are_ranked_by_their_mean_log_probability() -> None:
    assert sample.rank([[-1.0, -3.0], [-1.5], [], [-1.5, -1.5], [-0.1]]) == [4, 1, 3, 0, 2]


# Speed.


def median_s(native: ModuleType, several: list[Sampling], rounds: int) -> float:
    logits = normal(32, 49_152)
    states = states_of(native, [several[i % len(several)] for i in range(32)], 49_152, prompt=range(200))
    out, seconds = native.SampleBuffers(32), []
    for _ in range(rounds):
        began = time.perf_counter()
        native.sample(logits, states, None, out)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[rounds // 2]


def test_compiled_is_much_faster_than_the_twin() -> None:
    several = MIXED[:10]
    assert median_s(sampling_py, several, 3) >= 20 * median_s(sampling, several, 15)
