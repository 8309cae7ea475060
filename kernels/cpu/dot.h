/* A weight times one row of x, or a few: a thread multiplies one row of the weight after another.

Several rows of the weight at a time share the loads of x, but their short streams defeat the
processor's prefetcher: 17 to 18 instead of 12 ms for a bf16 weight of 262144 × 640, on an AMD EPYC.
With several rows of x, a row of the weight is unpacked to floats first. */
#pragma once
#include "weight.h"

#define CHUNK 262144 /* bytes of the weight that a thread takes at a time, at most */
#define SMALL 65536 /* bytes of a weight that is not worth a second thread */
#define AHEAD 1280 /* bytes: distance of prefetches */

INLINE void prefetch(const void *p) { __builtin_prefetch((const char *)p + AHEAD); }

INLINE float dot_floats(const void *weight, int dtype, int64_t start, int64_t dim, const float *x) {
    floats even = {0}, odd = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= dim; i += 2 * LANES) {
        prefetch((const char *)weight + (start + i) * (dtype == F32 ? 4 : 2));
        even += load(weight, dtype, start + i) * load_f32(x + i);
        odd += load(weight, dtype, start + i + LANES) * load_f32(x + i + LANES);
    }
    float y = sum(even + odd);
    for (; i < dim; i++) y += load_one(weight, dtype, start + i) * x[i];
    return y;
}

/* LANES sums of the values of one group times x, without the scale. */
INLINE floats group_product(
    const int8_t *data, int bits, int64_t start, int64_t group, int shift, const float *x
) {
    floats product = {0};
    prefetch(data + start * bits / 8);
    for (int64_t i = start; i < start + group; i += UNIT(bits))
        for (int j = 0; j < UNIT(bits); j += LANES)
            product += load_packed(data, bits, i, j, shift) * load_f32(x + i + j);
    return product;
}

/* The packed weight's row at `data`, times x. Two sums, because one waits for each addition. */
INLINE float dot_packed(
    const int8_t *data, int bits, int64_t dim, int64_t group, int shift, const float *scale,
    const float *x
) {
    floats even = {0}, odd = {0};
    int64_t groups = dim / group, g = 0;
    for (; g + 2 <= groups; g += 2) {
        even += group_product(data, bits, g * group, group, shift, x) * scale[g];
        odd += group_product(data, bits, (g + 1) * group, group, shift, x) * scale[g + 1];
    }
    if (g < groups) even += group_product(data, bits, g * group, group, shift, x) * scale[g];
    return sum(even + odd);
}

/* Row `row` of the weight, times x. group_sums: sums of x's groups, if the weight has minima. */
static inline float dot(const weight_t *w, int64_t row, const float *x, const float *group_sums) {
    if (!w->scale) {
        if (w->dtype == F32) return dot_floats(w->data, F32, row * w->dim, w->dim, x);
        if (w->dtype == BF16) return dot_floats(w->data, BF16, row * w->dim, w->dim, x);
        return dot_floats(w->data, F16, row * w->dim, w->dim, x);
    }
    int64_t dim = w->dim, group = w->group, groups = dim / group;
    float scale[groups], y;
    widen(w->scale, w->factor_dtype, row * groups, groups, scale);
    const int8_t *data = (const int8_t *)w->data + row * dim * (w->dtype == I8 ? 8 : 4) / 8;
    int shift = w->minimum ? 0 : 8;
    if (w->dtype == U4)
        y = group == 32 ? dot_packed(data, 4, dim, 32, shift, scale, x)
                        : dot_packed(data, 4, dim, group, shift, scale, x);
    else
        y = group == 32 ? dot_packed(data, 8, dim, 32, 0, scale, x)
                        : dot_packed(data, 8, dim, group, 0, scale, x);
    if (w->minimum) {
        widen(w->minimum, w->factor_dtype, row * groups, groups, scale);
#pragma omp simd reduction(+ : y)
        for (int64_t g = 0; g < groups; g++) y += scale[g] * group_sums[g];
    }
    return y;
}

#define SUMS 8 /* vectors that are summed at once: each addition waits for the one before */

/* A row of floats times each of `rows` vectors x[…] :: [dim]; rows divides SUMS. */
INLINE void dots_of(
    const float *weight, int64_t dim, const float *const *x, int rows, float *y, int64_t stride
) {
    floats totals[SUMS] = {{0}};
    int64_t i = 0, step = SUMS / rows * LANES;
    for (; i + step <= dim; i += step)
        for (int k = 0; k < SUMS; k++) {
            int64_t col = i + k / rows * LANES;
            totals[k] += load_f32(weight + col) * load_f32(x[k % rows] + col);
        }
    for (int r = 0; r < rows; r++) {
        for (int k = r + rows; k < SUMS; k += rows) totals[r] += totals[k];
        float result = sum(totals[r]);
        for (int64_t col = i; col < dim; col++) result += weight[col] * x[r][col];
        y[r * stride] = result;
    }
}

/* Row `row` of the weight times each of `rows` vectors x[…] :: [dim]. y has the results, `stride`
   apart. */
static inline void dots(
    const weight_t *w, int64_t row, const float *const *x, int64_t rows, const float *group_sums,
    float *unpacked, float *y, int64_t stride
) {
    if (rows == 1) {
        *y = dot(w, row, *x, group_sums);
        return;
    }
    unpack_row(w, row, unpacked);
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) dots_of(unpacked, w->dim, x + r, 8, y + r * stride, stride);
    for (; r + 4 <= rows; r += 4) dots_of(unpacked, w->dim, x + r, 4, y + r * stride, stride);
    for (; r + 2 <= rows; r += 2) dots_of(unpacked, w->dim, x + r, 2, y + r * stride, stride);
    if (r < rows) dots_of(unpacked, w->dim, x + r, 1, y + r * stride, stride);
}

static inline void sum_groups(const float *x, int64_t groups, int64_t group, float *sums) {
    for (int64_t g = 0; g < groups; g++) {
        sums[g] = 0;
        for (int64_t i = g * group; i < (g + 1) * group; i++) sums[g] += x[i];
    }
}
