"""Answers of a given form: JSON schemas, regular expressions, choices and Lark grammars become masks of allowed tokens (llguidance).

A form is compiled once, off the event loop, and kept; each candidate has a matcher of its own, a copy that costs microseconds. Forms come
from outside: their size and depth are bounded here, the work of compiling them and of each token by llguidance's limits.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from server.core import Format
from server.errors import InternalError, InvalidArgument, TaskNotSupported, UnderstudyError
from server.runtime.decoder import contract

MOST_BYTES = 64 * 1024  # of a form's source
MOST_DEPTH = 64  # of a schema's JSON
MOST_CHOICES = 1000
KEPT = 32  # compiled forms
_ALL = np.uint32(0xFFFFFFFF)
# Enough for indented JSON, and an end to models that go on with blanks for ever.
_BLANKS = r"[\x20\x0A\x0D\x09]{0,64}"


class Matcher:
    """One candidate's place in a grammar; implements contract.Matcher. Used by one thread at a time."""

    __slots__ = ("_failed", "field", "inner", "words")

    def __init__(self, inner: Any, field: str, words: int, failed: Callable[[], None]) -> None:
        self.inner = inner  # llguidance.LLMatcher
        self.field = field
        self.words = words  # of its mask, 32 tokens each
        self._failed = failed

    def advance(self, token: int) -> None:
        """The token was drawn; -1, which is drawn where nothing is allowed, raises `failure`.

        Raises InternalError when the token was not allowed, and InvalidArgument when the form has become more costly than the limits
        allow. Either concerns this candidate alone.
        """
        if token < 0 or not self.inner.consume_token(token):
            raise self.failure or InternalError(f"token {token} was drawn, which the grammar does not allow")

    @property
    def complete(self) -> bool:
        """Nothing may follow: the answer ends."""
        return bool(self.inner.is_stopped()) and not self.inner.is_error()

    @property
    def failure(self) -> UnderstudyError | None:
        """Why no mask can be made any more; None while all is well."""
        if not self.inner.is_error():
            return None
        self._failed()
        reason = _reason(self.inner)
        if self.inner.stop_reason() == "InternalError" and "doesn't satisfy the grammar" in reason:
            return InternalError(f"a token was drawn that the grammar does not allow: {reason}")
        return InvalidArgument(
            f"{self.field} became too costly to follow: {reason}. Expected a simpler form: fewer alternatives and optional parts, "
            "shorter repetitions.",
            field=self.field,
            reason=reason,
        )


class Grammar:
    """A compiled form. Safe to use from several threads."""

    def __init__(self, base: Any, field: str, words: int, failed: Callable[[], None]) -> None:
        self._base = base
        self._field = field
        self._words = words
        self._failed = failed

    def matcher(self) -> Matcher:
        """A place at the grammar's beginning, for one candidate."""
        return Matcher(self._base.deep_copy(), self._field, self._words, self._failed)


class GrammarCompiler:
    """Compiles forms for one model. `vocabulary`: the width of its logits; `stop_ids`: tokens that end an answer, at least one.

    The tokenizer is read when the first form comes (about 0.3 s). TaskNotSupported, then, where llguidance cannot read it: it knows
    byte-level tokenizers and those that fall back to bytes. Safe to use from several threads; `compile` from the event loop.
    """

    def __init__(self, tokenizer_json: Path, vocabulary: int, stop_ids: Iterable[int]) -> None:
        self._path = tokenizer_json
        self._vocabulary = vocabulary
        self._stop_ids = sorted({token for token in stop_ids if 0 <= token < vocabulary})
        self._tokenizer: Any = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, "grammar")  # one: a costly form delays other new forms, and nothing else

    async def compile(self, form: Format) -> Callable[[], contract.Matcher]:
        """What makes the matchers of a request that wants this form; InvalidArgument names the field and llguidance's reason."""
        kept = self._find(*_key(form))
        if kept is None:
            kept = await asyncio.get_running_loop().run_in_executor(self._worker, self._compile_form, form)
        return kept.matcher

    def json_schema(self, schema: str | Mapping[str, Any] | bool) -> Grammar:
        """JSON that a JSON Schema describes; `schema` as text or as what JSON would give."""
        return self._compile("json_schema", _schema_text(schema))

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self._compile("json_object", '{"type":"object"}')

    def regex(self, expression: str) -> Grammar:
        """A text that matches as a whole; syntax of Rust's `regex`, without look-around."""
        return self._compile("regex", expression)

    def choice(self, choices: Sequence[str]) -> Grammar:
        """One of the texts."""
        return self._compile("choice", _choice_text(choices))

    def lark(self, grammar: str) -> Grammar:
        """A text of the language of a grammar in llguidance's dialect of Lark."""
        return self._compile("grammar", grammar)

    def close(self) -> None:
        """Ends the thread; what is being compiled is finished first."""
        self._worker.shutdown()

    def _compile_form(self, form: Format) -> Grammar:
        return self._compile(*_key(form))

    def _find(self, kind: str, source: str) -> Grammar | None:
        with self._lock:
            found = self._kept.get((kind, source))
            if found is not None:
                self._kept.move_to_end((kind, source))
            return found

    def _compile(self, kind: str, source: str) -> Grammar:
        field = f"response_format.{kind}"
        size = len(source.encode(errors="replace"))
        if not 0 < size <= MOST_BYTES:
            message = f"{field} has {size} bytes; expected 1 to {MOST_BYTES}. Give a smaller form."
            raise InvalidArgument(message, field=field, limit=MOST_BYTES)
        found = self._find(kind, source)
        if found is not None:
            return found
        try:
            base = self._matcher(_grammar_text(kind, source), field)
            _probe(base.deep_copy(), field)
        except (UnderstudyError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust code derives from BaseException
            raise _refused(field, " ".join(str(error).split())[:400]) from None
        grammar = Grammar(base, field, (self._loaded().vocab_size + 31) // 32, lambda: self._forget(kind, source))
        with self._lock:
            self._kept[kind, source] = grammar
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar

    def _forget(self, kind: str, source: str) -> None:
        """A form that reached a limit begins anew for the next request: its matchers share the states that were counted."""
        with self._lock:
            self._kept.pop((kind, source), None)

    def _matcher(self, text: str, field: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        # A row of 20,000 items is a schema of some 5,000 optional properties; 50,000 lexer states are some 50 to 100 MB.
        limits = LLParserLimits(max_items_in_row=20_000, max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False)
        base = LLMatcher(self._loaded(), text, log_level=0, limits=limits)
        if base.is_error():
            raise _refused(field, _reason(base))
        return base

    def _loaded(self) -> Any:
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer

        with self._lock:
            if self._tokenizer is None:
                tokenizer = Tokenizer.from_file(str(self._path))
                tokenizer.no_truncation()
                tokenizer.no_padding()
                size = max(self._vocabulary, tokenizer.get_vocab_size(with_added_tokens=True), max(tokenizer.get_vocab().values()) + 1)
                try:
                    self._tokenizer = LLTokenizer(_without_special_names(tokenizer.to_str()), n_vocab=size, eos_token=self._stop_ids)
                except ValueError as error:
                    raise TaskNotSupported(
                        f"answers of a given form need a tokenizer that llguidance reads: {error}. Leave response_format out.",
                        field="response_format",
                    ) from None
            return self._tokenizer


class GrammarMasks:
    """Implements contract.Masks for up to `rows` rows: one thread fills the masks while the graph runs, without the interpreter's lock.

    The array that `wait` returns is the same each time, and is overwritten from the next `start` on. A row whose matcher has failed allows
    nothing: what is drawn there is -1, and the matcher's `advance` raises the reason.
    """

    def __init__(self, vocabulary: int, rows: int) -> None:
        self._words = (vocabulary + 31) // 32
        self._masks: npt.NDArray[np.uint32] = np.full((rows, self._words), _ALL)
        self._wide: npt.NDArray[np.uint32] | None = None  # where llguidance knows more tokens than the model has logits
        self._filled: list[int] = []
        self._pending: Future[None] | None = None
        self._worker = ThreadPoolExecutor(1, "masks")
        self._executor: Any = None

    def start(self, matchers: Sequence[contract.Matcher | None]) -> None:
        """Begins to fill one mask a row; returns at once. Every matcher has had its tokens."""
        assert self._pending is None, "wait comes before the next start"
        todo = [(row, matcher) for row, matcher in enumerate(matchers) if matcher is not None]
        for row in self._filled:
            self._masks[row] = _ALL
        self._filled = [row for row, _ in todo]
        if todo:
            self._pending = self._worker.submit(self._fill, todo)

    def wait(self) -> npt.NDArray[np.uint32] | None:
        """uint32[rows, ceil(vocabulary / 32)], bit set: allowed; None where no row has a matcher."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        pending.result()
        return self._masks

    def close(self) -> None:
        """Ends the thread."""
        self._worker.shutdown()

    def _fill(self, todo: list[tuple[int, Any]]) -> None:
        from llguidance import LLExecutor

        if self._executor is None:
            self._executor = LLExecutor(num_threads=1)
        target = self._target(todo[0][1])
        words = target.shape[1]
        sound = [(matcher.inner, row) for row, matcher in todo if not matcher.inner.is_error()]
        if sound:
            self._executor.unsafe_compute_mask_ptr(sound, target.ctypes.data, words * 4, len(target))
        for row, matcher in todo:
            if matcher.inner.is_error():
                self._masks[row] = 0
            elif target is not self._masks:
                self._masks[row] = target[row, : self._words]

    def _target(self, matcher: Matcher) -> npt.NDArray[np.uint32]:
        """Masks as wide as llguidance fills them."""
        if self._wide is None:
            same = matcher.words == self._words
            self._wide = self._masks if same else np.zeros((len(self._masks), matcher.words), np.uint32)
        return self._wide


def _without_special_names(described: str) -> str:
    """A tokenizer.json whose special tokens have names that no text has.

    Otherwise a form's own text that is spelt like one ("<s>") would be taken for it, and a grammar could ask for it.
    """
    parsed = json.loads(described)
    names = {token["content"]: f"<\ue000{token['id']}\ue000>" for token in parsed["added_tokens"] if token["special"]}
    for token in parsed["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = parsed["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(entry, entry): at for entry, at in model["vocab"].items()}
    elif model.get("vocab"):
        model["vocab"] = [[names.get(entry, entry), score] for entry, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    parsed["post_processor"] = None
    return json.dumps(parsed, ensure_ascii=False)


def _key(form: Format) -> tuple[str, str]:
    if form.kind == "choice":
        return form.kind, _choice_text(form.choices)
    if form.kind == "json_object":
        return form.kind, '{"type":"object"}'
    return form.kind, _schema_text(form.source) if form.kind == "json_schema" else form.source


def _grammar_text(kind: str, source: str) -> str:
    from llguidance import LLMatcher

    if kind in ("json_schema", "json_object"):
        return str(LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_pattern": _BLANKS}))
    if kind == "regex":
        return str(LLMatcher.grammar_from_regex(source))
    if kind == "choice":
        texts = [json.dumps(one, ensure_ascii=False) for one in json.loads(source)]
        # Lark's strings are JSON's, but take no control characters, of which JSON escapes only those below the blank.
        texts = [re.sub(r"[\x7f-\x9f]", lambda match: f"\\u{ord(match.group()):04x}", text) for text in texts]
        return "start: " + " | ".join(texts) + "\n"
    return source


def _probe(matcher: Any, field: str) -> None:
    """Follows what the form forces, a few tokens far: most of the forms that cannot be followed fail there. Raises InvalidArgument."""
    for _ in range(4):
        matcher.compute_bitmask()
        if matcher.is_error() or matcher.is_stopped():
            break
        forced = matcher.compute_ff_tokens()[:64]
        sound = matcher.validate_tokens(forced)
        if not sound or not matcher.consume_tokens(forced[:sound]):
            break
    if matcher.is_error():
        raise _refused(field, _reason(matcher))


def _refused(field: str, reason: str) -> InvalidArgument:
    message = f"{field} cannot be followed: {reason}. Expected a form that llguidance supports, and that some text fits."
    return InvalidArgument(message, field=field, reason=reason)


def _reason(matcher: Any) -> str:
    text = str(matcher.get_error()).replace("<non-verbose/>", "").replace("NoExtensionBias", "no text fits it")
    return " ".join(text.split())[:400].rstrip(" .")


def _choice_text(choices: Sequence[str]) -> str:
    field = "response_format.choice"
    if not 0 < len(choices) <= MOST_CHOICES:
        message = f"{field} has {len(choices)} texts; expected 1 to {MOST_CHOICES}."
        raise InvalidArgument(message, field=field, limit=MOST_CHOICES)
    if not all(choices):
        raise InvalidArgument(f"{field} holds an empty text; expected texts of a character at least.", field=field)
    return json.dumps(list(choices), ensure_ascii=False)


def _schema_text(schema: str | Mapping[str, Any] | bool) -> str:
    """The schema as JSON text, parsed once to see that it is JSON and not too deep."""
    field = "response_format.json_schema"
    if isinstance(schema, str) and len(schema) > MOST_BYTES:
        return schema  # refused by its size
    try:
        parsed = json.loads(schema, parse_constant=_no_constant) if isinstance(schema, str) else schema
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"{field} is no JSON: {str(error)[:200]}. Expected a JSON Schema as JSON text.", field=field) from None
    except RecursionError:
        parsed, text = None, ""
    if not text or _depth(parsed) > MOST_DEPTH:
        raise InvalidArgument(f"{field} is nested too deep; expected at most {MOST_DEPTH} levels.", field=field, limit=MOST_DEPTH)
    if not isinstance(parsed, (Mapping, bool)):
        raise InvalidArgument(f"{field} is {type(parsed).__name__}; expected a JSON object (or true, false).", field=field)
    if parsed is False:
        raise _refused(field, "no text fits it")
    return "{}" if parsed is True else text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _depth(parsed: Any) -> int:
    level, depth = [parsed], 0
    while level and depth <= MOST_DEPTH:
        inner = [value.values() if isinstance(value, Mapping) else value for value in level if isinstance(value, (Mapping, list))]
        level = [one for values in inner for one in values]
        depth += 1
    return depth
