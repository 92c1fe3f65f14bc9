"""Plain-Python twin of `native.scoring`: what each feature of an answer means, in the plainest code; the same tests run on both.

Everything is counted in Unicode code points, so lone surrogates and other odd text are just characters. A word is a run of letters and
digits (apostrophes between letters included); Chinese and Japanese characters are words of their own. Words are known by a 64-bit hash
of their lower-case form; what is equal by hash counts as equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from native.json_text import is_json
from native.scoring_tables import (
    DIGIT,
    IDEOGRAPH,
    LETTER,
    OTHER,
    PUNCTUATION,
    SPACE,
    UPPER,
    WORDS,
    fold,
    kind_of,
    script_of,
    word_hash,
)

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

FEATURES: tuple[str, ...] = (
    # From the decoder. A has_ flag is 1 where the array was given and holds a number; else its features are 0. Lower quantiles.
    "has_logprobs", "logprob_mean", "logprob_min", "logprob_q10", "logprob_q25", "logprob_q50", "low_share", "low_count", "logprob_trend",
    "has_entropies", "entropy_mean", "entropy_max", "entropy_trend",
    "has_margins", "margin_mean", "margin_min", "margin_q10", "margin_first",
    "has_finish", "cut", "tool_call",
    # Lengths, as log(1 + n).
    "chars", "words", "sentences", "lines", "word_length", "empty",
    # Repetition.
    "distinct_1", "distinct_2", "repeat_4", "line_repeat", "character_run", "compression",
    # Form.
    "brackets", "quotes", "fences", "unfinished", "ends_stop", "starts_lower", "control_share", "upper_share", "digit_share",
    "punctuation_share", "capital_share", "bullets", "asks_back",
    # Phrases, as log(1 + n).
    "refusal", "unknown", "hedge", "turn", "final", "negation", "refusal_early",
    # Format.
    "json_like", "json_valid", "choice", "starts_yes", "starts_no", "numbers",
    # Against the prompt.
    "has_prompt", "prompt_words", "length_ratio", "overlap", "coverage", "echo_run", "echo_share", "novel_numbers", "novel_names",
    "other_script", "prompt_question", "prompt_cased", "asks_who", "asks_when", "asks_where", "asks_count", "asks_yes_no",
    "missing_number", "missing_name",
)  # fmt: skip

UNKNOWN_FINISH, STOP, LENGTH, TOOL_CALLS = 0, 1, 2, 3
LOW_LOGPROB = math.log(0.1)
CLIP = 50.0
MASK = 2**64 - 1
PAIR, TRIPLE = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
COMPRESSED = 2048  # characters of the answer whose compression is estimated
SLOTS = 4096  # of the table that finds earlier text for the compression estimate
EARLY = 200  # characters of the answer in which a refusal is its opening
QUESTION_WINDOW = 64  # words at the prompt's end in which its question is looked for
MOST_GRAMS = 2048  # words of each text that are hashed into features
TERMINATORS = frozenset(map(ord, ".!?。！？…"))
OPEN = {ord("("): 0, ord("["): 1, ord("{"): 2}
CLOSE = {ord(")"): 0, ord("]"): 1, ord("}"): 2}
APOSTROPHES = frozenset(map(ord, "'’"))


@dataclass(slots=True)
class Token:
    """A word. `number` is the hash of its leading digits without thousands separators, 0 where it starts with none."""

    hash: int
    number: int
    start: int
    end: int
    capital: bool
    first: bool  # of its sentence
    shape: int  # hash of its shape: capitalised words are alike, numbers are alike, other words are themselves
    line: int


def mix(a: int, b: int) -> int:
    """A hash of an ordered pair of hashes."""
    mixed = ((a * PAIR) ^ (b + TRIPLE)) * PAIR & MASK
    return (mixed ^ (mixed >> 29)) & MASK


def tokens_of(text: Sequence[int], kinds: Sequence[int]) -> list[Token]:
    """The words of a text of code points, whose kinds are given."""
    found: list[Token] = []
    first, line, i, n = True, 0, 0, len(text)
    while i < n:
        kind = kinds[i]
        if kind < DIGIT:
            if text[i] == 10:
                line += 1
                first = True
            elif text[i] in TERMINATORS:
                first = True
            i += 1
            continue
        start, number, digits = i, 0, kind == DIGIT
        if kind == IDEOGRAPH:
            i += 1
        else:
            if digits:
                i, number = _number(text, kinds, i)
            while i < n and (DIGIT <= kinds[i] < IDEOGRAPH or _joins(text, kinds, i)):
                i += 1
        value = word_hash(text[start:i])
        capital = kind == UPPER
        shape = WORDS["Xx"] if capital else WORDS["9999"] if digits and i - start == 4 else WORDS["9"] if digits else value
        found.append(Token(value, number, start, i, capital, first, shape, line))
        first = False
    return found


def _joins(text: Sequence[int], kinds: Sequence[int], i: int) -> bool:
    """An apostrophe between letters belongs to the word."""
    return text[i] in APOSTROPHES and i + 1 < len(text) and kinds[i + 1] in (LETTER, UPPER)


def _number(text: Sequence[int], kinds: Sequence[int], i: int) -> tuple[int, int]:
    """The end of the digits that start here, "1,234.5" included, and the hash of what they say."""
    said: list[int] = []
    n = len(text)
    while i < n:
        if kinds[i] == DIGIT:
            said.append(text[i])
        elif not (text[i] in (44, 46) and i + 1 < n and kinds[i + 1] == DIGIT):
            break
        elif text[i] == 46:
            said.append(46)
        i += 1
    return i, word_hash(said)


class Pair:
    """An answer and its prompt, read once. `prompt` may be empty: then nothing is compared with it."""

    def __init__(self, prompt: str, answer: str) -> None:
        self.prompt, self.text = [ord(c) for c in prompt], [ord(c) for c in answer]
        self.prompt_kinds, self.kinds = [kind_of(c) for c in self.prompt], [kind_of(c) for c in self.text]
        self.asked, self.tokens = tokens_of(self.prompt, self.prompt_kinds), tokens_of(self.text, self.kinds)

    def features(
        self,
        logprobs: Float32 | None = None,
        entropies: Float32 | None = None,
        margins: Float32 | None = None,
        finish: int = UNKNOWN_FINISH,
    ) -> Float32:
        """float32[len(FEATURES)], every one finite.

        Args:
            logprobs: float32[n], natural logarithms, of the answer's tokens; entropies (nats) and margins (best to second) likewise.
                NaN counts as absent, other values are held to [-50, 50].
            finish: UNKNOWN_FINISH, STOP, LENGTH or TOOL_CALLS.
        """
        given = _decoder(logprobs, entropies, margins)
        given += [float(finish != UNKNOWN_FINISH), float(finish == LENGTH), float(finish == TOOL_CALLS)]
        given += _lengths(self) + _repetition(self) + _form(self) + _phrases(self) + _format(self) + _against(self)
        assert len(given) == len(FEATURES)
        return np.array(given, np.float32)

    def bag(self, bits: int) -> tuple[Int32, Float32]:
        """Hashed n-grams: places int32[n] in a table of 2^bits and signed values float32[n], each family's squares adding up to 1.

        Families: words and pairs of the prompt; words and pairs of the answer; the answer's shapes, one to three in a row; the prompt's
        question word with each of the answer's first shapes.
        """
        if not 1 <= bits <= 24:
            raise ValueError("bits must be in [1, 24]")
        places: list[int] = []
        values: list[float] = []
        for family in self._families():
            for gram in family:
                mixed = mix(gram, TRIPLE)
                places.append(mixed & (2**bits - 1))
                values.append((1.0 if mixed >> 63 else -1.0) / math.sqrt(len(family)))
        return np.array(places, np.int32), np.array(values, np.float32)

    def dot(self, weights: Float32) -> float:
        """The bag times weights float32[2^bits]."""
        bits = len(weights).bit_length() - 1
        if len(weights) != 1 << bits:
            raise ValueError("weights must be float32[2^bits]")
        places, values = self.bag(bits)
        return float(np.dot(weights[places].astype(np.float64), values.astype(np.float64)))

    def _families(self) -> Iterator[list[int]]:
        asked, said = self.asked[-MOST_GRAMS:], self.tokens[:MOST_GRAMS]
        yield _grams([t.hash for t in asked], 2, 1)
        yield _grams([t.hash for t in said], 2, 2)
        yield _grams([t.shape for t in said], 3, 3)
        question = _question(self)
        yield [mix(mix(4, question), t.shape) for t in said[:20]]


def _grams(hashes: list[int], most: int, salt: int) -> list[int]:
    found = []
    for i in range(len(hashes)):
        gram = salt
        for length in range(most):
            if i + length < len(hashes):
                gram = mix(gram, hashes[i + length])
                found.append(gram)
    return found


def _decoder(logprobs: Float32 | None, entropies: Float32 | None, margins: Float32 | None) -> list[float]:
    out: list[float] = []
    said = _clean(logprobs)
    if said:
        low = sum(v < LOW_LOGPROB for v in said)
        order = sorted(said)
        out += [1.0, sum(said) / len(said), order[0], _quantile(order, 10), _quantile(order, 4), _quantile(order, 2)]
        out += [low / len(said), math.log1p(low), _trend(said)]
    else:
        out += [0.0] * 9
    spread = _clean(entropies)
    out += [1.0, sum(spread) / len(spread), max(spread), _trend(spread)] if spread else [0.0] * 4
    gaps = _clean(margins)
    out += [1.0, sum(gaps) / len(gaps), min(gaps), _quantile(sorted(gaps), 10), gaps[0]] if gaps else [0.0] * 5
    return out


def _clean(values: Float32 | None) -> list[float]:
    return [] if values is None else [min(max(v, -CLIP), CLIP) for v in values.tolist() if v == v]


def _quantile(order: list[float], parts: int) -> float:
    return order[(len(order) - 1) // parts]


def _trend(values: list[float]) -> float:
    half = len(values) // 2
    return sum(values[-half:]) / half - sum(values[:half]) / half if half else 0.0


def _lengths(pair: Pair) -> list[float]:
    text, words = pair.text, len(pair.tokens)
    ends = sum(
        c in TERMINATORS and (i + 1 == len(text) or pair.kinds[i + 1] in (SPACE, PUNCTUATION) or c > 0x3000) for i, c in enumerate(text)
    )
    letters = sum(t.end - t.start for t in pair.tokens)
    counts = [math.log1p(len(text)), math.log1p(words), math.log1p(ends), math.log1p(text.count(10))]
    return [*counts, letters / max(words, 1), float(words == 0)]


def _repetition(pair: Pair) -> list[float]:
    hashes = [t.hash for t in pair.tokens]
    n = len(hashes)
    pairs = [mix(a, b) for a, b in pairwise(hashes)]
    fours = [mix(a, b) for a, b in zip(pairs, pairs[2:], strict=False)]
    lines: dict[int, int] = {}
    for token in pair.tokens:
        lines[token.line] = mix(lines.get(token.line, 0), token.hash)
    run = longest = 0
    for i, kind in enumerate(pair.kinds):
        run = run + 1 if i and kind >= DIGIT and pair.text[i] == pair.text[i - 1] else 0
        longest = max(longest, run)
    return [
        len(set(hashes)) / n if n else 1.0,
        len(set(pairs)) / len(pairs) if pairs else 1.0,
        1 - len(set(fours)) / len(fours) if fours else 0.0,
        1 - len(set(lines.values())) / len(lines) if lines else 0.0,
        math.log1p(max(longest - 2, 0)),
        _compression(pair.text),
    ]


def _compression(text: list[int]) -> float:
    """About what LZ77 leaves of the text's first characters: a match costs three; one table of earlier places, one try each."""
    table = [-1] * SLOTS
    i = cost = 0
    n = min(len(text), COMPRESSED)
    while i < n:
        length = 1
        if i + 4 <= n:
            slot = (((text[i] * 31 + text[i + 1]) * 31 + text[i + 2]) * 31 + text[i + 3]) * 2654435761 % 2**32 >> 20
            at, table[slot] = table[slot], i
            if at >= 0:
                while i + length - 1 < n and text[at + length - 1] == text[i + length - 1]:
                    length += 1
                length = length - 1 if length > 4 else 1
        cost += 3 if length > 1 else 1
        i += length
    return cost / n if n else 1.0


def _form(pair: Pair) -> list[float]:
    text, kinds, tokens = pair.text, pair.kinds, pair.tokens
    n = max(len(text), 1)
    depth, wrong, straight, curled, ticks, fences = [0, 0, 0], 0, 0, 0, 0, 0
    for c in text:
        if c in OPEN:
            depth[OPEN[c]] += 1
        elif c in CLOSE:
            if depth[CLOSE[c]]:
                depth[CLOSE[c]] -= 1
            else:
                wrong += 1
        straight += c == 0x22
        curled += (c == 0x201C) - (c == 0x201D)
        ticks = ticks + 1 if c == 0x60 else 0
        fences += ticks == 3
    last = next((i for i in range(len(text) - 1, -1, -1) if kinds[i] != SPACE), -1)
    stops = last >= 0 and text[last] in TERMINATORS
    dangling = last >= 0 and (kinds[last] != PUNCTUATION or text[last] in (*OPEN, 0x2C, 0x2D, 0x3B))
    first = tokens[0].start if tokens else -1
    counts = [kinds.count(k) for k in (OTHER, UPPER, DIGIT, PUNCTUATION)]
    return [
        math.log1p(wrong + sum(depth)),
        float(straight % 2 or curled != 0),
        float(fences % 2),
        float(dangling and len(tokens) >= 8),
        float(stops),
        float(first >= 0 and kinds[first] == LETTER and 1 <= script_of(text[first]) <= 3),
        counts[0] / n,
        counts[1] / n,
        counts[2] / n,
        counts[3] / n,
        sum(t.capital for t in tokens) / max(len(tokens), 1),
        _bullets(text, kinds),
        float(last >= 0 and text[last] in (0x3F, 0xFF1F)),
    ]


def _bullets(text: list[int], kinds: list[int]) -> float:
    """The share of lines that begin with -, *, • or a digit, of the lines that are not blank."""
    lines = marked = 0
    fresh = True
    for c, kind in zip(text, kinds, strict=True):
        if c == 10:
            fresh = True
        elif fresh and kind != SPACE:
            fresh = False
            lines += 1
            marked += c in (0x2D, 0x2A, 0x2022) or kind == DIGIT
    return marked / lines if lines > 1 else 0.0


def spoken(text: Sequence[int], kinds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(character, place) of the text as phrases see it: lower case, words parted by single spaces, one before and one after."""
    yield 32, 0
    gap = True
    for i, c in enumerate(text):
        if kinds[i] >= DIGIT or c in APOSTROPHES:
            yield (0x27 if c in APOSTROPHES else fold(c)), i
            gap = False
        elif not gap:
            yield 32, i
            gap = True
    if not gap:
        yield 32, len(text)


def _phrases(pair: Pair) -> list[float]:
    from native.phrases import CATEGORIES, patterns

    stream = list(spoken(pair.text, pair.kinds))
    text = "".join(chr(c) for c, _ in stream)
    counts = [0] * len(CATEGORIES)
    early = False
    for category, phrase in patterns():
        at = text.find(phrase)
        while at >= 0:
            counts[category] += 1
            early = early or (category < 2 and stream[at + len(phrase) - 1][1] < EARLY)
            at = text.find(phrase, at + 1)
    return [*(math.log1p(count) for count in counts), float(early)]


def _format(pair: Pair) -> list[float]:
    tokens = pair.tokens
    begin, end = _body(pair)
    like = begin < end and pair.text[begin] in (0x7B, 0x5B)
    choice = False
    if tokens and tokens[0].capital and tokens[0].end - tokens[0].start == 1 and 65 <= pair.text[tokens[0].start] <= 74:
        after = tokens[0].end
        choice = after >= len(pair.text) or pair.text[after] in (0x2E, 0x29, 0x3A, 10)
    opening = tokens[0].hash if tokens else 0
    return [
        float(like),
        float(like and is_json(pair.text, begin, end)),
        float(choice),
        float(opening in (WORDS["yes"], WORDS["true"])),
        float(opening in (WORDS["no"], WORDS["false"])),
        math.log1p(sum(t.number != 0 for t in tokens)),
    ]


def _body(pair: Pair) -> tuple[int, int]:
    """The text without surrounding white space, and without a code fence around all of it."""
    text, kinds = pair.text, pair.kinds
    begin, end = 0, len(text)
    while end > begin and kinds[end - 1] == SPACE:
        end -= 1
    while begin < end and kinds[begin] == SPACE:
        begin += 1
    if end - begin >= 7 and text[begin : begin + 3] == [0x60] * 3 == text[end - 3 : end]:
        end -= 3
        while begin < end and text[begin] != 10:
            begin += 1
        while begin < end and kinds[begin] == SPACE:
            begin += 1
        while end > begin and kinds[end - 1] == SPACE:
            end -= 1
    return begin, end


def _question(pair: Pair) -> int:
    """0: not known, 1 who, 2 when, 3 where, 4 how many or much, 5 yes or no, 6 what or which, 7 why or how."""
    window = [t.hash for t in pair.asked[-QUESTION_WINDOW:]]
    for i, value in enumerate(window):
        after = window[i + 1] if i + 1 < len(window) else 0
        if value in (WORDS["who"], WORDS["whose"], WORDS["whom"]):
            return 1
        if value == WORDS["when"] or (value in (WORDS["what"], WORDS["which"]) and after in (WORDS["year"], WORDS["date"])):
            return 2
        if value == WORDS["where"]:
            return 3
        if value == WORDS["how"]:
            return 4 if after in (WORDS["many"], WORDS["much"], WORDS["long"], WORDS["old"]) else 7
        if value in (WORDS["what"], WORDS["which"]):
            return 6
        if value == WORDS["why"]:
            return 7
    first = pair.asked[0].hash if pair.asked else 0
    return 5 if first in tuple(WORDS[w] for w in ("is", "are", "was", "were", "do", "does", "did", "can", "has", "have")) else 0


def _against(pair: Pair) -> list[float]:
    asked, tokens = pair.asked, pair.tokens
    if not asked:
        return [0.0] * 19
    words = {t.hash for t in asked}
    said = {t.hash for t in tokens}
    n = max(len(tokens), 1)
    run, share = _echo(asked, tokens)
    numbers = {t.number for t in asked}
    given = [t.number for t in tokens if t.number]
    names = [t.hash for t in tokens if t.capital and not t.first]
    question = _question(pair)
    capitals = any(t.capital for t in tokens)
    return [
        1.0,
        math.log1p(len(asked)),
        math.log1p(len(tokens)) - math.log1p(len(asked)),
        sum(t.hash in words for t in tokens) / n,
        len(words & said) / len(words),
        run / n,
        share / n,
        sum(v not in numbers for v in given) / max(len(given), 1),
        sum(v not in words for v in names) / n,
        _other_script(pair),
        float(0x3F in pair.prompt or 0xFF1F in pair.prompt),
        float(asked[0].capital),
        *(float(question == k) for k in range(1, 6)),
        float(question in (2, 4) and not given),
        float(question == 1 and not capitals),
    ]


def _echo(asked: list[Token], tokens: list[Token]) -> tuple[int, int]:
    """Words of the longest stretch whose triples all stand in the prompt, and words of all such stretches (a shingle's reading of them)."""
    triples = {mix(mix(a.hash, b.hash), c.hash) for a, b, c in zip(asked, asked[1:], asked[2:], strict=False)}
    run = longest = share = 0
    for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if mix(mix(a.hash, b.hash), c.hash) in triples:
            share += 1 if run else 3
            run += 1
            longest = max(longest, run + 2)
        else:
            run = 0
    return longest, min(share, len(tokens))


def _other_script(pair: Pair) -> float:
    """The share of the answer's letters that are not of the script in which most of the prompt is written."""
    scripts = [0] * 16
    for c in pair.prompt:
        scripts[script_of(c)] += 1
    main = max(range(1, 16), key=lambda s: (scripts[s], -s))
    letters = [script_of(c) for c in pair.text if script_of(c)]
    return sum(s != main for s in letters) / len(letters) if letters and scripts[main] else 0.0
