"""The texts of the scorer: characters, words, phrases, hashed n-grams. `scoring_py` says in plain Python what each means."""

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.unicode cimport PyUnicode_DATA, PyUnicode_KIND, PyUnicode_READ_CHAR
from libc.math cimport log1p, sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

import numpy as np

from native.scoring_tables import WORDS, automaton, characters, folded, streamed

cdef enum:
    EARLY = 200
    QUESTION_WINDOW = 64
    DETAILED = 0x600
    BMP = 0x10000

cdef uint64_t TRIPLE = 0xC2B2AE3D27D4EB4FULL, FNV = 0xCBF29CE484222325ULL, FNV_PRIME = 0x100000001B3ULL

cdef struct Known:
    uint64_t who, whose, whom, when_, where, what, which, why, how, many, much, long_, old, year, date, yes, no, true_, false_, Xx, digit, digits
    uint64_t opening[10]

cdef const uint8_t* CHARACTERS = NULL
cdef const uint16_t* FOLDED = NULL
cdef const uint8_t* STREAM = NULL  # a character's class in lower case; what parts words has the class of a space
cdef const uint8_t* IDLE = NULL  # characters inside words that begin no phrase
cdef uint32_t BLANK = 0
cdef const uint16_t* MOVES = NULL
cdef const uint8_t* ENDS = NULL
cdef const uint8_t* MARKED = NULL  # states in which any phrase ends
cdef int64_t WIDTH = 0
cdef Known KNOWN
cdef list KEPT = []  # the arrays behind the pointers


cdef int load() except -1:
    """Takes the tables, once."""
    global CHARACTERS, FOLDED, STREAM, IDLE, BLANK, MOVES, ENDS, MARKED, WIDTH
    if CHARACTERS != NULL:
        return 0
    classes, moves, ends = automaton()
    assert ends.shape[1] == CATEGORIES
    cdef const uint8_t[::1] c_characters = characters()
    cdef const uint16_t[::1] c_folded = folded()
    cdef const uint16_t[:, ::1] c_moves = moves
    cdef const uint8_t[:, ::1] c_ends = ends
    marked = ends.any(axis=1).view(np.uint8)
    stream = streamed(classes)
    idle = ((stream != stream[32]) & (moves[0][stream] == 0)).view(np.uint8)
    cdef const uint8_t[::1] c_stream = stream, c_idle = idle
    cdef const uint8_t[::1] c_marked = marked
    KEPT.extend((characters(), folded(), classes, moves, ends, marked, stream, idle))
    KNOWN.who, KNOWN.whose, KNOWN.whom, KNOWN.when_, KNOWN.where = (WORDS[w] for w in ("who", "whose", "whom", "when", "where"))
    KNOWN.what, KNOWN.which, KNOWN.why, KNOWN.how, KNOWN.many = (WORDS[w] for w in ("what", "which", "why", "how", "many"))
    KNOWN.much, KNOWN.long_, KNOWN.old, KNOWN.year, KNOWN.date = (WORDS[w] for w in ("much", "long", "old", "year", "date"))
    KNOWN.yes, KNOWN.no, KNOWN.true_, KNOWN.false_ = (WORDS[w] for w in ("yes", "no", "true", "false"))
    KNOWN.Xx, KNOWN.digit, KNOWN.digits = (WORDS[w] for w in ("Xx", "9", "9999"))
    for i, word in enumerate(("is", "are", "was", "were", "do", "does", "did", "can", "has", "have")):
        KNOWN.opening[i] = WORDS[word]
    FOLDED, MOVES, ENDS, WIDTH = &c_folded[0], &c_moves[0, 0], &c_ends[0, 0], c_moves.shape[1]
    MARKED, STREAM, IDLE, BLANK = &c_marked[0], &c_stream[0], &c_idle[0], c_stream[32]
    CHARACTERS = &c_characters[0]
    return 0


cdef inline uint8_t kind_of(uint32_t c) noexcept nogil:
    if c < BMP:
        return CHARACTERS[c] & 15
    if c >= 0xE0000:
        return OTHER
    return IDEOGRAPH if c >= 0x20000 else PUNCTUATION if c >= 0x1F000 else LETTER


cdef int script_of(uint32_t c) noexcept nogil:
    if c < BMP:
        return CHARACTERS[c] >> 4
    cdef uint8_t kind = kind_of(c)
    return 8 if kind == IDEOGRAPH else 10 if kind == LETTER else 0


cdef inline uint32_t fold(uint32_t c) noexcept nogil:
    if c < DETAILED:
        return FOLDED[c]
    return c + 32 if 0xFF21 <= c <= 0xFF3A else c


cdef void tokenize(Side* side) noexcept nogil:
    cdef int64_t i = 0, start, n = side.size
    cdef int32_t line = 0
    cdef uint8_t kind
    cdef bint first = True, digits
    cdef uint32_t c
    cdef uint64_t value, number
    cdef Token* token
    cdef uint32_t* text = side.text
    cdef uint8_t* kinds = side.kinds
    side.count = 0
    while i < n:
        kind = kinds[i]
        if kind < DIGIT:
            if text[i] == 10:
                line += 1
                first = True
            elif terminator(text[i]):
                first = True
            i += 1
            continue
        start, number, digits, value = i, 0, kind == DIGIT, FNV
        if kind == IDEOGRAPH:
            value = (value ^ fold(text[i])) * FNV_PRIME
            i += 1
        else:
            if digits:
                number = FNV
                while i < n:
                    c = text[i]
                    if kinds[i] == DIGIT or c == 46 and i + 1 < n and kinds[i + 1] == DIGIT:
                        number = (number ^ fold(c)) * FNV_PRIME
                    elif not (c == 44 and i + 1 < n and kinds[i + 1] == DIGIT):
                        break
                    value = (value ^ fold(c)) * FNV_PRIME
                    i += 1
            while i < n:
                c = text[i]
                if kinds[i] >= DIGIT and kinds[i] < IDEOGRAPH:
                    value = (value ^ fold(c)) * FNV_PRIME
                elif apostrophe(c) and i + 1 < n and (kinds[i + 1] == LETTER or kinds[i + 1] == UPPER):
                    value = (value ^ 0x27) * FNV_PRIME
                else:
                    break
                i += 1
        token = &side.tokens[side.count]
        token.hash, token.number, token.start, token.end, token.line = value, number, <int32_t>start, <int32_t>i, line
        token.capital, token.first = kind == UPPER, first
        token.shape = KNOWN.Xx if token.capital else (KNOWN.digits if i - start == 4 else KNOWN.digit) if digits else value
        side.count += 1
        first = False


cdef int question_of(const Side* asked) noexcept nogil:
    cdef int64_t i
    cdef uint64_t value, after
    for i in range(max(asked.count - QUESTION_WINDOW, 0), asked.count):
        value = asked.tokens[i].hash
        after = asked.tokens[i + 1].hash if i + 1 < asked.count else 0
        if value == KNOWN.who or value == KNOWN.whose or value == KNOWN.whom:
            return 1
        if value == KNOWN.when_ or ((value == KNOWN.what or value == KNOWN.which) and (after == KNOWN.year or after == KNOWN.date)):
            return 2
        if value == KNOWN.where:
            return 3
        if value == KNOWN.how:
            return 4 if after == KNOWN.many or after == KNOWN.much or after == KNOWN.long_ or after == KNOWN.old else 7
        if value == KNOWN.what or value == KNOWN.which:
            return 6
        if value == KNOWN.why:
            return 7
    if asked.count:
        for i in range(10):
            if asked.tokens[0].hash == KNOWN.opening[i]:
                return 5
    return 0


cdef int opening_of(const Side* said) noexcept nogil:
    """1: the first word is yes or true, 2: no or false, 0: neither."""
    if not said.count:
        return 0
    cdef uint64_t value = said.tokens[0].hash
    return 1 if value == KNOWN.yes or value == KNOWN.true_ else 2 if value == KNOWN.no or value == KNOWN.false_ else 0


cdef void phrase_features(const Side* said, double* out) noexcept nogil:
    """out[7]: the automaton over the text in lower case, words parted by single spaces."""
    cdef int64_t i, n = said.size, counts[CATEGORIES]
    cdef uint32_t c, state
    cdef bint gap = True, early = False
    cdef int category
    cdef const uint8_t* ends
    memset(counts, 0, sizeof(counts))
    state, i = MOVES[BLANK], 0
    while i <= n:
        if state == 0:  # inside a word that begins no phrase: on to what may begin one
            while i < n and said.text[i] < BMP and IDLE[said.text[i]]:
                gap = False
                i += 1
        c = BLANK if i == n else STREAM[said.text[i]] if said.text[i] < BMP else 0 if kind_of(said.text[i]) >= DIGIT else BLANK
        i += 1
        if c != BLANK:
            gap = False
        elif gap:
            continue
        else:
            gap = True
        state = MOVES[state * WIDTH + c]
        if MARKED[state]:
            ends = &ENDS[state * CATEGORIES]
            for category in range(CATEGORIES):
                counts[category] += ends[category]
            early = early or (i <= EARLY and ends[0] + ends[1] > 0)
    for category in range(CATEGORIES):
        out[category] = log1p(<double>counts[category])
    out[CATEGORIES] = early


cdef inline void put(Bag* bag, uint64_t gram, double value) noexcept nogil:
    cdef uint64_t mixed = mix(gram, TRIPLE)
    if not mixed >> 63:
        value = -value
    if bag.weights != NULL:
        bag.total += bag.weights[mixed & bag.mask] * <double><float>value
    else:
        bag.places[bag.count], bag.values[bag.count] = <int32_t>(mixed & bag.mask), <float>value
    bag.count += 1


cdef void put_grams(Bag* bag, const Token* tokens, int64_t n, int most, uint64_t salt, bint shapes) noexcept nogil:
    cdef int64_t i, grams = 0
    cdef int length
    cdef uint64_t gram
    cdef double value
    for length in range(most):
        grams += max(n - length, 0)
    value = 1 / sqrt(<double>grams) if grams else 0
    for i in range(n):
        gram = salt
        for length in range(most):
            if i + length < n:
                gram = mix(gram, tokens[i + length].shape if shapes else tokens[i + length].hash)
                put(bag, gram, value)


cdef void fill(Bag* bag, const Side* asked, const Side* said) noexcept nogil:
    cdef int64_t i, n = min(said.count, MOST_GRAMS), late = max(asked.count - MOST_GRAMS, 0)
    cdef uint64_t question
    put_grams(bag, asked.tokens + late, asked.count - late, 2, 1, False)
    put_grams(bag, said.tokens, n, 2, 2, False)
    put_grams(bag, said.tokens, n, 3, 3, True)
    question = mix(4, question_of(asked))
    n = min(n, 20)
    for i in range(n):
        put(bag, mix(question, said.tokens[i].shape), 1 / sqrt(<double>n))


cdef int read(str given, Side* side) except -1:
    """Characters, kinds and words; a text of more than 2^30 characters is refused."""
    cdef int64_t n = len(given), i
    cdef uint32_t c
    cdef const uint8_t* narrow
    cdef int64_t scripts[2][16]  # two, so that no count waits for the one before
    load()
    if n > 1 << 30:
        raise ValueError("texts of more than 2^30 characters are not scored")
    side.text = <uint32_t*>PyMem_Malloc(n * 5 + 16)
    side.tokens = <Token*>PyMem_Malloc((n + 1) * sizeof(Token))
    if side.text == NULL or side.tokens == NULL:
        raise MemoryError()
    side.kinds = <uint8_t*>(side.text + n)
    side.size = n
    memset(scripts, 0, sizeof(scripts))
    if PyUnicode_KIND(given) == 1:
        narrow = <const uint8_t*>PyUnicode_DATA(given)
        for i in range(n):
            side.text[i], side.kinds[i] = narrow[i], CHARACTERS[narrow[i]] & 15
            scripts[i & 1][CHARACTERS[narrow[i]] >> 4] += 1
    else:
        for i in range(n):
            c = PyUnicode_READ_CHAR(given, i)
            side.text[i], side.kinds[i] = c, kind_of(c)
            scripts[i & 1][script_of(c)] += 1
    for i in range(16):
        side.scripts[i] = scripts[0][i] + scripts[1][i]
    with nogil:
        tokenize(side)
    return 0


cdef void release(Side* side) noexcept:
    PyMem_Free(side.text)
    PyMem_Free(side.tokens)
