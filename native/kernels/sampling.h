/* Drawing tokens from logits: the structures that native/sampling.pyx fills, and one instruction set's row function.
 *
 * native/sampling_py.py says in NumPy what a row must yield. A row is worked on by one thread from end to end, so that its result
 * depends on nothing but its own logits and parameters.
 */
#ifndef UNDERSTUDY_SAMPLING_H
#define UNDERSTUDY_SAMPLING_H

#include <stdint.h>

enum { US_TOP_MOST = 20 };

/* How one candidate's tokens are drawn. `seen` tokens are distinct; a count of 0 is a token of the prompt that was not generated. */
typedef struct {
    float temperature, top_p, min_p, repetition, presence, frequency;
    int32_t top_k;                        /* 0: all */
    int32_t seen, biases;
    const int32_t *seen_ids, *seen_counts;
    const int32_t *bias_ids;
    const float *bias;
    uint64_t seed, position;              /* key and counter of the random numbers */
    uint32_t index;                       /* which candidate */
    int32_t top;                          /* alternatives to report, at most US_TOP_MOST */
} us_sampler;

/* What one row yields; token -1: nothing may be drawn, or the logits hold NaN or +infinity. */
typedef struct {
    int32_t *token;
    float *logprob, *entropy, *margin;
    int32_t *top_ids;                     /* [top_width]; unused entries are -1 */
    float *top_logprobs;                  /* [top_width]; unused entries are -infinity */
    int32_t top_width;
} us_drawn;

typedef struct {
    const float *logits;                  /* [*, vocabulary], never changed */
    const int32_t *logit_rows;            /* [rows]: which row of logits; NULL: the same number */
    const uint32_t *masks;                /* [rows, mask_words] or NULL; bit set: allowed */
    const us_sampler *const *samplers;    /* [rows] */
    int64_t rows, vocabulary, mask_words;
    int32_t *tokens;
    float *logprob, *entropy, *margin;
    int32_t *top_ids;
    float *top_logprobs;
    int32_t top_width;
    void *scratch;                        /* us_sample_scratch(vocabulary) bytes a worker, aligned to 64 */
    int32_t workers;
} us_sample_job;

typedef void (*us_sample_row)(const us_sampler *, const float *logits, const uint32_t *mask, int64_t vocabulary, void *scratch, us_drawn *);

void us_sample_row_base(const us_sampler *, const float *, const uint32_t *, int64_t, void *, us_drawn *);
void us_sample_row_avx2(const us_sampler *, const float *, const uint32_t *, int64_t, void *, us_drawn *);
void us_sample_row_avx512vnni(const us_sampler *, const float *, const uint32_t *, int64_t, void *, us_drawn *);

/* Bytes of one worker's scratch: the arrays of sampling_room.h, of which those a logit come to less than 33 bytes. */
static inline int64_t us_sample_room(int64_t vocabulary) {
    const int64_t padded = (vocabulary + 127) / 128 * 128;
    return (padded * 33 + 16 * 1024 + 63) & ~(int64_t)63;
}

int64_t us_sample_scratch(int64_t vocabulary);
const char *us_sample(const us_sample_job *);

#endif
