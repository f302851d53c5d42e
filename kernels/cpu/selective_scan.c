/* Selective scan: Δ = softplus(raw), or raw itself, and a = exp(Δ A). */
#include "vectors.h"

enum { NORMALISED = 0 };

INLINE vec step_size(vec raw, vec norm, int64_t through_softplus, vec *slope) {
    (void)norm;
    *slope = splat(1);
    return through_softplus ? softplus(raw, slope) : raw;
}

INLINE vec norm_slope(vec delta) {
    (void)delta;
    return splat(0);
}

INLINE vec decay_exponent(vec delta) { return delta * splat(LOG2E); }

INLINE vec decay(vec exponent, vec A, vec b) {
    (void)b;
    return exp2v(exponent * A);
}

/* `decayed` is l a: what the gradient l of the new state brings to that of the state before it. */
INLINE void through_decay(vec l, vec decayed, vec before, vec delta, vec A, vec b, vec *ddelta, vec *dA, vec *dB) {
    (void)l, (void)b, (void)dB;
    vec through = decayed * before;
    *ddelta += through * A;
    *dA += through * delta;
}

#include "channel_states.h"
