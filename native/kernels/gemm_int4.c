/* Floats times 4-bit weights: activations are rounded to s8 a row and block, sums are exact in integers, blocks are added up in floats in
 * their order. Compiled once per instruction set.
 *
 * A weight is stored as u = 0..15 and stands for (u - 8) * scale: sum (u - 8) q = sum u q - 8 sum q, and the second sum is known beforehand.
 * |u q| <= 15 * 127, so the 16 products of a pair of rows over eight groups stay within 16 bits (16 * 1905 = 30480): AVX2 adds eight
 * results of vpmaddubsw before it widens them.
 */
#include "products.h"
#include "simd.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define ISA_NAME(name) JOIN(name, US_ISA)

enum {
    GROUP_BYTES = US_COLS * US_GROUP / 2,
    RUN = 8,  /* groups whose sums fit 16 bits: the shortest block */
    ROWS = 4, /* of a tile */
    CHUNK = 32, /* values rounded at once: every block is a multiple */
    MOST_BLOCK = 128
};

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define US_DOT /* or by hand, in tests: the same code, its one instruction by others */
#endif

static const float TINY = 1e-30f; /* a block of nothing more counts as zeros: 127 / peak would overflow */

typedef struct {
    const int8_t *q;        /* the tile's first row */
    const float *scale;
    const int32_t *shift;
    int64_t stride, blocks, runs; /* bytes of a row; blocks of a row; runs of a block */
    const uint8_t *b;       /* the panel */
    const uint16_t *b_scale;
} tile_at;

#if defined(__AVX2__) && !defined(US_VW)

INLINE __m256i broadcast4(const int8_t *a) {
    int32_t v;
    memcpy(&v, a, sizeof v);
    return _mm256_set1_epi32(v);
}

INLINE __m256 widen(const uint16_t *bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)bits)), 16));
}

#if defined(US_DOT)
/* acc += the four products of each lane, u8 by s8; without the instruction (in tests) exact for u up to 15 */
INLINE __m256i dot(__m256i acc, __m256i u, __m256i s) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(acc, u, s);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}
INLINE __m256i whole(__m256i sums) { return sums; }
#else
/* In place: left to itself the compiler turns the eight additions into a tree, and spills its leaves. */
INLINE __m256i add(__m256i acc, __m256i x) {
    __asm__("vpaddw %1, %0, %0" : "+x"(acc) : "x"(x));
    return acc;
}
INLINE __m256i whole(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
#endif

/* total += eight groups */
INLINE void run(__m256i total[ROWS][2], const tile_at *t, const uint8_t *b, const int8_t *q, int rows) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i acc[ROWS][2];
#pragma GCC unroll 8
    for (int g = 0; g < RUN; g++) {
        const __m256i both = _mm256_loadu_si256((const void *)(b + g * GROUP_BYTES));
        const __m256i low = _mm256_and_si256(both, nibble), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m256i x = broadcast4(q + r * t->stride + g * US_GROUP);
#if defined(US_DOT)
            /* Two accumulators a vector hide the instruction's latency where rows are few. */
            __m256i *low_sum = g % 2 ? &acc[r][0] : &total[r][0], *high_sum = g % 2 ? &acc[r][1] : &total[r][1];
            *low_sum = dot(g == 1 ? _mm256_setzero_si256() : *low_sum, low, x);
            *high_sum = dot(g == 1 ? _mm256_setzero_si256() : *high_sum, high, x);
#else
            const __m256i l = _mm256_maddubs_epi16(low, x), h = _mm256_maddubs_epi16(high, x);
            acc[r][0] = g ? add(acc[r][0], l) : l;
            acc[r][1] = g ? add(acc[r][1], h) : h;
#endif
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        total[r][0] = _mm256_add_epi32(total[r][0], whole(acc[r][0]));
        total[r][1] = _mm256_add_epi32(total[r][1], whole(acc[r][1]));
    }
}

INLINE void multiply(const tile_at *t, float *y, int64_t y_stride, int rows) {
    __m256 sum[ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
    const uint8_t *b = t->b;
    const int8_t *q = t->q;
    for (int64_t block = 0; block < t->blocks; block++) {
        __m256i total[ROWS][2];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm256_set1_epi32(t->shift[r * t->blocks + block]);
        for (int64_t i = 0; i < t->runs; i++, b += RUN * GROUP_BYTES, q += RUN * US_GROUP) run(total, t, b, q, rows);
        const __m256 low = widen(t->b_scale + block * US_COLS), high = widen(t->b_scale + block * US_COLS + 8);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m256 scale = _mm256_set1_ps(t->scale[r * t->blocks + block]);
            sum[r][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[r][0]), _mm256_mul_ps(low, scale), sum[r][0]);
            sum[r][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[r][1]), _mm256_mul_ps(high, scale), sum[r][1]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        _mm256_storeu_ps(y + r * y_stride, sum[r][0]);
        _mm256_storeu_ps(y + r * y_stride + 8, sum[r][1]);
    }
}

#else

INLINE float widen(uint16_t bits) {
    const uint32_t v = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &v, sizeof f);
    return f;
}

INLINE void multiply(const tile_at *t, float *y, int64_t y_stride, int rows) {
    const int64_t groups = t->runs * RUN;
    for (int r = 0; r < rows; r++) {
        float sum[US_COLS] = {0};
        for (int64_t block = 0; block < t->blocks; block++) {
            const uint8_t *b = t->b + block * groups * GROUP_BYTES;
            const int8_t *q = t->q + r * t->stride + block * groups * US_GROUP;
            int32_t total[US_COLS];
            for (int c = 0; c < US_COLS; c++) total[c] = t->shift[r * t->blocks + block];
            for (int64_t g = 0; g < groups; g++, b += GROUP_BYTES, q += US_GROUP)
                for (int c = 0; c < US_COLS / 2; c++)
                    for (int k = 0; k < US_GROUP; k++) {
                        const uint8_t both = b[c * US_GROUP + k];
                        total[c] += (both & 15) * q[k];
                        total[c + US_COLS / 2] += (both >> 4) * q[k];
                    }
            const float scale = t->scale[r * t->blocks + block];
            for (int c = 0; c < US_COLS; c++) sum[c] += (float)total[c] * (widen(t->b_scale[block * US_COLS + c]) * scale);
        }
        memcpy(y + r * y_stride, sum, sizeof sum);
    }
}

#endif

INLINE void tile(const tile_at *t, float *y, int64_t y_stride, int64_t n, int rows) {
    if (n == US_COLS) {
        multiply(t, y, y_stride, rows);
        return;
    }
    float whole[ROWS][US_COLS];
    multiply(t, whole[0], US_COLS, rows);
    for (int r = 0; r < rows; r++) memcpy(y + r * y_stride, whole[r], (size_t)n * sizeof(float));
}

void ISA_NAME(us_int4_part)(const us_int4_gemm_args *g, const us_int4_activations *a, int64_t begin, int64_t end, int64_t first, int64_t last) {
    const int64_t blocks = a->blocks, stride = blocks * g->block, panel_bytes = stride / US_GROUP * GROUP_BYTES;
    for (int64_t panel = first; panel < last; panel++) {
        const int64_t column = panel * US_COLS, n = g->cols - column < US_COLS ? g->cols - column : US_COLS;
        for (int64_t row = begin; row < end; row += ROWS) {
            const tile_at t = {.q = a->q + row * stride, .scale = a->scale + row * blocks, .shift = a->shift + row * blocks, .stride = stride,
                               .blocks = blocks, .runs = g->block / (RUN * US_GROUP), .b = g->b + panel * panel_bytes,
                               .b_scale = g->scale + panel * blocks * US_COLS};
            float *y = g->y + row * g->cols + column;
            switch (end - row) {
            case 1: tile(&t, y, g->cols, n, 1); break;
            case 2: tile(&t, y, g->cols, n, 2); break;
            case 3: tile(&t, y, g->cols, n, 3); break;
            default: tile(&t, y, g->cols, n, ROWS);
            }
        }
    }
}

/* Rounds CHUNK values times `inverse` to -127..127 and gives their sum; NaN becomes -127. */
INLINE int32_t round_chunk(const float *restrict x, float inverse, int8_t *restrict q) {
    int32_t whole[CHUNK], sum = 0;
    for (int k = 0; k < CHUNK; k += VW) {
        const vf v = vmin(vmax(vload(x + k) * inverse, vset(-127)), vset(127));
        const vi rounded = (vi)(v + ROUND_MAGIC) - (vi)vset(ROUND_MAGIC);
        memcpy(whole + k, &rounded, sizeof rounded);
    }
    for (int k = 0; k < CHUNK; k++) {
        q[k] = (int8_t)whole[k];
        sum += whole[k];
    }
    return sum;
}

/* The largest |x| by its bits, which order like the numbers; a NaN or an infinity is the largest of all. */
INLINE float largest(const float *restrict x, int64_t block) {
    vi most = {0};
    for (int64_t k = 0; k < block; k += VW) {
        const vi bits = (vi)vabs(vload(x + k)), more = bits > most;
        most = (bits & more) | (most & ~more);
    }
    int32_t t[VW];
    float peak;
    memcpy(t, &most, sizeof t);
    for (int w = VW / 2; w; w /= 2)
        for (int i = 0; i < w; i++) t[i] = t[i] > t[i + w] ? t[i] : t[i + w];
    memcpy(&peak, t, sizeof peak);
    return peak;
}

/* A row with a NaN or an infinity gets a scale that is no number: y is NaN there, its neighbours are not touched. */
static void quantize_block(const float *restrict x, int64_t block, int8_t *restrict q, float *scale, int32_t *shift) {
    const float peak = largest(x, block), inverse = peak > TINY ? 127.0f / peak : 0;
    int32_t sum = 0;
    for (int64_t k = 0; k < block; k += CHUNK) sum += round_chunk(x + k, inverse, q + k);
    *scale = (peak - peak) + peak / 127;
    *shift = -8 * sum;
}

void ISA_NAME(us_int4_quantize)(const us_int4_gemm_args *g, const us_int4_activations *a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
        for (int64_t i = 0; i < a->blocks; i++) {
            const int64_t k = i * g->block, n = g->depth - k < g->block ? g->depth - k : g->block, at = row * a->blocks + i;
            const float *x = g->a + row * g->depth + k;
            float whole[MOST_BLOCK];
            if (n < g->block) {
                memcpy(whole, x, (size_t)n * sizeof *x);
                memset(whole + n, 0, (size_t)(g->block - n) * sizeof *x);
                x = whole;
            }
            quantize_block(x, g->block, a->q + at * g->block, a->scale + at, a->shift + at);
        }
}
