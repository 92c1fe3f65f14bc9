"""What a request may ask of sampling: ranges, and values that contradict each other, refused by the name of their field."""

from __future__ import annotations

import math
from collections.abc import Sequence

from native.sample import TOP_MOST
from server.errors import InvalidArgument
from server.runtime.decoder.contract import Sampling
from server.runtime.decoder.request import GenerateRequest

MOST_ANSWERS = 16
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 256
MOST_STOP_IDS = 64
MOST_BIASES = 1024


def check_request(request: GenerateRequest, vocabulary: int) -> None:
    """Everything about sampling in a request: `check_sampling`, `check_stops` and the numbers of answers."""
    check_sampling(request.sampling, vocabulary)
    check_stops(request.stop, request.stop_token_ids, vocabulary)
    check_answers(request.n, request.best_of)


def check_sampling(sampling: Sampling, vocabulary: int) -> None:
    """Raises InvalidArgument for the first value out of its range; `field` is named as in understudy.v1.GenerateRequest.

    Values that have no effect are allowed: with temperature 0, top_p and the like change nothing and several answers are equal, and a
    caller who tries temperatures need not change the rest with them.
    """
    _within("sampling.temperature", sampling.temperature, 0, 2, "0 (greedy) to 2")
    _within("sampling.top_p", sampling.top_p, 0, 1, "above 0, at most 1", above=True)
    _within("sampling.min_p", sampling.min_p, 0, 1, "0 to 1")
    _within("sampling.repetition_penalty", sampling.repetition_penalty, 0, 100, "above 0, at most 100 (1: none)", above=True)
    _within("sampling.presence_penalty", sampling.presence_penalty, -2, 2, "-2 to 2")
    _within("sampling.frequency_penalty", sampling.frequency_penalty, -2, 2, "-2 to 2")
    _within("sampling.top_k", sampling.top_k, 0, 2**31 - 1, "0 (all) or more")
    if sampling.seed is not None:
        _within("sampling.seed", sampling.seed, -(2**63), 2**64 - 1, "an integer of 64 bits")
    _within("top_logprobs", sampling.top_logprobs, 0, TOP_MOST, f"0 to {TOP_MOST}")
    if sampling.top_logprobs and not sampling.logprobs:
        message = f"top_logprobs is {sampling.top_logprobs} and logprobs is not set; expected both. Set logprobs."
        raise InvalidArgument(message, field="top_logprobs")
    if len(sampling.logit_bias) > MOST_BIASES:
        message = f"sampling.logit_bias has {len(sampling.logit_bias)} tokens; expected at most {MOST_BIASES}."
        raise InvalidArgument(message, field="sampling.logit_bias", limit=MOST_BIASES)
    for token, bias in sampling.logit_bias.items():
        _token(f"sampling.logit_bias[{token}]", token, vocabulary)
        _within(f"sampling.logit_bias[{token}]", bias, -100, 100, "-100 to 100")


def check_stops(stop: Sequence[str], stop_token_ids: Sequence[int], vocabulary: int) -> None:
    """Raises InvalidArgument for stop strings that are too many, empty or too long, and for stop tokens out of the vocabulary."""
    if len(stop) > MOST_STOPS:
        raise InvalidArgument(
            f"sampling.stop has {len(stop)} texts; expected at most {MOST_STOPS}.", field="sampling.stop", limit=MOST_STOPS
        )
    for index, text in enumerate(stop):
        field = f"sampling.stop[{index}]"
        if not 0 < len(text) <= MOST_STOP_CHARACTERS:
            message = f"{field} has {len(text)} characters; expected 1 to {MOST_STOP_CHARACTERS}."
            raise InvalidArgument(message, field=field, limit=MOST_STOP_CHARACTERS)
    if len(stop_token_ids) > MOST_STOP_IDS:
        message = f"sampling.stop_token_ids has {len(stop_token_ids)} ids; expected at most {MOST_STOP_IDS}."
        raise InvalidArgument(message, field="sampling.stop_token_ids", limit=MOST_STOP_IDS)
    for index, token in enumerate(stop_token_ids):
        _token(f"sampling.stop_token_ids[{index}]", token, vocabulary)


def check_answers(n: int, best_of: int) -> None:
    """Raises InvalidArgument unless n and best_of (0: the default) are in [0, 16] and best_of, where given, is at least n."""
    _within("sampling.n", n, 0, MOST_ANSWERS, f"1 to {MOST_ANSWERS}, or 0 for the default")
    _within("sampling.best_of", best_of, 0, MOST_ANSWERS, f"1 to {MOST_ANSWERS}, or 0 for the default")
    if best_of and best_of < n:
        message = f"sampling.best_of is {best_of} and sampling.n {n}; expected best_of >= n."
        raise InvalidArgument(message, field="sampling.best_of", limit=n)


def _within(field: str, value: float, least: float, most: float, expected: str, *, above: bool = False) -> None:
    """`above`: `least` itself is too little. NaN is in no range."""
    if math.isfinite(value) and least <= value <= most and not (above and value == least):
        return
    raise InvalidArgument(f"{field} is {value:g}; expected {expected}.", field=field, value=f"{value:g}")


def _token(field: str, token: int, vocabulary: int) -> None:
    if not 0 <= token < vocabulary:
        message = f"{field} names token {token}; the model knows ids from 0 to {vocabulary - 1}."
        raise InvalidArgument(message, field=field, limit=vocabulary)
