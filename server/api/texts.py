"""InferenceService.Translate and Summarize: texts to a sequence-to-sequence model, texts back."""

from __future__ import annotations

from typing import TypeAlias

from server.api import calls, convert
from server.api.selection import Selection
from server.api.status import to_status
from server.api.wire import Context
from server.core import Results, Task
from server.errors import InvalidArgument, RequestTooLarge
from server.runtime.runtime import Runtime
from server.runtime.seq2seq.contract import Generated, Seq2SeqOptions
from understudy.v1 import generation_pb2
from understudy.v1 import inference_service_pb2 as pb

MOST_BEAMS = 16
AnyRequest: TypeAlias = pb.TranslateRequest | pb.SummarizeRequest


class TextServicer:
    """Edges only; the work is in the sequence-to-sequence model."""

    def __init__(self, runtime: Runtime, selection: Selection, max_items: int) -> None:
        self._runtime = runtime
        self._selection = selection
        self._max_items = max_items

    async def Translate(self, request: pb.TranslateRequest, _context: Context) -> pb.TranslateResponse:
        """Translations."""
        results = await self._generate(request, Task.TRANSLATION, request.source_language, request.target_language)
        return pb.TranslateResponse(results=_texts(results), **convert.tail(results))

    async def Summarize(self, request: pb.SummarizeRequest, _context: Context) -> pb.SummarizeResponse:
        """Summaries."""
        results = await self._generate(request, Task.SUMMARIZATION)
        return pb.SummarizeResponse(results=_texts(results), **convert.tail(results))

    async def _generate(self, request: AnyRequest, task: Task, source: str = "", target: str = "") -> Results[Generated]:
        if not request.texts:
            raise InvalidArgument("texts is empty; expected at least one.", field="texts")
        if len(request.texts) > self._max_items:
            message = f"{len(request.texts)} items in texts; expected at most {self._max_items}. Send them in several calls."
            raise RequestTooLarge(message, field="texts", limit=self._max_items)
        if not 0 <= request.priority <= 3:
            raise InvalidArgument(f"priority {request.priority} does not exist; expected a value of Priority.", field="priority")
        call = calls.current_call(request.priority)
        options = _options(request.search, source, target, request.truncate)
        name, version = self._selection.pick(request.model, task)
        with self._runtime.use_seq2seq(name, task, version) as model:
            results = await model.generate(list(request.texts), call, options)
        calls.current().note(results)
        return results


def _options(search: generation_pb2.TextSearch, source: str, target: str, truncate: bool) -> Seq2SeqOptions:
    for value, most, field in ((search.num_beams, MOST_BEAMS, "search.num_beams"), (search.max_tokens, 1 << 20, "search.max_tokens")):
        if not 0 <= value <= most:
            raise InvalidArgument(f"{field} is {value}; expected 0 (the model's own) to {most}.", field=field, limit=most)
    group = search.no_repeat_ngram_size if search.HasField("no_repeat_ngram_size") else None
    if group is not None and group < 0:
        message = f"search.no_repeat_ngram_size is {group}; expected 0 or more."
        raise InvalidArgument(message, field="search.no_repeat_ngram_size", limit=0)
    penalty = search.length_penalty if search.HasField("length_penalty") else None
    if penalty is not None and not -10 <= penalty <= 10:
        message = f"search.length_penalty is {penalty}; expected -10 to 10."
        raise InvalidArgument(message, field="search.length_penalty", limit=10)
    return Seq2SeqOptions(source, target, search.max_tokens, search.num_beams, penalty, group, truncate)


def _texts(results: Results[Generated]) -> list[generation_pb2.TextResult]:
    found = []
    for index, item in enumerate(results.items):
        if isinstance(item, Exception):
            found.append(generation_pb2.TextResult(error=to_status(item)))
        else:
            found.append(generation_pb2.TextResult(text=item.text, score=item.score, truncated=convert.truncated(results, index)))
    return found
