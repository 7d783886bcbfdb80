/* Products of a few rows of activations with int8 and int4 weights, at the speed of reading the weights.
 *
 * The layouts are those of PyTorch's own CPU kernels (see ops/linear.py), so that either can work on the same bytes.
 * Activations become 16-bit integers with a power of two as the scale of every group of input features: a bfloat16
 * within a factor of 2^7 of the largest of its group is held exactly. The dot product within a group is then an exact
 * integer; scales, zeros and the sum over groups are float32.
 *
 * BLOCK, the rows in a block of int4 codes, is given by the build: 64 needs AVX512BW, 32 needs AVX2.
 * Functions return 0, or -1 where there is no memory.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if BLOCK == 64
typedef __m512i integers;
typedef __m512 floats;
#define I(name) _mm512_##name
#define LOAD(p) _mm512_loadu_si512(p)
#define LOAD_BYTES(p) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define ZERO() _mm512_setzero_si512()
#define AND(a, b) _mm512_and_si512(a, b)
/* The first of two 32-bit values in the lower half of the lanes, the second in the upper half. */
#define HALVES(p) _mm512_mask_set1_epi32(_mm512_set1_epi32((p)[0]), 0xFF00, (p)[1])
/* [lower half of a, lower half of b] + [upper half of a, upper half of b] */
#define FOLD(a, b) _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xEE))
#define FLOATS(a) _mm512_castsi512_ps(a)
#define INTEGERS(a) _mm512_castps_si512(a)
#define LOAD_CODES(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define STORE(p, a) _mm512_storeu_si512(p, a)
#define IN_ORDER(a) _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), a)
#else
typedef __m256i integers;
typedef __m256 floats;
#define I(name) _mm256_##name
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOAD_BYTES(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define ZERO() _mm256_setzero_si256()
#define AND(a, b) _mm256_and_si256(a, b)
#define HALVES(p) _mm256_set_m128i(_mm_set1_epi32((p)[1]), _mm_set1_epi32((p)[0]))
#define FOLD(a, b) _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31))
#define FLOATS(a) _mm256_castsi256_ps(a)
#define INTEGERS(a) _mm256_castps_si256(a)
#define LOAD_CODES(p) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define STORE(p, a) _mm256_storeu_si256((__m256i *)(p), a)
#define IN_ORDER(a) _mm256_permute4x64_epi64(a, 0xD8)
#endif

enum {
    LANES = sizeof(integers) / 4,
    HALF = BLOCK / 2,     /* bytes of int4 codes per input feature of a block */
    PARTS = BLOCK / 16,    /* 128-bit parts of a vector */
    ROWS = BLOCK / 32,     /* rows of activations that fit the registers */
    AHEAD = 6144,          /* bytes of codes to prefetch: further than the processor does by itself */
    GROUP = 64,            /* input features per scale of the activations of an int8 product */
    TILE = 32,             /* rows of int8 codes that stay in the cache for all rows of activations */
};

enum dtype { FLOAT32, BFLOAT16, FLOAT16 };

/* acc + sums of pairs of 16-bit products */
static inline integers dot(integers acc, integers a, integers b) {
#if defined(__AVX512VNNI__) && (BLOCK == 64 || defined(__AVX512VL__))
    return I(dpwssd_epi32)(acc, a, b);
#elif defined(__AVXVNNI__) && BLOCK == 32
    return _mm256_dpwssd_avx_epi32(acc, a, b);
#else
    return I(add_epi32)(acc, I(madd_epi16)(a, b));
#endif
}

static inline float from_bfloat16(uint16_t bits) {
    uint32_t u = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* To nearest, ties to even. */
static inline uint16_t to_bfloat16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return f != f ? 0x7FC0 : (uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

static void widen(const void *x, enum dtype dtype, int64_t n, float *out) {
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < n; i++) out[i] = from_bfloat16(((const uint16_t *)x)[i]);
    else if (dtype == FLOAT16)
        for (int64_t i = 0; i < n; i++) out[i] = _cvtsh_ss(((const uint16_t *)x)[i]);
    else
        memcpy(out, x, n * sizeof(float));
}

static inline void put(void *out, enum dtype dtype, int64_t i, float value) {
    if (dtype == BFLOAT16)
        ((uint16_t *)out)[i] = to_bfloat16(value);
    else if (dtype == FLOAT16)
        ((uint16_t *)out)[i] = _cvtss_sh(value, 0);
    else
        ((float *)out)[i] = value;
}

/* Activations [M, K] as integers: x = q * scale in every group of input features. K is padded with zeros. */
typedef struct {
    int64_t groups, stride; /* stride = groups * group */
    int16_t *q;             /* [M, stride] */
    float *scale;           /* [M, groups] */
    int32_t *sum;           /* [M, groups], of q */
} activations;

/* One group. The scale is the power of two that takes the largest value to 2^14 or above. */
static void quantize_group(const float *x, int64_t group, int16_t *q, float *scale, int32_t *sum) {
    int32_t largest = 0, total = 0;
    for (int64_t i = 0; i < group; i++) { /* positive floats are ordered as their bits are, NaN and infinity last */
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    int32_t exponent = largest >> 23;
    int finite = exponent < 255;
    exponent = !finite ? 127 : exponent < 15 ? 15 : exponent;
    float up = from_bfloat16((uint16_t)((268 - exponent) << 7));
    for (int64_t i = 0; i < group; i++) {
        int32_t v = finite ? (int32_t)rintf(x[i] * up) : 0;
        v = v > 32767 ? 32767 : v;
        q[i] = (int16_t)v;
        total += v;
    }
    *scale = finite ? from_bfloat16((uint16_t)((exponent - 14) << 7)) : NAN;
    *sum = total;
}

/* Pairs of the features 0 and 4, 1 and 5, 2 and 6, 3 and 7 in every eight, as `block_int4` takes them. */
static void interleave(int16_t *q, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) {
        __m128i v = _mm_loadu_si128((const __m128i *)(q + i));
        _mm_storeu_si128((__m128i *)(q + i), _mm_unpacklo_epi16(v, _mm_srli_si128(v, 8)));
    }
}

/* Returns the memory that holds it all, to be freed, or NULL. */
static void *quantize(const void *x, enum dtype dtype, int64_t M, int64_t K, int64_t group, activations *a) {
    a->groups = (K + group - 1) / group;
    a->stride = a->groups * group;
    float *row = calloc(a->stride * (4 + 2 * M) + 8 * M * a->groups, 1);
    if (!row) return NULL;
    a->scale = row + a->stride;
    a->sum = (int32_t *)(a->scale + M * a->groups);
    a->q = (int16_t *)(a->sum + M * a->groups);
    for (int64_t m = 0; m < M; m++) {
        widen((const char *)x + m * K * (dtype == FLOAT32 ? 4 : 2), dtype, K, row);
        for (int64_t g = 0, i = m * a->groups; g < a->groups; g++, i++)
            quantize_group(row + g * group, group, a->q + i * group, a->scale + i, a->sum + i);
    }
    return row;
}

/* `rows` rows of activations from m on times a block of int4 codes. In a chunk of eight input features, a vector of
 * codes holds two features, one in each half of its lanes. Two rounds of interleaving give lanes with four features of
 * one row of weights: part l of accumulator j has the rows 16 l + 4 j .. + 3. Half of the parts of an accumulator are
 * for even features, half for odd ones; `low` are the rows of the low half-bytes, `high` those of the high ones. */
static inline __attribute__((always_inline)) void block_int4(const uint8_t *codes, const uint16_t *scales, int64_t N,
                                                             const activations *a, int64_t m, int rows, int64_t group,
                                                             float (*out)[BLOCK]) {
    const integers mask = I(set1_epi16)(15);
    floats total[ROWS][4] = {0};
    for (int64_t g = 0; g < a->groups; g++, scales += N * 2) {
        const int32_t *q[ROWS];
        integers low[ROWS][4], high[ROWS][4];
        for (int r = 0; r < rows; r++) {
            q[r] = (const int32_t *)(a->q + (m + r) * a->stride + g * group);
            for (int j = 0; j < 4; j++) low[r][j] = high[r][j] = ZERO();
        }
        for (size_t i = 0; i < BLOCK * 4; i += 64) __builtin_prefetch((const char *)(scales + N * 2) + i);
        for (int64_t k = 0; k < group; k += 8, codes += 8 * HALF) {
            for (int i = 0; i < 8 * HALF; i += 64) __builtin_prefetch(codes + AHEAD + i);
            const integers c0 = LOAD(codes), c2 = LOAD(codes + 2 * HALF);
            const integers c4 = LOAD(codes + 4 * HALF), c6 = LOAD(codes + 6 * HALF);
            const integers x0 = I(unpacklo_epi8)(c0, c2), x1 = I(unpackhi_epi8)(c0, c2);
            const integers x2 = I(unpacklo_epi8)(c4, c6), x3 = I(unpackhi_epi8)(c4, c6);
            const integers w[4] = {I(unpacklo_epi16)(x0, x2), I(unpackhi_epi16)(x0, x2), I(unpacklo_epi16)(x1, x3),
                                   I(unpackhi_epi16)(x1, x3)};
            integers first[ROWS], second[ROWS];
            for (int r = 0; r < rows; r++, q[r - 1] += 4) first[r] = HALVES(q[r]), second[r] = HALVES(q[r] + 2);
            for (int j = 0; j < 4; j++) {
                const integers w0 = AND(w[j], mask), w1 = AND(I(srli_epi16)(w[j], 4), mask);
                const integers w2 = AND(I(srli_epi16)(w[j], 8), mask), w3 = I(srli_epi16)(w[j], 12);
                for (int r = 0; r < rows; r++) {
                    low[r][j] = dot(dot(low[r][j], w0, first[r]), w2, second[r]);
                    high[r][j] = dot(dot(high[r][j], w1, first[r]), w3, second[r]);
                }
            }
        }
        for (int j = 0; j < 4; j++) { /* (code - 8) * scale + zero, times q, summed */
            uint32_t pairs[LANES];
            for (int l = 0; l < PARTS; l++) memcpy(pairs + 4 * l, scales + 2 * (16 * l + 4 * j), 16);
            const floats scale = FLOATS(I(slli_epi32)(LOAD(pairs), 16));
            const floats zero = FLOATS(AND(LOAD(pairs), I(set1_epi32)((int32_t)0xFFFF0000)));
            for (int r = 0; r < rows; r++) {
                const int32_t sum = a->sum[(m + r) * a->groups + g];
                const integers product = I(add_epi32)(FOLD(low[r][j], high[r][j]), I(set1_epi32)(-8 * sum));
                const floats part = I(fmadd_ps)(scale, I(cvtepi32_ps)(product), I(mul_ps)(zero, I(set1_ps)((float)sum)));
                total[r][j] = I(fmadd_ps)(part, I(set1_ps)(a->scale[(m + r) * a->groups + g]), total[r][j]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < 4; j++) {
            float lanes[LANES];
            I(storeu_ps)(lanes, total[r][j]);
            for (int l = 0; l < PARTS; l++) memcpy(out[r] + 16 * l + 4 * j, lanes + 4 * l, 16);
        }
}

/* x [M, K] times the transpose of int4 weights [N, K], N whole blocks: out [M, N]. codes [N / BLOCK, K, BLOCK / 2];
 * scales and zeros bfloat16 [K / group, N, 2]. */
int linear_int4(const void *x, int dtype, int64_t M, int64_t K, const uint8_t *codes, const uint16_t *scales,
                int64_t N, int64_t group, void *out, int threads) {
    activations a;
    void *memory = quantize(x, dtype, M, K, group, &a);
    if (!memory) return -1;
    interleave(a.q, M * a.stride);
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n += BLOCK)
        for (int64_t m = 0, rows; m < M; m += rows) {
            const uint8_t *block = codes + n * K / 2;
            float total[ROWS][BLOCK];
            rows = M - m >= ROWS ? ROWS : 1;
            if (rows == ROWS)
                block_int4(block, scales + 2 * n, N, &a, m, ROWS, group, total);
            else
                block_int4(block, scales + 2 * n, N, &a, m, 1, group, total);
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < BLOCK; i++) put(out, dtype, (m + r) * N + n + i, total[r][i]);
        }
    free(memory);
    return 0;
}

/* `rows` rows of activations from m on times one row of int8 codes. */
static inline __attribute__((always_inline)) void row_int8(const int8_t *codes, int64_t K, const activations *a,
                                                           int64_t m, int rows, float *out) {
    const int16_t *q = a->q + m * a->stride;
    const float *scale = a->scale + m * a->groups;
    floats total[4] = {0};
    int64_t g = 0;
    for (; (g + 1) * GROUP <= K; g++) {
        integers sum[4] = {0};
        __builtin_prefetch(codes + g * GROUP + AHEAD);
        for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k += 2 * LANES) {
            const integers w = LOAD_BYTES(codes + k);
            for (int r = 0; r < rows; r++) sum[r] = dot(sum[r], w, LOAD(q + r * a->stride + k));
        }
        for (int r = 0; r < rows; r++)
            total[r] = I(fmadd_ps)(I(cvtepi32_ps)(sum[r]), I(set1_ps)(scale[r * a->groups + g]), total[r]);
    }
    for (int r = 0; r < rows; r++) {
        float lanes[LANES];
        I(storeu_ps)(lanes, total[r]);
        out[r] = 0;
        for (int i = 0; i < LANES; i++) out[r] += lanes[i];
        for (int64_t k = g * GROUP; k < K; k++)
            out[r] += (float)(codes[k] * q[r * a->stride + k]) * scale[r * a->groups + g];
    }
}

/* x [M, K] times the transpose of int8 codes [N, K] with bfloat16 scales [N]: out [M, N]. */
int linear_int8(const void *x, int dtype, int64_t M, int64_t K, const int8_t *codes, const uint16_t *scales,
                int64_t N, void *out, int threads) {
    activations a;
    void *memory = quantize(x, dtype, M, K, GROUP, &a);
    if (!memory) return -1;
#pragma omp parallel for num_threads(threads)
    for (int64_t start = 0; start < N; start += TILE)
        for (int64_t m = 0, rows; m < M; m += rows) {
            rows = M - m >= 4 ? 4 : 1;
            for (int64_t n = start; n < N && n < start + TILE; n++) {
                float total[4];
                if (rows == 4)
                    row_int8(codes + n * K, K, &a, m, 4, total);
                else
                    row_int8(codes + n * K, K, &a, m, 1, total);
                for (int r = 0; r < rows; r++) put(out, dtype, (m + r) * N + n, total[r] * from_bfloat16(scales[n]));
            }
        }
    free(memory);
    return 0;
}

/* One bfloat16 per 32-bit lane of a, those of b above them: 2 LANES of them in order. */
static inline integers narrow(floats a, floats b) {
#if defined(__AVX512BF16__) && BLOCK == 64
    return (integers)_mm512_cvtne2ps_pbh(b, a);
#else
    integers x = INTEGERS(a), y = INTEGERS(b);
    const integers one = I(set1_epi32)(1), half = I(set1_epi32)(0x7FFF);
    x = I(srli_epi32)(I(add_epi32)(I(add_epi32)(x, half), AND(I(srli_epi32)(x, 16), one)), 16);
    y = I(srli_epi32)(I(add_epi32)(I(add_epi32)(y, half), AND(I(srli_epi32)(y, 16), one)), 16);
    return IN_ORDER(I(packus_epi32)(x, y));
#endif
}

/* int4 weights of `rows` rows, whole blocks, as bfloat16 [K, rows], `stride` apart. `codes` and `scales` begin at these
 * rows. */
void unpack_int4(const uint8_t *codes, const uint16_t *scales, int64_t N, int64_t K, int64_t group, int64_t rows,
                 uint16_t *out, int64_t stride, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t n = 0; n < rows; n += BLOCK)
        for (int64_t k0 = 0; k0 < K; k0 += group) {
            floats scale[4], zero[4]; /* zero is that of code 0 */
            for (int j = 0; j < 4; j++) {
                const integers pair = LOAD(scales + 2 * (k0 / group * N + n + j * LANES));
                scale[j] = FLOATS(I(slli_epi32)(pair, 16));
                zero[j] = I(fmadd_ps)(scale[j], I(set1_ps)(-8), FLOATS(AND(pair, I(set1_epi32)((int32_t)0xFFFF0000))));
            }
            for (int64_t k = k0; k < k0 + group; k++) {
                const uint8_t *in = codes + n * K / 2 + k * HALF;
                uint16_t *to = out + k * stride + n;
                for (int j = 0; j < 4; j += 2) {
                    floats w[2];
                    for (int i = 0; i < 2; i++) {
                        integers q = LOAD_CODES(in + i * LANES);
                        q = j ? I(srli_epi32)(q, 4) : AND(q, I(set1_epi32)(15));
                        w[i] = I(fmadd_ps)(I(cvtepi32_ps)(q), scale[j + i], zero[j + i]);
                    }
                    STORE(to + j * LANES, narrow(w[0], w[1]));
                }
            }
        }
}

/* int8 codes as bfloat16, which holds them exactly. */
void unpack_int8(const int8_t *codes, int64_t size, uint16_t *out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < size; i++) {
        float f = codes[i];
        uint32_t bits;
        memcpy(&bits, &f, 4);
        out[i] = (uint16_t)(bits >> 16);
    }
}
