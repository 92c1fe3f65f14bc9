/* Floats times floats. Compiled once per instruction set.
 *
 * An element of y is the sum of its products in the order of the depth, in chunks of CHUNK that are added up at the end: neither the number of
 * rows nor that of threads changes a bit. A chunk of a panel stays in the first-level cache while all rows pass over it.
 */
#include "products.h"
#include "simd.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define ISA_NAME(name) JOIN(name, US_ISA)

enum {
    CHUNK = 256,
    VECTORS = US_COLS / VW,             /* of a panel's row */
    ROWS = VW == 4 ? 2 : VW == 8 ? 6 : 12 /* of a tile: as many accumulators as there are registers to spare */
};

typedef struct { const float *a, *b; float *y; int64_t depth, stride, y_stride; int more; } tile_at;

/* y (+)= a [rows, depth] b [depth, 16] */
INLINE void multiply(const tile_at *t, int rows) {
    vf acc[ROWS][VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) acc[r][v] = (vf){0};
    const float *a = t->a, *b = t->b;
    for (int64_t k = 0; k < t->depth; k++, b += US_COLS) {
        vf w[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) w[v] = vload(b + v * VW);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const vf x = vset(a[r * t->stride + k]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) acc[r][v] = vfma(x, w[v], acc[r][v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            float *y = t->y + r * t->y_stride + v * VW;
            vstore(y, t->more ? vload(y) + acc[r][v] : acc[r][v]);
        }
}

static void tile(const tile_at *t, int64_t rows) {
    switch (rows) {
    case 1: multiply(t, 1); break;
#if !defined(US_VW)
    case 2: multiply(t, 2); break;
    case 3: multiply(t, ROWS < 3 ? ROWS : 3); break;
    case 4: multiply(t, ROWS < 4 ? ROWS : 4); break;
    case 5: multiply(t, ROWS < 5 ? ROWS : 5); break;
    case 8: multiply(t, ROWS < 8 ? ROWS : 8); break;
#endif
    default: multiply(t, ROWS);
    }
}

/* How many rows go next: whole tiles, and such remainders as `tile` has code for. */
static int64_t next_rows(int64_t left) {
    if (left >= ROWS) return ROWS;
#if defined(US_VW)
    return 1;
#else
    return left >= 8 ? 8 : left > 5 ? 4 : left;
#endif
}

void ISA_NAME(us_float_part)(const us_float_gemm_args *g, int64_t begin, int64_t end, int64_t first, int64_t last) {
    const us_float_weights *w = g->weights;
    float whole[ROWS][US_COLS];
    for (int64_t panel = first; panel < last; panel++) {
        const int64_t column = panel * US_COLS, n = w->cols - column < US_COLS ? w->cols - column : US_COLS;
        for (int64_t k = 0; k < w->depth; k += CHUNK) {
            const int64_t depth = w->depth - k < CHUNK ? w->depth - k : CHUNK;
            for (int64_t row = begin, rows; row < end; row += rows) {
                rows = next_rows(end - row);
                float *y = g->y + row * w->cols + column;
                tile_at t = {.a = g->a + row * w->depth + k, .b = w->data + (panel * w->depth + k) * US_COLS, .y = y, .depth = depth,
                             .stride = w->depth, .y_stride = w->cols, .more = k > 0};
                if (n == US_COLS) {
                    tile(&t, rows);
                    continue;
                }
                t.y = whole[0], t.y_stride = US_COLS;
                for (int64_t r = 0; r < rows && t.more; r++) memcpy(whole[r], y + r * w->cols, (size_t)n * sizeof(float));
                tile(&t, rows);
                for (int64_t r = 0; r < rows; r++) memcpy(y + r * w->cols, whole[r], (size_t)n * sizeof(float));
            }
        }
    }
}

void ISA_NAME(us_int4_quantize)(const us_int4_gemm_args *, const us_int4_activations *, int64_t, int64_t);
void ISA_NAME(us_int4_part)(const us_int4_gemm_args *, const us_int4_activations *, int64_t, int64_t, int64_t, int64_t);
void ISA_NAME(us_lora_inputs)(const us_lora_plan *, int64_t, float *);
void ISA_NAME(us_lora_down)(const us_lora_plan *, int64_t, int64_t, const float *);
void ISA_NAME(us_lora_up)(const us_lora_plan *, float *, int64_t, int64_t, int64_t, int64_t);

const us_products ISA_NAME(us_products) = {
    .float_part = ISA_NAME(us_float_part),
    .int4_quantize = ISA_NAME(us_int4_quantize),
    .int4_part = ISA_NAME(us_int4_part),
    .lora_inputs = ISA_NAME(us_lora_inputs),
    .lora_down = ISA_NAME(us_lora_down),
    .lora_up = ISA_NAME(us_lora_up),
};
