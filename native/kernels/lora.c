/* Adapters of low rank: y += B (A x) with another A and B for each row. Compiled once per instruction set.
 *
 * Both halves are bound by reading the bank, so the rows of one adapter go together. An element's sum has one order, whatever its neighbours:
 * lanes over the depth and then the lanes for A x, ranks one after the other for B.
 */
#include "products.h"
#include "simd.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define ISA_NAME(name) JOIN(name, US_ISA)

enum { RANKS = 4, TOKENS = 2 /* of a tile of A x */, WIDE = 2, MANY = 4 /* vectors and tokens of a tile of B h */ };

typedef uint16_t vh __attribute__((vector_size(VW * 2)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));

/* n floats of the bank from element `at` on; the other lanes are zero */
INLINE vf load(const void *bank, int64_t at, int64_t n, int bfloat16) {
    if (!bfloat16) return vload_n((const float *)bank + at, n);
    vh bits = {0};
    const uint16_t *from = (const uint16_t *)bank + at;
    if (n == VW)
        memcpy(&bits, from, sizeof bits);
    else
        for (int64_t i = 0; i < n; i++) bits[i] = from[i];
    return (vf)(__builtin_convertvector(bits, vu) << 16);
}

typedef union { vf whole; v4f quarter[VW / 4]; } split;

/* The sums of the lanes of four vectors, each in the same order whatever the other three are. */
INLINE void sum_lanes(const vf v[RANKS], float to[RANKS]) {
    v4f part[RANKS];
#pragma GCC unroll 4
    for (int r = 0; r < RANKS; r++) {
        const split s = {v[r]};
        part[r] = s.quarter[0];
#pragma GCC unroll 4
        for (int i = 1; i < VW / 4; i++) part[r] += s.quarter[i];
    }
    const v4i low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, left = {0, 1, 4, 5}, right = {2, 3, 6, 7};
    const v4f a = __builtin_shuffle(part[0], part[1], low) + __builtin_shuffle(part[0], part[1], high);
    const v4f b = __builtin_shuffle(part[2], part[3], low) + __builtin_shuffle(part[2], part[3], high);
    v4store(to, __builtin_shuffle(a, b, left) + __builtin_shuffle(a, b, right));
}

/* Some rows of x by some rows of A, whose first is at element `at` of the bank. The kind of tile is always a constant. */
typedef struct { const us_lora *lora; int64_t at, depth; const float *x[TOKENS]; } down_tile;
typedef struct { int tokens, ranks, bfloat16; } kind;

INLINE void add_products(vf acc[TOKENS][RANKS], const down_tile *d, int64_t k, int64_t n, kind of) {
    vf a[RANKS];
#pragma GCC unroll 4
    for (int r = 0; r < of.ranks; r++) a[r] = load(d->lora->bank, d->at + r * d->lora->width + k, n, of.bfloat16);
#pragma GCC unroll 2
    for (int t = 0; t < of.tokens; t++) {
        const vf v = vload_n(d->x[t] + k, n);
#pragma GCC unroll 4
        for (int r = 0; r < of.ranks; r++) acc[t][r] = vfma(v, a[r], acc[t][r]);
    }
}

/* h[t, r] = A[r] x[t] */
INLINE void dots(const down_tile *d, float h[TOKENS][RANKS], kind of) {
    vf acc[TOKENS][RANKS];
#pragma GCC unroll 2
    for (int t = 0; t < of.tokens; t++)
#pragma GCC unroll 4
        for (int r = 0; r < RANKS; r++) acc[t][r] = (vf){0};
    int64_t k = 0;
    for (; k + VW <= d->depth; k += VW) add_products(acc, d, k, VW, of);
    if (k < d->depth) add_products(acc, d, k, d->depth - k, of);
#pragma GCC unroll 2
    for (int t = 0; t < of.tokens; t++) sum_lanes(acc[t], h[t]);
}

INLINE void dots_of(const down_tile *d, float h[TOKENS][RANKS], int tokens, int ranks) {
    if (d->lora->bfloat16)
        dots(d, h, (kind){tokens, ranks, 1});
    else
        dots(d, h, (kind){tokens, ranks, 0});
}

/* A row's true inputs */
static void dequantize(const us_lora_plan *p, int64_t row, float *restrict to) {
    const uint8_t *restrict q = p->q + row * p->depth;
    const float *restrict inverse = p->inverse;
    const float scale = p->row_scale ? p->row_scale[row] : 1.0f, zero = p->zero;
    for (int64_t k = 0; k < p->depth; k++) to[k] = ((float)q[k] - zero) * (inverse[k] * scale);
}

void ISA_NAME(us_lora_inputs)(const us_lora_plan *p, int64_t index, float *scratch) {
    const us_lora_piece piece = p->piece[index];
    for (int64_t i = piece.begin; i < piece.end; i++) dequantize(p, p->order[i], scratch + (i - piece.begin) * p->depth);
}

void ISA_NAME(us_lora_down)(const us_lora_plan *p, int64_t index, int64_t part, const float *scratch) {
    const us_lora *l = p->lora;
    const us_lora_piece piece = p->piece[index];
    const int64_t *layout = l->layout + part * US_LORA_FIELDS;
    const int64_t rank = l->ranks[piece.slot * l->targets + layout[US_LORA_TARGET]], begin = piece.slot * l->rank * l->width + layout[US_LORA_A];
    for (int64_t r = 0; r < rank; r += RANKS) {
        const int ranks = rank - r < RANKS ? 1 : RANKS;
        for (int64_t i = piece.begin, tokens; i < piece.end; i += tokens) {
            tokens = piece.end - i < TOKENS ? 1 : TOKENS;
            down_tile d = {.lora = l, .depth = p->depth};
            float h[TOKENS][RANKS];
            for (int64_t t = 0; t < tokens; t++) d.x[t] = p->x ? p->x + p->order[i + t] * p->depth : scratch + (i - piece.begin + t) * p->depth;
            for (int64_t some = 0; some < (ranks == RANKS ? 1 : rank - r); some++) {
                d.at = begin + (r + some) * l->width;
                if (ranks == RANKS && tokens == TOKENS)
                    dots_of(&d, h, TOKENS, RANKS);
                else if (ranks == RANKS)
                    dots_of(&d, h, 1, RANKS);
                else if (tokens == TOKENS)
                    dots_of(&d, h, TOKENS, 1);
                else
                    dots_of(&d, h, 1, 1);
                for (int64_t t = 0; t < tokens; t++)
                    memcpy(p->hidden + ((i + t) * l->parts + part) * l->rank + r + some, h[t], (size_t)ranks * sizeof(float));
            }
        }
    }
}

typedef struct {
    const us_lora *lora;
    int64_t rank, at;             /* ranks, and the element of the bank where this tile's columns of B begin */
    const float *hidden[MANY];
    float *y[MANY];               /* at the tile's first column */
    float inverse[MANY];          /* 1 / row_scale */
} up_tile;

/* y[t] += sum of h[t, r] * B[r] over n columns, at most WIDE vectors */
INLINE void combine(const up_tile *u, int64_t n, int tokens, int bfloat16) {
    vf acc[MANY][WIDE];
    const int64_t n0 = n < VW ? n : VW, n1 = n - n0;
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) acc[t][0] = acc[t][1] = (vf){0};
    for (int64_t r = 0; r < u->rank; r++) {
        const int64_t at = u->at + r * u->lora->width;
        const vf b0 = load(u->lora->bank, at, n0, bfloat16), b1 = n1 ? load(u->lora->bank, at + VW, n1, bfloat16) : (vf){0};
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            const vf h = vset(u->hidden[t][r]);
            acc[t][0] = vfma(h, b0, acc[t][0]);
            acc[t][1] = vfma(h, b1, acc[t][1]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
        const vf inverse = vset(u->inverse[t]);
        vstore_n(u->y[t], vfma(acc[t][0], inverse, vload_n(u->y[t], n0)), n0);
        if (n1) vstore_n(u->y[t] + VW, vfma(acc[t][1], inverse, vload_n(u->y[t] + VW, n1)), n1);
    }
}

INLINE void combine_tokens(const up_tile *u, int64_t n, int tokens) {
    const int full = n == WIDE * VW; /* a constant for the loop without tails */
    if (u->lora->bfloat16)
        full ? combine(u, WIDE * VW, tokens, 1) : combine(u, n, tokens, 1);
    else
        full ? combine(u, WIDE * VW, tokens, 0) : combine(u, n, tokens, 0);
}

typedef struct { const us_lora_plan *plan; float *y; const us_lora_piece *piece; int64_t first, last; } up_range;

/* The rows order[i .. i + tokens) by the columns of one part that lie in the range */
static void up_rows(const up_range *range, int64_t i, int tokens, int64_t part) {
    const us_lora_plan *p = range->plan;
    const us_lora *l = p->lora;
    const us_lora_piece *piece = range->piece;
    const int64_t *layout = l->layout + part * US_LORA_FIELDS, start = layout[US_LORA_FIRST], stop = start + layout[US_LORA_OUTPUTS];
    const int64_t first = range->first > start ? range->first : start, last = range->last < stop ? range->last : stop;
    up_tile u = {.lora = l, .rank = l->ranks[piece->slot * l->targets + layout[US_LORA_TARGET]]};
    if (!u.rank || first >= last) return;
    u.at = piece->slot * l->rank * l->width + layout[US_LORA_B] + first - start;
    for (int t = 0; t < tokens; t++) {
        const int64_t row = p->order[i + t];
        u.hidden[t] = p->hidden + ((i + t) * l->parts + part) * l->rank;
        u.y[t] = range->y + row * p->cols + first;
        u.inverse[t] = p->row_scale ? 1.0f / p->row_scale[row] : 1.0f;
    }
    for (int64_t c = first, n; c < last; c += n) {
        n = last - c < WIDE * VW ? last - c : WIDE * VW;
        if (tokens == MANY)
            combine_tokens(&u, n, MANY);
        else if (tokens == 2)
            combine_tokens(&u, n, 2);
        else
            combine_tokens(&u, n, 1);
        u.at += n;
        for (int t = 0; t < tokens; t++) u.y[t] += n;
    }
}

void ISA_NAME(us_lora_up)(const us_lora_plan *p, float *y, int64_t begin, int64_t end, int64_t first, int64_t last) {
    for (int64_t index = 0; index < p->pieces; index++) {
        const us_lora_piece *piece = p->piece + index;
        int64_t from = piece->begin, to = piece->end;
        while (from < to && p->order[from] < begin) from++;
        while (to > from && p->order[to - 1] >= end) to--;
        const up_range range = {p, y, piece, first, last};
        for (int64_t part = 0; part < p->lora->parts; part++)
            for (int64_t i = from, tokens; i < to; i += tokens) {
                tokens = to - i >= MANY ? MANY : to - i >= 2 ? 2 : 1;
                up_rows(&range, i, (int)tokens, part);
            }
    }
}
