/* norm_linear and linear of matvec.py for few rows: norm, weight × rows, GeGLU. The weight is read
once, in order. */
#include <stdlib.h>

#include "dot.h"
#include "norm.h"

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
    const float *xs[rows];
    for (int64_t r = 0; r < rows; r++) {
        norm_row(n, r, h, x + r * dim, x + rows * dim);
        xs[r] = x + r * dim;
    }
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
                dots(w, first + i, xs, rows, sums, unpacked, gates + i, chunk);
            for (int64_t i = 0; geglu && i < count; i++)
                dots(w, out + first + i, xs, rows, sums, unpacked, ups + i, chunk);
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
