/* experts of experts.py for few rows.

A pair is a row of x and one of the experts that it chose. Pairs are sorted by expert, so that the
weights of each chosen expert are read once. */
#include <stdlib.h>

#include "dot.h"

#define GROUP 16         /* pairs, at most, for which an expert's weights are read once */
#define PRODUCTS 65536   /* floats: results of a thread before they are summed, at most */

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

/* Sorts the pairs by expert. order[i] is the i-th pair, and place[order[i]] is i. Returns the number
   of groups, which have pairs of one expert. start :: [experts + 1] is scratch. */
static int64_t sort_pairs(
    const experts_t *a, int64_t experts, int64_t *start, int64_t *order, int64_t *place,
    group_t *groups
) {
    int64_t pairs = a->rows * a->top_k, count = 0;
    memset(start, 0, (experts + 1) * sizeof *start);
    for (int64_t p = 0; p < pairs; p++) start[a->chosen[p] + 1]++;
    for (int64_t e = 0; e < experts; e++) {
        int64_t end = start[e] + start[e + 1];
        for (int64_t i = start[e]; i < end; i += GROUP)
            groups[count++] = (group_t){e, i, min(GROUP, end - i)};
        start[e + 1] = end;
    }
    for (int64_t p = 0; p < pairs; p++) {
        int64_t i = start[a->chosen[p]]++;
        order[i] = p, place[p] = i;
    }
    return count;
}

/* Returns how many rows of w a thread multiplies at a time, of `rows` ≤ `all` that are read. */
static int64_t chunk_of(const weight_t *w, int64_t rows, int64_t all, int threads) {
    int64_t row_bytes = max(weight_bytes(w) / w->out, 1);
    return min(min(CHUNK, all * row_bytes / (4 * threads)) / row_bytes + 1, rows);
}

/* Columns first … first + count - 1 of gelu(gate) * up of a group's pairs, to out :: [pairs, width],
   with values that dtype has. results :: [2, GROUP, count] is scratch. */
static void gate_up_chunk(
    const weight_t *w, int dtype, const group_t *g, int64_t width, int64_t first, int64_t count,
    const float *const *x, const float *sums, float *unpacked, float *results, float *out
) {
    float *ups = results + GROUP * count;
    int64_t gate = g->expert * 2 * width + first, up = gate + width;
    for (int64_t i = 0; i < count; i++)
        dots(w, gate + i, x, g->count, sums, unpacked, results + i, count);
    for (int64_t i = 0; i < count; i++)
        dots(w, up + i, x, g->count, sums, unpacked, ups + i, count);
    for (int64_t p = 0; p < g->count; p++) {
        float *to = out + p * width + first;
        for (int64_t i = 0; i < count; i++)
            to[i] = geglu_of(results[p * count + i], ups[p * count + i]);
        round_to(to, count, dtype);
    }
}

/* Columns first … first + count - 1 of y: the sums of the pairs' products :: [pairs, count], in the
   order of `chosen`. total :: [count] is scratch. */
static void weighted_sums(
    const experts_t *a, const int64_t *place, const float *products, int64_t dim, int64_t first,
    int64_t count, float *total
) {
    for (int64_t r = 0; r < a->rows; r++) {
        memset(total, 0, count * sizeof *total);
        for (int64_t p = r * a->top_k; p < (r + 1) * a->top_k; p++) {
            const float *product = products + place[p] * count;
            for (int64_t i = 0; i < count; i++) total[i] += a->weight[p] * product[i];
        }
        narrow(total, count, a->y, a->dtype, r * dim + first);
    }
}

/* Returns nonzero if memory ran out; then nothing is written. */
int experts(const experts_t *a, const weight_t *gate_up, const weight_t *down, int threads) {
    int64_t dim = gate_up->dim, width = down->dim, pairs = a->rows * a->top_k;
    int64_t experts = down->out / dim;
    if (!pairs) return 0;
    int64_t *start = malloc((experts + 1 + 2 * pairs) * sizeof *start + pairs * sizeof(group_t));
    if (!start) return 1;
    int64_t *order = start + experts + 1, *place = order + pairs;
    group_t *groups = (group_t *)(place + pairs);
    int64_t count = sort_pairs(a, experts, start, order, place, groups);
    if (count * (weight_bytes(gate_up) + weight_bytes(down)) < SMALL * experts) threads = 1;
    int64_t chunk = chunk_of(gate_up, width, count * width, threads);
    int64_t down_chunk = min(chunk_of(down, dim, dim * count, threads), PRODUCTS / pairs + 1);
    down_chunk = min(down_chunk, dim / (4 * threads) + 1);
    int64_t x_groups = gate_up->minimum ? dim / gate_up->group : 0;
    int64_t hidden_groups = down->minimum ? width / down->group : 0;
    int64_t own = max(dim, width) + max(2 * GROUP * chunk, pairs * down_chunk);
    int64_t shared = a->rows * (dim + x_groups) + pairs * (width + hidden_groups);
    float *x = malloc((shared + threads * own) * sizeof *x);
    const float **rows = malloc(2 * pairs * sizeof *rows), **hiddens = rows + pairs;
    if (!x || !rows) {
        free(start), free(x), free(rows);
        return 1;
    }
    float *x_sums = x + a->rows * dim, *hidden = x_sums + a->rows * x_groups;
    float *hidden_sums = hidden + pairs * width, *scratch = x + shared;
    for (int64_t r = 0; r < a->rows; r++) {
        widen(a->x, a->dtype, r * dim, dim, x + r * dim);
        sum_groups(x + r * dim, x_groups, gate_up->group, x_sums + r * x_groups);
    }
    for (int64_t i = 0; i < pairs; i++)
        rows[i] = x + order[i] / a->top_k * dim, hiddens[i] = hidden + i * width;
    int64_t chunks = (width + chunk - 1) / chunk;
#pragma omp parallel num_threads(threads)
    {
        float *unpacked, *results;
#pragma omp critical
        {
            unpacked = scratch;
            scratch += own;
        }
        results = unpacked + max(dim, width);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < count * chunks; task++) {
            const group_t *g = groups + task / chunks;
            int64_t first = task % chunks * chunk, row = order[g->first] / a->top_k;
            gate_up_chunk(gate_up, a->dtype, g, width, first, min(chunk, width - first),
                          rows + g->first, x_sums + row * x_groups, unpacked, results,
                          hidden + g->first * width);
        }
        if (hidden_groups)
#pragma omp for
            for (int64_t i = 0; i < pairs; i++)
                sum_groups(hiddens[i], hidden_groups, down->group,
                           hidden_sums + i * hidden_groups);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < dim; first += down_chunk) {
            int64_t columns = min(down_chunk, dim - first);
            for (const group_t *g = groups; g < groups + count; g++)
                for (int64_t i = 0; i < columns; i++)
                    dots(down, g->expert * dim + first + i, hiddens + g->first, g->count,
                         hidden_sums + g->first * hidden_groups, unpacked,
                         results + g->first * columns + i, columns);
            weighted_sums(a, place, results, dim, first, columns, unpacked);
        }
    }
    free(start), free(x), free(rows);
    return 0;
}

/* y: the sums over the slots of weight * terms, in the order of `chosen`. terms :: [pairs, dim],
   dtype of y; place[p] is the row of terms of pair p. */
void sum_terms(
    const experts_t *a, const void *terms, const int64_t *place, int64_t dim, int threads
) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < a->rows; r++) {
        float total[dim], term[dim];
        memset(total, 0, dim * sizeof *total);
        for (int64_t p = r * a->top_k; p < (r + 1) * a->top_k; p++) {
            widen(terms, a->dtype, place[p] * dim, dim, term);
            for (int64_t i = 0; i < dim; i++) total[i] += a->weight[p] * term[i];
        }
        narrow(total, dim, a->y, a->dtype, r * dim);
    }
}
