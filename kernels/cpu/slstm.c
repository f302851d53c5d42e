/* Recurrent cells with weights per head: sLSTM, LSTM and GRU, forward and backward through time.
 *
 * A task is one head and a block of sequences, whose rows share every weight that is read: a step is bound by the reads
 * of R, and those of one head stay in the cache of its core. Vectors run over units. Widths are padded to whole vectors
 * with weights of 0, so that no product has a tail. The backward pass knows all outputs: it computes the
 * pre-activations of a chunk again in one product, with steps as rows, and leaves the gradients of R and of the bias to
 * the caller, who has them from dgates in one product over all time. Time is processing time, as in channel_states.h. */
#include "vectors.h"

enum { ROWS = 4 /* sequences of a task */, GATES = 4, STATES = 4, SLSTM = 0, LSTM = 1, GRU = 2 };
enum { Y, C, N, M };
#define LEAST ((real)-1e30) /* of a stabiliser: what is e^-inf in units of it is 0 and not NaN */

typedef struct {
    int64_t struct_bytes;
    int64_t sequences, steps, heads, width, padded, rows, blocks, chunk, chunks, packed, cell, threads;
    const int64_t *bounds;
    const real *gates, *dy;
    int64_t gates_batch, gates_time, gates_gate, gates_head, dy_batch, dy_time, dy_head;
    const real *into_gates, *from_gates;              /* [heads, in, 4, out] and [heads, 4, out, in], padded */
    const real *bias;                                 /* [heads, 4, padded] */
    const real *initial[STATES], *dfinal[STATES];     /* [sequences, heads, width] */
    real *hidden, *chunk_states[STATES], *final[STATES]; /* [batch, steps, …], [batch, chunks, …], like initial */
    real *dgates, *dinitial[STATES];                  /* [batch, steps, 4, heads, width], like initial */
    int64_t hidden_batch, hidden_time, dgates_batch, dgates_time;
} Cells;

typedef struct {
    int64_t head, first, rows, begin, end;
    int64_t vectors;              /* of a row of units */
    real *y, *x;                  /* [rows, padded], [rows, 4, padded]: outputs, and pre-activations or their gradients */
    vec *state[STATES];           /* [rows, vectors] each, y left out; gradients in the backward pass, dy included */
} Task;

static Task task_of(const Cells *s, int64_t index) {
    Task t = {.head = index % s->heads, .first = index / s->heads * s->rows, .vectors = s->padded / LANES};
    t.rows = t.first + s->rows < s->sequences ? s->rows : s->sequences - t.first;
    t.begin = s->packed ? s->bounds[t.first] : 0;
    t.end = s->packed ? s->bounds[t.first + 1] : s->steps;
    return t;
}

/* Rows of x times W, a piece of V vectors of its columns, added to rows of out. Few sums at once would wait for each
 * addition: they are split into chains. */
INLINE void piece(const real *w, int64_t columns, const real *x, int64_t inner, vec *out, const int R, const int V,
                  const int CHAINS) {
    vec sum[CHAINS][R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            sum[0][r][v] = out[r * (columns / LANES) + v];
            if (CHAINS > 1) sum[CHAINS - 1][r][v] = splat(0);
        }
    for (int64_t e = 0; e < inner; e += CHAINS)
#pragma GCC unroll 2
        for (int k = 0; k < CHAINS; k++) {
            const unaligned_vec *row = (const unaligned_vec *)(w + (e + k) * columns);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                const vec w_v = row[v];
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sum[k][r][v] += splat(x[r * inner + e + k]) * w_v;
            }
        }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
            out[r * (columns / LANES) + v] = CHAINS > 1 ? sum[0][r][v] + sum[CHAINS - 1][r][v] : sum[0][r][v];
}

#if VECTOR_BYTES == 64
enum { REGISTERS = 16 }; /* for sums; the others hold a row of weights */
#else
enum { REGISTERS = 8 };
#endif

#define EACH_WIDTH(R)                                                         \
    while (done < vectors) {                                                  \
        const real *w = weights + done * LANES;                               \
        const int64_t left = vectors - done;                                  \
        if (left >= 8 && R * 8 <= REGISTERS)                                  \
            piece(w, columns, x, inner, out + done, R, 8, 1), done += 8;      \
        else if (left >= 4 && R * 4 <= REGISTERS)                             \
            piece(w, columns, x, inner, out + done, R, 4, 1), done += 4;      \
        else if (left >= 2)                                                   \
            piece(w, columns, x, inner, out + done, R, 2, R < 4 ? 2 : 1), done += 2; \
        else                                                                  \
            piece(w, columns, x, inner, out + done, R, 1, 2), done += 1;      \
    }

/* out [rows, columns] += x [rows, inner] weights [inner, columns] */
static void product(const real *weights, int64_t columns, const real *x, int64_t inner, real *to, int64_t rows) {
    const int64_t vectors = columns / LANES;
    vec *out = (vec *)to;
    for (int64_t taken; rows > 0; rows -= taken, x += taken * inner, out += taken * vectors) {
        int64_t done = 0;
        if (rows >= 4) {
            taken = 4;
            EACH_WIDTH(4)
        } else if (rows >= 2) {
            taken = 2;
            EACH_WIDTH(2)
        } else {
            taken = 1;
            EACH_WIDTH(1)
        }
    }
}

/* e^x for x ≤ 0, and 0 where that is no normal number any more. */
INLINE vec decay(vec x) {
    x *= splat(LOG2E);
    return choose(x < splat(LOWEST), splat(0), exp2v(x));
}

/* The sigmoid, exactly 0 at -inf. */
INLINE vec gate(vec x) {
    const vec e = decay(-absolute(x));
    return choose(x < splat(0), e, splat(1)) * reciprocal(splat(1) + e);
}

/* The values of a unit at one step that its gradients need; each kind of cell uses some. */
typedef struct {
    vec i, f, z, o, slope, ratio, inverse, live, y_before, c_before, n_before;
    ivec input, carried;
} Unit;

/* One step of one vector of units, from pre-activations and the state before; `u` gets what the gradients need. */
INLINE vec step(const vec *p, int64_t stride, vec y, vec *c, vec *n, vec *m, Unit *u, const int cell, const int keep) {
    const vec p_i = p[0], p_f = p[stride], p_z = p[2 * stride], p_o = p[3 * stride];
    const vec y_before = y, c_before = *c, n_before = *n;
    vec i, f, z, o, slope = splat(0), ratio, inverse = splat(0), live = splat(0);
    ivec input = {0}, carried_wins = {0};
    if (cell == SLSTM) {
        const vec carried = *m - softplus(-p_f, &slope);
        input = (*n == splat(0)) | (p_i >= carried);
        vec highest = choose(input, p_i, carried);
        const ivec bounded = highest < splat(LEAST);
        highest = choose(bounded, splat(LEAST), highest);
        carried_wins = ~input & ~bounded;
        input &= ~bounded;
        const ivec clipped = carried > highest;
        i = decay(p_i - highest);
        f = decay(choose(clipped, splat(0), carried - highest));
        live = choose(clipped, splat(0), f);
        z = hyperbolic_tangent(p_z);
        o = gate(p_o);
        *m = highest;
        *c = f * c_before + i * z;
        *n = f * n_before + i;
        inverse = choose(*n == splat(0), splat(0), splat(1) / *n);
        ratio = *c * inverse;
        y = o * ratio;
    } else if (cell == LSTM) {
        i = gate(p_i);
        f = gate(p_f);
        z = hyperbolic_tangent(p_z);
        o = gate(p_o);
        *c = f * c_before + i * z;
        ratio = hyperbolic_tangent(*c);
        y = o * ratio;
    } else {
        i = gate(p_i);
        f = gate(p_f);
        z = hyperbolic_tangent(p_z + i * p_o);
        o = p_o;
        ratio = z;
        y = f * y + (splat(1) - f) * z;
    }
    if (keep)
        u->i = i, u->f = f, u->z = z, u->o = o, u->slope = slope, u->ratio = ratio, u->inverse = inverse, u->live = live,
        u->y_before = y_before, u->c_before = c_before, u->n_before = n_before, u->input = input, u->carried = carried_wins;
    return y;
}

/* From the gradient of the state after a step to that before it, without what passes through the pre-activations,
 * whose gradients go to `dp`. Of the three terms that meet in the gradient of m, the one of the gate that attains the
 * maximum cancels, since that gate is 1. It is left out and not subtracted. */
INLINE void step_back(const Unit *u, vec *dp, int64_t stride, vec *dy, vec *dc, vec *dn, vec *dm, const int cell) {
    const vec one = splat(1);
    if (cell == SLSTM) {
        const vec of_c = *dy * u->o * u->inverse;
        const vec c = *dc + of_c, n = *dn - of_c * u->ratio;
        const vec log_i = (c * u->z + n) * u->i, log_f = (c * u->c_before + n * u->n_before) * u->live;
        dp[0] = choose(u->input, *dm - log_f, log_i);
        *dm = choose(u->carried, *dm - log_i, log_f);
        dp[stride] = *dm * u->slope;
        dp[2 * stride] = c * u->i * (one - u->z * u->z);
        dp[3 * stride] = *dy * u->ratio * u->o * (one - u->o);
        *dy = splat(0), *dc = c * u->f, *dn = n * u->f;
    } else if (cell == LSTM) {
        const vec c = *dc + *dy * u->o * (one - u->ratio * u->ratio);
        dp[0] = c * u->z * u->i * (one - u->i);
        dp[stride] = c * u->c_before * u->f * (one - u->f);
        dp[2 * stride] = c * u->i * (one - u->z * u->z);
        dp[3 * stride] = *dy * u->ratio * u->o * (one - u->o);
        *dy = splat(0), *dc = c * u->f;
    } else {
        const vec sum = *dy * (one - u->f) * (one - u->z * u->z);
        dp[0] = sum * u->o * u->i * (one - u->i);
        dp[stride] = *dy * (u->y_before - u->z) * u->f * (one - u->f);
        dp[2 * stride] = sum;
        dp[3 * stride] = sum * u->i;
        *dy = *dy * u->f;
    }
}

#define EACH_VECTOR(lanes)                                                     \
    for (int64_t v = 0, lanes; v < t->vectors; v++)                            \
        for (lanes = s->width - v * LANES < LANES ? s->width - v * LANES : LANES; lanes; lanes = 0)

/* Rows of a tensor of states, [sequences, heads, width], to or from a buffer. */
static void read_states(const Cells *s, const Task *t, const real *from, int64_t stride, vec *to) {
    for (int64_t r = 0; r < t->rows; r++)
        EACH_VECTOR(lanes) to[r * t->vectors + v] = from ? load(from + r * stride + v * LANES, (int)lanes) : splat(0);
}
static void write_states(const Cells *s, const Task *t, const vec *from, real *to, int64_t stride) {
    for (int64_t r = 0; r < t->rows; r++)
        EACH_VECTOR(lanes) store(to + r * stride + v * LANES, from[r * t->vectors + v], (int)lanes);
}

/* Bias and what the input adds, at one step. */
INLINE void read_gates(const Cells *s, const Task *t, int64_t time, real *to) {
    const real *bias = s->bias + t->head * GATES * s->padded;
    for (int64_t r = 0; r < t->rows; r++)
        for (int64_t g = 0; g < GATES; g++) {
            const int64_t batch = s->packed ? 0 : t->first + r;
            const real *from = s->gates + batch * s->gates_batch + t->head * s->gates_head + g * s->gates_gate;
            EACH_VECTOR(lanes) {
                ask(from + v * LANES, s->gates_time, time);
                const vec x = load(from + time * s->gates_time + v * LANES, (int)lanes);
                ((vec *)to)[(r * GATES + g) * t->vectors + v] = x + load(bias + g * s->padded + v * LANES, LANES);
            }
        }
}

INLINE int64_t place_of_states(const Cells *s, const Task *t) { return (t->first * s->heads + t->head) * s->width; }

/* Row `r` of the outputs at a step, or of the states at a chunk's start; both have a row per batch. */
INLINE int64_t place_of_row(const Cells *s, const Task *t) {
    return (s->packed ? 0 : t->first) * s->hidden_batch + t->head * s->width;
}
INLINE int64_t place_of_chunk(const Cells *s, const Task *t, int64_t time) {
    return (((s->packed ? 0 : t->first) * s->chunks + time / s->chunk) * s->heads + t->head) * s->width;
}

INLINE void forward_cells(const Cells *s, const Task *t, const int cell) {
    const int64_t states = s->heads * s->width, columns = GATES * s->padded;
    const real *weights = s->into_gates + t->head * s->padded * columns;
    vec *y = (vec *)t->y;
    for (int64_t time = t->begin; time < t->end; time++) {
        if (time % s->chunk == 0)
            for (int k = 0; k < STATES; k++)
                write_states(s, t, k ? t->state[k] : y, s->chunk_states[k] + place_of_chunk(s, t, time), s->chunks * states);
        read_gates(s, t, time, t->x);
        product(weights, columns, t->y, s->padded, t->x, t->rows);
        for (int64_t r = 0; r < t->rows; r++) {
            real *hidden = s->hidden + place_of_row(s, t) + r * s->hidden_batch + time * s->hidden_time;
            EACH_VECTOR(lanes) {
                const int64_t at = r * t->vectors + v;
                y[at] = step((vec *)t->x + r * GATES * t->vectors + v, t->vectors, y[at], &t->state[C][at],
                             &t->state[N][at], &t->state[M][at], NULL, cell, 0);
                store(hidden + v * LANES, y[at], (int)lanes);
            }
        }
    }
}

/* One chunk: `y_before` and `x` hold its outputs one step late and its pre-activations, `units` what gradients need;
 * t->state are gradients. */
INLINE void backward_chunk(const Cells *s, const Task *t, int64_t from, int64_t to, vec *start[STATES], real *y_before,
                           real *x, Unit *units, const int cell) {
    const int64_t columns = GATES * s->padded, row = t->vectors * t->rows, steps = to - from;
    for (int64_t time = from; time < to; time++) {
        vec *y = (vec *)y_before + (time - from) * row;
        if (time == from)
            memcpy(y, start[Y], (size_t)row * sizeof(vec));
        else
            read_states(s, t, s->hidden + place_of_row(s, t) + (time - 1) * s->hidden_time, s->hidden_batch, y);
        read_gates(s, t, time, x + (time - from) * t->rows * columns);
    }
    product(s->into_gates + t->head * s->padded * columns, columns, y_before, s->padded, x, steps * t->rows);
    for (int64_t at = 0; at < steps * row; at++) {
        const int64_t r = at / t->vectors, v = at % t->vectors, unit = at % row;
        step((vec *)x + r * GATES * t->vectors + v, t->vectors, ((vec *)y_before)[at], &start[C][unit], &start[N][unit],
             &start[M][unit], &units[at], cell, 1);
    }
    for (int64_t time = to - 1; time >= from; time--) {
        for (int64_t r = 0; r < t->rows; r++) {
            const int64_t batch = s->packed ? 0 : t->first + r;
            const real *dy = s->dy + batch * s->dy_batch + t->head * s->dy_head;
            real *dgates = s->dgates + batch * s->dgates_batch + time * s->dgates_time + t->head * s->width;
            EACH_VECTOR(lanes) {
                const int64_t at = r * t->vectors + v;
                vec *dp = (vec *)t->x + r * GATES * t->vectors + v;
                ask_before(dy + v * LANES, s->dy_time, time);
                t->state[Y][at] += load(dy + time * s->dy_time + v * LANES, (int)lanes);
                step_back(&units[(time - from) * row + at], dp, t->vectors, &t->state[Y][at], &t->state[C][at],
                          &t->state[N][at], &t->state[M][at], cell);
                for (int64_t g = 0; g < GATES; g++)
                    store(dgates + g * s->heads * s->width + v * LANES, dp[g * t->vectors], (int)lanes);
            }
        }
        product(s->from_gates + t->head * columns * s->padded, s->padded, t->x, columns, (real *)t->state[Y], t->rows);
    }
}

#define WITH_CELL(function, ...)              \
    if (s->cell == SLSTM)                     \
        function(__VA_ARGS__, SLSTM);         \
    else if (s->cell == LSTM)                 \
        function(__VA_ARGS__, LSTM);          \
    else                                      \
        function(__VA_ARGS__, GRU);

static int forward_task(const Cells *s, int64_t index) {
    Task t = task_of(s, index);
    const size_t row = (size_t)(t.rows * t.vectors);
    vec *memory = buffer(row * (STATES + GATES) * sizeof(vec));
    if (!memory) return OUT_OF_MEMORY;
    for (int k = 0; k < STATES; k++) {
        t.state[k] = memory + (size_t)k * row;
        read_states(s, &t, s->initial[k] ? s->initial[k] + place_of_states(s, &t) : NULL, s->heads * s->width, t.state[k]);
    }
    t.y = (real *)t.state[Y];
    t.x = (real *)(memory + STATES * row);
    WITH_CELL(forward_cells, s, &t)
    for (int k = 0; k < STATES; k++)
        write_states(s, &t, t.state[k], s->final[k] + place_of_states(s, &t), s->heads * s->width);
    free(memory);
    return 0;
}

static int backward_task(const Cells *s, int64_t index) {
    Task t = task_of(s, index);
    const int64_t states = s->heads * s->width;
    const size_t row = (size_t)(t.rows * t.vectors), whole = row * (size_t)s->chunk;
    vec *memory = buffer((row * (2 * STATES + GATES) + whole * (1 + GATES)) * sizeof(vec) + whole * sizeof(Unit));
    if (!memory) return OUT_OF_MEMORY;
    vec *start[STATES];
    for (int k = 0; k < STATES; k++) {
        t.state[k] = memory + (size_t)k * row;
        start[k] = memory + (size_t)(STATES + k) * row;
        read_states(s, &t, s->dfinal[k] ? s->dfinal[k] + place_of_states(s, &t) : NULL, states, t.state[k]);
    }
    vec *y_before = memory + 2 * STATES * row, *x = y_before + whole;
    t.x = (real *)(x + GATES * whole);
    Unit *units = (Unit *)((vec *)t.x + GATES * row);
    for (int64_t to = t.end, from; to > t.begin; to = from) {
        from = (to - 1) / s->chunk * s->chunk;
        from = from > t.begin ? from : t.begin;
        for (int k = 0; k < STATES; k++)
            if (from == t.begin)
                read_states(s, &t, s->initial[k] ? s->initial[k] + place_of_states(s, &t) : NULL, states, start[k]);
            else
                read_states(s, &t, s->chunk_states[k] + place_of_chunk(s, &t, from), s->chunks * states, start[k]);
        WITH_CELL(backward_chunk, s, &t, from, to, start, (real *)y_before, (real *)x, units)
    }
    for (int k = 0; k < STATES; k++)
        write_states(s, &t, t.state[k], s->dinitial[k] + place_of_states(s, &t), states);
    free(memory);
    return 0;
}

static int run(const Cells *s, int (*task)(const Cells *, int64_t)) {
    if (s->struct_bytes != (int64_t)sizeof(Cells)) return WRONG_LAYOUT;
    const int64_t tasks = s->blocks * s->heads;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads((int)s->threads) if (s->threads > 1 && tasks > 1) reduction(| : failed)
    for (int64_t i = 0; i < tasks; i++) failed |= task(s, i);
    return failed;
}

int forward(const Cells *s) { return run(s, forward_task); }
int backward(const Cells *s) { return run(s, backward_task); }
int lanes(void) { return LANES; }
int rows(void) { return ROWS; }
