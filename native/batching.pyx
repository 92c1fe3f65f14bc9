"""Queue, packing, pooling and row functions of the batching engine, compiled. `batching_py` says in plain Python what each must do."""

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.math cimport exp, sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.string cimport memcpy, memset

MEAN, CLS, LAST, NONE = 0, 1, 2, 3
PRIORITIES, LOOKAHEAD, WINDOW = 4, 64, 256

cdef enum:
    C_MEAN = 0
    C_CLS = 1
    C_LAST = 2
    C_NONE = 3
    C_PRIORITIES = 4
    C_LOOKAHEAD = 64
    C_WINDOW = 256
    SLOT_BITS = 24
    NIL = -1

cdef struct Entry:
    int64_t arrival_ns
    int64_t deadline_ns  # 0: none
    uint32_t generation  # counts the slot's uses, so that a stale ticket finds nothing
    int32_t tokens
    int32_t prev  # in its line; NIL at the ends
    int32_t next  # in its line, or in the list of free slots
    uint8_t priority
    uint8_t waiting

cdef struct Queue:
    Entry* entries
    int32_t heads[C_PRIORITIES]
    int32_t tails[C_PRIORITIES]
    int32_t free
    int32_t padded
    int64_t ageing_ns
    int64_t sequences
    int64_t tokens
    int64_t line_tokens[C_PRIORITIES]
    int64_t next_deadline_ns  # no waiting entry's deadline is earlier; 0: none has one

cdef struct Cursor:  # walks the lines as one, in order of effective priority, arrival, priority
    int32_t at[C_PRIORITIES]
    int64_t now_ns


cdef void queue_unlink(Queue* queue, int32_t slot) noexcept nogil:
    cdef Entry* entry = &queue.entries[slot]
    if entry.prev == NIL:
        queue.heads[entry.priority] = entry.next
    else:
        queue.entries[entry.prev].next = entry.next
    if entry.next == NIL:
        queue.tails[entry.priority] = entry.prev
    else:
        queue.entries[entry.next].prev = entry.prev
    entry.waiting = 0
    queue.sequences -= 1
    queue.tokens -= entry.tokens
    queue.line_tokens[entry.priority] -= entry.tokens
    entry.next = queue.free
    queue.free = slot


cdef int32_t queue_link(Queue* queue, int32_t tokens, int32_t priority, int64_t deadline_ns, int64_t arrival_ns) noexcept nogil:
    cdef int32_t slot = queue.free
    cdef Entry* entry = &queue.entries[slot]
    queue.free = entry.next
    entry.arrival_ns = arrival_ns
    entry.deadline_ns = deadline_ns
    entry.generation += 1
    entry.tokens = tokens
    entry.priority = <uint8_t>priority
    entry.waiting = 1
    entry.next = NIL
    entry.prev = queue.tails[priority]
    if entry.prev == NIL:
        queue.heads[priority] = slot
    else:
        queue.entries[entry.prev].next = slot
    queue.tails[priority] = slot
    queue.sequences += 1
    queue.tokens += tokens
    queue.line_tokens[priority] += tokens
    if deadline_ns > 0 and (queue.next_deadline_ns == 0 or deadline_ns < queue.next_deadline_ns):
        queue.next_deadline_ns = deadline_ns
    return slot


cdef int32_t queue_expire(Queue* queue, int64_t now_ns, int32_t* out) noexcept nogil:
    cdef int32_t count = 0, slot, following
    cdef int64_t earliest = 0, deadline
    cdef int priority
    if queue.next_deadline_ns == 0 or now_ns < queue.next_deadline_ns:
        return 0
    for priority in range(C_PRIORITIES):
        slot = queue.heads[priority]
        while slot != NIL:
            following = queue.entries[slot].next
            deadline = queue.entries[slot].deadline_ns
            if deadline > 0:
                if deadline <= now_ns:
                    queue_unlink(queue, slot)
                    out[count] = slot
                    count += 1
                elif earliest == 0 or deadline < earliest:
                    earliest = deadline
            slot = following
    queue.next_deadline_ns = earliest
    return count


cdef int64_t effective(const Queue* queue, int32_t slot, int64_t now_ns) noexcept nogil:
    cdef const Entry* entry = &queue.entries[slot]
    cdef int64_t waited = now_ns - entry.arrival_ns
    cdef int64_t level = entry.priority
    if waited > 0:
        level -= waited // queue.ageing_ns
    return level if level > 0 else 0


cdef int32_t cursor_next(Cursor* cursor, const Queue* queue, int64_t* level) noexcept nogil:
    cdef int32_t best = NIL
    cdef int64_t best_level = 0, this_level
    cdef int priority, line = 0
    for priority in range(C_PRIORITIES):
        if cursor.at[priority] == NIL:
            continue
        this_level = effective(queue, cursor.at[priority], cursor.now_ns)
        if (
            best == NIL
            or this_level < best_level
            or (this_level == best_level and queue.entries[cursor.at[priority]].arrival_ns < queue.entries[best].arrival_ns)
        ):
            best = cursor.at[priority]
            best_level = this_level
            line = priority
    if best != NIL:
        cursor.at[line] = queue.entries[best].next
        level[0] = best_level
    return best


cdef int32_t choose_packed(Queue* queue, int64_t now_ns, int64_t budget, int32_t limit, int32_t* out) noexcept nogil:
    cdef Cursor cursor
    cdef int64_t level = 0, total = 0
    cdef int32_t count = 0, stepped_over = 0, slot
    memcpy(cursor.at, queue.heads, sizeof(cursor.at))
    cursor.now_ns = now_ns
    while count < limit and stepped_over < C_LOOKAHEAD:
        slot = cursor_next(&cursor, queue, &level)
        if slot == NIL:
            break
        if count > 0 and total + queue.entries[slot].tokens > budget:
            stepped_over += 1
            continue
        out[count] = slot
        count += 1
        total += queue.entries[slot].tokens
    return count


cdef int32_t choose_padded(Queue* queue, int64_t now_ns, int64_t budget, int32_t limit, int32_t* out) noexcept nogil:
    cdef Cursor cursor
    cdef int32_t window[C_WINDOW]
    cdef int64_t distance[C_WINDOW]
    cdef int64_t head_level = 0, level = 0, near, longest = 0, total = 0, cost
    cdef int32_t found = 0, count = 0, slot, at, tokens
    memcpy(cursor.at, queue.heads, sizeof(cursor.at))
    cursor.now_ns = now_ns
    while found < C_WINDOW:
        slot = cursor_next(&cursor, queue, &level)
        if slot == NIL or (found > 0 and level != head_level):
            break
        if found == 0:
            head_level = level
            window[0] = slot
            distance[0] = 0
            found = 1
            continue
        near = queue.entries[slot].tokens - queue.entries[window[0]].tokens
        near = near if near >= 0 else -near
        at = found
        while at > 1 and distance[at - 1] > near:
            distance[at] = distance[at - 1]
            window[at] = window[at - 1]
            at -= 1
        distance[at] = near
        window[at] = slot
        found += 1
    while count < limit and count < found:
        tokens = queue.entries[window[count]].tokens
        if tokens > longest:
            cost = (count + 1) * <int64_t>tokens
        else:
            cost = (count + 1) * longest
        if count > 0 and (cost > budget or cost > 2 * (total + tokens)):
            break
        out[count] = window[count]
        longest = tokens if tokens > longest else longest
        total += tokens
        count += 1
    return count


cdef class BatchQueue:
    cdef Queue queue
    cdef int32_t* chosen
    cdef int32_t* expired
    cdef int64_t max_sequences
    cdef int64_t max_tokens
    cdef int64_t latest_ns

    def __cinit__(self, int64_t max_sequences, int64_t max_tokens, bint padded=False, int64_t ageing_ns=500_000_000):
        cdef int64_t slot
        if not 0 < max_sequences < (1 << SLOT_BITS) or max_tokens <= 0 or ageing_ns <= 0:
            raise ValueError("max_sequences must be in [1, 2^24), max_tokens and ageing_ns positive")
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.queue.padded = padded
        self.queue.ageing_ns = ageing_ns
        self.queue.entries = <Entry*>PyMem_Calloc(max_sequences, sizeof(Entry))
        self.chosen = <int32_t*>PyMem_Calloc(max_sequences, sizeof(int32_t))
        self.expired = <int32_t*>PyMem_Calloc(max_sequences, sizeof(int32_t))
        if self.queue.entries == NULL or self.chosen == NULL or self.expired == NULL:
            raise MemoryError
        for slot in range(max_sequences):
            self.queue.entries[slot].next = <int32_t>(slot + 1) if slot + 1 < max_sequences else NIL
        for slot in range(C_PRIORITIES):
            self.queue.heads[slot] = NIL
            self.queue.tails[slot] = NIL

    def __dealloc__(self):
        PyMem_Free(self.queue.entries)
        PyMem_Free(self.chosen)
        PyMem_Free(self.expired)

    @property
    def sequences(self):
        return self.queue.sequences

    @property
    def tokens(self):
        return self.queue.tokens

    def ahead(self, int priority):
        cdef int64_t total = 0
        cdef int line
        for line in range(min(priority + 1, C_PRIORITIES)):
            total += self.queue.line_tokens[line]
        return total

    cpdef bint fits(self, int64_t sequences, int64_t tokens):
        if self.queue.sequences + sequences > self.max_sequences:
            return False
        return self.queue.tokens + tokens <= self.max_tokens or (self.queue.sequences == 0 and sequences == 1)

    def push(self, int64_t tokens, int priority, int64_t deadline_ns, int64_t now_ns):
        if not 0 < tokens <= 0x7FFFFFFF or not 0 <= priority < C_PRIORITIES:
            raise ValueError("tokens must be positive, priority in [0, 4)")
        if not self.fits(1, tokens):
            return -1
        if now_ns > self.latest_ns:
            self.latest_ns = now_ns
        return self.ticket(queue_link(&self.queue, <int32_t>tokens, priority, deadline_ns, self.latest_ns))

    cdef int64_t ticket(self, int32_t slot) noexcept:
        return (<int64_t>(self.queue.entries[slot].generation & 0x7FFFFFFF) << SLOT_BITS) | slot

    def cancel(self, int64_t ticket):
        cdef int64_t slot = ticket & ((1 << SLOT_BITS) - 1)
        if ticket < 0 or slot >= self.max_sequences or not self.queue.entries[slot].waiting or self.ticket(<int32_t>slot) != ticket:
            return False
        queue_unlink(&self.queue, <int32_t>slot)
        return True

    def take(self, int64_t now_ns, int64_t token_budget, int64_t max_sequences, int64_t horizon_ns=0):
        cdef int32_t limit = <int32_t>min(max(max_sequences, 0), self.max_sequences)
        cdef int32_t late, count, i
        late = queue_expire(&self.queue, now_ns + max(horizon_ns, 0), self.expired)
        if self.queue.padded:
            count = choose_padded(&self.queue, now_ns, token_budget, limit, self.chosen)
        else:
            count = choose_packed(&self.queue, now_ns, token_budget, limit, self.chosen)
        for i in range(count):
            queue_unlink(&self.queue, self.chosen[i])
        return [self.ticket(self.chosen[i]) for i in range(count)], [self.ticket(self.expired[i]) for i in range(late)]


cdef int64_t open_row(object row, Py_buffer* view) except -1:
    """Fills `view` with a contiguous int64 vector and returns its length; the caller releases it."""
    if not PyObject_CheckBuffer(row):
        raise ValueError("a sequence must be a contiguous int64 vector")
    try:
        PyObject_GetBuffer(row, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
    except (BufferError, ValueError) as error:
        raise ValueError("a sequence must be a contiguous int64 vector") from error
    if view.ndim != 1 or view.itemsize != 8 or view.format == NULL or (view.format[0] != b"l" and view.format[0] != b"q"):
        PyBuffer_Release(view)
        raise ValueError("a sequence must be a contiguous int64 vector")
    if view.len == 0:
        PyBuffer_Release(view)
        raise ValueError("a sequence must have at least one token")
    return view.len // 8


cdef int copy_row(object row, object types, int64_t* ids_out, int64_t* types_out, int64_t room) except -1:
    """Copies one sequence and its type ids (zeros for None); returns its length, which is at most `room`."""
    cdef Py_buffer view
    cdef int64_t length = open_row(row, &view)
    if length > room:
        PyBuffer_Release(&view)
        raise ValueError(f"the sequences have more tokens than the buffers ({length} tokens left over, room for {room})")
    memcpy(ids_out, view.buf, length * 8)
    PyBuffer_Release(&view)
    if types is None:
        memset(types_out, 0, length * 8)
        return <int>length
    cdef int64_t other = open_row(types, &view)
    if other == length:
        memcpy(types_out, view.buf, length * 8)
    PyBuffer_Release(&view)
    if other != length:
        raise ValueError("type_ids must be as long as ids")
    return <int>length


cdef void count_up(int64_t* out, int64_t length) noexcept nogil:
    cdef int64_t j
    for j in range(length):
        out[j] = j


def pack(list ids, list type_ids, int64_t[::1] input_ids, int64_t[::1] position_ids, int64_t[::1] token_type_ids, int32_t[::1] cu_seqlens):
    cdef Py_ssize_t i, count = len(ids)
    cdef int64_t at = 0, length
    cdef int64_t room = min(input_ids.shape[0], position_ids.shape[0], token_type_ids.shape[0])
    if len(type_ids) != count or cu_seqlens.shape[0] < count + 1:
        raise ValueError("type_ids must have one entry a sequence and cu_seqlens one more than there are sequences")
    cu_seqlens[0] = 0
    for i in range(count):
        # At most `room` <= the buffers' length, so the pointers stay inside even when nothing is left.
        length = copy_row(ids[i], type_ids[i], &input_ids[0] + at, &token_type_ids[0] + at, room - at)
        count_up(&position_ids[0] + at, length)
        at += length
        cu_seqlens[i + 1] = <int32_t>at
    return at


def pack_padded(list ids, list type_ids, int64_t[::1] input_ids, int64_t[::1] attention_mask, int64_t[::1] token_type_ids, int64_t pad_id):
    cdef Py_ssize_t i, count = len(ids)
    cdef int64_t width = 0, length, j
    cdef Py_buffer view
    if len(type_ids) != count:
        raise ValueError("type_ids must have one entry a sequence")
    for i in range(count):
        length = open_row(ids[i], &view)
        PyBuffer_Release(&view)
        width = max(width, length)
    if count * width > min(input_ids.shape[0], attention_mask.shape[0], token_type_ids.shape[0]):
        raise ValueError("the padded rows have more tokens than the buffers")
    for i in range(count):
        length = copy_row(ids[i], type_ids[i], &input_ids[0] + i * width, &token_type_ids[0] + i * width, width)
        for j in range(width):
            attention_mask[i * width + j] = j < length
        for j in range(length, width):
            input_ids[i * width + j] = pad_id
            token_type_ids[i * width + j] = 0
    return width


cdef void add_row(double* total, const float* row, int64_t size) noexcept nogil:
    cdef int64_t column
    for column in range(size):
        total[column] += row[column]


cdef void pool_row(const float* rows, int64_t count, int64_t width, int32_t kind, bint normalize, int64_t size, double* work, float* out) noexcept nogil:
    cdef int64_t i
    cdef double total = 0.0, scale
    if kind == C_MEAN:
        memset(work, 0, size * sizeof(double))
        for i in range(count):
            add_row(work, rows + i * width, size)
        for i in range(size):
            work[i] = work[i] / count
    else:
        rows += 0 if kind == C_CLS else (count - 1) * width
        for i in range(size):
            work[i] = rows[i]
    if normalize:
        for i in range(size):
            total += work[i] * work[i]
        scale = sqrt(total)
        scale = 1.0 / (scale if scale > 1e-12 else 1e-12)
        for i in range(size):
            work[i] = work[i] * scale
    for i in range(size):
        out[i] = <float>work[i]


def pool(const float[:, ::1] hidden, const int32_t[::1] begins, const int32_t[::1] ends, const int32_t[:, ::1] specs, float[:, ::1] out):
    cdef Py_ssize_t i, count = begins.shape[0]
    cdef int64_t width = hidden.shape[1]
    cdef double* work
    if ends.shape[0] != count or specs.shape[0] != count or specs.shape[1] != 3 or out.shape[0] < count:
        raise ValueError("begins, ends, specs and out must have one row a sequence")
    for i in range(count):
        if not 0 <= begins[i] < ends[i] <= hidden.shape[0]:
            raise ValueError(f"span {i} is empty or outside hidden")
        if not C_MEAN <= specs[i, 0] <= C_NONE or (specs[i, 0] != C_NONE and not 1 <= specs[i, 2] <= min(width, out.shape[1])):
            raise ValueError(f"spec {i} has an unknown kind or a size outside hidden or out")
    if count == 0:
        return
    work = <double*>PyMem_Calloc(max(width, 1), sizeof(double))
    if work == NULL:
        raise MemoryError
    with nogil:
        for i in range(count):
            if specs[i, 0] != C_NONE:
                pool_row(
                    &hidden[begins[i], 0], ends[i] - begins[i], width, specs[i, 0], specs[i, 1] != 0, specs[i, 2], work, &out[i, 0]
                )
    PyMem_Free(work)


cdef void softmax_row(float* row, int64_t size) noexcept nogil:
    cdef int64_t i
    cdef double top, total = 0.0
    top = -1.0 / 0.0
    for i in range(size):
        if row[i] > top:
            top = row[i]
    for i in range(size):
        total += exp(row[i] - top)
    for i in range(size):
        row[i] = <float>(exp(row[i] - top) / total)


def softmax(float[:, ::1] rows):
    cdef Py_ssize_t i
    check_columns(rows)
    with nogil:
        for i in range(rows.shape[0]):
            softmax_row(&rows[i, 0], rows.shape[1])


cdef float logistic(double value) noexcept nogil:
    if value >= 0:
        return <float>(1.0 / (1.0 + exp(-value)))
    return <float>(exp(value) / (1.0 + exp(value)))


def sigmoid(float[:, ::1] rows):
    cdef Py_ssize_t i, j
    check_columns(rows)
    with nogil:
        for i in range(rows.shape[0]):
            for j in range(rows.shape[1]):
                rows[i, j] = logistic(rows[i, j])


cdef bint before(float a, float b) noexcept nogil:
    return a > b or (b != b and a == a)


cdef void top_k_row(const float* row, int64_t size, int64_t k, int64_t* out) noexcept nogil:
    """Insertion into a sorted list of at most k; k is small where this is called."""
    cdef int64_t column, at, kept = 0
    for column in range(size):
        if kept == k and not before(row[column], row[out[k - 1]]):
            continue
        at = kept if kept < k else k - 1
        while at > 0 and before(row[column], row[out[at - 1]]):
            out[at] = out[at - 1]
            at -= 1
        out[at] = column
        if kept < k:
            kept += 1


def top_k(const float[:, ::1] rows, int64_t[:, ::1] indices):
    cdef Py_ssize_t i
    if indices.shape[0] != rows.shape[0]:
        raise ValueError("indices must be contiguous int64[S, k]")
    if not 1 <= indices.shape[1] <= rows.shape[1]:
        raise ValueError("k must be between 1 and the number of columns")
    with nogil:
        for i in range(rows.shape[0]):
            top_k_row(&rows[i, 0], rows.shape[1], indices.shape[1], &indices[i, 0])


cdef int check_columns(float[:, ::1] rows) except -1:
    if rows.shape[1] == 0:
        raise ValueError("expected contiguous float32[S, C] with C >= 1")
    return 0
