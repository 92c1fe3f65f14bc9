"""Sampling values out of range, or against each other, are refused by the name of their field."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from server.errors import InvalidArgument
from server.runtime.decoder.checks import check_request
from server.runtime.decoder.contract import Sampling
from server.runtime.decoder.request import GenerateRequest

NAN, INF = math.nan, math.inf
SAMPLING: list[tuple[str, dict[str, Any]]] = [
    *(("sampling.temperature", {"temperature": value}) for value in (-0.1, 2.01, NAN, INF, -INF)),
    *(("sampling.top_p", {"top_p": value}) for value in (0.0, -1.0, 1.001, NAN)),
    *(("sampling.min_p", {"min_p": value}) for value in (-0.01, 1.01, NAN)),
    *(("sampling.top_k", {"top_k": value}) for value in (-1, 2**31)),
    *(("sampling.repetition_penalty", {"repetition_penalty": value}) for value in (0.0, -1.0, 101.0, NAN, INF)),
    *(("sampling.presence_penalty", {"presence_penalty": value}) for value in (-2.1, 2.1, NAN)),
    *(("sampling.frequency_penalty", {"frequency_penalty": value}) for value in (-2.1, 2.1, NAN)),
    *(("sampling.seed", {"seed": value}) for value in (-(2**63) - 1, 2**64)),
    ("sampling.logit_bias[100]", {"logit_bias": {100: 1.0}}),
    ("sampling.logit_bias[-1]", {"logit_bias": {-1: 1.0}}),
    ("sampling.logit_bias[7]", {"logit_bias": {3: 1.0, 7: NAN}}),
    ("sampling.logit_bias[7]", {"logit_bias": {7: 100.5}}),
    ("top_logprobs", {"top_logprobs": 21, "logprobs": True}),
    ("top_logprobs", {"top_logprobs": -1, "logprobs": True}),
    ("top_logprobs", {"top_logprobs": 1}),
]
REQUEST: list[tuple[str, dict[str, Any]]] = [
    ("sampling.stop", {"stop": ["x"] * 17}),
    ("sampling.stop[1]", {"stop": ["x", ""]}),
    ("sampling.stop[0]", {"stop": ["x" * 257]}),
    ("sampling.stop_token_ids[1]", {"stop_token_ids": [99, 100]}),
    ("sampling.stop_token_ids", {"stop_token_ids": list(range(65))}),
    ("sampling.n", {"n": 17}),
    ("sampling.n", {"n": -1}),
    ("sampling.best_of", {"best_of": 17}),
    ("sampling.best_of", {"n": 3, "best_of": 2}),
]


@pytest.mark.parametrize(("field", "values"), SAMPLING)
def test_sampling_values(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"expected|knows ids") as refused:
        check_request(GenerateRequest(sampling=Sampling(**values)), 100)
    assert refused.value.metadata["field"] == field
    assert field in refused.value.message


@pytest.mark.parametrize(("field", "values"), REQUEST)
def test_request_values(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"expected|knows ids") as refused:
        check_request(dataclasses.replace(GenerateRequest(), **values), 100)
    assert refused.value.metadata["field"] == field


def test_what_is_at_the_edge_of_its_range_passes() -> None:
    least = Sampling(0.0, 0, 1e-6, 0.0, 1e-3, -2.0, -2.0, {0: -100.0}, -(2**63))
    most = Sampling(2.0, 2**31 - 1, 1.0, 1.0, 100.0, 2.0, 2.0, {99: 100.0}, 2**63 - 1, logprobs=True, top_logprobs=20)
    for sampling in (Sampling(), least, most):
        check_request(GenerateRequest(sampling=sampling, n=4, best_of=16, stop=["x" * 256] * 16, stop_token_ids=[0, 99]), 100)
    check_request(GenerateRequest(sampling=Sampling(temperature=0), n=4), 100)
