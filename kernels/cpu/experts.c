/* experts of experts.py for few rows, and the sum of the experts of prompts.

A pair is a row of x and one of the experts that it chose. Pairs are sorted by expert, so that the
weights of each chosen expert are read once. */
#include <stdlib.h>

#include "dot.h"
#include "tile.h"

#define GROUP 16       /* pairs, at most, for which an expert's weights are read once */
#define PRODUCTS 65536 /* floats: products of a thread before they are summed, about at most */

typedef struct {
    const void *x;         /* [rows, dim] */
    const int32_t *chosen; /* [rows, top_k] */
    const float *weight;   /* [rows, top_k] */
    void *y;               /* [rows, dim] */
    int64_t rows, top_k;
    int dtype;             /* of x and y */
} experts_t;

typedef struct {
    int64_t expert, first, count; /* pairs first … first + count - 1 of the sorted ones */
} group_t;

typedef struct {
    const experts_t *args;
    const weight_t *gate_up, *down;
    int64_t dim, width, pairs, experts;
    int64_t *start;                 /* [experts + 1] */
    int64_t *order, *place;         /* order[i] is the i-th sorted pair, and place[order[i]] is i */
    group_t *groups;                /* of pairs with one expert */
    int64_t count;                  /* of groups */
    int64_t wide_dim, wide_width;   /* floats in a row of x, and of hidden */
    float *x, *hidden;              /* [rows, dim]; [pairs, width], sorted: gelu(gate) * up */
    float *x_sums, *hidden_sums;    /* for one row: of the columns that share a minimum */
    int64_t x_groups, hidden_groups; /* these sums of a row; 0: the weight has no minima */
    const float **rows, **hiddens;  /* [pairs], sorted: row of x; row of hidden */
    int64_t chunk, down_chunk;      /* rows of a weight that a thread multiplies at a time */
} plan_t;

static void sort_pairs(plan_t *p) {
    const int32_t *chosen = p->args->chosen;
    memset(p->start, 0, (p->experts + 1) * sizeof *p->start);
    for (int64_t pair = 0; pair < p->pairs; pair++) p->start[chosen[pair] + 1]++;
    for (int64_t e = 0; e < p->experts; e++) {
        int64_t end = p->start[e] + p->start[e + 1];
        for (int64_t i = p->start[e]; i < end; i += GROUP)
            p->groups[p->count++] = (group_t){e, i, min(GROUP, end - i)};
        p->start[e + 1] = end;
    }
    for (int64_t pair = 0; pair < p->pairs; pair++) {
        int64_t i = p->start[chosen[pair]]++;
        p->order[i] = pair, p->place[pair] = i;
    }
}

/* Rows of w that a thread multiplies at a time, of `rows`, if `all` are read. */
static int64_t chunk_of(const weight_t *w, int64_t rows, int64_t all, int threads) {
    int64_t row_bytes = max(weight_bytes(w) / w->out, 1);
    int64_t chunk = min(CHUNK, all * row_bytes / (4 * threads)) / row_bytes;
    return min((chunk / WIDTH + 1) * WIDTH, rows);
}

static void widen_rows(plan_t *p) {
    const experts_t *a = p->args;
    for (int64_t r = 0; r < a->rows; r++) {
        float *row = p->x + r * p->wide_dim;
        widen(a->x, a->dtype, r * p->dim, p->dim, row);
        memset(row + p->dim, 0, (p->wide_dim - p->dim) * sizeof *row);
        sum_groups(row, p->x_groups, p->gate_up->group, p->x_sums + r * p->x_groups);
    }
    for (int64_t i = 0; i < p->pairs; i++) {
        float *hidden = p->hidden + i * p->wide_width;
        p->rows[i] = p->x + p->order[i] / a->top_k * p->wide_dim;
        p->hiddens[i] = hidden;
        memset(hidden + p->width, 0, (p->wide_width - p->width) * sizeof *hidden);
    }
}

/* Rows first … first + count - 1 of the weight times the group's rows x[…]. sums: for one row, which
   may have chosen an expert twice, those of the groups of columns of x[j], from j * groups on.
   y :: [pairs of the group, count]. */
static void multiply(
    const plan_t *p, const weight_t *w, int64_t first, int64_t count, const float *const *x,
    int64_t pairs, const float *sums, int64_t groups, float *y
) {
    if (p->args->rows > 1) {
        dots(w, first, count, x, pairs, y, count);
        return;
    }
    for (int64_t j = 0; j < pairs; j++)
        for (int64_t i = 0; i < count; i++)
            y[j * count + i] = dot(w, first + i, x[j], sums + j * groups);
}

/* Columns `first` … of `hidden` of one group, at most `chunk`, with values that dtype has.
   results :: [2, GROUP, chunk] is scratch. */
static void hidden_chunk(const plan_t *p, const group_t *g, int64_t first, float *results) {
    int64_t count = min(p->chunk, p->width - first);
    int64_t gate = g->expert * 2 * p->width + first, up = gate + p->width;
    const float *const *x = p->rows + g->first;
    float *ups = results + GROUP * count;
    multiply(p, p->gate_up, gate, count, x, g->count, p->x_sums, 0, results);
    multiply(p, p->gate_up, up, count, x, g->count, p->x_sums, 0, ups);
    for (int64_t j = 0; j < g->count; j++) {
        float *to = (float *)p->hiddens[g->first + j] + first;
        for (int64_t i = 0; i < count; i++)
            to[i] = geglu_of(results[j * count + i], ups[j * count + i]);
        round_to(to, count, p->args->dtype);
    }
}

/* Columns `first` … of y, at most `down_chunk`: sums over the slots, in the order of `chosen`.
   total :: [down_chunk] and products :: [pairs, down_chunk] are scratch. */
static void output_chunk(const plan_t *p, int64_t first, float *total, float *products) {
    const experts_t *a = p->args;
    int64_t count = min(p->down_chunk, p->dim - first);
    for (const group_t *g = p->groups; g < p->groups + p->count; g++)
        multiply(p, p->down, g->expert * p->dim + first, count, p->hiddens + g->first, g->count,
                 p->hidden_sums + g->first * p->hidden_groups, p->hidden_groups,
                 products + g->first * count);
    for (int64_t r = 0; r < a->rows; r++) {
        memset(total, 0, count * sizeof *total);
        for (int64_t pair = r * a->top_k; pair < (r + 1) * a->top_k; pair++) {
            const float *product = products + p->place[pair] * count;
            for (int64_t i = 0; i < count; i++) total[i] += a->weight[pair] * product[i];
        }
        narrow(total, count, a->y, a->dtype, r * p->dim + first);
    }
}

/* scratch :: [threads, own] */
static void run(const plan_t *p, float *scratch, int64_t own, int threads) {
    int64_t chunks = (p->width + p->chunk - 1) / p->chunk;
#pragma omp parallel num_threads(threads)
    {
        float *total, *results;
#pragma omp critical
        {
            total = scratch;
            scratch += own;
        }
        results = total + p->down_chunk;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < p->count * chunks; i++)
            hidden_chunk(p, p->groups + i / chunks, i % chunks * p->chunk, results);
        if (p->hidden_groups)
#pragma omp for
            for (int64_t i = 0; i < p->pairs; i++)
                sum_groups(p->hiddens[i], p->hidden_groups, p->down->group,
                           p->hidden_sums + i * p->hidden_groups);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < p->dim; first += p->down_chunk)
            output_chunk(p, first, total, results);
    }
}

/* Returns nonzero if memory ran out; then nothing is written. */
int experts(const experts_t *a, const weight_t *gate_up, const weight_t *down, int threads) {
    plan_t p = {.args = a, .gate_up = gate_up, .down = down, .dim = gate_up->dim};
    p.width = down->dim, p.pairs = a->rows * a->top_k, p.experts = down->out / p.dim;
    if (!p.pairs) return 0;
    p.start = malloc((p.experts + 1 + 2 * p.pairs) * sizeof *p.start);
    p.groups = malloc(p.pairs * sizeof *p.groups);
    p.rows = malloc(2 * p.pairs * sizeof *p.rows);
    float *memory = NULL;
    if (p.start && p.groups && p.rows) {
        p.order = p.start + p.experts + 1, p.place = p.order + p.pairs;
        p.hiddens = p.rows + p.pairs;
        sort_pairs(&p);
        int64_t bytes = p.count * (weight_bytes(gate_up) + weight_bytes(down)) / p.experts;
        if (bytes < SMALL) threads = 1;
        p.chunk = chunk_of(gate_up, p.width, p.count * p.width, threads);
        int64_t most = (PRODUCTS / p.pairs / WIDTH + 1) * WIDTH;
        p.down_chunk = min(chunk_of(down, p.dim, p.dim, threads), most);
        p.x_groups = gate_up->minimum && a->rows == 1 ? p.dim / gate_up->group : 0;
        p.hidden_groups = down->minimum && a->rows == 1 ? p.width / down->group : 0;
        p.wide_dim = padded(p.dim), p.wide_width = padded(p.width);
        int64_t own = max(2 * GROUP * p.chunk, p.pairs * p.down_chunk) + p.down_chunk;
        int64_t x_size = a->rows * p.wide_dim, x_sums = a->rows * p.x_groups;
        int64_t hidden_size = p.pairs * p.wide_width, shared = x_size + x_sums + hidden_size;
        shared += p.pairs * p.hidden_groups;
        memory = malloc((shared + threads * own) * sizeof *memory + ALIGNMENT);
        if (memory) {
            p.x = aligned(memory), p.hidden = p.x + x_size;
            p.x_sums = p.hidden + hidden_size, p.hidden_sums = p.x_sums + x_sums;
            widen_rows(&p);
            run(&p, p.x + shared, own, threads);
        }
    }
    free(p.start), free(p.groups), free(p.rows), free(memory);
    return !memory;
}

/* y: sums over the slots of weight * terms, in the order of `chosen`. terms :: [pairs, dim], dtype
   of y; place[pair] is the pair's row of terms. */
void sum_terms(
    const experts_t *a, const void *terms, const int64_t *place, int64_t dim, int threads
) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < a->rows; r++) {
        float total[dim], term[dim];
        memset(total, 0, dim * sizeof *total);
        for (int64_t pair = r * a->top_k; pair < (r + 1) * a->top_k; pair++) {
            widen(terms, a->dtype, place[pair] * dim, dim, term);
            for (int64_t i = 0; i < dim; i++) total[i] += a->weight[pair] * term[i];
        }
        narrow(total, dim, a->y, a->dtype, r * dim);
    }
}
