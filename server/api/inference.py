"""understudy.v1.InferenceService: requests to the loaded models, results back.

Run, RunMany and ExplainRoute belong to server/api/run.py, Generate and GenerateText to generate.py, Translate and Summarize to texts.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from server.api import calls, convert
from server.api.generate import GenerateServicer
from server.api.generate_skill import SkillGeneration
from server.api.run import RunServicer
from server.api.selection import Selection
from server.api.status import to_status
from server.api.texts import TextServicer
from server.api.wire import Context
from server.core import Results, Task
from server.errors import InvalidArgument, RequestTooLarge
from server.runtime.encoder import EncoderModel
from server.runtime.runtime import Runtime
from server.runtime.tasks.zero_shot import DEFAULT_TEMPLATE
from understudy.v1 import inference_pb2 as items
from understudy.v1 import inference_service_pb2 as pb

_POOLING = {pb.POOLING_MEAN: "mean", pb.POOLING_CLS: "cls", pb.POOLING_LAST: "last"}
_KINDS = {pb.EMBED_INPUT_TYPE_QUERY: "query", pb.EMBED_INPUT_TYPE_PASSAGE: "passage"}
_AGGREGATION = {
    pb.AGGREGATION_STRATEGY_UNSPECIFIED: "simple",
    pb.AGGREGATION_STRATEGY_NONE: "none",
    pb.AGGREGATION_STRATEGY_SIMPLE: "simple",
    pb.AGGREGATION_STRATEGY_FIRST: "first",
    pb.AGGREGATION_STRATEGY_AVERAGE: "average",
    pb.AGGREGATION_STRATEGY_MAX: "max",
}
MAX_CANDIDATE_LABELS = 256
MAX_ANSWERS = 100  # for each question: their spans are searched for and held for every window
MAX_ANSWER_TOKENS = 512


class InferenceServicer:
    """Edges only: limits and names here, the work in `EncoderModel`."""

    def __init__(self, runtime: Runtime, selection: Selection, max_items: int, run: RunServicer, skills: SkillGeneration) -> None:
        self._runtime = runtime
        self._selection = selection
        self._max_items = max_items
        generation, texts = GenerateServicer(runtime, selection, skills), TextServicer(runtime, selection, max_items)
        self.Run, self.RunMany, self.ExplainRoute = run.Run, run.RunMany, run.ExplainRoute
        self.Generate, self.GenerateText = generation.Generate, generation.GenerateText
        self.Translate, self.Summarize = texts.Translate, texts.Summarize

    async def Embed(self, request: pb.EmbedRequest, _context: Context) -> bytes:
        """Texts to vectors."""
        self._check(request.texts, "texts")
        pooling = _choice(request.pooling, _POOLING, "pooling")
        kind = _choice(request.input_type, _KINDS, "input_type") or ""
        call = _call(request)
        async with self._use(request, Task.FEATURE_EXTRACTION) as model:
            results = await model.embed(
                request.texts,
                call=call,
                dimensions=_count(request.dimensions, "dimensions") or None,
                normalize=request.normalize if request.HasField("normalize") else None,
                truncate=request.truncate,
                pooling=pooling,
                kind=kind,
            )
        calls.current().note(results)
        return convert.embed_response(results)

    async def Classify(self, request: pb.ClassifyRequest, _context: Context) -> pb.ClassifyResponse:
        """Texts to labels: the model's own, or the caller's."""
        self._check(request.inputs, "inputs")
        top_k = _count(request.top_k, "top_k")
        call = _call(request)
        if request.candidate_labels:
            results = await self._zero_shot(request, call, top_k)
        else:
            pairs = [(one.text, one.text_pair) if one.text_pair else one.text for one in request.inputs]
            async with self._use(request, Task.TEXT_CLASSIFICATION) as model:
                results = await model.classify(pairs, call=call, top_k=top_k, truncate=request.truncate)
        calls.current().note(results)
        return pb.ClassifyResponse(results=_listed(results, items.ClassifyResult, "labels", convert.label), **convert.tail(results))

    async def _zero_shot(self, request: pb.ClassifyRequest, call: Any, top_k: int) -> Results[Any]:
        if len(request.candidate_labels) > MAX_CANDIDATE_LABELS:
            raise RequestTooLarge(
                f"{len(request.candidate_labels)} candidate labels; expected at most {MAX_CANDIDATE_LABELS}. Send fewer.",
                field="candidate_labels",
                limit=MAX_CANDIDATE_LABELS,
            )
        paired = next((index for index, one in enumerate(request.inputs) if one.text_pair), None)
        if paired is not None:
            raise InvalidArgument(
                "candidate labels take the place of the second text; expected no text_pair. Leave one of them out.",
                field=f"inputs[{paired}].text_pair",
            )
        async with self._use(request, Task.ZERO_SHOT_CLASSIFICATION) as model:
            results: Results[Any] = await model.classify_zero_shot(
                [one.text for one in request.inputs],
                request.candidate_labels,
                call=call,
                multi_label=request.multi_label,
                hypothesis_template=request.hypothesis_template or DEFAULT_TEMPLATE,
                truncate=request.truncate,
                top_k=top_k,
            )
        return results

    async def Rerank(self, request: pb.RerankRequest, _context: Context) -> pb.RerankResponse:
        """Documents by relevance."""
        self._check(request.documents, "documents")
        top_n = _count(request.top_n, "top_n")
        call = _call(request)
        async with self._use(request, Task.TEXT_RANKING) as model:
            results = await model.rerank(request.query, request.documents, call=call, top_n=top_n, truncate=request.truncate)
        calls.current().note(results)
        ranked = []
        for item in results.items:
            if isinstance(item, Exception):
                ranked.append(items.RankedDocument(index=_index_of(item), error=to_status(item)))
                continue
            text = request.documents[item.index] if request.return_documents else ""
            ranked.append(items.RankedDocument(index=item.index, score=item.score, document=text, truncated=item.truncated))
        return pb.RerankResponse(results=ranked, **convert.tail(results))

    async def ExtractEntities(self, request: pb.ExtractEntitiesRequest, _context: Context) -> pb.ExtractEntitiesResponse:
        """Named things in texts."""
        self._check(request.texts, "texts")
        aggregation = _choice(request.aggregation_strategy, _AGGREGATION, "aggregation_strategy") or "simple"
        call = _call(request)
        async with self._use(request, Task.TOKEN_CLASSIFICATION) as model:
            results = await model.extract_entities(request.texts, call=call, aggregation=aggregation, truncate=request.truncate)
        calls.current().note(results)
        found = _listed(results, items.ExtractEntitiesResult, "entities", convert.entity)
        return pb.ExtractEntitiesResponse(results=found, **convert.tail(results))

    async def AnswerQuestion(self, request: pb.AnswerQuestionRequest, _context: Context) -> pb.AnswerQuestionResponse:
        """Answers to questions in their contexts."""
        self._check(request.inputs, "inputs")
        top_k = _count(request.top_k, "top_k", MAX_ANSWERS) or 1
        most = _count(request.max_answer_tokens, "max_answer_tokens", MAX_ANSWER_TOKENS) or 15
        stride = _count(request.doc_stride, "doc_stride") or None
        call = _call(request)
        pairs = [(one.question, one.context) for one in request.inputs]
        async with self._use(request, Task.QUESTION_ANSWERING) as model:
            results = await model.answer(
                pairs, call=call, top_k=top_k, max_answer_tokens=most, doc_stride=stride, allow_no_answer=request.allow_no_answer
            )
        calls.current().note(results)
        found = _listed(results, items.AnswerQuestionResult, "answers", convert.answer, cut=False)
        return pb.AnswerQuestionResponse(results=found, **convert.tail(results))

    @asynccontextmanager
    async def _use(self, request: Any, task: Task) -> AsyncIterator[EncoderModel]:
        """Holds the model that the request names, or the task's own, and its adapter where one is named."""
        name, version = self._selection.pick(request.model, task)
        with self._runtime.use(name, task, version) as model:
            if not request.adapter:
                yield model
                return
            with self._runtime.use_adapters(name, version) as adapters:
                use = await adapters.acquire(request.adapter)
                try:
                    yield model.adapted(use)
                finally:
                    use.release()

    def _check(self, values: Sequence[Any], field: str) -> None:
        if not values:
            raise InvalidArgument(f"{field} is empty; expected at least one.", field=field)
        if len(values) > self._max_items:
            raise RequestTooLarge(
                f"{len(values)} items in {field}; expected at most {self._max_items}. Send them in several calls.",
                field=field,
                limit=self._max_items,
            )


def _call(request: Any) -> Any:
    if request.priority > 3 or request.priority < 0:
        raise InvalidArgument(f"priority {request.priority} does not exist; expected a value of Priority.", field="priority")
    return calls.current_call(request.priority)


def _count(value: int, field: str, most: int | None = None) -> int:
    if value < 0:
        raise InvalidArgument(f"{field} is {value}; expected 0 or more.", field=field, limit=0)
    if most is not None and value > most:
        raise InvalidArgument(f"{field} is {value}; expected at most {most}.", field=field, limit=most)
    return value


def _choice(value: int, table: Mapping[Any, str], field: str) -> str | None:
    """The name of an enum's value; None for the unspecified one, where the table lacks it."""
    if value in table:
        return table[value]
    if value == 0:
        return None
    raise InvalidArgument(f"{field} {value} does not exist; expected a value of its enum.", field=field)


def _listed(results: Results[Any], result: Any, field: str, convert_one: Any, *, cut: bool = True) -> list[Any]:
    """One `result` message an item, its list in `field`; or the item's error."""
    found = []
    for index, item in enumerate(results.items):
        if isinstance(item, Exception):
            found.append(result(error=to_status(item)))
            continue
        message = result(**{field: [convert_one(one) for one in item]})
        if cut and convert.truncated(results, index):
            message.truncated = True
        found.append(message)
    return found


def _index_of(error: Exception) -> int:
    """A failed document's index, from the field that its error names, e.g. "documents[3]"."""
    field = getattr(error, "metadata", {}).get("field", "")
    digits = field.partition("[")[2].partition("]")[0]
    return int(digits) if digits.isdigit() else 0
