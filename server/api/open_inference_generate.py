"""Text generation through the Open Inference Protocol, by the conventions of Triton's vLLM backend, so that its clients work unchanged.

| input | | |
|---|---|---|
| text_input | BYTES [1] | the prompt |
| stream | BOOL [1] | one response a piece of the answer; ModelStreamInfer alone. Without it: one response with the whole answer |
| sampling_parameters | BYTES [1] | JSON, by vLLM's names: temperature, top_p, max_tokens (16 without it), n, stop, seed, ... |
| exclude_input_in_output | BOOL [1] | leaves the prompt out of text_output; streams always do |
| return_finish_reason, return_num_input_tokens, return_num_output_tokens | BOOL [1] | more outputs |

Outputs: text_output BYTES [n], and those asked for: finish_reason BYTES [n], num_input_tokens and num_output_tokens UINT32 [n].
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from server.api.open_inference_codec import Array
from server.core import Call, Format
from server.errors import InvalidArgument, InvalidTensor
from server.runtime.decoder.contract import Sampling
from server.runtime.decoder.generator import Generation, GeneratorModel
from server.runtime.decoder.request import GenerateRequest

DEFAULT_MAX_TOKENS = 16
_FLAGS = ("stream", "exclude_input_in_output", "return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
_TEXTS = ("text_input", "sampling_parameters")
INPUTS = tuple((name, "BYTES") for name in _TEXTS) + tuple((name, "BOOL") for name in _FLAGS)
OUTPUTS = (("text_output", "BYTES"), ("finish_reason", "BYTES"), ("num_input_tokens", "UINT32"), ("num_output_tokens", "UINT32"))
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_WHOLE = ("top_k", "seed", "n", "best_of", "max_tokens")
_GUIDED = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar", "json_object": "json_object"}
_OTHERS = ("stop", "stop_token_ids", "ignore_eos", "logit_bias", "lora_name", "guided_decoding")
_FIELD = "sampling_parameters"


@dataclass(frozen=True, slots=True)
class Ask:
    """A request of this protocol: what the model gets, and how the answer is to be given."""

    request: GenerateRequest
    stream: bool
    prepend: bool
    finish_reason: bool
    input_count: bool
    output_count: bool


def read(inputs: Mapping[str, Array]) -> Ask:
    """Raises InvalidTensor for inputs that are none of the table above, InvalidArgument for parameters that cannot be."""
    known = [*_TEXTS, *_FLAGS]
    for name in inputs:
        if name not in known:
            message = f"input {name[:64]!r} is not known; this model generates text and takes {', '.join(known)}."
            raise InvalidTensor(message, tensor=name[:64], expected=", ".join(known))
    flags = {name: _flag(name, inputs[name]) for name in _FLAGS if name in inputs}
    stream = flags.get("stream", False)
    exclude = flags.get("exclude_input_in_output", stream)
    if stream and not exclude:
        message = "exclude_input_in_output is false in a stream, whose pieces hold no prompt; expected true. Leave it out."
        raise InvalidArgument(message, field="exclude_input_in_output")
    prompt = _text("text_input", inputs.get("text_input"))
    parameters = _json(_text(_FIELD, inputs[_FIELD])) if _FIELD in inputs else {}
    return Ask(
        _request(prompt, parameters),
        stream,
        not exclude,
        flags.get("return_finish_reason", False),
        flags.get("return_num_input_tokens", False),
        flags.get("return_num_output_tokens", False),
    )


async def whole(model: GeneratorModel, ask: Ask, call: Call) -> tuple[dict[str, Array], Generation]:
    """The answers in one response."""
    generation = await model.generate(ask.request, call)
    try:
        answers = await generation.collect()
    finally:
        generation.cancel()
    head = (ask.request.prompt or "") if ask.prepend else ""
    outputs = {"text_output": _bytes([head + answer.text for answer in answers])}
    counts = [answer.count for answer in answers]
    _more(outputs, ask, [answer.finish.value for answer in answers], generation.prompt_tokens, counts)
    return outputs, generation


async def pieces(model: GeneratorModel, ask: Ask, call: Call) -> AsyncGenerator[dict[str, Array], None]:
    """A stream's responses: the new text of every answer, "" for those that got none."""
    request = ask.request
    if request.n > 1 and request.best_of > request.n:
        raise InvalidArgument("best_of in a stream; expected stream to be false.", field=_FIELD)
    generation = await model.generate(request, call)
    count = request.n
    try:
        async for deltas in generation.deltas():
            texts, reasons, tokens = [""] * count, [""] * count, [0] * count
            for delta in deltas:
                texts[delta.index] = delta.text
                reasons[delta.index] = delta.finish.value if delta.finish is not None else ""
                tokens[delta.index] = delta.count
            outputs = {"text_output": _bytes(texts)}
            _more(outputs, ask, reasons, generation.prompt_tokens, tokens)
            yield outputs
    finally:
        generation.cancel()


def _more(outputs: dict[str, Array], ask: Ask, reasons: list[str], prompt: int, counts: list[int]) -> None:
    if ask.finish_reason:
        outputs["finish_reason"] = _bytes(reasons)
    if ask.input_count:
        outputs["num_input_tokens"] = np.full(len(counts), prompt, np.uint32)
    if ask.output_count:
        outputs["num_output_tokens"] = np.array(counts, np.uint32)


def _request(prompt: str, given: Mapping[str, Any]) -> GenerateRequest:
    known = (*_FLOATS, *_WHOLE, *_OTHERS)
    for name in given:
        if name not in known:
            raise InvalidArgument(f"{_FIELD}: {name[:64]!r} is not known; known are {', '.join(known)}.", field=f"{_FIELD}.{name[:64]}")
    numbers: dict[str, Any] = {name: _number(name, given[name], float) for name in _FLOATS if name in given}
    whole = {name: _number(name, given[name], int) for name in _WHOLE if given.get(name) is not None}
    bias = _typed(given, "logit_bias", dict, {})
    stop = given.get("stop") or []
    try:
        biases = {int(token): float(value) for token, value in bias.items()}
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{_FIELD}: logit_bias maps token ids to numbers.", field=f"{_FIELD}.logit_bias") from error
    return GenerateRequest(
        prompt=prompt,
        sampling=Sampling(**numbers, top_k=max(0, whole.get("top_k", 0)), seed=whole.get("seed"), logit_bias=biases),
        max_tokens=whole.get("max_tokens", DEFAULT_MAX_TOKENS),
        n=whole.get("n", 1),
        best_of=whole.get("best_of", 0),
        stop=[stop] if isinstance(stop, str) else _strings(stop),
        stop_token_ids=[_number("stop_token_ids", one, int) for one in _typed(given, "stop_token_ids", list, [])],
        ignore_eos=_typed(given, "ignore_eos", bool, False),
        format=_guided(_typed(given, "guided_decoding", dict, {})),
        adapter=_typed(given, "lora_name", str, ""),
    )


def _guided(given: Mapping[str, Any]) -> Format | None:
    wanted = {name: value for name, value in given.items() if value not in (None, False)}
    if not wanted:
        return None
    name = next(iter(wanted))
    if len(wanted) > 1 or name not in _GUIDED:
        raise InvalidArgument(f"{_FIELD}: guided_decoding takes one of {', '.join(_GUIDED)}.", field=f"{_FIELD}.guided_decoding")
    value = wanted[name]
    if name == "choice":
        return Format("choice", choices=tuple(_strings(value)))
    if name == "json_object":
        return Format("json_object")
    text = value if isinstance(value, str) else json.dumps(value)
    return Format("json_schema" if name == "json" else "regex" if name == "regex" else "grammar", text)


def _typed(given: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = given.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        message = f"{_FIELD}: {name} is a {type(value).__name__}; expected a {kind.__name__}."
        raise InvalidArgument(message, field=f"{_FIELD}.{name}")
    return value


def _strings(value: object) -> list[str]:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    raise InvalidArgument(f"{_FIELD}: expected a list of texts.", field=_FIELD)


def _number(name: str, value: object, kind: type) -> Any:
    """Numbers come as numbers or, as older clients send them, as text."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = kind(value)
        if kind is int and float(value) != number:
            raise ValueError
    except (ValueError, OverflowError):
        message = f"{_FIELD}: {name} is {str(value)[:40]!r}; expected a number."
        raise InvalidArgument(message, field=f"{_FIELD}.{name}") from None
    return number


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{_FIELD} is no JSON: {str(error)[:100]}; expected an object.", field=_FIELD) from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"{_FIELD} is a JSON {type(value).__name__}; expected an object.", field=_FIELD)
    return value


def _text(name: str, array: Array | None) -> str:
    if array is None:
        raise InvalidTensor(f"input {name!r} is missing; give it as BYTES [1].", tensor=name, expected="BYTES [1]")
    if array.dtype.kind != "O" or array.size != 1:
        raise InvalidTensor(f"input {name!r} is no single text; expected BYTES [1].", tensor=name, expected="BYTES [1]")
    try:
        return str(array.reshape(-1)[0].decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{name} is not valid UTF-8 at byte {error.start}; send UTF-8.", field=name, offset=error.start) from None


def _flag(name: str, array: Array) -> bool:
    if array.dtype.kind != "b" or array.size != 1:
        raise InvalidTensor(f"input {name!r} is true or false; expected BOOL [1].", tensor=name, expected="BOOL [1]")
    return bool(array.reshape(-1)[0])


def _bytes(texts: list[str]) -> Array:
    array = np.empty(len(texts), np.object_)
    array[:] = [text.encode() for text in texts]
    return array
