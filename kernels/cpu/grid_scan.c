/* The recurrence over a grid, cell by cell, forward and backward.
 *
 * Every element of the K × V state is a recurrence of its own, under gates that all share. A tile of elements, ROWS by
 * one vector of lanes, passes the whole grid at once: in registers along one side, `along`, and in a buffer with a place
 * for each cell of that side, the shorter one, `across`. It meets queries, keys and values only as it passes, so that no
 * state of a cell is ever written down, and the work is 8 multiplications per element and cell, where blocks of C · C
 * cells take 4 C.
 *
 * In the forward pass lanes run over values and rows over keys; in the backward pass it is the other way, since its sums
 * are over values, but one. There a tile passes the grid once for the states at the starts of bands of lines, and then
 * band by band from the last, forward to keep both states of its cells, and back. */
#include "vectors.h"

enum { ROWS = 8, GATES = 8, BAND_CELLS = 512 /* whose states, 1 KB of each, stay in a core's second cache */ };

/* The place of a gate: the transition to along or across from along or across, source and mark of both. */
enum { AA, AC, CA, CC, SA, SC, MA, MC };

typedef struct {
    int64_t struct_bytes;
    int64_t batch, inner, outer, inner_step, outer_step, swapped, heads, keys, values, orientations, groups, threads;
    const int64_t *orientation;
    const real *q, *k, *v, *source, *transition, *mark; /* [batch, cells, heads, …] */
    const real *along, *across; /* [batch, outer or inner, heads, orientations, rows, lanes], or NULL for zeros */
    real *y, *along_end, *across_end;
    const real *dy, *dalong_end, *dacross_end;
    real *dq, *dk, *dv, *dsource, *dtransition, *dmark, *dalong, *dacross; /* dv and gates for each group */
} Grid;

/* One tile of one orientation on its walk: places in buffers with a row per cell, along inner first. */
typedef struct {
    const Grid *s;
    int64_t batch, head, orientation, row, rows, lane, all_rows, all_lanes;
    int lanes;
    int64_t first, step, line; /* the place of the walk's first cell, and what leads to the next and the next line */
} Walk;

INLINE int64_t cells(const Grid *s) { return s->inner * s->outer; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t blocks(int64_t length, int64_t size) { return (length + size - 1) / size; }

INLINE int from_end(const Grid *s, int64_t orientation, int outer) {
    return s->orientation[orientation] >> (outer != (int)s->swapped) & 1;
}

static Walk walk_of(const Grid *s, int64_t batch, int64_t head, int64_t row, int64_t all_rows, int64_t lane,
                    int64_t all_lanes) {
    return (Walk){.s = s, .batch = batch, .head = head, .row = row, .rows = least(ROWS, all_rows - row), .lane = lane,
                  .all_rows = all_rows, .all_lanes = all_lanes, .lanes = (int)least(LANES, all_lanes - lane)};
}

static void turn(Walk *w, int64_t orientation) {
    const Grid *s = w->s;
    const int inner = from_end(s, orientation, 0), outer = from_end(s, orientation, 1);
    w->orientation = orientation;
    w->step = inner ? -1 : 1;
    w->line = outer ? -s->inner : s->inner;
    w->first = (outer ? cells(s) - s->inner : 0) + (inner ? s->inner - 1 : 0);
}

/* The tile of a tensor of states at the walk's n-th place on a side. */
INLINE int64_t place_of_state(const Walk *w, int outer, int64_t n) {
    const Grid *s = w->s;
    const int64_t length = outer ? s->outer : s->inner, at = from_end(s, w->orientation, outer) ? length - 1 - n : n;
    const int64_t state = ((w->batch * length + at) * s->heads + w->head) * s->orientations + w->orientation;
    return (state * w->all_rows + w->row) * w->all_lanes + w->lane;
}
static void read_state(const Walk *w, const real *from, int outer, int64_t n, vec *to) {
    for (int64_t r = 0; r < ROWS; r++)
        to[r] = from && r < w->rows ? load(from + place_of_state(w, outer, n) + r * w->all_lanes, w->lanes) : splat(0);
}
static void write_state(const Walk *w, const vec *from, int outer, int64_t n, real *to) {
    for (int64_t r = 0; to && r < w->rows; r++)
        store(to + place_of_state(w, outer, n) + r * w->all_lanes, from[r], w->lanes);
}
static void read_across(const Walk *w, const real *from, vec *to) {
    for (int64_t i = 0; i < w->s->inner; i++) read_state(w, from, 0, i, to + i * ROWS);
}
static void write_across(const Walk *w, const vec *from, real *to) {
    for (int64_t i = 0; i < w->s->inner; i++) write_state(w, from + i * ROWS, 0, i, to);
}

#define EACH_CELL(s, batch, place, cell)                                              \
    for (int64_t j_ = 0, place = 0; j_ < (s)->outer; j_++)                            \
        for (int64_t cell = (batch) * cells(s) + j_ * (s)->outer_step, i_ = 0; i_ < (s)->inner; \
             i_++, place++, cell += (s)->inner_step)

/* Gates lie far apart in their tensors; they are read once for all tiles. `to` is [orientations, cells, GATES]. */
static void read_gates(const Grid *s, int64_t batch, int64_t head, real *to) {
    const int64_t a = s->swapped, c = !a;
    for (int64_t o = 0; o < s->orientations; o++, to += cells(s) * GATES)
        EACH_CELL(s, batch, place, cell) {
            const int64_t at = (cell * s->heads + head) * s->orientations + o;
            const real *S = s->source + at * 2, *T = s->transition + at * 4, *M = s->mark + at * 2;
            real *g = to + place * GATES;
            g[AA] = T[2 * a + a], g[AC] = T[2 * a + c], g[CA] = T[2 * c + a], g[CC] = T[2 * c + c];
            g[SA] = S[a], g[SC] = S[c], g[MA] = M[a], g[MC] = M[c];
        }
}
static void write_gates(const Grid *s, int64_t batch, int64_t head, int64_t group, const real *from) {
    const int64_t a = s->swapped, c = !a, gates = group * s->batch * cells(s) * s->heads * s->orientations;
    for (int64_t o = 0; o < s->orientations; o++, from += cells(s) * GATES)
        EACH_CELL(s, batch, place, cell) {
            const int64_t at = gates + (cell * s->heads + head) * s->orientations + o;
            real *S = s->dsource + at * 2, *T = s->dtransition + at * 4, *M = s->dmark + at * 2;
            const real *g = from + place * GATES;
            T[2 * a + a] = g[AA], T[2 * a + c] = g[AC], T[2 * c + a] = g[CA], T[2 * c + c] = g[CC];
            S[a] = g[SA], S[c] = g[SC], M[a] = g[MA], M[c] = g[MC];
        }
}

/* Rows of two tensors, [cells, 2, ROWS], and vectors of lanes of one, `apart` vectors from cell to cell. */
static void read_rows(const Walk *w, const real *first, const real *second, real *to) {
    EACH_CELL(w->s, w->batch, place, cell) {
        const int64_t at = (cell * w->s->heads + w->head) * w->all_rows + w->row;
        const size_t bytes = (size_t)w->rows * sizeof(real);
        real *pair = to + place * 2 * ROWS;
        if (w->rows == ROWS) {
            memcpy(pair, first + at, ROWS * sizeof(real));
            memcpy(pair + ROWS, second + at, ROWS * sizeof(real));
        } else {
            memset(pair, 0, 2 * ROWS * sizeof(real));
            memcpy(pair, first + at, bytes);
            memcpy(pair + ROWS, second + at, bytes);
        }
    }
}
INLINE int64_t place_of_lanes(const Walk *w, int64_t cell) {
    return (cell * w->s->heads + w->head) * w->all_lanes + w->lane;
}
static void read_lanes(const Walk *w, const real *from, vec *to, int64_t apart) {
    EACH_CELL(w->s, w->batch, place, cell) to[place * apart] = load(from + place_of_lanes(w, cell), w->lanes);
}
static void write_lanes(const Walk *w, const vec *from, real *to, int64_t apart) {
    EACH_CELL(w->s, w->batch, place, cell) store(to + place_of_lanes(w, cell), from[place * apart], w->lanes);
}

/* One cell: both states from those before it, which go to `kept`, to those after it; `along`, just made, is used last. */
INLINE void advance(const real *g, const real *rows, vec lanes, vec *along, vec *restrict across, vec *restrict kept) {
    const vec aa = splat(g[AA]), ac = splat(g[AC]), ca = splat(g[CA]), cc = splat(g[CC]);
    const vec to_along = splat(g[SA]) * lanes, to_across = splat(g[SC]) * lanes;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        const vec a = along[r], c = across[r], row = splat(rows[r]);
        if (kept) kept[r] = a, kept[ROWS + r] = c;
        along[r] = aa * a + (ac * c + to_along * row);
        across[r] = ca * a + (cc * c + to_across * row);
    }
}

static void forward_walk(const Walk *w, const real *gates, const real *rows, const vec *lanes, vec *restrict across,
                         vec *restrict y) {
    const Grid *s = w->s;
    vec along[ROWS];
    read_across(w, s->across, across);
    for (int64_t j = 0; j < s->outer; j++) {
        read_state(w, s->along, 1, j, along);
        for (int64_t i = 0, place = w->first + j * w->line; i < s->inner; i++, place += w->step) {
            const real *g = gates + place * GATES, *keys = rows + place * 2 * ROWS;
            vec from_along = splat(0), from_across = splat(0);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const vec query = splat(keys[ROWS + r]);
                from_along += query * along[r];
                from_across += query * across[i * ROWS + r];
            }
            y[place] += splat(g[MA]) * from_along + splat(g[MC]) * from_across;
            advance(g, keys, lanes[place], along, across + i * ROWS, NULL);
        }
        write_state(w, along, 1, j, s->along_end);
    }
    write_across(w, across, s->across_end);
}

static int forward_task(const Grid *s, int64_t index) {
    const int64_t count = blocks(s->values, LANES), lane = index % count * LANES, head = index / count % s->heads;
    const int64_t batch = index / count / s->heads, n = cells(s);
    vec *lanes = buffer((size_t)(2 * n + ROWS * s->inner) * sizeof(vec));
    real *gates = buffer((size_t)(n * (GATES * s->orientations + 2 * ROWS)) * sizeof(real));
    if (!lanes || !gates) return free(lanes), free(gates), OUT_OF_MEMORY;
    vec *y = lanes + n, *across = y + n;
    real *rows = gates + n * GATES * s->orientations;
    Walk w = walk_of(s, batch, head, 0, s->keys, lane, s->values);
    read_gates(s, batch, head, gates);
    read_lanes(&w, s->v, lanes, 1);
    for (int64_t i = 0; i < n; i++) y[i] = splat(0);
    for (int64_t row = 0; row < s->keys; row += ROWS) {
        w = walk_of(s, batch, head, row, s->keys, lane, s->values);
        read_rows(&w, s->k, s->q, rows);
        for (int64_t o = 0; o < s->orientations; o++) {
            turn(&w, o);
            forward_walk(&w, gates + o * n * GATES, rows, lanes, across, y);
        }
    }
    write_lanes(&w, y, s->y, 1);
    free(lanes), free(gates);
    return 0;
}

#if LANES == 16
#define EACH_LANE(f, d) f(0, d), f(1, d), f(2, d), f(3, d), f(4, d), f(5, d), f(6, d), f(7, d), \
                        f(8, d), f(9, d), f(10, d), f(11, d), f(12, d), f(13, d), f(14, d), f(15, d)
#elif LANES == 8
#define EACH_LANE(f, d) f(0, d), f(1, d), f(2, d), f(3, d), f(4, d), f(5, d), f(6, d), f(7, d)
#elif LANES == 4
#define EACH_LANE(f, d) f(0, d), f(1, d), f(2, d), f(3, d)
#else
#define EACH_LANE(f, d) f(0, d), f(1, d)
#endif
#if defined(__clang__)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* Sums of lanes whose numbers differ in one bit: of `a` where it is 0, of `b` where it is 1. */
#define OWN(lane, bit) ((lane) & (bit) ? LANES + (lane) : (lane))
#define OTHER(lane, bit) (((lane) & (bit) ? LANES : 0) + ((lane) ^ (bit)))
#define PAIRED(a, b, bit) (SHUFFLED(a, b, EACH_LANE(OWN, bit)) + SHUFFLED(a, b, EACH_LANE(OTHER, bit)))

typedef real eight __attribute__((vector_size(8 * sizeof(real)), aligned(sizeof(real)), may_alias));

/* Adds the sums over the lanes of 8 vectors to 8 numbers: each bit of a vector's number becomes that of a lane's. */
INLINE void add_sums(vec *v, real *to) {
    v[0] = PAIRED(v[0], v[1], 1), v[1] = PAIRED(v[2], v[3], 1);
    v[2] = PAIRED(v[4], v[5], 1), v[3] = PAIRED(v[6], v[7], 1);
#if LANES > 2
    v[0] = PAIRED(v[0], v[1], 2), v[1] = PAIRED(v[2], v[3], 2);
#endif
#if LANES > 4
    v[0] = PAIRED(v[0], v[1], 4);
#endif
#if LANES > 8
    v[0] = PAIRED(v[0], v[0], 8);
#endif
    eight sums;
    memcpy(&sums, v, sizeof sums);
    *(eight *)to += sums;
}

/* The memory that a tile of the backward pass reads and adds to; vectors run over keys, rows over values. */
typedef struct {
    const real *gates, *rows; /* [cells, GATES], [cells, 2, ROWS]: values and gradients of y */
    const vec *lanes;         /* [cells, 2]: keys and queries */
    real *dgates, *dv;        /* [cells, GATES], [cells, ROWS] */
    vec *dlanes;              /* [cells, 2] */
    vec *kept, *starts, *across;
    int64_t band;             /* lines of a band */
} Tile;

/* Lines of one band; `kept` gets both states before each cell, [cells of the band, 2, ROWS]. */
INLINE void advance_band(const Walk *w, const Tile *t, int64_t from, int64_t to, vec *restrict across,
                         vec *restrict kept) {
    const Grid *s = w->s;
    vec along[ROWS];
    for (int64_t j = from; j < to; j++) {
        read_state(w, s->along, 1, j, along);
        for (int64_t i = 0, place = w->first + j * w->line; i < s->inner; i++, place += w->step) {
            const real *rows = t->rows + place * 2 * ROWS;
            advance(t->gates + place * GATES, rows, t->lanes[2 * place], along, across + i * ROWS, kept);
            if (kept) kept += 2 * ROWS;
        }
    }
}

/* One cell back: `along` and `across` are gradients of the states after it and become those of the states before. */
INLINE void retreat(const Tile *t, int64_t place, const vec *kept, vec *along, vec *across) {
    const real *g = t->gates + place * GATES, *rows = t->rows + place * 2 * ROWS;
    const vec k = t->lanes[2 * place], q = t->lanes[2 * place + 1];
    vec read_a = splat(0), read_c = splat(0), written_a = splat(0), written_c = splat(0);
    vec sums[GATES] = {splat(0), splat(0), splat(0), splat(0)};
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        const vec a = kept[r], c = kept[ROWS + r], v = splat(rows[r]), dy = splat(rows[ROWS + r]);
        read_a += a * dy, read_c += c * dy;
        written_a += along[r] * v, written_c += across[r] * v;
        sums[AA] += along[r] * a, sums[AC] += along[r] * c;
        sums[CA] += across[r] * a, sums[CC] += across[r] * c;
    }
    sums[SA] = k * written_a, sums[SC] = k * written_c;
    sums[MA] = q * read_a, sums[MC] = q * read_c;
    t->dlanes[2 * place] += splat(g[SA]) * written_a + splat(g[SC]) * written_c;
    t->dlanes[2 * place + 1] += splat(g[MA]) * read_a + splat(g[MC]) * read_c;
    add_sums(sums, t->dgates + place * GATES);
    const vec aa = splat(g[AA]), ac = splat(g[AC]), ca = splat(g[CA]), cc = splat(g[CC]);
    const vec k_a = splat(g[SA]) * k, k_c = splat(g[SC]) * k, q_a = splat(g[MA]) * q, q_c = splat(g[MC]) * q;
    vec products[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        const vec a = along[r], c = across[r], dy = splat(rows[ROWS + r]);
        products[r] = k_a * a + k_c * c;
        along[r] = aa * a + (ca * c + q_a * dy);
        across[r] = ac * a + (cc * c + q_c * dy);
    }
    add_sums(products, t->dv + place * ROWS);
}

static void backward_walk(const Walk *w, const Tile *t) {
    const Grid *s = w->s;
    const int64_t bands = blocks(s->outer, t->band), side = s->inner * ROWS;
    vec *before = t->across, *after = t->across + side; /* states, and gradients of states */
    read_across(w, s->across, before);
    for (int64_t n = 0; n + 1 < bands; n++) {
        memcpy(t->starts + n * side, before, (size_t)side * sizeof(vec));
        advance_band(w, t, n * t->band, (n + 1) * t->band, before, NULL);
    }
    read_across(w, s->dacross_end, after);
    for (int64_t n = bands - 1; n >= 0; n--) {
        const int64_t from = n * t->band, to = least(from + t->band, s->outer);
        if (n + 1 < bands) memcpy(before, t->starts + n * side, (size_t)side * sizeof(vec));
        advance_band(w, t, from, to, before, t->kept);
        const vec *kept = t->kept + (to - from) * side * 2;
        for (int64_t j = to - 1; j >= from; j--) {
            vec along[ROWS];
            read_state(w, s->dalong_end, 1, j, along);
            for (int64_t i = s->inner - 1, place = w->first + j * w->line + i * w->step; i >= 0; i--, place -= w->step)
                retreat(t, place, kept -= 2 * ROWS, along, after + i * ROWS);
            write_state(w, along, 1, j, s->dalong);
        }
    }
    write_across(w, after, s->dacross);
}

/* Lines between two states that are kept, as many as there are such states at least, so that neither grows large. */
static int64_t lines_of_band(const Grid *s) {
    int64_t lines = s->inner ? blocks(BAND_CELLS, s->inner) : 1;
    while (2 * lines * lines < s->outer) lines++;
    return lines < s->outer ? lines : s->outer ? s->outer : 1;
}

static void add_rows(const Walk *w, const real *from, real *to) {
    EACH_CELL(w->s, w->batch, place, cell) {
        real *row = to + (cell * w->s->heads + w->head) * w->all_rows + w->row;
        if (w->rows == ROWS)
            *(eight *)row += *(const eight *)(from + place * ROWS);
        else
            for (int64_t r = 0; r < w->rows; r++) row[r] += from[place * ROWS + r];
    }
}

static int backward_task(const Grid *s, int64_t index) {
    const int64_t group = index % s->groups, head = index / s->groups % s->heads, batch = index / s->groups / s->heads;
    const int64_t n = cells(s), count = blocks(s->keys, LANES), share = blocks(count, s->groups);
    Tile t = {.band = lines_of_band(s)};
    const int64_t bands = blocks(s->outer, t.band), side = s->inner * ROWS;
    vec *lanes = buffer((size_t)(4 * n + side * (2 * t.band + bands + 2)) * sizeof(vec));
    real *gates = buffer((size_t)(n * (2 * GATES * s->orientations + 3 * ROWS)) * sizeof(real));
    if (!lanes || !gates) return free(lanes), free(gates), OUT_OF_MEMORY;
    t.dlanes = lanes + 2 * n;
    t.kept = t.dlanes + 2 * n;
    t.starts = t.kept + 2 * side * t.band;
    t.across = t.starts + side * bands;
    real *dgates = gates + n * GATES * s->orientations, *rows = dgates + n * GATES * s->orientations;
    t.lanes = lanes, t.rows = rows, t.dv = rows + n * 2 * ROWS;
    read_gates(s, batch, head, gates);
    memset(dgates, 0, (size_t)(n * GATES * s->orientations) * sizeof(real));
    real *dv = s->dv + group * s->batch * n * s->heads * s->values;
    for (int64_t block = group * share; block < least(count, (group + 1) * share); block++) {
        Walk w = walk_of(s, batch, head, 0, s->values, block * LANES, s->keys);
        read_lanes(&w, s->k, lanes, 2);
        read_lanes(&w, s->q, lanes + 1, 2);
        for (int64_t i = 0; i < 2 * n; i++) t.dlanes[i] = splat(0);
        for (int64_t row = 0; row < s->values; row += ROWS) {
            w = walk_of(s, batch, head, row, s->values, block * LANES, s->keys);
            read_rows(&w, s->v, s->dy, rows);
            memset(t.dv, 0, (size_t)(n * ROWS) * sizeof(real));
            for (int64_t o = 0; o < s->orientations; o++) {
                turn(&w, o);
                t.gates = gates + o * n * GATES, t.dgates = dgates + o * n * GATES;
                backward_walk(&w, &t);
            }
            add_rows(&w, t.dv, dv);
        }
        write_lanes(&w, t.dlanes, s->dk, 2);
        write_lanes(&w, t.dlanes + 1, s->dq, 2);
    }
    write_gates(s, batch, head, group, dgates);
    free(lanes), free(gates);
    return 0;
}

static int run(const Grid *s, int (*task)(const Grid *, int64_t), int64_t parts) {
    if (s->struct_bytes != (int64_t)sizeof(Grid)) return WRONG_LAYOUT;
    const int64_t tasks = s->batch * s->heads * parts;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads((int)s->threads) if (s->threads > 1 && tasks > 1) reduction(| : failed)
    for (int64_t i = 0; i < tasks; i++) failed |= task(s, i);
    return failed;
}

int forward(const Grid *s) { return run(s, forward_task, blocks(s->values, LANES)); }
int backward(const Grid *s) { return run(s, backward_task, s->groups); }
int lanes(void) { return LANES; }
