from libc.stdint cimport int64_t, uint32_t

cdef bint is_json(const uint32_t* text, int64_t begin, int64_t end) noexcept nogil
