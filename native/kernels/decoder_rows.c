/* Kernels of decoder graphs that treat each token's row alone: embedding, skip connection and norm, gated activation. */
#include "decoder.h"
#include "rows.h"

static void tokens_rows(const us_tokens_args *a, int64_t begin, int64_t end) {
    const int64_t cols = a->cols;
    const float multiplier = a->multiplier;
    for (int64_t row = begin; row < end; row++) {
        const int64_t id = a->ids[row];
        float *restrict y = a->y + row * cols;
        if (id < a->words && a->bfloat16) {
            const uint16_t *restrict x = (const uint16_t *)a->table + id * cols;
            EACH_VECTOR(cols, { vstore_n(y + c, load_bfloat16(x + c, n) * multiplier, n); });
            continue;
        }
        const float *restrict x = id < a->words ? (const float *)a->table + id * cols : a->extra + (id - a->words) * cols;
        EACH_VECTOR(cols, { vstore_n(y + c, vload_n(x + c, n) * multiplier, n); });
    }
}

INLINE void multiply_row(const float *restrict x, const float *restrict gamma, float factor, float *restrict y, int64_t cols) {
    EACH_VECTOR(cols, { vstore_n(y + c, vload_n(x + c, n) * factor * vload_n(gamma + c, n), n); });
}

static void skip_rows(const us_skip_args *a, int64_t begin, int64_t end, float *scratch) {
    const int64_t cols = a->cols;
    for (int64_t row = begin; row < end; row++) {
        const float *restrict x = a->x + row * cols, *restrict residual = a->residual ? a->residual + row * cols : NULL;
        float *restrict s = a->s ? a->s + row * cols : scratch;
        float *y = a->y ? a->y + row * cols : scratch + cols;
        const float scale = a->row_scale ? a->row_scale[row] : 1.0f;
        value_row(x, a->bias, scale, s, cols);
        if (a->inner) {
            const float factor = inverse_rms(s, cols, a->epsilon);
            const float *restrict inner = a->inner;
            EACH_VECTOR(cols, { vstore_n(s + c, vload_n(s + c, n) * factor * vload_n(inner + c, n), n); });
        }
        if (residual) EACH_VECTOR(cols, { vstore_n(s + c, vload_n(s + c, n) + vload_n(residual + c, n), n); });
        multiply_row(s, a->gamma, inverse_rms(s, cols, a->epsilon), y, cols);
        if (a->quant.mult) quantize(&a->quant, y, row, cols);
    }
}

INLINE vf activate(vf x, int kind) {
    if (kind == US_SILU) return x / (vexp(-x) + 1.0f);
    return vgelu(x, kind == US_GELU_TANH);
}

INLINE void gated_row(const float *restrict x, const float *restrict bias, float *restrict y, int64_t cols, float scale, int kind) {
    const float *restrict up = x + cols, *restrict up_bias = bias ? bias + cols : NULL;
    if (bias)
        EACH_VECTOR(cols, {
            vf gate = vload_n(x + c, n) * scale + vload_n(bias + c, n);
            vstore_n(y + c, activate(gate, kind) * (vload_n(up + c, n) * scale + vload_n(up_bias + c, n)), n);
        });
    else
        EACH_VECTOR(cols, { vstore_n(y + c, activate(vload_n(x + c, n) * scale, kind) * (vload_n(up + c, n) * scale), n); });
}

static void gated_rows(const us_gated_args *a, int64_t begin, int64_t end, float *scratch) {
    const int64_t cols = a->cols;
    for (int64_t row = begin; row < end; row++) {
        const float *x = a->x + row * 2 * cols;
        float *y = a->y ? a->y + row * cols : scratch;
        const float scale = a->row_scale ? a->row_scale[row] : 1.0f;
        if (a->kind == US_SILU)
            gated_row(x, a->bias, y, cols, scale, US_SILU);
        else if (a->kind == US_GELU_TANH)
            gated_row(x, a->bias, y, cols, scale, US_GELU_TANH);
        else
            gated_row(x, a->bias, y, cols, scale, US_GELU_ERF);
        if (a->quant.mult) quantize(&a->quant, y, row, cols);
    }
}

int64_t ISA_NAME(us_paged_scratch)(const us_paged_args *, int64_t);
int64_t ISA_NAME(us_paged_partial)(const us_paged_args *);
void ISA_NAME(us_paged_write)(const us_paged_args *, int64_t, int64_t, int64_t, int64_t, float *);
void ISA_NAME(us_paged_block_run)(const us_paged_args *, const us_paged_block *, float *);
void ISA_NAME(us_paged_segment)(const us_paged_args *, const us_paged_block *, int64_t, float *, float *);
void ISA_NAME(us_paged_merge)(const us_paged_args *, const us_paged_block *, const float *, int64_t, float *);

const us_decoder_kernels ISA_NAME(us_decoder) = {
    .tokens_rows = tokens_rows,
    .skip_rows = skip_rows,
    .gated_rows = gated_rows,
    .paged_scratch = ISA_NAME(us_paged_scratch),
    .paged_partial = ISA_NAME(us_paged_partial),
    .paged_write = ISA_NAME(us_paged_write),
    .paged_block = ISA_NAME(us_paged_block_run),
    .paged_segment = ISA_NAME(us_paged_segment),
    .paged_merge = ISA_NAME(us_paged_merge),
};
