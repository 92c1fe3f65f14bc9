"""What the scorer's modules share: a text's characters and words, hashes, sets of hashes, bags of n-grams."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef enum:
    OTHER = 0
    SPACE = 1
    PUNCTUATION = 2
    DIGIT = 3
    LETTER = 4
    UPPER = 5
    IDEOGRAPH = 6
    MOST_GRAMS = 2048
    CATEGORIES = 6

cdef struct Token:
    uint64_t hash
    uint64_t number
    uint64_t shape
    int32_t start
    int32_t end
    int32_t line
    uint8_t capital
    uint8_t first

cdef struct Side:
    uint32_t* text
    uint8_t* kinds
    Token* tokens
    int64_t size
    int64_t count
    int64_t scripts[16]  # letters of each; [0] counts the rest

cdef struct Set:  # of hashes; 0 stands for an empty place
    uint64_t* slots
    uint64_t mask
    int64_t count

cdef struct Bag:  # where a gram goes: into lists of places and values, or times weights into a sum
    int32_t* places
    float* values
    const float* weights
    int64_t count
    double total
    uint64_t mask

cdef inline bint apostrophe(uint32_t c) noexcept nogil:
    return c == 0x27 or c == 0x2019


cdef inline bint terminator(uint32_t c) noexcept nogil:
    return c == 0x2E or c == 0x21 or c == 0x3F or c == 0x3002 or c == 0xFF01 or c == 0xFF1F or c == 0x2026


cdef inline uint64_t mix(uint64_t a, uint64_t b) noexcept nogil:
    cdef uint64_t mixed = ((a * 0x9E3779B97F4A7C15ULL) ^ (b + 0xC2B2AE3D27D4EB4FULL)) * 0x9E3779B97F4A7C15ULL
    return mixed ^ (mixed >> 29)


cdef inline bint added(Set* known, uint64_t value) noexcept nogil:
    """True where the value was not there."""
    if value == 0:
        value = 1
    cdef uint64_t at = (value ^ (value >> 32)) & known.mask
    while known.slots[at] != 0:
        if known.slots[at] == value:
            return False
        at = (at + 1) & known.mask
    known.slots[at] = value
    known.count += 1
    return True


cdef inline bint holds(const Set* known, uint64_t value) noexcept nogil:
    if value == 0:
        value = 1
    cdef uint64_t at = (value ^ (value >> 32)) & known.mask
    while known.slots[at] != 0:
        if known.slots[at] == value:
            return True
        at = (at + 1) & known.mask
    return False


cdef int read(str given, Side* side) except -1
cdef void release(Side* side) noexcept
cdef int script_of(uint32_t c) noexcept nogil
cdef int question_of(const Side* asked) noexcept nogil
cdef int opening_of(const Side* said) noexcept nogil
cdef void phrase_features(const Side* said, double* out) noexcept nogil
cdef void fill(Bag* bag, const Side* asked, const Side* said) noexcept nogil
