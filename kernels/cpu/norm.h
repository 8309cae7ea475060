/* Norm of one row, as in rmsnorm.py. */
#pragma once
#include "simd.h"

typedef struct {
    const void *x, *residual, *weight, *post_weight, *layer_scalar; /* all but x: or NULL */
    int dtype;                     /* of x, residual, layer_scalar and the results */
    int weight_dtype, post_dtype;
    int normalize;                 /* the sum h; without weight, multiply by nothing */
    float eps, offset;
    int64_t dim;
} norm_t;

/* x = x / sqrt(mean(x²) + eps) * (offset + weight); without weight, multiplies by nothing. */
static inline void rms_norm(
    float *x, int64_t dim, const void *weight, int dtype, int64_t start, float eps, float offset
) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < dim; i++) squares += x[i] * x[i];
    float inverse = 1 / sqrtf(squares / dim + eps);
    if (!weight)
        for (int64_t i = 0; i < dim; i++) x[i] *= inverse;
    else if (dtype == F32)
        for (int64_t i = 0; i < dim; i++)
            x[i] = x[i] * inverse * (offset + load_one(weight, F32, start + i));
    else if (dtype == BF16)
        for (int64_t i = 0; i < dim; i++)
            x[i] = x[i] * inverse * (offset + load_one(weight, BF16, start + i));
    else
        for (int64_t i = 0; i < dim; i++)
            x[i] = x[i] * inverse * (offset + load_one(weight, F16, start + i));
}

/* Writes row `row` of h (if it is not NULL), and of the norm of h to y :: [dim]. Both have values
   that dtype has. `other` :: [dim] is scratch. */
static inline void norm_row(const norm_t *n, int64_t row, void *h, float *y, float *other) {
    int64_t dim = n->dim, start = row * dim;
    widen(n->x, n->dtype, start, dim, y);
    if (n->post_weight) {
        rms_norm(y, dim, n->post_weight, n->post_dtype, 0, n->eps, n->offset);
        round_to(y, dim, n->dtype);
    }
    if (n->residual) {
        widen(n->residual, n->dtype, start, dim, other);
        for (int64_t i = 0; i < dim; i++) y[i] += other[i];
        round_to(y, dim, n->dtype);
    }
    if (n->layer_scalar) {
        float scalar = load_one(n->layer_scalar, n->dtype, 0);
        for (int64_t i = 0; i < dim; i++) y[i] *= scalar;
        round_to(y, dim, n->dtype);
    }
    if (h) narrow(y, dim, h, n->dtype, start);
    if (n->normalize) {
        rms_norm(y, dim, n->weight, n->weight_dtype, 0, n->eps, n->offset);
        round_to(y, dim, n->dtype);
    }
}
