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

/* The packed weight's row at `data`, times x. */
INLINE float dot_packed(
    const int8_t *data, int bits, int64_t dim, int64_t group, int shift, const float *scale,
    const float *x
) {
    floats total = {0};
    for (int64_t start = 0, g = 0; start < dim; start += group, g++) {
        floats part = {0};
        prefetch(data + start * bits / 8);
        for (int64_t i = start; i < start + group; i += UNIT(bits))
            for (int j = 0; j < UNIT(bits); j += LANES)
                part += load_packed(data, bits, i, j, shift) * load_f32(x + i + j);
        total += part * scale[g];
    }
    return sum(total);
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
    int64_t dim = w->dim, r = 0;
    for (; r + 4 <= rows; r += 4) {
        const float *four[4] = {x[r], x[r + 1], x[r + 2], x[r + 3]};
        floats total[4] = {{0}};
        int64_t i = 0;
        for (; i + LANES <= dim; i += LANES) {
            floats weight = load_f32(unpacked + i);
            for (int j = 0; j < 4; j++) total[j] += weight * load_f32(four[j] + i);
        }
        for (int j = 0; j < 4; j++) {
            float result = sum(total[j]);
            for (int64_t k = i; k < dim; k++) result += unpacked[k] * four[j][k];
            y[(r + j) * stride] = result;
        }
    }
    for (; r < rows; r++) y[r * stride] = dot_floats(unpacked, F32, 0, dim, x[r]);
}

static inline void sum_groups(const float *x, int64_t groups, int64_t group, float *sums) {
    for (int64_t g = 0; g < groups; g++) {
        sums[g] = 0;
        for (int64_t i = g * group; i < (g + 1) * group; i++) sums[g] += x[i];
    }
}
