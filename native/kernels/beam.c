/* The two loops of beam search's operators. Compiled once per instruction set.
 *
 * A row attends over slots that a table names, so beams share what they have in common and a step that reorders them moves no K or V.
 * A row's arithmetic depends on its own positions only, in their order.
 */
#include "beam.h"
#include "simd.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define ISA_NAME(name) JOIN(name, US_ISA)

enum { KEYS = 4 };

/* to[d] = (x[d] + bias[d]) * factor */
INLINE void take(const float *restrict x, const float *restrict bias, float *restrict to, int64_t dim, float factor) {
    for (int64_t d = 0; d < dim; d++) to[d] = (x[d] + (bias ? bias[d] : 0.0f)) * factor;
}

/* Products of q with n <= KEYS keys at once: the loads of q are shared. */
INLINE void dots(const float *restrict q, const float *const *keys, int64_t n, int64_t dim, float *restrict out) {
    vf sum[KEYS] = {0};
    for (int64_t d = 0; d < dim; d += VW) {
        const int64_t left = dim - d < VW ? dim - d : VW;
        const vf x = vload_n(q + d, left);
#pragma GCC unroll 4
        for (int j = 0; j < KEYS; j++)
            if (j < n) sum[j] += x * vload_n(keys[j] + d, left);
    }
    for (int j = 0; j < n; j++) out[j] = vsum(sum[j]);
}

/* e^(score - most) in place; returns the sum. */
INLINE float soften(float *restrict score, int64_t count) {
    vf peak = vset(-3.4e38f);
    float most = -3.4e38f;
    int64_t i = 0;
    for (; i + VW <= count; i += VW) peak = vmax(vload(score + i), peak);
    for (int64_t j = 0; j < VW; j++) most = peak[j] > most ? peak[j] : most;
    for (; i < count; i++) most = score[i] > most ? score[i] : most;
    vf total = {0};
    for (i = 0; i < count; i += VW) {
        const int64_t left = count - i < VW ? count - i : VW;
        vf e = vexp(vload_n(score + i, left) - most);
        for (int64_t j = left; j < VW; j++) e[j] = 0.0f;
        vstore_n(score + i, e, left);
        total += e;
    }
    return vsum(total);
}

INLINE int64_t slot_of(const us_beam_args *a, int64_t row, int64_t i) {
    return a->own ? a->table[row * a->steps + i] : a->table[row * 2] + i;
}

static void attend(const us_beam_args *a, int64_t row, int64_t head, float *restrict scratch) {
    const int64_t dim = a->inner / a->heads, at = head * dim, count = a->own ? a->lengths[row] : a->table[row * 2 + 1];
    const float *x = a->x + row * a->columns;
    float *restrict q = scratch, *restrict out = scratch + dim, *restrict score = scratch + 2 * dim;
    const float *keys[KEYS];
    take(x + at, a->bias ? a->bias + at : NULL, q, dim, a->scale);
    if (a->own) {
        float *to = a->pool + slot_of(a, row, count - 1) * a->width + a->column + at;
        for (int part = 1; part <= 2; part++, to += a->inner) {
            const int64_t from = part * a->inner + at;
            take(x + from, a->bias ? a->bias + from : NULL, to, dim, 1.0f);
        }
    }
    for (int64_t i = 0; i < count; i += KEYS) {
        const int64_t n = count - i < KEYS ? count - i : KEYS;
        for (int64_t j = 0; j < n; j++) keys[j] = a->pool + slot_of(a, row, i + j) * a->width + a->column + at;
        dots(q, keys, n, dim, score + i);
    }
    if (a->relative)
        for (int64_t i = 0; i < count; i++) {
            const int64_t distance = count - 1 - i, last = a->span - 1;
            score[i] += a->relative[head * a->span + (distance < last ? distance : last)];
        }
    const float inverse = 1.0f / soften(score, count);
    memset(out, 0, (size_t)dim * sizeof *out);
    for (int64_t i = 0; i < count; i++) {
        const float *restrict value = a->pool + slot_of(a, row, i) * a->width + a->column + a->inner + at;
        const float p = score[i];
        for (int64_t d = 0; d < dim; d += VW) {
            const int64_t left = dim - d < VW ? dim - d : VW;
            vstore_n(out + d, vload_n(out + d, left) + vload_n(value + d, left) * p, left);
        }
    }
    float *restrict y = a->y + row * a->inner + at;
    for (int64_t d = 0; d < dim; d++) y[d] = out[d] * inverse;
}

void ISA_NAME(us_beam_units)(const us_beam_args *a, int64_t begin, int64_t end, float *scratch) {
    for (int64_t unit = begin; unit < end; unit++) attend(a, unit / a->heads, unit % a->heads, scratch);
}

/* Whether (value, id) comes after (other, other_id) in the answer's order. */
INLINE int after(float value, int64_t id, float other, int64_t other_id) { return value < other || (value == other && id > other_id); }

/* A heap whose root is the last of the k in the answer's order. */
static void sift(float *restrict values, int64_t *restrict ids, int64_t k, float value, int64_t id) {
    int64_t at = 0;
    for (;;) {
        int64_t child = 2 * at + 1;
        if (child >= k) break;
        if (child + 1 < k && after(values[child + 1], ids[child + 1], values[child], ids[child])) child++;
        if (!after(values[child], ids[child], value, id)) break;
        values[at] = values[child];
        ids[at] = ids[child];
        at = child;
    }
    values[at] = value;
    ids[at] = id;
}

enum { BLOCK = 8 };

static void top(const float *restrict x, int64_t cols, int64_t k, float *restrict values, int64_t *restrict ids) {
    for (int64_t i = 0; i < k; i++) {
        values[i] = -__builtin_inff();
        ids[i] = INT64_MAX - i;
    }
    int64_t c = 0;
    for (; c + BLOCK * VW <= cols; c += BLOCK * VW) {
        vf peak = vload(x + c);
        for (int i = 1; i < BLOCK; i++) peak = vmax(vload(x + c + i * VW), peak);
        if (!(vmax_lanes(peak) > values[0])) continue;
        for (int64_t i = c; i < c + BLOCK * VW; i++)
            if (x[i] > values[0]) sift(values, ids, k, x[i], i);
    }
    for (; c < cols; c++)
        if (x[c] > values[0]) sift(values, ids, k, x[c], c);
    for (int64_t left = k - 1; left > 0; left--) {
        const float value = values[left];
        const int64_t id = ids[left];
        const float last = values[0];
        const int64_t last_id = ids[0];
        sift(values, ids, left, value, id);
        values[left] = last;
        ids[left] = last_id;
    }
}

void ISA_NAME(us_top_rows)(const us_top_args *a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const float *restrict x = a->x + row * a->cols;
        float *values = a->values + row * a->k;
        top(x, a->cols, a->k, values, a->ids + row * a->k);
        const float most = values[0];
        double total = 0.0;
        /* Sums of blocks in double: a float would lose digits over 250,000 terms. */
        for (int64_t c = 0; c < a->cols;) {
            const int64_t stop = a->cols - c < 4096 ? a->cols : c + 4096;
            vf sum = {0};
            for (; c + VW <= stop; c += VW) sum += vexp(vload(x + c) - most);
            total += vsum(sum);
            if (c < stop) {
                const vf e = vexp(vload_n(x + c, stop - c) - most);
                for (int64_t j = 0; j < stop - c; j++) total += e[j];
                c = stop;
            }
        }
        a->lse[row] = most + (float)__builtin_log(total);
    }
}
