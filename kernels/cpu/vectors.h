/* Vectors of REAL (float or double) with explicit lanes, and the functions that recurrences need of them.
 *
 * Lanes are explicit so that nothing has to be reassociated: the sources need no -ffast-math, which would break the
 * rounding trick in exp2v and, with some compilers, turn off denormals for the whole process. */
#ifndef SINUOUS_VECTORS_H
#define SINUOUS_VECTORS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#if REAL_BITS == 64
typedef double real;
typedef int64_t integer;
#define ROUNDER 6755399441055744.0 /* 1.5 · 2^52 */
#define MANTISSA 52
#define LOWEST (-1022)
#else
typedef float real;
typedef int32_t integer;
#define ROUNDER 12582912.0f /* 1.5 · 2^23 */
#define MANTISSA 23
#define LOWEST (-126)
#endif

#define LANES ((int)(VECTOR_BYTES / sizeof(real)))
#define INLINE static inline __attribute__((always_inline))
#define LOG2E ((real)1.44269504088896340736)
#define CACHE_LINE 64

typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef integer ivec __attribute__((vector_size(VECTOR_BYTES)));
typedef real unaligned_vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

INLINE vec splat(real x) { return x - (vec){0}; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* `lanes` < LANES at the last channels; the lanes beyond read as 0 and are not written. */
INLINE vec load(const real *p, int lanes) {
    if (lanes == LANES) return *(const unaligned_vec *)p;
    vec v = {0};
    memcpy(&v, p, (size_t)lanes * sizeof(real));
    return v;
}
INLINE void store(real *p, vec v, int lanes) {
    if (lanes == LANES)
        *(unaligned_vec *)p = v;
    else
        memcpy(p, &v, (size_t)lanes * sizeof(real));
}
/* One lane every `stride` elements: rows of a channels × state matrix. */
INLINE vec gather(const real *p, int64_t stride, int lanes) {
    vec v = {0};
    for (int i = 0; i < lanes; i++) v[i] = p[i * stride];
    return v;
}
INLINE void scatter(real *p, int64_t stride, vec v, int lanes) {
    for (int i = 0; i < lanes; i++) p[i * stride] = v[i];
}
INLINE real sum_lanes(vec v) {
    real total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

/* 2^x for x ≤ 0 (and up to the largest finite result): round to the nearest integer, a polynomial for the rest, and
 * the integer added to the exponent. Exactly 1 at 0, so that steps of size 0 keep a state as it is. */
INLINE vec exp2v(vec x) {
    x = choose(x < splat(LOWEST), splat(LOWEST), x); /* a NaN compares false and stays */
    vec shifted = x + splat(ROUNDER);
    vec f = x - (shifted - splat(ROUNDER));
#if REAL_BITS == 64
    vec p = splat(4.4549605981865183938e-10);
    p = p * f + splat(7.0725859492692236999e-9);
    p = p * f + splat(1.0178062445845773521e-7);
    p = p * f + splat(1.3215442587921689653e-6);
    p = p * f + splat(1.5252733829836118394e-5);
    p = p * f + splat(1.5403530441736050155e-4);
    p = p * f + splat(1.3333558146416935310e-3);
    p = p * f + splat(9.6181291076068885273e-3);
    p = p * f + splat(5.5504108664821594339e-2);
    p = p * f + splat(2.4022650695910098220e-1);
    p = p * f + splat(6.9314718055994530945e-1);
#else
    vec p = splat(1.5453162945120690e-4f);
    p = p * f + splat(1.3390863364671234e-3f);
    p = p * f + splat(9.6180825572778515e-3f);
    p = p * f + splat(5.5503571142190778e-2f);
    p = p * f + splat(2.4022650760568127e-1f);
    p = p * f + splat(6.9314718802622878e-1f);
#endif
    p = p * f + splat(1);
    return (vec)((ivec)p + ((ivec)shifted << MANTISSA));
}

INLINE vec absolute(vec x) { return choose(x < splat(0), -x, x); }
INLINE vec exp_minus_abs(vec x) { return exp2v(absolute(x) * splat(-LOG2E)); }

INLINE vec sigmoid(vec x) {
    vec e = exp_minus_abs(x);
    return choose(x < splat(0), e, splat(1)) / (splat(1) + e);
}

/* log(1 + exp x) = max(x, 0) + 2 artanh(e / (2 + e)) with e = exp(-|x|); *slope is its derivative, the sigmoid. */
INLINE vec softplus(vec x, vec *slope) {
    vec e = exp_minus_abs(x);
    *slope = choose(x < splat(0), e, splat(1)) / (splat(1) + e);
    vec s = e / (splat(2) + e), s2 = s * s;
    enum { TERMS = REAL_BITS == 64 ? 17 : 8 };
    vec series = splat((real)1 / (2 * TERMS - 1));
#pragma GCC unroll 16
    for (int k = TERMS - 2; k >= 0; k--) series = series * s2 + splat((real)1 / (2 * k + 1));
    return choose(x < splat(0), splat(0), x) + splat(2) * s * series;
}

INLINE void *buffer(size_t bytes) {
    return aligned_alloc(CACHE_LINE, (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE + CACHE_LINE);
}

#endif
