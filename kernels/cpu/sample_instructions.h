/* Instructions of sample_program.c: what each makes of a row's memory, or of all rows where they share weights. */
enum { BLOCK = 64, VECTORS = BLOCK / LANES }; /* outputs of a product whose weights lie together */
enum { LARGEST_RANK = 2 };
enum { FAR = 16 * BLOCK }; /* weights come from beyond the nearest cache, in the order in which they lie: ask early */

/* `out` and `in` are places in a row's memory, `w` in the weights. */
enum {
    EMBED,       /* out = row `code` of the table w, n wide */
    COPY,        /* out = in, n */
    ADD,         /* out += in, n */
    LINEAR,      /* out = W in + bias, or += where `flag`; n blocks of outputs, m inputs */
    LAYER_NORM,  /* out = layer_norm(in) over n; w: weight, bias, eps */
    SCALAR_NORM, /* out = s / std(in) (in - mean(in) + m) over n; w: m, s */
    GELU,        /* out = gelu(in), n */
    RELU,        /* out = relu(in), n */
    GLU,         /* out = a σ(b), or += where `flag`; in = a and, m behind it, b, each n wide */
    GATE,        /* out = tanh(a) σ(b), likewise */
    LTI,         /* out = linear systems of n channels in, m modes each, of rank `flag`; their state at `extra` */
    DELAY,       /* out = in of n channels at flag·m, …, 2m, m steps ago, then in itself; a ring at `extra` */
    READ,        /* out = entry `position` of the queue in, n wide */
    STORE,       /* entry `position` of the group out = in, n wide; unless it is the m-th, go on at `extra` */
    LOGISTIC,    /* out = log p of n codes under m logistics around the last one; w as in `logistic` */
    SAMPLE       /* draw a code from the n logits in */
};

typedef struct {
    int64_t op, out, in, w, n, m, flag, extra, position;
} instruction;

typedef struct {
    int64_t size, threads, rows, stride, steps, length;
    const instruction *program;
    const real *weights;
    real *memory;
    int64_t *positions, *current, *codes; /* codes [rows][steps]: told where 0 or more, else drawn */
    const double *uniforms;
    double *bits;
    const double *settings; /* temperature; top_p, more than 1 for none */
    int64_t *failed;        /* the first step whose logits are no numbers, or -1 */
} arguments;

INLINE vec at(const real *p) { return *(const unaligned_vec *)p; }
INLINE void put(real *p, vec v) { *(unaligned_vec *)p = v; }

/* R rows and V of a block's vectors. */
INLINE void multiply(const real *w, const real *bias, const real *in, real *out, int64_t stride, int64_t inputs,
                     int64_t add, const int R, const int V) {
    vec sums[8][8];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sums[r][v] = at(bias + v * LANES);
    }
    for (int64_t i = 0; i < inputs; i++, w += BLOCK) {
        vec weights[8];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            weights[v] = at(w + v * LANES);
            __builtin_prefetch(w + v * LANES + FAR);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            vec x = splat(in[r * stride + i]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sums[r][v] += weights[v] * x;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            real *to = out + r * stride + v * LANES;
            put(to, add ? at(to) + sums[r][v] : sums[r][v]);
        }
    }
}

/* As many sums as the registers hold. */
#if LANES == 16
#define WIDE(R) ((R) == 8 ? 2 : 4)
#else
#define WIDE(R) (8 / (R))
#endif
INLINE void multiply_block(const real *w, const real *bias, const real *in, real *out, int64_t stride, int64_t inputs,
                           int64_t add, const int R) {
    for (int v = 0; v < VECTORS; v += WIDE(R))
        multiply(w + v * LANES, bias + v * LANES, in, out + v * LANES, stride, inputs, add, R, WIDE(R));
}

static void linear(const arguments *a, const instruction *o) {
    int64_t stride = a->stride, block = (o->m + 1) * BLOCK;
    for (int64_t b = 0; b < o->n; b++) {
        const real *bias = a->weights + o->w + b * block, *w = bias + BLOCK;
        for (int64_t r = 0; r < a->rows;) {
            const real *in = a->memory + r * stride + o->in;
            real *out = a->memory + r * stride + o->out + b * BLOCK;
            int64_t left = a->rows - r;
            if (left >= 8)
                multiply_block(w, bias, in, out, stride, o->m, o->flag, 8), r += 8;
            else if (left >= 4)
                multiply_block(w, bias, in, out, stride, o->m, o->flag, 4), r += 4;
            else if (left >= 2)
                multiply_block(w, bias, in, out, stride, o->m, o->flag, 2), r += 2;
            else
                multiply_block(w, bias, in, out, stride, o->m, o->flag, 1), r += 1;
        }
    }
}

/* x_t = λ x_{t-1} - Σ p (q^* x_{t-1}) + b u_t,  y = C x + D u, on the lanes of a vector of channels, for R rows. What
 * the next step needs of q^* x is summed as x is written, so that a step passes over the state once. */
INLINE void systems(const real *w, const real *in, real *out, real *state, real *dots, int64_t stride, int64_t modes,
                    const int rank, const int R) {
    vec u[2], y[2], z[2][LARGEST_RANK], dot[2][LARGEST_RANK];
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
        u[r] = at(in + r * stride);
        y[r] = at(w) * u[r];
#pragma GCC unroll 2
        for (int k = 0; k < rank; k++) z[r][k] = at(dots + r * stride + k * LANES), dot[r][k] = splat(0);
    }
    w += LANES;
    for (int64_t m = 0; m < modes; m++, w += (6 + 4 * rank) * LANES) {
        vec fr = at(w), fi = at(w + LANES), br = at(w + 2 * LANES), bi = at(w + 3 * LANES);
        vec cr = at(w + 4 * LANES), ci = at(w + 5 * LANES);
#pragma GCC unroll 16
        for (int k = 0; k < 6 + 4 * rank; k++) __builtin_prefetch(w + k * LANES + FAR);
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
            real *x = state + r * stride + 2 * m * LANES;
            vec xr = at(x), xi = at(x + LANES);
            vec real_part = fr * xr - fi * xi + br * u[r], imaginary = fr * xi + fi * xr + bi * u[r];
#pragma GCC unroll 2
            for (int k = 0; k < rank; k++) {
                const real *low = w + (6 + 4 * k) * LANES;
                real_part -= at(low) * z[r][k];
                imaginary -= at(low + LANES) * z[r][k];
            }
            put(x, real_part);
            put(x + LANES, imaginary);
            y[r] += cr * real_part + ci * imaginary;
#pragma GCC unroll 2
            for (int k = 0; k < rank; k++) {
                const real *low = w + (6 + 4 * k) * LANES;
                dot[r][k] += at(low + 2 * LANES) * real_part + at(low + 3 * LANES) * imaginary;
            }
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
        put(out + r * stride, y[r]);
#pragma GCC unroll 2
        for (int k = 0; k < rank; k++) put(dots + r * stride + k * LANES, dot[r][k]);
    }
}

INLINE void systems_of_rank(const arguments *a, const instruction *o, const int rank) {
    int64_t group = LANES * (1 + o->m * (6 + 4 * rank)), dots = o->extra + 2 * o->m * o->n;
    for (int64_t g = 0; g * LANES < o->n; g++) {
        const real *w = a->weights + o->w + g * group;
        for (int64_t r = 0; r < a->rows;) {
            real *row = a->memory + r * a->stride;
            const real *in = row + o->in + g * LANES;
            real *out = row + o->out + g * LANES, *x = row + o->extra + 2 * o->m * g * LANES;
            real *dot = row + dots + rank * g * LANES;
            if (a->rows - r >= 2)
                systems(w, in, out, x, dot, a->stride, o->m, rank, 2), r += 2;
            else
                systems(w, in, out, x, dot, a->stride, o->m, rank, 1), r += 1;
        }
    }
}

static void lti(const arguments *a, const instruction *o) {
    if (o->flag == 0)
        systems_of_rank(a, o, 0);
    else if (o->flag == 1)
        systems_of_rank(a, o, 1);
    else
        systems_of_rank(a, o, 2);
}

/* q^* x of the states at the start of a call. */
static void first_dots(const arguments *a, const instruction *o) {
    int64_t rank = o->flag, mode = (6 + 4 * rank) * LANES;
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t g = 0; g * LANES < o->n; g++)
            for (int64_t k = 0; k < rank; k++) {
                const real *w = a->weights + o->w + g * LANES * (1 + o->m * (6 + 4 * rank)) + LANES;
                const real *q = w + (8 + 4 * k) * LANES;
                real *row = a->memory + r * a->stride + o->extra, *x = row + 2 * o->m * g * LANES;
                vec sum = splat(0);
                for (int64_t m = 0; m < o->m; m++, q += mode, x += 2 * LANES)
                    sum += at(q) * at(x) + at(q + LANES) * at(x + LANES);
                put(row + 2 * o->m * o->n + (g * rank + k) * LANES, sum);
            }
}

static void layer_norm(const real *w, const real *in, real *out, int64_t n, int64_t padded) {
    vec sum = splat(0), squares = splat(0);
    for (int64_t i = 0; i < padded; i += LANES) sum += at(in + i);
    vec mean = splat(sum_lanes(sum) / (real)n);
    for (int64_t i = 0; i < n; i += LANES) {
        int lanes = n - i < LANES ? (int)(n - i) : LANES;
        vec d = load(in + i, lanes) - load((real *)&mean, lanes);
        squares += d * d;
    }
    vec scale = splat(1 / sqrtf(sum_lanes(squares) / (real)n + w[2 * padded]));
    for (int64_t i = 0; i < padded; i += LANES)
        put(out + i, (at(in + i) - mean) * scale * at(w + i) + at(w + padded + i));
}

/* The lanes beyond n stay 0: the first matrix behind has no weights for them, but 0 · ∞ would be no number. */
static void scalar_norm(const real *w, const real *in, real *out, int64_t n) {
    vec sum = splat(0), squares = splat(0);
    for (int64_t i = 0; i < n; i += LANES) sum += at(in + i);
    vec mean = splat(sum_lanes(sum) / (real)n);
    for (int64_t i = 0; i < n; i += LANES) {
        int lanes = n - i < LANES ? (int)(n - i) : LANES;
        vec d = load(in + i, lanes) - load((real *)&mean, lanes);
        squares += d * d;
    }
    vec scale = splat(w[1] / sqrtf(sum_lanes(squares) / (real)n)), shift = splat(w[0]);
    for (int64_t i = 0; i < n; i += LANES) {
        int lanes = n - i < LANES ? (int)(n - i) : LANES;
        vec y = (at(in + i) - mean + shift) * scale, none = splat(0);
        put(out + i, none);
        store(out + i, y, lanes);
    }
}

/* max(x, 0) - |x| erfc(|x| / √2) / 2; the second factor is exp(-x²/2) times a polynomial of 1 / (1 + c |x|), fitted
 * for this file: the error of the product is below 2e-9 before rounding. */
INLINE vec gelu(vec x) {
    vec a = absolute(x), far = splat(16);
    a = choose(a < far, a, far);
    vec t = reciprocal(splat(1) + splat(0.2316419f) * a), p = splat(-1.4052744409e-01f);
    p = p * t + splat(7.1007886415e-01f);
    p = p * t + splat(-9.5735254933e-01f);
    p = p * t + splat(9.2857417651e-01f);
    p = p * t + splat(-3.1971084416e-01f);
    p = p * t + splat(1.9812074707e-01f);
    p = p * t + splat(8.0817087499e-02f);
    vec tail = p * t * exp2v(a * a * splat(-0.5f * LOG2E));
    return choose(x < splat(0), splat(0), x) - absolute(x) * tail;
}

static void delay(const instruction *o, real *row, int64_t position) {
    real *ring = row + o->extra, *out = row + o->out, *in = row + o->in;
    int64_t depth = o->m * o->flag, bytes = o->n * (int64_t)sizeof(real);
    for (int64_t k = 0; k < o->flag; k++) {
        int64_t entry = position + k * o->m;
        memcpy(out + k * o->n, ring + (entry < depth ? entry : entry - depth) * o->n, (size_t)bytes);
    }
    memmove(out + o->flag * o->n, in, (size_t)bytes);
    if (depth > 0) memcpy(ring + position * o->n, in, (size_t)bytes);
}

/* log x of normal x > 0: that of the mantissa m in [√½, √2) is 2 artanh((m - 1) / (m + 1)). A NaN stays one. */
INLINE vec logarithm(vec x) {
    ivec exponent = ((ivec)x - 0x3f3504f3) >> MANTISSA;
    vec m = (vec)((ivec)x - (exponent << MANTISSA)), s = (m - splat(1)) / (m + splat(1)), s2 = s * s;
    vec series = splat(1.0f / 9);
    for (int k = 7; k > 0; k -= 2) series = series * s2 + splat(1.0f / (real)k);
    return splat(2) * s * series + __builtin_convertvector(exponent, vec) * splat(1 / LOG2E) + (x - x);
}

/* log((1 - ε) Σ π (σ(z_c) - σ(z_{c-1})) + ε / n), z_c = (b_c - x - δ) / s, x the level of the code that was read; each
 * difference is σ(z_c) σ(-z_{c-1}) (1 - e^{-(b_c - b_{c-1}) / s}). Of `in` are the logits of π, then δ, then log s. w: ε,
 * least and most of log s; from the second vector on levels, borders b, what rounding took from these, and gaps between
 * them, `padded` each. */
static void logistic(const instruction *o, const real *w, const real *in, real *out, int64_t code, real *e) {
    enum { MOST = 64 };
    int64_t n = o->n, padded = (n + LANES - 1) / LANES * LANES;
    const real *levels = w + LANES, *borders = levels + padded, *rest = borders + padded, *gaps = rest + padded;
    real share[MOST], rate[MOST], largest = in[0], total = 0;
    for (int64_t k = 1; k < o->m; k++) largest = in[k] > largest ? in[k] : largest;
    for (int64_t k = 0; k < o->m; k++) {
        real s = in[2 * o->m + k];
        s = s < w[1] ? w[1] : s > w[2] ? w[2] : s;
        total += share[k] = expf(in[k] - largest);
        rate[k] = expf(-s);
    }
    vec level = splat(levels[code]);
    real *below = e + LANES, *above = below + padded + LANES;
    put(above - LANES, splat(1));
    for (int64_t i = 0; i < padded; i += LANES) put(out + i, splat(w[0] / (real)n));
    for (int64_t k = 0; k < o->m; k++) {
        vec offset = splat(in[o->m + k]), steep = splat(rate[k]), p = splat((1 - w[0]) * share[k] / total);
        for (int64_t i = 0; i < padded; i += LANES) {
            vec z = (at(borders + i) - level + at(rest + i) - offset) * steep, tail = exp_minus_abs(z);
            vec inner = reciprocal(splat(1) + tail), outer = tail * inner;
            put(below + i, choose(z < splat(0), outer, inner));
            put(above + i, choose(z < splat(0), inner, outer));
        }
        below[n - 1] = 1;
        above[n - 1] = 0;
        for (int64_t i = 0; i < padded; i += LANES) {
            vec share_of_gap = -exp2_less_one(at(gaps + i) * steep * splat(-LOG2E));
            put(out + i, at(out + i) + p * at(below + i) * at(above + i - 1) * share_of_gap);
        }
    }
    for (int64_t i = 0; i < padded; i += LANES) put(out + i, logarithm(at(out + i)));
}
