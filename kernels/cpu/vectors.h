/* Vectors of REAL (float or double) with explicit lanes, and the functions that recurrences need of them.
 *
 * Lanes are explicit so that nothing has to be reassociated: the sources need no -ffast-math, which would break the
 * rounding trick in exp2v and, with some compilers, turn off denormals for the whole process. */
#ifndef SINUOUS_VECTORS_H
#define SINUOUS_VECTORS_H

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
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

#define LANES (VECTOR_BYTES * 8 / REAL_BITS)
#define INLINE static inline __attribute__((always_inline))
#define LOG2E ((real)1.44269504088896340736)
#define CACHE_LINE 64

enum { OUT_OF_MEMORY = 1, WRONG_LAYOUT = 2 }; /* what a kernel returns when it did not run */

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
#if defined(__clang__)
#define ADD_SHUFFLED(v, ...) (v) += __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define ADD_SHUFFLED(v, ...) (v) += __builtin_shuffle(v, (ivec){__VA_ARGS__})
#endif
/* Halves, quarters and so on: a sum in a row would wait for each addition. */
INLINE real sum_lanes(vec v) {
#if LANES == 16
    ADD_SHUFFLED(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    ADD_SHUFFLED(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    ADD_SHUFFLED(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    ADD_SHUFFLED(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif LANES == 8
    ADD_SHUFFLED(v, 4, 5, 6, 7, 0, 1, 2, 3);
    ADD_SHUFFLED(v, 2, 3, 0, 1, 6, 7, 4, 5);
    ADD_SHUFFLED(v, 1, 0, 3, 2, 5, 4, 7, 6);
#elif LANES == 4
    ADD_SHUFFLED(v, 2, 3, 0, 1);
    ADD_SHUFFLED(v, 1, 0, 3, 2);
#else
    ADD_SHUFFLED(v, 1, 0);
#endif
    return v[0];
}

/* x = whole + rest with |rest| ≤ 1/2, and p · 2^whole. */
#if defined(__AVX512F__) && REAL_BITS == 64
INLINE vec split(vec x, vec *whole) { return x - (*whole = (vec)_mm512_roundscale_pd((__m512d)x, 8)); }
INLINE vec scale(vec p, vec whole) { return (vec)_mm512_scalef_pd((__m512d)p, (__m512d)whole); }
#elif defined(__AVX512F__)
INLINE vec split(vec x, vec *whole) { return x - (*whole = (vec)_mm512_roundscale_ps((__m512)x, 8)); }
INLINE vec scale(vec p, vec whole) { return (vec)_mm512_scalef_ps((__m512)p, (__m512)whole); }
#else
/* The whole number stands in the low bits of `whole`, from where it moves to the exponent: good down to 2^LOWEST. */
INLINE vec split(vec x, vec *whole) {
    x = choose(x < splat(LOWEST), splat(LOWEST), x); /* a NaN compares false and stays */
    *whole = x + splat(ROUNDER);
    return x - (*whole - splat(ROUNDER));
}
INLINE vec scale(vec p, vec whole) { return (vec)((ivec)p + ((ivec)whole << MANTISSA)); }
#endif

/* q with 2^f = 1 + f q, for |f| ≤ 1/2. */
INLINE vec exp2_slope(vec f) {
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
    return p;
}

/* 2^x for x ≤ 0 and up to the largest finite result: the nearest whole number goes to the exponent, a polynomial does
 * the rest. Exactly 1 at 0, so that steps of size 0 keep a state as it is. */
INLINE vec exp2v(vec x) {
    vec whole, f = split(x, &whole);
    return scale(exp2_slope(f) * f + splat(1), whole);
}

INLINE vec absolute(vec x) { return choose(x < splat(0), -x, x); }
INLINE vec exp_minus_abs(vec x) { return exp2v(absolute(x) * splat(-LOG2E)); }

/* 1 / x for x in [1, 6]: an estimate to 14 bits and one step of Newton's are several times cheaper than a division. */
INLINE vec reciprocal(vec x) {
#if defined(__AVX512F__) && REAL_BITS == 32
    vec r = (vec)_mm512_rcp14_ps((__m512)x);
    return r * (splat(2) - x * r);
#else
    return splat(1) / x;
#endif
}

INLINE vec sigmoid(vec x) {
    vec e = exp_minus_abs(x);
    return choose(x < splat(0), e, splat(1)) * reciprocal(splat(1) + e);
}

/* 2^x - 1 for x ≤ 0, which does not lose the small x. */
INLINE vec exp2_less_one(vec x) {
    vec whole, least = splat(-64), f = split(choose(x < least, least, x), &whole), power = scale(splat(1), whole);
    return power * f * exp2_slope(f) + (power - splat(1));
}

/* With d = exp(-2 |x|) - 1: tanh |x| = -d / (2 + d). */
INLINE vec hyperbolic_tangent(vec x) {
    vec d = exp2_less_one(absolute(x) * (splat(-2) * LOG2E));
    return choose(x < splat(0), d, -d) * reciprocal(splat(2) + d);
}

/* log(1 + exp x) = max(x, 0) + 2 artanh(e / (2 + e)) with e = exp(-|x|); *slope is its derivative, the sigmoid. */
INLINE vec softplus(vec x, vec *slope) {
    vec e = exp_minus_abs(x), one = splat(1) + e, two = splat(2) + e;
    vec inverse = reciprocal(one * two); /* serves both */
    *slope = choose(x < splat(0), e, splat(1)) * two * inverse;
    vec s = e * one * inverse, s2 = s * s;
    enum { TERMS = REAL_BITS == 64 ? 17 : 8 };
    vec series = splat((real)1 / (2 * TERMS - 1));
#pragma GCC unroll 16
    for (int k = TERMS - 2; k >= 0; k--) series = series * s2 + splat((real)1 / (2 * k + 1));
    return choose(x < splat(0), splat(0), x) + splat(2) * s * series;
}

/* Rows are far apart, and the next one lies beyond what a core looks ahead: ask for it some steps before. Addresses
 * past either end are never read. */
enum { AHEAD = 6 };
INLINE void ask(const real *p, int64_t stride, int64_t time) { __builtin_prefetch(p + (time + AHEAD) * stride); }
INLINE void ask_before(const real *p, int64_t stride, int64_t time) { __builtin_prefetch(p + (time - AHEAD) * stride); }

INLINE void *buffer(size_t bytes) {
    return aligned_alloc(CACHE_LINE, (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE + CACHE_LINE);
}

#endif
