/* One row of logits to one token, with log-probability, entropy and margin. Compiled once per instruction set.
 *
 * Everything per row costs a few passes over logits that stay in the second-level cache. Top-k and top-p never sort the row: with a
 * small k the candidates are found through the maxima of groups of logits, else a histogram over the probabilities' exponents finds
 * the narrow range that holds the cut, and only that range is sorted.
 */
#include "sampling.h"
#include "simd.h"

#include <math.h>
#include <stddef.h>

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define ISA_NAME(name) JOIN(name, US_ISA)

enum {
    CHUNK = 128,       /* logits whose maxima and sums are kept */
    GROUPS = 1024,     /* maxima that selection looks at, about */
    FEW = 512,         /* up to this top_k candidates are found by selection */
    SMALL = 4096,      /* vocabularies that are just sorted */
    BINS = 1024,       /* of probabilities relative to the greatest: 8 an octave, from 1 to 2^-127 */
    BIN_SHIFT = 20,
};
#define GREEDY_BELOW 1e-5f
#define ONE_BITS 0x3f800000u

/* Everything a row needs, in the caller's scratch. `padded` is the vocabulary rounded up to whole chunks. */
typedef struct {
    int64_t vocabulary, chunks, padded;
    float *changed;       /* [padded]: logits after penalties, bias and mask */
    float *mass;          /* [padded]: e^((x - max) / temperature) */
    float *maxima;        /* [chunks, VW]: lane by lane */
    double *sums;         /* [chunks] */
    uint64_t *keys, *more;/* [padded] */
    int32_t *ids;         /* [padded] */
    float *values;        /* [padded] */
    float *groups;        /* [2 * GROUPS + VW] */
    int32_t *counts;      /* [BINS] */
    double *masses;       /* [BINS] */
    float tail[CHUNK];    /* the last, incomplete chunk of `of`, filled up with -infinity */
} room;

typedef struct { float max, second; int32_t argmax, bad; } peak;

/* Elements stay where mass > cut.mass, or mass == cut.mass and id <= cut.id. */
typedef struct { float mass; int32_t id; } cut;

static void *take(char **at, int64_t bytes) {
    void *begin = *at;
    *at += (bytes + 63) & ~(int64_t)63;
    return begin;
}

static void lay_out(room *r, int64_t vocabulary, void *scratch) {
    char *at = scratch;
    r->vocabulary = vocabulary;
    r->chunks = (vocabulary + CHUNK - 1) / CHUNK;
    r->padded = r->chunks * CHUNK;
    r->changed = take(&at, r->padded * 4);
    r->mass = take(&at, r->padded * 4);
    r->maxima = take(&at, r->chunks * VW * 4);
    r->sums = take(&at, r->chunks * 8);
    r->keys = take(&at, r->padded * 8);
    r->more = take(&at, r->padded * 8);
    r->ids = take(&at, r->padded * 4);
    r->values = take(&at, r->padded * 4);
    r->groups = take(&at, (2 * GROUPS + VW) * 4);
    r->counts = take(&at, BINS * 4);
    r->masses = take(&at, BINS * 8);
}

/* The tail goes to a copy that is filled up, so that no loop has a remainder. */
static void set_tail(room *r, const float *x) {
    const int64_t begin = (r->chunks - 1) * CHUNK;
    for (int64_t i = 0; i < CHUNK; i++) r->tail[i] = begin + i < r->vocabulary ? x[begin + i] : -INFINITY;
}

INLINE const float *chunk_of(const room *r, const float *x, int64_t c) { return c == r->chunks - 1 ? r->tail : x + c * CHUNK; }

INLINE int any(vi mask) {
#if defined(__AVX512F__) && !defined(US_VW)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__) && !defined(US_VW)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    uint64_t words[VW / 2], all = 0;
    memcpy(words, &mask, sizeof mask);
    for (int i = 0; i < VW / 2; i++) all |= words[i];
    return all != 0;
#endif
}

/* Greatest and second greatest, lowest id among equals, and the chunks' maxima. Calls set_tail first. */
static peak scan(room *r, const float *x) {
    set_tail(r, x);
    vf first = vset(-INFINITY), second = first;
    vi bad = {0};
    for (int64_t c = 0; c < r->chunks; c++) {
        const float *p = chunk_of(r, x, c);
        vf most = vset(-INFINITY);
        for (int i = 0; i < CHUNK; i += VW) {
            vf v = vload(p + i);
            second = vmax(second, vmin(first, v));
            first = vmax(first, v);
            most = vmax(most, v);
            bad |= (vi)(v != v);
        }
        vstore(r->maxima + c * VW, most);
    }
    peak found = {.max = -INFINITY, .second = -INFINITY, .argmax = -1, .bad = any(bad)};
    for (int i = 0; i < VW; i++) {
        const float high = first[i], low = second[i];
        if (high > found.max) {
            found.second = found.max > low ? found.max : low;
            found.max = high;
        } else if (high > found.second)
            found.second = high;
    }
    if (found.bad || !(found.max > -INFINITY) || found.max == INFINITY) return found.bad = 1, found;
    for (int64_t c = 0; c < r->chunks && found.argmax < 0; c++) {
        if (!any((vi)(vload(r->maxima + c * VW) == found.max))) continue;
        const float *p = chunk_of(r, x, c);
        for (int32_t i = 0; i < CHUNK && found.argmax < 0; i++)
            if (p[i] == found.max) found.argmax = (int32_t)(c * CHUNK) + i;
    }
    return found;
}

/* Sum of e^(x - max), and of e^(x - max) (x - max). What is more than 87 below the greatest counts as 87 below. */
static void normalise(const room *r, const float *x, float max, double *sum, double *weighted) {
    double total = 0, products = 0;
    for (int64_t c = 0; c < r->chunks; c++) {
        const float *p = chunk_of(r, x, c);
        vf some = {0}, product = {0};
        for (int i = 0; i < CHUNK; i += VW) {
            vf d = vmax(vload(p + i) - max, vset(-87.0f));
            vf e = vexp(d);
            some += e;
            product += e * d;
        }
        total += vsum(some);
        products += vsum(product);
    }
    *sum = total;
    *weighted = products;
}

INLINE uint32_t float_bits(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
INLINE float bits_float(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
/* Ascending keys are descending values, lower ids first among equals. */
INLINE uint64_t key_of(float x, int32_t id) {
    const uint32_t b = float_bits(x + 0.0f);
    return (uint64_t)(b & 0x80000000u ? b : ~(b | 0x80000000u)) << 32 | (uint32_t)id;
}
INLINE float key_value(uint64_t key) {
    const uint32_t b = (uint32_t)(key >> 32);
    return bits_float(b & 0x80000000u ? b : ~(b | 0x80000000u));
}
INLINE int32_t key_id(uint64_t key) { return (int32_t)(uint32_t)key; }

/* Merge sort with runs of 8: n log n whatever the input; `other` is as long as `keys`. */
static void sort_keys(uint64_t *keys, uint64_t *other, int64_t n) {
    for (int64_t begin = 0; begin < n; begin += 8) {
        const int64_t end = begin + 8 < n ? begin + 8 : n;
        for (int64_t i = begin + 1; i < end; i++) {
            const uint64_t key = keys[i];
            int64_t j = i;
            for (; j > begin && keys[j - 1] > key; j--) keys[j] = keys[j - 1];
            keys[j] = key;
        }
    }
    uint64_t *from = keys, *to = other;
    for (int64_t width = 8; width < n; width *= 2) {
        for (int64_t begin = 0; begin < n; begin += 2 * width) {
            const int64_t middle = begin + width < n ? begin + width : n, end = begin + 2 * width < n ? begin + 2 * width : n;
            int64_t a = begin, b = middle, at = begin;
            while (a < middle && b < end) {
                const uint64_t left = from[a], right = from[b];
                const int take_right = right < left;
                to[at++] = take_right ? right : left;
                b += take_right;
                a += !take_right;
            }
            memcpy(to + at, from + a, (size_t)(middle - a) * 8);
            memcpy(to + at + (middle - a), from + b, (size_t)(end - b) * 8);
        }
        uint64_t *swap = from;
        from = to;
        to = swap;
    }
    if (from != keys) memcpy(keys, from, (size_t)n * 8);
}

/* The k-th greatest of n floats, which it reorders. */
static float kth_greatest(float *x, int64_t n, int64_t k) {
    int64_t low = 0, high = n - 1;
    k -= 1;
    while (low < high) {
        const float a = x[low], b = x[(low + high) / 2], c = x[high];
        const float pivot = a > b ? (b > c ? b : a > c ? c : a) : (a > c ? a : b > c ? c : b);
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i <= j) {
                const float swap = x[i];
                x[i++] = x[j];
                x[j--] = swap;
            }
        }
        if (k <= j) high = j;
        else if (k >= i) low = i;
        else break;
    }
    return x[k];
}

INLINE int64_t chunks_a_group(const room *r) { return (r->chunks * VW + GROUPS - 1) / GROUPS; }

/* Whether selection finds k candidates: there are groups enough, or sorting everything costs nothing. */
static int are_few(const room *r, int64_t k) {
    const int64_t share = chunks_a_group(r), groups = (r->chunks + share - 1) / share * VW;
    return k > 0 && k < r->vocabulary && k <= FEW && (2 * k <= groups || r->vocabulary <= SMALL);
}

/* A value that at least k logits reach, and not many more: the k-th greatest of the maxima of groups. */
static float floor_of(room *r, int64_t k) {
    const int64_t share = chunks_a_group(r);
    int64_t groups = 0;
    for (int64_t c = 0; c < r->chunks; c += share) {
        vf most = vload(r->maxima + c * VW);
        for (int64_t i = 1; i < share && c + i < r->chunks; i++) most = vmax(most, vload(r->maxima + (c + i) * VW));
        vstore(r->groups + groups, most);
        groups += VW;
    }
    return 2 * k <= groups ? kth_greatest(r->groups, groups, k) : -INFINITY;
}

/* Ids, in order, and values of all logits from `least` on (-infinity never). Needs the maxima of scan. */
static int64_t collect(room *r, const float *x, float least) {
    int64_t n = 0;
    for (int64_t c = 0; c < r->chunks; c++) {
        if (!any((vi)(vload(r->maxima + c * VW) >= least))) continue;
        const float *p = chunk_of(r, x, c);
        for (int32_t i = 0; i < CHUNK; i += VW) {
            if (!any((vi)(vload(p + i) >= least))) continue;
            for (int32_t j = i; j < i + VW; j++) {
                r->ids[n] = (int32_t)(c * CHUNK) + j;
                r->values[n] = p[j];
                n += p[j] >= least && p[j] > -INFINITY;
            }
        }
    }
    return n;
}

static void report_top(room *r, const float *x, int32_t top, double log_sum, us_drawn *out) {
    for (int32_t i = 0; i < out->top_width; i++) {
        out->top_ids[i] = -1;
        out->top_logprobs[i] = -INFINITY;
    }
    if (top > out->top_width) top = out->top_width;
    if (top <= 0) return;
    const int64_t n = collect(r, x, floor_of(r, top));
    for (int64_t i = 0; i < n; i++) r->keys[i] = key_of(r->values[i], r->ids[i]);
    sort_keys(r->keys, r->more, n);
    for (int32_t i = 0; i < top && i < n; i++) {
        out->top_ids[i] = key_id(r->keys[i]);
        out->top_logprobs[i] = (float)(key_value(r->keys[i]) - log_sum);
    }
}

static int all_ones(const uint32_t *mask, int64_t vocabulary) {
    uint32_t all = ~0u;
    for (int64_t w = 0; w < vocabulary / 32; w++) all &= mask[w];
    const int rest = (int)(vocabulary % 32);
    return all == ~0u && (!rest || (~mask[vocabulary / 32] & ((1u << rest) - 1)) == 0);
}

static void apply_mask(float *x, const uint32_t *mask, int64_t padded, int64_t vocabulary) {
    vi bit;
    for (int i = 0; i < VW; i++) bit[i] = (int32_t)(1u << i);
    for (int64_t begin = 0; begin < padded; begin += 32) {
        uint32_t word = begin < vocabulary ? mask[begin / 32] : 0;
        if (word == ~0u) continue;
        for (int i = 0; i < 32; i += VW, word >>= VW % 32) {
            vi allowed = (vi)((((vi){0} + (int32_t)word) & bit) == bit);
            vstore(x + begin + i, vselect(allowed, vload(x + begin + i), vset(-INFINITY)));
        }
    }
}

/* Penalties, then bias, then the mask, on a copy; returns the row to draw from. */
static const float *change(room *r, const us_sampler *s, const float *x, const uint32_t *mask) {
    const int penal = s->seen && (s->repetition != 1 || s->presence != 0 || s->frequency != 0);
    if (mask && all_ones(mask, r->vocabulary)) mask = NULL;
    if (!penal && !s->biases && !mask) return x;
    float *y = r->changed;
    memcpy(y, x, (size_t)r->vocabulary * sizeof *y);
    for (int64_t i = r->vocabulary; i < r->padded; i++) y[i] = -INFINITY;
    for (int32_t i = 0; penal && i < s->seen; i++) {
        float v = y[s->seen_ids[i]];
        const int32_t count = s->seen_counts[i];
        v = v > 0 ? v / s->repetition : v * s->repetition;
        if (count) v -= s->frequency * (float)count + s->presence;
        y[s->seen_ids[i]] = v;
    }
    for (int32_t i = 0; i < s->biases; i++) y[s->bias_ids[i]] += s->bias[i];
    if (mask) apply_mask(y, mask, r->padded, r->vocabulary);
    return y;
}

/* Uniform in [0, 1), 53 bits: Philox 4x32-10 (Salmon et al. 2011) of the seed at (position, candidate). */
static double uniform(const us_sampler *s) {
    uint32_t c0 = (uint32_t)s->position, c1 = (uint32_t)(s->position >> 32), c2 = s->index, c3 = 0;
    uint32_t k0 = (uint32_t)s->seed, k1 = (uint32_t)(s->seed >> 32);
    for (int i = 0; i < 10; i++) {
        const uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        const uint32_t n0 = (uint32_t)(b >> 32) ^ c1 ^ k0, n2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (double)(((uint64_t)c1 << 32 | c0) >> 11) * 0x1p-53;
}

/* At most 1, which the bins rely on. */
INLINE vf mass_of(vf x, float max, float per_degree) {
    vf d = (x - max) * per_degree;
    return vselect((vi)(d >= vset(-87.0f)), vmin(vexp(d), vset(1)), vset(0));
}

/* Few candidates: top_k is at most FEW. */
static int32_t draw_few(room *r, const us_sampler *s, const float *x, peak top, float per_degree) {
    const int64_t n = collect(r, x, floor_of(r, s->top_k));
    for (int64_t i = 0; i < n; i++) r->keys[i] = key_of(r->values[i], r->ids[i]);
    sort_keys(r->keys, r->more, n);
    int64_t kept = s->top_k < n ? s->top_k : n;
    while (kept < n && key_value(r->keys[kept]) == key_value(r->keys[kept - 1])) kept++;
    double total = 0;
    for (int64_t i = 0; i < kept; i += VW) {
        vf e = vset(0);
        for (int64_t j = 0; j < VW && i + j < kept; j++) e[j] = key_value(r->keys[i + j]);
        vstore(r->mass + i, mass_of(e, top.max, per_degree)); /* up to VW - 1 beyond kept, within padded */
    }
    for (int64_t i = 0; i < kept; i++) total += r->mass[i];
    if (s->top_p < 1) {
        const double goal = s->top_p * total;
        double before = r->mass[0];
        int64_t i = 1;
        for (; i < kept && before < goal; i++) before += r->mass[i];
        kept = i;
    }
    while (kept > 1 && r->mass[kept - 1] < s->min_p) kept--;
    /* Drawn in order of ids, which the definition in sampling_py does too. */
    for (int64_t i = 0; i < kept; i++) r->more[i] = (uint64_t)(uint32_t)key_id(r->keys[i]) << 32 | float_bits(r->mass[i]);
    sort_keys(r->more, r->keys, kept);
    total = 0;
    for (int64_t i = 0; i < kept; i++) total += bits_float((uint32_t)r->more[i]);
    double left = uniform(s) * total;
    int32_t last = top.argmax;
    for (int64_t i = 0; i < kept; i++) {
        const float e = bits_float((uint32_t)r->more[i]);
        if (!(e > 0)) continue;
        last = (int32_t)(r->more[i] >> 32);
        left -= e;
        if (left < 0) break;
    }
    return last;
}

/* Counts and masses of the bins, of all elements from `least` on. */
static void fill_bins(room *r, float least) {
    memset(r->counts, 0, BINS * sizeof *r->counts);
    memset(r->masses, 0, BINS * sizeof *r->masses);
    for (int64_t i = 0; i < r->padded; i += VW) {
        if (!any((vi)(vload(r->mass + i) >= least))) continue;
        for (int64_t j = i; j < i + VW; j++) {
            const float e = r->mass[j];
            if (!(e >= least)) continue;
            const uint32_t bin = (ONE_BITS - float_bits(e)) >> BIN_SHIFT;
            r->counts[bin] += 1;
            r->masses[bin] += e;
        }
    }
}

/* Elements of one bin, sorted: greatest first, lower ids first. */
static int64_t sort_bin(room *r, uint32_t bin) {
    const float high = bits_float(ONE_BITS - (bin << BIN_SHIFT));
    const uint32_t low_bits = ONE_BITS - ((bin + 1) << BIN_SHIFT); /* excluded */
    const float low = bin + 1 < BINS - 8 ? bits_float(low_bits) : 0;
    int64_t n = 0;
    for (int64_t i = 0; i < r->padded; i += VW) {
        vf e = vload(r->mass + i);
        if (!any((vi)(e <= high) & (vi)(e > low))) continue;
        for (int64_t j = i; j < i + VW; j++) {
            r->keys[n] = key_of(r->mass[j], (int32_t)j);
            n += r->mass[j] <= high && r->mass[j] > low;
        }
    }
    sort_keys(r->keys, r->more, n);
    return n;
}

/* Where top_k (unless all) and then top_p cut; `total` is the mass of all. */
static cut find_cut(room *r, const us_sampler *s, double total) {
    cut found = {0, INT32_MAX};
    const int by_count = s->top_k > 0 && s->top_k < r->vocabulary;
    /* Whatever is below this cannot be needed: all of it together is less than 1 - top_p of the mass. */
    float least = by_count ? 0x1p-126f : (float)((1 - s->top_p) * total / (double)r->vocabulary * 0.999);
    if (!(least >= 0x1p-126f)) least = 0x1p-126f;
    fill_bins(r, least);
    int64_t count = 0;
    double mass = 0;
    if (by_count) {
        uint32_t bin = 0;
        while (bin < BINS && count + r->counts[bin] < s->top_k) {
            count += r->counts[bin];
            mass += r->masses[bin++];
        }
        if (bin < BINS) {
            const int64_t n = sort_bin(r, bin);
            int64_t kept = s->top_k - count;
            while (kept < n && key_value(r->keys[kept]) == key_value(r->keys[kept - 1])) kept++;
            for (int64_t i = 0; i < kept; i++) mass += key_value(r->keys[i]);
            found.mass = key_value(r->keys[kept - 1]);
            total = mass;
        }
    }
    if (!(s->top_p < 1)) return found;
    const double goal = s->top_p * total;
    mass = 0;
    for (uint32_t bin = 0; bin < BINS; bin++) {
        if (mass + r->masses[bin] < goal) {
            mass += r->masses[bin];
            continue;
        }
        const int64_t n = sort_bin(r, bin);
        int64_t i = 0;
        while (i < n && (i == 0 || mass < goal)) mass += key_value(r->keys[i++]);
        const cut by_mass = {key_value(r->keys[i - 1]), key_id(r->keys[i - 1])};
        return by_mass.mass >= found.mass ? by_mass : found;
    }
    return found;
}

/* All tokens are candidates: sums of chunks lead to the chunk, and the chunk's elements to the token. */
static int32_t draw_many(room *r, const us_sampler *s, const float *x, peak top, float per_degree) {
    double total = 0;
    for (int64_t c = 0; c < r->chunks; c++) {
        const float *p = chunk_of(r, x, c);
        vf some = {0};
        for (int i = 0; i < CHUNK; i += VW) {
            vf e = mass_of(vload(p + i), top.max, per_degree);
            vstore(r->mass + c * CHUNK + i, e);
            some += e;
        }
        r->sums[c] = vsum(some);
        total += r->sums[c];
    }
    cut kept = {0, INT32_MAX};
    if ((s->top_k > 0 && s->top_k < r->vocabulary) || s->top_p < 1) kept = find_cut(r, s, total);
    if (s->min_p > kept.mass) kept = (cut){s->min_p < 1 ? s->min_p : 1, INT32_MAX};
    if (kept.mass > 0) {
        vi lanes;
        for (int i = 0; i < VW; i++) lanes[i] = i;
        total = 0;
        for (int64_t c = 0; c < r->chunks; c++) {
            vf some = {0};
            for (int64_t i = c * CHUNK; i < (c + 1) * CHUNK; i += VW) {
                vf e = vload(r->mass + i);
                vi stays = (vi)(e > kept.mass) | ((vi)(e == kept.mass) & (vi)(lanes + (int32_t)i <= kept.id));
                some += (vf)((vi)e & stays);
            }
            r->sums[c] = vsum(some);
            total += r->sums[c];
        }
    }
    double left = uniform(s) * total;
    int64_t chunk = -1;
    for (int64_t c = 0; c < r->chunks; c++) {
        if (!(r->sums[c] > 0)) continue;
        chunk = c;
        if (left < r->sums[c]) break;
        left -= r->sums[c];
    }
    if (chunk < 0) return top.argmax;
    int32_t last = top.argmax;
    for (int64_t i = chunk * CHUNK; i < (chunk + 1) * CHUNK; i++) {
        const float e = r->mass[i];
        if (!(e > 0) || !(e > kept.mass || (e == kept.mass && i <= kept.id))) continue;
        last = (int32_t)i;
        left -= e;
        if (left < 0) break;
    }
    return last;
}

void ISA_NAME(us_sample_row)(
    const us_sampler *s, const float *logits, const uint32_t *mask, int64_t vocabulary, void *scratch, us_drawn *out
) {
    room r;
    lay_out(&r, vocabulary, scratch);
    *out->token = -1;
    *out->logprob = *out->entropy = *out->margin = NAN;
    peak raw = scan(&r, logits);
    if (raw.bad) {
        report_top(&r, logits, 0, 0, out);
        return;
    }
    double sum, weighted;
    normalise(&r, logits, raw.max, &sum, &weighted);
    const double log_sum = raw.max + log(sum);
    *out->entropy = (float)fmax(0, log(sum) - weighted / sum);
    *out->margin = raw.max - raw.second;
    report_top(&r, logits, s->top, log_sum, out);
    const float *x = change(&r, s, logits, mask);
    const peak top = x == logits ? raw : scan(&r, x);
    if (top.bad) return;
    int32_t token = top.argmax;
    if (s->temperature >= GREEDY_BELOW) {
        const float per_degree = 1 / s->temperature;
        token = are_few(&r, s->top_k) ? draw_few(&r, s, x, top, per_degree) : draw_many(&r, s, x, top, per_degree);
    }
    *out->token = token;
    *out->logprob = (float)(logits[token] - log_sum);
}
