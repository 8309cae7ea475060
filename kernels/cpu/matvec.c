/* norm_linear and linear of matvec.py for few rows: norm, weight × rows, GeGLU.

The weight is read once, in order: a thread multiplies one row of it after another. (Several rows at
a time share the loads of x, but their short streams defeat the processor's prefetcher: 17 to 18
instead of 12 ms for a bf16 weight of 262144 × 640, on an AMD EPYC.) With several rows of x, a row
of the weight is unpacked to floats first. */
#include <stdlib.h>

#include "norm.h"
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
static float dot(const weight_t *w, int64_t row, const float *x, const float *group_sums) {
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

/* Row `row` of the weight times each row of x :: [rows, dim]. y has the results, `stride` apart. */
static void dots(
    const weight_t *w, int64_t row, const float *x, int64_t rows, const float *group_sums,
    float *unpacked, float *y, int64_t stride
) {
    if (rows == 1) {
        *y = dot(w, row, x, group_sums);
        return;
    }
    unpack_row(w, row, unpacked);
    int64_t dim = w->dim, r = 0;
    for (; r + 4 <= rows; r += 4) {
        floats total[4] = {{0}};
        int64_t i = 0;
        for (; i + LANES <= dim; i += LANES) {
            floats weight = load_f32(unpacked + i);
            for (int j = 0; j < 4; j++) total[j] += weight * load_f32(x + (r + j) * dim + i);
        }
        for (int j = 0; j < 4; j++) {
            float result = sum(total[j]);
            for (int64_t k = i; k < dim; k++) result += unpacked[k] * x[(r + j) * dim + k];
            y[(r + j) * stride] = result;
        }
    }
    for (; r < rows; r++) y[r * stride] = dot_floats(unpacked, F32, 0, dim, x + r * dim);
}

static void sum_groups(const float *x, int64_t groups, int64_t group, float *sums) {
    for (int64_t g = 0; g < groups; g++) {
        sums[g] = 0;
        for (int64_t i = g * group; i < (g + 1) * group; i++) sums[g] += x[i];
    }
}

/* y :: [rows, out], dtype of the input: as `out_dtype`, is norm(input) @ weightᵀ, or the input
   without norms. geglu: the weight has 2 * out rows, gate then up. up :: [rows, out]: y is
   gelu(y) * up. h :: [rows, dim] | NULL. Returns nonzero if memory ran out. */
int matvec(
    const norm_t *n, const weight_t *w, int64_t rows, void *h, const void *up, int64_t up_stride,
    int geglu, void *y, int y_dtype, int threads
) {
    int64_t dim = w->dim, groups = w->minimum && rows == 1 ? dim / w->group : 0;
    int64_t out = geglu ? w->out / 2 : w->out, row_bytes = weight_bytes(w) / w->out;
    int64_t chunk = min(CHUNK, weight_bytes(w) / (4 * threads)) / row_bytes;
    chunk = min(chunk + 1, out);
    int64_t own = (1 + geglu) * rows * chunk + max(dim, chunk); /* floats of a thread */
    if (weight_bytes(w) < SMALL) threads = 1;
    float *x = malloc((rows * dim + dim + groups + threads * own) * sizeof *x);
    if (!x) return 1;
    float *sums = x + rows * dim + dim, *scratch = sums + groups;
    for (int64_t r = 0; r < rows; r++)
        norm_row(n, r, h, x + r * dim, x + rows * dim);
    sum_groups(x, groups, w->group, sums);
#pragma omp parallel num_threads(threads)
    {
        float *results = scratch, *gates, *unpacked;
#pragma omp critical
        {
            results = scratch;
            scratch += own;
        }
        gates = results, unpacked = results + (1 + geglu) * rows * chunk;
        float *ups = gates + rows * chunk;
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < out; first += chunk) {
            int64_t count = min(chunk, out - first);
            for (int64_t i = 0; i < count; i++)
                dots(w, first + i, x, rows, sums, unpacked, gates + i, chunk);
            for (int64_t i = 0; geglu && i < count; i++)
                dots(w, out + first + i, x, rows, sums, unpacked, ups + i, chunk);
            for (int64_t r = 0; r < rows; r++) {
                float *gate = gates + r * chunk, *other = ups + r * chunk;
                if (up) {
                    other = unpacked;
                    widen(up, n->dtype, r * up_stride + first, count, other);
                }
                if (up || geglu)
                    for (int64_t i = 0; i < count; i++) gate[i] = geglu_of(gate[i], other[i]);
                narrow(gate, count, y, y_dtype, r * out + first);
            }
        }
    }
    free(x);
    return 0;
}
