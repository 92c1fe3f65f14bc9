/* BeamAttention and TopTokens as ONNX Runtime sees them: checks, and the split of the work over threads. */
#include "beam.h"
#include "drivers.h"
#include "operators.h"

#include <stdatomic.h>
#include <string.h>

typedef struct { us_beam_units *units; us_top_rows *top; } beam_build;

/* The build of the instruction set that us_choose picked. */
static beam_build pick(void) {
    const char *name = us_choose(NULL)->name;
#ifdef US_HAVE_AVX512VNNI
    if (!strcmp(name, "avx512vnni")) return (beam_build){us_beam_units_avx512vnni, us_top_rows_avx512vnni};
#endif
#ifdef US_HAVE_AVX2
    if (!strcmp(name, "avx2")) return (beam_build){us_beam_units_avx2, us_top_rows_avx2};
#endif
    (void)name;
    return (beam_build){us_beam_units_base, us_top_rows_base};
}

typedef struct { beam_build build; const us_beam_args *args; deal deal; int64_t longest; atomic_int out_of_memory; } beam_job;

static void beam_task(void *data, size_t index) {
    beam_job *job = data;
    const us_beam_args *a = job->args;
    const scratch own = take_scratch(2 * (a->inner / a->heads) + job->longest);
    if (own.block)
        job->build.units(a, first_row(job->deal, index), last_row(job->deal, index), own.floats);
    else
        atomic_store(&job->out_of_memory, 1);
    free(own.block);
}

/* Every slot that a row reads or writes lies in the pool. */
static const char *check_slots(const us_beam_args *a, int64_t *longest) {
    for (int64_t row = 0; row < a->rows; row++) {
        const int64_t count = a->own ? a->lengths[row] : a->table[row * 2 + 1];
        if (count < 1 || (a->own && count > a->steps)) return us_message("row %lld has %lld positions; expected 1 to %lld", (long long)row, (long long)count, (long long)a->steps);
        if (count > *longest) *longest = count;
        if (!a->own) {
            const int64_t first = a->table[row * 2];
            if (first < 0 || first + count > a->slots) return us_message("row %lld reads slots %lld to %lld of %lld", (long long)row, (long long)first, (long long)(first + count - 1), (long long)a->slots);
            continue;
        }
        for (int64_t i = 0; i < count; i++) {
            const int64_t slot = a->table[row * a->steps + i];
            if (slot < 0 || slot >= a->slots) return us_message("row %lld names slot %lld of %lld", (long long)row, (long long)slot, (long long)a->slots);
        }
    }
    return NULL;
}

static const char *beam_attention(const us_beam_args *a, us_runner *runner) {
    beam_job job = {.build = pick(), .args = a};
    const char *wrong = check_slots(a, &job.longest);
    if (wrong) return wrong;
    job.deal = deal_rows(a->rows * a->heads, 2 * job.longest * (a->inner / a->heads), 32768);
    run(runner, beam_task, tasks(job.deal), &job);
    return job.out_of_memory ? us_message("out of memory for scores over %lld positions", (long long)job.longest) : NULL;
}

typedef struct { int64_t column, own; } beam_place;

static const char *compute_beam(us_call *c, us_runner *runner) {
    const us_tensor *in = c->in;
    const beam_place *place = c->self->own;
    if (!us_fits(c, 0, "x", 2, -1, -1) || !us_fits(c, 2, "pool", 2, -1, -1)) return NULL;
    const int64_t rows = in[0].dims[0], columns = in[0].dims[1], heads = c->self->heads, inner = place->own ? columns / 3 : columns;
    if (!us_fits(c, 1, "bias", 1, columns, 0) || !us_fits(c, 3, "table", 2, rows, place->own ? -1 : 2) ||
        !us_fits(c, 4, "lengths", 1, rows, 0) || !us_fits(c, 5, "relative", 2, heads, -1))
        return NULL;
    if (inner < 1 || inner % heads || (place->own && columns % 3)) return us_message("x has %lld columns, which %lld heads cannot share", (long long)columns, (long long)heads);
    if (place->own && !in[4].data) return "lengths is missing";
    if (in[5].data && in[5].dims[1] < 1) return "relative is empty";
    us_beam_args a = {.x = in[0].data, .bias = in[1].data, .pool = in[2].data, .table = in[3].data, .lengths = in[4].data, .relative = in[5].data,
                      .rows = rows, .columns = columns, .inner = inner, .heads = heads, .slots = in[2].dims[0], .width = in[2].dims[1],
                      .column = place->column, .steps = in[3].dims[1], .span = in[5].data ? in[5].dims[1] : 0, .scale = c->self->scale,
                      .own = (int32_t)place->own};
    if (a.column + 2 * inner > a.width) return us_message("the pool has %lld columns; expected at least %lld", (long long)a.width, (long long)(a.column + 2 * inner));
    a.y = us_output(c, 0, 2, rows, inner);
    return c->status ? NULL : beam_attention(&a, runner);
}

static OrtStatus *prepare_beam(us_kernel *self, const OrtKernelInfo *info) {
    beam_place *place = calloc(1, sizeof *place);
    if (!place) return us_refuse(self, "out of memory");
    place->column = us_int_attribute(self->api, info, "column", 0);
    place->own = us_int_attribute(self->api, info, "own", 1);
    self->own = place;
    if (self->heads < 1) return us_refuse(self, "the attribute num_heads must be at least 1");
    return place->column < 0 ? us_refuse(self, "the attribute column must not be negative") : NULL;
}

typedef struct { beam_build build; const us_top_args *args; deal deal; } top_job;

static void top_task(void *data, size_t index) {
    const top_job *job = data;
    job->build.top(job->args, first_row(job->deal, index), last_row(job->deal, index));
}

static const char *compute_top(us_call *c, us_runner *runner) {
    const us_tensor *in = c->in;
    if (!us_fits(c, 0, "logits", 2, -1, -1) || !us_fits(c, 1, "k", 1, 1, 0)) return NULL;
    const int64_t rows = in[0].dims[0], cols = in[0].dims[1], k = *(const int64_t *)in[1].data;
    if (k < 1 || k > cols) return us_message("k is %lld; expected 1 to %lld", (long long)k, (long long)cols);
    us_top_args a = {.x = in[0].data, .rows = rows, .cols = cols, .k = k};
    a.lse = us_output(c, 0, 1, rows, 0);
    a.values = us_output(c, 1, 2, rows, k);
    a.ids = us_output(c, 2, 2, rows, k);
    if (c->status) return NULL;
    if (!a.lse || !a.values || !a.ids) return "all three outputs are needed";
    top_job job = {.build = pick(), .args = &a, .deal = deal_rows(rows, cols, 16384)};
    run(runner, top_task, tasks(job.deal), &job);
    return NULL;
}

const us_op us_beam_ops[] = {
    {US_OP_BASE, "BeamAttention", "fFfiIF", "f", 0, compute_beam, prepare_beam, NULL},
    {US_OP_BASE, "TopTokens", "fl", "ffl", 0, compute_top, NULL, NULL},
};
const size_t us_beam_op_count = sizeof us_beam_ops / sizeof *us_beam_ops;
