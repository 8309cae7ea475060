/* decode_attention of decode_attention.py: one new token per sequence.

Keys are divided into blocks of BLOCK. A thread computes a block for all query heads of a kv head,
which share its keys: scores, softmax of the block, values. The blocks' results are merged in order,
so that results do not depend on the number of threads. */
#include <stdlib.h>

#include "rotary.h"

#define BLOCK 128

typedef struct {
    const void *qkv;       /* [b, n * m + new heads, dim], contiguous */
    void *keys, *values;   /* [b, n, slots, dim], rows of dim contiguous */
    const float *cos, *sin; /* [positions, dim / 2] */
    const int32_t *position;
    void *out;              /* [b, n * m, dim] */
    int64_t b, n, m, slots, window; /* window 0: none */
    int64_t batch_stride, head_stride, slot_stride;
    float scale, softcap; /* softcap 0: none */
    int new_keys, new_values; /* whether qkv has the token's keys; and its values */
} decode_t;

/* Scores of `count` keys from position `first` on, for m queries :: [m, dim]. */
INLINE void block_scores(
    const decode_t *a, int dtype, int64_t ring, int64_t dim, int64_t first, int64_t count,
    const float *queries, float *scores
) {
    float key[dim];
    for (int64_t k = 0; k < count; k++) {
        int64_t start = ring + (first + k) % a->slots * a->slot_stride;
        widen(a->keys, dtype, start, dim, key);
        for (int64_t m = 0; m < a->m; m++) {
            const float *query = queries + m * dim;
            floats total = {0};
            int64_t i = 0;
            for (; i + LANES <= dim; i += LANES) total += load_f32(query + i) * load_f32(key + i);
            float score = sum(total);
            for (; i < dim; i++) score += query[i] * key[i];
            score *= a->scale;
            scores[m * BLOCK + k] = a->softcap ? a->softcap * tanhf(score / a->softcap) : score;
        }
    }
}

/* One query head's softmax of a block: weights in place of scores, their sum, and the maximum. */
static void block_softmax(float *scores, int64_t count, float *top, float *total) {
    float highest = -INFINITY, all = 0;
    for (int64_t k = 0; k < count; k++) highest = scores[k] > highest ? scores[k] : highest;
    for (int64_t k = 0; k < count; k++) scores[k] = exponential(scores[k] - highest);
#pragma omp simd reduction(+ : all)
    for (int64_t k = 0; k < count; k++) all += scores[k];
    *top = highest, *total = all;
}

/* out :: [m, dim] = weights :: [m, BLOCK] @ values of the block. */
INLINE void block_values(
    const decode_t *a, int dtype, int64_t ring, int64_t dim, int64_t first, int64_t count,
    const float *weights, float *out
) {
    float value[dim];
    memset(out, 0, a->m * dim * sizeof *out);
    for (int64_t k = 0; k < count; k++) {
        int64_t start = ring + (first + k) % a->slots * a->slot_stride;
        widen(a->values, dtype, start, dim, value);
        for (int64_t m = 0; m < a->m; m++) {
            float weight = weights[m * BLOCK + k], *to = out + m * dim;
            for (int64_t i = 0; i < dim; i++) to[i] += weight * value[i];
        }
    }
}

static void block_of(
    const decode_t *a, int dtype, int64_t ring, int64_t dim, int64_t first, int64_t count,
    const float *queries, float *out, float *tops, float *totals
) {
    float scores[a->m * BLOCK];
    block_scores(a, dtype, ring, dim, first, count, queries, scores);
    for (int64_t m = 0; m < a->m; m++)
        block_softmax(scores + m * BLOCK, count, tops + m, totals + m);
    block_values(a, dtype, ring, dim, first, count, scores, out);
}

/* Writes the new token's key and value of a kv head to the ring. */
static void write_token(
    const decode_t *a, const head_t *key_head, const head_t *value_head, int64_t batch, int64_t n,
    const float *cos, const float *sin
) {
    int64_t dim = key_head->dim, heads = a->n * (a->m + a->new_keys + a->new_values);
    int64_t key = batch * heads + a->n * a->m + n, value = a->new_values ? key + a->n : key;
    int64_t slot = a->position[batch] % a->slots;
    int64_t to = batch * a->batch_stride + n * a->head_stride + slot * a->slot_stride;
    float row[dim];
    widen(a->qkv, key_head->dtype, key * dim, dim, row);
    rotate_head(key_head, row, cos, sin);
    narrow(row, dim, a->keys, key_head->dtype, to);
    widen(a->qkv, key_head->dtype, value * dim, dim, row);
    rotate_head(value_head, row, NULL, NULL);
    narrow(row, dim, a->values, key_head->dtype, to);
}

/* Merges the blocks' results of one query head, and writes it. */
static void merge(
    const float *outs, const float *tops, const float *totals, int64_t blocks, int64_t stride,
    int64_t m, int64_t dim, float *row
) {
    float top = -INFINITY, total = 0;
    for (int64_t i = 0; i < blocks; i++) top = tops[i * m] > top ? tops[i * m] : top;
    for (int64_t i = 0; i < blocks; i++) {
        float factor = exponential(tops[i * m] - top);
        total += factor * totals[i * m];
        for (int64_t d = 0; d < dim; d++) {
            float old = i ? row[d] : 0;
            row[d] = old + factor * outs[i * stride + d];
        }
    }
    for (int64_t d = 0; d < dim; d++) row[d] /= total;
}

/* Returns nonzero if memory ran out; then nothing is written. */
int decode_attention(
    const decode_t *a, const head_t *query_head, const head_t *key_head, const head_t *value_head,
    int threads
) {
    int64_t dim = query_head->dim, group = a->m * dim, heads = a->n * a->m;
    int64_t all_heads = heads + a->n * (a->new_keys + a->new_values), longest = 0;
    for (int64_t batch = 0; batch < a->b; batch++) longest = max(longest, a->position[batch] + 1);
    longest = min(longest, a->window ? min(a->window, a->slots) : a->slots);
    int64_t blocks = (longest + BLOCK - 1) / BLOCK, items = a->b * a->n * blocks;
    float *queries = malloc((a->b * heads * dim + items * (group + 2 * a->m)) * sizeof *queries);
    if (!queries) return 1;
    float *outs = queries + a->b * heads * dim, *tops = outs + items * group;
    float *totals = tops + items * a->m;
    if (items * BLOCK * dim < 65536) threads = 1; /* elements: not worth a second thread */
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2)
        for (int64_t batch = 0; batch < a->b; batch++)
            for (int64_t n = 0; n < a->n; n++) {
                if (a->position[batch] < 0) continue;
                int64_t angle = a->position[batch] * (dim / 2);
                const float *cos = a->cos + angle, *sin = a->sin + angle;
                if (a->new_keys) write_token(a, key_head, value_head, batch, n, cos, sin);
                for (int64_t m = n * a->m; m < (n + 1) * a->m; m++) {
                    float *query = queries + (batch * heads + m) * dim;
                    widen(a->qkv, query_head->dtype, (batch * all_heads + m) * dim, dim, query);
                    rotate_head(query_head, query, cos, sin);
                }
            }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; item++) {
            int64_t kv = item / blocks, batch = kv / a->n, n = kv % a->n;
            int64_t end = a->position[batch] + 1;
            int64_t visible = min(end, a->window ? min(a->window, a->slots) : a->slots);
            int64_t first = end - visible + item % blocks * BLOCK;
            if (end <= first) continue;
            block_of(a, query_head->dtype, batch * a->batch_stride + n * a->head_stride, dim, first,
                     min(BLOCK, end - first), queries + kv * group, outs + item * group,
                     tops + item * a->m, totals + item * a->m);
        }
#pragma omp for
        for (int64_t head = 0; head < a->b * heads; head++) {
            int64_t kv = head / a->m, m = head % a->m, end = a->position[kv / a->n] + 1;
            int64_t visible = min(end, a->window ? min(a->window, a->slots) : a->slots);
            int64_t used = (visible + BLOCK - 1) / BLOCK, item = kv * blocks;
            float row[dim];
            memset(row, 0, dim * sizeof *row);
            if (end > 0)
                merge(outs + item * group + m * dim, tops + item * a->m + m,
                      totals + item * a->m + m, used, group, a->m, dim, row);
            narrow(row, dim, a->out, query_head->dtype, head * dim);
        }
    }
    free(queries);
    return 0;
}
