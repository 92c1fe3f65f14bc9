"""Whether characters are one JSON value; compiled twin of `native.json_text`, documented there. No Python API of its own."""

from libc.stdint cimport int64_t, uint8_t, uint32_t

cdef enum:
    DEEPEST = 256


cdef inline int64_t blank(const uint32_t* text, int64_t i, int64_t end) noexcept nogil:
    while i < end and (text[i] == 0x20 or text[i] == 0x09 or text[i] == 0x0A or text[i] == 0x0D):
        i += 1
    return i


cdef inline bint hexadecimal(uint32_t c) noexcept nogil:
    return 0x30 <= c <= 0x39 or 0x41 <= c <= 0x46 or 0x61 <= c <= 0x66


cdef int64_t string(const uint32_t* text, int64_t i, int64_t end) noexcept nogil:
    """Past the string that starts at i, or -1."""
    cdef uint32_t c
    i += 1
    while i < end:
        c = text[i]
        if c == 0x22:
            return i + 1
        if c < 0x20:
            return -1
        if c == 0x5C:
            i += 1
            if i >= end:
                return -1
            c = text[i]
            if c == 0x75:
                if i + 4 >= end:
                    return -1
                if not (hexadecimal(text[i + 1]) and hexadecimal(text[i + 2]) and hexadecimal(text[i + 3]) and hexadecimal(text[i + 4])):
                    return -1
                i += 4
            elif not (c == 0x22 or c == 0x5C or c == 0x2F or c == 0x62 or c == 0x66 or c == 0x6E or c == 0x72 or c == 0x74):
                return -1
        i += 1
    return -1


cdef int64_t key(const uint32_t* text, int64_t i, int64_t end) noexcept nogil:
    i = blank(text, i, end)
    if i >= end or text[i] != 0x22:
        return -1
    i = string(text, i, end)
    if i < 0:
        return -1
    i = blank(text, i, end)
    return i + 1 if i < end and text[i] == 0x3A else -1


cdef inline int64_t digits(const uint32_t* text, int64_t i, int64_t end) noexcept nogil:
    while i < end and 0x30 <= text[i] <= 0x39:
        i += 1
    return i


cdef bint starts(const uint32_t* text, int64_t i, int64_t end, const char* literal) noexcept nogil:
    cdef int64_t k = 0
    while literal[k] != 0:
        if i + k >= end or text[i + k] != <uint8_t>literal[k]:
            return False
        k += 1
    return True


cdef int64_t scalar(const uint32_t* text, int64_t i, int64_t end) noexcept nogil:
    cdef int64_t start, more
    if starts(text, i, end, b"true") or starts(text, i, end, b"null"):
        return i + 4
    if starts(text, i, end, b"false"):
        return i + 5
    if i < end and text[i] == 0x2D:
        i += 1
    start = i
    i = digits(text, i, end)
    if i == start or (text[start] == 0x30 and i > start + 1):
        return -1
    if i < end and text[i] == 0x2E:
        more = digits(text, i + 1, end)
        if more == i + 1:
            return -1
        i = more
    if i < end and (text[i] == 0x65 or text[i] == 0x45):
        i += 1
        if i < end and (text[i] == 0x2B or text[i] == 0x2D):
            i += 1
        more = digits(text, i, end)
        if more == i:
            return -1
        i = more
    return i


cdef bint is_json(const uint32_t* text, int64_t begin, int64_t end) noexcept nogil:
    cdef uint8_t stack[DEEPEST]
    cdef int64_t i = begin, depth = 0
    cdef bint after = False
    cdef uint32_t c
    while True:
        i = blank(text, i, end)
        if i >= end:
            return after and depth == 0
        c = text[i]
        if after:
            if depth == 0:
                return False
            if c == (<uint32_t>0x7D if stack[depth - 1] else <uint32_t>0x5D):
                depth -= 1
                i += 1
                continue
            if c != 0x2C:
                return False
            i = key(text, i + 1, end) if stack[depth - 1] else i + 1
            after = False
        elif c == 0x7B or c == 0x5B:
            if depth == DEEPEST:
                return False
            stack[depth] = c == 0x7B
            depth += 1
            i = blank(text, i + 1, end)
            if i < end and text[i] == c + 2:
                depth -= 1
                i += 1
                after = True
            elif c == 0x7B:
                i = key(text, i, end)
        else:
            i = string(text, i, end) if c == 0x22 else scalar(text, i, end)
            after = True
        if i < 0:
            return False
