/* What the drivers share: handing tasks to the runner, dealing rows, scratch memory, and the check of a quantized output. */
#ifndef UNDERSTUDY_DRIVERS_H
#define UNDERSTUDY_DRIVERS_H

#include "ops.h"

#include <stdlib.h>

enum { MOST_TASKS = 128 };

static inline void run(us_runner *runner, void (*task)(void *, size_t), size_t count, void *data) {
    if (runner->failure) return;
    if (count == 1)
        task(data, 0);
    else if (count)
        runner->failure = runner->run(runner->pool, task, count, data);
}

/* Rows are dealt out in equal runs of at least `least` elements: below that, waking a thread costs more than it saves. */
typedef struct { int64_t rows, step; } deal;

static inline deal deal_rows(int64_t rows, int64_t cols, int64_t least) {
    int64_t step = least / (cols > 0 ? cols : 1) + 1;
    if (rows / step >= MOST_TASKS) step = (rows + MOST_TASKS - 1) / MOST_TASKS;
    const int64_t runs = (rows + step - 1) / step;
    return (deal){rows, runs ? (rows + runs - 1) / runs : 1};
}

static inline size_t tasks(deal d) { return (size_t)((d.rows + d.step - 1) / d.step); }
static inline int64_t first_row(deal d, size_t index) { return (int64_t)index * d.step; }
static inline int64_t last_row(deal d, size_t index) {
    const int64_t end = ((int64_t)index + 1) * d.step;
    return end < d.rows ? end : d.rows;
}

static inline const char *check_quant(const us_quant *q) {
    if (!q->mult) return NULL;
    if (q->per_row && q->zero_point != 128) return us_message("zero_point is %d; per_row = 1 needs 128", q->zero_point);
    if (q->zero_point < 0 || q->zero_point > 255) return us_message("zero_point is %d, not within 0..255", q->zero_point);
    return NULL;
}

/* A task's own scratch: taken inside the task, so that it comes warm from the thread's own heap instead of fresh from the system. */
typedef struct { void *block; float *floats; } scratch;

static inline scratch take_scratch(int64_t floats) {
    scratch s = {.block = malloc((size_t)floats * sizeof(float) + 64)};
    s.floats = s.block ? (float *)(((uintptr_t)s.block + 63) & ~(uintptr_t)63) : NULL;
    return s;
}

#endif
