/* Beam search over sequence-to-sequence models: attention of single rows over positions that lie anywhere in a pool, and the best tokens of a row. */
#ifndef UNDERSTUDY_BEAM_H
#define UNDERSTUDY_BEAM_H

#include "ops.h"

typedef struct {
    const float *x;          /* [rows, columns]: Q | K | V of the new token, or Q alone, each head-major */
    const float *bias;       /* [columns] or NULL */
    float *pool;             /* [slots, width]; K of this layer begins at `column`, V at column + inner */
    const int32_t *table;    /* own: [rows, steps], a slot for each position of a row; else [rows, 2]: first slot and count */
    const int32_t *lengths;  /* own: [rows], positions with the new one; else NULL */
    const float *relative;   /* [heads, span]: bias by distance, the last for all beyond; or NULL */
    float *y;                /* [rows, inner] */
    int64_t rows, columns, inner, heads, slots, width, column, steps, span;
    float scale;
    int32_t own;             /* 1: x is Q | K | V, and K and V go into the row's last slot first */
} us_beam_args;

typedef struct {
    const float *x;          /* [rows, cols] */
    float *lse;              /* [rows]: log of the sum of exponentials */
    float *values;           /* [rows, k], descending; equal values by id */
    int64_t *ids;            /* [rows, k] */
    int64_t rows, cols, k;
} us_top_args;

/* Units are rows * heads, head by head of a row; scratch: as many floats as the longest row has positions, and 3 * head_dim. */
typedef void us_beam_units(const us_beam_args *, int64_t begin, int64_t end, float *scratch);
typedef void us_top_rows(const us_top_args *, int64_t begin, int64_t end);

us_beam_units us_beam_units_base, us_beam_units_avx2, us_beam_units_avx512vnni;
us_top_rows us_top_rows_base, us_top_rows_avx2, us_top_rows_avx512vnni;

#endif
