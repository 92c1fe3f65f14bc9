/* Checks the arguments of each operator and splits its work into tasks. What a task computes never depends on how the work was split. */
#include "drivers.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

const char *us_message(const char *format, ...) {
    static _Thread_local char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return text;
}

typedef struct { const us_kernels *kernels; const void *args; deal deal; atomic_int out_of_memory; } row_job;

static void norm_task(void *data, size_t index) {
    const row_job *job = data;
    job->kernels->norm_rows(job->args, first_row(job->deal, index), last_row(job->deal, index));
}

const char *us_norm(const us_kernels *kernels, const us_norm_args *a, us_runner *runner) {
    const char *wrong = check_quant(&a->quant);
    if (wrong) return wrong;
    row_job job = {.kernels = kernels, .args = a, .deal = deal_rows(a->rows, a->cols, 16384)};
    run(runner, norm_task, tasks(job.deal), &job);
    return NULL;
}

static void gelu_task(void *data, size_t index) {
    row_job *job = data;
    const us_gelu_args *a = job->args;
    const scratch own = take_scratch(a->y ? 0 : a->cols);
    if (own.block)
        job->kernels->gelu_rows(a, first_row(job->deal, index), last_row(job->deal, index), own.floats);
    else
        atomic_store(&job->out_of_memory, 1);
    free(own.block);
}

const char *us_gelu(const us_kernels *kernels, const us_gelu_args *a, us_runner *runner) {
    const char *wrong = check_quant(&a->quant);
    if (wrong) return wrong;
    row_job job = {.kernels = kernels, .args = a, .deal = deal_rows(a->rows, a->cols, 8192)};
    run(runner, gelu_task, tasks(job.deal), &job);
    return job.out_of_memory ? us_message("out of memory for %lld columns of scratch", (long long)a->cols) : NULL;
}

static void embed_task(void *data, size_t index) {
    const row_job *job = data;
    job->kernels->embed_rows(job->args, first_row(job->deal, index), last_row(job->deal, index));
}

static const char *check_ids(const char *what, const int64_t *ids, int64_t rows, int64_t limit) {
    for (int64_t i = 0; i < rows; i++)
        if (ids[i] < 0 || ids[i] >= limit)
            return us_message("%s[%lld] is %lld, not within 0..%lld", what, (long long)i, (long long)ids[i], (long long)limit - 1);
    return NULL;
}

const char *us_embed(const us_kernels *kernels, const us_embed_args *a, us_runner *runner) {
    const char *wrong = check_quant(&a->quant);
    if (!wrong) wrong = check_ids("input_ids", a->ids, a->rows, a->words);
    if (!wrong) wrong = check_ids("position_ids", a->positions, a->rows, a->max_positions);
    if (!wrong && a->type && a->types) wrong = check_ids("token_type_ids", a->types, a->rows, a->type_count);
    if (!wrong && a->type && a->type_count < 1) wrong = us_message("the token type table is empty");
    if (wrong) return wrong;
    row_job job = {.kernels = kernels, .args = a, .deal = deal_rows(a->rows, a->cols, 16384)};
    run(runner, embed_task, tasks(job.deal), &job);
    return NULL;
}

/* A unit is one head and one block of queries of one sequence; a task is a run of units of about equal cost. */
typedef struct { int64_t sequence, unit; } unit_at;

typedef struct {
    const us_kernels *kernels;
    const us_attention_args *args;
    unit_at starts[MOST_TASKS + 1];
    size_t count;
    int64_t scratch;
    deal quantize;
    atomic_int out_of_memory;
} attention_job;

static int64_t blocks_of(int64_t length) { return (length + US_QUERY_BLOCK - 1) / US_QUERY_BLOCK; }

/* About nanoseconds: products of 8 queries at a time, packing of the keys, and what a call costs at least. */
static double unit_cost(int64_t length, int64_t dim) {
    const double queries = length < US_QUERY_BLOCK ? (double)length : US_QUERY_BLOCK;
    return (double)length * (double)dim * ((queries + 8) * 0.05 + 0.4) + 200;
}

static void plan_attention(attention_job *job) {
    const us_attention_args *a = job->args;
    const int64_t dim = a->hidden / a->heads;
    double total = 0;
    for (int64_t s = 0; s < a->sequences; s++) {
        const int64_t length = a->cu[s + 1] - a->cu[s];
        total += (double)(blocks_of(length) * a->heads) * unit_cost(length, dim);
    }
    /* Tasks of at least 10 us, and 64 at most: enough to even out mixed lengths, few enough to hand out cheaply. */
    const double target = total / 64 > 10000 ? total / 64 : 10000;
    double filled = 0;
    job->starts[0] = (unit_at){0, 0};
    job->count = 0;
    for (int64_t s = 0; s < a->sequences; s++) {
        const int64_t length = a->cu[s + 1] - a->cu[s], units = blocks_of(length) * a->heads;
        const double cost = unit_cost(length, dim);
        for (int64_t u = 0; u < units; u++) {
            filled += cost;
            if (filled >= target && job->count + 2 < MOST_TASKS) {
                job->starts[++job->count] = (unit_at){s, u + 1};
                filled = 0;
            }
        }
    }
    job->starts[++job->count] = (unit_at){a->sequences, 0};
}

static void attention_task(void *data, size_t index) {
    attention_job *job = data;
    const us_attention_args *a = job->args;
    const unit_at end = job->starts[index + 1];
    unit_at at = job->starts[index];
    const scratch own = take_scratch(job->scratch);
    if (!own.block) {
        atomic_store(&job->out_of_memory, 1);
        return;
    }
    for (; at.sequence < a->sequences && at.sequence <= end.sequence; at.sequence++, at.unit = 0) {
        const int64_t blocks = blocks_of(a->cu[at.sequence + 1] - a->cu[at.sequence]);
        const int64_t stop = at.sequence == end.sequence ? end.unit : blocks * a->heads;
        for (; at.unit < stop; at.unit++) job->kernels->attention_block(a, at.sequence, at.unit / blocks, at.unit % blocks, own.floats);
    }
    free(own.block);
}

static void quantize_task(void *data, size_t index) {
    const attention_job *job = data;
    const us_attention_args *a = job->args;
    job->kernels->quantize_rows(&a->quant, a->out, a->hidden, first_row(job->quantize, index), last_row(job->quantize, index));
}

static const char *check_attention(const us_attention_args *a) {
    if (a->heads < 1 || a->hidden % a->heads || a->hidden / a->heads > US_MAX_HEAD_DIM || a->hidden < 1)
        return us_message("num_heads is %lld for %lld columns; it must divide them into heads of 1..%d", (long long)a->heads, (long long)a->hidden, US_MAX_HEAD_DIM);
    if (a->rel_bias && a->rel_span < 1) return us_message("rel_bias has no columns");
    if (a->cu[0] != 0 || a->cu[a->sequences] != a->tokens)
        return us_message("cu_seqlens runs from %d to %d; it must run from 0 to the %lld tokens", a->cu[0], a->cu[a->sequences], (long long)a->tokens);
    for (int64_t s = 0; s < a->sequences; s++)
        if (a->cu[s + 1] < a->cu[s]) return us_message("cu_seqlens falls from %d to %d at sequence %lld", a->cu[s], a->cu[s + 1], (long long)s);
    return check_quant(&a->quant);
}

const char *us_attention(const us_kernels *kernels, const us_attention_args *a, us_runner *runner) {
    const char *wrong = check_attention(a);
    if (wrong) return wrong;
    us_attention_args full = *a;
    const int64_t dim = a->hidden / a->heads;
    const int two_steps = a->quant.mult && a->quant.per_row;
    if (full.scale == 0) full.scale = 1.0f / __builtin_sqrtf((float)dim);
    attention_job job = {.kernels = kernels, .args = &full, .quantize = deal_rows(a->tokens, a->hidden, 16384)};
    plan_attention(&job);
    job.scratch = kernels->attention_scratch(dim);
    if (two_steps) {
        full.out = malloc((size_t)(a->tokens * a->hidden) * sizeof(float) + 1);
        if (!full.out) return us_message("out of memory for %lld rows of scratch", (long long)a->tokens);
    }
    run(runner, attention_task, job.count, &job);
    if (two_steps) {
        run(runner, quantize_task, tasks(job.quantize), &job);
        free(full.out);
    }
    return job.out_of_memory ? us_message("out of memory for %lld floats of scratch", (long long)job.scratch) : NULL;
}
