"""What a loaded encoder does for its callers: the tasks, by name.

Every method takes the `Call` it works for, and gives one entry an item: a value, or the error of that item alone. An error of the
whole request (a task that the model does not do, a bad option, a deadline) is raised. Truncation is asked for, never silent.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

from server.core import Call, Entity, FloatArray, Label, Results, Span
from server.runtime.decoder.contract import AdapterUse
from server.runtime.engine import Encoded, EngineOutput, Pool
from server.runtime.manifest import Manifest
from server.runtime.tasks import answers, classification, embedding, entities, ranking, zero_shot
from server.runtime.tasks.ranking import Ranked
from server.runtime.tasks.stages import EncoderEngine, Parts
from server.runtime.tokenizers import TextInput, TextTokenizer

__all__ = ["EncoderEngine", "EncoderModel", "Ranked"]


class _Adapted:
    """An engine whose every sequence runs with the adapter in `slot`."""

    def __init__(self, engine: EncoderEngine, slot: int) -> None:
        self._engine = engine
        self._slot = slot

    async def run(self, sequences: Sequence[Encoded], call: Call, pool: Pool | None) -> EngineOutput:
        return await self._engine.run([Encoded(one.ids, one.type_ids, self._slot) for one in sequences], call, pool)


class EncoderModel:
    """A manifest, its tokenizer and the engine that runs its graph. Used on the event loop; owns none of them.

    Raises from every method: TaskNotSupported, InvalidArgument (naming the field), Overloaded, DeadlineExceeded, Cancelled.
    Errors of items: InputTooLong (field, tokens, limit), InvalidArgument (field), and what the engine says of a sequence.
    """

    def __init__(self, manifest: Manifest, tokenizer: TextTokenizer, engine: EncoderEngine, *, executor: Executor | None = None) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.engine = engine
        self._parts = Parts(manifest, tokenizer, engine, executor)
        self._labels = zero_shot.LabelCache()

    def adapted(self, use: AdapterUse) -> EncoderModel:
        """The same model with an adapter on every sequence, for as long as the caller holds it; see server/runtime/lora/store.py."""
        return EncoderModel(self.manifest, self.tokenizer, _Adapted(self.engine, use.slot), executor=self._parts.executor)

    async def embed(
        self,
        texts: Sequence[str],
        *,
        call: Call,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
        pooling: str | None = None,
        kind: str = "",
    ) -> Results[FloatArray]:
        """Vectors float32[D]. `dimensions`: a size that the manifest lists, cut before normalisation. `kind`: "", "query", "passage"."""
        options = embedding.EmbedOptions(dimensions, normalize, pooling, truncate, kind)
        return await embedding.embed(self._parts, texts, options, call=call)

    async def classify(self, inputs: Sequence[TextInput], *, call: Call, top_k: int = 0, truncate: bool = False) -> Results[list[Label]]:
        """The model's labels for texts or (text, pair), best first; `top_k` 0 means all."""
        return await classification.classify(self._parts, inputs, call=call, top_k=top_k, truncate=truncate)

    async def classify_zero_shot(
        self,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        call: Call,
        multi_label: bool = False,
        hypothesis_template: str = zero_shot.DEFAULT_TEMPLATE,
        truncate: bool = False,
        top_k: int = 0,
    ) -> Results[list[Label]]:
        """The caller's labels, best first; by entailment or by cosine, as the model allows. One "{}" in the template is the label's."""
        options = zero_shot.ZeroShotOptions(multi_label, hypothesis_template, truncate, top_k)
        return await zero_shot.classify_zero_shot(self._parts, texts, labels, options, self._labels, call=call)

    async def rerank(self, query: str, documents: Sequence[str], *, call: Call, top_n: int = 0, truncate: bool = False) -> Results[Ranked]:
        """Documents best first (not in the caller's order), at most `top_n`; then the errors of those that failed."""
        return await ranking.rerank(self._parts, query, documents, call=call, top_n=top_n, truncate=truncate)

    async def extract_entities(
        self,
        texts: Sequence[str],
        *,
        call: Call,
        aggregation: str = "simple",
        truncate: bool = False,
        stride: int | None = None,
    ) -> Results[list[Entity]]:
        """Entities in order of appearance. Long texts are read in windows that share `stride` tokens, unless `truncate`."""
        return await entities.extract_entities(self._parts, texts, call=call, aggregation=aggregation, truncate=truncate, stride=stride)

    async def answer(
        self,
        inputs: Sequence[tuple[str, str]],
        *,
        call: Call,
        top_k: int = 1,
        max_answer_tokens: int = 15,
        doc_stride: int | None = None,
        allow_no_answer: bool = False,
    ) -> Results[list[Span]]:
        """Answers to (question, context), best first; long contexts are read in windows that share `doc_stride` tokens."""
        options = answers.AnswerOptions(top_k, max_answer_tokens, doc_stride, allow_no_answer)
        return await answers.answer(self._parts, inputs, options, call=call)
