/* Full attention inside one sequence, for one head and one block of queries. Compiled once per instruction set.
 *
 * Queries lie across the lanes of a vector, so that maximum, exponential and sum of the softmax are plain vertical operations and neither K
 * nor V needs a transpose: a tile of keys meets 2 * VW queries in products of the form splat(k[d]) * q[d][lanes]. Keys come in tiles of
 * US_KEY_TILE with a running softmax, so scratch memory is the same for any length and stays in the first two caches.
 * A row's arithmetic depends on its own sequence only: tiles start where the sequence starts.
 */
#include "ops.h"
#include "simd.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define ISA_NAME(name) JOIN(name, US_ISA)

enum {
    QV = 2,              /* vectors of queries in a full tile */
    QW = QV * VW,
    KEYS_AT_ONCE = 4,    /* 4 x QV accumulators plus operands fit 16 registers */
    DIMS_AT_ONCE = 4,
    TILES = US_QUERY_BLOCK / QW
};

typedef struct {
    float *k, *v;        /* [US_KEY_TILE][dp], rows of zeros up to a multiple of KEYS_AT_ONCE */
    float *q, *o;        /* [TILES][dp][QW] */
    float *most, *sum;   /* [US_QUERY_BLOCK]: the running softmax */
    float *score;        /* [US_KEY_TILE][QW] */
    float *rows;         /* [QW][dp] */
    float *rel;          /* [US_KEY_TILE + US_QUERY_BLOCK] */
} buffers;

static int64_t padded(int64_t dim) { return (dim + 3) & ~(int64_t)3; }

int64_t ISA_NAME(us_attention_scratch)(int64_t head_dim) {
    const int64_t dp = padded(head_dim);
    return dp * (2 * US_KEY_TILE + 2 * US_QUERY_BLOCK + QW) + 2 * US_QUERY_BLOCK + US_KEY_TILE * QW + US_KEY_TILE + US_QUERY_BLOCK;
}

static buffers split(float *p, int64_t dp) {
    buffers b;
    b.score = p, p += US_KEY_TILE * QW;
    b.q = p, p += US_QUERY_BLOCK * dp;
    b.o = p, p += US_QUERY_BLOCK * dp;
    b.k = p, p += US_KEY_TILE * dp;
    b.v = p, p += US_KEY_TILE * dp;
    b.rows = p, p += QW * dp;
    b.most = p, p += US_QUERY_BLOCK;
    b.sum = p, p += US_QUERY_BLOCK;
    b.rel = p;
    return b;
}

/* to[i][0..dp) = (x * row_scale + bias) * factor for n rows of one head, zeros past dim and for rows n .. all. */
INLINE void pack(const us_attention_args *a, int64_t first, int64_t n, int64_t all, int64_t column, float *restrict to, int64_t dim, float factor) {
    const int64_t dp = padded(dim), stride = 3 * a->hidden;
    const float *restrict bias = a->bias ? a->bias + column : NULL;
    for (int64_t i = 0; i < n; i++) {
        const float *restrict x = a->qkv + (first + i) * stride + column;
        float *restrict row = to + i * dp;
        const float scale = a->row_scale ? a->row_scale[first + i] : 1.0f;
        int64_t d = 0;
        if (bias)
            for (; d + VW <= dim; d += VW) vstore(row + d, (vload(x + d) * scale + vload(bias + d)) * factor);
        else
            for (; d + VW <= dim; d += VW) vstore(row + d, (vload(x + d) * scale) * factor);
        for (; d < dim; d++) row[d] = (x[d] * scale + (bias ? bias[d] : 0.0f)) * factor;
        for (; d < dp; d++) row[d] = 0.0f;
    }
    if (all > n) memset(to + n * dp, 0, (size_t)((all - n) * dp) * sizeof(float));
}

/* to[c][r] = from[r][c], 4 x 4; strides in floats. */
INLINE void transpose4(const float *restrict from, int64_t from_stride, float *restrict to, int64_t to_stride) {
    v4f a = v4load(from), b = v4load(from + from_stride), c = v4load(from + 2 * from_stride), d = v4load(from + 3 * from_stride);
    v4f ab0 = __builtin_shuffle(a, b, (v4i){0, 4, 1, 5}), ab1 = __builtin_shuffle(a, b, (v4i){2, 6, 3, 7});
    v4f cd0 = __builtin_shuffle(c, d, (v4i){0, 4, 1, 5}), cd1 = __builtin_shuffle(c, d, (v4i){2, 6, 3, 7});
    v4store(to, __builtin_shuffle(ab0, cd0, (v4i){0, 1, 4, 5}));
    v4store(to + to_stride, __builtin_shuffle(ab0, cd0, (v4i){2, 3, 6, 7}));
    v4store(to + 2 * to_stride, __builtin_shuffle(ab1, cd1, (v4i){0, 1, 4, 5}));
    v4store(to + 3 * to_stride, __builtin_shuffle(ab1, cd1, (v4i){2, 3, 6, 7}));
}

/* score[k][lanes] = sum over d of key[k][d] * q[d][lanes] */
INLINE void multiply_keys(const float *restrict q, const float *restrict key, float *restrict score, int64_t keys, int64_t dim, int vectors) {
    const int64_t dp = padded(dim);
    for (int64_t k = 0; k < keys; k += KEYS_AT_ONCE, key += KEYS_AT_ONCE * dp, score += KEYS_AT_ONCE * QW) {
        vf acc[KEYS_AT_ONCE][QV] = {0};
        for (int64_t d = 0; d < dim; d++) {
            vf x[QV];
            for (int i = 0; i < vectors; i++) x[i] = vload(q + d * QW + i * VW);
#pragma GCC unroll 8
            for (int j = 0; j < KEYS_AT_ONCE; j++) {
                const float s = key[j * dp + d];
                for (int i = 0; i < vectors; i++) acc[j][i] += s * x[i];
            }
        }
#pragma GCC unroll 8
        for (int j = 0; j < KEYS_AT_ONCE; j++)
            for (int i = 0; i < vectors; i++) vstore(score + j * QW + i * VW, acc[j][i]);
    }
}

/* o[d][lanes] = o * keep + sum over k of value[k][d] * p[k][lanes] */
INLINE void multiply_values(const float *restrict p, const float *restrict value, float *restrict o, int64_t keys, int64_t dim, int vectors, const vf *keep) {
    const int64_t dp = padded(dim);
    for (int64_t d = 0; d < dp; d += DIMS_AT_ONCE, o += DIMS_AT_ONCE * QW) {
        vf acc[DIMS_AT_ONCE][QV] = {0};
        if (keep) {
#pragma GCC unroll 8
            for (int j = 0; j < DIMS_AT_ONCE; j++)
                for (int i = 0; i < vectors; i++) acc[j][i] = vload(o + j * QW + i * VW) * keep[i];
        }
        for (int64_t k = 0; k < keys; k++) {
            vf x[QV];
            for (int i = 0; i < vectors; i++) x[i] = vload(p + k * QW + i * VW);
#pragma GCC unroll 8
            for (int j = 0; j < DIMS_AT_ONCE; j++) {
                const float s = value[k * dp + d + j];
                for (int i = 0; i < vectors; i++) acc[j][i] += s * x[i];
            }
        }
#pragma GCC unroll 8
        for (int j = 0; j < DIMS_AT_ONCE; j++)
            for (int i = 0; i < vectors; i++) vstore(o + j * QW + i * VW, acc[j][i]);
    }
}

/* One tile of queries against one tile of keys. `rel` is NULL or points at the bias of (key 0, lane 0); one key on is one float back. */
INLINE void attend(const buffers *b, int64_t tile, int64_t keys, int first, const float *rel, int64_t dim, int vectors) {
    const int64_t dp = padded(dim);
    float *restrict score = b->score, *restrict o = b->o + tile * dp * QW;
    multiply_keys(b->q + tile * dp * QW, b->k, score, keys, dim, vectors);
    vf keep[QV];
    for (int i = 0; i < vectors; i++) {
        vf m0 = vset(-3.4e38f), m1 = m0;
        if (rel)
            for (int64_t k = 0; k < keys; k++) {
                float *s = score + k * QW + i * VW;
                vf x = vload(s) + vload(rel - k + i * VW);
                vstore(s, x);
                m0 = vmax(x, m0);
            }
        else {
            int64_t k = 0;
            for (; k + 2 <= keys; k += 2) {
                m0 = vmax(vload(score + k * QW + i * VW), m0);
                m1 = vmax(vload(score + (k + 1) * QW + i * VW), m1);
            }
            if (k < keys) m0 = vmax(vload(score + k * QW + i * VW), m0);
        }
        m0 = vmax(m1, m0);
        vf total = {0};
        if (!first) {
            vf before = vload(b->most + tile * QW + i * VW);
            m0 = vmax(before, m0);
            keep[i] = vexp(before - m0);
            total = vload(b->sum + tile * QW + i * VW) * keep[i];
        }
        for (int64_t k = 0; k < keys; k++) {
            float *s = score + k * QW + i * VW;
            vf e = vexp(vload(s) - m0);
            vstore(s, e);
            total += e;
        }
        vstore(b->most + tile * QW + i * VW, m0);
        vstore(b->sum + tile * QW + i * VW, total);
    }
    multiply_values(score, b->v, o, keys, dim, vectors, first ? NULL : keep);
}

/* rel[t] is the bias of key - query = -(lowest + t), so that neighbouring queries are neighbouring floats. */
static void spread_rel_bias(const us_attention_args *a, int64_t head, int64_t lowest, int64_t count, float *restrict rel) {
    const int64_t far = a->rel_span - 1;
    const float *table = a->rel_bias + head * (2 * a->rel_span - 1) + far;
    for (int64_t t = 0; t < count; t++) {
        int64_t offset = -(lowest + t);
        offset = offset < -far ? -far : offset > far ? far : offset;
        rel[t] = table[offset];
    }
}

INLINE void quantize_part(const float *restrict w, const float *restrict mult, uint8_t *restrict q, int64_t dim, float zero_point) {
    const float low = -zero_point, high = 255.0f - zero_point;
    for (int64_t c = 0; c < dim; c++) {
        float t = w[c] * mult[c];
        t = t > low ? t : low;
        t = t < high ? t : high;
        q[c] = (uint8_t)(int32_t)((t + ROUND_MAGIC) - ROUND_MAGIC + zero_point);
    }
}

/* Divides by the softmax's sums and writes n rows, as floats or quantized. */
INLINE void finish(const us_attention_args *a, const buffers *b, int64_t tile, int64_t row, int64_t n, int64_t column, int64_t dim) {
    const int64_t dp = padded(dim);
    float *o = b->o + tile * dp * QW;
    float inverse[QW];
    for (int i = 0; i * VW < n; i++) vstore(inverse + i * VW, 1.0f / vload(b->sum + tile * QW + i * VW));
    for (int64_t i = 0; i < n; i += 4)
        for (int64_t d = 0; d < dp; d += 4) transpose4(o + d * QW + i, QW, b->rows + i * dp + d, dp);
    for (int64_t i = 0; i < n; i++) {
        float *restrict w = b->rows + i * dp;
        for (int64_t d = 0; d < dim; d++) w[d] *= inverse[i];
        const int64_t at = (row + i) * a->hidden + column;
        if (a->quant.mult && !a->quant.per_row)
            quantize_part(w, a->quant.mult + column, a->quant.q + at, dim, (float)a->quant.zero_point);
        else
            memcpy(a->out + at, w, (size_t)dim * sizeof(float));
    }
}

INLINE void attention(const us_attention_args *a, int64_t sequence, int64_t head, int64_t block, float *scratch, int64_t dim) {
    const int64_t dp = padded(dim), start = a->cu[sequence], length = a->cu[sequence + 1] - start, column = head * dim;
    const int64_t q0 = block * US_QUERY_BLOCK, queries = length - q0 < US_QUERY_BLOCK ? length - q0 : US_QUERY_BLOCK;
    const buffers b = split(scratch, dp);
    for (int64_t tile = 0; tile * QW < queries; tile++) {
        const int64_t left = queries - tile * QW, n = left < QW ? left : QW;
        float *q = b.q + tile * dp * QW;
        pack(a, start + q0 + tile * QW, n, QW, column, b.rows, dim, a->scale);
        for (int64_t i = 0; i < QW; i += 4)
            for (int64_t d = 0; d < dp; d += 4) transpose4(b.rows + i * dp + d, dp, q + d * QW + i, QW);
    }
    for (int64_t k0 = 0; k0 < length; k0 += US_KEY_TILE) {
        const int64_t left = length - k0, keys = left < US_KEY_TILE ? left : US_KEY_TILE;
        const int64_t whole = (keys + KEYS_AT_ONCE - 1) / KEYS_AT_ONCE * KEYS_AT_ONCE;
        pack(a, start + k0, keys, whole, a->hidden + column, b.k, dim, 1.0f);
        pack(a, start + k0, keys, keys, 2 * a->hidden + column, b.v, dim, 1.0f);
        if (a->rel_bias) spread_rel_bias(a, head, q0 - (k0 + keys - 1), US_QUERY_BLOCK + keys - 1, b.rel);
        for (int64_t tile = 0; tile * QW < queries; tile++) {
            const float *rel = a->rel_bias ? b.rel + tile * QW + keys - 1 : NULL;
            if (queries - tile * QW > VW)
                attend(&b, tile, keys, k0 == 0, rel, dim, QV);
            else
                attend(&b, tile, keys, k0 == 0, rel, dim, 1);
        }
    }
    for (int64_t tile = 0; tile * QW < queries; tile++) {
        const int64_t left = queries - tile * QW;
        finish(a, &b, tile, start + q0 + tile * QW, left < QW ? left : QW, column, dim);
    }
}

void ISA_NAME(us_attention_block)(const us_attention_args *a, int64_t sequence, int64_t head, int64_t block, float *scratch) {
    const int64_t dim = a->hidden / a->heads;
    if (dim == 32)
        attention(a, sequence, head, block, scratch, 32);
    else if (dim == 64)
        attention(a, sequence, head, block, scratch, 64);
    else
        attention(a, sequence, head, block, scratch, dim);
}
