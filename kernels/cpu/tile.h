/* A weight times several rows of x: dots of tile.c. */
#pragma once
#include "weight.h"

#define WIDTH 4 /* rows of the weight in a tile */

/* Number of floats in a row of x: its columns, and zeros up to whole vectors. */
INLINE int64_t padded(int64_t dim) { return (dim + LANES - 1) / LANES * LANES; }

/* The first address in `memory` at which vectors do not cross a cache line: then an AMD EPYC loads
   two of them in a cycle instead of one. */
#define ALIGNMENT 64
INLINE float *aligned(float *memory) {
    return (float *)(((uintptr_t)memory + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

/* Rows first … first + count - 1 of the weight times each of `rows` vectors x[…] :: [padded(dim)].
   y[r * stride + i] is the i-th row of the weight times x[r]. */
void dots(
    const weight_t *w, int64_t first, int64_t count, const float *const *x, int64_t rows, float *y,
    int64_t stride
);
