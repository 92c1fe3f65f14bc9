/* u8 activations times s8 weights with exact 32-bit sums. Compiled once per instruction set.
 *
 * AVX2 multiplies u8 by s8 only with pairs of products added in 16 bits (saturating), then pairs of those in 32 bits: two multiplications for
 * 32 products. Where the weights prove that four products fit 16 bits for any activation (255 * 128 < 2^15, so the positive weights among
 * the four, and the negative ones, must sum to 128 at most), two results are added in 16 bits first, and three multiplications do 64
 * products. Packing sorts the steps of each panel by that proof; sums of integers do not mind the order. With 7-bit weights nearly
 * all steps pass and no pair can fail, with 8-bit weights the rest is slower and exact all the same. VNNI needs none of this.
 */
#include "ops.h"
#include "simd.h"

#include <stdlib.h>

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define ISA_NAME(name) JOIN(name, US_ISA)

enum {
    COLS = 16,           /* of a panel */
    STEP = 8,            /* rows of B in a step */
    STEP_BYTES = COLS * STEP,
    ROWS = 4             /* of a tile: 4 x 2 accumulators */
};

/* A step holds [k 0..3 | k 4..7][columns 0..7 | 8..15][column][k]: 4 times 32 bytes. */
static int64_t at(int64_t k, int64_t column) { return (k / 4) * 64 + (column / 8) * 32 + (column % 8) * 4 + k % 4; }

enum { QUADS, PAIRS, SINGLES };

static int class_of(const int8_t *step) {
    int worst = QUADS;
    for (int64_t column = 0; column < COLS; column++) {
        for (int half = 0; half < 2; half++) {
            int sum[2][2] = {{0}};
            for (int64_t k = 2 * half; k < STEP; k += (k % 4 == 2 * half + 1) ? 3 : 1) {
                const int w = step[at(k, column)];
                sum[k / 4][w < 0] += abs(w);
            }
            for (int sign = 0; sign < 2; sign++) {
                if (sum[0][sign] > 128 || sum[1][sign] > 128) return SINGLES;
                if (sum[0][sign] + sum[1][sign] > 128) worst = PAIRS;
            }
        }
    }
    return worst;
}

static void pack_panel(us_weights *w, const int8_t *b, int64_t panel, int8_t *steps, uint8_t *classes) {
    const int64_t first = panel * COLS, n = w->cols - first < COLS ? w->cols - first : COLS;
    int32_t *sums = w->column_sums + first;
    memset(steps, 0, (size_t)(w->steps * STEP_BYTES));
    for (int64_t k = 0; k < w->depth; k++) {
        const int8_t *row = b + k * w->cols + first;
        int8_t *step = steps + k / STEP * STEP_BYTES;
        for (int64_t c = 0; c < n; c++) {
            step[at(k % STEP, c)] = row[c];
            sums[c] += row[c];
        }
    }
    for (int64_t s = 0; s < w->steps; s++) classes[s] = (uint8_t)class_of(steps + s * STEP_BYTES);
    int64_t done = 0;
    for (int class = QUADS; class <= SINGLES; class++) {
        for (int64_t s = 0; s < w->steps; s++) {
            if (classes[s] != class) continue;
            memcpy(w->data + (panel * w->steps + done) * STEP_BYTES, steps + s * STEP_BYTES, STEP_BYTES);
            w->offsets[panel * w->steps + done++] = (int32_t)(s * STEP);
        }
        if (class < SINGLES) w->ends[panel * 2 + class] = (int32_t)done;
    }
}

static us_weights *pack(const int8_t *b, int64_t depth, int64_t cols) {
    const int64_t steps = (depth + STEP - 1) / STEP, panels = (cols + COLS - 1) / COLS;
    us_weights *w = aligned_alloc(64, (sizeof *w + 63) & ~(size_t)63);
    if (!w) return NULL;
    *w = (us_weights){.depth = depth, .cols = cols, .steps = steps, .panels = panels};
    w->data = aligned_alloc(64, (size_t)(panels * steps * STEP_BYTES + 64) & ~(size_t)63);
    w->column_sums = calloc((size_t)(panels * COLS + 1), sizeof *w->column_sums);
    w->offsets = calloc((size_t)(panels * steps + 1), sizeof *w->offsets);
    w->ends = calloc((size_t)(panels * 2 + 1), sizeof *w->ends);
    if (!w->data || !w->column_sums || !w->offsets || !w->ends) {
        us_free_weights(w);
        return NULL;
    }
    uint8_t *classes = malloc((size_t)steps + 1);
    int8_t *panel_steps = malloc((size_t)(steps * STEP_BYTES) + 1);
    for (int64_t panel = 0; classes && panel_steps && panel < panels; panel++) pack_panel(w, b, panel, panel_steps, classes);
    const int out_of_memory = !classes || !panel_steps;
    free(classes);
    free(panel_steps);
    if (out_of_memory) {
        us_free_weights(w);
        return NULL;
    }
    return w;
}

/* y = (sum - zero[column]) * scale[column]; the difference cannot overflow, as the driver holds depth below 2^15. */
typedef struct {
    const int8_t *data;
    const int32_t *offsets;
    int64_t ends[3];
    int32_t zero[COLS];
    float scale[COLS];
} panel_view;

#if defined(__AVX2__) && !defined(US_VW)

INLINE __m256i broadcast4(const uint8_t *a) {
    int32_t v;
    memcpy(&v, a, sizeof v);
    return _mm256_set1_epi32(v);
}

INLINE __m256i wide(__m256i sixteen) { return _mm256_madd_epi16(sixteen, _mm256_set1_epi16(1)); }

/* In place: left to itself the compiler copies half of the accumulators in every step and spills the others. */
INLINE __m256i add(__m256i acc, __m256i x) {
    __asm__("vpaddd %1, %0, %0" : "+x"(acc) : "x"(x));
    return acc;
}

/* acc += the products of one step, by the class that packing proved */
INLINE __m256i add_step(__m256i acc, __m256i a0, __m256i a1, __m256i b0, __m256i b1, int class) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(acc, a0, b0), a1, b1);
#else
    if (class == QUADS) return add(acc, wide(_mm256_add_epi16(_mm256_maddubs_epi16(a0, b0), _mm256_maddubs_epi16(a1, b1))));
    if (class == PAIRS) return add(add(acc, wide(_mm256_maddubs_epi16(a0, b0))), wide(_mm256_maddubs_epi16(a1, b1)));
    const __m256i even = _mm256_set1_epi16(0xff);
    acc = add(acc, wide(_mm256_maddubs_epi16(_mm256_and_si256(a0, even), b0)));
    acc = add(acc, wide(_mm256_maddubs_epi16(_mm256_andnot_si256(even, a0), b0)));
    acc = add(acc, wide(_mm256_maddubs_epi16(_mm256_and_si256(a1, even), b1)));
    return add(acc, wide(_mm256_maddubs_epi16(_mm256_andnot_si256(even, a1), b1)));
#endif
}

/* Adds the steps of one class to `total`. Own accumulators keep the compiler from spilling those of the other loops into this one. */
INLINE void steps(__m256i total[ROWS][2], const uint8_t *a, int64_t stride, const panel_view *p, int rows, int class) {
    __m256i acc[ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    const int8_t *b = p->data + (class ? p->ends[class - 1] : 0) * STEP_BYTES;
    for (int64_t s = class ? p->ends[class - 1] : 0; s < p->ends[class]; s++, b += STEP_BYTES) {
        const uint8_t *x = a + p->offsets[s];
        const __m256i b00 = _mm256_load_si256((const void *)b), b01 = _mm256_load_si256((const void *)(b + 32));
        const __m256i b10 = _mm256_load_si256((const void *)(b + 64)), b11 = _mm256_load_si256((const void *)(b + 96));
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m256i a0 = broadcast4(x + r * stride), a1 = broadcast4(x + r * stride + 4);
            acc[r][0] = add_step(acc[r][0], a0, a1, b00, b10, class);
            acc[r][1] = add_step(acc[r][1], a0, a1, b01, b11, class);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        total[r][0] = class == QUADS ? acc[r][0] : _mm256_add_epi32(total[r][0], acc[r][0]);
        total[r][1] = class == QUADS ? acc[r][1] : _mm256_add_epi32(total[r][1], acc[r][1]);
    }
}

INLINE void multiply(const uint8_t *a, int64_t stride, const panel_view *p, float *y, int64_t y_stride, int rows) {
    __m256i acc[ROWS][2];
    steps(acc, a, stride, p, rows, QUADS);
    if (p->ends[PAIRS] > p->ends[QUADS]) steps(acc, a, stride, p, rows, PAIRS);
    if (p->ends[SINGLES] > p->ends[PAIRS]) steps(acc, a, stride, p, rows, SINGLES);
    for (int half = 0; half < 2; half++) {
        const __m256i zero = _mm256_loadu_si256((const void *)(p->zero + 8 * half));
        const __m256 scale = _mm256_loadu_ps(p->scale + 8 * half);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            _mm256_storeu_ps(y + r * y_stride + 8 * half, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(acc[r][half], zero)), scale));
    }
}

#else

INLINE void multiply(const uint8_t *a, int64_t stride, const panel_view *p, float *y, int64_t y_stride, int rows) {
    for (int r = 0; r < rows; r++) {
        int32_t acc[COLS] = {0};
        for (int64_t s = 0; s < p->ends[SINGLES]; s++) {
            const int8_t *b = p->data + s * STEP_BYTES;
            const uint8_t *x = a + r * stride + p->offsets[s];
            for (int64_t c = 0; c < COLS; c++) {
                const int8_t *low = b + (c / 8) * 32 + (c % 8) * 4, *high = low + 64;
                acc[c] += low[0] * x[0] + low[1] * x[1] + low[2] * x[2] + low[3] * x[3];
                acc[c] += high[0] * x[4] + high[1] * x[5] + high[2] * x[6] + high[3] * x[7];
            }
        }
        for (int64_t c = 0; c < COLS; c++) y[r * y_stride + c] = (float)(acc[c] - p->zero[c]) * p->scale[c];
    }
}

#endif

static panel_view view(const us_gemm_args *g, int64_t panel) {
    const us_weights *w = g->weights;
    const int64_t first = panel * COLS, n = w->cols - first < COLS ? w->cols - first : COLS;
    panel_view p = {.data = w->data + panel * w->steps * STEP_BYTES, .offsets = w->offsets + panel * w->steps,
                    .ends = {w->ends[2 * panel], w->ends[2 * panel + 1], w->steps}};
    for (int64_t c = 0; c < n; c++) {
        p.zero[c] = w->column_sums[first + c] * g->a_zero;
        p.scale[c] = g->a_scale * g->b_scale[first + c];
    }
    return p;
}

INLINE void tile(const us_gemm_args *g, const uint8_t *a, int64_t stride, const panel_view *p, int64_t row, int64_t panel, int rows) {
    const int64_t cols = g->weights->cols, first = panel * COLS;
    float *y = g->y + row * cols + first;
    if (cols - first >= COLS) {
        multiply(a, stride, p, y, cols, rows);
    } else {
        float whole[ROWS][COLS];
        multiply(a, stride, p, whole[0], COLS, rows);
        for (int r = 0; r < rows; r++) memcpy(y + r * cols, whole[r], (size_t)(cols - first) * sizeof(float));
    }
}

/* Rows [begin, end) by panels [first, last). Rows of A are copied to `scratch` when their length is no multiple of STEP. */
static void gemm(const us_gemm_args *g, int64_t begin, int64_t end, int64_t first, int64_t last, uint8_t *scratch) {
    const us_weights *w = g->weights;
    const int64_t stride = w->steps * STEP;
    const uint8_t *a = g->a + begin * w->depth;
    if (stride != w->depth) {
        for (int64_t r = 0; r < end - begin; r++) {
            memcpy(scratch + r * stride, a + r * w->depth, (size_t)w->depth);
            memset(scratch + r * stride + w->depth, 0, (size_t)(stride - w->depth));
        }
        a = scratch;
    }
    for (int64_t panel = first; panel < last; panel++) {
        const panel_view p = view(g, panel);
        int64_t row = begin;
        for (; row + ROWS <= end; row += ROWS) tile(g, a + (row - begin) * stride, stride, &p, row, panel, ROWS);
        switch (end - row) {
        case 3: tile(g, a + (row - begin) * stride, stride, &p, row, panel, 3); break;
        case 2: tile(g, a + (row - begin) * stride, stride, &p, row, panel, 2); break;
        case 1: tile(g, a + (row - begin) * stride, stride, &p, row, panel, 1); break;
        }
    }
}

us_weights *ISA_NAME(us_pack)(const int8_t *b, int64_t depth, int64_t cols) { return pack(b, depth, cols); }
void ISA_NAME(us_gemm_part)(const us_gemm_args *g, int64_t begin, int64_t end, int64_t first, int64_t last, uint8_t *scratch) {
    gemm(g, begin, end, first, last, scratch);
}
