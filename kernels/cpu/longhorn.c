/* Longhorn: Δ = ε = β / (1 + β |k|²) with β = sigmoid(raw), and a = 1 - ε k², where k stands in the place of B. */
#include "vectors.h"

enum { NORMALISED = 1 };

INLINE vec step_size(vec raw, vec norm, int64_t through_softplus, vec *slope) {
    (void)through_softplus;
    /* With e = exp(-|raw|), β = e / (1 + e) or 1 / (1 + e): one division for ε and its slope. */
    vec e = exp_minus_abs(raw), one = splat(1) + e, numerator = choose(raw < splat(0), e, splat(1));
    vec inverse = splat(1) / (one + numerator * norm);
    *slope = e * inverse * inverse; /* β (1 - β) / (1 + β |k|²)² */
    return numerator * inverse;
}

INLINE vec norm_slope(vec delta) { return -delta * delta; }

INLINE vec decay_exponent(vec delta) { return delta; }

INLINE vec decay(vec epsilon, vec A, vec k) {
    (void)A;
    return splat(1) - epsilon * (k * k);
}

INLINE void through_decay(vec l, vec decayed, vec before, vec delta, vec A, vec k, vec *ddelta, vec *dA, vec *dB) {
    (void)decayed, (void)A, (void)dA;
    vec through = l * before * k;
    *ddelta -= through * k;
    *dB -= (delta + delta) * through;
}

#include "channel_states.h"
