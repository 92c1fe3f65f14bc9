"""Features of an answer in one pass without the interpreter. `scoring_py` says in plain Python what each means."""

from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.math cimport log, log1p
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from native.scoring_json cimport is_json
from native.scoring_text cimport (
    CATEGORIES, DIGIT, LETTER, MOST_GRAMS, OTHER, PUNCTUATION, SPACE, UPPER, Bag, Set, Side, Token, added, fill, holds, mix, opening_of,
    phrase_features, question_of, read, release, script_of, terminator,
)

import numpy as np

from native.scoring_py import FEATURES

UNKNOWN_FINISH, STOP, LENGTH, TOOL_CALLS = 0, 1, 2, 3

cdef enum:
    C_LENGTH = 2
    C_TOOL_CALLS = 3
    SLOTS = 4096
    COMPRESSED = 2048

cdef double CLIP = 50.0, LOW_LOGPROB = log(0.1)


cdef double nth(double* values, int64_t n, int64_t k) noexcept nogil:
    """The k-th smallest; Hoare's selection, changes the order."""
    cdef int64_t low = 0, high = n - 1, i, j
    cdef double pivot, other
    while low < high:
        pivot, i, j = values[(low + high) >> 1], low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                other = values[i]
                values[i], values[j] = values[j], other
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            break
    return values[k]


cdef int64_t cleaned(const float* given, int64_t n, double* kept) noexcept nogil:
    cdef int64_t i, count = 0
    for i in range(n):
        if given[i] == given[i]:
            kept[count] = min(max(<double>given[i], -CLIP), CLIP)
            count += 1
    return count


cdef void spread(const double* values, int64_t n, double* mean, double* least, double* most, double* trend) noexcept nogil:
    cdef int64_t i, half = n >> 1
    cdef double total = 0, early = 0, late = 0
    least[0] = most[0] = values[0]
    for i in range(n):
        total += values[i]
        if i < half:
            early += values[i]
        if i >= n - half:
            late += values[i]
        least[0], most[0] = min(least[0], values[i]), max(most[0], values[i])
    mean[0], trend[0] = total / n, (late - early) / half if half else 0.0


cdef void decoder_features(const float** given, const int64_t* sizes, double* kept, double* out) noexcept nogil:
    """out[18]: logprobs 9, entropies 4, margins 5."""
    cdef double least = 0, most = 0, trend = 0
    cdef int64_t i, n = cleaned(given[0], sizes[0], kept), low = 0
    if n:
        spread(kept, n, &out[1], &out[2], &most, &out[8])
        for i in range(n):
            low += kept[i] < LOW_LOGPROB
        out[0], out[6], out[7] = 1, <double>low / n, log1p(<double>low)
        out[5], out[4], out[3] = nth(kept, n, (n - 1) // 2), nth(kept, n, (n - 1) // 4), nth(kept, n, (n - 1) // 10)
    n = cleaned(given[1], sizes[1], kept)
    if n:
        out[9] = 1
        spread(kept, n, &out[10], &least, &out[11], &out[12])
    n = cleaned(given[2], sizes[2], kept)
    if n:
        out[13], out[17] = 1, kept[0]
        spread(kept, n, &out[14], &out[15], &most, &trend)
        out[16] = nth(kept, n, (n - 1) // 10)


cdef double compression(const uint32_t* text, int64_t n) noexcept nogil:
    cdef int32_t table[SLOTS]
    cdef int64_t i = 0, cost = 0, length, at
    cdef uint32_t slot
    memset(table, 0xFF, sizeof(table))
    while i < n:
        length = 1
        if i + 4 <= n:
            slot = ((((text[i] * 31 + text[i + 1]) * 31 + text[i + 2]) * 31 + text[i + 3]) * 2654435761U) >> 20
            at = table[slot]
            table[slot] = <int32_t>i
            if at >= 0:
                while i + length - 1 < n and text[at + length - 1] == text[i + length - 1]:
                    length += 1
                length = length - 1 if length > 4 else 1
        cost += 3 if length > 1 else 1
        i += length
    return <double>cost / n if n else 1.0


cdef void repetition_features(const Side* said, Set* sets, double* out) noexcept nogil:
    """out[6]; sets[0..3] are empty and large enough: words, pairs, fours, lines."""
    cdef int64_t i, n = said.count, lines = 0, run = 0, longest = 0
    cdef uint64_t before = 0, two, older[2], line = 0
    older[0] = older[1] = 0
    for i in range(n):
        added(&sets[0], said.tokens[i].hash)
        if i:
            two = mix(said.tokens[i - 1].hash, said.tokens[i].hash)
            added(&sets[1], two)
            if i >= 3:
                added(&sets[2], mix(older[0], two))
            older[0], older[1] = older[1], two
            if said.tokens[i].line != said.tokens[i - 1].line:
                lines += 1
                added(&sets[3], line)
                line = 0
        line = mix(line, said.tokens[i].hash)
    if n:
        lines += 1
        added(&sets[3], line)
    for i in range(1, said.size):
        run = run + 1 if said.kinds[i] >= DIGIT and said.text[i] == said.text[i - 1] else 0
        longest = max(longest, run)
    out[0] = <double>sets[0].count / n if n else 1.0
    out[1] = <double>sets[1].count / (n - 1) if n > 1 else 1.0
    out[2] = 1 - <double>sets[2].count / (n - 3) if n > 3 else 0.0
    out[3] = 1 - <double>sets[3].count / lines if lines else 0.0
    out[4] = log1p(<double>max(longest - 2, 0))
    out[5] = compression(said.text, min(said.size, COMPRESSED))


cdef void form_features(const Side* said, double* lengths, double* out) noexcept nogil:
    """lengths[6] and out[13], from one walk over the characters and one over the words."""
    cdef int64_t i, n = said.size, words = said.count, wrong = 0, straight = 0, curled = 0, ticks = 0, fences = 0, ends = 0, breaks = 0
    cdef int64_t depth[3], last = -1, marked = 0, lines = 0, letters = 0, capitals = 0
    cdef int64_t control = 0, uppers = 0, digits = 0, points = 0
    cdef uint32_t c
    cdef uint8_t kind
    cdef int which
    cdef bint fresh = True
    memset(depth, 0, sizeof(depth))
    for i in range(n):
        control += said.kinds[i] == OTHER
        uppers += said.kinds[i] == UPPER
        digits += said.kinds[i] == DIGIT
        points += said.kinds[i] == PUNCTUATION
    for i in range(n):
        kind = said.kinds[i]
        if kind >= DIGIT:
            if fresh:
                fresh = False
                lines += 1
                marked += kind == DIGIT
            continue
        c = said.text[i]
        if kind == SPACE:
            if c == 10:
                fresh = True
                breaks += 1
            continue
        if fresh:
            fresh = False
            lines += 1
            marked += c == 0x2D or c == 0x2A or c == 0x2022
        if kind == OTHER:
            continue
        if c == 0x60:
            ticks = ticks + 1 if i and said.text[i - 1] == 0x60 else 1
            fences += ticks == 3
        elif c == 0x22:
            straight += 1
        elif c == 0x201C or c == 0x201D:
            curled += 1 if c == 0x201C else -1
        elif terminator(c):
            ends += i + 1 == n or said.kinds[i + 1] == SPACE or said.kinds[i + 1] == PUNCTUATION or c > 0x3000
        else:
            which = 0 if c == 0x28 or c == 0x29 else 1 if c == 0x5B or c == 0x5D else 2 if c == 0x7B or c == 0x7D else 3
            if which < 3:
                if c == 0x28 or c == 0x5B or c == 0x7B:
                    depth[which] += 1
                elif depth[which]:
                    depth[which] -= 1
                else:
                    wrong += 1
    last = n - 1
    while last >= 0 and said.kinds[last] == SPACE:
        last -= 1
    for i in range(words):
        letters += said.tokens[i].end - said.tokens[i].start
        capitals += said.tokens[i].capital
    lengths[0], lengths[1], lengths[2], lengths[3] = log1p(<double>n), log1p(<double>words), log1p(<double>ends), log1p(<double>breaks)
    lengths[4], lengths[5] = <double>letters / max(words, 1), words == 0
    out[0] = log1p(<double>(wrong + depth[0] + depth[1] + depth[2]))
    out[1], out[2] = straight % 2 == 1 or curled != 0, fences % 2
    if last >= 0:
        c, kind = said.text[last], said.kinds[last]
        out[3] = words >= 8 and (
            kind != PUNCTUATION or c == 0x28 or c == 0x5B or c == 0x7B or c == 0x2C or c == 0x2D or c == 0x3B
        )
        out[4], out[12] = terminator(c), c == 0x3F or c == 0xFF1F
    if words:
        i = said.tokens[0].start
        which = script_of(said.text[i])
        out[5] = said.kinds[i] == LETTER and which >= 1 and which <= 3
    n = max(n, 1)
    out[6], out[7] = <double>control / n, <double>uppers / n
    out[8], out[9] = <double>digits / n, <double>points / n
    out[10], out[11] = <double>capitals / max(words, 1), <double>marked / lines if lines > 1 else 0.0


cdef void format_features(const Side* said, double* out) noexcept nogil:
    """out[6]"""
    cdef int64_t i, begin = 0, end = said.size, numbers = 0
    cdef uint32_t* text = said.text
    cdef Token* token
    while end > begin and said.kinds[end - 1] == SPACE:
        end -= 1
    while begin < end and said.kinds[begin] == SPACE:
        begin += 1
    if end - begin >= 7 and text[begin] == text[begin + 1] == text[begin + 2] == text[end - 1] == text[end - 2] == text[end - 3] == 0x60:
        end -= 3
        while begin < end and text[begin] != 10:
            begin += 1
        while begin < end and said.kinds[begin] == SPACE:
            begin += 1
        while end > begin and said.kinds[end - 1] == SPACE:
            end -= 1
    out[0] = begin < end and (text[begin] == 0x7B or text[begin] == 0x5B)
    out[1] = out[0] and is_json(text, begin, end)
    if said.count:
        token = &said.tokens[0]
        if token.capital != 0 and token.end - token.start == 1 and text[token.start] <= 74:
            i = token.end
            out[2] = i >= said.size or text[i] == 0x2E or text[i] == 0x29 or text[i] == 0x3A or text[i] == 10
        out[3], out[4] = opening_of(said) == 1, opening_of(said) == 2
    for i in range(said.count):
        numbers += said.tokens[i].number != 0
    out[5] = log1p(<double>numbers)


cdef double other_script(const Side* asked, const Side* said) noexcept nogil:
    cdef int64_t letters = said.size - said.scripts[0]
    cdef int script, main = 1
    for script in range(2, 16):
        if asked.scripts[script] > asked.scripts[main]:
            main = script
    return <double>(letters - said.scripts[main]) / letters if letters and asked.scripts[main] else 0.0


cdef void echo(const Side* said, const Set* triples, double* out) noexcept nogil:
    """out[2]: the longest stretch of the prompt's triples, and all of them, as shares of the words."""
    cdef int64_t i, run = 0, longest = 0, share = 0
    for i in range(2, said.count):
        if holds(triples, mix(mix(said.tokens[i - 2].hash, said.tokens[i - 1].hash), said.tokens[i].hash)):
            share += 1 if run else 3
            run += 1
            longest = max(longest, run + 2)
        else:
            run = 0
    out[0], out[1] = <double>longest / max(said.count, 1), <double>min(share, said.count) / max(said.count, 1)


cdef void prompt_features(const Side* asked, const Side* said, const Set* words, Set* sets, double* out) noexcept nogil:
    """out[19]; `words` are the answer's, sets[0..2] empty: the prompt's words, triples and numbers."""
    cdef int64_t i, n = max(said.count, 1), overlap = 0, covered = 0, numbers = 0, novel = 0, names = 0, capitals = 0
    cdef Token* token
    cdef int question
    if not asked.count:
        return
    for i in range(asked.count):
        token = &asked.tokens[i]
        if added(&sets[0], token.hash):
            covered += holds(words, token.hash)
        if i >= 2:
            added(&sets[1], mix(mix(asked.tokens[i - 2].hash, asked.tokens[i - 1].hash), token.hash))
        if token.number:
            added(&sets[2], token.number)
    for i in range(said.count):
        token = &said.tokens[i]
        overlap += holds(&sets[0], token.hash)
        capitals += token.capital
        names += token.capital != 0 and token.first == 0 and not holds(&sets[0], token.hash)
        if token.number:
            numbers += 1
            novel += not holds(&sets[2], token.number)
    out[0], out[1] = 1, log1p(<double>asked.count)
    out[2] = log1p(<double>said.count) - out[1]
    out[3], out[4] = <double>overlap / n, <double>covered / sets[0].count
    echo(said, &sets[1], &out[5])
    out[7], out[8], out[9] = <double>novel / max(numbers, 1), <double>names / n, other_script(asked, said)
    for i in range(asked.size):
        if asked.text[i] == 0x3F or asked.text[i] == 0xFF1F:
            out[10] = 1
            break
    out[11] = asked.tokens[0].capital
    question = question_of(asked)
    if question >= 1 and question <= 5:
        out[11 + question] = 1
    out[17], out[18] = (question == 2 or question == 4) and not numbers, question == 1 and not capitals


cdef int64_t power_above(int64_t n) noexcept nogil:
    cdef int64_t size = 16
    while size < 2 * n:
        size *= 2
    return size


cdef class Pair:
    """See `scoring_py.Pair`."""

    cdef Side asked, said

    def __cinit__(self, str prompt not None, str answer not None):
        read(prompt, &self.asked)
        read(answer, &self.said)

    def __dealloc__(self):
        release(&self.asked)
        release(&self.said)

    def features(self, const float[::1] logprobs=None, const float[::1] entropies=None, const float[::1] margins=None, int finish=0):
        out = np.zeros(len(FEATURES), np.float32)
        cdef float[::1] c_out = out
        cdef const float* given[3]
        cdef int64_t sizes[3], most, at, i, answer = power_above(self.said.count + 1), prompt = power_above(self.asked.count + 1)
        cdef double values[128]
        cdef Set sets[7]
        memset(values, 0, sizeof(values))
        sizes[0] = 0 if logprobs is None else logprobs.shape[0]
        sizes[1] = 0 if entropies is None else entropies.shape[0]
        sizes[2] = 0 if margins is None else margins.shape[0]
        given[0] = &logprobs[0] if sizes[0] else NULL
        given[1] = &entropies[0] if sizes[1] else NULL
        given[2] = &margins[0] if sizes[2] else NULL
        most = max(sizes[0], sizes[1], sizes[2])
        cdef uint64_t* slots = <uint64_t*>PyMem_Calloc(4 * answer + 3 * prompt + most, sizeof(uint64_t))
        if slots == NULL:
            raise MemoryError()
        with nogil:
            for i in range(7):
                at = i * answer if i < 4 else 4 * answer + (i - 4) * prompt
                sets[i].slots, sets[i].mask, sets[i].count = slots + at, (answer if i < 4 else prompt) - 1, 0
            decoder_features(given, sizes, <double*>(slots + 4 * answer + 3 * prompt), values)
            values[18], values[19], values[20] = finish != 0, finish == C_LENGTH, finish == C_TOOL_CALLS
            form_features(&self.said, &values[21], &values[33])
            repetition_features(&self.said, sets, &values[27])
            phrase_features(&self.said, &values[46])
            format_features(&self.said, &values[53])
            prompt_features(&self.asked, &self.said, &sets[0], &sets[4], &values[59])
            for i in range(c_out.shape[0]):
                c_out[i] = <float>values[i]
        PyMem_Free(slots)
        return out

    def bag(self, int bits):
        if not 1 <= bits <= 24:
            raise ValueError("bits must be in [1, 24]")
        cdef Bag bag
        cdef int64_t room = 2 * min(self.asked.count, MOST_GRAMS) + 6 * min(self.said.count, MOST_GRAMS) + 1
        places, values = np.empty(room, np.int32), np.empty(room, np.float32)
        cdef int32_t[::1] c_places = places
        cdef float[::1] c_values = values
        bag.places, bag.values, bag.weights, bag.count, bag.total, bag.mask = &c_places[0], &c_values[0], NULL, 0, 0, (1 << bits) - 1
        with nogil:
            fill(&bag, &self.asked, &self.said)
        return places[: bag.count].copy(), values[: bag.count].copy()

    def dot(self, const float[::1] weights):
        cdef Bag bag
        cdef int64_t size = weights.shape[0]
        if size < 2 or size & (size - 1) or size > 1 << 24:
            raise ValueError("weights must be float32[2^bits]")
        bag.places, bag.values, bag.weights, bag.count, bag.total, bag.mask = NULL, NULL, &weights[0], 0, 0, size - 1
        with nogil:
            fill(&bag, &self.asked, &self.said)
        return bag.total
