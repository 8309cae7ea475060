/* Norm and rotation of one head, as in rotary.py. */
#pragma once
#include "norm.h"

typedef struct {
    const void *norm_weight; /* [dim] | NULL */
    int dtype, norm_dtype;   /* of the heads; of norm_weight */
    int norm;                /* normalize; without norm_weight, the norm multiplies by nothing */
    float eps, offset;
    int64_t dim;
} head_t;

/* x :: [dim], in place. cos, sin :: [dim / 2]; NULL: no rotation. */
static inline void rotate_head(const head_t *h, float *x, const float *cos, const float *sin) {
    int64_t half = h->dim / 2;
    if (h->norm) rms_norm(x, h->dim, h->norm_weight, h->norm_dtype, 0, h->eps, h->offset);
    if (!cos) return;
    float *other = x + half;
    for (int64_t i = 0; i < half; i++) {
        float x1 = x[i], x2 = other[i];
        x[i] = x1 * cos[i] - x2 * sin[i];
        other[i] = x2 * cos[i] + x1 * sin[i];
    }
}
