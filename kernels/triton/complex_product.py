# mypy: allow-untyped-defs, allow-incomplete-defs
"""Products of complex numbers in two tensors, of real and of imaginary parts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def times(a_re, a_im, b_re, b_im, COMPLEX: tl.constexpr = True, CONJUGATED: tl.constexpr = False):
    """a b, or conj(a) b; real numbers, if not COMPLEX, have no part in a second tensor."""
    re, im = a_re * b_re, b_im
    if COMPLEX:
        if CONJUGATED:
            a_im = -a_im
        re, im = re - a_im * b_im, a_re * b_im + a_im * b_re
    return re, im
