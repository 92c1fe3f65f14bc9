# distutils: libraries = dl
"""Tokens drawn from logits, compiled. `sampling_py` says in NumPy what each function must do; the rows' work is in the kernel library."""

from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Malloc, PyMem_Realloc
from libc.math cimport isfinite
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

import os

import numpy as np

cdef extern from "dlfcn.h" nogil:
    void* dlopen(const char*, int)
    void* dlsym(void*, const char*)
    char* dlerror()
    int RTLD_NOW
    int RTLD_LOCAL

cdef extern from "kernels/sampling.h" nogil:
    enum:
        US_TOP_MOST
    ctypedef struct us_sampler:
        float temperature, top_p, min_p, repetition, presence, frequency
        int32_t top_k, seen, biases
        const int32_t* seen_ids
        const int32_t* seen_counts
        const int32_t* bias_ids
        const float* bias
        uint64_t seed, position
        uint32_t index
        int32_t top
    ctypedef struct us_sample_job:
        const float* logits
        const int32_t* logit_rows
        const uint32_t* masks
        const us_sampler** samplers
        int64_t rows, vocabulary, mask_words
        int32_t* tokens
        float* logprob
        float* entropy
        float* margin
        int32_t* top_ids
        float* top_logprobs
        int32_t top_width
        void* scratch
        int32_t workers

ctypedef const char* (*sample_t)(const us_sample_job*) noexcept nogil
ctypedef int64_t (*scratch_t)(int64_t) noexcept nogil

TOP_MOST = US_TOP_MOST

cdef sample_t kernel_sample = NULL
cdef scratch_t kernel_scratch = NULL


cdef int load() except -1:
    """Finds the functions of the kernel library, once."""
    global kernel_sample, kernel_scratch
    if kernel_sample != NULL:
        return 0
    path = os.path.join(os.path.dirname(__file__), "kernels", "libunderstudy_kernels.so")
    encoded = os.fsencode(path)
    cdef void* library = dlopen(encoded, RTLD_NOW | RTLD_LOCAL)
    if library == NULL:
        raise ImportError(f"the kernel library {path} cannot be loaded ({dlerror().decode()}); run `make setup`")
    kernel_scratch = <scratch_t>dlsym(library, "us_sample_scratch")
    cdef sample_t found = <sample_t>dlsym(library, "us_sample")
    if found == NULL or kernel_scratch == NULL:
        raise ImportError(f"the kernel library {path} is older than this module; run `make setup`")
    kernel_sample = found
    return 0


cdef void* copied(const void* data, size_t size) except? NULL:
    cdef void* block = PyMem_Malloc(size if size else 1)
    if block == NULL:
        raise MemoryError()
    if size:
        memcpy(block, data, size)
    return block


cdef class RowState:
    """See `sampling_py.RowState`."""

    cdef us_sampler sampler
    cdef int32_t* seen_ids
    cdef int32_t* seen_counts
    cdef int32_t room  # of the seen arrays
    cdef int32_t* bias_ids
    cdef float* bias
    cdef bint counted
    cdef dict slots  # token -> its place in the seen arrays
    cdef readonly int64_t vocabulary

    def __init__(self, sampling, prompt, int64_t vocabulary, int64_t index=0):
        if not (0 < vocabulary < 2**30 and 0 <= index < 2**32):
            raise ValueError("vocabulary must be in [1, 2^30), index in [0, 2^32)")
        cdef us_sampler* s = &self.sampler
        self.vocabulary = vocabulary
        s.index = <uint32_t>index
        s.temperature, s.top_p, s.min_p = sampling.temperature, sampling.top_p, sampling.min_p
        s.repetition, s.presence, s.frequency = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        s.top_k = min(sampling.top_k, <int64_t>2**31 - 1)
        s.top = sampling.top_logprobs
        if not (isfinite(s.temperature) and isfinite(s.top_p) and isfinite(s.min_p) and isfinite(s.repetition)
                and isfinite(s.presence) and isfinite(s.frequency) and s.temperature >= 0 and s.repetition > 0 and s.top_k >= 0):
            raise ValueError("temperature, penalties, top_k and biases must be finite and in their ranges")
        seed = sampling.seed
        s.seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed % 2**64
        self.counted = s.repetition != 1 or s.presence != 0 or s.frequency != 0
        self.slots = {}
        self.set_bias(sampling.logit_bias)
        if not 0 <= s.top <= US_TOP_MOST:
            raise ValueError(f"top_logprobs must be in [0, {US_TOP_MOST}], biased tokens in the vocabulary")
        if s.repetition != 1:
            for token in np.unique(np.asarray(prompt, np.int64)).tolist():
                if 0 <= token < vocabulary:
                    self.slot(token)

    def __dealloc__(self):
        PyMem_Free(self.seen_ids)
        PyMem_Free(self.seen_counts)
        PyMem_Free(self.bias_ids)
        PyMem_Free(self.bias)

    cdef int set_bias(self, bias) except -1:
        if not bias or self.bias_ids != NULL:
            return 0
        cdef int32_t i = 0
        cdef int64_t token
        self.bias_ids = <int32_t*>PyMem_Calloc(len(bias), sizeof(int32_t))
        self.bias = <float*>PyMem_Calloc(len(bias), sizeof(float))
        if self.bias_ids == NULL or self.bias == NULL:
            raise MemoryError()
        for token, value in bias.items():
            if not 0 <= token < self.vocabulary:
                raise ValueError(f"top_logprobs must be in [0, {US_TOP_MOST}], biased tokens in the vocabulary")
            self.bias_ids[i], self.bias[i] = <int32_t>token, value
            if not isfinite(self.bias[i]):
                raise ValueError("temperature, penalties, top_k and biases must be finite and in their ranges")
            i += 1
        self.sampler.bias_ids, self.sampler.bias, self.sampler.biases = self.bias_ids, self.bias, i
        return 0

    cdef int grow(self) except -1:
        cdef int32_t room = max(64, 2 * self.room)
        cdef void* ids = PyMem_Realloc(self.seen_ids, room * sizeof(int32_t))
        if ids == NULL:
            raise MemoryError()
        self.seen_ids = <int32_t*>ids
        cdef void* counts = PyMem_Realloc(self.seen_counts, room * sizeof(int32_t))
        if counts == NULL:
            raise MemoryError()
        self.seen_counts = <int32_t*>counts
        self.room = room
        self.sampler.seen_ids, self.sampler.seen_counts = self.seen_ids, self.seen_counts
        return 0

    cdef int32_t slot(self, int64_t token) except -1:
        """The token's place in the seen arrays, which it gets with count 0 where it has none."""
        place = self.slots.get(token)
        if place is not None:
            return place
        cdef int32_t new = self.sampler.seen
        if new == self.room:
            self.grow()
        self.seen_ids[new], self.seen_counts[new] = <int32_t>token, 0
        self.slots[token] = new
        self.sampler.seen = new + 1
        return new

    @property
    def index(self):
        return self.sampler.index

    @property
    def position(self):
        return self.sampler.position

    @property
    def seed(self):
        return self.sampler.seed

    def commit(self, int64_t token):
        cdef int32_t place
        self.sampler.position += 1
        if self.counted and 0 <= token < self.vocabulary:
            place = self.slot(token)
            self.seen_counts[place] += 1

    def fork(self, int64_t index):
        cdef RowState other = RowState.__new__(RowState)
        cdef size_t seen = self.sampler.seen * sizeof(int32_t), biases = self.sampler.biases
        other.sampler = self.sampler
        other.sampler.index = <uint32_t>index
        other.vocabulary, other.counted, other.slots = self.vocabulary, self.counted, dict(self.slots)
        other.seen_ids = <int32_t*>copied(self.seen_ids, seen)
        other.seen_counts = <int32_t*>copied(self.seen_counts, seen)
        other.room = self.sampler.seen
        other.bias_ids = <int32_t*>copied(self.bias_ids, biases * sizeof(int32_t))
        other.bias = <float*>copied(self.bias, biases * sizeof(float))
        other.sampler.seen_ids, other.sampler.seen_counts = other.seen_ids, other.seen_counts
        other.sampler.bias_ids, other.sampler.bias = other.bias_ids, other.bias
        return other


cdef class SampleBuffers:
    """See `sampling_py.SampleBuffers`."""

    cdef readonly object tokens, logprob, entropy, margin, top_ids, top_logprobs
    cdef readonly int32_t threads
    cdef int32_t capacity, top
    cdef int32_t[::1] c_tokens
    cdef float[::1] c_logprob, c_entropy, c_margin
    cdef int32_t[:, ::1] c_top_ids
    cdef float[:, ::1] c_top_logprobs
    cdef const us_sampler** samplers
    cdef void* block
    cdef void* scratch
    cdef int64_t scratch_size

    def __init__(self, int32_t rows, int32_t top=US_TOP_MOST, int32_t threads=1):
        if rows < 1 or not 0 <= top <= US_TOP_MOST or threads < 1:
            raise ValueError(f"rows and threads must be positive, top in [0, {US_TOP_MOST}]")
        if self.samplers != NULL:
            raise ValueError("buffers are made once")
        self.capacity, self.top, self.threads = rows, top, threads
        self.tokens = np.full(rows, -1, np.int32)
        self.logprob, self.entropy, self.margin = (np.zeros(rows, np.float32) for _ in range(3))
        self.top_ids, self.top_logprobs = np.full((rows, top), -1, np.int32), np.full((rows, top), -np.inf, np.float32)
        self.c_tokens, self.c_logprob, self.c_entropy, self.c_margin = self.tokens, self.logprob, self.entropy, self.margin
        if top:
            self.c_top_ids, self.c_top_logprobs = self.top_ids, self.top_logprobs
        self.samplers = <const us_sampler**>PyMem_Calloc(rows, sizeof(us_sampler*))
        if self.samplers == NULL:
            raise MemoryError()

    def __dealloc__(self):
        PyMem_Free(self.samplers)
        PyMem_Free(self.block)

    cdef int make_room(self, int64_t size) except -1:
        if size <= self.scratch_size:
            return 0
        PyMem_Free(self.block)
        self.scratch_size = 0
        self.block = PyMem_Malloc(size + 64)
        if self.block == NULL:
            raise MemoryError()
        self.scratch = <void*>((<uintptr_t>self.block + 63) & ~<uintptr_t>63)
        self.scratch_size = size
        return 0


def sample(const float[:, ::1] logits, list states, const uint32_t[:, ::1] masks, SampleBuffers out, const int32_t[::1] rows=None):
    """See `sampling_py.sample`."""
    cdef us_sample_job job
    cdef Py_ssize_t count = len(states), i
    cdef RowState state
    cdef const char* wrong
    load()
    if count > out.capacity:
        raise ValueError(f"{count} states, but the buffers have {out.capacity} rows")
    if count == 0:
        return
    job.vocabulary = logits.shape[1]
    for i in range(count):
        state = <RowState?>states[i]
        if state.vocabulary != job.vocabulary:
            raise ValueError(f"the logits have {logits.shape[1]} columns, which is not every state's vocabulary")
        out.samplers[i] = &state.sampler
    job.logit_rows = NULL
    if rows is None:
        if count > logits.shape[0]:
            raise ValueError(f"{count} states, but {logits.shape[0]} rows of logits")
    else:
        if rows.shape[0] < count:
            raise ValueError("rows must be int32, one for each state")
        for i in range(count):
            if not 0 <= rows[i] < logits.shape[0]:
                raise ValueError("rows must name rows of logits")
        job.logit_rows = &rows[0]
    job.masks, job.mask_words = NULL, 0
    if masks is not None:
        if masks.shape[0] < count or masks.shape[1] * 32 < job.vocabulary:
            raise ValueError("masks must be uint32 [states, ceil(vocabulary / 32)], C-contiguous")
        job.masks, job.mask_words = &masks[0, 0], masks.shape[1]
    job.workers = <int32_t>min(<Py_ssize_t>out.threads, count)
    out.make_room(kernel_scratch(job.vocabulary) * job.workers)
    job.logits, job.samplers, job.rows = &logits[0, 0], out.samplers, count
    job.tokens, job.logprob, job.entropy, job.margin = &out.c_tokens[0], &out.c_logprob[0], &out.c_entropy[0], &out.c_margin[0]
    job.top_width = out.top
    job.top_ids = &out.c_top_ids[0, 0] if out.top else NULL
    job.top_logprobs = &out.c_top_logprobs[0, 0] if out.top else NULL
    job.scratch = out.scratch
    with nogil:
        wrong = kernel_sample(&job)
    if wrong != NULL:
        raise RuntimeError((<bytes>wrong).decode())
