/* Attention of a few new tokens over an exact or quantized cache (see ops/kv.py), at the speed of reading it.
 *
 * The query heads of a key/value head and the new tokens are rows that share one pass over its keys and values. Tokens
 * come in units of 64, the size of a quantized block; CHUNK units are a task: scores, softmax, values. Tasks are joined
 * in order, so the number of threads changes nothing. Sums and probabilities are float32.
 *
 * For quantized blocks, what meets the codes (queries times key scales; probabilities times value scales) becomes
 * integers of two bytes, TERM * high + low, with one scale per row and block, so that dot products of bytes do the work
 * and are exact. Codes count from the middle of their range (the keys' minima, moved there, are one more constant per
 * row): then what the rounding costs is relative to how codes differ.
 *
 * WIDTH, the bytes in a vector, is 64 where the build has AVX512BW and 32 with AVX2.
 * `attend` returns 0, or -1 where there is no memory.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "team.h"

#if BLOCK == 64
#define WIDTH 64
#define I(name) _mm512_##name
#define CONVERT_FLOAT16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
typedef __m512i integers;
#else
#define WIDTH 32
#define I(name) _mm256_##name
#define CONVERT_FLOAT16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
typedef __m256i integers;
#endif
#if defined(__AVX512BF16__) && WIDTH == 64
#define PRODUCTS_OF_BFLOAT16 1
#else
#define PRODUCTS_OF_BFLOAT16 0
#endif
#if (defined(__AVX512VNNI__) && WIDTH == 64) || (defined(__AVXVNNI__) && WIDTH == 32)
#define PRODUCTS_OF_BYTES 1
#else
#define PRODUCTS_OF_BYTES 0
#endif
#define LANES (WIDTH / 4)

typedef float floats __attribute__((vector_size(WIDTH)));
typedef int32_t ints __attribute__((vector_size(WIDTH)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));
typedef floats any_floats __attribute__((aligned(1), may_alias));
typedef ints any_ints __attribute__((aligned(1), may_alias));
typedef bytes any_bytes __attribute__((aligned(1), may_alias));
typedef shorts any_shorts __attribute__((aligned(1), may_alias));
#define FLOATS(p) (*(any_floats *)(p))
#define INTS(p) (*(const any_ints *)(p))
#define BYTES(p) (*(any_bytes *)(p))
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define ROUND_UP(a, b) (((a) + (b) - 1) / (b) * (b))
/* A loop of few steps, unrolled before the compiler puts arrays into registers. */
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)
/* Into the second level: the first is small, and has queries and scores to keep. */
#define PREFETCH(p) __builtin_prefetch(p, 0, 2)
/* A call with `rows` a constant, for the compiler to unroll. */
#define BY_ROWS(rows, name, ...) \
    ((rows) == 1 ? name(1, __VA_ARGS__) : (rows) == 2 ? name(2, __VA_ARGS__) \
     : (rows) == 3 ? name(3, __VA_ARGS__) : name(4, __VA_ARGS__))

enum {
    UNIT = 64,                                      /* tokens */
    CHUNK = 8,                                      /* units in a task */
    TOKENS = UNIT * CHUNK,
    MOST = 16,                                      /* rows for which a task reads keys and values once */
    TERM_BITS = PRODUCTS_OF_BYTES ? 7 : 6,          /* without them, pairs of products must fit into 16 bits */
    TERM = 1 << TERM_BITS,
    AHEAD = 8192,                                   /* bytes of codes to prefetch, further than the processor does */
    TOKENS_AHEAD = UNIT,                            /* exact ones to prefetch */
    PAD = 16,                                       /* floats after sums of values, of which two are used */
    LARGEST = PRODUCTS_OF_BYTES ? 127 * 128 : 4096, /* of the integers of two bytes */
    ENOUGH = 1 << 19,                               /* multiplications that are worth waking a second thread */
    WORTH = 1 << 15,                                /* that are worth giving to one that waits */
};

enum dtype { FLOAT32, BFLOAT16, FLOAT16 };

/* Strides count elements: of batch, head and token; of packed tensors batch and head. */
typedef struct {
    int64_t B, K, G, T, D, V, blocks, recent, bits, dtype, threads; /* G query heads per key/value head */
    int64_t groups;                                                 /* of channels of int4 values */
    const char *query, *keys, *values;
    int64_t query_strides[3], key_strides[3], value_strides[3];
    const uint8_t *mask;
    int64_t mask_strides[3];
    const uint8_t *key_codes;
    const uint16_t *key_scales;
    const uint8_t *value_codes;
    const uint16_t *value_scales;
    int64_t packed_strides[4][2];
    const float *sinks, *bias; /* bias: to products with quantized keys, before the scale */
    int64_t bias_strides[3];
    void *out;
    const char *rest; /* of exact keys, their last D_rest channels where these lie apart */
    int64_t D_rest, rest_strides[3];
    const float *added; /* to the scores, after the scale and the cap */
    int64_t added_strides[3];
    double scale, softcap;
    float *sums; /* [B, T, H], for the logarithms of the sums of exp(score), or null */
} attention;

INLINE floats load(const void *p, enum dtype dtype) {
    if (dtype == BFLOAT16) return (floats)(__builtin_convertvector(*(const any_shorts *)p, ints) << 16);
    if (dtype == FLOAT16) return CONVERT_FLOAT16(p);
    return FLOATS(p);
}

/* The first n, then zeros. */
static floats load_part(const void *p, enum dtype dtype, int64_t n) {
    char whole[WIDTH] = {0};
    memcpy(whole, p, n * (dtype == FLOAT32 ? 4 : 2));
    return load(whole, dtype);
}

static void widen(const char *x, enum dtype dtype, int64_t n, float *out) {
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
    for (int64_t i = 0; i < n; i += LANES)
        FLOATS(out + i) = i + LANES <= n ? load(x + i * size, dtype) : load_part(x + i * size, dtype, n - i);
}

static inline void put(void *out, enum dtype dtype, int64_t i, float value) {
    uint32_t u;
    memcpy(&u, &value, 4);
    if (dtype == BFLOAT16) /* to nearest, ties to even */
        ((uint16_t *)out)[i] = value != value ? 0x7FC0 : (uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
    else if (dtype == FLOAT16)
        ((uint16_t *)out)[i] = _cvtss_sh(value, 0);
    else
        ((float *)out)[i] = value;
}

/* Sums of the 128-bit parts. */
INLINE __m128 sum_parts(floats a) {
#if WIDTH == 64
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), (__m256)_mm512_extractf64x4_pd((__m512d)a, 1));
#else
    const __m256 half = a;
#endif
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

INLINE float sum_lanes(floats a) {
    __m128 sum = sum_parts(a);
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

#define DOUBLES(a) I(castps_pd)(a)
#define UNPACK_PAIRS(low_or_high, a, b) (floats)I(unpack##low_or_high##_pd)(DOUBLES(a), DOUBLES(b))

/* The sums of four vectors. */
INLINE __m128 sum_four(const floats *a) {
    const floats low = I(unpacklo_ps)(a[0], a[1]) + I(unpackhi_ps)(a[0], a[1]);
    const floats high = I(unpacklo_ps)(a[2], a[3]) + I(unpackhi_ps)(a[2], a[3]);
    return sum_parts(UNPACK_PAIRS(lo, low, high) + UNPACK_PAIRS(hi, low, high));
}

/* The largest numbers of four vectors. */
INLINE __m128 max_four(const floats *a) {
    const floats low = I(max_ps)(I(unpacklo_ps)(a[0], a[1]), I(unpackhi_ps)(a[0], a[1]));
    const floats high = I(max_ps)(I(unpacklo_ps)(a[2], a[3]), I(unpackhi_ps)(a[2], a[3]));
    const floats all = I(max_ps)(UNPACK_PAIRS(lo, low, high), UNPACK_PAIRS(hi, low, high));
#if WIDTH == 64
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(all), (__m256)_mm512_extractf64x4_pd(DOUBLES(all), 1));
#else
    const __m256 half = all;
#endif
    return _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* `a` where the bits of `where` are set, else `b`. */
INLINE floats choose(ints where, floats a, floats b) { return (floats)(((ints)a & where) | ((ints)b & ~where)); }

/* e^x for x up to 80, 0 below -87. */
INLINE floats exponential(floats x) {
    const float magic = 12582912; /* 1.5 * 2^23: its sum with a number is the nearest integer, in the low bits */
    floats n = x * 1.44269504f + magic;
    const floats power = (floats)(((ints)n << 23) + 0x3F800000);
    n -= magic;
    const floats f = x - n * 0.693359375f - n * -2.12194440e-4f;
    floats p = f * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    return choose(x < -87.0f, (floats){0}, (p * f * f + f + 1) * power);
}

/* Queries as products with exact keys take them: bfloat16 as it came where the processor multiplies it, else floats;
 * padded with zeros. */
enum { STEP_BFLOAT16 = PRODUCTS_OF_BFLOAT16 ? 2 * LANES : LANES };
#define STEP(dtype) ((dtype) == BFLOAT16 ? STEP_BFLOAT16 : LANES)

/* The next STEP products, or only n of them. */
INLINE void multiply_add(int rows, const char *const *k, int64_t offset, int64_t n, const char *q, int64_t q_stride,
                         enum dtype dtype, floats (*sum)[4]) {
    EACH(i, 4) {
        const char *from = k[i] + offset * (dtype == FLOAT32 ? 4 : 2);
#if PRODUCTS_OF_BFLOAT16
        if (dtype == BFLOAT16) {
            const __mmask32 lanes = (__mmask32)(0xFFFFFFFFu >> (2 * LANES - n));
            const __m512bh key = (__m512bh)(n == 2 * LANES ? _mm512_loadu_si512(from)
                                                           : _mm512_maskz_loadu_epi16(lanes, from));
            EACH(r, rows)
                sum[r][i] = _mm512_dpbf16_ps(sum[r][i], key, (__m512bh)INTS(q + r * q_stride + 2 * offset));
            continue;
        }
#endif
        const floats key = n == LANES ? load(from, dtype) : load_part(from, dtype, n);
        EACH(r, rows) sum[r][i] += key * FLOATS(q + r * q_stride + 4 * offset);
    }
}

/* Scores of `rows` queries and `count` exact keys. Up to three more are written. */
INLINE void scores_exact(int rows, enum dtype dtype, const char *keys, int64_t stride, int64_t count, int64_t D,
                         const char *q, int64_t q_stride, float *out) {
    for (int64_t t = 0; t < count; t += 4) {
        floats sum[4][4] = {0};
        const char *k[4];
        EACH(i, 4) k[i] = keys + MIN(t + i, count - 1) * stride;
        for (int64_t o = 0; o < D * (dtype == FLOAT32 ? 4 : 2); o += 64)
            EACH(i, 4) PREFETCH(k[i] + TOKENS_AHEAD * stride + o);
        int64_t d = 0;
        for (; d + STEP(dtype) <= D; d += STEP(dtype)) multiply_add(rows, k, d, STEP(dtype), q, q_stride, dtype, sum);
        if (d < D) multiply_add(rows, k, d, D - d, q, q_stride, dtype, sum);
        EACH(r, rows) _mm_storeu_ps(out + r * TOKENS + t, sum_four(sum[r]));
    }
}

/* acc [rows, n vectors] + weights [rows, count] times exact values; of the only vector of a tail, `part` lanes. */
INLINE void sum_exact(int rows, int n, enum dtype dtype, const char *values, int64_t stride, int64_t count,
                      int64_t part, const float *weights, float *acc, int64_t acc_stride) {
    floats sum[4][8];
    EACH(r, rows)
        EACH(i, n) sum[r][i] = FLOATS(acc + r * acc_stride + i * LANES);
    for (int64_t t = 0; t < count; t++) {
        for (int i = 0; i < n; i += dtype == FLOAT32 ? 64 / WIDTH : 128 / WIDTH)
            PREFETCH(values + (t + TOKENS_AHEAD) * stride + i * LANES * (dtype == FLOAT32 ? 4 : 2));
        EACH(i, n) {
            const char *from = values + t * stride + i * LANES * (dtype == FLOAT32 ? 4 : 2);
            const floats value = part == LANES ? load(from, dtype) : load_part(from, dtype, part);
            EACH(r, rows) sum[r][i] += weights[r * TOKENS + t] * value;
        }
    }
    EACH(r, rows)
        EACH(i, n) FLOATS(acc + r * acc_stride + i * LANES) = sum[r][i];
}

INLINE void values_exact(int rows, enum dtype dtype, const char *values, int64_t stride, int64_t count, int64_t V,
                         const float *weights, float *acc, int64_t acc_stride) {
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
    const int most = WIDTH == 64 ? (rows == 1 ? 8 : 4) : (rows == 1 ? 4 : 2);
    int64_t c = 0;
    for (; c + most * LANES <= V; c += most * LANES)
        sum_exact(rows, most, dtype, values + c * size, stride, count, LANES, weights, acc + c, acc_stride);
    for (; c + 2 * LANES <= V; c += 2 * LANES)
        sum_exact(rows, 2, dtype, values + c * size, stride, count, LANES, weights, acc + c, acc_stride);
    for (; c + LANES <= V; c += LANES)
        sum_exact(rows, 1, dtype, values + c * size, stride, count, LANES, weights, acc + c, acc_stride);
    if (c < V) sum_exact(rows, 1, dtype, values + c * size, stride, count, V - c, weights, acc + c, acc_stride);
}

/* What meets the codes, of up to four rows: unit * (TERM * high + low), a constant, and the sums of the integers. */
typedef struct {
    float unit[4], constant[4];
    int32_t sum[4];
} terms;

/* x [rows, x_stride] times scales [n] as integers: bytes [rows, high or low, padded], zeros from n on. The constants
 * are sums of x * (minima + centre * scales), without minima zero. */
INLINE void split(int rows, int64_t n, int64_t padded, const uint16_t *scales, const uint16_t *minima, float centre,
                  const float *x, int64_t x_stride, int8_t *out, terms *of) {
    float product[4][padded] __attribute__((aligned(64))), inverse[4];
    floats most[4] = {0}, constant[4] = {0}, total[4] = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t part = n - i;
        const floats scale = part < LANES ? load_part(scales + i, FLOAT16, part) : load(scales + i, FLOAT16);
        floats middle = {0};
        if (minima)
            middle = scale * centre + (part < LANES ? load_part(minima + i, FLOAT16, part) : load(minima + i, FLOAT16));
        EACH(r, rows) {
            const floats value = FLOATS((float *)x + r * x_stride + i), p = value * scale;
            FLOATS(product[r] + i) = p;
            most[r] = I(max_ps)(most[r], (floats)((ints)p & 0x7FFFFFFF));
            if (minima) constant[r] += value * middle;
        }
    }
    const __m128 largest = max_four(most), usable = _mm_cmpgt_ps(largest, _mm_set1_ps(1e-30f));
    _mm_storeu_ps(inverse, _mm_and_ps(usable, _mm_div_ps(_mm_set1_ps(LARGEST), largest)));
    _mm_storeu_ps(of->unit, _mm_and_ps(usable, _mm_mul_ps(largest, _mm_set1_ps(1.0f / LARGEST))));
    for (int64_t i = 0; i < n; i += LANES)
        EACH(r, rows) {
            const floats scaled = FLOATS(product[r] + i) * inverse[r];
            const ints v = (ints)I(cvtps_epi32)(scaled), high = (v + TERM / 2) >> TERM_BITS;
            total[r] += I(cvtepi32_ps)((integers)v);
            BYTES(out + 2 * r * padded + i) = __builtin_convertvector(high, bytes);
            BYTES(out + (2 * r + 1) * padded + i) = __builtin_convertvector(v - (high << TERM_BITS), bytes);
        }
    _mm_storeu_si128((__m128i *)of->sum, _mm_cvtps_epi32(sum_four(total)));
    _mm_storeu_ps(of->constant, minima ? sum_four(constant) : _mm_setzero_ps());
}

/* acc + the sums of four products of unsigned codes and signed x. */
INLINE integers dot(integers acc, integers codes, integers x) {
#if PRODUCTS_OF_BYTES && WIDTH == 64
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x)); /* of the intrinsic, GCC makes copies and spills */
    return acc;
#elif PRODUCTS_OF_BYTES
    return _mm256_dpbusd_avx_epi32(acc, codes, x);
#else
    return I(add_epi32)(acc, I(madd_epi16)(I(maddubs_epi16)(codes, x), I(set1_epi16)(1)));
#endif
}

/* Codes [steps, stride bytes], n vectors of them, times x: int32 [rows, 2, x_steps] with four bytes in each; int4 codes
 * hold steps `steps` to 2 * `steps` in their high halves. */
INLINE void tile(int rows, int n, int bits, const uint8_t *codes, int64_t stride, int64_t steps, const int32_t *x,
                 int64_t x_steps, const terms *of, float *out, int64_t out_stride, int add) {
    integers sum[4][2][4];
    EACH(r, 2 * rows)
        EACH(i, n) sum[r / 2][r % 2][i] = (integers)(ints){0};
    for (int64_t s = 0; s < steps; s++) {
        integers c[4], high[4];
        EACH(i, n) {
            c[i] = (integers)INTS(codes + s * stride + i * WIDTH);
            if (i % (64 / WIDTH) == 0) PREFETCH(codes + s * stride + i * WIDTH + AHEAD);
            if (bits == 4) high[i] = (integers)(((ints)c[i] >> 4) & 0x0F0F0F0F);
            if (bits == 4) c[i] = (integers)((ints)c[i] & 0x0F0F0F0F);
        }
        EACH(r, 2 * rows) {
            const integers first = I(set1_epi32)(x[r * x_steps + s]);
            EACH(i, n) sum[r / 2][r % 2][i] = dot(sum[r / 2][r % 2][i], c[i], first);
            if (bits == 8) continue;
            const integers second = I(set1_epi32)(x[r * x_steps + steps + s]);
            EACH(i, n) sum[r / 2][r % 2][i] = dot(sum[r / 2][r % 2][i], high[i], second);
        }
    }
    EACH(r, rows)
        EACH(i, n) {
            float *to = out + r * out_stride + i * LANES;
            const integers centre = I(set1_epi32)((int32_t)(0u - (uint32_t)of->sum[r] * (bits == 8 ? 128u : 8u)));
            integers whole = I(add_epi32)(I(slli_epi32)(sum[r][0][i], TERM_BITS), sum[r][1][i]); /* may wrap */
            floats result = I(cvtepi32_ps)(I(add_epi32)(whole, centre)) * of->unit[r] + of->constant[r];
            if (add) result += FLOATS(to);
            FLOATS(to) = result;
        }
}

INLINE void products(int rows, int bits, int64_t vectors, const uint8_t *codes, int64_t stride, int64_t steps,
                     const int32_t *x, int64_t x_steps, const terms *of, float *out, int64_t out_stride, int add) {
    const int n = WIDTH == 64 ? (rows < 3 ? 4 : 2) : rows == 1 ? 4 : rows == 2 ? 2 : 1;
    int64_t i = 0;
    for (; i + n <= vectors; i += n)
        tile(rows, n, bits, codes + i * WIDTH, stride, steps, x, x_steps, of, out + i * LANES, out_stride, add);
    for (; n > 1 && i < vectors; i++)
        tile(rows, 1, bits, codes + i * WIDTH, stride, steps, x, x_steps, of, out + i * LANES, out_stride, add);
}

/* Scores of `rows` queries, floats [rows, q_stride] padded with zeros, and a block of keys. Scales [2, D_packed]. */
INLINE void scores_quantized(int rows, int bits, const uint8_t *codes, const uint16_t *scales, int64_t D_packed,
                             const float *q, int64_t q_stride, float *out) {
    const int64_t padded = ROUND_UP(D_packed, LANES);
    int32_t x[rows][2][padded / 4] __attribute__((aligned(64)));
    terms of;
    split(rows, D_packed, padded, scales, scales + D_packed, bits == 8 ? 128 : 8, q, q_stride, (int8_t *)x, &of);
    products(rows, bits, UNIT / LANES, codes, UNIT * 4, D_packed / (bits == 8 ? 4 : 8), x[0][0], padded / 4, &of, out,
             TOKENS, 0);
}

/* acc [rows, acc_stride] + weights [rows, 64] times a block of values. Scales [1 or 2, groups, 64]. */
INLINE void values_quantized(int rows, int bits, const uint8_t *codes, const uint16_t *scales, int64_t V_packed,
                             int64_t groups, const float *weights, float *acc, int64_t acc_stride) {
    const int64_t channels = V_packed / groups;
    for (int64_t g = 0; g < groups; g++, scales += UNIT) {
        const uint16_t *minima = bits == 8 ? NULL : scales + groups * UNIT;
        int32_t x[rows][2][UNIT / 4] __attribute__((aligned(64)));
        terms of;
        split(rows, UNIT, UNIT, scales, minima, 8, weights, TOKENS, (int8_t *)x, &of);
        products(rows, bits, channels / LANES, codes + g * channels * 4, V_packed * 4, bits == 8 ? 16 : 8, x[0][0],
                 UNIT / 4, &of, acc + g * channels, acc_stride, 1);
    }
}

/* Products become scores, n of them, and scores e^(score - largest). Returns their sum. */
static float softmax(float *scores, int64_t n, const uint8_t *mask, const float *added, float scale, float softcap,
                     float *largest) {
    floats most = (floats){0} - INFINITY, total = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        floats s = FLOATS(scores + i) * scale;
        if (softcap != 0) { /* tanh(y) = 1 - 2 / (e^2y + 1) */
            const floats y = I(min_ps)(s * (2 / softcap), (floats){0} + 80);
            s = softcap - 2 * softcap / (exponential(y) + 1);
        }
        if (added) s += i + LANES > n ? load_part(added + i, FLOAT32, n - i) : load(added + i, FLOAT32);
        if (mask || i + LANES > n) {
            char seen[LANES] = {0};
            if (!mask)
                memset(seen, 1, n - i);
            else
                memcpy(seen, mask + i, MIN(LANES, n - i));
            s = choose(__builtin_convertvector(BYTES(seen), ints) != 0, s, (floats){0} - INFINITY);
        }
        most = I(max_ps)(most, s);
        FLOATS(scores + i) = s;
    }
    *largest = _mm_cvtss_f32(max_four((floats[4]){most, most, most, most}));
    const float from = *largest == -INFINITY ? 0 : *largest;
    for (int64_t i = 0; i < n; i += LANES) total += FLOATS(scores + i) = exponential(FLOATS(scores + i) - from);
    const float sum = sum_lanes(total);
    if (sum != sum) *largest = NAN; /* of numbers that are none, there may have been no largest */
    return sum;
}

#define BY_DTYPE(dtype, rows, name, ...) \
    ((dtype) == BFLOAT16  ? BY_ROWS(rows, name, BFLOAT16, __VA_ARGS__) \
     : (dtype) == FLOAT16 ? BY_ROWS(rows, name, FLOAT16, __VA_ARGS__) \
                          : BY_ROWS(rows, name, FLOAT32, __VA_ARGS__))

static const uint8_t *mask_of(const attention *a, int64_t b, int64_t k, int64_t r, int64_t token) {
    return a->mask ? a->mask + b * a->mask_strides[0] + (k * a->G + r % a->G) * a->mask_strides[1] +
                         r / a->G * a->mask_strides[2] + token
                   : NULL;
}

static const float *added_to(const attention *a, int64_t b, int64_t k, int64_t r, int64_t token) {
    return a->added ? a->added + b * a->added_strides[0] + (k * a->G + r % a->G) * a->added_strides[1] +
                          r / a->G * a->added_strides[2] + token
                    : NULL;
}

/* Whether any of the rows sees any of the tokens. */
static int any_seen(const attention *a, int64_t b, int64_t k, int64_t first, int64_t rows, int64_t token, int64_t n) {
    const uint8_t *before = NULL;
    for (int64_t r = first; r < first + rows; r++) {
        const uint8_t *mask = mask_of(a, b, k, r, token);
        if (!mask || (mask != before && memchr(mask, 1, n))) return 1;
        before = mask;
    }
    return 0;
}

static void scores_of_unit(const attention *a, int64_t b, int64_t k, int64_t unit, int64_t rows, int64_t D_packed,
                           const float *q, const char *q_exact, int64_t q_stride, float *out) {
    if (unit < a->blocks) {
        const int64_t size = (a->bits == 8 ? 1 : 2);
        const uint8_t *codes = a->key_codes + b * a->packed_strides[0][0] + k * a->packed_strides[0][1] +
                               unit * UNIT * D_packed / size;
        const uint16_t *scales = a->key_scales + b * a->packed_strides[1][0] + k * a->packed_strides[1][1] +
                                 unit * 2 * D_packed;
        if (a->bits == 8)
            BY_ROWS(rows, scores_quantized, 8, codes, scales, D_packed, q, q_stride, out);
        else
            BY_ROWS(rows, scores_quantized, 4, codes, scales, D_packed, q, q_stride, out);
        return;
    }
    const int64_t size = a->dtype == FLOAT32 ? 4 : 2, start = (unit - a->blocks) * UNIT;
    const int64_t D = a->D - a->D_rest, count = MIN(UNIT, a->recent - start), *strides = a->rest_strides;
    const char *keys = a->keys + (b * a->key_strides[0] + k * a->key_strides[1] + start * a->key_strides[2]) * size;
    BY_DTYPE(a->dtype, rows, scores_exact, keys, a->key_strides[2] * size, count, D, q_exact, q_stride * 4, out);
    if (a->D_rest) {
        float more[rows][TOKENS];
        keys = a->rest + (b * strides[0] + k * strides[1] + start * strides[2]) * size;
        q_exact += D * (a->dtype == BFLOAT16 && PRODUCTS_OF_BFLOAT16 ? 2 : 4);
        BY_DTYPE(a->dtype, rows, scores_exact, keys, strides[2] * size, count, a->D_rest, q_exact, q_stride * 4, *more);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < count; i++) out[r * TOKENS + i] += more[r][i];
    }
}

static void values_of_unit(const attention *a, int64_t b, int64_t k, int64_t unit, int64_t rows, int64_t V_packed,
                           const float *weights, float *acc, int64_t acc_stride) {
    if (unit < a->blocks) {
        const int64_t size = (a->bits == 8 ? 1 : 2), scales_size = a->bits == 8 ? UNIT : 2 * a->groups * UNIT;
        const uint8_t *codes = a->value_codes + b * a->packed_strides[2][0] + k * a->packed_strides[2][1] +
                               unit * UNIT * V_packed / size;
        const uint16_t *scales = a->value_scales + b * a->packed_strides[3][0] + k * a->packed_strides[3][1] +
                                 unit * scales_size;
        if (a->bits == 8)
            BY_ROWS(rows, values_quantized, 8, codes, scales, V_packed, 1, weights, acc, acc_stride);
        else
            BY_ROWS(rows, values_quantized, 4, codes, scales, V_packed, a->groups, weights, acc, acc_stride);
        return;
    }
    const int64_t size = a->dtype == FLOAT32 ? 4 : 2, start = (unit - a->blocks) * UNIT;
    const char *values =
        a->values + (b * a->value_strides[0] + k * a->value_strides[1] + start * a->value_strides[2]) * size;
    BY_DTYPE(a->dtype, rows, values_exact, values, a->value_strides[2] * size, MIN(UNIT, a->recent - start), a->V,
             weights, acc, acc_stride);
}

/* How many of the rows that are left come next: at most four, and no one alone where they share. */
static int64_t next_rows(int64_t left) { return left > 4 && left < 8 ? (left + 1) / 2 : MIN(4, left); }

/* Rows `first` on of a head over the units from `start` to `stop`: sums of values, then their weight, then the largest
 * score, in `out` [rows, V_padded + PAD]. */
static void part(const attention *a, int64_t b, int64_t k, int64_t first, int64_t rows, int64_t start, int64_t stop,
                 float *out, int64_t V_padded) {
    const int64_t D_packed = ROUND_UP(a->D, 8), V_packed = ROUND_UP(a->V, 16);
    const int64_t D = ROUND_UP(a->D, 2 * LANES) + (a->D_rest ? 2 * LANES : 0); /* `rest` may start between vectors */
    const int64_t token = start * UNIT, tokens = MIN(stop * UNIT, a->blocks * UNIT + a->recent) - token;
    const int64_t size = a->dtype == FLOAT32 ? 4 : 2;
    float scores[rows][TOKENS] __attribute__((aligned(64))), query[rows][D] __attribute__((aligned(64)));
    char raw[rows][D * 4] __attribute__((aligned(64)));
    const int is_raw = a->dtype == BFLOAT16 && PRODUCTS_OF_BFLOAT16;
    int seen[CHUNK];
    for (int64_t r = 0; r < rows; r++) {
        const int64_t g = (first + r) % a->G, t = (first + r) / a->G;
        const char *from = a->query + (b * a->query_strides[0] + (k * a->G + g) * a->query_strides[1] +
                                       t * a->query_strides[2]) * size;
        memset(query[r], 0, sizeof query[r]);
        widen(from, a->dtype, a->D, query[r]);
        memset(raw[r], 0, is_raw ? 2 * D : 0);
        memcpy(raw[r], from, is_raw ? 2 * a->D : 0);
        memset(out + r * (V_padded + PAD), 0, V_padded * sizeof(float));
    }
    for (int64_t u = start; u < stop; u++) {
        const int64_t n = MIN(UNIT, token + tokens - u * UNIT);
        seen[u - start] = any_seen(a, b, k, first, rows, u * UNIT, n);
        for (int64_t r = 0, few; seen[u - start] && r < rows; r += few) {
            few = next_rows(rows - r);
            scores_of_unit(a, b, k, u, few, D_packed, query[r], is_raw ? raw[r] : (char *)query[r], D,
                           scores[r] + (u - start) * UNIT);
        }
        if (a->bias && seen[u - start] && u < a->blocks)
            for (int64_t r = 0; r < rows; r++) {
                const float *bias = a->bias + b * a->bias_strides[0] + u * UNIT +
                                    (k * a->G + (first + r) % a->G) * a->bias_strides[1] +
                                    (first + r) / a->G * a->bias_strides[2];
                for (int64_t i = 0; i < UNIT; i++) scores[r][(u - start) * UNIT + i] += bias[i];
            }
    }
    for (int64_t r = 0; r < rows; r++) {
        float *sums = out + r * (V_padded + PAD) + V_padded;
        sums[0] = softmax(scores[r], tokens, mask_of(a, b, k, first + r, token), added_to(a, b, k, first + r, token),
                          (float)a->scale, (float)a->softcap, sums + 1);
    }
    for (int64_t u = start; u < stop; u++)
        for (int64_t r = 0, few; seen[u - start] && r < rows; r += few) {
            few = next_rows(rows - r);
            values_of_unit(a, b, k, u, few, V_packed, scores[r] + (u - start) * UNIT, out + r * (V_padded + PAD),
                           V_padded + PAD);
        }
}

/* One row of the result from the parts, `apart` floats apart. */
static void join(const attention *a, int64_t b, int64_t k, int64_t r, const float *parts, int64_t chunks, int64_t apart,
                 int64_t V_padded) {
    const int64_t h = k * a->G + r % a->G, t = r / a->G, at = ((b * a->T + t) * a->K * a->G + h) * a->V;
    float largest = a->sinks ? a->sinks[h] : -INFINITY, weight, total;
    for (int64_t c = 0; c < chunks; c++) {
        const float m = parts[c * apart + V_padded + 1];
        largest = m > largest || m != m ? m : largest;
    }
    total = a->sinks ? expf(a->sinks[h] - largest) : 0;
    float sums[V_padded] __attribute__((aligned(64)));
    memset(sums, 0, sizeof sums);
    for (int64_t c = 0; c < chunks; c++) {
        const float *of = parts + c * apart, m = of[V_padded + 1];
        if (m == -INFINITY) continue;
        weight = expf(m - largest);
        total += weight * of[V_padded];
        for (int64_t i = 0; i < V_padded; i += LANES) FLOATS(sums + i) += FLOATS((float *)of + i) * weight;
    }
    const float inverse = total != 0 ? 1 / total : 0;
    for (int64_t i = 0; i < a->V; i++) put(a->out, a->dtype, at + i, sums[i] * inverse);
    if (a->sums) a->sums[at / a->V] = total != 0 ? largest + logf(total) : -INFINITY;
}

typedef struct {
    const attention *a;
    int64_t units, chunks, V_padded;
    float *parts;
    int32_t *done; /* parts of each head: whoever does the last one joins them */
} attending;

static void attend_piece(void *argument, int64_t first, int64_t last) {
    const attending *w = argument;
    const attention *a = w->a;
    const int64_t chunks = w->chunks, rows = a->G * a->T, V_padded = w->V_padded, apart = rows * (V_padded + PAD);
    for (int64_t i = first; i < last; i++) {
        const int64_t head = i / chunks, b = head / a->K, k = head % a->K, start = i % chunks * CHUNK;
        for (int64_t r = 0; r < rows; r += MOST)
            part(a, b, k, r, MIN(MOST, rows - r), start, MIN(w->units, start + CHUNK),
                 w->parts + i * apart + r * (V_padded + PAD), V_padded);
        if (__atomic_add_fetch(w->done + head, 1, __ATOMIC_ACQ_REL) == chunks)
            for (int64_t r = 0; r < rows; r++)
                join(a, b, k, r, w->parts + head * chunks * apart + r * (V_padded + PAD), chunks, apart, V_padded);
    }
}

int attend(const attention *a) {
    const int64_t units = a->blocks + (a->recent + UNIT - 1) / UNIT, chunks = units ? (units + CHUNK - 1) / CHUNK : 1;
    const int64_t rows = a->G * a->T, V_padded = ROUND_UP(a->V, 16), apart = rows * (V_padded + PAD);
    const int64_t heads = a->B * a->K, tasks = heads * chunks, size = rows * MIN(units, CHUNK) * UNIT * (a->D + a->V);
    float *parts = aligned_alloc(64, (tasks * apart + ROUND_UP(heads, PAD)) * sizeof(float));
    if (!parts) return -1;
    attending w = {a, units, chunks, V_padded, parts, (int32_t *)(parts + tasks * apart)};
    memset(w.done, 0, heads * sizeof *w.done);
    const int shared = tasks * size >= (a->threads > MOST_THREADS ? WORTH : ENOUGH);
    each(shared ? (crew)a->threads : 1, tasks, MOST_BYTES, attend_piece, &w);
    free(parts);
    return 0;
}

/* Keys [B, K, 64 N, D] and values [B, K, 64 N, V], strides as above, and contiguous room for the blocks. */
typedef struct {
    int64_t B, K, N, D, V, bits, dtype, threads, groups;
    const char *keys, *values;
    int64_t key_strides[3], value_strides[3];
    uint8_t *key_codes;
    uint16_t *key_scales;
    uint8_t *value_codes;
    uint16_t *value_scales;
} packing;

#define SMALLEST 0x1p-24f /* and largest of a positive float16 */
#define BIGGEST 65504.0f

INLINE floats limit(floats x, float low, float high) {
    return I(min_ps)(I(max_ps)(x, (floats){0} + low), (floats){0} + high);
}

/* As float16: the first n of them are kept in `out`. */
INLINE floats half(floats x, float low, uint16_t *out, int64_t n) {
    uint16_t bits[LANES];
    x = limit(x, low, BIGGEST);
#if WIDTH == 64
    _mm256_storeu_si256((__m256i *)bits, _mm512_cvtps_ph(x, 0));
#else
    _mm_storeu_si128((__m128i *)bits, _mm256_cvtps_ph(x, 0));
#endif
    memcpy(out, bits, sizeof(uint16_t) * MIN(n, LANES));
    return load(bits, FLOAT16);
}

INLINE void put_codes(uint8_t *out, floats x, floats minimum, floats scale, int64_t levels) {
    const floats codes = limit((x - minimum) / scale, 0, (float)levels);
    BYTES(out) = __builtin_convertvector((ints)I(cvtps_epi32)(codes), bytes);
}

static void pack_keys(const float *x, int64_t padded, int64_t D_packed, int64_t bits, uint8_t *out, uint16_t *scales) {
    uint8_t codes[UNIT][padded];
    const int64_t levels = (1 << bits) - 1;
    for (int64_t i = 0; i < D_packed; i += LANES) {
        floats low = FLOATS((float *)x + i), high = low;
        for (int t = 1; t < UNIT; t++) {
            low = I(min_ps)(low, FLOATS((float *)x + t * padded + i));
            high = I(max_ps)(high, FLOATS((float *)x + t * padded + i));
        }
        const floats minimum = half(low, -BIGGEST, scales + D_packed + i, D_packed - i);
        const floats scale = half((high - minimum) / (float)levels, SMALLEST, scales + i, D_packed - i);
        for (int t = 0; t < UNIT; t++)
            put_codes(codes[t] + i, FLOATS((float *)x + t * padded + i), minimum, scale, levels);
    }
    for (int64_t i = 0; i < D_packed / (bits == 8 ? 4 : 8); i++)
        for (int t = 0; t < UNIT; t++) {
            uint32_t four, above = 0;
            memcpy(&four, codes[t] + 4 * i, 4);
            if (bits == 4) memcpy(&above, codes[t] + D_packed / 2 + 4 * i, 4);
            four |= above << 4;
            memcpy(out + (i * UNIT + t) * 4, &four, 4);
        }
}

static void pack_values(const float *x, int64_t V_packed, int64_t groups, int64_t bits, uint8_t *out,
                        uint16_t *scales) {
    uint8_t codes[UNIT][V_packed];
    const int64_t channels = V_packed / groups, levels = (1 << bits) - 1;
    for (int t = 0; t < UNIT; t++)
        for (int64_t g = 0; g < groups; g++) {
            const float *from = x + t * V_packed + g * channels;
            floats ends[4] = {FLOATS((float *)from), -FLOATS((float *)from)}; /* the largest, and minus the smallest */
            for (int64_t i = LANES; i < channels; i += LANES) {
                ends[0] = I(max_ps)(ends[0], FLOATS((float *)from + i));
                ends[1] = I(max_ps)(ends[1], -FLOATS((float *)from + i));
            }
            float end[4];
            _mm_storeu_ps(end, max_four(ends));
            floats minimum, scale;
            if (bits == 8) {
                scale = half((floats){0} + (end[0] > end[1] ? end[0] : end[1]) / 127, SMALLEST, scales + t, 1);
                minimum = (floats){0};
            } else {
                minimum = half((floats){0} - end[1], -BIGGEST, scales + (groups + g) * UNIT + t, 1);
                scale = half((end[0] - minimum) / (float)levels, SMALLEST, scales + g * UNIT + t, 1);
            }
            for (int64_t i = 0; i < channels; i += LANES) {
                const floats value = FLOATS((float *)from + i);
                uint8_t *to = codes[t] + g * channels + i;
                if (bits == 4) {
                    put_codes(to, value, minimum, scale, levels);
                    continue;
                }
                const ints code = (ints)I(cvtps_epi32)(limit(value / scale, -127, 127)) + 128;
                BYTES(to) = __builtin_convertvector(code, bytes);
            }
        }
    for (int64_t i = 0; i < (bits == 8 ? 16 : 8); i++)
        for (int64_t c = 0; c < V_packed; c++)
            for (int j = 0; j < 4; j++)
                out[(i * V_packed + c) * 4 + j] =
                    bits == 8 ? codes[4 * i + j][c] : (uint8_t)(codes[4 * i + j][c] | codes[32 + 4 * i + j][c] << 4);
}

void pack(const packing *p) {
    const int64_t D_packed = ROUND_UP(p->D, 8), V_packed = ROUND_UP(p->V, 16), padded = ROUND_UP(D_packed, LANES);
    const int64_t size = p->dtype == FLOAT32 ? 4 : 2, most = padded > V_packed ? padded : V_packed;
    const int64_t key_bytes = UNIT * D_packed * p->bits / 8, value_bytes = UNIT * V_packed * p->bits / 8;
    const int64_t value_scales = p->bits == 8 ? UNIT : 2 * p->groups * UNIT, blocks = p->B * p->K * p->N;
#pragma omp parallel for num_threads((int)p->threads) if (blocks > 7)
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t b = i / p->N / p->K, k = i / p->N % p->K, n = i % p->N;
        float x[UNIT * most] __attribute__((aligned(64)));
        for (int side = 0; side < 2; side++) {
            const int64_t *strides = side ? p->value_strides : p->key_strides, D = side ? p->V : p->D;
            const int64_t room = side ? V_packed : padded;
            const char *from = (side ? p->values : p->keys) +
                               (b * strides[0] + k * strides[1] + n * UNIT * strides[2]) * size;
            memset(x, 0, sizeof x);
            for (int t = 0; t < UNIT; t++) widen(from + t * strides[2] * size, p->dtype, D, x + t * room);
            if (side)
                pack_values(x, V_packed, p->groups, p->bits, p->value_codes + i * value_bytes,
                            p->value_scales + i * value_scales);
            else
                pack_keys(x, padded, D_packed, p->bits, p->key_codes + i * key_bytes,
                          p->key_scales + i * 2 * D_packed);
        }
    }
}
