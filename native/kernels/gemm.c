/* u8 activations times s8 weights with exact 32-bit sums. Compiled once per instruction set.
 *
 * AVX2 multiplies u8 by s8 only with pairs of products added in 16 bits (saturating), then pairs of those in 32 bits: two multiplications for
 * 32 products. Where the weights prove that four products fit 16 bits for any activation (255 * 128 < 2^15, so the positive weights among
 * the four, and the negative ones, must sum to 128 at most), two results can be added in 16 bits first, and three multiplications do 64
 * products. Sums of integers do not mind their order, so packing is free to marry groups of four rows of B that keep this bound together:
 * the largest first, each with the largest that it can bear. Of 8-bit weights of normal spread that finds a partner for 97 to 100 % where no
 * two neighbours exceed the bound themselves; all other weights are slower and exact all the same. VNNI needs none of this.
 */
#include "ops.h"
#include "simd.h"

#include <stdlib.h>

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define ISA_NAME(name) JOIN(name, US_ISA)

enum {
    COLS = 16,           /* of a panel */
    GROUP = 4,           /* rows of B that one instruction takes */
    GROUP_BYTES = COLS * GROUP,
    STEP_BYTES = 2 * GROUP_BYTES, /* a step is two groups, from anywhere in the panel */
    LANES = COLS * 2,    /* 16-bit sums of a group: two pairs of rows for each column */
    BOUND = 128,
    TRIES = 48           /* partners that a group is held against */
};

#if defined(__AVX512VNNI__) && !defined(US_VW)
#define US_VNNI
#endif
#if defined(US_VNNI) || (defined(US_VW) && US_VW == 16) /* tests: the same code, its one instruction in C */
#define US_DOT
#endif
/* MARRIED: sums of 16 bits are used, and packing looks for groups that go together. A tile has as many rows as there are accumulators for. */
#if defined(US_DOT) || !defined(__AVX2__) || defined(US_VW)
enum { MARRIED = 0, ROWS = 8 };
#else
enum { MARRIED = 1, ROWS = 4 };
#endif

/* A group holds [column][row]; its first eight columns come first, so that it is two vectors. */
static int64_t at(int64_t row, int64_t column) { return column * GROUP + row; }

enum { QUADS, PAIRS, SINGLES }; /* how many products of a step fit 16 bits together: four, two, one */

/* What one group adds to each 16-bit sum at most, upwards and downwards. */
typedef struct { uint8_t up[LANES], down[LANES]; } reach;

typedef struct {
    int8_t *groups;      /* [groups][GROUP_BYTES] in the order of B */
    reach *reaches;
    int32_t *order;      /* groups, the farthest reach first */
    int32_t *spare;      /* while they are sorted; then, for each place of the order, the next one that is free */
    uint16_t *hardness;
    uint8_t *taken;
} workshop;

/* Saturates at 255; anything over BOUND is equally bad. */
static reach reach_of(const int8_t *group, uint16_t *hardness) {
    reach r = {{0}, {0}};
    int most = 0, sum = 0;
    for (int lane = 0; lane < LANES; lane++) {
        const int a = group[2 * lane], b = group[2 * lane + 1];
        const int up = (a > 0 ? a : 0) + (b > 0 ? b : 0), down = (a < 0 ? -a : 0) + (b < 0 ? -b : 0);
        r.up[lane] = (uint8_t)(up > 255 ? 255 : up);
        r.down[lane] = (uint8_t)(down > 255 ? 255 : down);
        most = up > most ? up : most;
        most = down > most ? down : most;
        sum += up + down;
    }
    *hardness = (uint16_t)((most > 255 ? 255 : most) * 256 + (sum / 33 > 255 ? 255 : sum / 33));
    return r;
}

static int marry(const reach *a, const reach *b) {
    int bad = 0;
    for (int lane = 0; lane < LANES; lane++) bad |= (a->up[lane] + b->up[lane] > BOUND) | (a->down[lane] + b->down[lane] > BOUND);
    return !bad;
}

/* The hardest first: a counting sort by the high byte of hardness, the reach, after one by the low byte. */
static void sort_by_hardness(workshop *s, int64_t groups) {
    for (int64_t i = 0; i < groups; i++) s->spare[i] = (int32_t)i;
    for (int shift = 0; shift <= 8; shift += 8) {
        int32_t place[257] = {0};
        int32_t *from = shift ? s->order : s->spare, *to = shift ? s->spare : s->order;
        for (int64_t i = 0; i < groups; i++) place[256 - (s->hardness[from[i]] >> shift & 255)]++;
        for (int i = 0; i < 256; i++) place[i + 1] += place[i];
        for (int64_t i = 0; i < groups; i++) to[place[255 - (s->hardness[from[i]] >> shift & 255)]++] = from[i];
    }
    memcpy(s->order, s->spare, (size_t)groups * sizeof *s->order);
}

static void add_to_panel(us_weights *w, int64_t panel, int64_t step, const workshop *s, int32_t a, int32_t b) {
    int8_t *to = w->data + (panel * w->steps + step) * STEP_BYTES;
    memcpy(to, s->groups + a * GROUP_BYTES, GROUP_BYTES);
    memcpy(to + GROUP_BYTES, s->groups + b * GROUP_BYTES, GROUP_BYTES);
    w->offsets[2 * (panel * w->steps + step)] = a * GROUP;
    w->offsets[2 * (panel * w->steps + step) + 1] = b * GROUP;
}

static void marry_panel(us_weights *w, int64_t panel, workshop *s, int64_t groups) {
    for (int64_t g = 0; g < groups; g++) s->reaches[g] = reach_of(s->groups + g * GROUP_BYTES, &s->hardness[g]);
    sort_by_hardness(s, groups);
    int32_t *next = s->spare;
    for (int64_t i = 0; i < groups; i++) next[i] = (int32_t)i + 1;
    int64_t step = 0;
    for (int64_t i = 0; i < groups; i++) {
        const int32_t one = s->order[i];
        if (s->taken[one] || s->hardness[one] >= (BOUND + 1) * 256) continue;
        int64_t before = i, tries = 0;
        for (int64_t j = next[i]; j < groups && tries < TRIES; before = j, j = next[j], tries++) {
            const int32_t other = s->order[j];
            if (!marry(&s->reaches[one], &s->reaches[other])) continue;
            s->taken[one] = s->taken[other] = 1;
            next[before] = next[j];
            add_to_panel(w, panel, step++, s, one, other);
            break;
        }
    }
    w->ends[2 * panel] = (int32_t)step;
    /* The rest goes two by two from the gentle end: only the last of them can break the bound by themselves. */
    int32_t waiting = -1;
    w->ends[2 * panel + 1] = (int32_t)step;
    for (int64_t i = groups - 1; i >= 0; i--) {
        const int32_t one = s->order[i];
        if (s->taken[one]) continue;
        if (waiting < 0) {
            waiting = one;
            continue;
        }
        add_to_panel(w, panel, step++, s, waiting, one);
        if (s->hardness[one] < (BOUND + 1) * 256) w->ends[2 * panel + 1] = (int32_t)step;
        waiting = -1;
    }
}

static void pack_panel(us_weights *w, const int8_t *b, int64_t panel, workshop *s) {
    const int64_t first = panel * COLS, n = w->cols - first < COLS ? w->cols - first : COLS, groups = 2 * w->steps;
    int32_t *sums = w->column_sums + first;
    memset(s->groups, 0, (size_t)(groups * GROUP_BYTES));
    memset(s->taken, 0, (size_t)groups);
    for (int64_t k = 0; k < w->depth; k++) {
        const int8_t *row = b + k * w->cols + first;
        int8_t *group = s->groups + k / GROUP * GROUP_BYTES;
        for (int64_t c = 0; c < n; c++) {
            group[at(k % GROUP, c)] = row[c];
            sums[c] += row[c];
        }
    }
    if (MARRIED)
        marry_panel(w, panel, s, groups);
    else
        for (int64_t i = 0; i < groups; i += 2) add_to_panel(w, panel, i / 2, s, (int32_t)i, (int32_t)i + 1);
    if (!MARRIED) w->ends[2 * panel] = w->ends[2 * panel + 1] = (int32_t)w->steps;
}

static us_weights *pack(const int8_t *b, int64_t depth, int64_t cols) {
    const int64_t steps = (depth + 2 * GROUP - 1) / (2 * GROUP), panels = (cols + COLS - 1) / COLS;
    us_weights *w = aligned_alloc(64, (sizeof *w + 63) & ~(size_t)63);
    if (!w) return NULL;
    *w = (us_weights){.depth = depth, .cols = cols, .steps = steps, .panels = panels};
    w->data = aligned_alloc(64, (size_t)(panels * steps * STEP_BYTES + 64) & ~(size_t)63);
    w->column_sums = calloc((size_t)(panels * COLS + 1), sizeof *w->column_sums);
    w->offsets = calloc((size_t)(2 * panels * steps + 1), sizeof *w->offsets);
    w->ends = calloc((size_t)(panels * 2 + 1), sizeof *w->ends);
    if (!w->data || !w->column_sums || !w->offsets || !w->ends) {
        us_free_weights(w);
        return NULL;
    }
    const size_t groups = 2 * (size_t)steps;
    workshop s = {malloc(groups * GROUP_BYTES + 1), malloc(groups * sizeof(reach) + 1), malloc(groups * 4 + 1), malloc(groups * 4 + 1), malloc(groups * 2 + 1),
                  malloc(groups + 1)};
    const int complete = s.groups && s.reaches && s.order && s.spare && s.hardness && s.taken;
    for (int64_t panel = 0; complete && panel < panels; panel++) pack_panel(w, b, panel, &s);
    free(s.groups), free(s.reaches), free(s.order), free(s.spare), free(s.hardness), free(s.taken);
    if (!complete) {
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

#if defined(US_DOT)

typedef int32_t lanes __attribute__((vector_size(COLS * 4)));

/* acc += the four products of each lane, u8 by s8 */
INLINE lanes dot(lanes acc, lanes a, lanes b) {
#if defined(US_VNNI)
    return (lanes)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#else
    uint8_t u[GROUP_BYTES];
    int8_t s[GROUP_BYTES];
    memcpy(u, &a, sizeof u), memcpy(s, &b, sizeof s);
    for (int c = 0; c < COLS; c++)
        for (int k = 0; k < GROUP; k++) acc[c] += u[c * GROUP + k] * s[c * GROUP + k];
    return acc;
#endif
}

INLINE lanes broadcast4(const uint8_t *a) {
    int32_t v;
    memcpy(&v, a, sizeof v);
    return v - (lanes){0};
}

/* Two accumulators a row hide the instruction's latency where rows are few. */
INLINE void multiply(const uint8_t *a, int64_t stride, const panel_view *p, float *y, int64_t y_stride, int rows) {
    lanes even[ROWS], odd[ROWS], zero;
    typedef float floats __attribute__((vector_size(COLS * 4)));
    floats scale;
    memcpy(&zero, p->zero, sizeof zero), memcpy(&scale, p->scale, sizeof scale);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) even[r] = odd[r] = (lanes){0};
    const int8_t *b = p->data;
    for (int64_t s = 0; s < p->ends[SINGLES]; s++, b += STEP_BYTES) {
        const uint8_t *x = a + s * 2 * GROUP; /* groups lie in the order of B here */
        lanes b0, b1;
        memcpy(&b0, b, sizeof b0), memcpy(&b1, b + GROUP_BYTES, sizeof b1);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            even[r] = dot(even[r], broadcast4(x + r * stride), b0);
            odd[r] = dot(odd[r], broadcast4(x + r * stride + GROUP), b1);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const floats sum = __builtin_convertvector(even[r] + odd[r] - zero, floats) * scale;
        memcpy(y + r * y_stride, &sum, sizeof sum);
    }
}

#elif defined(__AVX2__) && !defined(US_VW)

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
    if (class == QUADS) return add(acc, wide(_mm256_add_epi16(_mm256_maddubs_epi16(a0, b0), _mm256_maddubs_epi16(a1, b1))));
    if (class == PAIRS) return add(add(acc, wide(_mm256_maddubs_epi16(a0, b0))), wide(_mm256_maddubs_epi16(a1, b1)));
    const __m256i even = _mm256_set1_epi16(0xff);
    acc = add(acc, wide(_mm256_maddubs_epi16(_mm256_and_si256(a0, even), b0)));
    acc = add(acc, wide(_mm256_maddubs_epi16(_mm256_andnot_si256(even, a0), b0)));
    acc = add(acc, wide(_mm256_maddubs_epi16(_mm256_and_si256(a1, even), b1)));
    return add(acc, wide(_mm256_maddubs_epi16(_mm256_andnot_si256(even, a1), b1)));
}

/* Adds the steps of one class to `total`. Own accumulators keep the compiler from spilling those of the other loops into this one. */
INLINE void steps(__m256i total[ROWS][2], const uint8_t *a, int64_t stride, const panel_view *p, int rows, int class) {
    __m256i acc[ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    const int8_t *b = p->data + (class ? p->ends[class - 1] : 0) * STEP_BYTES;
    for (int64_t s = class ? p->ends[class - 1] : 0; s < p->ends[class]; s++, b += STEP_BYTES) {
        const uint8_t *x0 = a + p->offsets[2 * s], *x1 = a + p->offsets[2 * s + 1];
        const __m256i b00 = _mm256_load_si256((const void *)b), b01 = _mm256_load_si256((const void *)(b + 32));
        const __m256i b10 = _mm256_load_si256((const void *)(b + 64)), b11 = _mm256_load_si256((const void *)(b + 96));
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m256i a0 = broadcast4(x0 + r * stride), a1 = broadcast4(x1 + r * stride);
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
            const uint8_t *x0 = a + r * stride + p->offsets[2 * s], *x1 = a + r * stride + p->offsets[2 * s + 1];
            for (int64_t c = 0; c < COLS; c++) {
                const int8_t *b0 = b + at(0, c), *b1 = b0 + GROUP_BYTES;
                acc[c] += b0[0] * x0[0] + b0[1] * x0[1] + b0[2] * x0[2] + b0[3] * x0[3];
                acc[c] += b1[0] * x1[0] + b1[1] * x1[1] + b1[2] * x1[2] + b1[3] * x1[3];
            }
        }
        for (int64_t c = 0; c < COLS; c++) y[r * y_stride + c] = (float)(acc[c] - p->zero[c]) * p->scale[c];
    }
}

#endif

static panel_view view(const us_gemm_args *g, int64_t panel) {
    const us_weights *w = g->weights;
    const int64_t first = panel * COLS, n = w->cols - first < COLS ? w->cols - first : COLS;
    panel_view p = {.data = w->data + panel * w->steps * STEP_BYTES, .offsets = w->offsets + 2 * panel * w->steps,
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

/* Rows [begin, end) by panels [first, last). Rows of A are copied to `scratch` when their length is no multiple of two groups. */
static void gemm(const us_gemm_args *g, int64_t begin, int64_t end, int64_t first, int64_t last, uint8_t *scratch) {
    const us_weights *w = g->weights;
    const int64_t stride = w->steps * 2 * GROUP;
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
        for (int64_t row = begin, rows; row < end; row += rows) {
            const uint8_t *x = a + (row - begin) * stride;
            rows = end - row >= ROWS ? ROWS : end - row > 4 ? 4 : end - row;
            switch (rows) {
            case 1: tile(g, x, stride, &p, row, panel, 1); break;
            case 2: tile(g, x, stride, &p, row, panel, 2); break;
            case 3: tile(g, x, stride, &p, row, panel, 3); break;
            case 4: tile(g, x, stride, &p, row, panel, 4); break;
            default: tile(g, x, stride, &p, row, panel, ROWS);
            }
        }
    }
}

us_weights *ISA_NAME(us_pack)(const int8_t *b, int64_t depth, int64_t cols) { return pack(b, depth, cols); }
void ISA_NAME(us_gemm_part)(const us_gemm_args *g, int64_t begin, int64_t end, int64_t first, int64_t last, uint8_t *scratch) {
    gemm(g, begin, end, first, last, scratch);
}
