"""What a search must keep to: the generation settings of transformers that change which tokens may come, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from server.errors import ManifestInvalid
from server.runtime.manifest import Seq2Seq

MAX_BEAMS = 32
_LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
_WHOLE = (*_LENGTHS, "num_beams", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size")
_REAL = ("length_penalty", "repetition_penalty")
_TOKENS = ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
KEYS = frozenset((*_WHOLE, *_REAL, *_TOKENS, "early_stopping", "bad_words_ids", "renormalize_logits"))


@dataclass(frozen=True, slots=True)
class Rules:
    """Names and meanings as in transformers' GenerationConfig; lengths count the start token, as there.

    `start`: the token that every answer begins with. `ends`: end tokens. `banned`: tokens that never come (bad words of one token,
    suppressed ones); `banned_phrases`: longer bad words; `banned_first` may not be the first token that is chosen. `forced_first`,
    `forced_last`: the token after the start, and at `max_length`; None and () without.
    """

    start: int
    max_length: int
    ends: frozenset[int]
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    min_length: int = 0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    forced_first: int | None = None
    forced_last: tuple[int, ...] = ()
    banned: frozenset[int] = field(default_factory=frozenset)
    banned_phrases: tuple[tuple[int, ...], ...] = ()
    banned_first: frozenset[int] = field(default_factory=frozenset)
    renormalize: bool = False

    @property
    def keep(self) -> int:
        """Candidates that a step looks at: enough that as many beams go on as there are, were all the others to end."""
        return max(2, 1 + len(self.ends)) * self.num_beams if self.num_beams > 1 else 1

    @property
    def edits(self) -> bool:
        """Whether some scores may differ from the model's."""
        plain = not self.banned and not self.banned_phrases and not self.banned_first and self.min_length <= 1
        sizes = self.no_repeat_ngram_size or self.encoder_no_repeat_ngram_size
        return not plain or bool(sizes) or self.repetition_penalty != 1.0


def make_rules(spec: Seq2Seq) -> Rules:
    """Rules from the manifest; raises ManifestInvalid (with `key`) for unknown keys, wrong types and values out of range."""
    generation, vocabulary, ends = spec.generation, spec.vocabulary, frozenset(spec.eos_token_ids)
    if not ends or not all(0 <= token < vocabulary for token in (*ends, spec.decoder_start_token_id)):
        raise ManifestInvalid(
            "seq2seq: start and end tokens must be within the vocabulary. Export the model again.", key="seq2seq.eos_token_ids"
        )
    unknown = sorted(set(generation) - KEYS)
    if unknown:
        raise _wrong(unknown[0], "is not one that is kept to here", f"expected some of {', '.join(sorted(KEYS))}")
    whole = {key: _whole(generation, key) for key in _WHOLE}
    stated = 1 + whole["max_new_tokens"] if whole["max_new_tokens"] else whole["max_length"]
    limit = 1 + spec.max_output_tokens
    banned, phrases = _bad_words(generation, ends, vocabulary)
    beams = whole["num_beams"] or 1
    if beams > MAX_BEAMS:
        raise _wrong("num_beams", f"is {beams}", f"expected at most {MAX_BEAMS}")
    forced = _tokens(generation, "forced_bos_token_id", vocabulary)
    return Rules(
        start=spec.decoder_start_token_id,
        max_length=min(stated, limit) if stated > 1 else limit,
        ends=ends,
        num_beams=beams,
        length_penalty=_real(generation, "length_penalty", 1.0, -10.0, 10.0),
        early_stopping=_early_stopping(generation.get("early_stopping")),
        min_length=max(whole["min_length"], 1 + whole["min_new_tokens"] if whole["min_new_tokens"] else 0),
        no_repeat_ngram_size=whole["no_repeat_ngram_size"],
        encoder_no_repeat_ngram_size=whole["encoder_no_repeat_ngram_size"],
        repetition_penalty=_real(generation, "repetition_penalty", 1.0, 1e-3, 1e3),
        forced_first=forced[0] if forced else None,
        forced_last=_tokens(generation, "forced_eos_token_id", vocabulary),
        banned=banned | frozenset(_tokens(generation, "suppress_tokens", vocabulary)),
        banned_phrases=phrases,
        banned_first=frozenset(_tokens(generation, "begin_suppress_tokens", vocabulary)),
        renormalize=generation.get("renormalize_logits") is True,
    )


def _wrong(key: str, was: str, expected: str) -> ManifestInvalid:
    return ManifestInvalid(f"seq2seq.generation: {key} {was}; {expected}. Export the model again.", key=f"seq2seq.generation.{key}")


def _whole(generation: Mapping[str, Any], key: str) -> int:
    value = generation.get(key)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1_000_000:
        raise _wrong(key, f"is {str(value)[:40]!r}", "expected a whole number up to 1000000")
    return value


def _real(generation: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    value = generation.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        raise _wrong(key, f"is {str(value)[:40]!r}", f"expected a number from {low:g} to {high:g}")
    return float(value)


def _early_stopping(value: object) -> bool | Literal["never"]:
    if value is None or value is False:
        return False
    if value is True:
        return True
    if value == "never":
        return "never"
    raise _wrong("early_stopping", f"is {str(value)[:40]!r}", 'expected true, false or "never"')


def _tokens(generation: Mapping[str, Any], key: str, vocabulary: int) -> tuple[int, ...]:
    value = generation.get(key)
    found = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(type(token) is int and 0 <= token < vocabulary for token in found) or len(found) > 100_000:
        raise _wrong(key, f"is {str(value)[:40]!r}", f"expected tokens from 0 to {vocabulary - 1}")
    return tuple(found)


def _bad_words(generation: Mapping[str, Any], ends: frozenset[int], vocabulary: int) -> tuple[frozenset[int], tuple[tuple[int, ...], ...]]:
    value = generation.get("bad_words_ids")
    if value is None:
        return frozenset(), ()
    if not isinstance(value, list | tuple) or not all(isinstance(word, list | tuple) and word for word in value) or len(value) > 100_000:
        raise _wrong("bad_words_ids", f"is {str(value)[:40]!r}", "expected lists of tokens")
    words = [_tokens({"bad_words_ids": word}, "bad_words_ids", vocabulary) for word in value]
    # transformers leaves the end token out of bad words: an answer must be able to end.
    single = frozenset(word[0] for word in words if len(word) == 1) - ends
    return single, tuple(word for word in words if len(word) > 1)
