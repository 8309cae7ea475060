/* A weight, packed or not, and its rows as floats. The layout is that of packed.py. */
#pragma once
#include "simd.h"

#define CHUNK 262144 /* bytes of the weight that a thread takes at a time, at most */
#define SMALL 65536 /* bytes of a weight that is not worth a second thread */

typedef struct {
    const void *data, *scale, *minimum; /* scale, minimum :: [out, dim / group] | NULL */
    int64_t out, dim, group;
    int dtype, factor_dtype; /* dtype of data; of scale and minimum */
} weight_t;

#define UNIT(bits) (128 / (bits)) /* columns in 16 bytes of data */

/* Bits of an element. */
static inline int bits_of(const weight_t *w) {
    return w->dtype == F32 ? 32 : w->dtype == I8 ? 8 : w->dtype == U4 ? 4 : 16;
}

static inline int64_t weight_bytes(const weight_t *w) { return w->out * w->dim * bits_of(w) / 8; }

/* Values of LANES columns, from column `unit` + j on. `unit` is a multiple of UNIT(bits).
   4 bits: column j < 16 is in the low half of byte j, j + 16 in its high half, plus `shift`. */
INLINE floats load_packed(const int8_t *data, int bits, int64_t unit, int j, int shift) {
    if (bits == 8) return load_i8(data + unit + j);
    return load_nibbles((const uint8_t *)data + unit / 2 + j % 16, j >= 16, shift);
}

/* Columns start … stop - 1 of row `row` of a packed weight: whole groups of `length` columns, or
   `length` columns of one group. */
INLINE void unpack_groups(
    const weight_t *w, int bits, int has_minimum, int64_t group, int64_t length, int64_t row,
    int64_t start, int64_t stop, float *to
) {
    const int8_t *data = (const int8_t *)w->data + (row * w->dim + start) * bits / 8;
    int64_t groups = (stop - start) / length, first = row * (w->dim / group) + start / group;
    int shift = has_minimum ? 0 : 8;
    float scale[groups], minimum[groups];
    widen(w->scale, w->factor_dtype, first, groups, scale);
    if (has_minimum) widen(w->minimum, w->factor_dtype, first, groups, minimum);
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; i < length; i += UNIT(bits), to += UNIT(bits))
            for (int j = 0; j < UNIT(bits); j += LANES) {
                floats x = load_packed(data, bits, g * length + i, j, shift) * scale[g];
                if (has_minimum) x += minimum[g];
                memcpy(to + j, &x, sizeof x);
            }
}

INLINE void unpack_bits(
    const weight_t *w, int bits, int has_minimum, int64_t row, int64_t start, int64_t stop,
    float *to
) {
    if (w->group == 32)
        unpack_groups(w, bits, has_minimum, 32, 32, row, start, stop, to);
    else if (bits == 8 && w->group == 16)
        unpack_groups(w, 8, has_minimum, 16, 16, row, start, stop, to);
    else
        unpack_groups(w, bits, has_minimum, w->group, min(w->group, stop - start), row, start, stop,
                      to);
}

/* Copies columns start … stop - 1 of row `row` of the weight to `to`. They are whole groups, or a
   part of one. */
static inline void unpack_columns(
    const weight_t *w, int64_t row, int64_t start, int64_t stop, float *to
) {
    if (!w->scale)
        widen(w->data, w->dtype, row * w->dim + start, stop - start, to);
    else if (w->dtype == I8 && w->minimum)
        unpack_bits(w, 8, 1, row, start, stop, to);
    else if (w->dtype == I8)
        unpack_bits(w, 8, 0, row, start, stop, to);
    else if (w->minimum)
        unpack_bits(w, 4, 1, row, start, stop, to);
    else
        unpack_bits(w, 4, 0, row, start, stop, to);
}

/* Fetches columns start … stop - 1 of row `row` of the weight into the cache. The row may be past
   the end of the weight. */
static inline void prefetch_columns(
    const weight_t *w, int64_t row, int64_t start, int64_t stop
) {
    int64_t bits = bits_of(w), bytes = (stop - start) * bits / 8;
    const char *data = (const char *)w->data + (row * w->dim + start) * bits / 8;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(data + i);
}
