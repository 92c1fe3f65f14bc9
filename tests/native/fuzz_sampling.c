/* Random rows through the sampler of one width: `fuzz_sampling <seed> <rounds>`; run under sanitizers by tests/native/sanitize.py.
 *
 * Every array is exactly as long as promised, so that a step outside is seen. What is checked: the token is one that logits and mask
 * allow, and alternatives are in order. */
#include "../../native/kernels/sampling.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state;

static uint32_t next(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

static int64_t below(int64_t n) { return (int64_t)(next() % (uint64_t)n); }
static float between(float low, float high) { return low + (high - low) * (float)(next() & 0xffffff) / 16777216.0f; }

static float logit(int kind) {
    static const float odd[] = {0, -0.0f, 3e38f, -3e38f, 1e-42f, 88, -87, -INFINITY};
    switch (kind) {
    case 0: return between(-8, 8);
    case 1: return (float)below(5);
    case 2: return odd[below(8)];
    case 3: return below(50) ? between(-1, 1) : NAN;
    case 4: return below(300) ? -INFINITY : between(-3, 3);
    default: return 0;
    }
}

static void fail(const char *what, int64_t round) {
    fprintf(stderr, "round %lld: %s\n", (long long)round, what);
    exit(1);
}

static void once(int64_t round) {
    static const int64_t sizes[] = {1, 2, 7, 31, 33, 127, 128, 129, 400, 4097, 9000};
    const int64_t vocabulary = sizes[below(11)], words = (vocabulary + 31) / 32;
    const int kind = (int)below(6);
    float *logits = malloc((size_t)vocabulary * 4);
    uint32_t *mask = below(3) ? NULL : malloc((size_t)words * 4);
    for (int64_t i = 0; i < vocabulary; i++) logits[i] = logit(kind);
    for (int64_t i = 0; mask && i < words; i++) mask[i] = below(3) ? next() & next() & next() : (uint32_t)-below(2);
    const int32_t seen = (int32_t)below(vocabulary < 9 ? vocabulary : 9), biases = (int32_t)below(vocabulary < 5 ? vocabulary : 5);
    int32_t *ids = malloc((size_t)seen * 4), *counts = malloc((size_t)seen * 4), *bias_ids = malloc((size_t)biases * 4);
    float *bias = malloc((size_t)biases * 4);
    for (int32_t i = 0; i < seen; i++) ids[i] = (int32_t)vocabulary - 1 - i, counts[i] = (int32_t)below(3);
    for (int32_t i = 0; i < biases; i++) bias_ids[i] = i, bias[i] = between(-100, 100);
    us_sampler sampler = {
        .temperature = below(4) ? between(1e-5f, 2) : 0, .top_p = below(2) ? between(1e-6f, 1) : 1, .min_p = below(3) ? 0 : between(0, 1),
        .repetition = between(0.1f, 3), .presence = between(-2, 2), .frequency = between(-2, 2),
        .top_k = below(2) ? 0 : (int32_t)(below(3) ? below(60) : below(12000)), .seen = seen, .biases = biases,
        .seen_ids = ids, .seen_counts = counts, .bias_ids = bias_ids, .bias = bias, .seed = next(), .position = (uint64_t)round, .top = (int32_t)below(21),
    };
    int32_t token = 0, top_ids[20];
    float logprob, entropy, margin, top_logprobs[20];
    us_drawn out = {&token, &logprob, &entropy, &margin, top_ids, top_logprobs, 20};
    void *scratch = aligned_alloc(64, (size_t)us_sample_room(vocabulary));
    us_sample_row_base(&sampler, logits, mask, vocabulary, scratch, &out);
    if (token < -1 || token >= vocabulary) fail("a token out of the vocabulary", round);
    if (token >= 0 && !(logits[token] > -INFINITY)) fail("a token that the logits exclude", round);
    if (token >= 0 && mask && !(mask[token / 32] >> (token % 32) & 1)) fail("a token that the mask excludes", round);
    for (int i = 1; i < 20; i++)
        if (top_logprobs[i] > top_logprobs[i - 1]) fail("alternatives out of order", round);
    free(logits), free(mask), free(ids), free(counts), free(bias_ids), free(bias), free(scratch);
}

int main(int argc, char **argv) {
    state = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    const int64_t rounds = argc > 2 ? atoll(argv[2]) : 1000;
    for (int64_t i = 0; i < rounds; i++) once(i);
    printf("%lld rows drawn\n", (long long)rounds);
    return 0;
}
