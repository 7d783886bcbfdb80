/* Products of a few rows of activations with int8, int4 and float weights, at the speed of reading the weights, or of
 * multiplying where that takes longer.
 *
 * The layouts are those of PyTorch's own CPU kernels (see ops/linear.py), so that either can work on the same bytes.
 * Products with float weights are summed in float32, and so are those of int8 codes with more than a few rows of
 * bfloat16, where the processor multiplies that. Else, for quantized weights, activations become 16-bit integers with a
 * power of two as the scale of every group of input features: a bfloat16 within a factor of 2^7 of the largest of its
 * group is held exactly. The dot product within a group is then an exact integer; scales, zeros and the sum over groups
 * are float32.
 *
 * BLOCK, the rows in a block of int4 codes, is given by the build: 64 needs AVX512BW, 32 needs AVX2.
 * Functions return 0, or -1 where there is no memory.
 */
#include <stdlib.h>

#include "products.h"
#include "team.h"

#if BLOCK == 64
typedef __m512i integers;
typedef __m512 floats;
#define I(name) _mm512_##name
#define LOAD(p) _mm512_loadu_si512(p)
#define LOAD_BYTES(p) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define LOAD_FLOAT16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define ZERO() _mm512_setzero_si512()
#define AND(a, b) _mm512_and_si512(a, b)
/* The first of two 32-bit values in the lower half of the lanes, the second in the upper half. */
#define HALVES(p) _mm512_mask_set1_epi32(_mm512_set1_epi32((p)[0]), 0xFF00, (p)[1])
/* [lower half of a, lower half of b] + [upper half of a, upper half of b] */
#define FOLD(a, b) _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xEE))
#define FLOATS(a) _mm512_castsi512_ps(a)
#define INTEGERS(a) _mm512_castps_si512(a)
#define LOAD_CODES(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define LOAD_INT8(p) _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define STORE(p, a) _mm512_storeu_si512(p, a)
#define STREAM(p, a) _mm512_stream_si512((__m512i *)(p), a)
#define IN_ORDER(a) _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), a)
#else
typedef __m256i integers;
typedef __m256 floats;
#define I(name) _mm256_##name
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOAD_BYTES(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define LOAD_FLOAT16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define ZERO() _mm256_setzero_si256()
#define AND(a, b) _mm256_and_si256(a, b)
#define HALVES(p) halves(p)
#define FOLD(a, b) _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31))
#define FLOATS(a) _mm256_castsi256_ps(a)
#define INTEGERS(a) _mm256_castps_si256(a)
#define LOAD_CODES(p) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define LOAD_INT8(p) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define STORE(p, a) _mm256_storeu_si256((__m256i *)(p), a)
#define STREAM(p, a) _mm256_stream_si256((__m256i *)(p), a)
#define IN_ORDER(a) _mm256_permute4x64_epi64(a, 0xD8)
#endif

#if BLOCK == 32
static inline integers halves(const int32_t *p) {
    int64_t both;
    memcpy(&both, p, 8);
    const floats pairs = _mm256_castsi256_ps(_mm256_set1_epi64x(both));
    return _mm256_castps_si256(_mm256_permutevar_ps(pairs, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)));
}
#endif

/* Weights that come later are fetched into the second cache: the first is full of what is multiplied now. Products of
 * few rows of activations read more than they multiply: of up to four with floats, three with int8, two with codes of 4
 * bits. Whether these fetch too is measured on each machine: it helps where memory is fast, and may hinder where it is
 * busy. */
#define FETCH(p) __builtin_prefetch(p, 0, 2)
#ifdef PLAIN
#define PREFETCHES 0
#else
#define PREFETCHES 1
#endif
/* From the scales of a group of codes to those that are prefetched: of the next group, or of the next block, which are
 * beside them in memory. */
#if BLOCK == 64
#define SCALES_AHEAD(N) (2 * (N))
#else
#define SCALES_AHEAD(N) (2 * BLOCK)
#endif
#define INLINE static inline __attribute__((always_inline))
#define HIGH_HALVES I(set1_epi32)((int32_t)0xFFFF0000)

enum {
    LANES = sizeof(integers) / 4,
    PARTS = BLOCK / 16,  /* 128-bit parts of a vector */
    HALF = BLOCK / 2,    /* bytes of int4 codes for an input feature of a block */
    GROUP = 128,         /* input features per scale of the activations of an int8 product */
    MOST = 48,           /* rows of activations for which a group of int4 codes is expanded once */
    TILE = 32,           /* rows of int8 codes or floats that stay in the cache for all rows of activations */
    COLUMNS = PARTS,     /* rows of float weights that go together */
    FEW_ROWS = 8,        /* rows of bfloat16 that int8 codes are multiplied with as integers */
    NEAR = 2048,         /* bytes of weights that leave room in the first cache for as many that come later */
    MOST_ROWS = 64,      /* rows of activations that go through a tile of float weights before the next tile */
    AHEAD = 6144,        /* bytes to prefetch at least: further than the processor does by itself */
    STREAMED_BYTES = 1 << 20, /* that are unpacked at a time at most, to go into the caches */
};

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

static inline float sum_lanes(floats a) {
#if BLOCK == 64
    return _mm512_reduce_add_ps(a);
#else
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#endif
}

#if BLOCK == 64
/* The sums over the lanes of four vectors, in the order of additions of `sum_lanes`. */
static inline void sum_four(const floats a[4], float *out) {
    const floats x = _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x44), _mm512_shuffle_f32x4(a[0], a[1], 0xEE));
    const floats y = _mm512_add_ps(_mm512_shuffle_f32x4(a[2], a[3], 0x44), _mm512_shuffle_f32x4(a[2], a[3], 0xEE));
    floats z = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
    z = _mm512_add_ps(z, _mm512_permute_ps(z, 0x4E));
    z = _mm512_add_ps(z, _mm512_permute_ps(z, 0xB1));
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, z)));
}
#endif

/* Activations [M, K] as integers: x = q * scale in every group of input features. K is padded with zeros. */
typedef struct {
    int64_t groups, stride;
    int16_t *q;   /* [M, stride] */
    float *scale; /* [M, groups] */
    int32_t *sum; /* [M, groups], of q */
} activations;

typedef struct {
    const char *x;
    enum dtype dtype;
    int64_t K, group;
    int interleaved;
    const activations *a;
} quantizing;

static void quantize_piece(void *argument, int64_t start, int64_t stop) {
    const quantizing *q = argument;
    const activations *a = q->a;
    for (int64_t i = start; i < stop; i++) {
        const int64_t m = i / a->groups, k = i % a->groups * q->group, count = q->K - k < q->group ? q->K - k : q->group;
        float values[GROUP_MOST] = {0};
        int16_t *to = a->q + m * a->stride + k;
        widen(q->x + (m * q->K + k) * (q->dtype == FLOAT32 ? 4 : 2), q->dtype, count, values);
        quantize_group(values, q->group, to, a->scale + i, a->sum + i);
        for (int64_t e = 0; q->interleaved && e < q->group; e += 8) {
            const __m128i eight = _mm_loadu_si128((const __m128i *)(to + e));
            _mm_storeu_si128((__m128i *)(to + e), _mm_unpacklo_epi16(eight, _mm_srli_si128(eight, 8)));
        }
    }
}

/* Returns the memory that holds it all, to be freed, or NULL. `interleaved`: in every eight input features those in the
 * order 0 4 1 5 2 6 3 7, as int4 products take them. */
static void *quantize(const void *x, enum dtype dtype, int64_t M, int64_t K, int64_t group, int interleaved,
                      activations *a, crew who) {
    a->groups = (K + group - 1) / group;
    a->stride = a->groups * group + 32; /* a cache line more, so that rows do not fall on the same sets */
    const size_t size = 2 * M * a->stride + 8 * M * a->groups;
    a->q = aligned_alloc(64, (size + 64) / 64 * 64);
    if (!a->q) return NULL;
    a->scale = (float *)(a->q + M * a->stride);
    a->sum = (int32_t *)(a->scale + M * a->groups);
    quantizing q = {x, dtype, K, group, interleaved, a};
    each(M > 2 ? who : 1, M * a->groups, group * 8, quantize_piece, &q);
    return a->q;
}

/* Entries 0..15 of a table of 16-bit integers, by lanes. */
#if BLOCK == 64
#define LOOK_UP(table, a) _mm512_permutexvar_epi16(a, table)
#define LOAD_TABLE(p) _mm512_broadcast_i64x4(LOAD_16(p))
#define LOAD_16(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOOK_UP_FLOATS(low, high, a) ((void)(high), _mm512_permutexvar_ps(a, low))
#else
/* The low bytes of the entries in the first half of a table register, the high bytes in the second. */
static inline integers look_up(integers table, integers a) {
    const integers low = _mm256_permute4x64_epi64(table, 0x44), high = _mm256_permute4x64_epi64(table, 0xEE);
    const integers even = _mm256_shuffle_epi8(low, _mm256_or_si256(a, _mm256_set1_epi16((int16_t)0x8000)));
    const integers odd = _mm256_shuffle_epi8(high, _mm256_or_si256(_mm256_slli_epi16(a, 8), _mm256_set1_epi16(0x80)));
    return _mm256_or_si256(even, odd);
}
static inline integers load_table(const int16_t *p) {
    uint8_t bytes[32];
    for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)p[i], bytes[16 + i] = (uint8_t)((uint16_t)p[i] >> 8);
    return LOAD(bytes);
}
#define LOOK_UP(table, a) look_up(table, a)
#define LOAD_TABLE(p) load_table(p)
#define LOOK_UP_FLOATS(low, high, a)                                                                 \
    _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, a), _mm256_permutevar8x32_ps(high, a), /* by bit 3 */ \
                     FLOATS(_mm256_slli_epi32(a, 28)))
#endif

/* The codes of eight input features, from a block of int4 codes, as 16-bit integers, or the entries of `table` that
 * they stand for. A vector of codes holds two features, one in each half of its lanes; two rounds of interleaving give
 * lanes with four features of one row. Of the four vectors w[j], parts l have the rows 16 l + 4 j .. + 3 of the low
 * half-bytes' features (0 4 | 1 5), of the high half-bytes' the same features, and of either the features (2 6 | 3 7).
 * The first half of the parts of a vector are for the even features, the second half for the odd ones. */
INLINE void expand_int4(const uint8_t *codes, const integers *table, integers w[4][4]) {
    const integers mask = I(set1_epi16)(15);
    const integers c0 = LOAD(codes), c2 = LOAD(codes + 2 * HALF);
    const integers c4 = LOAD(codes + 4 * HALF), c6 = LOAD(codes + 6 * HALF);
    const integers x0 = I(unpacklo_epi8)(c0, c2), x1 = I(unpackhi_epi8)(c0, c2);
    const integers x2 = I(unpacklo_epi8)(c4, c6), x3 = I(unpackhi_epi8)(c4, c6);
    const integers mixed[4] = {I(unpacklo_epi16)(x0, x2), I(unpackhi_epi16)(x0, x2), I(unpacklo_epi16)(x1, x3),
                               I(unpackhi_epi16)(x1, x3)};
    for (int j = 0; j < 4; j++) {
        w[j][0] = AND(mixed[j], mask);
        w[j][1] = AND(I(srli_epi16)(mixed[j], 4), mask);
        w[j][2] = AND(I(srli_epi16)(mixed[j], 8), mask);
        w[j][3] = I(srli_epi16)(mixed[j], 12);
        for (int i = 0; table && i < 4; i++) w[j][i] = LOOK_UP(*table, w[j][i]);
    }
}

/* Scales, and zeros less eight scales, which are the weights of code 0, in the order of the accumulators below. With a
 * table the scales are float32, and there are no zeros. */
INLINE void load_scales(const uint16_t *scales, int table, floats scale[4], floats start[4]) {
    for (int j = 0; j < 4; j++) {
        uint32_t pairs[LANES];
        for (int l = 0; l < PARTS; l++) memcpy(pairs + 4 * l, scales + 2 * (16 * l + 4 * j), 16);
        scale[j] = FLOATS(table ? LOAD(pairs) : I(slli_epi32)(LOAD(pairs), 16));
        start[j] = table ? I(setzero_ps)()
                         : I(fmadd_ps)(scale[j], I(set1_ps)(-8), FLOATS(AND(LOAD(pairs), HIGH_HALVES)));
    }
}

#if BLOCK == 32
/* The sums of products of one row of activations with a group of a block, as below. Each in a variable of its own: there
 * are 16 registers, and arrays would go to memory at every step. A table is looked up while two codes share 16 bits. Codes
 * of high half-bytes stay where they are: 16 times their sums fit 32 bits. */
INLINE void sums_int4(const uint8_t *codes, const integers *table, const int16_t *q, int64_t group, integers low[4],
                      integers high[4]) {
    const integers mask = table ? _mm256_set1_epi8(15) : _mm256_set1_epi16(15), bytes = _mm256_set1_epi16(255);
    const integers high_mask = _mm256_set1_epi16(0xF0);
    const integers lows = table ? _mm256_permute4x64_epi64(*table, 0x44) : mask;
    const integers highs = table ? _mm256_permute4x64_epi64(*table, 0xEE) : mask;
    integers low0 = ZERO(), low1 = low0, low2 = low0, low3 = low0, high0 = low0, high1 = low0, high2 = low0, high3 = low0;
#define LOOKED_UP(sum, of_four)                                                                                   \
    {                                                                                                             \
        const integers two = AND(of_four, mask); /* codes in each 16 bits */                                      \
        const integers l = _mm256_shuffle_epi8(lows, two), h = _mm256_shuffle_epi8(highs, two);                   \
        sum = dot(sum, _mm256_blendv_epi8(_mm256_slli_epi16(h, 8), l, bytes), first);                             \
        sum = dot(sum, _mm256_blendv_epi8(h, _mm256_srli_epi16(l, 8), bytes), second);                            \
    }
#define ROWS(j, pairs)                                                                                            \
    {                                                                                                             \
        const integers even = pairs, odd = _mm256_srli_epi16(even, 8);                                            \
        if (table) {                                                                                              \
            LOOKED_UP(low##j, even)                                                                               \
            LOOKED_UP(high##j, _mm256_srli_epi16(even, 4))                                                        \
        } else {                                                                                                  \
            low##j = dot(dot(low##j, AND(even, mask), first), AND(odd, mask), second);                            \
            high##j = dot(dot(high##j, AND(even, high_mask), first), AND(odd, high_mask), second);                \
        }                                                                                                         \
    }
    for (int64_t k = 0; k < group; k += 8, codes += 8 * HALF, q += 8) {
        for (int i = 0; PREFETCHES && i < 8 * HALF; i += 64) FETCH(codes + AHEAD + i);
        const integers first = HALVES((const int32_t *)q), second = HALVES((const int32_t *)q + 2);
        const integers x0 = _mm256_unpacklo_epi8(LOAD(codes), LOAD(codes + 2 * HALF));
        const integers x2 = _mm256_unpacklo_epi8(LOAD(codes + 4 * HALF), LOAD(codes + 6 * HALF));
        ROWS(0, _mm256_unpacklo_epi16(x0, x2))
        ROWS(1, _mm256_unpackhi_epi16(x0, x2))
        const integers x1 = _mm256_unpackhi_epi8(LOAD(codes), LOAD(codes + 2 * HALF));
        const integers x3 = _mm256_unpackhi_epi8(LOAD(codes + 4 * HALF), LOAD(codes + 6 * HALF));
        ROWS(2, _mm256_unpacklo_epi16(x1, x3))
        ROWS(3, _mm256_unpackhi_epi16(x1, x3))
    }
#undef LOOKED_UP
#undef ROWS
    if (!table) {
        high0 = _mm256_srai_epi32(high0, 4), high1 = _mm256_srai_epi32(high1, 4);
        high2 = _mm256_srai_epi32(high2, 4), high3 = _mm256_srai_epi32(high3, 4);
    }
    low[0] = low0, low[1] = low1, low[2] = low2, low[3] = low3;
    high[0] = high0, high[1] = high1, high[2] = high2, high[3] = high3;
}
#endif

/* total[r] += the products of `rows` rows of activations from m on with group g of a block, whose weights are
 * code * scale + start. The codes are expanded here, or have been. */
INLINE void group_int4(const uint8_t *codes, const integers *table, integers (*expanded)[4][4], const activations *a,
                       int64_t m, int rows, int64_t g, int64_t group, const floats scale[4], const floats start[4],
                       floats (*total)[4]) {
    integers low[3][4], high[3][4];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < 4; j++) low[r][j] = high[r][j] = ZERO();
#if BLOCK == 32
    if (!expanded && rows == 1) sums_int4(codes, table, a->q + m * a->stride + g * group, group, low[0], high[0]);
#endif
    for (int64_t k = 0; k < group && (BLOCK == 64 || expanded || rows > 1); k += 8) {
        integers here[4][4], first[3], second[3];
        if (!expanded) {
            for (int i = 0; PREFETCHES && i < 8 * HALF; i += 64) FETCH(codes + k * HALF + AHEAD + i);
            expand_int4(codes + k * HALF, table, here);
        }
        integers(*const w)[4] = expanded ? expanded[k / 8] : here;
        for (int r = 0; r < rows; r++) {
            const int32_t *q = (const int32_t *)(a->q + (m + r) * a->stride + g * group + k);
            first[r] = HALVES(q), second[r] = HALVES(q + 2);
        }
        for (int j = 0; j < 4; j++)
            for (int r = 0; r < rows; r++) {
                low[r][j] = dot(dot(low[r][j], w[j][0], first[r]), w[j][2], second[r]);
                high[r][j] = dot(dot(high[r][j], w[j][1], first[r]), w[j][3], second[r]);
            }
    }
    for (int r = 0; r < rows; r++) {
        const int64_t i = (m + r) * a->groups + g;
        const floats factor = I(set1_ps)(a->scale[i]), sum = I(set1_ps)(a->scale[i] * (float)a->sum[i]);
        for (int j = 0; j < 4; j++) {
            const floats product = I(mul_ps)(I(cvtepi32_ps)(FOLD(low[r][j], high[r][j])), scale[j]);
            total[r][j] = I(fmadd_ps)(product, factor, I(fmadd_ps)(start[j], sum, total[r][j]));
        }
    }
}

/* One or two rows of activations with a block, straight from the codes. */
INLINE void few_int4(const uint8_t *codes, const uint16_t *scales, const integers *table, int64_t N,
                     const activations *a, int64_t m, int rows, int64_t group, floats (*total)[4]) {
    for (int64_t g = 0; g < a->groups; g++, codes += group * HALF, scales += N * 2) {
        floats scale[4], start[4];
        for (size_t i = 0; PREFETCHES && i < BLOCK * 4; i += 64)
            FETCH((const char *)(scales + SCALES_AHEAD(N)) + i);
        load_scales(scales, table != NULL, scale, start);
        group_int4(codes, table, NULL, a, m, rows, g, group, scale, start, total);
    }
}

/* Up to MOST rows of activations with a block: each group of codes is expanded once. */
INLINE void many_int4(const uint8_t *codes, const uint16_t *scales, const integers *table, int64_t N,
                      const activations *a, int64_t m, int64_t rows, int64_t group, floats (*total)[4]) {
    for (int64_t g = 0; g < a->groups; g++, codes += group * HALF, scales += N * 2) {
        floats scale[4], start[4];
        integers expanded[GROUP_MOST / 8][4][4];
        load_scales(scales, table != NULL, scale, start);
        for (int64_t k = 0; k < group; k += 8) {
            for (int i = 0; i < 8 * HALF; i += 64) FETCH(codes + k * HALF + AHEAD + i);
            expand_int4(codes + k * HALF, table, expanded[k / 8]);
        }
        int64_t r = 0;
        for (; BLOCK == 64 && r + 3 <= rows; r += 3)
            group_int4(NULL, NULL, expanded, a, m + r, 3, g, group, scale, start, total + r);
        for (; r < rows; r++) group_int4(NULL, NULL, expanded, a, m + r, 1, g, group, scale, start, total + r);
    }
}

/* Up to MOST rows of activations from m on with one block. */
INLINE void block_int4(const uint8_t *codes, const uint16_t *scales, const integers *table, int64_t N,
                       const activations *a, int64_t m, int64_t rows, int64_t group, floats (*total)[4]) {
    if (rows == 1)
        few_int4(codes, scales, table, N, a, m, 1, group, total);
    else if (rows == 2 && BLOCK == 64)
        few_int4(codes, scales, table, N, a, m, 2, group, total);
    else
        many_int4(codes, scales, table, N, a, m, rows, group, total);
}

/* A function with a table and one without, which inlined would leave one another no registers. */
static __attribute__((noinline)) void block_codes(const uint8_t *codes, const uint16_t *scales, int64_t N,
                                                  const activations *a, int64_t m, int64_t rows, int64_t group,
                                                  floats (*total)[4]) {
    block_int4(codes, scales, NULL, N, a, m, rows, group, total);
}

static __attribute__((noinline)) void block_table(const uint8_t *codes, const uint16_t *scales, const int16_t *table,
                                                  int64_t N, const activations *a, int64_t m, int64_t rows,
                                                  int64_t group, floats (*total)[4]) {
    const integers entries = LOAD_TABLE(table);
    block_int4(codes, scales, &entries, N, a, m, rows, group, total);
}

typedef struct {
    const activations *a;
    enum dtype dtype;
    int64_t M, K, N, group;
    const uint8_t *codes;
    const uint16_t *scales;
    const int16_t *table;
    float unit;
    void *out;
} int4_product;

static void int4_piece(void *argument, int64_t start, int64_t stop) {
    const int4_product *p = argument;
    for (int64_t n = start * BLOCK; n < stop * BLOCK; n += BLOCK)
        for (int64_t m = 0; m < p->M; m += MOST) {
            const uint8_t *block = p->codes + n * p->K / 2;
            const int64_t rows = p->M - m < MOST ? p->M - m : MOST;
            floats total[MOST][4];
            for (int64_t r = 0; r < rows; r++)
                for (int j = 0; j < 4; j++) total[r][j] = I(setzero_ps)();
            if (p->table)
                block_table(block, p->scales + 2 * n, p->table, p->N, p->a, m, rows, p->group, total);
            else
                block_codes(block, p->scales + 2 * n, p->N, p->a, m, rows, p->group, total);
            for (int64_t r = 0; r < rows; r++)
                for (int j = 0; j < 4; j++) {
                    float lanes[LANES];
                    I(storeu_ps)(lanes, total[r][j]);
                    for (int i = 0; i < LANES; i++)
                        put(p->out, p->dtype, (m + r) * p->N + n + i / 4 * 16 + 4 * j + i % 4, lanes[i] * p->unit);
                }
        }
}

/* x [M, K] times the transpose of 4-bit weights [N, K], N whole blocks: out [M, N]. codes [N / BLOCK, K, BLOCK / 2].
 * Without a table: scales and zeros bfloat16 [K / group, N, 2]. With one, of 16 values: scales float32 [K / group, N].
 */
int linear_int4(const void *x, int dtype, int64_t M, int64_t K, const uint8_t *codes, const uint16_t *scales,
                const float *table, int64_t N, int64_t group, void *out, crew who) {
    activations a;
    int16_t entries[16];
    const float unit = table ? integer_table(table, group, entries) : 1;
    void *memory = quantize(x, dtype, M, K, group, 1, &a, who);
    if (!memory) return -1;
    int4_product p = {&a, dtype, M, K, N, group, codes, scales, table ? entries : NULL, unit, out};
    each(who, N / BLOCK, K * HALF, int4_piece, &p);
    free(memory);
    return 0;
}

/* total[r] += the products of `rows` rows of activations with `count` rows of int8 codes, of `length` features that share
 * a scale. */
INLINE void group_int8(const int8_t *codes, int count, int64_t K, const int16_t *q, int64_t stride, int rows,
                       int64_t length, const float *scale, int64_t groups, floats (*total)[2]) {
    integers sum[4][2];
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < count; n++) sum[r][n] = ZERO();
    for (int64_t k = 0; k < length; k += 2 * LANES) {
        integers w[2];
        for (int n = 0; n < count; n++) w[n] = LOAD_BYTES(codes + n * K + k);
        for (int r = 0; r < rows; r++) {
            const integers x = LOAD(q + r * stride + k);
            for (int n = 0; n < count; n++) sum[r][n] = dot(sum[r][n], w[n], x);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < count; n++)
            total[r][n] = I(fmadd_ps)(I(cvtepi32_ps)(sum[r][n]), I(set1_ps)(scale[r * groups]), total[r][n]);
}

/* `rows` rows of activations from m on times `count` rows of int8 codes: out [rows][count]. */
INLINE void rows_int8(const int8_t *codes, int count, int64_t K, const activations *a, int64_t m, int rows,
                      float (*out)[2]) {
    const int16_t *q = a->q + m * a->stride;
    const float *scale = a->scale + m * a->groups;
    const int64_t together = count * K, ahead = (AHEAD + together - 1) / together * together; /* bytes: whole rows */
    const int64_t rest = K % GROUP / (2 * LANES) * (2 * LANES);
    floats total[4][2];
    int64_t g = 0;
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < count; n++) total[r][n] = I(setzero_ps)();
    for (; (g + 1) * GROUP <= K; g++) {
        for (int n = 0; (PREFETCHES || rows == 4) && n < count; n++)
            for (int i = 0; i < GROUP; i += 64) FETCH(codes + ahead + n * K + g * GROUP + i);
        group_int8(codes + g * GROUP, count, K, q + g * GROUP, a->stride, rows, GROUP, scale + g, a->groups, total);
    }
    if (rest)
        group_int8(codes + g * GROUP, count, K, q + g * GROUP, a->stride, rows, rest, scale + g, a->groups, total);
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < count; n++) {
            out[r][n] = sum_lanes(total[r][n]);
            for (int64_t k = g * GROUP + rest; k < K; k++)
                out[r][n] += (float)(codes[n * K + k] * q[r * a->stride + k]) * scale[r * a->groups + g];
        }
}

#if defined(__AVX512BF16__) && BLOCK == 64
#define PRODUCTS_OF_BFLOAT16 1
#else
#define PRODUCTS_OF_BFLOAT16 0
#endif

static inline float get(const void *x, enum dtype dtype, int64_t i) {
    float f;
    widen((const char *)x + i * (dtype == FLOAT32 ? 4 : 2), dtype, 1, &f);
    return f;
}

/* Bytes of an activation as `block_float` takes it. */
#define WIDE(dtype) ((dtype) == BFLOAT16 && PRODUCTS_OF_BFLOAT16 ? 2 : 4)

/* How many rows of activations go together, of those that are left: as evenly as can be. */
static inline int64_t together(int64_t rows) { return (rows + (rows + 3) / 4 - 1) / ((rows + 3) / 4); }

typedef struct {
    const char *x;
    enum dtype dtype;
    int64_t M, K;
    char *out;
} layout;

/* Activations [M, K] as `block_float` takes them: the rows that go together, chunk by chunk of 2 * LANES. Where bfloat16
 * is not multiplied as it is they are floats, of bfloat16 in every chunk first the even ones, then the odd. */
static void lay_out(void *argument, int64_t start, int64_t stop) {
    const layout *l = argument;
    const enum dtype dtype = l->dtype;
    const int64_t size = dtype == FLOAT32 ? 4 : 2, wide = WIDE(dtype), chunk = 2 * LANES, chunks = l->K / chunk;
    for (int64_t m = start; m < stop; m++) {
        int64_t first = 0, rows = together(l->M);
        while (first + rows <= m) first += rows, rows = together(l->M - first);
        for (int64_t i = 0; i < chunks; i++) {
            const char *from = l->x + (m * l->K + i * chunk) * size;
            char *to = l->out + (first * chunks + i * rows + m - first) * chunk * wide;
            if (wide == size) {
                memcpy(to, from, chunk * size);
                continue;
            }
            float values[2 * LANES], *floats_ = (float *)to;
            widen(from, dtype, chunk, values);
            for (int j = 0; j < chunk; j++) floats_[dtype == BFLOAT16 ? j / 2 + j % 2 * LANES : j] = values[j];
        }
    }
}

/* All of them, MOST_ROWS at a time, in memory that is to be freed, or NULL. */
static char *laid_out(const void *x, enum dtype dtype, int64_t M, int64_t K, crew who) {
    const int64_t size = dtype == FLOAT32 ? 4 : 2, row = K / (2 * LANES) * (2 * LANES) * WIDE(dtype);
    char *memory = aligned_alloc(64, (M * row + 64) / 64 * 64);
    for (int64_t m = 0; memory && m < M; m += MOST_ROWS) {
        const int64_t rows = M - m < MOST_ROWS ? M - m : MOST_ROWS;
        layout l = {(const char *)x + m * K * size, dtype, rows, K, memory + m * row};
        each(rows > 8 ? who : 1, rows, K * size, lay_out, &l);
    }
    return memory;
}

/* out[r][c] = the products of `rows` rows of activations, laid out as above, with `columns` rows of weights, of whole
 * chunks. A sum runs from the first chunk to the last, and then over the lanes, however many rows and columns there
 * are: so a row gives the same bits among others as it does alone. At `next` lie weights that come later, of which
 * `ahead` rows are prefetched, into the first cache if they are so few that they are wanted soon (`near`). */
INLINE void block_float(const char *w, enum dtype dtype, int64_t K, const char *x, int rows, int columns,
                        const char *next, int ahead, int near, float (*out)[TILE]) {
    const int64_t size = dtype == FLOAT32 ? 4 : 2, wide = WIDE(dtype), step = 2 * LANES;
    floats total[4][COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) total[r][c] = I(setzero_ps)();
    for (int64_t k = 0; k + step <= K; k += step, x += rows * step * wide) {
        for (int i = 0; i < ahead; i++)
            for (int64_t j = 0; j < step * size; j += 64)
                if (near)
                    __builtin_prefetch(next + (i * K + k) * size + j);
                else
                    FETCH(next + (i * K + k) * size + j);
#if PRODUCTS_OF_BFLOAT16
        if (dtype == BFLOAT16) {
            integers pairs[COLUMNS];
            for (int c = 0; c < columns; c++) pairs[c] = LOAD(w + (c * K + k) * size);
            for (int r = 0; r < rows; r++) {
                const integers values = LOAD(x + r * step * wide);
                for (int c = 0; c < columns; c++)
                    total[r][c] = _mm512_dpbf16_ps(total[r][c], (__m512bh)pairs[c], (__m512bh)values);
            }
            continue;
        }
#endif
        for (int half = 0; half < 2; half++) {
            floats v[COLUMNS];
            for (int c = 0; c < columns; c++) {
                const char *from = w + (c * K + k) * size;
                if (dtype == BFLOAT16)
                    v[c] = FLOATS(half ? AND(LOAD(from), HIGH_HALVES) : I(slli_epi32)(LOAD(from), 16));
                else if (dtype == FLOAT16)
                    v[c] = LOAD_FLOAT16((const uint16_t *)from + half * LANES);
                else
                    v[c] = I(loadu_ps)((const float *)from + half * LANES);
            }
            for (int r = 0; r < rows; r++) {
                const floats values = I(loadu_ps)((const float *)x + r * step + half * LANES);
                for (int c = 0; c < columns; c++) total[r][c] = I(fmadd_ps)(v[c], values, total[r][c]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#if BLOCK == 64
        if (columns == 4) {
            sum_four(total[r], out[r]);
            continue;
        }
#endif
        for (int c = 0; c < columns; c++) out[r][c] = sum_lanes(total[r][c]);
    }
}

typedef void (*block_function)(const char *, int64_t, const char *, const char *, int, float (*)[TILE]);

/* A function for each case: inlined they would leave one another no registers. By the rows of weights that are
 * prefetched (0, 1, 2, COLUMNS; the last: nothing for a single row of weights), and by the rows of activations. */
#define BLOCK_FUNCTION(name, dtype, rows, columns, ahead)                                                         \
    static __attribute__((noinline)) void name(const char *w, int64_t K, const char *x, const char *next,          \
                                               int near, float (*out)[TILE]) {                                     \
        block_float(w, dtype, K, x, rows, columns, next, ahead, near, out);                                        \
    }
#define BLOCK_FUNCTIONS(name, dtype, columns, ahead)                                                              \
    BLOCK_FUNCTION(name##_1, dtype, 1, columns, ahead)                                                             \
    BLOCK_FUNCTION(name##_2, dtype, 2, columns, ahead)                                                             \
    BLOCK_FUNCTION(name##_3, dtype, 3, columns, ahead)                                                             \
    BLOCK_FUNCTION(name##_4, dtype, 4, columns, ahead)
#define BLOCKS(name, dtype)                                                                                       \
    BLOCK_FUNCTIONS(name##_0, dtype, COLUMNS, 0)                                                                   \
    BLOCK_FUNCTIONS(name##_1, dtype, COLUMNS, 1)                                                                   \
    BLOCK_FUNCTIONS(name##_2, dtype, COLUMNS, 2)                                                                   \
    BLOCK_FUNCTIONS(name##_3, dtype, COLUMNS, COLUMNS)                                                             \
    BLOCK_FUNCTIONS(name##_4, dtype, 1, 0)                                                                         \
    static const block_function name[5][4] = {                                                                     \
        {name##_0_1, name##_0_2, name##_0_3, name##_0_4}, {name##_1_1, name##_1_2, name##_1_3, name##_1_4},        \
        {name##_2_1, name##_2_2, name##_2_3, name##_2_4}, {name##_3_1, name##_3_2, name##_3_3, name##_3_4},        \
        {name##_4_1, name##_4_2, name##_4_3, name##_4_4},                                                          \
    };
BLOCKS(blocks_float32, FLOAT32)
BLOCKS(blocks_bfloat16, BFLOAT16)
BLOCKS(blocks_float16, FLOAT16)

/* All rows of activations with `columns` rows of weights from the n-th on. */
INLINE void columns_float(const char *x, const void *plain, enum dtype dtype, int64_t M, int64_t K, const char *weights,
                          int64_t N, int64_t n, int columns, float (*out)[TILE]) {
    const block_function(*blocks)[4] = dtype == BFLOAT16 ? blocks_bfloat16
                                       : dtype == FLOAT16 ? blocks_float16
                                                          : blocks_float32;
    const int64_t size = dtype == FLOAT32 ? 4 : 2, whole = K / (2 * LANES) * (2 * LANES);
    const char *w = weights + n * K * size;
    const int fetches = columns == COLUMNS && N - n >= 2 * columns && (PREFETCHES || M > 4);
    const int near = M > 4 && columns * K * size <= NEAR;
    const int share = !fetches ? 0 : M > 12 ? 1 : M > 4 ? 2 : columns; /* rows of weights, at each pass over these */
    int64_t fetched = 0;
    for (int64_t m = 0, rows; m < M; m += rows) {
        const char *xm = x + m * whole * WIDE(dtype), *next = w + (columns + fetched) * K * size;
        rows = together(M - m);
        const int ahead = fetched >= columns ? 0 : share;
        fetched += ahead;
        blocks[columns != COLUMNS ? 4 : ahead == COLUMNS ? 3 : ahead][rows - 1](w, K, xm, next, near, out + m);
    }
    for (int64_t m = 0; m < M && whole < K; m++)
        for (int c = 0; c < columns; c++)
            for (int64_t k = whole; k < K; k++)
                out[m][c] = fmaf(get(w, dtype, c * K + k), get(plain, dtype, m * K + k), out[m][c]);
}

/* `count` rows of weights from the n-th on, with up to MOST_ROWS rows of activations. */
INLINE void tile_float(const char *x, const void *plain, enum dtype dtype, int64_t M, int64_t K, const char *weights,
                       const void *bias, int64_t N, int64_t n, int64_t count, void *out) {
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
    float total[MOST_ROWS][TILE], added[TILE] = {0};
    int64_t c = 0;
    for (; c + COLUMNS <= count; c += COLUMNS)
        columns_float(x, plain, dtype, M, K, weights, N, n + c, COLUMNS, (float(*)[TILE])&total[0][c]);
    for (; c < count; c++) columns_float(x, plain, dtype, M, K, weights, N, n + c, 1, (float(*)[TILE])&total[0][c]);
    if (bias) widen((const char *)bias + n * size, dtype, count, added);
    for (int64_t m = 0; m < M; m++)
        for (int64_t i = 0; i < count; i++) put(out, dtype, m * N + n + i, total[m][i] + added[i]);
}

typedef struct {
    const char *laid, *x;
    enum dtype dtype;
    int64_t M, K, N;
    const void *weights, *bias;
    char *out;
} float_product;

static void float_piece(void *argument, int64_t start, int64_t stop) {
    const float_product *p = argument;
    const enum dtype dtype = p->dtype;
    const int64_t M = p->M, K = p->K, N = p->N, size = dtype == FLOAT32 ? 4 : 2;
    const int64_t row = K / (2 * LANES) * (2 * LANES) * WIDE(dtype);
    for (int64_t n = start * TILE; n < stop * TILE && n < N; n += TILE)
        for (int64_t m = 0; m < M; m += MOST_ROWS) {
            const int64_t count = N - n < TILE ? N - n : TILE, rows = M - m < MOST_ROWS ? M - m : MOST_ROWS;
            const char *laid = p->laid + m * row, *x = p->x + m * K * size;
            char *to = p->out + m * N * size;
            if (dtype == BFLOAT16)
                tile_float(laid, x, BFLOAT16, rows, K, p->weights, p->bias, N, n, count, to);
            else if (dtype == FLOAT16)
                tile_float(laid, x, FLOAT16, rows, K, p->weights, p->bias, N, n, count, to);
            else
                tile_float(laid, x, FLOAT32, rows, K, p->weights, p->bias, N, n, count, to);
        }
}

/* x [M, K] times the transpose of weights [N, K], plus bias [N] or NULL, all of one dtype: out [M, N]. */
int linear_float(const void *x, int dtype, int64_t M, int64_t K, const void *weights, const void *bias, int64_t N,
                 void *out, crew who) {
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
    char *memory = NULL;
    if (M > 1 || WIDE(dtype) != size) {
        memory = laid_out(x, dtype, M, K, who);
        if (!memory) return -1;
    }
    float_product p = {memory ? memory : x, x, dtype, M, K, N, weights, bias, out};
    each(who, (N + TILE - 1) / TILE, TILE * K * size, float_piece, &p);
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

/* 2 LANES int8 codes as bfloat16, which holds them exactly. */
static inline integers as_bfloat16(const int8_t *codes) {
    return narrow(I(cvtepi32_ps)(LOAD_INT8(codes)), I(cvtepi32_ps)(LOAD_INT8(codes + LANES)));
}

#if PRODUCTS_OF_BFLOAT16
/* COLUMNS rows of int8 codes from the n-th on as bfloat16, times all rows of activations, which are bfloat16, as they
 * came in `plain` and laid out in `x`. */
static void columns_int8(const char *x, const uint16_t *plain, int64_t M, int64_t K, const int8_t *codes, int64_t N,
                         int64_t n, uint16_t *expanded, float (*out)[TILE]) {
    const int64_t whole = K / (2 * LANES) * (2 * LANES), columns = N - n < COLUMNS ? N - n : COLUMNS;
    const int8_t *w = codes + n * K;
    for (int64_t c = 0; c < columns; c++)
        for (int64_t k = 0; k < whole; k += 2 * LANES) STORE(expanded + c * whole + k, as_bfloat16(w + c * K + k));
    for (int64_t m = 0, rows; m < M; m += rows) {
        const int ahead = m == 0 && N - n >= 2 * COLUMNS ? 2 : 0; /* as many bytes as COLUMNS rows of codes */
        rows = together(M - m);
        blocks_bfloat16[ahead][rows - 1]((const char *)expanded, whole, x + m * whole * 2,
                                         (const char *)(w + COLUMNS * K), 0, out + m);
    }
    for (int64_t m = 0; m < M && whole < K; m++)
        for (int c = 0; c < columns; c++)
            for (int64_t k = whole; k < K; k++)
                out[m][c] = fmaf((float)w[c * K + k], from_bfloat16(plain[m * K + k]), out[m][c]);
}

typedef struct {
    const char *laid;
    const uint16_t *x, *scales;
    int64_t M, K, N;
    const int8_t *codes;
    uint16_t *out;
    int failed;
} many_int8_product;

static void many_int8_piece(void *argument, int64_t start, int64_t stop) {
    many_int8_product *p = argument;
    const int64_t M = p->M, K = p->K, N = p->N, whole = K / (2 * LANES) * (2 * LANES);
    uint16_t *expanded = aligned_alloc(64, (COLUMNS * whole * 2 + 64) / 64 * 64);
    float total[MOST_ROWS][TILE];
    if (!expanded) {
        __atomic_store_n(&p->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t n = start * TILE; n < stop * TILE && n < N; n += TILE)
        for (int64_t m = 0; m < M; m += MOST_ROWS) {
            const int64_t count = N - n < TILE ? N - n : TILE, rows = M - m < MOST_ROWS ? M - m : MOST_ROWS;
            for (int64_t c = 0; c < count; c += COLUMNS)
                columns_int8(p->laid + m * whole * 2, p->x + m * K, rows, K, p->codes, N, n + c, expanded,
                             (float(*)[TILE])&total[0][c]);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < count; i++)
                    put(p->out, BFLOAT16, (m + r) * N + n + i, total[r][i] * from_bfloat16(p->scales[n + i]));
        }
    free(expanded);
}

/* The same as below, for more rows of bfloat16: sums of products in float32, as for float weights. */
static int many_int8(const uint16_t *x, int64_t M, int64_t K, const int8_t *codes, const uint16_t *scales, int64_t N,
                     uint16_t *out, crew who) {
    char *laid = laid_out(x, BFLOAT16, M, K, who);
    if (!laid) return -1;
    many_int8_product p = {laid, x, scales, M, K, N, codes, out, 0};
    each(who, (N + TILE - 1) / TILE, TILE * K, many_int8_piece, &p);
    free(laid);
    return p.failed ? -1 : 0;
}
#endif

typedef struct {
    const activations *a;
    enum dtype dtype;
    int64_t M, K, N;
    const int8_t *codes;
    const uint16_t *scales;
    void *out;
} int8_product;

static void int8_piece(void *argument, int64_t first, int64_t last) {
    const int8_product *p = argument;
    const int64_t M = p->M, K = p->K, N = p->N;
    for (int64_t start = first * TILE; start < last * TILE && start < N; start += TILE)
        for (int64_t m = 0, rows; m < M; m += rows) {
            const int64_t stop = start + TILE < N ? start + TILE : N;
            rows = M - m >= 4 ? 4 : M - m >= 2 ? 2 : 1;
            for (int64_t n = start, count; n < stop; n += count) {
                float total[4][2];
                count = rows == 4 && stop - n >= 2 ? 2 : 1;
                if (count == 2)
                    rows_int8(p->codes + n * K, 2, K, p->a, m, 4, total);
                else if (rows == 4)
                    rows_int8(p->codes + n * K, 1, K, p->a, m, 4, total);
                else if (rows == 2)
                    rows_int8(p->codes + n * K, 1, K, p->a, m, 2, total);
                else
                    rows_int8(p->codes + n * K, 1, K, p->a, m, 1, total);
                for (int r = 0; r < rows; r++)
                    for (int i = 0; i < count; i++)
                        put(p->out, p->dtype, (m + r) * N + n + i, total[r][i] * from_bfloat16(p->scales[n + i]));
            }
        }
}

/* x [M, K] times the transpose of int8 codes [N, K] with bfloat16 scales [N]: out [M, N]. One or two rows of
 * activations read one row of codes after the other; more share what they load. */
int linear_int8(const void *x, int dtype, int64_t M, int64_t K, const int8_t *codes, const uint16_t *scales,
                int64_t N, void *out, crew who) {
#if PRODUCTS_OF_BFLOAT16
    if (dtype == BFLOAT16 && M > FEW_ROWS) return many_int8(x, M, K, codes, scales, N, out, who);
#endif
    activations a;
    void *memory = quantize(x, dtype, M, K, GROUP, 0, &a, who);
    if (!memory) return -1;
    int8_product p = {&a, dtype, M, K, N, codes, scales, out};
    each(who, (N + TILE - 1) / TILE, TILE * K, int8_piece, &p);
    free(memory);
    return 0;
}

/* Whether so many bytes from `out` on, in lines `stride` bytes apart, are written past the caches. To write a line into
 * a cache reads it from memory first, and much of what is unpacked is out of the caches again before it is read. */
static inline int streams(const void *out, int64_t bytes, int64_t stride) {
    return bytes > STREAMED_BYTES && (uintptr_t)out % 64 == 0 && stride % 64 == 0;
}

INLINE void keep(uint16_t *to, integers a, const int streamed) {
    if (streamed)
        STREAM(to, a);
    else
        STORE(to, a);
}

/* 4-bit weights of `rows` rows, whole blocks, as bfloat16 [K, rows], `stride` apart. `codes` and `scales`, as above,
 * begin at these rows. */
INLINE void unpack(const uint8_t *codes, const uint16_t *scales, const float *table, int64_t N, int64_t K,
                   int64_t group, int64_t n, int64_t k0, uint16_t *out, int64_t stride, const int streamed) {
    floats scale[4], zero[4], low = I(setzero_ps)(), high = low; /* zero is that of code 0 */
    if (table) low = I(loadu_ps)(table), high = I(loadu_ps)(table + 16 - LANES);
    for (int j = 0; j < 4; j++) {
        const integers pair = LOAD(scales + 2 * (k0 / group * N + n + j * LANES));
        scale[j] = FLOATS(table ? pair : I(slli_epi32)(pair, 16));
        zero[j] = I(fmadd_ps)(scale[j], I(set1_ps)(-8), FLOATS(AND(pair, HIGH_HALVES)));
    }
    for (int64_t k = k0; k < k0 + group; k++) {
        const uint8_t *in = codes + n * K / 2 + k * HALF;
        uint16_t *to = out + k * stride + n;
        for (int j = 0; j < 4; j += 2) {
            floats w[2];
            for (int i = 0; i < 2; i++) {
                integers q = LOAD_CODES(in + i * LANES);
                q = j ? I(srli_epi32)(q, 4) : AND(q, I(set1_epi32)(15));
                w[i] = table ? I(mul_ps)(LOOK_UP_FLOATS(low, high, q), scale[j + i])
                             : I(fmadd_ps)(I(cvtepi32_ps)(q), scale[j + i], zero[j + i]);
            }
            keep(to + j * LANES, narrow(w[0], w[1]), streamed);
        }
    }
}

void unpack_int4(const uint8_t *codes, const uint16_t *scales, const float *table, int64_t N, int64_t K, int64_t group,
                 int64_t rows, uint16_t *out, int64_t stride, int threads) {
    const int streamed = streams(out, 2 * rows * K, 2 * stride);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2) nowait
        for (int64_t n = 0; n < rows; n += BLOCK)
            for (int64_t k0 = 0; k0 < K; k0 += group)
                if (table)
                    streamed ? unpack(codes, scales, table, N, K, group, n, k0, out, stride, 1)
                             : unpack(codes, scales, table, N, K, group, n, k0, out, stride, 0);
                else
                    streamed ? unpack(codes, scales, NULL, N, K, group, n, k0, out, stride, 1)
                             : unpack(codes, scales, NULL, N, K, group, n, k0, out, stride, 0);
        _mm_sfence();
    }
}

/* int8 codes as bfloat16. */
void unpack_int8(const int8_t *codes, int64_t size, uint16_t *out, int threads) {
    const int streamed = streams(out, 2 * size, 64);
    const int64_t whole = size / (2 * LANES) * (2 * LANES);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for nowait
        for (int64_t i = 0; i < whole; i += 2 * LANES) keep(out + i, as_bfloat16(codes + i), streamed);
        _mm_sfence();
    }
    for (int64_t i = whole; i < size; i++) {
        float f = codes[i];
        uint32_t bits;
        memcpy(&bits, &f, 4);
        out[i] = (uint16_t)(bits >> 16);
    }
}

/* Activations [M, K] as int8 with one scale per row, for products of integers; features of `skip` count as zero. */
void narrow_rows(const void *x, int dtype, int64_t M, int64_t K, const uint8_t *skip, int8_t *out, float *scales,
                 int threads) {
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < M; m++) {
        float largest = 0, values[256];
        for (int64_t k = 0; k < K; k += 256) {
            const int64_t count = K - k < 256 ? K - k : 256;
            widen((const char *)x + (m * K + k) * size, dtype, count, values);
            for (int64_t i = 0; i < count; i++) {
                const float a = skip[k + i] ? 0 : fabsf(values[i]);
                largest = a > largest || a != a ? a : largest;
            }
        }
        scales[m] = largest / 127;
        const float inverse = largest > 0 ? 127 / largest : 0;
        for (int64_t k = 0; k < K; k += 256) {
            const int64_t count = K - k < 256 ? K - k : 256;
            widen((const char *)x + (m * K + k) * size, dtype, count, values);
            for (int64_t i = 0; i < count; i++)
                out[m * K + k + i] = skip[k + i] || inverse == 0 ? 0 : (int8_t)rintf(values[i] * inverse);
        }
    }
}

/* out [M, n], `stride` apart, = acc [M, n] * rows [M] * columns [n]. */
void scale_products(const int32_t *acc, int64_t M, int64_t n, const float *rows, const uint16_t *columns, int dtype,
                    void *out, int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < M; m++)
        for (int64_t i = 0; i < n; i++)
            put(out, dtype, m * stride + i, (float)acc[m * n + i] * rows[m] * from_bfloat16(columns[i]));
}
