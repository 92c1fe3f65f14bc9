/* Deals the rows of a step to the threads and picks the instruction set's row function. */
#include "sampling.h"
#include "ops.h"

#include <stdatomic.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* The pool of the kernels, where the library has one. */
__attribute__((weak)) void us_parallel_for(void (*task)(void *, size_t), size_t count, void *data);

typedef struct {
    const us_sample_job *job;
    us_sample_row row;
    atomic_long next;
    int64_t scratch;
} dealt;

EXPORT int64_t us_sample_scratch(int64_t vocabulary) { return us_sample_room(vocabulary); }

static us_sample_row row_of(const char *isa) {
#ifdef US_HAVE_AVX512VNNI
    if (!strcmp(isa, "avx512vnni")) return us_sample_row_avx512vnni;
#endif
#ifdef US_HAVE_AVX2
    if (!strcmp(isa, "avx2")) return us_sample_row_avx2;
#endif
    return us_sample_row_base;
}

static void work(void *data, size_t worker) {
    dealt *d = data;
    const us_sample_job *job = d->job;
    for (;;) {
        const int64_t i = atomic_fetch_add_explicit(&d->next, 1, memory_order_relaxed);
        if (i >= job->rows) return;
        const int64_t row = job->logit_rows ? job->logit_rows[i] : i;
        us_drawn out = {
            .token = job->tokens + i,
            .logprob = job->logprob + i,
            .entropy = job->entropy + i,
            .margin = job->margin + i,
            .top_ids = job->top_ids + i * job->top_width,
            .top_logprobs = job->top_logprobs + i * job->top_width,
            .top_width = job->top_width,
        };
        const uint32_t *mask = job->masks ? job->masks + i * job->mask_words : NULL;
        d->row(job->samplers[i], job->logits + row * job->vocabulary, mask, job->vocabulary, (char *)job->scratch + (int64_t)worker * d->scratch, &out);
    }
}

/* Returns NULL, or what is wrong. The caller has checked rows, sizes and the ids in the samplers. */
EXPORT const char *us_sample(const us_sample_job *job) {
    const us_kernels *kernels = us_choose(NULL);
    if (!kernels) return "no build of the kernels runs here";
    dealt d = {.job = job, .row = row_of(kernels->name), .scratch = us_sample_room(job->vocabulary)};
    atomic_init(&d.next, 0);
    const int64_t workers = job->workers < job->rows ? job->workers : job->rows;
    if (workers > 1 && us_parallel_for)
        us_parallel_for(work, (size_t)workers, &d);
    else
        work(&d, 0);
    return NULL;
}
