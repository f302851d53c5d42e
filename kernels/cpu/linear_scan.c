/* Linear scan, h_t = a_t h_{t-1} + x_t with y = h, forward and backward, real or complex.
 *
 * A task is one sequence and one block of channels. It walks all of its channels at each step, so that rows are read in
 * long pieces, with their states in registers; it is bound by memory, so every row is read and written once. The
 * backward pass computes the states of a chunk again, while its rows are in the cache for the gradients anyway.
 * Complex numbers lie interleaved, as they do in a tensor: an even lane is a real part, the odd one after it the
 * imaginary one, and `channels` counts both. Time is processing time, as in channel_states.h. */
#include "vectors.h"

enum { WIDEST = 8 /* vectors of a block */ };

typedef struct {
    int64_t struct_bytes;
    int64_t sequences, steps, channels, blocks, chunk, chunks, packed, complex, constant, threads;
    const int64_t *bounds;
    const real *x, *a, *dy;
    const uint8_t *reset;
    int64_t x_batch, x_time, a_batch, a_time, dy_batch, dy_time, reset_batch, reset_time;
    const real *initial, *dfinal; /* [sequences, channels] */
    real *y, *final, *chunk_states; /* final like initial; chunk_states: [batch, chunks, channels] */
    int64_t y_batch, y_time;
    real *dx, *da, *dinitial;     /* strides of y, but da like initial where a is constant; like initial */
} Scan;

typedef struct {
    int64_t sequence, batch, begin, end, first, stop;
} Task;

static Task task_of(const Scan *s, int64_t index) {
    Task t;
    t.sequence = index / s->blocks;
    t.batch = s->packed ? 0 : t.sequence;
    t.begin = s->packed ? s->bounds[t.sequence] : 0;
    t.end = s->packed ? s->bounds[t.sequence + 1] : s->steps;
    t.first = index % s->blocks * WIDEST * LANES;
    t.stop = t.first + WIDEST * LANES < s->channels ? t.first + WIDEST * LANES : s->channels;
    return t;
}

#if defined(__clang__)
#define SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLE(v, ...) __builtin_shuffle(v, (ivec){__VA_ARGS__})
#endif
#if LANES == 16
#define PAIRS(v, e, o)                                                                                  \
    SHUFFLE(v, e, o, 2 + e, 2 + o, 4 + e, 4 + o, 6 + e, 6 + o, 8 + e, 8 + o, 10 + e, 10 + o, 12 + e, 12 + o, 14 + e, 14 + o)
#elif LANES == 8
#define PAIRS(v, e, o) SHUFFLE(v, e, o, 2 + e, 2 + o, 4 + e, 4 + o, 6 + e, 6 + o)
#elif LANES == 4
#define PAIRS(v, e, o) SHUFFLE(v, e, o, 2 + e, 2 + o)
#else
#define PAIRS(v, e, o) SHUFFLE(v, e, o)
#endif

INLINE vec alternating(real even, real odd) {
    vec v;
    for (int i = 0; i < LANES; i += 2) v[i] = even, v[i + 1] = odd;
    return v;
}

/* a b + c, lane by lane or of interleaved complex numbers; `conjugated`: conj(a) b + c. */
INLINE vec multiply_add(vec a, vec b, vec c, const int complex, const int conjugated) {
    if (!complex) return a * b + c;
    const vec sign = conjugated ? alternating(1, -1) : alternating(-1, 1);
    return PAIRS(a, 0, 0) * b + (PAIRS(a, 1, 1) * sign * PAIRS(b, 1, 0) + c);
}

/* The columns of one vector of channels and those after it, and where its state is dropped. */
typedef struct {
    const real *x, *a, *dy;
    const uint8_t *reset;
} Columns;

INLINE Columns columns_of(const Scan *s, const Task *t, int64_t channel) {
    return (Columns){s->x + t->batch * s->x_batch + channel, s->a + t->batch * s->a_batch + channel,
                     s->dy + t->batch * s->dy_batch + channel,
                     s->reset ? s->reset + t->batch * s->reset_batch : NULL};
}

INLINE int drops(const Scan *s, const Columns *c, int64_t time) {
    return c->reset && c->reset[time * s->reset_time];
}

#define EACH_VECTOR _Pragma("GCC unroll 8") for (int v = 0; v < V; v++)

/* One chunk of V vectors of channels, of which each has `lanes`. */
INLINE void forward_chunk(const Scan *s, const Task *t, int64_t from, int64_t to, int64_t channel, int lanes,
                          vec *parked, const int V, const int complex, const int constant) {
    const Columns c = columns_of(s, t, channel);
    real *y = s->y + t->batch * s->y_batch + channel;
    vec h[WIDEST], factor[WIDEST];
    EACH_VECTOR {
        h[v] = parked[v];
        if (constant) factor[v] = load(c.a + v * LANES, lanes);
    }
    for (int64_t time = from; time < to; time++) {
        const real *x = c.x + time * s->x_time, *a = c.a + time * s->a_time;
        if (drops(s, &c, time))
            EACH_VECTOR h[v] = load(x + v * LANES, lanes);
        else
            EACH_VECTOR {
                const vec a_t = constant ? factor[v] : load(a + v * LANES, lanes);
                h[v] = multiply_add(a_t, h[v], load(x + v * LANES, lanes), complex, 0);
            }
        EACH_VECTOR store(y + time * s->y_time + v * LANES, h[v], lanes);
    }
    EACH_VECTOR parked[v] = h[v];
}

/* `start`: the states before the chunk; `adjoint` and `sum` are carried from the chunk after it; `before` is memory for
 * the states before each step. */
INLINE void backward_chunk(const Scan *s, const Task *t, int64_t from, int64_t to, int64_t channel, int lanes,
                           const real *start, vec *parked, vec *parked_sum, vec *before, const int V,
                           const int complex, const int constant) {
    const Columns c = columns_of(s, t, channel);
    real *dx = s->dx + t->batch * s->y_batch + channel, *da = s->da + t->batch * s->y_batch + channel;
    vec h[WIDEST], factor[WIDEST], adjoint[WIDEST], sum[WIDEST];
    EACH_VECTOR {
        h[v] = start ? load(start + v * LANES, lanes) : splat(0);
        adjoint[v] = parked[v];
        sum[v] = parked_sum[v];
        if (constant) factor[v] = load(c.a + v * LANES, lanes);
    }
    for (int64_t time = from; time < to; time++, before += V) {
        const real *x = c.x + time * s->x_time, *a = c.a + time * s->a_time;
        EACH_VECTOR before[v] = h[v];
        if (drops(s, &c, time))
            EACH_VECTOR h[v] = load(x + v * LANES, lanes);
        else
            EACH_VECTOR {
                const vec a_t = constant ? factor[v] : load(a + v * LANES, lanes);
                h[v] = multiply_add(a_t, h[v], load(x + v * LANES, lanes), complex, 0);
            }
    }
    for (int64_t time = to - 1; time >= from; time--) {
        const real *dy = c.dy + time * s->dy_time, *a = c.a + time * s->a_time;
        const int64_t out = time * s->y_time;
        before -= V;
        EACH_VECTOR {
            adjoint[v] += load(dy + v * LANES, lanes);
            store(dx + out + v * LANES, adjoint[v], lanes);
        }
        if (drops(s, &c, time))
            EACH_VECTOR {
                if (!constant) store(da + out + v * LANES, splat(0), lanes);
                adjoint[v] = splat(0);
            }
        else
            EACH_VECTOR {
                const vec a_t = constant ? factor[v] : load(a + v * LANES, lanes);
                if (constant)
                    sum[v] = multiply_add(before[v], adjoint[v], sum[v], complex, 1);
                else
                    store(da + out + v * LANES, multiply_add(before[v], adjoint[v], splat(0), complex, 1), lanes);
                adjoint[v] = multiply_add(a_t, adjoint[v], splat(0), complex, 1);
            }
    }
    EACH_VECTOR {
        parked[v] = adjoint[v];
        parked_sum[v] = sum[v];
    }
}

/* The flags as constants: no step asks for them, and factors that are constant stay in registers. */
#define WITH_CONSTANT_FLAGS(chunk, ...)         \
    if (s->complex && s->constant)              \
        chunk(__VA_ARGS__, 1, 1);               \
    else if (s->complex)                        \
        chunk(__VA_ARGS__, 1, 0);               \
    else if (s->constant)                       \
        chunk(__VA_ARGS__, 0, 1);               \
    else                                        \
        chunk(__VA_ARGS__, 0, 0);

/* The vectors of a block from number `v` on, as many at once as there are whole ones, but 8, 4 or 1. */
#define EACH_PIECE                                                                                          \
    for (int64_t v = 0, V, left; (left = t.stop - t.first - v * LANES) > 0; v += V)                         \
        for (V = left >= 8 * LANES ? 8 : left >= 4 * LANES ? 4 : 1, left = left < LANES ? left : LANES; left; left = 0)

static int forward_task(const Scan *s, int64_t index) {
    const Task t = task_of(s, index);
    const int64_t state = t.sequence * s->channels + t.first;
    vec h[WIDEST];
    EACH_PIECE for (int64_t i = 0; i < V; i++)
        h[v + i] = s->initial ? load(s->initial + state + (v + i) * LANES, (int)left) : splat(0);
    for (int64_t from = t.begin, to; from < t.end; from = to) {
        to = (from / s->chunk + 1) * s->chunk;
        to = to < t.end ? to : t.end;
        EACH_PIECE {
            const int64_t channel = t.first + v * LANES;
            if (from % s->chunk == 0) {
                real *start = s->chunk_states + (t.batch * s->chunks + from / s->chunk) * s->channels + channel;
                for (int64_t i = 0; i < V; i++) store(start + i * LANES, h[v + i], (int)left);
            }
            if (V == 8)
                WITH_CONSTANT_FLAGS(forward_chunk, s, &t, from, to, channel, LANES, h + v, 8)
            else if (V == 4)
                WITH_CONSTANT_FLAGS(forward_chunk, s, &t, from, to, channel, LANES, h + v, 4)
            else
                WITH_CONSTANT_FLAGS(forward_chunk, s, &t, from, to, channel, (int)left, h + v, 1)
        }
    }
    EACH_PIECE for (int64_t i = 0; i < V; i++) store(s->final + state + (v + i) * LANES, h[v + i], (int)left);
    return 0;
}

static int backward_task(const Scan *s, int64_t index) {
    const Task t = task_of(s, index);
    const int64_t state = t.sequence * s->channels + t.first;
    vec adjoint[WIDEST], sum[WIDEST] = {{0}}, *before = buffer((size_t)(s->chunk * WIDEST) * sizeof(vec));
    if (!before) return OUT_OF_MEMORY;
    EACH_PIECE for (int64_t i = 0; i < V; i++)
        adjoint[v + i] = s->dfinal ? load(s->dfinal + state + (v + i) * LANES, (int)left) : splat(0);
    for (int64_t to = t.end, from; to > t.begin; to = from) {
        from = (to - 1) / s->chunk * s->chunk;
        from = from > t.begin ? from : t.begin;
        EACH_PIECE {
            const int64_t channel = t.first + v * LANES;
            const real *start = s->chunk_states + (t.batch * s->chunks + from / s->chunk) * s->channels + channel;
            if (from == t.begin) start = s->initial ? s->initial + state + v * LANES : NULL;
            if (V == 8)
                WITH_CONSTANT_FLAGS(backward_chunk, s, &t, from, to, channel, LANES, start, adjoint + v, sum + v, before, 8)
            else if (V == 4)
                WITH_CONSTANT_FLAGS(backward_chunk, s, &t, from, to, channel, LANES, start, adjoint + v, sum + v, before, 4)
            else
                WITH_CONSTANT_FLAGS(backward_chunk, s, &t, from, to, channel, (int)left, start, adjoint + v, sum + v, before, 1)
        }
    }
    EACH_PIECE for (int64_t i = 0; i < V; i++) {
        store(s->dinitial + state + (v + i) * LANES, adjoint[v + i], (int)left);
        if (s->constant) store(s->da + state + (v + i) * LANES, sum[v + i], (int)left);
    }
    free(before);
    return 0;
}

static int run(const Scan *s, int (*task)(const Scan *, int64_t)) {
    if (s->struct_bytes != (int64_t)sizeof(Scan)) return WRONG_LAYOUT;
    const int64_t tasks = s->sequences * s->blocks;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads((int)s->threads) if (s->threads > 1 && tasks > 1) reduction(| : failed)
    for (int64_t i = 0; i < tasks; i++) failed |= task(s, i);
    return failed;
}

int forward(const Scan *s) { return run(s, forward_task); }
int backward(const Scan *s) { return run(s, backward_task); }
int block(void) { return WIDEST * LANES; } /* channels of a task, a complex one counted twice */
