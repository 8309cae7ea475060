/* norm_linear and linear of matvec.py for few rows: norm, weight × rows, GeGLU. The weight is read
once, in order. */
#include <stdlib.h>

#include "dot.h"
#include "norm.h"
#include "tile.h"

typedef struct {
    const norm_t *norm;
    const weight_t *weight;
    int64_t rows, dim, out;
    void *h; /* [rows, dim] | NULL */
    const void *up;
    int64_t up_stride;
    int64_t chunk; /* rows of the weight that a thread multiplies at a time */
    int geglu, y_dtype;
    void *y;
    float *sums;      /* of the groups of one row, if the weight has minima */
    const float **xs; /* [rows]: rows of x, normalized */
} matvec_t;

/* Rows first … first + count - 1 of the weight times x. */
static void multiply(const matvec_t *a, int64_t first, int64_t count, float *results) {
    if (a->rows > 1)
        dots(a->weight, first, count, a->xs, a->rows, results, a->chunk);
    else
        for (int64_t i = 0; i < count; i++)
            results[i] = dot(a->weight, first + i, *a->xs, a->sums);
}

/* Columns `first` … of y, at most `chunk`. gates :: [1 + geglu, rows, chunk] and other :: [chunk]
   are scratch. */
static void output_chunk(const matvec_t *a, int64_t first, float *gates, float *other) {
    int64_t count = min(a->chunk, a->out - first);
    float *ups = gates + a->rows * a->chunk;
    multiply(a, first, count, gates);
    if (a->geglu) multiply(a, a->out + first, count, ups);
    for (int64_t r = 0; r < a->rows; r++) {
        float *gate = gates + r * a->chunk, *factor = ups + r * a->chunk;
        if (a->up) {
            factor = other;
            widen(a->up, a->norm->dtype, r * a->up_stride + first, count, factor);
        }
        if (a->up || a->geglu)
            for (int64_t i = 0; i < count; i++) gate[i] = geglu_of(gate[i], factor[i]);
        narrow(gate, count, a->y, a->y_dtype, r * a->out + first);
    }
}

/* other :: [dim] is scratch. */
static void normalize(const matvec_t *a, int64_t row, float *other) {
    float *x = (float *)a->xs[row];
    norm_row(a->norm, row, a->h, x, other);
    memset(x + a->dim, 0, (padded(a->dim) - a->dim) * sizeof *x);
}

/* scratch :: [threads, own] */
static void run(const matvec_t *a, float *scratch, int64_t own, int threads) {
    if (a->rows == 1) {
        normalize(a, 0, scratch);
        if (a->weight->minimum)
            sum_groups(*a->xs, a->dim / a->weight->group, a->weight->group, a->sums);
    }
#pragma omp parallel num_threads(threads)
    {
        float *other, *results;
#pragma omp critical
        {
            other = scratch;
            scratch += own;
        }
        results = other + max(a->dim, a->chunk);
        if (a->rows > 1)
#pragma omp for
            for (int64_t r = 0; r < a->rows; r++) normalize(a, r, other);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < a->out; first += a->chunk)
            output_chunk(a, first, results, other);
    }
}

/* y :: [rows, out], dtype of the input: as `out_dtype`, is norm(input) @ weightᵀ, or the input
   without norms. geglu: the weight has 2 * out rows, gate then up. up :: [rows, out]: y is
   gelu(y) * up. h :: [rows, dim] | NULL. Returns nonzero if memory ran out. */
int matvec(
    const norm_t *n, const weight_t *w, int64_t rows, void *h, const void *up, int64_t up_stride,
    int geglu, void *y, int y_dtype, int threads
) {
    int64_t dim = w->dim, wide = padded(dim), groups = w->minimum && rows == 1 ? dim / w->group : 0;
    int64_t out = geglu ? w->out / 2 : w->out, row_bytes = weight_bytes(w) / w->out;
    int64_t chunk = min(CHUNK, weight_bytes(w) / (4 * threads)) / row_bytes;
    chunk = min((chunk / WIDTH + 1) * WIDTH, out);
    if (weight_bytes(w) < SMALL) threads = 1;
    int64_t own = (1 + geglu) * rows * chunk + max(dim, chunk); /* floats of a thread */
    float *memory = malloc((rows * wide + groups + threads * own) * sizeof(float) + ALIGNMENT);
    if (!memory) return 1;
    float *x = aligned(memory);
    const float *xs[rows];
    for (int64_t r = 0; r < rows; r++) xs[r] = x + r * wide;
    matvec_t a = {n,     w,     rows,    dim, out,           h, up, up_stride,
                  chunk, geglu, y_dtype, y,   x + rows * wide, xs};
    run(&a, a.sums + groups, own, threads);
    free(memory);
    return 0;
}
