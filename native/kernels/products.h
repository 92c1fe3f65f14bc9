/* Products of decoders and the adapters inside them: float weights, 4-bit weights, and what all three products share. */
#ifndef UNDERSTUDY_PRODUCTS_H
#define UNDERSTUDY_PRODUCTS_H

#include "ops.h"

enum { US_COLS = 16 /* of a panel */, US_GROUP = 4 /* rows of B that one integer instruction takes */ };

/* The bank of adapters, and the one of each row. Of slot s and a row of the layout (a, b, first column of y, outputs, target, inputs), for the
   ranks r < ranks[s, target]: A is bank[s, r, a : a + inputs], B transposed is bank[s, r, b : b + outputs]. */
typedef struct us_lora {
    const int32_t *ids;      /* [rows], negative: none; NULL: no adapters at all */
    const void *bank;        /* [slots, rank, width] floats, or bfloat16 bits */
    const int32_t *ranks;    /* [slots, targets] */
    const int64_t *layout;   /* [parts, US_LORA_FIELDS] */
    int64_t slots, rank, width, targets, parts;
    int32_t bfloat16;
} us_lora;

enum { US_LORA_A, US_LORA_B, US_LORA_FIRST, US_LORA_OUTPUTS, US_LORA_TARGET, US_LORA_INPUTS, US_LORA_FIELDS };

/* Rows order[begin .. end) have the adapter in `slot`. */
typedef struct { int32_t slot, begin, end; } us_lora_piece;

/* One call's rows with adapters, the rows of one adapter together and ascending. */
typedef struct {
    const us_lora *lora;
    int64_t count, pieces;   /* 0: no row has an adapter */
    int64_t depth, cols;
    int32_t *order;          /* [count] */
    us_lora_piece *piece;    /* [pieces] */
    float *hidden;           /* [count, parts, rank]: A x */
    const float *x;          /* [rows, depth], or NULL and the true inputs are (q - zero) / mult * row_scale */
    const uint8_t *q;
    const float *mult;       /* [depth] */
    float *inverse;          /* [depth]: 1 / mult */
    const float *row_scale;  /* [rows] or NULL */
    float zero;
} us_lora_plan;

/* B [depth, cols] in panels of 16 columns, [panels][depth][16]; columns past the last are zero. */
typedef struct { int64_t depth, cols, panels; float *data; } us_float_weights;

typedef struct {
    const float *a;          /* [rows, depth] */
    const float *b;          /* [depth, cols]: direct calls only, which pack it */
    const us_float_weights *weights;
    float *y;                /* [rows, cols] */
    int64_t rows, depth, cols;
    const us_lora *lora;     /* or NULL */
} us_float_gemm_args;

typedef struct {
    const float *a;          /* [rows, depth] */
    const uint8_t *b;        /* [panels, padded depth / 4, 32]; see pack_int4 in twins_products.py */
    const uint16_t *scale;   /* [panels, blocks, 16] bfloat16 bits */
    float *y;                /* [rows, cols] */
    int64_t rows, depth, cols, block;
    const us_lora *lora;     /* or NULL */
} us_int4_gemm_args;

/* Activations rounded to s8, symmetric, one scale a row and block. */
typedef struct {
    int8_t *q;               /* [rows, blocks * block] */
    float *scale;            /* [rows, blocks] */
    int32_t *shift;          /* [rows, blocks]: -8 times the sum of a block's q, as a stored weight is 8 more than it stands for */
    int64_t blocks;
} us_int4_activations;

typedef struct {
    const float *x;          /* [rows, depth] */
    const float *y;          /* [rows, cols] */
    float *out;              /* [rows, cols] */
    int64_t rows, depth, cols;
    const us_lora *lora;
} us_lora_add_args;

/* One instruction set's build. */
typedef struct us_products {
    /* rows [begin, end) by panels [first, last) */
    void (*float_part)(const us_float_gemm_args *, int64_t begin, int64_t end, int64_t first, int64_t last);
    void (*int4_quantize)(const us_int4_gemm_args *, const us_int4_activations *, int64_t begin, int64_t end);
    void (*int4_part)(const us_int4_gemm_args *, const us_int4_activations *, int64_t begin, int64_t end, int64_t first, int64_t last);
    /* the true inputs of a piece's rows, [rows of the piece, depth]; for plans without x */
    void (*lora_inputs)(const us_lora_plan *, int64_t piece, float *inputs);
    /* hidden of one piece and one part; inputs: see above, NULL where the plan has x */
    void (*lora_down)(const us_lora_plan *, int64_t piece, int64_t part, const float *inputs);
    /* y [rows, cols] += B hidden for rows [begin, end) and columns [first, last) */
    void (*lora_up)(const us_lora_plan *, float *y, int64_t begin, int64_t end, int64_t first, int64_t last);
} us_products;

us_float_weights *us_float_pack(const float *b, int64_t depth, int64_t cols); /* NULL when memory is out */
void us_free_float_weights(us_float_weights *);

const char *us_float_gemm(const us_kernels *, const us_float_gemm_args *, us_runner *);
const char *us_int4_gemm(const us_kernels *, const us_int4_gemm_args *, us_runner *);
const char *us_lora_add(const us_kernels *, const us_lora_add_args *, us_runner *);

#endif
