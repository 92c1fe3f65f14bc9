/* One row of logits to one token, with log-probability, entropy and margin. Compiled once per instruction set.
 *
 * Everything per row costs a few passes over logits that stay in the second-level cache. Top-k and top-p never sort the row: with a
 * small k the candidates are found through the maxima of groups of logits; else the range of probabilities that holds the cut is
 * halved, a pass each time, until it holds few tokens, which are sorted.
 */
#include "sampling_room.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define ISA_NAME(name) JOIN(name, US_ISA)

#define GREEDY_BELOW 1e-5f
#define ONE_BITS 0x3f800000u

/* Elements stay where mass > cut.mass, or mass == cut.mass and id <= cut.id. */
typedef struct { float mass; int32_t id; } cut;

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

/* Mass and number of the elements that are greater than a bound. */
typedef struct { double mass; int64_t count; } share;

static share above(const room *r, float bound) {
    enum { FLUSH = 32 * CHUNK }; /* sums in single precision stay this short */
    share found = {0, 0};
    for (int64_t begin = 0; begin < r->padded; begin += FLUSH) {
        const int64_t end = begin + FLUSH < r->padded ? begin + FLUSH : r->padded;
        vf some[2] = {{0}, {0}};
        vi many[2] = {{0}, {0}};
        for (int64_t i = begin; i < end; i += 2 * VW)
            for (int k = 0; k < 2; k++) {
                vf e = vload(r->mass + i + k * VW);
                vi greater = (vi)(e > bound);
                some[k] += (vf)((vi)e & greater);
                many[k] -= greater;
            }
        many[0] += many[1];
        for (int i = 0; i < VW; i++) found.count += many[0][i];
        found.mass += vsum(some[0] + some[1]);
    }
    return found;
}

/* Elements in (low, high], sorted: greatest first, lower ids first. Equal ones are in order already. */
static int64_t sort_between(room *r, uint32_t low_bits, uint32_t high_bits) {
    const float low = bits_float(low_bits), high = bits_float(high_bits);
    int64_t n = 0;
    for (int64_t i = 0; i < r->padded; i += VW) {
        vf e = vload(r->mass + i);
        if (!any((vi)(e <= high) & (vi)(e > low))) continue;
        for (int64_t j = i; j < i + VW; j++) {
            r->keys[n] = key_of(r->mass[j], (int32_t)j);
            n += r->mass[j] <= high && r->mass[j] > low;
        }
    }
    if (high_bits - low_bits > 1) sort_keys(r->keys, r->more, n);
    return n;
}

/* Sorts the few elements, greater than `low`, among which the sum of counts (or of masses) from the greatest down reaches `goal`; `before`
 * is what is greater than they. Positive floats are in the order of their bits. */
static int64_t sort_around(room *r, double goal, int by_count, uint32_t low, share *before) {
    uint32_t high = ONE_BITS;
    share over = {0, 0}, under = above(r, bits_float(low));
    while (under.count - over.count > FEW / 2 && high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        const share found = above(r, bits_float(middle));
        if ((by_count ? (double)found.count : found.mass) >= goal) {
            low = middle;
            under = found;
        } else {
            high = middle;
            over = found;
        }
    }
    *before = over;
    return sort_between(r, low, high);
}

/* Where top_k (unless all) and then top_p cut; `total` is the mass of all. */
static cut find_cut(room *r, const us_sampler *s, double total) {
    cut found = {0, INT32_MAX};
    uint32_t low = 0;
    share before;
    if (s->top_k > 0 && s->top_k < r->vocabulary && above(r, 0).count > s->top_k) {
        const int64_t n = sort_around(r, s->top_k, 1, low, &before);
        int64_t kept = s->top_k - before.count;
        while (kept < n && key_value(r->keys[kept]) == key_value(r->keys[kept - 1])) kept++;
        total = before.mass;
        for (int64_t i = 0; i < kept; i++) total += key_value(r->keys[i]);
        found.mass = key_value(r->keys[kept - 1]);
        low = float_bits(found.mass) - 1;
    }
    if (!(s->top_p < 1)) return found;
    /* Whatever is below this cannot be needed: all of it together is less than 1 - top_p of the mass. */
    const float least = (float)((1 - s->top_p) * total / (double)r->vocabulary * 0.999);
    if (float_bits(least) > low) low = float_bits(least);
    const double goal = s->top_p * total;
    const int64_t n = sort_around(r, goal, 0, low, &before);
    double mass = before.mass;
    int64_t i = 0;
    while (i < n && (i == 0 || mass < goal)) mass += key_value(r->keys[i++]);
    return n ? (cut){key_value(r->keys[i - 1]), key_id(r->keys[i - 1])} : found;
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
