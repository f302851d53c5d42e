/* Models of samples, interpreted: a straight program over one buffer of weights draws sample after sample in one call.
 *
 * Each row of a batch has a memory of its own, activations and states alike, in which instructions name places; widths
 * are whole vectors, whose last lanes are 0. Rows go through an instruction together, so that weights are read once,
 * and each row is computed in the same order of operations whatever stands beside it. */
#include <math.h>

#include "vectors.h"

#if REAL_BITS != 32
#error "programs are in single precision"
#endif

#include "sample_instructions.h"

#define TO_BITS 1.4426950408889634

/* Drop all but the fewest most probable codes that together have at least `top_p`, rounded as torch rounds where they
 * are compared; e are exponentials of sum `total`, of n codes, up to `padded` followed by zeros. */
static void keep_most_probable(real *e, real *kept, int64_t n, int64_t padded, double total, real top_p) {
    double sum = 0;
    memset(kept, 0, (size_t)padded * sizeof(real));
    for (int64_t count = 0; count < n; count++) {
        vec most = at(e);
        for (int64_t i = LANES; i < padded; i += LANES) most = choose(at(e + i) > most, at(e + i), most);
        real largest = most[0];
        for (int k = 1; k < LANES; k++) largest = most[k] > largest ? most[k] : largest;
        real p = (real)(largest / total);
        sum += p;
        if ((real)sum - p >= top_p) return;
        int64_t i = 0;
        while (e[i] != largest) i++;
        kept[i] = e[i];
        e[i] = -1;
    }
}

INLINE double exponentials(const real *logits, real *e, int64_t n, int64_t padded, real largest, real temperature) {
    double total = 0;
    for (int64_t i = 0; i < padded; i += LANES) {
        vec x = (at(logits + i) / splat(temperature) - splat(largest / temperature)) * splat(LOG2E), least = splat(LOWEST);
        put(e + i, choose(x < least, splat(0), exp2v(choose(x < least, least, x))));
    }
    for (int64_t i = n; i < padded; i++) e[i] = 0;
    for (int64_t i = 0; i < n; i++) total += e[i];
    return total;
}

/* The draw of sinuous.core.sampling, by inverting the cumulated probabilities; false if the logits are no numbers. */
static int draw(const arguments *a, const instruction *o, int64_t row, int64_t step, real *e) {
    const real *logits = a->memory + row * a->stride + o->in;
    int64_t n = o->n, padded = (n + LANES - 1) / LANES * LANES, most = 0, code = a->codes[row * a->steps + step];
    double temperature = a->settings[0], top_p = a->settings[1];
    for (int64_t i = 1; i < n; i++) most = logits[i] > logits[most] ? i : most;
    real largest = logits[most];
    double total = exponentials(logits, e, n, padded, largest, 1), whole = total;
    if (!(total < INFINITY)) return 0;
    if (code < 0 && temperature == 0) code = most;
    if (code < 0) {
        real *kept = e;
        if (temperature != 1) whole = exponentials(logits, e, n, padded, largest, (real)temperature);
        if (!(whole < INFINITY)) return 0;
        if (top_p <= 1) {
            kept = e + padded;
            keep_most_probable(e, kept, n, padded, whole, (real)top_p);
            whole = 0;
            for (int64_t i = 0; i < n; i++) whole += kept[i];
        }
        double quantile = a->uniforms[row * a->steps + step] * whole, below = nextafter(whole, 0), sum = 0;
        if (quantile > below) quantile = below;
        for (code = 0; code < n - 1; code++) {
            sum += kept[code];
            if (sum > quantile) break;
        }
    }
    a->codes[row * a->steps + step] = a->current[row] = code;
    a->bits[row * a->steps + step] = (log(total) - ((double)logits[code] - (double)largest)) * TO_BITS;
    return 1;
}

#define EACH_ROW for (real *row = a->memory, *end = row + a->rows * a->stride; row < end; row += a->stride)
#define EACH_VECTOR for (int64_t i = 0; i < o->n; i += LANES)

static void one_step(const arguments *a, int64_t step, real *e) {
    int64_t next;
    for (int64_t pc = 0; pc < a->length; pc = next) {
        const instruction *o = a->program + pc;
        const real *w = a->weights + o->w;
        int64_t position = o->position < 0 ? 0 : a->positions[o->position];
        next = pc + 1;
        switch (o->op) {
        case EMBED:
            for (int64_t r = 0; r < a->rows; r++)
                memcpy(a->memory + r * a->stride + o->out, w + a->current[r] * o->n, (size_t)o->n * sizeof(real));
            break;
        case COPY:
            EACH_ROW memcpy(row + o->out, row + o->in, (size_t)o->n * sizeof(real));
            break;
        case ADD:
            EACH_ROW EACH_VECTOR put(row + o->out + i, at(row + o->out + i) + at(row + o->in + i));
            break;
        case LINEAR:
            linear(a, o);
            break;
        case LAYER_NORM:
            EACH_ROW layer_norm(w, row + o->in, row + o->out, o->n, o->m);
            break;
        case SCALAR_NORM:
            EACH_ROW scalar_norm(w, row + o->in, row + o->out, o->n);
            break;
        case GELU:
            EACH_ROW EACH_VECTOR put(row + o->out + i, gelu(at(row + o->in + i)));
            break;
        case RELU:
            EACH_ROW EACH_VECTOR {
                vec x = at(row + o->in + i);
                put(row + o->out + i, choose(x < splat(0), splat(0), x));
            }
            break;
        case GLU:
            EACH_ROW EACH_VECTOR {
                vec y = at(row + o->in + i) * sigmoid(at(row + o->in + o->m + i));
                put(row + o->out + i, o->flag ? at(row + o->out + i) + y : y);
            }
            break;
        case GATE:
            EACH_ROW EACH_VECTOR put(row + o->out + i, hyperbolic_tangent(at(row + o->in + i)) *
                                                           sigmoid(at(row + o->in + o->m + i)));
            break;
        case LTI:
            lti(a, o);
            break;
        case DELAY:
            EACH_ROW delay(o, row, position);
            if (o->position >= 0) a->positions[o->position] = position + 1 < o->m * o->flag ? position + 1 : 0;
            break;
        case READ:
            EACH_ROW memcpy(row + o->out, row + o->in + position * o->n, (size_t)o->n * sizeof(real));
            break;
        case STORE:
            EACH_ROW memcpy(row + o->out + position * o->n, row + o->in, (size_t)o->n * sizeof(real));
            a->positions[o->position] = position + 1 < o->m ? position + 1 : 0;
            if (position + 1 < o->m) next = o->extra;
            break;
        case LOGISTIC:
            for (int64_t r = 0; r < a->rows; r++) {
                real *row = a->memory + r * a->stride;
                logistic(o, w, row + o->in, row + o->out, a->current[r], e);
            }
            break;
        case SAMPLE:
            for (int64_t r = 0; r < a->rows; r++)
                if (!draw(a, o, r, step, e) && *a->failed < 0) *a->failed = step;
            break;
        }
    }
}

int run(const arguments *a) {
    if (a->size != sizeof *a) return WRONG_LAYOUT;
    int64_t most = 0;
    for (int64_t i = 0; i < a->length; i++) {
        const instruction *o = a->program + i;
        if (o->op == SAMPLE && o->n > most) most = o->n;
        if (o->op == LTI) first_dots(a, o);
    }
    real *e = buffer(2 * (size_t)(most + 2 * LANES) * sizeof(real));
    if (e == NULL) return OUT_OF_MEMORY;
    *a->failed = -1;
    for (int64_t t = 0; t < a->steps && *a->failed < 0; t++) one_step(a, t, e);
    free(e);
    return 0;
}

int lanes(void) { return LANES; }
int block(void) { return BLOCK; }
