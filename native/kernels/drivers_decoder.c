/* Checks the arguments of the decoders' operators and splits their work into tasks. What is computed never depends on how it was split. */
#include "decoder.h"
#include "drivers.h"

#include <stdatomic.h>

typedef struct { const us_decoder_kernels *kernels; const void *args; deal deal; int64_t scratch; atomic_int out_of_memory; } row_job;

static const char *no_scratch(int64_t floats) { return us_message("out of memory for %lld floats of scratch", (long long)floats); }

static void tokens_task(void *data, size_t index) {
    const row_job *job = data;
    job->kernels->tokens_rows(job->args, first_row(job->deal, index), last_row(job->deal, index));
}

const char *us_tokens(const us_kernels *kernels, const us_tokens_args *a, us_runner *runner) {
    const int64_t known = a->words + (a->extra ? a->extra_rows : 0);
    for (int64_t i = 0; i < a->rows; i++)
        if (a->ids[i] < 0 || a->ids[i] >= known)
            return us_message("input_ids[%lld] is %lld, not within 0..%lld (%lld words and %lld extra rows)", (long long)i, (long long)a->ids[i],
                              (long long)known - 1, (long long)a->words, (long long)(known - a->words));
    row_job job = {.kernels = kernels->decoder, .args = a, .deal = deal_rows(a->rows, a->cols, 32768)};
    run(runner, tokens_task, tasks(job.deal), &job);
    return NULL;
}

static void skip_task(void *data, size_t index) {
    row_job *job = data;
    const scratch own = take_scratch(job->scratch);
    if (own.block)
        job->kernels->skip_rows(job->args, first_row(job->deal, index), last_row(job->deal, index), own.floats);
    else
        atomic_store(&job->out_of_memory, 1);
    free(own.block);
}

const char *us_skip(const us_kernels *kernels, const us_skip_args *a, us_runner *runner) {
    const char *wrong = check_quant(&a->quant);
    if (wrong) return wrong;
    row_job job = {.kernels = kernels->decoder, .args = a, .deal = deal_rows(a->rows, a->cols, 16384), .scratch = 2 * a->cols};
    run(runner, skip_task, tasks(job.deal), &job);
    return job.out_of_memory ? no_scratch(job.scratch) : NULL;
}

static void gated_task(void *data, size_t index) {
    row_job *job = data;
    const scratch own = take_scratch(job->scratch);
    if (own.block)
        job->kernels->gated_rows(job->args, first_row(job->deal, index), last_row(job->deal, index), own.floats);
    else
        atomic_store(&job->out_of_memory, 1);
    free(own.block);
}

const char *us_gated(const us_kernels *kernels, const us_gated_args *a, us_runner *runner) {
    const char *wrong = check_quant(&a->quant);
    if (!wrong && (a->kind < US_SILU || a->kind > US_GELU_ERF)) wrong = us_message("kind is %d; expected 0 silu, 1 gelu by tanh or 2 gelu by erf", a->kind);
    if (wrong) return wrong;
    row_job job = {.kernels = kernels->decoder, .args = a, .deal = deal_rows(a->rows, a->cols, 8192), .scratch = a->cols};
    run(runner, gated_task, tasks(job.deal), &job);
    return job.out_of_memory ? no_scratch(job.scratch) : NULL;
}

enum { BLOCK_ROWS = 48 /* queries times heads of a block: K and V of a tile are read from the second cache for so many rows */ };

/* Units of a sequence: its K/V heads times its blocks of queries, or, with one query and a long past, times the segments of the past. */
typedef struct { int64_t sequence, unit; } unit_at;

typedef struct {
    const us_kernels *kernels;
    const us_paged_args *args;
    deal write, merge, quantize;
    unit_at starts[MOST_TASKS + 1]; /* task i covers [starts[i], starts[i + 1]) */
    size_t count;
    int64_t block_queries, scratch, partial;
    float *partials;
    int64_t *places;                /* [sequences]: a sequence's first partial; NULL when no sequence leaves any */
    atomic_int out_of_memory;
} paged_job;

static int64_t new_tokens(const us_paged_args *a, int64_t s) { return a->cu[s + 1] - a->cu[s]; }
static int64_t first_segment(const us_paged_args *a, int64_t s) {
    const int64_t low = a->window ? a->past[s] - a->window + 1 : 0;
    return low > 0 ? low / US_SEGMENT : 0;
}
static int64_t segments_of(const us_paged_args *a, int64_t s) { return a->past[s] / US_SEGMENT - first_segment(a, s) + 1; }
/* One query whose positions fit one segment: its task writes its K and V itself. */
static int is_short(const us_paged_args *a, int64_t s) { return new_tokens(a, s) == 1 && segments_of(a, s) == 1; }
static int64_t parts_of(const paged_job *job, int64_t s) {
    const int64_t queries = new_tokens(job->args, s);
    return queries == 1 ? segments_of(job->args, s) : (queries + job->block_queries - 1) / job->block_queries;
}

/* Nanoseconds, roughly: products, and K and V as they come from memory. */
static double unit_cost(const paged_job *job, int64_t s, int64_t part) {
    const us_paged_args *a = job->args;
    const int64_t queries = new_tokens(a, s), first = part * job->block_queries;
    const double rows = (double)(queries == 1 ? 1 : queries - first < job->block_queries ? queries - first : job->block_queries);
    double keys = (double)a->past[s] + (queries == 1 ? 1 : (double)first + rows);
    if (a->window && keys > (double)a->window + rows) keys = (double)a->window + rows;
    if (queries == 1 && keys > US_SEGMENT) keys = US_SEGMENT;
    return keys * (double)a->dim * (rows * (double)(a->heads / a->kv_heads) / 12 + 1) + 300;
}

static void plan(paged_job *job) {
    const us_paged_args *a = job->args;
    double total = 0;
    for (int64_t s = 0; s < a->sequences; s++)
        for (int64_t p = 0; p < parts_of(job, s); p++) total += unit_cost(job, s, p) * (double)a->kv_heads;
    const double target = total / 64 > 10000 ? total / 64 : 10000;
    double filled = 0;
    job->starts[0] = (unit_at){0, 0};
    job->count = 0;
    for (int64_t s = 0; s < a->sequences; s++) {
        const int64_t parts = parts_of(job, s);
        for (int64_t u = 0; u < parts * a->kv_heads; u++) {
            filled += unit_cost(job, s, u % parts);
            if (filled >= target && job->count + 2 < MOST_TASKS) {
                job->starts[++job->count] = (unit_at){s, u + 1};
                filled = 0;
            }
        }
    }
    job->starts[++job->count] = (unit_at){a->sequences, 0};
}

/* K and V of the tokens whose tasks do not write them themselves. */
static void write_task(void *data, size_t index) {
    paged_job *job = data;
    const us_paged_args *a = job->args;
    const int64_t begin = first_row(job->write, index), end = last_row(job->write, index);
    const scratch own = take_scratch(job->scratch);
    if (!own.block) {
        atomic_store(&job->out_of_memory, 1);
        return;
    }
    for (int64_t s = 0; s < a->sequences && a->cu[s] < end; s++) {
        if (a->cu[s + 1] <= begin || new_tokens(a, s) == 0 || is_short(a, s)) continue;
        const int64_t from = a->cu[s] > begin ? a->cu[s] : begin, to = a->cu[s + 1] < end ? a->cu[s + 1] : end;
        for (int64_t h = 0; h < a->kv_heads; h++) job->kernels->decoder->paged_write(a, s, h, from - a->cu[s], to - from, own.floats);
    }
    free(own.block);
}

static void attend_unit(const paged_job *job, int64_t s, int64_t unit, int64_t parts, float *scratch) {
    const us_paged_args *a = job->args;
    const us_decoder_kernels *kernels = job->kernels->decoder;
    const int64_t queries = new_tokens(a, s), head = unit / parts, part = unit % parts;
    us_paged_block block = {.sequence = s, .kv_head = head, .first = 0, .count = 1};
    if (queries == 1 && parts > 1) {
        kernels->paged_segment(a, &block, first_segment(a, s) + part, job->partials + (job->places[s] + unit) * job->partial, scratch);
        return;
    }
    if (queries == 1)
        kernels->paged_write(a, s, head, 0, 1, scratch);
    else {
        block.first = part * job->block_queries;
        block.count = queries - block.first < job->block_queries ? queries - block.first : job->block_queries;
    }
    kernels->paged_block(a, &block, scratch);
}

static void attend_task(void *data, size_t index) {
    paged_job *job = data;
    const us_paged_args *a = job->args;
    const unit_at end = job->starts[index + 1];
    unit_at at = job->starts[index];
    const scratch own = take_scratch(job->scratch);
    if (!own.block) {
        atomic_store(&job->out_of_memory, 1);
        return;
    }
    for (; at.sequence < a->sequences && at.sequence <= end.sequence; at.sequence++, at.unit = 0) {
        if (new_tokens(a, at.sequence) == 0) continue;
        const int64_t parts = parts_of(job, at.sequence), stop = at.sequence == end.sequence ? end.unit : parts * a->kv_heads;
        for (; at.unit < stop; at.unit++) attend_unit(job, at.sequence, at.unit, parts, own.floats);
    }
    free(own.block);
}

static void merge_task(void *data, size_t index) {
    paged_job *job = data;
    const us_paged_args *a = job->args;
    const scratch own = take_scratch(job->scratch);
    if (!own.block) {
        atomic_store(&job->out_of_memory, 1);
        return;
    }
    for (int64_t s = first_row(job->merge, index); s < last_row(job->merge, index); s++) {
        if (job->places[s] < 0) continue;
        const int64_t parts = segments_of(a, s);
        for (int64_t h = 0; h < a->kv_heads; h++) {
            const us_paged_block block = {.sequence = s, .kv_head = h, .first = 0, .count = 1};
            job->kernels->decoder->paged_merge(a, &block, job->partials + (job->places[s] + h * parts) * job->partial, parts, own.floats);
        }
    }
    free(own.block);
}

static void quantize_task(void *data, size_t index) {
    const paged_job *job = data;
    const us_paged_args *a = job->args;
    job->kernels->quantize_rows(&a->quant, a->out, a->heads * a->dim, first_row(job->quantize, index), last_row(job->quantize, index));
}

static const char *check_shape(const us_paged_args *a) {
    static const int64_t bytes[] = {4, 2, 1};
    if (a->heads < 1 || a->kv_heads < 1 || a->heads % a->kv_heads)
        return us_message("num_heads is %lld and kv_heads %lld; the first must be a multiple of the second", (long long)a->heads, (long long)a->kv_heads);
    if (a->dim < 1 || a->dim > US_MAX_HEAD_DIM) return us_message("heads have %lld columns; expected 1..%d", (long long)a->dim, US_MAX_HEAD_DIM);
    if (a->kv_dtype < US_KV_FLOAT32 || a->kv_dtype > US_KV_INT8)
        return us_message("kv_dtype is %d; expected 0 float32, 1 bfloat16 or 2 int8", a->kv_dtype);
    const int64_t head = 2 * a->dim * US_PAGE * bytes[a->kv_dtype] + (a->kv_dtype == US_KV_INT8 ? 2 * US_PAGE * 4 : 0);
    if (a->page_bytes != a->kv_heads * head)
        return us_message("pages of kv_pool have %lld bytes; %lld K/V heads of %lld columns need %lld", (long long)a->page_bytes, (long long)a->kv_heads,
                          (long long)a->dim, (long long)(a->kv_heads * head));
    if (a->layer < 0 || a->layer >= a->layers) return us_message("layer is %lld, kv_pool has %lld", (long long)a->layer, (long long)a->layers);
    if (a->cos && (a->half < 1 || 2 * a->half > a->dim))
        return us_message("cos has %lld columns; expected 1..%lld, half of the rotated columns", (long long)a->half, (long long)a->dim / 2);
    if (a->window < 0) return us_message("window is %lld; expected 0 (all) or more", (long long)a->window);
    return check_quant(&a->quant);
}

static const char *check_pages(const us_paged_args *a, int64_t s) {
    const int64_t past = a->past[s], end = past + new_tokens(a, s), low = a->window && past >= a->window ? past - a->window + 1 : 0;
    if (past < 0) return us_message("past_lens[%lld] is %lld", (long long)s, (long long)past);
    if (end > a->width * US_PAGE)
        return us_message("sequence %lld ends at position %lld; its %lld pages hold %lld", (long long)s, (long long)end, (long long)a->width, (long long)a->width * US_PAGE);
    if (a->cos && end > a->positions)
        return us_message("sequence %lld ends at position %lld; cos and sin have %lld rows", (long long)s, (long long)end, (long long)a->positions);
    for (int64_t i = low / US_PAGE; i * US_PAGE < end; i++)
        if (a->table[s * a->width + i] < 0 || a->table[s * a->width + i] >= a->pages)
            return us_message("block_table[%lld, %lld] is %d, not within 0..%lld", (long long)s, (long long)i, a->table[s * a->width + i], (long long)a->pages - 1);
    return NULL;
}

static const char *check_paged(const us_paged_args *a) {
    const char *wrong = check_shape(a);
    if (wrong) return wrong;
    if (a->cu[0] != 0 || a->cu[a->sequences] != a->tokens)
        return us_message("cu_seqlens runs from %d to %d; it must run from 0 to the %lld tokens", a->cu[0], a->cu[a->sequences], (long long)a->tokens);
    for (int64_t s = 0; s < a->sequences; s++)
        if (a->cu[s + 1] < a->cu[s]) return us_message("cu_seqlens falls from %d to %d at sequence %lld", a->cu[s], a->cu[s + 1], (long long)s);
    for (int64_t s = 0; s < a->sequences && !wrong; s++)
        if (new_tokens(a, s)) wrong = check_pages(a, s);
    return wrong;
}

/* Room for what the segments of long sequences leave; 0 when memory is out. */
static int place_partials(paged_job *job) {
    const us_paged_args *a = job->args;
    int64_t count = 0;
    for (int64_t s = 0; s < a->sequences; s++)
        if (new_tokens(a, s) == 1 && !is_short(a, s)) count += segments_of(a, s) * a->kv_heads;
    if (!count) return 1;
    job->places = malloc((size_t)a->sequences * sizeof *job->places);
    job->partials = malloc((size_t)(count * job->partial) * sizeof(float));
    if (!job->places || !job->partials) return 0;
    count = 0;
    for (int64_t s = 0; s < a->sequences; s++) {
        const int is_long = new_tokens(a, s) == 1 && !is_short(a, s);
        job->places[s] = is_long ? count : -1;
        if (is_long) count += segments_of(a, s) * a->kv_heads;
    }
    return 1;
}

static int all_short(const us_paged_args *a) {
    for (int64_t s = 0; s < a->sequences; s++)
        if (new_tokens(a, s) && !is_short(a, s)) return 0;
    return 1;
}

const char *us_paged(const us_kernels *kernels, const us_paged_args *a, us_runner *runner) {
    const char *wrong = check_paged(a);
    if (wrong) return wrong;
    us_paged_args full = *a;
    const int64_t group = a->heads / a->kv_heads, columns = a->heads * a->dim;
    const int two_steps = a->quant.mult && a->quant.per_row;
    if (full.scale == 0) full.scale = 1.0f / __builtin_sqrtf((float)a->dim);
    paged_job job = {.kernels = kernels, .args = &full, .block_queries = BLOCK_ROWS / group ? BLOCK_ROWS / group : 1};
    int64_t longest = 1;
    for (int64_t s = 0; s < a->sequences; s++) longest = new_tokens(a, s) > longest ? new_tokens(a, s) : longest;
    job.scratch = kernels->decoder->paged_scratch(&full, longest < job.block_queries ? longest : job.block_queries);
    job.partial = kernels->decoder->paged_partial(&full);
    job.write = (deal){a->tokens, US_PAGE};
    if (a->tokens / US_PAGE >= MOST_TASKS) job.write.step = (a->tokens + MOST_TASKS - 1) / MOST_TASKS;
    job.merge = (deal){a->sequences, a->sequences / MOST_TASKS + 1};
    job.quantize = deal_rows(a->tokens, columns, 16384);
    if (two_steps) full.out = malloc((size_t)(a->tokens * columns) * sizeof(float) + 1);
    if (!place_partials(&job) || (two_steps && !full.out)) atomic_store(&job.out_of_memory, 1);
    if (!job.out_of_memory) {
        plan(&job);
        if (!all_short(a)) run(runner, write_task, tasks(job.write), &job);
        run(runner, attend_task, job.count, &job);
        if (job.places) run(runner, merge_task, tasks(job.merge), &job);
        if (two_steps) run(runner, quantize_task, tasks(job.quantize), &job);
    }
    if (two_steps) free(full.out);
    free(job.places);
    free(job.partials);
    return job.out_of_memory ? no_scratch(job.scratch) : NULL;
}
