/* Depthwise causal convolution, y_t = act(bias + Σ_j weight_j x_{t-W+1+j}); forward and backward.
 *
 * A task is one sequence and one block of channels, with the last W inputs of a vector of channels in registers.
 * Time is processing time, as in channel_states.h. */
#include "vectors.h"

enum { MAX_WIDTH = 8, BLOCK = 64 /* channels of a task */, CHUNK = 64 /* steps */ };

typedef struct {
    int64_t struct_bytes;
    int64_t sequences, steps, channels, width, blocks, silu, packed, threads;
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
    t.first = index % s->blocks * BLOCK;
    t.stop = t.first + BLOCK < s->channels ? t.first + BLOCK : s->channels;
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

/* The values carried from chunk to chunk for one vector of channels. */
typedef struct {
    vec window[MAX_WIDTH]; /* the last inputs */
    vec later[MAX_WIDTH];  /* gradients before the activation, of the last outputs */
    vec dweight[MAX_WIDTH], dbias;
} Column;

INLINE void load_weight(const Conv *s, int64_t channel, int lanes, vec *weight, vec *bias, const int64_t W) {
    *bias = s->bias ? load(s->bias + channel, lanes) : splat(0);
    for (int64_t j = 0; j < W; j++) weight[j] = load(s->weight + j * s->channels + channel, lanes);
}

static void begin(const Conv *s, const Task *t, int64_t channel, int lanes, Column *column) {
    memset(column, 0, sizeof *column);
    for (int64_t j = 1; j < s->width; j++)
        column->window[j] = input_at(s, t, t->begin - s->width + j, channel, lanes);
}

INLINE void forward_chunk(const Conv *s, const Task *t, int64_t from, int64_t to, int64_t channel, int lanes,
                          Column *column, const int64_t W) {
    vec weight[MAX_WIDTH], window[MAX_WIDTH], bias;
    load_weight(s, channel, lanes, weight, &bias, W);
    memcpy(window, column->window, sizeof window);
    const real *x = s->x + t->batch * s->x_batch + channel;
    real *y = s->y + t->batch * s->y_batch + channel;
    for (int64_t time = from; time < to; time++) {
        ask(x, s->x_time, time);
        ask(y, s->y_time, time);
        shift(window, load(x + time * s->x_time, lanes), W);
        vec out = filter(window, weight, bias, W);
        store(y + time * s->y_time, s->silu ? out * sigmoid(out) : out, lanes);
    }
    memcpy(column->window, window, sizeof window);
}

/* At `time` the gradient of the input W - 1 steps earlier is complete: the last outputs that read it are done. */
INLINE void backward_chunk(const Conv *s, const Task *t, int64_t from, int64_t to, int64_t channel, int lanes,
                           Column *column, const int64_t W) {
    vec weight[MAX_WIDTH], window[MAX_WIDTH], later[MAX_WIDTH], dweight[MAX_WIDTH], bias, dbias = column->dbias;
    load_weight(s, channel, lanes, weight, &bias, W);
    memcpy(window, column->window, sizeof window);
    memcpy(later, column->later, sizeof later);
    memcpy(dweight, column->dweight, sizeof dweight);
    const real *x = s->x + t->batch * s->x_batch + channel, *dy = s->dy + t->batch * s->dy_batch + channel;
    real *dx = s->dx + t->batch * s->y_batch + channel;
    const int64_t tail = t->sequence * (W - 1) * s->channels + channel;
    for (int64_t time = from; time < to; time++) {
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
#pragma GCC unroll 8
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
    memcpy(column->window, window, sizeof window);
    memcpy(column->later, later, sizeof later);
    memcpy(column->dweight, dweight, sizeof dweight);
    column->dbias = dbias;
}

/* Time chunk by time chunk, so that the rows of a chunk stay in the cache for all vectors of channels. */
#define EACH_CHUNK_AND_VECTOR(end, function)                                                            \
    for (int64_t from = t.begin, to; from < (end); from = to) {                                         \
        to = from + CHUNK < (end) ? from + CHUNK : (end);                                               \
        EACH_VECTOR {                                                                                   \
            if (lanes == LANES && s->width == 4)                                                        \
                function(s, &t, from, to, channel, LANES, column, 4);                                   \
            else                                                                                        \
                function(s, &t, from, to, channel, (int)lanes, column, s->width);                            \
        }                                                                                               \
    }
#define EACH_VECTOR                                                                                     \
    for (Column *column = columns; column < columns + vectors; column++)                                \
        for (int64_t channel = t.first + (column - columns) * LANES, left = t.stop - channel,           \
                     lanes = left < LANES ? left : LANES; left; left = 0)

static void forward_task(const Conv *s, int64_t index) {
    const Task t = task_of(s, index);
    Column columns[BLOCK / LANES];
    const int64_t vectors = (t.stop - t.first + LANES - 1) / LANES;
    EACH_VECTOR begin(s, &t, channel, (int)lanes, column);
    EACH_CHUNK_AND_VECTOR(t.end, forward_chunk)
    EACH_VECTOR {
        real *final = s->final + t.sequence * (s->width - 1) * s->channels + channel;
        for (int64_t j = 0; j + 1 < s->width; j++) store(final + j * s->channels, column->window[j + 1], (int)lanes);
    }
}

static void backward_task(const Conv *s, int64_t index) {
    const Task t = task_of(s, index);
    Column columns[BLOCK / LANES];
    const int64_t vectors = (t.stop - t.first + LANES - 1) / LANES;
    EACH_VECTOR begin(s, &t, channel, (int)lanes, column);
    EACH_CHUNK_AND_VECTOR(t.end + s->width - 1, backward_chunk)
    EACH_VECTOR {
        real *dweight = s->dweight + t.sequence * s->width * s->channels + channel;
        for (int64_t j = 0; j < s->width; j++) store(dweight + j * s->channels, column->dweight[j], (int)lanes);
        store(s->dbias + t.sequence * s->channels + channel, column->dbias, (int)lanes);
    }
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
