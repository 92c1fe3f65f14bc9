/* Vectors of the width that the compilation's instruction set gives, and the few functions on them that the kernels need.
 *
 * GCC vector extensions, no intrinsics: the same lines serve SSE2, AVX2, AVX-512 and NEON. Everything is written so that a NaN or an
 * infinity flows through (or becomes 0 in a quantized output) and can neither trap nor change control flow.
 */
#ifndef UNDERSTUDY_SIMD_H
#define UNDERSTUDY_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(US_VW) /* tests: wider vectors than the processor has, which the compiler splits */
enum { VW = US_VW };
#elif defined(__AVX512F__)
enum { VW = 16 };
#elif defined(__AVX2__)
enum { VW = 8 };
#else
enum { VW = 4 };
#endif

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef float v4f __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

INLINE vf vload(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void vstore(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE v4f v4load(const float *p) { v4f v; memcpy(&v, p, sizeof v); return v; }
INLINE void v4store(float *p, v4f v) { memcpy(p, &v, sizeof v); }
INLINE vf vset(float x) { return x - (vf){0}; }

/* The first n lanes; the others are zero. n == VW is a plain load. */
INLINE vf vload_n(const float *p, int64_t n) {
    if (n == VW) return vload(p);
    vf v = {0};
    for (int64_t i = 0; i < n; i++) v[i] = p[i];
    return v;
}

INLINE void vstore_n(float *p, vf v, int64_t n) {
    if (n == VW) { vstore(p, v); return; }
    for (int64_t i = 0; i < n; i++) p[i] = v[i];
}

INLINE vf vselect(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

#if defined(__AVX512F__) && !defined(US_VW)
#include <immintrin.h>
/* Where either operand is NaN the result is `b`, as with the comparisons below. */
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__) && !defined(US_VW)
#include <immintrin.h>
INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE vf vmax(vf a, vf b) { return vselect(a > b, a, b); }
INLINE vf vmin(vf a, vf b) { return vselect(a < b, a, b); }
#endif

/* a * b + c, fused wherever the processor can, and never by the compiler's choice: sums that must not differ by a bit between two loops. */
#if defined(__AVX512F__) && !defined(US_VW)
INLINE vf vfma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__) && defined(__FMA__) && !defined(US_VW)
INLINE vf vfma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__ARM_NEON) && !defined(US_VW)
#include <arm_neon.h>
INLINE vf vfma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
#endif

INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }

/* Lanes are summed pairwise, halves first: the order never depends on anything but VW. */
INLINE float vsum(vf v) {
    float t[VW];
    vstore(t, v);
    for (int w = VW / 2; w; w /= 2)
        for (int i = 0; i < w; i++) t[i] += t[i + w];
    return t[0];
}

INLINE float vmax_lanes(vf v) {
    float m = v[0];
    for (int i = 1; i < VW; i++) m = v[i] > m ? v[i] : m;
    return m;
}

/* Adding 1.5 * 2^23 leaves the nearest integer (ties to even) in the low mantissa bits of any |x| < 2^22. */
#define ROUND_MAGIC 12582912.0f

/* e^x within 2 units in the last place for x in [-87, 88]; smaller x gives e^-87 (1.6e-38), larger e^88. */
INLINE vf vexp(vf x) {
    x = vmin(vset(88.0f), vmax(vset(-87.0f), x));
    vf z = x * 1.44269504f + ROUND_MAGIC;
    vf n = z - ROUND_MAGIC;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    /* minimax of (e^r - 1 - r) / r^2 on |r| <= ln(2)/2, weighted for relative error 1.1e-7 */
    vf p = r * 0.00831247773f + 0.0418905504f;
    p = p * r + 0.166671157f;
    p = p * r + 0.499992281f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (vf)((vu)p + ((vu)z << 23)); /* unsigned: a NaN's payload may overflow */
}

/* x * (1 + erf(x / sqrt 2)) / 2 within 1e-6. erf(c / sqrt 2) / 2 = c * p(c^2), minimax (2e-7) in c^2 mapped to [-1, 1] and constant past
 * |c| = 5.2; written as max(x, 0) minus what is missing, so that the error stops growing with x there. */
INLINE vf vgelu_erf(vf x) {
    vf c = vmin(vset(5.2f), vmax(vset(-5.2f), x)), square = c * c;
    vf u = square * 0.0739645f - 1.0f;
    vf p = u * -0.000481276016f + 0.00126851117f;
    p = p * u - 0.00122149696f;
    p = p * u + 0.00180012232f;
    p = p * u - 0.0047890353f;
    p = p * u + 0.00855996832f;
    p = p * u - 0.0125051234f;
    p = p * u + 0.0179547872f;
    p = p * u - 0.0247236285f;
    p = p * u + 0.0319899581f;
    p = p * u - 0.0399298184f;
    p = p * u + 0.0500245206f;
    p = p * u - 0.0677436665f;
    p = p * u + 0.135949999f;
    return (vmax(vset(0), x) - vabs(c) * 0.5f) + square * p;
}

INLINE vf vgelu(vf x, int approximate) {
    if (!approximate) return vgelu_erf(x);
    /* x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), the same as 0.5 x (1 + tanh(...)) */
    vf u = x * (x * x * 0.0713548163f + 1.59576912f);
    return x / (vexp(-u) + 1.0f);
}

#endif
