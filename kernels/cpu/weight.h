/* A weight, packed or not, and its rows as floats. The layout is that of packed.py. */
#pragma once
#include "simd.h"

typedef struct {
    const void *data, *scale, *minimum; /* scale, minimum :: [out, dim / group] | NULL */
    int64_t out, dim, group;
    int dtype, factor_dtype; /* dtype of data; of scale and minimum */
} weight_t;

#define UNIT(bits) (128 / (bits)) /* columns in 16 bytes of data */

static inline int64_t weight_bytes(const weight_t *w) {
    int64_t elements = w->out * w->dim;
    return w->dtype == F32 ? 4 * elements
        : w->dtype == I8   ? elements
        : w->dtype == U4   ? elements / 2
                           : 2 * elements;
}

/* Values of LANES columns, from column `unit` + j on. `unit` is a multiple of UNIT(bits).
   4 bits: column j < 16 is in the low half of byte j, j + 16 in its high half, plus `shift`. */
INLINE floats load_packed(const int8_t *data, int bits, int64_t unit, int j, int shift) {
    if (bits == 8) return load_i8(data + unit + j);
    return load_nibbles((const uint8_t *)data + unit / 2 + j % 16, j >= 16, shift);
}

static inline void unpack_groups(
    const int8_t *data, int bits, int64_t dim, int64_t group, int shift, const float *scale,
    const float *minimum, float *to
) {
    for (int64_t start = 0, g = 0; start < dim; start += group, g++)
        for (int64_t i = start; i < start + group; i += UNIT(bits))
            for (int j = 0; j < UNIT(bits); j += LANES) {
                floats x = load_packed(data, bits, i, j, shift) * scale[g];
                if (minimum) x += minimum[g];
                memcpy(to + i + j, &x, sizeof x);
            }
}

/* Copies row `row` of the weight to `to` :: [dim]. */
static inline void unpack_row(const weight_t *w, int64_t row, float *to) {
    if (!w->scale) {
        widen(w->data, w->dtype, row * w->dim, w->dim, to);
        return;
    }
    int64_t dim = w->dim, groups = dim / w->group;
    float scale[groups], minimum[groups];
    widen(w->scale, w->factor_dtype, row * groups, groups, scale);
    if (w->minimum) widen(w->minimum, w->factor_dtype, row * groups, groups, minimum);
    const float *minima = w->minimum ? minimum : NULL;
    if (w->dtype == I8)
        unpack_groups((const int8_t *)w->data + row * dim, 8, dim, w->group, 0, scale, minima, to);
    else
        unpack_groups((const int8_t *)w->data + row * dim / 2, 4, dim, w->group,
                      w->minimum ? 0 : 8, scale, minima, to);
}
