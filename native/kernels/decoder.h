/* The operators of decoder graphs between their products: arguments, what an instruction set's build offers, and the drivers. */
#ifndef UNDERSTUDY_DECODER_H
#define UNDERSTUDY_DECODER_H

#include "ops.h"

typedef struct {
    const int64_t *ids;      /* [rows] */
    const void *table;       /* [words, cols], float32 or bfloat16 */
    const float *extra;      /* [extra_rows, cols]: ids from `words` on; NULL: none */
    float *y;                /* [rows, cols]: the row times multiplier */
    int64_t rows, cols, words, extra_rows;
    float multiplier;
    int32_t bfloat16;
} us_tokens_args;

typedef struct {
    const float *x;          /* [rows, cols] */
    const float *row_scale;  /* [rows] or NULL */
    const float *bias;       /* [cols] or NULL */
    const float *residual;   /* [rows, cols] or NULL */
    const float *inner;      /* [cols] or NULL: x is normed by its root mean square and multiplied by this before the residual is added */
    const float *gamma;      /* [cols] */
    float *s;                /* [rows, cols] or NULL: the sum */
    float *y;                /* [rows, cols], NULL with quantization: the sum, normed */
    us_quant quant;
    int64_t rows, cols;
    float epsilon;
} us_skip_args;

enum { US_SILU = 0, US_GELU_TANH = 1, US_GELU_ERF = 2 };

typedef struct {
    const float *x;          /* [rows, 2 * cols]: gate | up */
    const float *row_scale;  /* [rows] or NULL */
    const float *bias;       /* [2 * cols] or NULL */
    float *y;                /* [rows, cols], NULL with quantization */
    us_quant quant;
    int64_t rows, cols;
    int32_t kind;
} us_gated_args;

enum { US_KV_FLOAT32 = 0, US_KV_BFLOAT16 = 1, US_KV_INT8 = 2 };
enum { US_PAGE = 16 /* positions */, US_SEGMENT = 1024 /* positions that one running softmax covers; then segments are merged in order */ };

/* Paged attention. Position of token j of sequence s: past[s] + j. A page holds, for each K/V head in turn, K [dim][US_PAGE], then
 * V [US_PAGE][dim], for int8 then the float32 scales of its positions: K's, V's. */
typedef struct {
    const float *qkv;        /* [tokens, (heads + 2 * kv_heads) * dim]: Q | K | V, head-major */
    const int32_t *cu;       /* [sequences + 1] */
    const int32_t *past;     /* [sequences] */
    const int32_t *table;    /* [sequences, width]: pages in order of position */
    uint8_t *pool;           /* [layers, pages, page_bytes] */
    const float *cos, *sin;  /* [positions, half]; NULL: no rotation */
    const float *row_scale;  /* [tokens] or NULL */
    const float *bias;       /* like a row of qkv, or NULL */
    const float *q_gamma, *k_gamma; /* [dim] or NULL: each head is normed by its root mean square before it is rotated */
    float *out;              /* [tokens, heads * dim]; with per-row quantization the caller's scratch */
    us_quant quant;
    int64_t tokens, sequences, width, layers, pages, page_bytes, positions, half, heads, kv_heads, dim, layer;
    int64_t window;          /* 0: everything before; else so many positions, the query's own included */
    float scale, softcap, epsilon;
    int32_t kv_dtype;
} us_paged_args;

/* Queries [first, first + count) of a sequence, counted from its first new token, under one K/V head. */
typedef struct { int64_t sequence, kv_head, first, count; } us_paged_block;

/* One instruction set's build of these operators. */
typedef struct us_decoder_kernels {
    void (*tokens_rows)(const us_tokens_args *, int64_t begin, int64_t end);
    void (*skip_rows)(const us_skip_args *, int64_t begin, int64_t end, float *scratch);   /* scratch: 2 * cols floats */
    void (*gated_rows)(const us_gated_args *, int64_t begin, int64_t end, float *scratch); /* scratch: cols floats */
    int64_t (*paged_scratch)(const us_paged_args *, int64_t queries); /* floats that a block of so many queries needs */
    int64_t (*paged_partial)(const us_paged_args *);                  /* floats that one segment of a one-query block leaves behind */
    /* K and V of new tokens [first, first + count) of a sequence into their pages. scratch: as for a block of one query */
    void (*paged_write)(const us_paged_args *, int64_t sequence, int64_t kv_head, int64_t first, int64_t count, float *scratch);
    /* A whole block: writes out, or quant.q when quantization is static. */
    void (*paged_block)(const us_paged_args *, const us_paged_block *, float *scratch);
    /* One segment of a block of one query, into `partial`; and the sum of all its segments, in order, [segments][partial]. The same bits as
     * paged_block's. */
    void (*paged_segment)(const us_paged_args *, const us_paged_block *, int64_t segment, float *partial, float *scratch);
    void (*paged_merge)(const us_paged_args *, const us_paged_block *, const float *partials, int64_t segments, float *scratch);
} us_decoder_kernels;

const char *us_tokens(const us_kernels *, const us_tokens_args *, us_runner *);
const char *us_skip(const us_kernels *, const us_skip_args *, us_runner *);
const char *us_gated(const us_kernels *, const us_gated_args *, us_runner *);
const char *us_paged(const us_kernels *, const us_paged_args *, us_runner *);

#endif
