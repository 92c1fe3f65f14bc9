"""A loaded encoder-decoder as the edge sees it: texts and languages in, texts out; see contract.py."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from server.core import Call, FinishReason, IntArray, Results, Timings, Usage
from server.errors import Cancelled, DeadlineExceeded, InvalidArgument, ManifestInvalid, ModelRejected, UnderstudyError, near_names
from server.runtime.manifest import Manifest, Seq2Seq
from server.runtime.observer import Observer
from server.runtime.repository import ModelFiles
from server.runtime.seq2seq.beam import Answer
from server.runtime.seq2seq.contract import Generated, Seq2SeqOptions
from server.runtime.seq2seq.engine import Seq2SeqEngine, Seq2SeqSettings
from server.runtime.seq2seq.rules import MAX_BEAMS, Rules, make_rules
from server.runtime.sessions import Session, Sessions, release_memory
from server.runtime.tokenizers import TextTokenizer, Tokens, too_long
from server.runtime.worker import EngineSettings

T = TypeVar("T")
TARGET_TOKENIZER = "target_tokenizer.json"
_SOURCE, _TARGET = -1, -2  # of manifest.Seq2Seq.source_prefix and source_suffix
# Tokenizing costs about 0.6 us a character: below this the event loop is held for less than a thread's hand-over costs twice.
_INLINE_CHARACTERS = 1024
_DEFAULTS = Seq2SeqOptions()


async def open_seq2seq(
    files: ModelFiles,
    sessions: Sessions,
    settings: EngineSettings | None = None,
    observer: Observer | None = None,
    *,
    sizes: Seq2SeqSettings | None = None,
) -> LoadedSeq2Seq:
    """Loads graphs and tokenizers of a verified version of form "seq2seq", off the event loop, and runs a first text.

    `settings`: of the process's engines; their limits bound what waits here too, unless `sizes` are given. Raises ModelRejected,
    ManifestInvalid.
    """
    if sizes is None:
        sizes = Seq2SeqSettings() if settings is None else Seq2SeqSettings(limits=settings.limits)
    model = await asyncio.to_thread(_open, files, sessions, sizes, observer)
    try:
        await model.warm_up()
    except BaseException:
        await model.close(drain=False)
        raise
    return model


def _open(files: ModelFiles, sessions: Sessions, sizes: Seq2SeqSettings, observer: Observer | None) -> LoadedSeq2Seq:
    manifest, spec = files.manifest, files.manifest.seq2seq
    if spec is None:
        raise ManifestInvalid(f"model {manifest.name!r} of form {manifest.form!r} has no part 'seq2seq'; export it again.", key="seq2seq")
    _check(spec)
    rules = make_rules(spec)
    tokenizer_path = files.tokenizer
    if tokenizer_path is None or spec.encoder not in files.paths or spec.decoder not in files.paths:
        raise ModelRejected(f"model {manifest.name!r} lacks its tokenizer or one of its graphs; export it again.", model=manifest.name)
    added = len(spec.source_prefix) + len(spec.source_suffix)
    tokenizer = TextTokenizer.load(tokenizer_path, max_tokens=manifest.max_tokens - added)
    reader = _load_reader(files.paths.get(TARGET_TOKENIZER, tokenizer_path))
    opened: list[Session] = []
    try:
        for name, inputs, output in ((spec.encoder, _ENCODER, "memory"), (spec.decoder, _DECODER, "ids")):
            opened.append(sessions.open(files.paths[name]))
            _check_graph(opened[-1], inputs, output)
        graphs = opened[0], opened[1]
        engine = Seq2SeqEngine(manifest.name, graphs, spec, sizes, observer, version=manifest.version, max_source=manifest.max_tokens)
    except BaseException:
        for session in opened:
            session.close()
        raise
    return LoadedSeq2Seq(manifest, _Texts(spec, tokenizer, reader, rules), engine, graphs)


_ENCODER = frozenset({"input_ids", "position_ids", "cu_seqlens"})
_DECODER = frozenset({"input_ids", "position_ids", "past", "table", "lengths", "memory", "spans", "top"})


def _check(spec: Seq2Seq) -> None:
    """What the types of the manifest do not say."""
    source = spec.source_vocabulary or spec.vocabulary
    around = [token for token in (*spec.source_prefix, *spec.source_suffix) if token not in (_SOURCE, _TARGET)]
    if not all(0 <= token < source for token in (*around, *spec.languages.values(), spec.unknown_token_id)):
        raise ManifestInvalid(
            "seq2seq: a token of prefix, suffix or languages is outside of the vocabulary. Export the model again.", key="seq2seq"
        )
    if spec.target_by and not all(token < spec.vocabulary for token in spec.languages.values()):
        raise ManifestInvalid("seq2seq: a language's token is outside of the vocabulary. Export the model again.", key="seq2seq.languages")


def _check_graph(session: Session, inputs: frozenset[str], output: str) -> None:
    names = {one.name for one in session.inputs}
    if not names <= inputs or output not in {one.name for one in session.outputs}:
        raise ModelRejected(
            f"{session.path.name} takes {', '.join(sorted(names))[:200]}; expected some of {', '.join(sorted(inputs))}, "
            f"and {output} as output. Export the model again.",
            file=session.path.name,
        )


def _load_reader(path: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_buffer(path.read_bytes())  # parsed once already, when the version was published or verified


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a call's options come to. `before`: text put before each text."""

    rules: Rules
    prefix: IntArray
    suffix: IntArray
    before: str


class _Texts:
    """Between texts and tokens, by the manifest. Used from several threads."""

    def __init__(self, spec: Seq2Seq, tokenizer: TextTokenizer, reader: Any, rules: Rules) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.rules = rules
        self._reader = reader
        self._unread = {*spec.eos_token_ids, spec.pad_token_id, rules.start}
        around = (*spec.source_prefix, *spec.source_suffix)
        self.sources = self._known(0, spec.source_language, chosen=_SOURCE in around)
        self.targets = self._known(1, spec.target_language, chosen=bool(spec.target_by) or _TARGET in around)

    def _known(self, side: int, default: str, *, chosen: bool) -> list[str]:
        """Languages of one side: those of the pairs, all that there is a token for if one is `chosen` by it, else the only one."""
        pairs = {pair.split("-", 1)[side] for pair in self.spec.prefixes if "-" in pair}
        if pairs:
            return sorted(pairs)
        return sorted(self.spec.languages) if chosen else [default] * bool(default)

    def plan(self, options: Seq2SeqOptions) -> _Plan:
        """Raises InvalidArgument, naming the option."""
        spec = self.spec
        source = _language(options.source_language, self.sources, "source_language")
        target = _language(options.target_language, self.targets, "target_language")
        before = self._before(source, target) if spec.prefixes else ""
        source, target = source or spec.source_language, target or spec.target_language
        around = []
        for tokens in (spec.source_prefix, spec.source_suffix):
            named = [self._token(t, source, target) if t < 0 else t for t in tokens]
            around.append(np.array(named, np.int64))
        rules = self._rules(options)
        if spec.target_by and (target in spec.languages or rules.forced_first is None):
            token = self._token(_TARGET, source, target)
            first = spec.target_by == "first"
            rules = dataclasses.replace(rules, forced_first=token) if first else dataclasses.replace(rules, start=token)
        return _Plan(rules, around[0], around[1], before)

    def _token(self, mark: int, source: str, target: str) -> int:
        code, field = (source, "source_language") if mark == _SOURCE else (target, "target_language")
        if code not in self.spec.languages:
            raise InvalidArgument(f"{field} is missing; the model needs one of {_shown(self.spec.languages)}.", field=field)
        return self.spec.languages[code]

    def _before(self, source: str, target: str) -> str:
        prefixes = self.spec.prefixes
        fitting = [
            text
            for pair, text in prefixes.items()
            if "-" not in pair or ((not source or pair.split("-", 1)[0] == source) and (not target or pair.split("-", 1)[1] == target))
        ]
        if len(fitting) == 1:
            return fitting[0]
        pairs = _shown(prefixes)
        if not fitting:
            message = f"target_language: the model does not translate from {source!r} to {target!r}; it knows {pairs}."
        else:
            message = f"target_language: {'source and target' if not target else 'the source'} must be given; the model knows {pairs}."
        raise InvalidArgument(message, field="target_language")

    def _rules(self, options: Seq2SeqOptions) -> Rules:
        changes: dict[str, Any] = {}
        limit = self.spec.max_output_tokens
        if options.max_tokens:
            _check_range(options.max_tokens, 1, limit, "max_tokens")
            changes["max_length"] = 1 + options.max_tokens
        if options.num_beams:
            _check_range(options.num_beams, 1, MAX_BEAMS, "num_beams")
            changes["num_beams"] = options.num_beams
        if options.length_penalty is not None:
            if not math.isfinite(options.length_penalty):
                raise InvalidArgument(
                    f"length_penalty is {options.length_penalty}; expected a number from -10 to 10.", field="length_penalty"
                )
            _check_range(options.length_penalty, -10, 10, "length_penalty")
            changes["length_penalty"] = float(options.length_penalty)
        if options.no_repeat_ngram_size is not None:
            _check_range(options.no_repeat_ngram_size, 0, 1000, "no_repeat_ngram_size")
            changes["no_repeat_ngram_size"] = options.no_repeat_ngram_size
        return dataclasses.replace(self.rules, **changes) if changes else self.rules

    def encode(self, texts: Sequence[str], plan: _Plan, *, cut: bool) -> tuple[list[IntArray | UnderstudyError], list[bool]]:
        """Each text's source tokens or error, and whether it was cut."""
        fields = [f"texts[{i}]" for i in range(len(texts))]
        given = [plan.before + text if plan.before and isinstance(text, str) and text.strip() else text for text in texts]
        marks, given = self._marks(given)
        vocabulary = self.spec.source_vocabulary or self.spec.vocabulary
        sources: list[IntArray | UnderstudyError] = []
        truncated = []
        added = len(plan.prefix) + len(plan.suffix)
        for one, mark in zip(self.tokenizer.encode_within(given, fields, "first" if cut else ""), marks, strict=True):
            truncated.append(isinstance(one, Tokens) and one.truncated)
            if not isinstance(one, Tokens):
                if "tokens" in one.metadata:
                    one = too_long(one.metadata["field"], int(one.metadata["tokens"]) + added, self.tokenizer.max_tokens + added)
                sources.append(one)
                continue
            ids = one.encoded.ids
            ids = np.where(ids < vocabulary, ids, self.spec.unknown_token_id)
            prefix = plan.prefix if mark is None else np.where(np.array(self.spec.source_prefix) == _TARGET, mark, plan.prefix)
            sources.append(np.concatenate([prefix, ids, plan.suffix]))
        return sources, truncated

    def _marks(self, texts: list[str]) -> tuple[list[int | None], list[str]]:
        """Marian's own way to name the target, ">>fra<< text": its token, and the text without it."""
        marks: list[int | None] = [None] * len(texts)
        if _TARGET not in self.spec.source_prefix:
            return marks, texts
        rest = list(texts)
        for i, text in enumerate(texts):
            if isinstance(text, str) and text.startswith(">>") and (end := text.find("<<", 0, 40)) > 0:
                marks[i] = self.spec.languages.get(text[2:end])
                if marks[i] is not None:
                    rest[i] = text[end + 2 :]
        return marks, rest

    def read(self, answers: Sequence[Answer]) -> list[str]:
        """The answers' texts."""
        tokens = [[t for t in answer.tokens if t not in self._unread] for answer in answers]
        return [str(text).strip() for text in self._reader.decode_batch(tokens, skip_special_tokens=True)]


def _shown(codes: Any) -> str:
    known = sorted(codes)
    return ", ".join(known[:200]) + (" and more" if len(known) > 200 else "")


def _language(code: str, known: list[str], field: str) -> str:
    if not code or code in known:
        return code
    if not known:
        raise InvalidArgument(f"{field} is {code[:32]!r}; this model has no choice of languages. Leave it out.", field=field)
    message = f"{field} {code[:32]!r} is unknown; {near_names(code[:32], known)} All: {_shown(known)}."
    raise InvalidArgument(message, field=field, known=",".join(known[:200]))


def _check_range(value: float, low: float, high: float, field: str) -> None:
    if not low <= value <= high:
        raise InvalidArgument(f"{field} is {value}; expected {low} to {high}.", field=field, limit=high)


class LoadedSeq2Seq:
    """The model that `open_seq2seq` gives; owns its engine and graphs. Used on the event loop."""

    def __init__(self, manifest: Manifest, texts: _Texts, engine: Seq2SeqEngine, sessions: tuple[Session, ...]) -> None:
        self.manifest = manifest
        self.engine = engine
        self._texts = texts
        self._sessions = sessions

    @property
    def source_languages(self) -> list[str]:
        """Codes that `source_language` may be, sorted."""
        return list(self._texts.sources)

    @property
    def target_languages(self) -> list[str]:
        """Codes that `target_language` may be, sorted."""
        return list(self._texts.targets)

    async def generate(self, texts: Sequence[str], call: Call, options: Seq2SeqOptions = _DEFAULTS) -> Results[Generated]:
        """See `contract.Seq2SeqModel.generate`."""
        if not len(texts):
            raise InvalidArgument("texts is empty; expected at least one text.", field="texts")
        plan = self._texts.plan(options)
        timings = Timings()
        started = time.perf_counter()
        call.stage = "tokenize"
        light = sum(len(text) for text in texts if isinstance(text, str)) <= _INLINE_CHARACTERS
        sources, truncated = await _off_loop(light, lambda: self._texts.encode(texts, plan, cut=options.truncate))
        timings.tokenize = time.perf_counter() - started
        _check_call(call, "tokenize")
        good = [one for one in sources if not isinstance(one, UnderstudyError)]
        flight = await self.engine.run(good, plan.rules, call)
        timings.queue, timings.run = flight.timings.queue, flight.timings.run
        call.stage, started = "post", time.perf_counter()
        answers = [one for one in flight.outcomes if isinstance(one, Answer)]
        read = iter(await _off_loop(len(answers) <= 8, lambda: self._texts.read(answers)))
        outcomes = iter(flight.outcomes)
        items: list[Generated | Exception] = []
        for one in sources:
            outcome = one if isinstance(one, UnderstudyError) else next(outcomes)
            assert outcome is not None, "every outcome has arrived"
            items.append(_generated(next(read), outcome) if isinstance(outcome, Answer) else _as_error(outcome))
        timings.post = time.perf_counter() - started
        usage = Usage(input=sum(len(one) for one in good), output=sum(len(answer.tokens) for answer in answers))
        return Results(items, timings, usage, truncated, self.manifest.name, self.manifest.version)

    async def warm_up(self) -> None:
        """Runs the shortest source once; raises what goes wrong."""
        rules = dataclasses.replace(self._texts.rules, max_length=2, num_beams=1)
        source = np.array([self._texts.spec.unknown_token_id], np.int64)
        flight = await self.engine.run([source], rules, Call("warm-up"))
        if isinstance(flight.outcomes[0], Exception):
            raise ModelRejected(f"model {self.manifest.name!r} fails on a first text: {flight.outcomes[0]}", model=self.manifest.name)

    async def close(self, *, drain: bool) -> None:
        """Finishes accepted calls if `drain`, else fails them with Draining; returns once thread and graphs are gone."""
        await self.engine.close(drain=drain)
        for session in self._sessions:
            session.close()
        self._sessions = ()
        await asyncio.to_thread(release_memory)


def _generated(text: str, answer: Answer) -> Generated:
    return Generated(text, answer.tokens, answer.score, FinishReason.STOP if answer.ended else FinishReason.LENGTH)


def _as_error(outcome: object) -> Exception:
    assert isinstance(outcome, Exception)
    return outcome


def _check_call(call: Call, stage: str) -> None:
    if call.cancelled:
        raise Cancelled("The caller left.", stage=stage)
    left = call.remaining()
    if left is not None and left <= 0:
        raise DeadlineExceeded(f"The deadline passed in the stage {stage!r}; give the call more time or fewer texts.", stage=stage)


async def _off_loop(light: bool, work: Callable[[], T]) -> T:
    """`work()`, here when it is light, else in a thread."""
    return work() if light else await asyncio.to_thread(work)
