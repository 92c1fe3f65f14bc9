"""The quality of an answer: features -> score -> calibrated probability, and what a second try can be told about it.

The score is linear: a bias, weights on the native features and on what only the server knows (validity, similarity to the prompt, the
record of whoever answered), hashed n-grams of prompt and answer, and their embeddings where the model was fitted with them. Where other
answers to the same prompt are known, a second linear step adds their agreement. Each of the two steps has a curve of its own from score
to probability.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import log

import numpy as np

from native.score import FEATURES, LENGTH, STOP, TOOL_CALLS, UNKNOWN_FINISH, Pair
from server.core import FinishReason, FloatArray, Task
from server.quality.curve import Curve
from server.quality.model import EXTRAS, QualityModel

_FINISH = {FinishReason.STOP: STOP, FinishReason.LENGTH: LENGTH, FinishReason.TOOL_CALLS: TOOL_CALLS}
# Their answers are made of what the prompt says, so a number that it does not have is a finding.
_GROUNDED = frozenset({Task.SUMMARIZATION, Task.QUESTION_ANSWERING, Task.TRANSLATION})
_PLACE = {name: i for i, name in enumerate(FEATURES)}
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_SHOWN = 3
# What an answer that its skill's own validator refused is worth; no model is asked.
INVALID = 0.01


@dataclass(slots=True, frozen=True)
class Observed:
    """An answer and what is known of it.

    `logprobs`, `entropies`, `margins`: float32[n] from the decoder, or None. `valid`: whether it passed its skill's validator (JSON
    schema, labels), None without one; `reason` says why it did not. `agreement` in [0, 1]: the support of other answers to the same
    prompt (`agreement.support`, or the share of a vote), None where there are none. `vectors`: the embeddings of prompt and answer, one
    after the other, float32[2 * H]. `record`: the share of acceptable ones among the earlier answers of whoever gave this one.
    """

    prompt: str
    answer: str
    task: Task = Task.TEXT_GENERATION
    finish: FinishReason | None = None
    logprobs: FloatArray | None = None
    entropies: FloatArray | None = None
    margins: FloatArray | None = None
    valid: bool | None = None
    reason: str = ""
    agreement: float | None = None
    vectors: FloatArray | None = None
    record: float | None = None


@dataclass(slots=True, frozen=True)
class Quality:
    """`value`: the probability in [0, 1] that the answer is acceptable. `calibrated`: whether that was measured on the skill's own
    answers. `features` float32, by `names()`. `findings`: what is wrong with the answer, in words that a second try can be told.
    """

    value: float | None
    calibrated: bool
    features: FloatArray = field(repr=False)
    findings: tuple[str, ...] = ()


def names() -> tuple[str, ...]:
    """The names of `Quality.features`."""
    return (*FEATURES, *EXTRAS)


def measured(observed: Observed, pair: Pair | None = None) -> FloatArray:
    """float32[len(names())] of an answer; `pair` saves reading it again."""
    read = pair or Pair(observed.prompt, observed.answer)
    finish = UNKNOWN_FINISH if observed.finish is None else _FINISH[observed.finish]
    similarity = 0.0 if observed.vectors is None else _cosine(observed.vectors)
    record = 0.5 if observed.record is None else min(max(observed.record, 0.02), 0.98)
    extras = (
        float(observed.valid is not None),
        float(observed.valid is True),
        float(observed.vectors is not None),
        similarity,
        float(observed.record is not None),
        log(record / (1 - record)),
    )
    text = read.features(_row(observed.logprobs), _row(observed.entropies), _row(observed.margins), finish)
    return np.concatenate([text, np.nan_to_num(np.asarray(extras, np.float32))])


def score(model: QualityModel, observed: Observed, curve: Curve | None = None) -> Quality:
    """What an answer is worth.

    Args:
        model: `model.cold_start()`, or one that was fitted on the skill's answers.
        observed: the answer.
        curve: the skill's own calibration of this model's raw score (`raw`); None: the model's.
    """
    pair = Pair(observed.prompt, observed.answer)
    features = measured(observed, pair)
    found = findings(observed, features)
    calibrated = curve is not None or model.calibrated
    if observed.valid is False or not observed.answer.strip():
        return Quality(INVALID, calibrated, features, found)
    reached = model.raw(features, pair, observed.agreement, observed.vectors)
    value = model.quality(reached, observed.agreement) if curve is None else float(curve.quality(reached))
    return Quality(value, calibrated, features, found)


def raw(model: QualityModel, observed: Observed) -> float:
    """The score before any curve: what a skill's own calibration is fitted on."""
    pair = Pair(observed.prompt, observed.answer)
    return model.raw(measured(observed, pair), pair, observed.agreement, observed.vectors)


def findings(observed: Observed, features: FloatArray) -> tuple[str, ...]:
    """What can be said against the answer for certain, gravest first; empty where nothing can."""

    def seen(name: str) -> float:
        return float(features[_PLACE[name]])

    if seen("empty") and not observed.answer.strip():
        return ("the answer was empty",)
    found = []
    if observed.finish is FinishReason.LENGTH:
        found.append("the answer was cut off")
    if observed.valid is False:
        wanted = "not valid JSON" if seen("json_like") and not seen("json_valid") else "not in the form that was asked for"
        found.append(f"{wanted}: {observed.reason}" if observed.reason else wanted)
    elif observed.valid is None and seen("json_like") and not seen("json_valid") and observed.answer.rstrip().endswith(("}", "]")):
        found.append("not valid JSON")
    if seen("refusal_early"):
        found.append("it refused, or said that it cannot answer")
    words = np.expm1(seen("words"))
    if words >= 20 and (seen("repeat_4") > 0.5 or seen("line_repeat") > 0.6):
        found.append("it repeats itself")
    if seen("fences"):
        found.append("a code block is not closed")
    if words >= 20 and seen("unfinished") and observed.finish is None and not seen("json_like"):
        found.append("the last sentence is not finished")
    if words >= 12 and seen("echo_run") > 0.8 and observed.task is not Task.QUESTION_ANSWERING:
        found.append("it repeats the prompt")
    if observed.task in _GROUNDED and seen("novel_numbers") > 0:
        found += [f"a number that is not in the source: {number}" for number in novel_numbers(observed.prompt, observed.answer)[:_SHOWN]]
    if seen("other_script") > 0.5 and observed.task not in (Task.TRANSLATION, Task.TEXT_GENERATION):
        found.append("it is written in another script than the source")
    if observed.agreement is not None and observed.agreement < 0.25:
        found.append("other answers to the same question say something else")
    return tuple(found)


def novel_numbers(prompt: str, answer: str) -> list[str]:
    """The answer's numbers that the prompt does not have, in their order, thousands separators aside."""
    known = {number.replace(",", "") for number in _NUMBER.findall(prompt)}
    return list(dict.fromkeys(number for number in _NUMBER.findall(answer) if number.replace(",", "") not in known))


def _row(values: FloatArray | None) -> FloatArray | None:
    return None if values is None else np.ascontiguousarray(values, np.float32)


def _cosine(vectors: FloatArray) -> float:
    first, second = np.split(vectors.astype(np.float64), 2)
    return float(first @ second / max(float(np.linalg.norm(first) * np.linalg.norm(second)), 1e-9))
