/* decode_attention of decode_attention.py: one new token per sequence.

Keys are divided into blocks of BLOCK. A thread computes a block for all query heads of a kv head,
which share its keys: scores, softmax of the block, values. The blocks' results are merged in order,
so that results do not depend on the number of threads. */
#include <stdlib.h>

#include "rotary.h"

#define BLOCK 128 /* keys */
#define HEADS 4   /* query heads that share the loads of keys and values */

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

/* Scores of `count` keys from position `first` on, for `heads` ≤ HEADS queries :: [heads, dim]. */
INLINE void head_scores(
    const decode_t *a, int dtype, int64_t ring, int64_t dim, int64_t first, int64_t count,
    int heads, const float *queries, float *scores
) {
    int64_t slot = first % a->slots;
    for (int64_t k = 0; k < count; k++, slot = slot + 1 == a->slots ? 0 : slot + 1) {
        int64_t start = ring + slot * a->slot_stride, i = 0;
        floats totals[HEADS] = {{0}};
        for (; i + LANES <= dim; i += LANES) {
            floats key = load(a->keys, dtype, start + i);
            for (int h = 0; h < heads; h++) totals[h] += key * load_f32(queries + h * dim + i);
        }
        for (int h = 0; h < heads; h++) {
            float score = sum(totals[h]);
            for (int64_t j = i; j < dim; j++)
                score += load_one(a->keys, dtype, start + j) * queries[h * dim + j];
            score *= a->scale;
            scores[h * BLOCK + k] = a->softcap ? a->softcap * tanhf(score / a->softcap) : score;
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

/* out :: [heads, dim] = weights :: [heads, BLOCK] @ values of `count` keys, heads ≤ HEADS. */
INLINE void head_values(
    const decode_t *a, int dtype, int64_t ring, int64_t dim, int64_t first, int64_t count,
    int heads, const float *weights, float *out
) {
    int64_t wrap = min(count, a->slots - first % a->slots); /* keys before the end of the ring */
    int64_t start = ring + first % a->slots * a->slot_stride, i = 0;
    for (; i + 2 * LANES <= dim; i += 2 * LANES) { /* sums of two vectors stay in registers */
        floats totals[HEADS][2] = {{{0}}};
        for (int64_t k = 0; k < count; k++) {
            int64_t at = (k < wrap ? start : start - a->slots * a->slot_stride) + k * a->slot_stride;
            floats x = load(a->values, dtype, at + i), y = load(a->values, dtype, at + i + LANES);
            for (int h = 0; h < heads; h++) {
                totals[h][0] += x * weights[h * BLOCK + k];
                totals[h][1] += y * weights[h * BLOCK + k];
            }
        }
        for (int h = 0; h < heads; h++) memcpy(out + h * dim + i, totals[h], sizeof totals[h]);
    }
    for (; i < dim; i++)
        for (int h = 0; h < heads; h++) {
            float total = 0;
            for (int64_t k = 0; k < count; k++) {
                int64_t at = (k < wrap ? start : start - a->slots * a->slot_stride);
                total += weights[h * BLOCK + k]
                    * load_one(a->values, dtype, at + k * a->slot_stride + i);
            }
            out[h * dim + i] = total;
        }
}

INLINE void head_block(
    const decode_t *a, int dtype, int64_t ring, int64_t dim, int64_t first, int64_t count,
    int heads, const float *queries, float *out, float *tops, float *totals
) {
    float scores[HEADS * BLOCK];
    head_scores(a, dtype, ring, dim, first, count, heads, queries, scores);
    for (int h = 0; h < heads; h++)
        block_softmax(scores + h * BLOCK, count, tops + h, totals + h);
    head_values(a, dtype, ring, dim, first, count, heads, scores, out);
}

INLINE void block_as(
    const decode_t *a, int dtype, int64_t ring, int64_t dim, int64_t first, int64_t count,
    const float *queries, float *out, float *tops, float *totals
) {
    int64_t m = 0;
    for (; m + HEADS <= a->m; m += HEADS)
        head_block(a, dtype, ring, dim, first, count, HEADS, queries + m * dim, out + m * dim,
                   tops + m, totals + m);
    for (; m < a->m; m++)
        head_block(a, dtype, ring, dim, first, count, 1, queries + m * dim, out + m * dim,
                   tops + m, totals + m);
}

/* Results of `count` keys from position `first` on, for all query heads of a kv head. */
static void block_of(
    const decode_t *a, int dtype, int64_t ring, int64_t dim, int64_t first, int64_t count,
    const float *queries, float *out, float *tops, float *totals
) {
    if (dtype == F32)
        block_as(a, F32, ring, dim, first, count, queries, out, tops, totals);
    else if (dtype == BF16)
        block_as(a, BF16, ring, dim, first, count, queries, out, tops, totals);
    else
        block_as(a, F16, ring, dim, first, count, queries, out, tops, totals);
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
