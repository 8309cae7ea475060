/* The router of router.py, and the norm of the experts' input, for any number of rows. */
#include <stdlib.h>

#include "norm.h"
#include "tile.h"

#define BLOCK 64 /* rows at a time */

typedef struct {
    const void *h;                   /* [rows, dim] */
    const void *norm_weight, *scale; /* [dim] */
    const void *per_expert_scale;    /* [experts] */
    void *input;                     /* [rows, dim] */
    int32_t *chosen;                 /* [rows, top_k] */
    float *weight;                   /* [rows, top_k] */
    int64_t top_k;
    int dtype;                       /* of h and input */
    int norm_dtype, scale_dtype, per_expert_dtype;
    float eps, offset;
} router_t;

/* Writes row `row` of the experts' input, and the router's input to x :: [dim]. */
static void normalize(const router_t *a, int64_t dim, int64_t row, float *x) {
    widen(a->h, a->dtype, row * dim, dim, x);
    rms_norm(x, dim, a->norm_weight, a->norm_dtype, 0, a->eps, a->offset);
    narrow(x, dim, a->input, a->dtype, row * dim);
    widen(a->h, a->dtype, row * dim, dim, x);
    rms_norm(x, dim, a->scale, a->scale_dtype, 0, a->eps, 0);
    float factor = 1 / sqrtf((float)dim);
    for (int64_t i = 0; i < dim; i++) x[i] *= factor;
}

/* The top_k largest logits, and their softmax times per_expert_scale. A softmax over all experts,
   divided by its sum over the chosen, is that of the chosen logits. All weights are NaN if a logit
   is NaN, or the largest is infinite. */
static void choose(
    const router_t *a, const float *logits, int64_t experts, int32_t *chosen, float *weight
) {
    unsigned char taken[experts];
    float total = 0;
    int nan = 0;
    memset(taken, 0, experts);
    for (int64_t e = 0; e < experts; e++) nan |= logits[e] != logits[e];
    for (int64_t k = 0; k < a->top_k; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++)
            if (!taken[e] && (best < 0 || logits[e] > logits[best])) best = e;
        taken[best] = 1, chosen[k] = (int32_t)best;
        weight[k] = nan ? NAN : expf(logits[best] - logits[chosen[0]]);
        total += weight[k];
    }
    for (int64_t k = 0; k < a->top_k; k++)
        weight[k] = weight[k] / total
            * load_one(a->per_expert_scale, a->per_expert_dtype, chosen[k]);
}

/* Returns nonzero if memory ran out; then nothing is written. */
int route(const router_t *a, const weight_t *proj, int64_t rows, int threads) {
    int64_t dim = proj->dim, wide = padded(dim), experts = proj->out, most = min(rows, BLOCK);
    int64_t chunk = (experts / (4 * threads) / WIDTH + 1) * WIDTH;
    if (most * weight_bytes(proj) < SMALL) threads = 1;
    float *memory = malloc(most * (wide + experts) * sizeof *memory + ALIGNMENT);
    if (!memory) return 1;
    float *x = aligned(memory), *logits = x + most * wide;
    const float *xs[BLOCK];
    for (int r = 0; r < most; r++) xs[r] = x + r * wide;
#pragma omp parallel num_threads(threads)
    {
        for (int64_t first = 0; first < rows; first += BLOCK) {
            int64_t count = min(BLOCK, rows - first);
#pragma omp for
            for (int64_t r = 0; r < count; r++) {
                normalize(a, dim, first + r, x + r * wide);
                memset(x + r * wide + dim, 0, (wide - dim) * sizeof *x);
            }
#pragma omp for schedule(dynamic)
            for (int64_t start = 0; start < experts; start += chunk)
                dots(proj, start, min(chunk, experts - start), xs, count, logits + start, experts);
#pragma omp for
            for (int64_t r = 0; r < count; r++)
                choose(a, logits + r * experts, experts, a->chosen + (first + r) * a->top_k,
                       a->weight + (first + r) * a->top_k);
        }
    }
    free(memory);
    return 0;
}
