"""Text through the Open Inference Protocol: which BYTES inputs a model with a tokenizer takes, and which tensors its task makes of them.

| task | inputs | outputs |
|---|---|---|
| feature-extraction | text [n] | embedding FP32 [n, D] |
| text-classification, zero-shot-classification | text [n] | scores FP32 [n, labels], labels BYTES [n, labels], best first |
| text-ranking | query [1], text [n] | scores FP32 [n], in the order of the texts |
| token-classification | text [n] | entities BYTES [n]: a JSON array of {label, score, text, start, end} each |
| question-answering | question [n], context [n] | answer BYTES [n], score FP32 [n], start INT64 [n], end INT64 [n] |
| translation, summarization | text [n] | text_output BYTES [n] |
| text-generation | see open_inference_generate.py | |

[n, 1] is taken for [n]. The protocol has no error for one item: the first item that fails fails the request.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from server.api import open_inference_generate as generate
from server.api.open_inference_codec import Array
from server.core import Call, Results, Task
from server.errors import InvalidArgument, InvalidTensor, RequestTooLarge
from server.runtime.seq2seq.contract import Seq2SeqOptions

if TYPE_CHECKING:
    from server.runtime.encoder import EncoderModel
    from server.runtime.manifest import Manifest
    from server.runtime.seq2seq.contract import Seq2SeqModel

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TextTensor:
    """A tensor of the text form: `shape` without the batch axis of any size that begins it."""

    name: str
    datatype: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TextForm:
    """What a model takes and gives as text."""

    inputs: tuple[TextTensor, ...]
    outputs: tuple[TextTensor, ...]


def form_of(manifest: Manifest) -> TextForm | None:
    """The text form of a model, or None for a raw one."""
    return _form(manifest.task, len(manifest.labels) or -1, manifest.hidden_size or -1)


@cache
def _form(task: Task, labels: int, hidden: int) -> TextForm | None:
    text = TextTensor("text", "BYTES")
    match task:
        case Task.FEATURE_EXTRACTION:
            return TextForm((text,), (TextTensor("embedding", "FP32", (hidden,)),))
        case Task.TEXT_CLASSIFICATION | Task.ZERO_SHOT_CLASSIFICATION:
            return TextForm((text,), (TextTensor("scores", "FP32", (labels,)), TextTensor("labels", "BYTES", (labels,))))
        case Task.TEXT_RANKING:
            return TextForm((TextTensor("query", "BYTES"), text), (TextTensor("scores", "FP32"),))
        case Task.TOKEN_CLASSIFICATION:
            return TextForm((text,), (TextTensor("entities", "BYTES"),))
        case Task.QUESTION_ANSWERING:
            outputs = (
                TextTensor("answer", "BYTES"),
                TextTensor("score", "FP32"),
                TextTensor("start", "INT64"),
                TextTensor("end", "INT64"),
            )
            return TextForm((TextTensor("question", "BYTES"), TextTensor("context", "BYTES")), outputs)
        case Task.TEXT_GENERATION:
            return TextForm(tuple(TextTensor(*one) for one in generate.INPUTS), tuple(TextTensor(*one) for one in generate.OUTPUTS))
        case Task.TRANSLATION | Task.SUMMARIZATION:
            return TextForm((text,), (TextTensor("text_output", "BYTES"),))
    return None


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """Outputs by name, in the form's order, and what they cost."""

    outputs: dict[str, Array]
    results: Results[Any]
    items: int


async def infer_text(model: EncoderModel, form: TextForm, inputs: Mapping[str, Array], options: TextOptions, call: Call) -> TextAnswer:
    """Runs a model on text. Raises InvalidTensor for inputs that are none of `form`, RequestTooLarge, and the first item's error."""
    return await _RUNNERS[model.manifest.task](model, _read_texts(form, inputs, options), options, call)


async def rewrite_text(model: Seq2SeqModel, form: TextForm, inputs: Mapping[str, Array], options: TextOptions, call: Call) -> TextAnswer:
    """As `infer_text`, for translation and summarization by the model's own settings."""
    texts = _read_texts(form, inputs, options)["text"]
    results = await model.generate(texts, call, Seq2SeqOptions(truncate=options.truncate))
    return TextAnswer({"text_output": _bytes([one.text for one in _values(results)], (len(texts),))}, results, len(texts))


def _read_texts(form: TextForm, inputs: Mapping[str, Array], options: TextOptions) -> dict[str, list[str]]:
    wanted = [tensor.name for tensor in form.inputs]
    for name in inputs:
        if name not in wanted:
            message = f"input {name[:64]!r} is not known; this model takes text as {', '.join(wanted)}, alone."
            raise InvalidTensor(message, tensor=name[:64], expected=", ".join(wanted))
    return {name: _texts(name, inputs.get(name), options.max_items) for name in wanted}


@dataclass(frozen=True, slots=True)
class TextOptions:
    """`truncate` cuts texts to the model's limit instead of refusing them."""

    truncate: bool = False
    max_items: int = 2048


def _texts(name: str, array: Array | None, limit: int) -> list[str]:
    if array is None:
        raise InvalidTensor(f"input {name!r} is missing; give it as BYTES.", tensor=name, expected="BYTES [n]")
    if array.dtype.kind != "O":
        raise InvalidTensor(f"input {name!r} holds numbers; text is BYTES.", tensor=name, expected="BYTES", got=array.dtype.name)
    if array.ndim > 2 or array.ndim == 0 or (array.ndim == 2 and array.shape[1] != 1):
        message = f"input {name!r} has the shape {list(array.shape)}; give [n] or [n, 1]."
        raise InvalidTensor(message, tensor=name, expected="[n] or [n, 1]", got=list(array.shape))
    if not 1 <= array.size <= limit:
        message = f"input {name!r} has {array.size} texts; a request has 1 to {limit}."
        raise RequestTooLarge(message, field=name, limit=limit) if array.size else InvalidTensor(message, tensor=name, field=name)
    texts = []
    for index, value in enumerate(array.reshape(-1)):
        try:
            texts.append(value.decode("utf-8"))
        except UnicodeDecodeError as error:
            message = f"{name}[{index}] is not valid UTF-8 at byte {error.start}; send UTF-8."
            raise InvalidArgument(message, field=f"{name}[{index}]", offset=error.start) from None
    return texts


def _values(results: Results[T]) -> list[T]:
    values: list[T] = []
    for item in results.items:
        if isinstance(item, Exception):
            raise item
        values.append(item)
    return values


def _bytes(texts: Sequence[Sequence[str]] | Sequence[str], shape: tuple[int, ...]) -> Array:
    flat = [t for row in texts for t in ([row] if isinstance(row, str) else row)]
    array = np.empty(len(flat), np.object_)
    array[:] = [text.encode() for text in flat]
    return array.reshape(shape)


async def _embed(model: EncoderModel, texts: Mapping[str, list[str]], options: TextOptions, call: Call) -> TextAnswer:
    results = await model.embed(texts["text"], call=call, truncate=options.truncate)
    vectors = _values(results)
    return TextAnswer({"embedding": np.stack(vectors)}, results, len(texts["text"]))


async def _classify(model: EncoderModel, texts: Mapping[str, list[str]], options: TextOptions, call: Call) -> TextAnswer:
    results = await model.classify(texts["text"], call=call, truncate=options.truncate)
    values = _values(results)
    shape = (len(values), len(values[0]))
    scores = np.array([[label.score for label in row] for row in values], np.float32).reshape(shape)
    return TextAnswer({"scores": scores, "labels": _bytes([[label.name for label in row] for row in values], shape)}, results, shape[0])


async def _rank(model: EncoderModel, texts: Mapping[str, list[str]], options: TextOptions, call: Call) -> TextAnswer:
    query, documents = texts["query"], texts["text"]
    if len(query) != 1:
        raise InvalidTensor(f"input 'query' has {len(query)} texts; give one query.", tensor="query", expected=1, got=len(query))
    results = await model.rerank(query[0], documents, call=call, truncate=options.truncate)
    scores = np.zeros(len(documents), np.float32)
    for ranked in _values(results):
        scores[ranked.index] = ranked.score
    return TextAnswer({"scores": scores}, results, len(documents))


async def _entities(model: EncoderModel, texts: Mapping[str, list[str]], options: TextOptions, call: Call) -> TextAnswer:
    results = await model.extract_entities(texts["text"], call=call, truncate=options.truncate)
    found = [json.dumps([asdict(entity) for entity in row], ensure_ascii=False) for row in _values(results)]
    return TextAnswer({"entities": _bytes(found, (len(found),))}, results, len(found))


async def _answer(model: EncoderModel, texts: Mapping[str, list[str]], _options: TextOptions, call: Call) -> TextAnswer:
    questions, contexts = texts["question"], texts["context"]
    if len(questions) != len(contexts):
        message = f"{len(questions)} questions and {len(contexts)} contexts; give one context for each question."
        raise InvalidTensor(message, tensor="context", expected=len(questions), got=len(contexts))
    results = await model.answer(list(zip(questions, contexts, strict=True)), call=call, top_k=1)
    spans = [row[0] if row else None for row in _values(results)]
    outputs: dict[str, Array] = {
        "answer": _bytes([span.text if span else "" for span in spans], (len(spans),)),
        "score": np.array([span.score if span else 0.0 for span in spans], np.float32),
        "start": np.array([span.start if span else 0 for span in spans], np.int64),
        "end": np.array([span.end if span else 0 for span in spans], np.int64),
    }
    return TextAnswer(outputs, results, len(spans))


_RUNNERS: dict[Task, Callable[[EncoderModel, Mapping[str, list[str]], TextOptions, Call], Awaitable[TextAnswer]]] = {
    Task.FEATURE_EXTRACTION: _embed,
    Task.TEXT_CLASSIFICATION: _classify,
    Task.ZERO_SHOT_CLASSIFICATION: _classify,
    Task.TEXT_RANKING: _rank,
    Task.TOKEN_CLASSIFICATION: _entities,
    Task.QUESTION_ANSWERING: _answer,
}
