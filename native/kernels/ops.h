/* What the instruction-set builds of the kernels offer, and the drivers that split their work over threads. */
#ifndef UNDERSTUDY_OPS_H
#define UNDERSTUDY_OPS_H

#include <stddef.h>
#include <stdint.h>

/* How a row of floats becomes u8. scale == NULL: q = clamp(rint(w * mult[c]) + zero_point); else one scale a row is found and written. */
typedef struct {
    const float *mult; /* [cols]; NULL: no quantized output */
    uint8_t *q;        /* [rows, cols] */
    float *scale;      /* [rows], written when per_row */
    int32_t zero_point;
    int32_t per_row;
} us_quant;

typedef struct {
    const float *qkv;        /* [tokens, 3 * hidden]: Q | K | V, each head-major */
    const int32_t *cu;       /* [sequences + 1], checked by the driver */
    const float *row_scale;  /* [tokens] or NULL */
    const float *bias;       /* [3 * hidden] or NULL */
    const float *rel_bias;   /* [heads, 2 * rel_span - 1] or NULL */
    float *out;              /* [tokens, hidden]; with per-row quantization the caller's scratch */
    us_quant quant;
    int64_t tokens, sequences, hidden, heads, rel_span;
    float scale;
} us_attention_args;

typedef struct {
    const float *x;          /* [rows, cols] */
    const float *row_scale;  /* [rows] or NULL */
    const float *bias;       /* [cols] or NULL */
    const float *residual;   /* [rows, cols] or NULL */
    const float *gamma;      /* [cols]; NULL: no norm */
    const float *beta;       /* [cols] or NULL */
    float *y;                /* [rows, cols] */
    us_quant quant;
    int64_t rows, cols;
    float epsilon;
    int32_t rms;
} us_norm_args;

typedef struct {
    const float *x;          /* [rows, cols] */
    const float *row_scale;  /* [rows] or NULL */
    const float *bias;       /* [cols] or NULL */
    float *y;                /* [rows, cols], or NULL with quantization */
    us_quant quant;
    int64_t rows, cols;
    int32_t approximate;
} us_gelu_args;

typedef struct {
    const int64_t *ids, *positions, *types;      /* [rows]; types may be NULL */
    const float *word, *position, *type;         /* [words, cols], [max_positions, cols], [type_count, cols] or NULL */
    const float *gamma, *beta;                   /* [cols]; beta may be NULL */
    float *y;                                    /* [rows, cols] */
    us_quant quant;
    int64_t rows, cols, words, max_positions, type_count;
    float epsilon;
} us_embed_args;

/* B [depth, cols] as one instruction set's product wants it; made by that set's pack. */
typedef struct {
    int64_t depth, cols, steps, panels;
    int8_t *data;
    int32_t *column_sums;    /* [panels * 16] */
    int32_t *offsets;        /* [panels, steps, 2]: the first rows of B of a step's two groups, in packed order */
    int32_t *ends;           /* [panels, 2]: where the steps end of which four products, and of which two, fit 16 bits together */
} us_weights;

typedef struct {
    const uint8_t *a;        /* [rows, depth] */
    const int8_t *b;         /* [depth, cols]: direct calls only, which pack it */
    const us_weights *weights;
    const float *b_scale;    /* [cols] */
    float *y;                /* [rows, cols]: (a - a_zero) b * (a_scale * b_scale) */
    int64_t rows, depth, cols;
    float a_scale;
    int32_t a_zero;
    const struct us_lora *lora; /* or NULL; with adapters: */
    const float *mult;       /* [depth]: an input is (a - a_zero) / mult * row_scale */
    const float *row_scale;  /* [rows] or NULL */
} us_gemm_args;

void us_free_weights(us_weights *);

enum { US_QUERY_BLOCK = 128, US_KEY_TILE = 128, US_MAX_HEAD_DIM = 256 };

/* One instruction set's build. Ranges are [begin, end) rows; `scratch` belongs to the calling task alone. */
typedef struct {
    const char *name;
    int64_t (*attention_scratch)(int64_t head_dim); /* floats */
    /* queries [block * US_QUERY_BLOCK, ...) of one head of one sequence; writes out, or quant.q when quantization is static */
    void (*attention_block)(const us_attention_args *, int64_t sequence, int64_t head, int64_t block, float *scratch);
    void (*norm_rows)(const us_norm_args *, int64_t begin, int64_t end);
    void (*gelu_rows)(const us_gelu_args *, int64_t begin, int64_t end, float *scratch); /* scratch: cols floats */
    void (*embed_rows)(const us_embed_args *, int64_t begin, int64_t end);
    us_weights *(*pack)(const int8_t *b, int64_t depth, int64_t cols); /* NULL when memory is out */
    /* rows [begin, end) by 16-column panels [first, last); scratch: (end - begin) * (depth + 8) bytes */
    void (*gemm_part)(const us_gemm_args *, int64_t begin, int64_t end, int64_t first, int64_t last, uint8_t *scratch);
    void (*quantize_rows)(const us_quant *, const float *w, int64_t cols, int64_t begin, int64_t end);
    const struct us_products *products; /* see products.h */
    const struct us_decoder_kernels *decoder; /* see decoder.h */
} us_kernels;

extern const us_kernels us_kernels_base, us_kernels_avx2, us_kernels_avx512vnni;

/* Runs task(data, 0 .. count - 1), in any order and at once; returns NULL, or what the runner says went wrong. */
typedef struct {
    void *(*run)(void *pool, void (*task)(void *, size_t), size_t count, void *data);
    void *pool;
    void *failure;  /* the first non-NULL result of run */
} us_runner;

/* The drivers check what the caller cannot know to be sound and return NULL, or a message that is good until the thread's next call. */
const char *us_attention(const us_kernels *, const us_attention_args *, us_runner *);
const char *us_norm(const us_kernels *, const us_norm_args *, us_runner *);
const char *us_gelu(const us_kernels *, const us_gelu_args *, us_runner *);
const char *us_embed(const us_kernels *, const us_embed_args *, us_runner *);
const char *us_gemm(const us_kernels *, const us_gemm_args *, us_runner *);

/* The build for this processor, or the one named by UNDERSTUDY_KERNEL_ISA (read once); NULL and a message if that cannot run here. */
const us_kernels *us_choose(const char **why_not);
const char *us_message(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
