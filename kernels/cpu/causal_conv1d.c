/* Depthwise causal convolution, y_t = act(bias + Σ_j weight_j x_{t-W+1+j}); forward and backward.
 *
 * A task is one sequence and one block of channels, with the last W inputs of a vector of channels in registers.
 * Time is processing time, as in selective_scan.c. */
#include "vectors.h"

enum { MAX_WIDTH = 8 };

typedef struct {
    int64_t struct_bytes;
    int64_t sequences, steps, channels, width, blocks, block, silu, packed, threads;
    const int64_t *bounds;
    const real *x, *dy;
    int64_t x_batch, x_time, dy_batch, dy_time;
    const real *weight, *bias, *initial, *dfinal; /* [width, channels], [channels], [sequences, width - 1, channels] */
    real *y, *final;
    int64_t y_batch, y_time;
    real *dx;                          /* strides of y */
    real *dweight, *dbias, *dinitial;  /* [sequences, width, channels], [sequences, channels], like initial */
} Conv;

typedef struct {
    int64_t sequence, batch, begin, end, first, stop;
} Task;

static Task task_of(const Conv *s, int64_t index) {
    Task t;
    t.sequence = index / s->blocks;
    t.batch = s->packed ? 0 : t.sequence;
    t.begin = s->packed ? s->bounds[t.sequence] : 0;
    t.end = s->packed ? s->bounds[t.sequence + 1] : s->steps;
    t.first = index % s->blocks * s->block;
    t.stop = t.first + s->block < s->channels ? t.first + s->block : s->channels;
    return t;
}

/* The input at `time`, which before the first step is one of the initial state. */
INLINE vec input_at(const Conv *s, const Task *t, int64_t time, int64_t channel, int lanes) {
    if (time >= t->begin) return load(s->x + t->batch * s->x_batch + time * s->x_time + channel, lanes);
    if (!s->initial) return splat(0);
    const int64_t row = s->width - 1 - (t->begin - time);
    return load(s->initial + (t->sequence * (s->width - 1) + row) * s->channels + channel, lanes);
}

INLINE vec filter(const vec *window, const vec *weight, vec bias, const int64_t W) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < W; j++) bias += weight[j] * window[j];
    return bias;
}

INLINE void shift(vec *window, vec newest, const int64_t W) {
#pragma GCC unroll 8
    for (int64_t j = 0; j + 1 < W; j++) window[j] = window[j + 1];
    window[W - 1] = newest;
}

INLINE void forward_vector(const Conv *s, const Task *t, int64_t channel, int lanes, const int64_t W) {
    vec weight[MAX_WIDTH], window[MAX_WIDTH];
    const vec bias = s->bias ? load(s->bias + channel, lanes) : splat(0);
    for (int64_t j = 0; j < W; j++) {
        weight[j] = load(s->weight + j * s->channels + channel, lanes);
        window[j] = j ? input_at(s, t, t->begin - W + j, channel, lanes) : splat(0);
    }
    const real *x = s->x + t->batch * s->x_batch + channel;
    real *y = s->y + t->batch * s->y_batch + channel;
    for (int64_t time = t->begin; time < t->end; time++) {
        ask(x, s->x_time, time);
        ask(y, s->y_time, time);
        shift(window, load(x + time * s->x_time, lanes), W);
        vec out = filter(window, weight, bias, W);
        store(y + time * s->y_time, s->silu ? out * sigmoid(out) : out, lanes);
    }
    real *final = s->final + t->sequence * (W - 1) * s->channels + channel;
    for (int64_t j = 0; j + 1 < W; j++) store(final + j * s->channels, window[j + 1], lanes);
}

INLINE void backward_vector(const Conv *s, const Task *t, int64_t channel, int lanes, const int64_t W) {
    vec weight[MAX_WIDTH], window[MAX_WIDTH], dweight[MAX_WIDTH], later[MAX_WIDTH];
    const vec bias = s->bias ? load(s->bias + channel, lanes) : splat(0);
    vec dbias = splat(0);
    for (int64_t j = 0; j < W; j++) {
        weight[j] = load(s->weight + j * s->channels + channel, lanes);
        window[j] = j ? input_at(s, t, t->begin - W + j, channel, lanes) : splat(0);
        dweight[j] = later[j] = splat(0);
    }
    const real *x = s->x + t->batch * s->x_batch + channel, *dy = s->dy + t->batch * s->dy_batch + channel;
    real *dx = s->dx + t->batch * s->y_batch + channel;
    const int64_t tail = t->sequence * (W - 1) * s->channels + channel;
    /* At `time` the gradient of the input W - 1 steps earlier is complete: the last outputs that read it are done. */
    for (int64_t time = t->begin; time < t->end + W - 1; time++) {
        vec dpre = splat(0);
        if (time < t->end) {
            ask(x, s->x_time, time);
            ask(dy, s->dy_time, time);
            ask(dx, s->y_time, time);
            shift(window, load(x + time * s->x_time, lanes), W);
            dpre = load(dy + time * s->dy_time, lanes);
            if (s->silu) {
                vec out = filter(window, weight, bias, W), gate = sigmoid(out);
                dpre *= gate * (splat(1) + out * (splat(1) - gate));
            }
            for (int64_t j = 0; j < W; j++) dweight[j] += dpre * window[j];
            dbias += dpre;
        }
        shift(later, dpre, W); /* later[i] is dpre at time - W + 1 + i, and reads the input through weight W - 1 - i */
        vec gradient = splat(0);
#pragma GCC unroll 8
        for (int64_t i = 0; i < W; i++) gradient += later[i] * weight[W - 1 - i];
        const int64_t source = time - (W - 1), from_end = source - (t->end - (W - 1));
        if (s->dfinal && from_end >= 0) gradient += load(s->dfinal + tail + from_end * s->channels, lanes);
        if (source >= t->begin)
            store(dx + source * s->y_time, gradient, lanes);
        else
            store(s->dinitial + tail + (W - 1 - (t->begin - source)) * s->channels, gradient, lanes);
    }
    for (int64_t j = 0; j < W; j++)
        store(s->dweight + (t->sequence * W + j) * s->channels + channel, dweight[j], lanes);
    store(s->dbias + t->sequence * s->channels + channel, dbias, lanes);
}

#define EACH_VECTOR(function)                                                     \
    for (int64_t channel = t.first; channel < t.stop; channel += LANES) {         \
        const int64_t left = t.stop - channel;                                    \
        if (left >= LANES && s->width == 4)                                       \
            function(s, &t, channel, LANES, 4);                                   \
        else                                                                      \
            function(s, &t, channel, left < LANES ? (int)left : LANES, s->width); \
    }

static void forward_task(const Conv *s, int64_t index) {
    const Task t = task_of(s, index);
    EACH_VECTOR(forward_vector)
}

static void backward_task(const Conv *s, int64_t index) {
    const Task t = task_of(s, index);
    EACH_VECTOR(backward_vector)
}

static int run(const Conv *s, void (*task)(const Conv *, int64_t)) {
    if (s->struct_bytes != (int64_t)sizeof(Conv)) return WRONG_LAYOUT;
    const int64_t tasks = s->sequences * s->blocks;
#pragma omp parallel for schedule(dynamic) num_threads((int)s->threads) if (s->threads > 1 && tasks > 1)
    for (int64_t i = 0; i < tasks; i++) task(s, i);
    return 0;
}

int forward(const Conv *s) { return run(s, forward_task); }
int backward(const Conv *s) { return run(s, backward_task); }
