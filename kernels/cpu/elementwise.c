/* Ops that read each row once: norms, GeGLU, rotary embedding, unpacking of weights, argmax. */
#include <stdlib.h>

#include "norm.h"
#include "rotary.h"
#include "weight.h"

/* h, y :: [rows, dim] of rmsnorm.py. h may be NULL. */
int norm(const norm_t *n, int64_t rows, void *h, void *y, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *row = malloc(2 * n->dim * sizeof *row);
        failed |= !row;
#pragma omp for
        for (int64_t r = 0; r < rows; r++) {
            if (!row) continue;
            norm_row(n, r, h, row, row + n->dim);
            narrow(row, n->dim, y, n->dtype, r * n->dim);
        }
        free(row);
    }
    return failed;
}

/* y :: [rows, dim] = gelu(gate) * up */
void geglu(
    const void *gate, const void *up, int dtype, int64_t rows, int64_t dim, int64_t gate_stride,
    int64_t up_stride, void *y, int threads
) {
    enum { BLOCK = 512 };
    int64_t blocks = (dim + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < rows * blocks; b++) {
        float gates[BLOCK], ups[BLOCK];
        int64_t row = b / blocks, start = b % blocks * BLOCK, count = min(BLOCK, dim - start);
        widen(gate, dtype, row * gate_stride + start, count, gates);
        widen(up, dtype, row * up_stride + start, count, ups);
        for (int64_t i = 0; i < count; i++) gates[i] = geglu_of(gates[i], ups[i]);
        narrow(gates, count, y, dtype, row * dim + start);
    }
}

/* out[b, head, slot of t, :] = rotate(rms_norm(x[b, t, head, :])), see rotary.h. The slot of token t
   is (offset[b] + t) % slots, or t if slots is 0. Tokens before `first` are left out. */
void rotary(
    const head_t *h, const void *x, const int64_t *x_strides, const float *cos, const float *sin,
    int64_t b, int64_t t, int64_t heads, int64_t first, const int32_t *offset, void *out,
    const int64_t *out_strides, int64_t slots, int threads
) {
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t batch = 0; batch < b; batch++)
        for (int64_t token = first; token < t; token++) {
            int64_t slot = token, angle = (batch * t + token) * h->dim / 2;
            if (slots) slot = ((offset[batch] + token) % slots + slots) % slots;
            for (int64_t head = 0; head < heads; head++) {
                float row[h->dim];
                int64_t from = batch * x_strides[0] + token * x_strides[1] + head * x_strides[2];
                widen(x, h->dtype, from, h->dim, row);
                rotate_head(h, row, cos ? cos + angle : NULL, cos ? sin + angle : NULL);
                int64_t to = batch * out_strides[0] + head * out_strides[1] + slot * out_strides[2];
                narrow(row, h->dim, out, h->dtype, to);
            }
        }
}

/* Rows start … stop - 1 of a packed weight, to `out` :: [stop - start, dim] in dtype. */
void unpack(const weight_t *w, int64_t start, int64_t stop, void *out, int dtype, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = start; row < stop; row++) {
        int64_t to = (row - start) * w->dim;
        float unpacked[w->dim];
        unpack_columns(w, row, 0, w->dim, unpacked);
        narrow(unpacked, w->dim, out, dtype, to);
    }
}

/* token :: [rows]: the index of the largest logit of each row :: [rows, vocab], the lowest if
   several are largest; -1 if it is not finite, or if one is NaN. */
void best_token(
    const float *logits, int64_t rows, int64_t vocab, int64_t *token, int threads
) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const float *x = logits + row * vocab;
        float top = -INFINITY;
        int nan = 0;
#pragma omp simd reduction(max : top) reduction(| : nan)
        for (int64_t i = 0; i < vocab; i++) {
            top = x[i] > top ? x[i] : top;
            nan |= x[i] != x[i];
        }
        int64_t best = 0;
        while (best < vocab && x[best] != top) best++;
        token[row] = nan || top == INFINITY || top == -INFINITY ? -1 : best;
    }
}
