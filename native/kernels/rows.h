/* What kernels share that treat one row at a time: a loop over vectors with a last part, and the quantization of a row. */
#ifndef UNDERSTUDY_ROWS_H
#define UNDERSTUDY_ROWS_H

#include "ops.h"
#include "simd.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define ISA_NAME(name) JOIN(name, US_ISA)

#define TINY 1e-30f

/* Body(c, n) for each vector of the row: n == VW, but for the last. */
#define EACH_VECTOR(cols, body)                                   \
    do {                                                          \
        int64_t c = 0;                                            \
        for (; c + VW <= (cols); c += VW) { enum { n = VW }; body } \
        if (c < (cols)) { const int64_t n = (cols) - c; body }    \
    } while (0)

/* Auto-vectorised. Both sides of the range are clamped before rounding, which keeps the product from being fused into the rounding
 * addition, and sends NaN to 0. After it the integer stands in the low bits of the float. */
INLINE void quantize_row(const float *restrict w, const float *restrict mult, uint8_t *restrict q, int64_t cols, float factor, int32_t zero_point) {
    const float low = (float)-zero_point, high = (float)(255 - zero_point);
    for (int64_t c = 0; c < cols; c++) {
        float t = w[c] * mult[c];
        if (factor != 1.0f) t *= factor;
        t = t > low ? t : low;
        t = t < high ? t : high;
        t += ROUND_MAGIC;
        int32_t bits;
        memcpy(&bits, &t, sizeof bits);
        q[c] = (uint8_t)(bits + zero_point);
    }
}

INLINE void quantize(const us_quant *o, const float *restrict w, int64_t row, int64_t cols) {
    uint8_t *q = o->q + row * cols;
    if (!o->per_row) {
        quantize_row(w, o->mult, q, cols, 1.0f, o->zero_point);
        return;
    }
    vf most = vset(TINY);
    EACH_VECTOR(cols, { most = vmax(vabs(vload_n(w + c, n) * vload_n(o->mult + c, n)), most); });
    const float peak = vmax_lanes(most);
    o->scale[row] = peak / 127.0f;
    quantize_row(w, o->mult, q, cols, 127.0f / peak, 128);
}

typedef uint16_t vu16 __attribute__((vector_size(VW * 2)));

INLINE vf load_bfloat16(const uint16_t *p, int64_t n) {
#if defined(__AVX512F__) && !defined(US_VW)
    if (n == VW) return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__) && !defined(US_VW)
    if (n == VW) return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#endif
    vu16 v = {0};
    if (n == VW)
        memcpy(&v, p, sizeof v);
    else
        for (int64_t i = 0; i < n; i++) v[i] = p[i];
    return (vf)(__builtin_convertvector(v, vi) << 16);
}

/* 1 / the root mean square. The order of the sum depends on cols alone. */
INLINE float inverse_rms(const float *restrict x, int64_t cols, float epsilon) {
    vf s[4] = {0};
    int64_t c = 0;
    for (; c + 4 * VW <= cols; c += 4 * VW)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) s[i] += vload(x + c + i * VW) * vload(x + c + i * VW);
    for (; c + VW <= cols; c += VW) s[0] += vload(x + c) * vload(x + c);
    float sum = vsum((s[0] + s[1]) + (s[2] + s[3]));
    for (; c < cols; c++) sum += x[c] * x[c];
    return 1.0f / __builtin_sqrtf(sum / (float)cols + epsilon);
}

/* v = x * scale + bias */
INLINE void value_row(const float *restrict x, const float *restrict bias, float scale, float *restrict v, int64_t cols) {
    if (bias)
        EACH_VECTOR(cols, { vstore_n(v + c, vload_n(x + c, n) * scale + vload_n(bias + c, n), n); });
    else
        EACH_VECTOR(cols, { vstore_n(v + c, vload_n(x + c, n) * scale, n); });
}

#endif
