/* A weight times several rows of x. A tile is WIDTH rows of the weight times up to HEIGHT rows of
x: their sums stay in registers, so that each load serves several multiplications.

A result is LANES sums, each of every LANES-th column in order, which are then added in pairs. So it
depends on its row of the weight and its row of x alone, not on the tile that computes it. */
#include "tile.h"

#if LANES == 16
#define HEIGHT 4 /* WIDTH * HEIGHT sums, and WIDTH + 1 other vectors, fit in the registers */
#else
#define HEIGHT 2
#endif
#define COLUMNS 1024 /* at a time: as floats, those of WIDTH rows stay in the L1 cache */
#define MOST 32      /* rows of x for which the weight is unpacked once */

typedef struct {
    const float *w[WIDTH];   /* rows of the weight: n columns from column `start` on */
    int64_t start, n;
    int64_t ahead;           /* from these rows to those that the next tile reads; 0: copies */
    const float *const *x;   /* [rows] */
    int64_t rows;
    int first, last;         /* of the blocks of columns */
    floats (*sums)[WIDTH];   /* [rows]: of earlier blocks */
    float *y;                /* [rows, stride], of which `count` columns are written */
    int64_t stride, count;
} tile_t;

/* Adds w[k] * x[r + j] to their sums, j < height. Writes y after the last block. */
INLINE void tile(const tile_t *t, int64_t r, int height) {
    floats totals[HEIGHT][WIDTH] = {{{0}}}, (*sums)[WIDTH] = t->sums + r;
    int64_t ahead = r ? 0 : t->ahead;
    const float *x[HEIGHT];
    for (int j = 0; j < height; j++) x[j] = t->x[r + j] + t->start;
    if (!t->first)
        for (int j = 0; j < height; j++)
            for (int k = 0; k < WIDTH; k++) totals[j][k] = sums[j][k];
    for (int64_t i = 0, n = t->n; i < n; i += LANES) {
        floats columns[WIDTH];
        for (int k = 0; k < WIDTH; k++) {
            __builtin_prefetch(t->w[k] + i + ahead);
            columns[k] = keep(load_f32(t->w[k] + i));
        }
        for (int j = 0; j < height; j++) {
            floats row = keep(load_f32(x[j] + i));
            for (int k = 0; k < WIDTH; k++) totals[j][k] += row * columns[k];
        }
    }
    for (int j = 0; j < height; j++) {
        floats *total = totals[j];
        float results[WIDTH], *y = t->y + (r + j) * t->stride;
        if (!t->last)
            for (int k = 0; k < WIDTH; k++) sums[j][k] = total[k];
        else if (t->count == WIDTH)
            sum_each(total[0], total[1], total[2], total[3], y);
        else {
            sum_each(total[0], total[1], total[2], total[3], results);
            memcpy(y, results, t->count * sizeof *y);
        }
    }
}

static inline void tiles(const tile_t *t) {
    for (int64_t r = 0, height; r < t->rows; r += height) {
        int64_t left = t->rows - r;
        height = left == HEIGHT + 1 && HEIGHT > 2 ? HEIGHT - 1 : min(left, HEIGHT);
        if (height == 1)
            tile(t, r, 1);
        else if (height == 2)
            tile(t, r, 2);
#if HEIGHT > 2
        else if (height == 3)
            tile(t, r, 3);
        else
            tile(t, r, 4);
#endif
    }
}

/* The end of the block of columns from `start` on, which has whole groups, or a part of one. */
static int64_t block_end(const weight_t *w, int64_t start) {
    int64_t end = min(start + COLUMNS, w->dim);
    if (!w->scale) return end;
    return w->group > COLUMNS ? min(end, (start / w->group + 1) * w->group) : end - end % w->group;
}

/* Rows first … first + count - 1 of the weight, count ≤ WIDTH, times each of `rows` ≤ MOST vectors
   x[…] :: [padded(dim)]. y[r * stride + i] is the i-th row of the weight times x[r]. */
static void tile_dots(
    const weight_t *w, int64_t first, int64_t count, const float *const *x, int64_t rows, float *y,
    int64_t stride
) {
    floats sums[MOST][WIDTH];
    float unpacked[WIDTH][COLUMNS] __attribute__((aligned(ALIGNMENT)));
    int copies = w->dtype != F32 || w->dim % LANES;
    tile_t t = {.ahead = copies ? 0 : WIDTH * w->dim, .x = x, .rows = rows, .sums = sums, .y = y,
                .stride = stride, .count = count};
    for (int64_t start = 0, stop; start < w->dim; start = stop) {
        stop = block_end(w, start);
        t.start = start, t.n = padded(stop - start), t.first = !start, t.last = stop == w->dim;
        for (int64_t k = 0; k < WIDTH; k++) {
            int64_t row = first + min(k, count - 1);
            t.w[k] = copies ? unpacked[k] : (const float *)w->data + row * w->dim + start;
            if (!copies) continue;
            prefetch_columns(w, row + WIDTH, start, stop);
            unpack_columns(w, row, start, stop, unpacked[k]);
            for (int64_t i = stop - start; i < t.n; i++) unpacked[k][i] = 0;
        }
        tiles(&t);
    }
}

void dots(
    const weight_t *w, int64_t first, int64_t count, const float *const *x, int64_t rows, float *y,
    int64_t stride
) {
    for (int64_t i = 0; i < count; i += WIDTH)
        for (int64_t r = 0; r < rows; r += MOST)
            tile_dots(w, first + i, min(WIDTH, count - i), x + r, min(MOST, rows - r),
                      y + r * stride + i, stride);
}
