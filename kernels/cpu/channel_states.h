/* Recurrences with N numbers per channel: h = a h + (Δ u) B,  y = C·h + D u, times silu(z); forward and backward.
 *
 * A source that includes this file has said before how the step sizes Δ and the decays a come from its inputs:
 *
 *     NORMALISED                             whether Δ depends on |B|², which the caller then hands over; one group
 *     step_size(raw, norm, softplus, slope)  Δ, and in *slope its derivative by raw
 *     norm_slope(delta)                      its derivative by |B|²
 *     decay_exponent(delta)                  what decay() takes of Δ, once for all states
 *     decay(exponent, A, b)                  a
 *     through_decay(…)                       adds what the gradient of a brings to those of Δ, A and B
 *
 * A task is one sequence and one block of channels; inside, time chunk -> vector of channels -> step -> state, with
 * the states of one vector of channels in registers for a whole chunk. Tasks write to places of their own, and the
 * caller adds partial sums in a fixed order, so results do not depend on the number of threads.
 *
 * Time is processing time: the caller turns a reversed scan into negative strides and mirrored bounds. Chunks lie on
 * a grid over the whole time axis, also where packed sequences begin inside one. */

enum { LARGEST_CONSTANT = 16 };

typedef struct {
    int64_t struct_bytes; /* checked by the library: the caller's layout and this one must agree */
    int64_t sequences, steps, channels, states, groups, blocks, chunk, chunks;
    int64_t softplus, packed, threads;
    const int64_t *bounds; /* [sequences + 1] when packed */
    const real *u, *dt, *z, *norm, *B, *C, *dy;
    int64_t u_batch, u_time, dt_batch, dt_time, z_batch, z_time, norm_batch, norm_time;
    int64_t B_batch, B_time, B_group, C_batch, C_time, C_group, dy_batch, dy_time;
    const real *A, *D, *bias, *initial, *dfinal; /* [channels, states], [channels], …, [sequences, channels, states] */
    real *y, *final, *chunk_states;              /* chunk_states: [batch, chunks, channels, states] */
    int64_t y_batch, y_time;
    real *du, *ddt, *dz; /* strides of y */
    real *dB, *dC; /* [blocks per group, batch, steps, groups, states] in processing order */
    real *dnorm;   /* [blocks, batch, steps], where NORMALISED */
    real *dA, *dD, *dbias, *dinitial; /* [sequences, …]; no dA without A */
} Scan;

typedef struct {
    int64_t batch, begin, end, group, first, width, block, sequence;
} Task;

static Task task_of(const Scan *s, int64_t index) {
    int64_t per_group = s->channels / s->groups;
    int64_t size = (per_group + s->blocks - 1) / s->blocks;
    size = (size + LANES - 1) / LANES * LANES;
    Task t;
    t.block = index % s->blocks;
    t.group = index / s->blocks % s->groups;
    t.sequence = index / (s->blocks * s->groups);
    t.batch = s->packed ? 0 : t.sequence;
    t.begin = s->packed ? s->bounds[t.sequence] : 0;
    t.end = s->packed ? s->bounds[t.sequence + 1] : s->steps;
    int64_t start = t.block * size;
    int64_t stop = start + size < per_group ? start + size : per_group;
    t.width = stop - start;
    t.first = t.group * per_group + start;
    return t;
}

INLINE int lanes_at(int64_t width, int64_t vector) {
    int64_t left = width - vector * LANES;
    return left < LANES ? (int)left : LANES;
}

INLINE vec step_size_at(const Scan *s, const Task *t, int64_t time, int64_t channel, vec bias, int lanes, vec *slope) {
    vec raw = load(s->dt + t->batch * s->dt_batch + time * s->dt_time + channel, lanes) + bias;
    vec norm = NORMALISED ? splat(s->norm[t->batch * s->norm_batch + time * s->norm_time]) : splat(0);
    return step_size(raw, norm, s->softplus, slope);
}

/* One chunk of one vector of channels. N is a constant in the specialised calls, so that h stays in registers. */
INLINE void forward_chunk(const Scan *s, const Task *t, int64_t from, int64_t to, int64_t channel, int lanes,
                          const vec *A, vec *h, const int64_t N) {
    const vec skip = s->D ? load(s->D + channel, lanes) : splat(0);
    const vec bias = s->bias ? load(s->bias + channel, lanes) : splat(0);
    const real *u = s->u + t->batch * s->u_batch + channel;
    const real *B = s->B + t->batch * s->B_batch + t->group * s->B_group;
    const real *C = s->C + t->batch * s->C_batch + t->group * s->C_group;
    for (int64_t time = from; time < to; time++) {
        ask(u, s->u_time, time);
        ask(s->dt + t->batch * s->dt_batch + channel, s->dt_time, time);
        ask(s->y + t->batch * s->y_batch + channel, s->y_time, time);
        if (s->z) ask(s->z + t->batch * s->z_batch + channel, s->z_time, time);
        vec slope, x = load(u + time * s->u_time, lanes);
        vec delta = step_size_at(s, t, time, channel, bias, lanes, &slope);
        vec input = delta * x, exponent = decay_exponent(delta), y = skip * x;
        const real *b = B + time * s->B_time, *c = C + time * s->C_time;
#pragma GCC unroll 16
        for (int64_t n = 0; n < N; n++) {
            h[n] = decay(exponent, A[n], splat(b[n])) * h[n] + input * splat(b[n]);
            y += h[n] * splat(c[n]);
        }
        if (s->z) {
            vec z = load(s->z + t->batch * s->z_batch + time * s->z_time + channel, lanes);
            y *= z * sigmoid(z);
        }
        store(s->y + t->batch * s->y_batch + time * s->y_time + channel, y, lanes);
    }
}

INLINE void forward_constant(const Scan *s, const Task *t, int64_t from, int64_t to, int64_t channel, int lanes,
                             const vec *A, vec *parked, const int64_t N) {
    vec h[LARGEST_CONSTANT], a[LARGEST_CONSTANT];
    memcpy(h, parked, (size_t)N * sizeof(vec));
    memcpy(a, A, (size_t)N * sizeof(vec));
    forward_chunk(s, t, from, to, channel, lanes, a, h, N);
    memcpy(parked, h, (size_t)N * sizeof(vec));
}

static int forward_task(const Scan *s, int64_t index) {
    const Task t = task_of(s, index);
    const int64_t N = s->states, vectors = (t.width + LANES - 1) / LANES;
    vec *A = buffer(2 * (size_t)(vectors * N) * sizeof(vec)), *states = A + vectors * N;
    if (!A) return OUT_OF_MEMORY;
    for (int64_t v = 0; v < vectors; v++) {
        const int lanes = lanes_at(t.width, v);
        const int64_t channel = t.first + v * LANES;
        for (int64_t n = 0; n < N; n++) {
            A[v * N + n] = s->A ? gather(s->A + channel * N + n, N, lanes) : splat(0);
            const real *h = s->initial ? s->initial + (t.sequence * s->channels + channel) * N + n : NULL;
            states[v * N + n] = h ? gather(h, N, lanes) : splat(0);
        }
    }
    for (int64_t from = t.begin, to; from < t.end; from = to) {
        to = (from / s->chunk + 1) * s->chunk;
        to = to < t.end ? to : t.end;
        for (int64_t v = 0; v < vectors; v++) {
            const int lanes = lanes_at(t.width, v);
            const int64_t channel = t.first + v * LANES;
            vec *h = states + v * N, *a = A + v * N;
            if (from % s->chunk == 0) {
                real *start = s->chunk_states + ((t.batch * s->chunks + from / s->chunk) * s->channels + channel) * N;
                for (int64_t n = 0; n < N; n++) scatter(start + n, N, h[n], lanes);
            }
            if (lanes == LANES && N == 16)
                forward_constant(s, &t, from, to, channel, LANES, a, h, 16);
            else if (lanes == LANES && N == 8)
                forward_constant(s, &t, from, to, channel, LANES, a, h, 8);
            else
                forward_chunk(s, &t, from, to, channel, lanes, a, h, N);
        }
    }
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t channel = t.first + v * LANES;
        real *final = s->final + (t.sequence * s->channels + channel) * N;
        for (int64_t n = 0; n < N; n++) scatter(final + n, N, states[v * N + n], lanes_at(t.width, v));
    }
    free(A);
    return 0;
}

/* The memory of one task of the backward pass. */
typedef struct {
    vec *A, *adjoint, *dA;     /* [vectors][N]: A, dL/dh after the chunk, sum of dL/dA */
    vec *dD, *dbias;           /* [vectors] */
    vec *dB, *dC;              /* [chunk][N], lanes and vectors of channels still apart */
    vec *decay, *states;       /* [chunk][N] and [chunk + 1][N]: a, and the state before each step and at last */
    vec *delta, *slope, *read; /* [chunk]: Δ, dΔ/ddt, C·h + D u */
    vec *dnorm;                /* [chunk], like dB */
} Work;

INLINE void backward_chunk(const Scan *s, const Task *t, const Work *w, int64_t v, int64_t from, int64_t to,
                           int lanes, vec *restrict h, vec *restrict adjoint, vec *restrict dA, const vec *restrict A,
                           const int64_t N) {
    const int64_t channel = t->first + v * LANES;
    const vec skip = s->D ? load(s->D + channel, lanes) : splat(0);
    const vec bias = s->bias ? load(s->bias + channel, lanes) : splat(0);
    const real *u = s->u + t->batch * s->u_batch + channel;
    const real *B = s->B + t->batch * s->B_batch + t->group * s->B_group;
    const real *C = s->C + t->batch * s->C_batch + t->group * s->C_group;
    for (int64_t time = from; time < to; time++) {
        const int64_t i = time - from;
        ask(u, s->u_time, time);
        ask(s->dt + t->batch * s->dt_batch + channel, s->dt_time, time);
        vec x = load(u + time * s->u_time, lanes);
        vec delta = step_size_at(s, t, time, channel, bias, lanes, &w->slope[i]);
        vec input = delta * x, exponent = decay_exponent(delta), y = skip * x;
        vec *restrict decays = w->decay + i * N, *restrict states = w->states + i * N;
        const real *b = B + time * s->B_time, *c = C + time * s->C_time;
        w->delta[i] = delta;
#pragma GCC unroll 16
        for (int64_t n = 0; n < N; n++) {
            states[n] = h[n];
            decays[n] = decay(exponent, A[n], splat(b[n]));
            h[n] = decays[n] * h[n] + input * splat(b[n]);
        }
        if (s->z) {
            for (int64_t n = 0; n < N; n++) y += h[n] * splat(c[n]);
            w->read[i] = y;
        }
    }
    memcpy(w->states + (to - from) * N, h, (size_t)N * sizeof(vec));
    vec dD = splat(0), dbias = splat(0);
    for (int64_t time = to - 1; time >= from; time--) {
        const int64_t i = time - from, out = t->batch * s->y_batch + time * s->y_time + channel;
        ask_before(s->dy + t->batch * s->dy_batch + channel, s->dy_time, time);
        ask_before(s->du + t->batch * s->y_batch + channel, s->y_time, time);
        ask_before(s->ddt + t->batch * s->y_batch + channel, s->y_time, time);
        if (s->z) ask_before(s->z + t->batch * s->z_batch + channel, s->z_time, time);
        vec x = load(u + time * s->u_time, lanes), delta = w->delta[i], input = delta * x;
        vec dy = load(s->dy + t->batch * s->dy_batch + time * s->dy_time + channel, lanes);
        if (s->z) {
            vec z = load(s->z + t->batch * s->z_batch + time * s->z_time + channel, lanes), gate = sigmoid(z);
            store(s->dz + out, dy * w->read[i] * gate * (splat(1) + z * (splat(1) - gate)), lanes);
            dy *= z * gate;
        }
        const vec *restrict decays = w->decay + i * N, *restrict before = w->states + i * N, *restrict after = before + N;
        vec *restrict dB = w->dB + i * N, *restrict dC = w->dC + i * N;
        const real *b = B + time * s->B_time, *c = C + time * s->C_time;
        vec dinput = splat(0), ddelta = splat(0);
#pragma GCC unroll 16
        for (int64_t n = 0; n < N; n++) {
            vec l = adjoint[n] + dy * splat(c[n]);
            dC[n] += dy * after[n];
            dB[n] += l * input;
            dinput += l * splat(b[n]);
            adjoint[n] = l * decays[n];
            through_decay(l, adjoint[n], before[n], delta, A[n], splat(b[n]), &ddelta, &dA[n], &dB[n]);
        }
        ddelta += dinput * x;
        if (NORMALISED) w->dnorm[i] += ddelta * norm_slope(delta);
        ddelta *= w->slope[i];
        dD += dy * x;
        dbias += ddelta;
        store(s->du + out, dinput * delta + skip * dy, lanes);
        store(s->ddt + out, ddelta, lanes);
    }
    w->dD[v] += dD;
    w->dbias[v] += dbias;
}

INLINE void backward_constant(const Scan *s, const Task *t, const Work *w, int64_t v, int64_t from, int64_t to,
                              vec *start, const int64_t N) {
    vec h[LARGEST_CONSTANT], adjoint[LARGEST_CONSTANT];
    memcpy(h, start, (size_t)N * sizeof(vec));
    memcpy(adjoint, w->adjoint + v * N, (size_t)N * sizeof(vec));
    backward_chunk(s, t, w, v, from, to, LANES, h, adjoint, w->dA + v * N, w->A + v * N, N);
    memcpy(w->adjoint + v * N, adjoint, (size_t)N * sizeof(vec));
}

static int backward_task(const Scan *s, int64_t index) {
    const Task t = task_of(s, index);
    const int64_t N = s->states, K = s->chunk, vectors = (t.width + LANES - 1) / LANES;
    const int64_t count = 3 * vectors * N + 2 * vectors + 4 * K * N + 2 * N + 4 * K;
    vec *memory = buffer((size_t)count * sizeof(vec)), *next = memory;
    if (!memory) return OUT_OF_MEMORY;
    Work w;
    w.A = next, next += vectors * N;
    w.adjoint = next, next += vectors * N;
    w.dA = next, next += vectors * N;
    w.dD = next, next += vectors;
    w.dbias = next, next += vectors;
    w.dB = next, next += K * N;
    w.dC = next, next += K * N;
    w.decay = next, next += K * N;
    w.states = next, next += (K + 1) * N;
    w.delta = next, next += K;
    w.slope = next, next += K;
    w.read = next, next += K;
    w.dnorm = next, next += K;
    vec *start = next;
    memset(w.dA, 0, (size_t)(vectors * N + 2 * vectors) * sizeof(vec));
    for (int64_t v = 0; v < vectors; v++) {
        const int lanes = lanes_at(t.width, v);
        const int64_t channel = t.first + v * LANES, state = (t.sequence * s->channels + channel) * N;
        for (int64_t n = 0; n < N; n++) {
            w.A[v * N + n] = s->A ? gather(s->A + channel * N + n, N, lanes) : splat(0);
            w.adjoint[v * N + n] = s->dfinal ? gather(s->dfinal + state + n, N, lanes) : splat(0);
        }
    }
    const int64_t batches = s->packed ? 1 : s->sequences;
    for (int64_t to = t.end, from; to > t.begin; to = from) {
        from = (to - 1) / K * K;
        from = from > t.begin ? from : t.begin;
        memset(w.dB, 0, (size_t)(2 * K * N) * sizeof(vec));
        if (NORMALISED) memset(w.dnorm, 0, (size_t)K * sizeof(vec));
        for (int64_t v = 0; v < vectors; v++) {
            const int lanes = lanes_at(t.width, v);
            const int64_t channel = t.first + v * LANES;
            const real *h = s->chunk_states + ((t.batch * s->chunks + from / K) * s->channels + channel) * N;
            if (from == t.begin) h = s->initial ? s->initial + (t.sequence * s->channels + channel) * N : NULL;
            for (int64_t n = 0; n < N; n++) start[n] = h ? gather(h + n, N, lanes) : splat(0);
            if (lanes == LANES && N == 16)
                backward_constant(s, &t, &w, v, from, to, start, 16);
            else if (lanes == LANES && N == 8)
                backward_constant(s, &t, &w, v, from, to, start, 8);
            else
                backward_chunk(s, &t, &w, v, from, to, lanes, start, w.adjoint + v * N, w.dA + v * N, w.A + v * N, N);
        }
        const int64_t place = (t.block * batches + t.batch) * s->steps + from;
        for (int64_t i = 0; i < to - from; i++) {
            const int64_t row = ((place + i) * s->groups + t.group) * N;
            for (int64_t n = 0; n < N; n++) {
                s->dB[row + n] = sum_lanes(w.dB[i * N + n]);
                s->dC[row + n] = sum_lanes(w.dC[i * N + n]);
            }
            if (NORMALISED) s->dnorm[place + i] = sum_lanes(w.dnorm[i]);
        }
    }
    for (int64_t v = 0; v < vectors; v++) {
        const int lanes = lanes_at(t.width, v);
        const int64_t channel = t.sequence * s->channels + t.first + v * LANES;
        for (int64_t n = 0; n < N; n++) {
            if (s->dA) scatter(s->dA + channel * N + n, N, w.dA[v * N + n], lanes);
            scatter(s->dinitial + channel * N + n, N, w.adjoint[v * N + n], lanes);
        }
        store(s->dD + channel, w.dD[v], lanes);
        store(s->dbias + channel, w.dbias[v], lanes);
    }
    free(memory);
    return 0;
}

static int run(const Scan *s, int (*task)(const Scan *, int64_t)) {
    if (s->struct_bytes != (int64_t)sizeof(Scan)) return WRONG_LAYOUT;
    const int64_t tasks = s->sequences * s->groups * s->blocks;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads((int)s->threads) if (s->threads > 1 && tasks > 1) reduction(| : failed)
    for (int64_t i = 0; i < tasks; i++) failed |= task(s, i);
    return failed;
}

int forward(const Scan *s) { return run(s, forward_task); }
int backward(const Scan *s) { return run(s, backward_task); }
int lanes(void) { return LANES; }
