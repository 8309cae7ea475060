/* attention of attention.py: many queries of a prompt.

Keys and values are first copied into the order in which matmuls read them. A thread then computes
ROWS queries of a head at a time: for each block of KEYS keys scores, one step of the running
softmax, and values. Blocks that no query of the thread sees are skipped.

Both matmuls multiply items of 32 bits: floats, or for scores pairs of neighboring bf16 numbers, for
which some processors have an instruction. (Weights of the values are not rounded to bf16: that gave
some tokens of Gemma 3 270M other logits, by up to 7.) The right operand consists of panels of PANEL
columns, [k][PANEL]. */
#include <stdlib.h>

#include "simd.h"

#define ROWS 64  /* queries of a block */
#define KEYS 128 /* keys of a block; a multiple of PANEL */
#define VECTORS (LANES == 16 ? 4 : 2)
#define PANEL (VECTORS * LANES)
#define TILE 4 /* rows that share the loads of a panel */
#define DEPTH 96

typedef struct {
    const void *q, *keys, *values; /* [b, n * m, t, dim], contiguous; rings as in attention.c */
    const int32_t *query_offset, *left_padding; /* [b]; left_padding may be NULL */
    void *out;                                  /* [b, t, n * m, dim], contiguous */
    int64_t b, n, m, t, dim, slots, window;     /* window 0: none */
    int64_t batch_stride, head_stride, slot_stride;
    float scale, softcap; /* softcap 0: none */
    int dtype;
} prompt_t;

/* A float or a pair. The same memory is written as floats or halves. */
typedef uint32_t item_t __attribute__((may_alias));

typedef struct {
    int pairs;                             /* 2: items of q, keys are pairs of bf16; 1: floats */
    int64_t oldest, count;                 /* positions that the keys have, and their number */
    int64_t depth, width;                  /* items of a query; columns of the values, padded */
    const item_t *keys, *values;
} packed_t;

#ifdef __AVX512BF16__
#define MAX_PAIRS 2
INLINE floats multiply(floats sum, uint32_t a, floats b, int pairs) {
    if (pairs == 2)
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
    float x;
    memcpy(&x, &a, sizeof x);
    return sum + x * b;
}
#else
#define MAX_PAIRS 1
INLINE floats multiply(floats sum, uint32_t a, floats b, int pairs) {
    (void)pairs;
    float x;
    memcpy(&x, &a, sizeof x);
    return sum + x * b;
}
#endif

/* c :: [rows, panels * PANEL] (+)= a :: [rows, depth] @ b :: [panels][depth][PANEL]. DEPTH items of
   a panel at a time fit in the first cache, from which all rows read them. The last rows, up to a
   multiple of TILE, are computed, too. */
INLINE void matmul_as(
    int pairs, const item_t *a, int64_t a_stride, const item_t *b, int64_t depth,
    int64_t panels, float *c, int64_t c_stride, int64_t rows, int add
) {
    for (int64_t p = 0; p < panels; p++)
        for (int64_t start = 0; start < depth; start += DEPTH)
            for (int64_t row = 0; row < rows; row += TILE) {
                const float *panel = (const float *)b + p * depth * PANEL;
                floats sums[TILE][VECTORS];
                float *to = c + row * c_stride + p * PANEL;
                for (int r = 0; r < TILE; r++)
                    for (int v = 0; v < VECTORS; v++)
                        sums[r][v] = add || start ? load_f32(to + r * c_stride + v * LANES)
                                                  : (floats){0};
                for (int64_t k = start; k < min(start + DEPTH, depth); k++)
                    for (int v = 0; v < VECTORS; v++) {
                        floats column = load_f32(panel + k * PANEL + v * LANES);
                        for (int r = 0; r < TILE; r++)
                            sums[r][v] =
                                multiply(sums[r][v], a[(row + r) * a_stride + k], column, pairs);
                    }
                for (int r = 0; r < TILE; r++) memcpy(to + r * c_stride, sums[r], sizeof sums[r]);
            }
}

static void matmul(
    int pairs, const item_t *a, int64_t a_stride, const item_t *b, int64_t depth,
    int64_t panels, float *c, int64_t c_stride, int64_t rows, int add
) {
    if (pairs == 2)
        matmul_as(MAX_PAIRS, a, a_stride, b, depth, panels, c, c_stride, rows, add);
    else
        matmul_as(1, a, a_stride, b, depth, panels, c, c_stride, rows, add);
}

/* Copies n elements of p to 32-bit items; pads with zeros up to `items`. */
static void copy_items(
    const void *p, int dtype, int64_t start, int64_t n, int pairs, int64_t items, item_t *to
) {
    memset(to, 0, items * sizeof *to);
    if (pairs == 2)
        memcpy(to, (const uint16_t *)p + start, n * sizeof(uint16_t));
    else
        widen(p, dtype, start, n, (float *)to);
}

/* Copies keys and values of a block to panels, keys transposed. */
static void pack_block(
    const prompt_t *a, const packed_t *k, int64_t ring, int64_t block, item_t *keys,
    item_t *values
) {
    item_t row[k->depth + k->width], *value = row + k->depth;
    memset(keys, 0, KEYS * k->depth * sizeof *keys);
    memset(values, 0, KEYS * k->width * sizeof *values);
    for (int64_t i = 0; i < KEYS && block * KEYS + i < k->count; i++) {
        int64_t position = k->oldest + block * KEYS + i;
        int64_t start = ring + position % a->slots * a->slot_stride;
        copy_items(a->keys, a->dtype, start, a->dim, k->pairs, k->depth, row);
        for (int64_t d = 0; d < k->depth; d++)
            keys[i / PANEL * PANEL * k->depth + d * PANEL + i % PANEL] = row[d];
        copy_items(a->values, a->dtype, start, a->dim, 1, k->width, value);
        for (int64_t d = 0; d < k->width; d += PANEL)
            memcpy(values + d * KEYS + i * PANEL, value + d, PANEL * sizeof *value);
    }
}

/* One step of the running softmax of a query: scores of KEYS keys → weights, which are 0
   outside of begin … end - 1. Returns the factor of the sums so far. */
static float softmax_step(
    float *scores, int64_t begin, int64_t end, float scale, float softcap, float *top, float *total
) {
    float highest = *top, all = 0;
    for (int64_t i = 0; i < begin; i++) scores[i] = 0;
    for (int64_t i = end; i < KEYS; i++) scores[i] = 0;
    if (begin == end) return 1;
    for (int64_t i = begin; i < end; i++) scores[i] *= scale;
    for (int64_t i = begin; softcap && i < end; i++) /* softcap * tanh(score / softcap) */
        scores[i] = softcap * (1 - 2 / (1 + exponential(2 / softcap * scores[i])));
#pragma omp simd reduction(max : highest)
    for (int64_t i = begin; i < end; i++) highest = scores[i] > highest ? scores[i] : highest;
#pragma omp simd reduction(+ : all)
    for (int64_t i = begin; i < end; i++) {
        scores[i] = exponential(scores[i] - highest);
        all += scores[i];
    }
    float factor = exponential(*top - highest); /* before any key, the sums are 0 */
    *total = *total * factor + all, *top = highest;
    return factor;
}

/* Attention of `rows` queries of a head, from token `first` on. scratch: see prompt_attention. */
static void query_block(
    const prompt_t *a, const packed_t *k, int64_t batch, int64_t head, int64_t first, int64_t rows,
    float *scratch
) {
    float tops[ROWS], totals[ROWS];
    float *scores = scratch, *out = scores + ROWS * KEYS;
    item_t *q = (item_t *)(out + ROWS * k->width);
    memset(out, 0, ROWS * (k->width + k->depth) * sizeof *out);
    for (int64_t r = 0; r < ROWS; r++) tops[r] = -INFINITY, totals[r] = 0;
    for (int64_t r = 0; r < rows; r++) {
        int64_t start = ((batch * a->n * a->m + head) * a->t + first + r) * a->dim;
        copy_items(a->q, a->dtype, start, a->dim, k->pairs, k->depth, q + r * k->depth);
    }
    int64_t position = a->query_offset[batch] + first - k->oldest; /* of the first query */
    int64_t begin = a->window ? max(position - a->window + 1, 0) : 0;
    for (int64_t block = begin / KEYS; block * KEYS < position + rows; block++) {
        const item_t *keys = k->keys + block * KEYS * k->depth;
        const item_t *values = k->values + block * KEYS * k->width;
        matmul(k->pairs, q, k->depth, keys, k->depth, KEYS / PANEL, scores, KEYS, rows, 0);
        for (int64_t r = 0; r < rows; r++) {
            int64_t end = position + r + 1 - block * KEYS;
            int64_t from = a->window ? max(end - a->window, 0) : 0;
            end = max(min(end, KEYS), 0);
            float *row = scores + r * KEYS, *sums = out + r * k->width;
            float factor = softmax_step(
                row, min(from, end), end, a->scale, a->softcap, tops + r, totals + r
            );
            for (int64_t d = 0; factor != 1 && d < k->width; d++) sums[d] *= factor;
        }
        matmul(1, (item_t *)scores, KEYS, values, KEYS, k->width / PANEL, out, k->width, rows, 1);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *row = out + r * k->width;
        for (int64_t d = 0; d < a->dim; d++) row[d] = totals[r] ? row[d] / totals[r] : 0;
        int64_t to = ((batch * a->t + first + r) * a->n * a->m + head) * a->dim;
        narrow(row, a->dim, a->out, a->dtype, to);
    }
}

/* Positions of the keys that a batch row's queries see, and the sizes of their copies. */
static packed_t packed_of(const prompt_t *a, int64_t batch) {
    int pairs = a->dtype == BF16 && a->dim % 2 == 0 ? MAX_PAIRS : 1;
    int64_t offset = a->query_offset[batch], end = offset + a->t;
    int64_t oldest = a->left_padding ? max(a->left_padding[batch], 0) : 0;
    oldest = max(oldest, end - a->slots);
    if (a->window) oldest = max(oldest, offset - a->window + 1);
    return (packed_t){
        .pairs = pairs, .oldest = oldest, .count = max(end - oldest, 0), .depth = a->dim / pairs,
        .width = (a->dim + PANEL - 1) / PANEL * PANEL,
    };
}

/* Returns nonzero if memory ran out; then nothing is written. */
int prompt_attention(const prompt_t *a, int threads) {
    packed_t sizes = packed_of(a, 0);
    int64_t blocks = 0, tiles = (a->t + ROWS - 1) / ROWS;
    for (int64_t batch = 0; batch < a->b; batch++)
        blocks = max(blocks, (packed_of(a, batch).count + KEYS - 1) / KEYS);
    int64_t keys = KEYS * sizes.depth, values = KEYS * sizes.width; /* of a block */
    int64_t own = ROWS * (KEYS + sizes.width + sizes.depth); /* scratch of a thread */
    int64_t items = a->b * a->n * blocks;
    item_t *all = malloc((items * (keys + values) + threads * own) * sizeof *all);
    if (!all) return 1;
    item_t *all_values = all + items * keys, *scratch = all_values + items * values;
#pragma omp parallel num_threads(threads)
    {
        item_t *mine;
#pragma omp critical
        {
            mine = scratch;
            scratch += own;
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; item++) {
            int64_t kv = item / blocks, batch = kv / a->n, n = kv % a->n;
            packed_t k = packed_of(a, batch);
            pack_block(a, &k, batch * a->batch_stride + n * a->head_stride, item % blocks,
                       all + item * keys, all_values + item * values);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < a->b * a->n * a->m * tiles; task++) {
            int64_t tile = tiles - 1 - task / (a->b * a->n * a->m); /* most keys first */
            int64_t row = task % (a->b * a->n * a->m), batch = row / (a->n * a->m);
            int64_t first = tile * ROWS;
            packed_t k = packed_of(a, batch);
            k.keys = all + row / a->m * blocks * keys;
            k.values = all_values + row / a->m * blocks * values;
            query_block(a, &k, batch, row % (a->n * a->m), first, min(ROWS, a->t - first),
                        (float *)mine);
        }
    }
    free(all);
    return 0;
}
