/* Kernels that treat each token's row alone: norms, gelu, embedding, quantization. Compiled once per instruction set. */
#include "rows.h"

static void quantize_rows(const us_quant *o, const float *w, int64_t cols, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) quantize(o, w + row * cols, row, cols);
}

typedef struct { const float *gamma, *beta; int64_t cols; float epsilon; int rms; } norm;

INLINE void norm_finish(const norm *o, float *restrict y, float mean, float inverse) {
    const float *restrict gamma = o->gamma, *restrict beta = o->beta;
    if (beta)
        EACH_VECTOR(o->cols, {
            vf v = (vload_n(y + c, n) - mean) * inverse;
            vstore_n(y + c, v * vload_n(gamma + c, n) + vload_n(beta + c, n), n);
        });
    else
        EACH_VECTOR(o->cols, {
            vf v = (vload_n(y + c, n) - mean) * inverse;
            vstore_n(y + c, v * vload_n(gamma + c, n), n);
        });
}

/* In place. Two passes: the variance is taken around the mean, as one pass loses the digits of rows whose mean is large. */
static void normalise(const norm *o, float *restrict y) {
    const int64_t cols = o->cols, quads = cols - cols % (4 * VW);
    vf s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    int64_t c = 0;
    float mean = 0;
    if (!o->rms) {
        for (; c < quads; c += 4 * VW) {
            s0 += vload(y + c);
            s1 += vload(y + c + VW);
            s2 += vload(y + c + 2 * VW);
            s3 += vload(y + c + 3 * VW);
        }
        for (; c + VW <= cols; c += VW) s0 += vload(y + c);
        float sum = vsum((s0 + s1) + (s2 + s3));
        for (; c < cols; c++) sum += y[c];
        mean = sum / (float)cols;
        s0 = s1 = s2 = s3 = vset(0);
    }
    for (c = 0; c < quads; c += 4 * VW) {
        vf a = vload(y + c) - mean, b = vload(y + c + VW) - mean, d = vload(y + c + 2 * VW) - mean, e = vload(y + c + 3 * VW) - mean;
        s0 += a * a;
        s1 += b * b;
        s2 += d * d;
        s3 += e * e;
    }
    for (; c + VW <= cols; c += VW) {
        vf a = vload(y + c) - mean;
        s0 += a * a;
    }
    float sum = vsum((s0 + s1) + (s2 + s3));
    for (; c < cols; c++) sum += (y[c] - mean) * (y[c] - mean);
    norm_finish(o, y, mean, 1.0f / __builtin_sqrtf(sum / (float)cols + o->epsilon));
}

static void norm_rows(const us_norm_args *a, int64_t begin, int64_t end) {
    const int64_t cols = a->cols;
    const norm o = {a->gamma, a->beta, cols, a->epsilon, a->rms};
    for (int64_t row = begin; row < end; row++) {
        const float *restrict x = a->x + row * cols, *restrict bias = a->bias, *restrict residual = a->residual ? a->residual + row * cols : NULL;
        float *restrict y = a->y + row * cols;
        const float scale = a->row_scale ? a->row_scale[row] : 1.0f;
        if (bias && residual)
            EACH_VECTOR(cols, { vstore_n(y + c, vload_n(x + c, n) * scale + vload_n(bias + c, n) + vload_n(residual + c, n), n); });
        else if (bias)
            EACH_VECTOR(cols, { vstore_n(y + c, vload_n(x + c, n) * scale + vload_n(bias + c, n), n); });
        else if (residual)
            EACH_VECTOR(cols, { vstore_n(y + c, vload_n(x + c, n) * scale + vload_n(residual + c, n), n); });
        else
            EACH_VECTOR(cols, { vstore_n(y + c, vload_n(x + c, n) * scale, n); });
        normalise(&o, y);
        if (a->quant.mult) quantize(&a->quant, y, row, cols);
    }
}

INLINE void gelu_row(const float *restrict x, const float *restrict bias, float *restrict y, int64_t cols, float scale, int approximate) {
    if (bias)
        EACH_VECTOR(cols, { vstore_n(y + c, vgelu(vload_n(x + c, n) * scale + vload_n(bias + c, n), approximate), n); });
    else
        EACH_VECTOR(cols, { vstore_n(y + c, vgelu(vload_n(x + c, n) * scale, approximate), n); });
}

static void gelu_rows(const us_gelu_args *a, int64_t begin, int64_t end, float *scratch) {
    const int64_t cols = a->cols;
    for (int64_t row = begin; row < end; row++) {
        const float *x = a->x + row * cols;
        float *y = a->y ? a->y + row * cols : scratch;
        const float scale = a->row_scale ? a->row_scale[row] : 1.0f;
        if (a->approximate)
            gelu_row(x, a->bias, y, cols, scale, 1);
        else
            gelu_row(x, a->bias, y, cols, scale, 0);
        if (a->quant.mult) quantize(&a->quant, y, row, cols);
    }
}

static void embed_rows(const us_embed_args *a, int64_t begin, int64_t end) {
    const int64_t cols = a->cols;
    const norm o = {a->gamma, a->beta, cols, a->epsilon, 0};
    for (int64_t row = begin; row < end; row++) {
        const float *restrict word = a->word + a->ids[row] * cols, *restrict position = a->position + a->positions[row] * cols;
        float *restrict y = a->y + row * cols;
        if (a->type) {
            const float *restrict type = a->type + (a->types ? a->types[row] : 0) * cols;
            EACH_VECTOR(cols, { vstore_n(y + c, vload_n(word + c, n) + vload_n(type + c, n) + vload_n(position + c, n), n); });
        } else {
            EACH_VECTOR(cols, { vstore_n(y + c, vload_n(word + c, n) + vload_n(position + c, n), n); });
        }
        normalise(&o, y);
        if (a->quant.mult) quantize(&a->quant, y, row, cols);
    }
}

int64_t ISA_NAME(us_attention_scratch)(int64_t head_dim);
void ISA_NAME(us_attention_block)(const us_attention_args *, int64_t, int64_t, int64_t, float *);
us_weights *ISA_NAME(us_pack)(const int8_t *, int64_t, int64_t);
void ISA_NAME(us_gemm_part)(const us_gemm_args *, int64_t, int64_t, int64_t, int64_t, uint8_t *);

extern const struct us_products ISA_NAME(us_products);
extern const struct us_decoder_kernels ISA_NAME(us_decoder);

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
const us_kernels ISA_NAME(us_kernels) = {
    .name = TEXT(US_ISA),
    .attention_scratch = ISA_NAME(us_attention_scratch),
    .attention_block = ISA_NAME(us_attention_block),
    .pack = ISA_NAME(us_pack),
    .gemm_part = ISA_NAME(us_gemm_part),
    .norm_rows = norm_rows,
    .gelu_rows = gelu_rows,
    .embed_rows = embed_rows,
    .quantize_rows = quantize_rows,
    .products = &ISA_NAME(us_products),
    .decoder = &ISA_NAME(us_decoder),
};
