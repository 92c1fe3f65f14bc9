"""Features of texts, compiled. `text_features_py` says in plain Python what they are."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.math cimport log, log1p, sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset

import numpy as np

from native.text_features_py import BITS_LEAST, BITS_MOST, FORMS
from native.text_features_py import MAX_BYTES as _MAX_BYTES

cdef enum:
    SPACE, DIGIT, UPPER, LOWER, BEYOND, SIGN
    SINGLE = 1
    PAIRED = 2
    WIDTH = 26
    NEGATIONS = 10

assert len(FORMS) == WIDTH

cdef uint64_t OFFSET = 0xCBF29CE484222325
cdef uint64_t PRIME = 0x100000001B3
cdef uint64_t PAIR = 0x9E3779B97F4A7C15
cdef uint64_t RUN = 0xD1B54A32D192ED03
cdef int64_t MAX_BYTES = _MAX_BYTES

ctypedef struct Slot:
    int32_t column  # -1: empty
    int32_t count
    int32_t marks

ctypedef struct Table:
    # Open addressing with linear probing; `order` holds the places of the filled slots, the first filled first.
    Slot* slots
    int32_t* order
    int64_t room, filled, mask

ctypedef struct Rows:
    int32_t* indices
    float* values
    int64_t count, room

ctypedef struct Form:
    int64_t kinds[6]
    int64_t lines, sentences, questions, mathematics, code, backslashes, quotes, blanks
    int64_t tokens, words, word_bytes, long_words, numbers, shouted, negations, singles, pairs
    int64_t options, numeric, option_bytes, option_least, option_most

cdef uint8_t KIND[256]
cdef uint8_t FOLD[256]
cdef uint8_t IS_MATHEMATICS[256]
cdef uint8_t IS_CODE[256]
cdef uint64_t NEGATION[NEGATIONS]


cdef uint64_t hashed(const uint8_t* token, int64_t length) noexcept nogil:
    cdef uint64_t h = OFFSET
    cdef int64_t i
    for i in range(length):
        h = (h ^ FOLD[token[i]]) * PRIME
    return h


cdef void fill_tables():
    cdef int byte
    from native import text_features_py as twin
    for byte in range(256):
        KIND[byte], FOLD[byte] = twin._kind(byte), twin._fold(byte)
        IS_MATHEMATICS[byte], IS_CODE[byte] = byte in twin._MATHEMATICS, byte in twin._CODE
    for byte, word in enumerate(sorted(twin._NEGATIONS)):
        NEGATION[byte] = hashed(<const uint8_t*>PyBytes_AS_STRING(word), len(word))


fill_tables()


cdef inline uint64_t mixed(uint64_t h) noexcept nogil:
    h = (h ^ (h >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    h = (h ^ (h >> 27)) * <uint64_t>0x94D049BB133111EB
    return h ^ (h >> 31)


cdef int make_room(Table* table, int64_t adds, int bits) noexcept nogil:
    """An empty table for `adds` additions; -1 where memory is short."""
    cdef int64_t most = adds if adds < (<int64_t>2 << bits) else (<int64_t>2 << bits)
    cdef int64_t room = 64
    while room < 2 * most:
        room *= 2
    if room > table.room:
        free(table.slots)
        free(table.order)
        table.room = 0
        table.slots = <Slot*>malloc(room * sizeof(Slot))
        table.order = <int32_t*>malloc(room * sizeof(int32_t))
        if table.slots == NULL or table.order == NULL:
            return -1
        table.room = room
    table.mask, table.filled = room - 1, 0
    memset(table.slots, 0xFF, room * sizeof(Slot))
    return 0


cdef inline Slot* add(Table* table, uint64_t key, int bits, int32_t first) noexcept nogil:
    cdef uint64_t h = mixed(key)
    cdef int32_t column = first + <int32_t>(h & ((<uint64_t>1 << bits) - 1))
    cdef int64_t place = (column * <uint64_t>2654435761) & table.mask
    while table.slots[place].column != column:
        if table.slots[place].column < 0:
            table.slots[place].column, table.slots[place].count, table.slots[place].marks = column, 0, 0
            table.order[table.filled] = <int32_t>place
            table.filled += 1
            break
        place = (place + 1) & table.mask
    table.slots[place].count += 1 if h >> 63 else -1
    return &table.slots[place]


cdef inline void end_word(Form* form, const uint8_t* word, int64_t length, uint64_t h) noexcept nogil:
    cdef int64_t digits = 0, upper = 0, i
    for i in range(length):
        digits += KIND[word[i]] == DIGIT
        upper += KIND[word[i]] == UPPER
    form.words += 1
    form.word_bytes += length
    form.long_words += length >= 8
    form.numbers += digits == length
    form.shouted += length >= 2 and upper == length
    for i in range(NEGATIONS):
        form.negations += h == NEGATION[i]


cdef inline void end_line(Form* form, const uint8_t* line, int64_t length) noexcept nogil:
    cdef uint8_t first
    if length < 3 or line[2] != 32 or not (line[1] == 46 or line[1] == 41):
        return
    first = line[0] | 32
    if KIND[line[0]] != UPPER and KIND[line[0]] != LOWER or first > 106:
        return
    length -= 3
    form.option_least = length if form.options == 0 or length < form.option_least else form.option_least
    form.option_most = length if length > form.option_most else form.option_most
    form.options += 1
    form.option_bytes += length
    if length > 0:
        form.numeric += KIND[line[3]] == DIGIT or line[3] == 45 or line[3] == 36 or line[3] == 43


cdef void read(const uint8_t* data, int64_t length, int bits, Table* words, Table* runs, Form* form) noexcept nogil:
    """One pass over a text's bytes: both tables and the counts behind the form features."""
    cdef uint64_t before = 0, h = OFFSET, token
    cdef uint32_t window = 32
    cdef int64_t i, start = -1, line = 0, held = 1, blanks = -1
    cdef uint8_t byte, kind, folded, last = 32
    cdef Slot* slot
    cdef int ends
    for i in range(length + 1):
        byte = data[i] if i < length else 32
        kind, folded = KIND[byte], FOLD[byte]
        if i < length:
            form.kinds[kind] += 1
            form.questions += byte == 63
            form.mathematics += IS_MATHEMATICS[byte]
            form.code += IS_CODE[byte]
            form.backslashes += byte == 92
            form.quotes += byte == 34
            form.sentences += (byte == 46 or byte == 33 or byte == 63) and (i + 1 == length or KIND[data[i + 1]] == SPACE)
            if byte == 95 and i > 0 and data[i - 1] == 95 and blanks != i - 1:
                form.blanks += 1
                blanks = i
        if byte == 10 and i < length or i == length:
            form.lines += i < length
            end_line(form, data + line, i - line)
            line = i + 1
        if not (folded == 32 and last == 32):
            window, held, last = (window << 8) | folded, held + 1, folded
            if held >= 4:
                add(runs, window * RUN, bits, 1 << bits)
        ends = kind == SPACE or kind == SIGN
        if not ends:
            if start < 0:
                start, h = i, OFFSET
            h = (h ^ folded) * PRIME
            continue
        # What ends here: the word before this byte, then the byte itself where it is a sign.
        while start >= 0 or kind == SIGN:
            if start >= 0:
                token = h
                end_word(form, data + start, i - start, h)
                start = -1
            else:
                token = (OFFSET ^ folded) * PRIME
                kind = SPACE
            form.tokens += 1
            slot = add(words, token, bits, 0)
            form.singles += not (slot.marks & SINGLE)
            slot.marks |= SINGLE
            if before:
                slot = add(words, before * PAIR + token, bits, 0)
                form.pairs += not (slot.marks & PAIRED)
                slot.marks |= PAIRED
            before = token


cdef inline double ratio(int64_t part, int64_t whole) noexcept nogil:
    return <double>part / <double>(whole if whole > 1 else 1)


cdef void write_forms(const Form* form, int64_t length, float* out) noexcept nogil:
    out[0] = <float>log1p(<double>length)
    out[1] = <float>log1p(<double>form.words)
    out[2] = <float>log1p(<double>form.lines)
    out[3] = <float>log1p(<double>form.sentences)
    out[4] = <float>ratio(form.kinds[DIGIT], length)
    out[5] = <float>ratio(form.kinds[UPPER], form.kinds[UPPER] + form.kinds[LOWER])
    out[6] = <float>ratio(form.kinds[SIGN], length)
    out[7] = <float>ratio(form.kinds[BEYOND], length)
    out[8] = <float>ratio(form.kinds[SPACE], length)
    out[9] = <float>(ratio(form.word_bytes, form.words) / 10)
    out[10] = <float>ratio(form.long_words, form.words)
    out[11] = <float>ratio(form.singles, form.tokens)
    out[12] = <float>ratio(form.pairs, form.tokens - 1)
    out[13] = <float>log1p(<double>form.questions)
    out[14] = <float>ratio(form.numbers, form.words)
    out[15] = <float>ratio(form.mathematics, length)
    out[16] = <float>log1p(<double>form.code)
    out[17] = <float>log1p(<double>form.backslashes)
    out[18] = <float>((<double>form.options if form.options < 10 else 10.0) / 10)
    out[19] = <float>log1p(<double>form.option_bytes / <double>form.options) if form.options else 0
    out[20] = <float>log(<double>(1 + form.option_most) / <double>(1 + form.option_least)) if form.options else 0
    out[21] = <float>ratio(form.numeric, form.options)
    out[22] = <float>log1p(<double>form.negations)
    out[23] = <float>ratio(form.shouted, form.words)
    out[24] = <float>log1p(<double>form.quotes)
    out[25] = <float>log1p(<double>form.blanks)


cdef int write_block(const Table* table, Rows* rows) noexcept nogil:
    """Appends a table's columns, as a vector of length 1; -1 where memory is short."""
    cdef int64_t total = 0, i, room
    cdef int32_t count
    cdef void* grown
    for i in range(table.filled):
        count = table.slots[table.order[i]].count
        total += count if count > 0 else -count
    if rows.count + table.filled > rows.room:
        room = 2 * rows.room + table.filled
        grown = realloc(rows.indices, room * sizeof(int32_t))
        if grown == NULL:
            return -1
        rows.indices = <int32_t*>grown
        grown = realloc(rows.values, room * sizeof(float))
        if grown == NULL:
            return -1
        rows.values = <float*>grown
        rows.room = room
    for i in range(table.filled):
        count = table.slots[table.order[i]].count
        if count:
            rows.indices[rows.count] = table.slots[table.order[i]].column
            rows.values[rows.count] = <float>(sqrt(<double>count / total) if count > 0 else -sqrt(<double>-count / total))
            rows.count += 1
    return 0


cdef int run(const uint8_t** data, const int64_t* lengths, int64_t n, int bits, Rows* rows, int64_t* indptr, float* forms) noexcept nogil:
    """All texts; -1 where memory is short."""
    cdef Table words, runs
    cdef Form form
    cdef int64_t i
    cdef int failed = 0
    memset(&words, 0, sizeof(words))
    memset(&runs, 0, sizeof(runs))
    for i in range(n):
        if lengths[i]:
            if make_room(&words, 2 * lengths[i], bits) or make_room(&runs, lengths[i] + 1, bits):
                failed = -1
                break
            memset(&form, 0, sizeof(form))
            read(data[i], lengths[i], bits, &words, &runs, &form)
            write_forms(&form, lengths[i], forms + i * WIDTH)
            if write_block(&words, rows) or write_block(&runs, rows):
                failed = -1
                break
        indptr[i + 1] = rows.count
    free(words.slots)
    free(words.order)
    free(runs.slots)
    free(runs.order)
    return failed


def extract(texts, int bits):
    """See `text_features_py.extract`."""
    if not BITS_LEAST <= bits <= BITS_MOST:
        raise ValueError(f"bits must be in [{BITS_LEAST}, {BITS_MOST}]")
    cdef int64_t n = len(texts), i, size
    cdef list held = []
    cdef Rows rows
    cdef int failed
    cdef const uint8_t** data = <const uint8_t**>malloc((n + 1) * sizeof(uint8_t*))
    cdef int64_t* lengths = <int64_t*>malloc((n + 1) * sizeof(int64_t))
    memset(&rows, 0, sizeof(rows))
    try:
        if data == NULL or lengths == NULL:
            raise MemoryError()
        for i in range(n):
            text = texts[i]
            if not isinstance(text, str):
                raise TypeError(f"texts must be str, got {type(text).__name__}")
            # A character has at least one byte: what is cut here would not be read.
            held.append(text[:_MAX_BYTES].encode("utf-8", "surrogatepass"))
            data[i] = <const uint8_t*>PyBytes_AS_STRING(held[i])
            size = PyBytes_GET_SIZE(held[i])
            lengths[i] = size if size < MAX_BYTES else MAX_BYTES
        indptr, forms = np.zeros(n + 1, np.int64), np.zeros((n, WIDTH), np.float32)
        failed = work(data, lengths, n, bits, &rows, indptr, forms)
        if failed:
            raise MemoryError()
        indices, values = np.empty(rows.count, np.int32), np.empty(rows.count, np.float32)
        copy(&rows, indices, values)
        return indptr, indices, values, forms
    finally:
        free(data)
        free(lengths)
        free(rows.indices)
        free(rows.values)


cdef int work(const uint8_t** data, const int64_t* lengths, int64_t n, int bits, Rows* rows, int64_t[::1] indptr, float[:, ::1] forms) except -2:
    cdef int failed = 0
    if n:
        with nogil:
            failed = run(data, lengths, n, bits, rows, &indptr[0], &forms[0, 0])
    return failed


cdef int copy(const Rows* rows, int32_t[::1] indices, float[::1] values) except -1:
    if rows.count:
        memcpy(&indices[0], rows.indices, rows.count * sizeof(int32_t))
        memcpy(&values[0], rows.values, rows.count * sizeof(float))
    return 0
