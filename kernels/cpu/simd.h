/* Vectors of floats: loads from each dtype, sums, exp. All arithmetic is in fp32.

AVX512 and AVX2 have intrinsics here; other processors get the compiler's vector types.
*/
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

enum dtype { F32, BF16, F16, I8, U4 }; /* as DTYPES in calls.py */

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
typedef __m512 floats;
INLINE floats load_f32(const float *p) { return _mm512_loadu_ps(p); }
INLINE floats load_bf16(const uint16_t *p) {
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
INLINE floats load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE floats load_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE floats load_nibbles(const uint8_t *p, int high, int shift) {
    __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    if (high) x = _mm512_srli_epi32(x, 4);
    return _mm512_permutexvar_ps(x, values - (float)shift); /* reads the low 4 bits of x */
}
/* Writes the sums of four vectors, each added in the same order. */
INLINE void sum_each(floats a, floats b, floats c, floats d, float *to) {
    __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd);
    __m512d high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    __m512 all = (__m512)low + (__m512)high; /* [4, k] */
    __m256 half = _mm512_castps512_ps256(all)
        + _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)all, 1));
    _mm_storeu_ps(to, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define LANES 8
typedef __m256 floats;
INLINE floats load_f32(const float *p) { return _mm256_loadu_ps(p); }
INLINE floats load_bf16(const uint16_t *p) {
    __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
INLINE floats load_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
INLINE floats load_i8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE floats load_nibbles(const uint8_t *p, int high, int shift) {
    __m128i x = _mm_loadl_epi64((const __m128i *)p);
    x = _mm_and_si128(high ? _mm_srli_epi16(x, 4) : x, _mm_set1_epi8(15));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_sub_epi8(x, _mm_set1_epi8(shift))));
}
INLINE void sum_each(floats a, floats b, floats c, floats d, float *to) {
    __m256 ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
    __m256 cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
    __m256d low = _mm256_unpacklo_pd((__m256d)ab, (__m256d)cd);
    __m256d high = _mm256_unpackhi_pd((__m256d)ab, (__m256d)cd);
    __m256 all = (__m256)low + (__m256)high; /* [2, k] */
    _mm_storeu_ps(to, _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1));
}
#else
#define LANES 8
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
INLINE floats load_f32(const float *p) {
    floats x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE floats load_bf16(const uint16_t *p) {
    halves x;
    memcpy(&x, p, sizeof x);
    return (floats)(__builtin_convertvector(x, ints) << 16);
}
INLINE floats load_f16(const uint16_t *p) {
    _Float16 x[LANES];
    floats y;
    memcpy(x, p, sizeof x);
    for (int i = 0; i < LANES; i++) y[i] = x[i];
    return y;
}
INLINE floats load_i8(const int8_t *p) {
    bytes x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(__builtin_convertvector(x, ints), floats);
}
INLINE floats load_nibbles(const uint8_t *p, int high, int shift) {
    int8_t x[LANES];
    for (int i = 0; i < LANES; i++) x[i] = (int8_t)((high ? p[i] >> 4 : p[i] & 15) - shift);
    return load_i8(x);
}
INLINE void sum_each(floats a, floats b, floats c, floats d, float *to) {
    const floats x[] = {a, b, c, d};
    for (int k = 0; k < 4; k++)
        to[k] = ((x[k][0] + x[k][4]) + (x[k][2] + x[k][6]))
            + ((x[k][1] + x[k][5]) + (x[k][3] + x[k][7]));
}
#endif

/* Keeps x in a register: gcc repeats a load for each use of its result. */
INLINE floats keep(floats x) {
#if defined(__AVX2__)
    __asm__("" : "+v"(x));
#endif
    return x;
}

/* gcc before version 12 does not have _Float16 on x86. */
#if defined(__F16C__)
INLINE float from_f16(uint16_t x) { return _cvtsh_ss(x); }
INLINE uint16_t to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
INLINE float from_f16(uint16_t half) {
    _Float16 x;
    memcpy(&x, &half, sizeof x);
    return x;
}
INLINE uint16_t to_f16(float x) {
    _Float16 narrow = (_Float16)x;
    uint16_t half;
    memcpy(&half, &narrow, sizeof half);
    return half;
}
#endif

/* LANES elements of p from element i on; dtype is one of the three floats. */
INLINE floats load(const void *p, int dtype, int64_t i) {
    if (dtype == F32) return load_f32((const float *)p + i);
    if (dtype == BF16) return load_bf16((const uint16_t *)p + i);
    return load_f16((const uint16_t *)p + i);
}

INLINE float sum(floats x) {
    float y = 0;
    for (int i = 0; i < LANES; i++) y += x[i];
    return y;
}

INLINE float load_one(const void *p, int dtype, int64_t i) {
    if (dtype == F32) return ((const float *)p)[i];
    uint16_t half = ((const uint16_t *)p)[i];
    if (dtype == BF16) {
        uint32_t bits = (uint32_t)half << 16;
        float x;
        memcpy(&x, &bits, sizeof x);
        return x;
    }
    return from_f16(half);
}

INLINE uint16_t to_bf16(float x) { /* rounds to nearest even */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x == x ? rounded : 0x7fc0;
}

/* Copies n elements of p, from element `start` on, to floats. */
INLINE void widen_as(const void *p, int dtype, int64_t start, int64_t n, float *to) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        floats x = load(p, dtype, start + i);
        memcpy(to + i, &x, sizeof x);
    }
    for (; i < n; i++) to[i] = load_one(p, dtype, start + i);
}

static inline void widen(const void *p, int dtype, int64_t start, int64_t n, float *to) {
    if (dtype == F32)
        widen_as(p, F32, start, n, to);
    else if (dtype == BF16)
        widen_as(p, BF16, start, n, to);
    else
        widen_as(p, F16, start, n, to);
}

/* Rounds n floats to dtype, in p from element `start` on. */
static inline void narrow(const float *from, int64_t n, void *p, int dtype, int64_t start) {
    if (dtype == F32)
        memcpy((float *)p + start, from, n * sizeof *from);
    else if (dtype == BF16)
        for (int64_t i = 0; i < n; i++) ((uint16_t *)p)[start + i] = to_bf16(from[i]);
    else
        for (int64_t i = 0; i < n; i++) ((uint16_t *)p)[start + i] = to_f16(from[i]);
}

/* Rounds n floats in place to the values that dtype has. */
static inline void round_to(float *x, int64_t n, int dtype) {
    if (dtype == BF16)
        for (int64_t i = 0; i < n; i++) {
            uint16_t half = to_bf16(x[i]);
            x[i] = load_one(&half, BF16, 0);
        }
    else if (dtype == F16)
        for (int64_t i = 0; i < n; i++) x[i] = from_f16(to_f16(x[i]));
}

/* exp(x), to 2e-7 of it (Cephes' expf). The compiler can vectorize loops that call it. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x; /* NaN stays NaN */
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1;
    uint32_t bits = ((uint32_t)(int32_t)n + 127) << 23; /* 2^n */
    float power;
    memcpy(&power, &bits, sizeof power);
    return y * power;
}

/* gelu(gate) * up, as in geglu.py. */
INLINE float geglu_of(float gate, float up) {
    float z = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
    return gate / (1 + exponential(-2 * z)) * up;
}
