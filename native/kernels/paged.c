/* Attention over pages, for decode steps and prompt chunks alike. Compiled once per instruction set.
 *
 * The rows of a block are its queries times the query heads that share one K/V head, so that every key that is read (and widened from
 * bfloat16 or int8) serves several rows whichever kind of step it is. K lies [dim][US_PAGE] in its page: the lanes of a score vector are
 * positions, the sum over dim needs no transpose. V lies [US_PAGE][dim]: the lanes are dims.
 *
 * A row's bits must not depend on what else is in its block, nor on how its prompt was cut. So every sum has one order: scores go up the
 * dims one by one; the running softmax goes by tiles of positions that begin at multiples of TILE; the outputs go up the positions; and
 * what segments of US_SEGMENT positions leave is merged in their order. A position that a row must not see adds a zero to a sum, or leaves
 * the maximum as it is, which changes no bit.
 */
#include "decoder.h"
#include "rows.h"

/* Accumulators that leave room for operands, and rows that meet a key at once. */
#if defined(US_VW)
enum { REGISTERS = 4, ROWS = 3 }; /* a vector is several registers: less code, as it is only for tests */
#elif defined(__AVX512F__)
enum { REGISTERS = 24, ROWS = 6 };
#elif defined(__AVX2__)
enum { REGISTERS = 12, ROWS = 6 };
#else
enum { REGISTERS = 12, ROWS = 3 };
#endif

enum {
    TILE_PAGES = 4,
    TILE = TILE_PAGES * US_PAGE,
    PV = US_PAGE / VW              /* vectors of a page's positions */
};
#define LEAST -3.4e38f

typedef int8_t vs8 __attribute__((vector_size(VW)));

/* What a running softmax has come to, for each row: o [rows][dp], sum and most [rows]. */
typedef struct { float *o, *sum, *most; } part;

typedef struct {
    const us_paged_args *a;
    int64_t rows, group, dp, past, token;  /* token: the block's first; past: its position */
    const int32_t *pages;
    int64_t kv_head;
    float *q;              /* [row groups][dim][ROWS] */
    float *score;          /* [rows][TILE] */
    float *lanes;          /* [rows][VW]: the sums of a segment, not yet added up */
    float *keys, *values;  /* [TILE_PAGES][dim][US_PAGE], [TILE][dp]: a tile as floats */
    float *row;            /* [dp] */
    part segment, total;
} block;

/* A tile of positions: where its pages' K, V and scales lie. Elements of `type`; V's rows are dp apart. */
typedef struct {
    const void *k[TILE_PAGES], *v[TILE_PAGES];
    const float *k_scale[TILE_PAGES], *v_scale[TILE_PAGES];
    int64_t from, to; /* positions that the block may see, counted from the tile's first */
} tile;

static int64_t padded(int64_t dim) { return (dim + VW - 1) / VW * VW; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t part_floats(int64_t rows, int64_t dp) { return rows * (dp + 2); }
static part part_at(float *p, int64_t rows, int64_t dp) { return (part){p, p + rows * dp, p + rows * dp + rows}; }

static const int64_t type_bytes[] = {4, 2, 1};
static int64_t group_of(const us_paged_args *a) { return a->heads / a->kv_heads; }

int64_t ISA_NAME(us_paged_scratch)(const us_paged_args *a, int64_t queries) {
    const int64_t dp = padded(a->dim), rows = queries * group_of(a), groups = (rows + ROWS - 1) / ROWS;
    return groups * ROWS * a->dim + rows * (TILE + VW) + TILE * (a->dim + dp) + dp + 2 * part_floats(rows, dp);
}

int64_t ISA_NAME(us_paged_partial)(const us_paged_args *a) { return part_floats(group_of(a), padded(a->dim)); }

static uint8_t *page_of(const us_paged_args *a, const int32_t *pages, int64_t index, int64_t kv_head) {
    return a->pool + (a->layer * a->pages + pages[index]) * a->page_bytes + kv_head * (a->page_bytes / a->kv_heads);
}

/* y = x * cos, -x2 * sin | ...: the halves of the first 2 * half dims against each other, as GPT-NeoX has it. */
INLINE void rotate(const float *restrict cos, const float *restrict sin, int64_t half, float *restrict y) {
    for (int64_t i = 0; i < half; i++) {
        const float a = y[i], b = y[half + i];
        y[i] = a * cos[i] - b * sin[i];
        y[half + i] = b * cos[i] + a * sin[i];
    }
}

/* One head of one token as float: scaled back, biased, normed and rotated. */
static void head_row(const us_paged_args *a, int64_t token, int64_t position, int64_t column, const float *gamma, int rotated, float *y) {
    const int64_t width = (a->heads + 2 * a->kv_heads) * a->dim;
    value_row(a->qkv + token * width + column, a->bias ? a->bias + column : NULL, a->row_scale ? a->row_scale[token] : 1.0f, y, a->dim);
    if (gamma) {
        const float factor = inverse_rms(y, a->dim, a->epsilon);
        for (int64_t d = 0; d < a->dim; d++) y[d] = y[d] * factor * gamma[d];
    }
    if (rotated && a->cos) rotate(a->cos + position * a->half, a->sin + position * a->half, a->half, y);
}

/* To the nearest, ties to even; a NaN stays one. */
INLINE uint16_t bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float peak_of(const float *x, int64_t n) {
    float peak = TINY;
    for (int64_t i = 0; i < n; i++) {
        const float size = __builtin_fabsf(x[i]);
        peak = size > peak ? size : peak;
    }
    return peak;
}

/* to[i * stride] = x[i] as the pool's type; int8's scale into *scale. */
INLINE void store_row(const float *restrict x, int64_t n, int32_t type, uint8_t *restrict to, int64_t stride, float *scale) {
    if (type == US_KV_FLOAT32)
        for (int64_t i = 0; i < n; i++) ((float *)to)[i * stride] = x[i];
    else if (type == US_KV_BFLOAT16)
        for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[i * stride] = bfloat16(x[i]);
    else {
        const float peak = peak_of(x, n), factor = 127.0f / peak;
        *scale = peak / 127.0f;
        for (int64_t i = 0; i < n; i++) {
            float t = x[i] * factor;
            t = t > -127.0f ? t : -127.0f;
            t = t < 127.0f ? t : 127.0f;
            ((int8_t *)to)[i * stride] = (int8_t)(int32_t)((t + ROUND_MAGIC) - ROUND_MAGIC);
        }
    }
}

void ISA_NAME(us_paged_write)(const us_paged_args *a, int64_t sequence, int64_t kv_head, int64_t first, int64_t count, float *scratch) {
    const int64_t bytes = type_bytes[a->kv_dtype], column = (a->heads + kv_head) * a->dim;
    const int32_t *pages = a->table + sequence * a->width;
    for (int64_t j = first; j < first + count; j++) {
        const int64_t token = a->cu[sequence] + j, position = a->past[sequence] + j, slot = position % US_PAGE;
        uint8_t *page = page_of(a, pages, position / US_PAGE, kv_head), *v = page + a->dim * US_PAGE * bytes;
        float *scales = (float *)(v + a->dim * US_PAGE * bytes);
        head_row(a, token, position, column, a->k_gamma, 1, scratch);
        store_row(scratch, a->dim, a->kv_dtype, page + slot * bytes, US_PAGE, scales + slot);
        head_row(a, token, position, column + a->kv_heads * a->dim, NULL, 0, scratch);
        store_row(scratch, a->dim, a->kv_dtype, v + slot * a->dim * bytes, 1, scales + US_PAGE + slot);
    }
}

INLINE vf load_int8(const int8_t *p) {
#if defined(__AVX512F__) && !defined(US_VW)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__) && !defined(US_VW)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vs8 v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, vi), vf);
#endif
}

INLINE vf load_kv(const void *p, int64_t index, int type) {
    if (type == US_KV_FLOAT32) return vload((const float *)p + index);
    if (type == US_KV_BFLOAT16) return load_bfloat16((const uint16_t *)p + index, VW);
    return load_int8((const int8_t *)p + index);
}

/* score[row][position] = sum over d of q[d][row] * k[d][position], for R rows and the `pages` pages from `page` on */
INLINE void score_pages(const float *restrict q, int64_t dim, const tile *t, int64_t page, float *restrict score, int type, int R, int pages) {
    vf acc[ROWS][TILE_PAGES * PV];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < pages * PV; i++) acc[r][i] = vset(0);
    /* Whichever operand there are fewer of is kept in registers while the other passes. */
    for (int64_t d = 0; d < dim; d++) {
        if (R <= 3) {
#pragma GCC unroll 16
            for (int i = 0; i < pages * PV; i++) {
                const vf key = load_kv(t->k[page + i / PV], d * US_PAGE + i % PV * VW, type);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) acc[r][i] += q[d * ROWS + r] * key;
            }
            continue;
        }
        vf key[TILE_PAGES * PV];
#pragma GCC unroll 16
        for (int i = 0; i < pages * PV; i++) key[i] = load_kv(t->k[page + i / PV], d * US_PAGE + i % PV * VW, type);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const float x = q[d * ROWS + r];
#pragma GCC unroll 16
            for (int i = 0; i < pages * PV; i++) acc[r][i] += x * key[i];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int i = 0; i < pages * PV; i++) vstore(score + r * TILE + page * US_PAGE + i * VW, acc[r][i]);
}

INLINE void scores(const float *q, int64_t dim, const tile *t, int64_t from, int64_t to, float *score, int type, int R) {
    int64_t page = from / US_PAGE;
    const int64_t end = (to + US_PAGE - 1) / US_PAGE;
    if (R * PV * 4 <= REGISTERS)
        for (; page + 4 <= end; page += 4) score_pages(q, dim, t, page, score, type, R, 4);
    if (R * PV * 2 <= REGISTERS)
        for (; page + 2 <= end; page += 2) score_pages(q, dim, t, page, score, type, R, 2);
    for (; page < end; page++) score_pages(q, dim, t, page, score, type, R, 1);
}

INLINE float highest_lane(vf v) {
    float t[VW];
    vstore(t, v);
    for (int w = VW / 2; w; w /= 2)
        for (int i = 0; i < w; i++) t[i] = t[i] > t[i + w] ? t[i] : t[i + w];
    return t[0];
}

INLINE vi within(int64_t at, int64_t from, int64_t to) {
    vi lane;
    for (int i = 0; i < VW; i++) lane[i] = i;
    lane += (int32_t)at;
    return (lane >= (int32_t)from) & (lane < (int32_t)to);
}

/* cap * tanh(x / cap) */
INLINE vf soften(vf x, float cap) { return cap - 2.0f * cap / (vexp(x * (2.0f / cap)) + 1.0f); }

/* One row's scores at [from, to) become weights in place, zeros elsewhere in the vectors of [first, last); what the outputs so far must be
 * multiplied by is returned. */
INLINE float weigh(const us_paged_args *a, const tile *t, int64_t first, int64_t last, int64_t from, int64_t to, float *restrict score, float *restrict lanes, float *peak) {
    const int scaled = a->kv_dtype == US_KV_INT8, whole = from <= first && to >= last;
    const float before = *peak;
    vf high = vset(before);
    for (int64_t i = first; i < last; i += VW) {
        vf x = vload(score + i);
        if (scaled) x *= vload(t->k_scale[i / US_PAGE] + i % US_PAGE);
        if (a->softcap > 0) x = soften(x, a->softcap);
        if (!whole) x = vselect(within(i, from, to), x, vset(LEAST));
        vstore(score + i, x);
        high = vmax(x, high);
    }
    const float now = highest_lane(high);
    const vf keep = vexp(vset(before - now));
    vf sum = vload(lanes) * keep;
    for (int64_t i = first; i < last; i += VW) {
        vf e = vexp(vload(score + i) - now);
        if (!whole) e = vselect(within(i, from, to), e, vset(0));
        sum += e;
        if (scaled) e *= vload(t->v_scale[i / US_PAGE] + i % US_PAGE);
        vstore(score + i, e);
    }
    vstore(lanes, sum);
    *peak = now;
    return keep[0];
}

/* o[row][lanes of C vectors from `at`] = o * keep + sum over positions [from, to) of p[row][position] * v[position][lanes] */
INLINE void value_columns(const float *restrict p, const tile *t, int64_t from, int64_t to, float *restrict o, int64_t dp, int64_t at, const float *keep, int type, int R, int C) {
    vf acc[ROWS][8];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < C; i++) acc[r][i] = vload(o + r * dp + at + i * VW) * keep[r];
    for (int64_t k = from; k < to;) {
        const int64_t page = k / US_PAGE, end = least(to, (page + 1) * US_PAGE);
        int64_t index = k % US_PAGE * dp + at;
        for (; k < end; k++, index += dp) {
            vf v[8];
#pragma GCC unroll 8
            for (int i = 0; i < C; i++) v[i] = load_kv(t->v[page], index + i * VW, type);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int i = 0; i < C; i++) acc[r][i] += p[r * TILE + k] * v[i];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < C; i++) vstore(o + r * dp + at + i * VW, acc[r][i]);
}

INLINE void outputs(const float *p, const tile *t, int64_t from, int64_t to, float *o, int64_t dp, const float *keep, int type, int R) {
    int64_t at = 0;
    if (R * 8 <= REGISTERS)
        for (; at + 8 * VW <= dp; at += 8 * VW) value_columns(p, t, from, to, o, dp, at, keep, type, R, 8);
    if (R * 4 <= REGISTERS)
        for (; at + 4 * VW <= dp; at += 4 * VW) value_columns(p, t, from, to, o, dp, at, keep, type, R, 4);
    if (R * 2 <= REGISTERS)
        for (; at + 2 * VW <= dp; at += 2 * VW) value_columns(p, t, from, to, o, dp, at, keep, type, R, 2);
    for (; at < dp; at += VW) value_columns(p, t, from, to, o, dp, at, keep, type, R, 1);
}

/* The last position that a row sees, and the first. */
static int64_t row_high(const block *b, int64_t row) { return b->past + row / b->group; }
static int64_t row_low(const block *b, int64_t row) { return b->a->window ? most(0, row_high(b, row) - b->a->window + 1) : 0; }

/* R rows against a tile that begins at position `start`. */
INLINE void attend(const block *b, const tile *t, int64_t start, int64_t row, int type, int R) {
    const int64_t from = most(t->from, row_low(b, row) - start), to = least(t->to, row_high(b, row + R - 1) + 1 - start);
    if (from >= to) return;
    const int64_t first = from / VW * VW, last = (to + VW - 1) / VW * VW, dim = b->a->dim;
    float *score = b->score + row * TILE, keep[ROWS];
    scores(b->q + row * dim, dim, t, from, to, score, type, R);
    for (int r = 0; r < R; r++)
        keep[r] = weigh(b->a, t, first, last, most(from, row_low(b, row + r) - start), least(to, row_high(b, row + r) + 1 - start),
                        score + r * TILE, b->lanes + (row + r) * VW, b->segment.most + row + r);
    outputs(score, t, from, to, b->segment.o + row * b->dp, b->dp, keep, type, R);
}

INLINE void attend_rows(const block *b, const tile *t, int64_t start, int type) {
    for (int64_t row = 0; row < b->rows; row += ROWS) switch (least(ROWS, b->rows - row)) {
        case 1: attend(b, t, start, row, type, 1); break;
        case 2: attend(b, t, start, row, type, 2); break;
        case 3: attend(b, t, start, row, type, 3); break;
        case 4: attend(b, t, start, row, type, ROWS < 4 ? ROWS : 4); break;
        case 5: attend(b, t, start, row, type, ROWS < 5 ? ROWS : 5); break;
        default: attend(b, t, start, row, type, ROWS); break;
        }
}

/* rows x cols elements to floats, `stride` apart with zeros between. */
INLINE void widen(const void *from, int64_t rows, int64_t cols, float *restrict to, int64_t stride, int type) {
    for (int64_t i = 0; i < rows; i++, to += stride) {
        int64_t c = 0;
        for (; c + VW <= cols; c += VW) vstore(to + c, load_kv(from, i * cols + c, type));
        for (; c < cols; c++) {
            const int64_t at = i * cols + c;
            uint32_t bits;
            if (type == US_KV_FLOAT32)
                to[c] = ((const float *)from)[at];
            else if (type == US_KV_INT8)
                to[c] = ((const int8_t *)from)[at];
            else
                bits = (uint32_t)((const uint16_t *)from)[at] << 16, memcpy(to + c, &bits, sizeof bits);
        }
        for (; c < stride; c++) to[c] = 0;
    }
}

/* Points at the pages of positions [start + from, start + to). Where many rows will read them, or a row of V is no whole number of vectors,
 * they are copied as floats first; gives the type of what the tile points at. */
static int open_tile(const block *b, int64_t start, tile *t) {
    const us_paged_args *a = b->a;
    const int type = a->kv_dtype, copy = b->dp != a->dim || (type != US_KV_FLOAT32 && b->rows > ROWS);
    const int64_t area = a->dim * US_PAGE, bytes = area * type_bytes[type];
    for (int64_t page = t->from / US_PAGE; page * US_PAGE < t->to; page++) {
        const uint8_t *k = page_of(a, b->pages, start / US_PAGE + page, b->kv_head), *v = k + bytes;
        const int64_t used = least(US_PAGE, t->to - page * US_PAGE);
        t->k[page] = k, t->v[page] = v;
        t->k_scale[page] = (const float *)(v + bytes), t->v_scale[page] = t->k_scale[page] + US_PAGE;
        if (!copy) continue;
        float *keys = b->keys + page * area, *values = b->values + page * US_PAGE * b->dp;
        if (type == US_KV_FLOAT32) {
            widen(v, used, a->dim, values, b->dp, US_KV_FLOAT32);
        } else if (type == US_KV_BFLOAT16) {
            widen(k, 1, area, keys, area, US_KV_BFLOAT16), t->k[page] = keys;
            widen(v, used, a->dim, values, b->dp, US_KV_BFLOAT16);
        } else {
            widen(k, 1, area, keys, area, US_KV_INT8), t->k[page] = keys;
            widen(v, used, a->dim, values, b->dp, US_KV_INT8);
        }
        t->v[page] = values;
    }
    return copy ? US_KV_FLOAT32 : type;
}

/* One segment of positions, for all rows, into b->segment. */
static void run_segment(const block *b, int64_t segment) {
    const int64_t low = row_low(b, 0), end = least(row_high(b, b->rows - 1) + 1, (segment + 1) * US_SEGMENT);
    memset(b->segment.o, 0, (size_t)(b->rows * b->dp) * sizeof(float));
    memset(b->lanes, 0, (size_t)(b->rows * VW) * sizeof(float));
    for (int64_t r = 0; r < b->rows; r++) b->segment.most[r] = LEAST;
    for (int64_t start = most(segment * US_SEGMENT, low / TILE * TILE); start < end; start += TILE) {
        tile t = {.from = most(0, low - start), .to = least(TILE, end - start)};
        switch (open_tile(b, start, &t)) {
        case US_KV_FLOAT32: attend_rows(b, &t, start, US_KV_FLOAT32); break;
        case US_KV_BFLOAT16: attend_rows(b, &t, start, US_KV_BFLOAT16); break;
        default: attend_rows(b, &t, start, US_KV_INT8); break;
        }
    }
    for (int64_t r = 0; r < b->rows; r++) b->segment.sum[r] = vsum(vload(b->lanes + r * VW));
}

/* total = total and then next, row by row. */
static void merge(const block *b, part total, part next) {
    for (int64_t r = 0; r < b->rows; r++) {
        const float high = next.most[r] > total.most[r] ? next.most[r] : total.most[r];
        const float old = vexp(vset(total.most[r] - high))[0], add = vexp(vset(next.most[r] - high))[0];
        float *restrict o = total.o + r * b->dp;
        const float *restrict from = next.o + r * b->dp;
        for (int64_t c = 0; c < b->dp; c += VW) vstore(o + c, vload(o + c) * old + vload(from + c) * add);
        total.sum[r] = total.sum[r] * old + next.sum[r] * add;
        total.most[r] = high;
    }
}

/* Divides by the softmax's sums and writes the rows, as floats or quantized. */
static void finish(const block *b, part total) {
    const us_paged_args *a = b->a;
    for (int64_t r = 0; r < b->rows; r++) {
        const int64_t column = (b->kv_head * b->group + r % b->group) * a->dim, at = (b->token + r / b->group) * a->heads * a->dim + column;
        const float inverse = 1.0f / total.sum[r];
        float *o = total.o + r * b->dp;
        for (int64_t c = 0; c < b->dp; c += VW) vstore(o + c, vload(o + c) * inverse);
        if (a->quant.mult && !a->quant.per_row)
            quantize_row(o, a->quant.mult + column, a->quant.q + at, a->dim, 1.0f, a->quant.zero_point);
        else
            memcpy(a->out + at, o, (size_t)a->dim * sizeof(float));
    }
}

static block open_block(const us_paged_args *a, const us_paged_block *at, float *p) {
    const int64_t dp = padded(a->dim), group = group_of(a), rows = at->count * group, groups = (rows + ROWS - 1) / ROWS;
    block b = {.a = a, .rows = rows, .group = group, .dp = dp, .past = a->past[at->sequence] + at->first, .kv_head = at->kv_head,
               .token = a->cu[at->sequence] + at->first, .pages = a->table + at->sequence * a->width};
    b.q = p, p += groups * ROWS * a->dim;
    b.score = p, p += rows * TILE;
    b.lanes = p, p += rows * VW;
    b.keys = p, p += TILE * a->dim;
    b.values = p, p += TILE * dp;
    b.row = p, p += dp;
    b.segment = part_at(p, rows, dp), p += part_floats(rows, dp);
    b.total = part_at(p, rows, dp);
    return b;
}

static void load_queries(const block *b) {
    const us_paged_args *a = b->a;
    for (int64_t r = 0; r < b->rows; r++) {
        const int64_t head = b->kv_head * b->group + r % b->group, query = r / b->group;
        head_row(a, b->token + query, b->past + query, head * a->dim, a->q_gamma, 1, b->row);
        float *restrict q = b->q + r / ROWS * ROWS * a->dim + r % ROWS;
        for (int64_t d = 0; d < a->dim; d++) q[d * ROWS] = b->row[d] * a->scale;
    }
}

void ISA_NAME(us_paged_block_run)(const us_paged_args *a, const us_paged_block *at, float *scratch) {
    const block b = open_block(a, at, scratch);
    const int64_t first = row_low(&b, 0) / US_SEGMENT, last = row_high(&b, b.rows - 1) / US_SEGMENT;
    load_queries(&b);
    run_segment(&b, first);
    if (first < last) memcpy(b.total.o, b.segment.o, (size_t)part_floats(b.rows, b.dp) * sizeof(float));
    for (int64_t s = first + 1; s <= last; s++) {
        run_segment(&b, s);
        merge(&b, b.total, b.segment);
    }
    finish(&b, first < last ? b.total : b.segment);
}

void ISA_NAME(us_paged_segment)(const us_paged_args *a, const us_paged_block *at, int64_t segment, float *partial, float *scratch) {
    block b = open_block(a, at, scratch);
    b.segment = part_at(partial, b.rows, b.dp);
    load_queries(&b);
    run_segment(&b, segment);
}

void ISA_NAME(us_paged_merge)(const us_paged_args *a, const us_paged_block *at, const float *partials, int64_t segments, float *scratch) {
    const block b = open_block(a, at, scratch);
    const int64_t floats = part_floats(b.rows, b.dp);
    memcpy(b.total.o, partials, (size_t)floats * sizeof(float));
    for (int64_t s = 1; s < segments; s++) merge(&b, b.total, part_at((float *)partials + s * floats, b.rows, b.dp));
    finish(&b, b.total);
}
