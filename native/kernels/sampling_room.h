/* A row's scratch, and finding the greatest of its logits: what sampling_rows.c builds on. For one compilation unit. */
#ifndef UNDERSTUDY_SAMPLING_ROOM_H
#define UNDERSTUDY_SAMPLING_ROOM_H

#include "sampling.h"
#include "simd.h"

#include <math.h>
#include <stddef.h>

enum {
    CHUNK = 128,       /* logits whose maxima and sums are kept */
    GROUPS = 1024,     /* maxima that selection looks at, about */
    FEW = 512,         /* up to this top_k candidates are found by selection */
    SMALL = 4096,      /* vocabularies that are just sorted */
};
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
    float tail[CHUNK];    /* the last, incomplete chunk of `of`, filled up with -infinity */
} room;

typedef struct { float max, second; int32_t argmax, bad; } peak;

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

#endif
