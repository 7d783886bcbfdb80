/* Products of many rows of activations with float and quantized weights, by AVX2, for processors on which PyTorch has
 * none that are fast: with 16-bit weights it multiplies at a fifth of the speed of FMA, or at a hundredth.
 *
 * A panel has the weights of COLUMNS outputs and some input features as a tile takes them: the weights of one feature
 * beside one another, of quantized ones those of two features. It is made once for many rows of activations, which lie
 * in panels of ROWS rows. A tile, the sums of ROWS x COLUMNS products, stays in registers for all features of a panel.
 * Panels of weights are made to stay in the first-level cache meanwhile, those of activations in the second.
 *
 * Float weights are multiplied as float32. For quantized ones activations are integers, as in cpu.c: exact sums within a
 * group of input features, times the scales, in float32. A row's result does not depend on other rows or on threads.
 *
 * Functions return 0, or -1 where there is no memory.
 */
#include <stdlib.h>

#include "products.h"
#include "team.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    ROWS = 6,      /* of activations in a tile: with COLUMNS outputs, 12 of 16 registers */
    COLUMNS = 16,  /* outputs in a tile */
    DEPTH = 256,   /* input features in a panel, at most */
    HEIGHT = 192,  /* rows of activations whose panels of DEPTH features stay in the second-level cache */
    WIDTH = 128,   /* outputs that a thread computes at a time, at most */
    MOST = 768,    /* rows of activations that are laid out at a time */
    GROUP = 128,   /* input features per scale of the activations for int8 codes */
    LINE = 64,     /* bytes */
};

enum kind { FLOATS, INT8, INT4 };

/* Weights [N, K]. */
typedef struct {
    enum kind kind;
    enum dtype dtype;         /* of FLOATS and their bias */
    const char *data;         /* FLOATS: element (n, k) at n * row + k * column, one of which is 1. INT8: row = K. INT4:
                                 codes [N / 32, K, 16], of a block's rows i and 16 + i in the half-bytes of one byte */
    int64_t N, K, row, column;
    const uint16_t *scales;   /* INT8: bfloat16 [N]. INT4: with a table float32 [K / group, N], else bfloat16 scales and
                                 zeros [K / group, N, 2] */
    const int16_t *table;     /* INT4: what 16 codes stand for, or NULL */
    float unit;               /* of the entries of the table */
    const void *bias;         /* FLOATS: [N], or NULL */
    int64_t group;            /* input features per scale; 0 of FLOATS */
} weights;

/* Activations [M, K], in panels of ROWS rows, those of `depth` features after one another: floats [feature][ROWS], or
 * pairs of 16-bit integers [two features][ROWS]. */
typedef struct {
    int64_t M, panels, depth;
    void *data;
    float *scale, *sum; /* of integers: [group][panels][ROWS]; the sum is that of the values they stand for */
} activations;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t size_of(enum dtype dtype) { return dtype == FLOAT32 ? 4 : 2; }

static inline __m256 eight(const char *x, enum dtype dtype) {
    if (dtype == FLOAT32) return _mm256_loadu_ps((const float *)x);
    const __m128i half = _mm_loadu_si128((const __m128i *)x);
    if (dtype == FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

static inline void transpose_floats(__m256 a[8]) {
    __m256 b[8], c[8];
    for (int i = 0; i < 8; i += 2) b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            c[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0x44);
            c[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0xEE);
        }
    for (int i = 0; i < 4; i++) {
        a[i] = _mm256_permute2f128_ps(c[i], c[i + 4], 0x20);
        a[i + 4] = _mm256_permute2f128_ps(c[i], c[i + 4], 0x31);
    }
}

/* out [depth][COLUMNS] from the n-th output and the k-th feature on. */
INLINE void pack_floats(const weights *w, enum dtype dtype, int64_t n, int64_t k, int64_t depth, float *out) {
    const int64_t size = size_of(dtype), count = least(w->N - n, COLUMNS), whole = w->column == 1 ? depth / 8 * 8 : depth;
    const char *from = w->data + (n * w->row + k * w->column) * size;
    if (count < COLUMNS) memset(out, 0, depth * COLUMNS * sizeof(float));
    if (w->column == 1)
        for (int64_t c = 0; c < COLUMNS; c += 8)
            for (int64_t i = 0; i < whole; i += 8) {
                __m256 a[8];
                for (int j = 0; j < 8; j++)
                    a[j] = c + j < count ? eight(from + ((c + j) * w->row + i) * size, dtype) : _mm256_setzero_ps();
                transpose_floats(a);
                for (int j = 0; j < 8; j++) _mm256_storeu_ps(out + (i + j) * COLUMNS + c, a[j]);
            }
    else if (count == COLUMNS)
        for (int64_t i = 0; i < depth; i++, from += w->column * size) {
            _mm256_storeu_ps(out + i * COLUMNS, eight(from, dtype));
            _mm256_storeu_ps(out + i * COLUMNS + 8, eight(from + 8 * size, dtype));
        }
    else
        for (int64_t i = 0; i < depth; i++) widen(from + i * w->column * size, dtype, count, out + i * COLUMNS);
    for (int64_t i = whole; i < depth; i++)
        for (int64_t c = 0; c < count; c++) widen(from + (c * w->row + i) * size, dtype, 1, out + i * COLUMNS + c);
}

/* Eight vectors of eight 16-bit values. */
static inline void transpose_pairs(__m128i a[8]) {
    __m128i b[8], c[8];
    for (int i = 0; i < 8; i += 2) b[i] = _mm_unpacklo_epi16(a[i], a[i + 1]), b[i + 1] = _mm_unpackhi_epi16(a[i], a[i + 1]);
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            c[i + 2 * j] = _mm_unpacklo_epi32(b[i + j], b[i + 2 + j]);
            c[i + 2 * j + 1] = _mm_unpackhi_epi32(b[i + j], b[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm_unpacklo_epi64(c[i], c[i + 4]);
        a[2 * i + 1] = _mm_unpackhi_epi64(c[i], c[i + 4]);
    }
}

/* out [depth / 2, rounded up][COLUMNS][2]. */
static void pack_int8(const weights *w, int64_t n, int64_t k, int64_t depth, int16_t *out) {
    const int64_t count = least(w->N - n, COLUMNS), whole = depth / 16 * 16;
    const int8_t *from = (const int8_t *)w->data + n * w->K + k;
    for (int64_t c = 0; c < COLUMNS; c += 8)
        for (int64_t i = 0; i < whole; i += 16) {
            __m128i a[8];
            for (int j = 0; j < 8; j++)
                a[j] = c + j < count ? _mm_loadu_si128((const __m128i *)(from + (c + j) * w->K + i)) : _mm_setzero_si128();
            transpose_pairs(a);
            for (int j = 0; j < 8; j++)
                _mm256_storeu_si256((__m256i *)(out + (i / 2 + j) * 2 * COLUMNS + 2 * c), _mm256_cvtepi8_epi16(a[j]));
        }
    for (int64_t i = whole; i < depth; i += 2)
        for (int64_t c = 0; c < COLUMNS; c++)
            for (int64_t j = 0; j < 2; j++)
                out[i * COLUMNS + 2 * c + j] = c < count && i + j < depth ? from[c * w->K + i + j] : 0;
}

/* The same. */
INLINE void pack_int4(const weights *w, const int16_t *table, int64_t n, int64_t k, int64_t depth, int16_t *out) {
    const uint8_t *from = (const uint8_t *)w->data + n / 32 * 16 * w->K + k * 16;
    const __m128i mask = _mm_set1_epi8(15);
    const int upper = n % 32 != 0;
    __m128i low = mask, high = mask;
    if (table) {
        uint8_t bytes[2][16];
        for (int i = 0; i < 16; i++) bytes[0][i] = (uint8_t)table[i], bytes[1][i] = (uint8_t)((uint16_t)table[i] >> 8);
        low = _mm_loadu_si128((const __m128i *)bytes[0]), high = _mm_loadu_si128((const __m128i *)bytes[1]);
    }
    for (int64_t i = 0; i < depth; i += 2, out += 2 * COLUMNS) {
        __m128i a = _mm_loadu_si128((const __m128i *)(from + 16 * i));
        __m128i b = _mm_loadu_si128((const __m128i *)(from + 16 * i + 16));
        if (upper) a = _mm_srli_epi16(a, 4), b = _mm_srli_epi16(b, 4);
        a = _mm_and_si128(a, mask), b = _mm_and_si128(b, mask);
        const __m128i pairs[2] = {_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)};
        for (int j = 0; j < 2; j++) {
            __m256i wide;
            if (table) {
                const __m128i l = _mm_shuffle_epi8(low, pairs[j]), h = _mm_shuffle_epi8(high, pairs[j]);
                wide = _mm256_set_m128i(_mm_unpackhi_epi8(l, h), _mm_unpacklo_epi8(l, h));
            } else {
                wide = _mm256_cvtepu8_epi16(pairs[j]);
            }
            _mm256_storeu_si256((__m256i *)(out + COLUMNS * j), wide);
        }
    }
}

/* Sums in variables of their own, for a compiler would write an array of them to memory at every step. */
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)

/* total[r][c] += the sums over `depth` features of x [feature][ROWS] times w [feature][COLUMNS]. */
INLINE void floats_tile(const float *x, const float *w, int64_t depth, const int rows, float (*total)[COLUMNS]) {
#define START(r) __m256 a##r = _mm256_setzero_ps(), b##r = a##r;
#define ADD(r)                                             \
    if (r < rows) {                                        \
        const __m256 value = _mm256_broadcast_ss(x + r);   \
        a##r = _mm256_fmadd_ps(w0, value, a##r);           \
        b##r = _mm256_fmadd_ps(w1, value, b##r);           \
    }
#define FINISH(r)                                                                                  \
    if (r < rows) {                                                                                \
        _mm256_storeu_ps(total[r], _mm256_add_ps(_mm256_loadu_ps(total[r]), a##r));                \
        _mm256_storeu_ps(total[r] + 8, _mm256_add_ps(_mm256_loadu_ps(total[r] + 8), b##r));        \
    }
    EACH_ROW(START)
    for (int64_t k = 0; k < depth; k++, x += ROWS, w += COLUMNS) {
        const __m256 w0 = _mm256_loadu_ps(w), w1 = _mm256_loadu_ps(w + 8);
        EACH_ROW(ADD)
    }
    EACH_ROW(FINISH)
#undef START
#undef ADD
#undef FINISH
}

static inline __m256i dot(__m256i acc, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(acc, a, b);
#elif defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(acc, a, b);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
#endif
}

/* Sums of integers for outputs c..c + 7. */
INLINE void fold(__m256i sum, int c, const float *scale, const float *start, float x_scale, float x_sum, float *total) {
    __m256 product = _mm256_cvtepi32_ps(sum), before = _mm256_loadu_ps(total + c);
    if (scale) product = _mm256_mul_ps(product, _mm256_loadu_ps(scale + c));
    if (start) before = _mm256_fmadd_ps(_mm256_loadu_ps(start + c), _mm256_set1_ps(x_sum), before);
    _mm256_storeu_ps(total + c, _mm256_fmadd_ps(product, _mm256_set1_ps(x_scale), before));
}

/* The same of `pairs` pairs of integers, one group, whose weights are code * scale + start, or code where there are
 * none. */
INLINE void integers_tile(const int32_t *x, const int16_t *w, int64_t pairs, const int rows, const float *scale,
                          const float *start, const float *x_scale, const float *x_sum, float (*total)[COLUMNS]) {
#define START(r) __m256i a##r = _mm256_setzero_si256(), b##r = a##r;
#define ADD(r)                                             \
    if (r < rows) {                                        \
        const __m256i value = _mm256_set1_epi32(x[r]);     \
        a##r = dot(a##r, w0, value);                       \
        b##r = dot(b##r, w1, value);                       \
        __asm__ volatile("" : "+x"(a##r), "+x"(b##r)); /* one row after the other: 16 registers are needed */ \
    }
#define FINISH(r)                                                                        \
    if (r < rows) {                                                                      \
        fold(a##r, 0, scale, start, x_scale[r], x_sum[r], total[r]);                     \
        fold(b##r, 8, scale, start, x_scale[r], x_sum[r], total[r]);                     \
    }
    EACH_ROW(START)
    for (int64_t k = 0; k < pairs; k++, x += ROWS, w += 2 * COLUMNS) {
        const __m256i w0 = _mm256_loadu_si256((const __m256i *)w), w1 = _mm256_loadu_si256((const __m256i *)(w + COLUMNS));
        EACH_ROW(ADD)
    }
    EACH_ROW(FINISH)
#undef START
#undef ADD
#undef FINISH
}

/* A function for each number of rows, so that sums stay in registers. */
#define TILES(rows)                                                                                                  \
    static __attribute__((noinline)) void floats_##rows(const float *x, const float *w, int64_t depth,               \
                                                        float (*total)[COLUMNS]) {                                   \
        floats_tile(x, w, depth, rows, total);                                                                       \
    }                                                                                                                \
    static __attribute__((noinline)) void codes_##rows(const int32_t *x, const int16_t *w, int64_t pairs,            \
                                                       const float *scale, const float *start, const float *x_scale, \
                                                       const float *x_sum, float (*total)[COLUMNS]) {                \
        if (start)                                                                                                   \
            integers_tile(x, w, pairs, rows, scale, start, x_scale, x_sum, total);                                   \
        else if (scale)                                                                                              \
            integers_tile(x, w, pairs, rows, scale, NULL, x_scale, x_sum, total);                                    \
        else                                                                                                         \
            integers_tile(x, w, pairs, rows, NULL, NULL, x_scale, x_sum, total);                                     \
    }
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)
typedef void (*floats_function)(const float *, const float *, int64_t, float (*)[COLUMNS]);
typedef void (*codes_function)(const int32_t *, const int16_t *, int64_t, const float *, const float *, const float *,
                               const float *, float (*)[COLUMNS]);
static const floats_function floats_tiles[ROWS] = {floats_1, floats_2, floats_3, floats_4, floats_5, floats_6};
static const codes_function codes_tiles[ROWS] = {codes_1, codes_2, codes_3, codes_4, codes_5, codes_6};

/* Of the panel of weights at (n, k), the share from `part` of `parts` on. */
INLINE void prefetch(const weights *w, int64_t n, int64_t k, int64_t depth, int64_t part, int64_t parts) {
    int64_t lines = COLUMNS, bytes = depth * (w->kind == FLOATS ? size_of(w->dtype) : 1), stride = w->row;
    const char *from = w->data + (n * w->row + k * w->column) * (w->kind == FLOATS ? size_of(w->dtype) : 1);
    if (w->kind == INT4)
        lines = 1, bytes = depth * 16, from = w->data + n / 32 * 16 * w->K + k * 16;
    else if (w->kind == FLOATS && w->column != 1)
        lines = depth, bytes = COLUMNS * size_of(w->dtype), stride = w->column;
    if (w->kind == FLOATS) stride *= size_of(w->dtype);
    const int64_t each = (bytes + LINE - 1) / LINE, all = lines * each;
    for (int64_t i = part * all / parts; i < (part + 1) * all / parts; i++)
        __builtin_prefetch(from + i / each * stride + i % each * LINE);
}

static void pack(const weights *w, int64_t n, int64_t k, int64_t depth, void *out) {
    if (w->kind == INT8)
        pack_int8(w, n, k, depth, out);
    else if (w->kind == INT4 && w->table)
        pack_int4(w, w->table, n, k, depth, out);
    else if (w->kind == INT4)
        pack_int4(w, NULL, n, k, depth, out);
    else if (w->dtype == BFLOAT16)
        pack_floats(w, BFLOAT16, n, k, depth, out);
    else if (w->dtype == FLOAT16)
        pack_floats(w, FLOAT16, n, k, depth, out);
    else
        pack_floats(w, FLOAT32, n, k, depth, out);
}

/* Scales of a group of int4 codes, and the weights of code 0, for COLUMNS outputs. */
static void load_scales(const weights *w, int64_t n, int64_t g, float *scale, float *start) {
    const char *from = (const char *)w->scales + (g * w->N + n) * 4;
    if (w->table) {
        memcpy(scale, from, COLUMNS * sizeof(float));
        return;
    }
    for (int i = 0; i < COLUMNS; i += 8) {
        const __m256i pair = _mm256_loadu_si256((const __m256i *)(from + 4 * i));
        const __m256 step = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
        const __m256 zero = _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32((int32_t)0xFFFF0000)));
        _mm256_storeu_ps(scale + i, step);
        _mm256_storeu_ps(start + i, _mm256_fmadd_ps(step, _mm256_set1_ps(-8), zero));
    }
}

/* One panel of weights with the activations' panels first..last. */
static void multiply(const weights *w, const activations *a, int64_t n, int64_t k, int64_t depth, int64_t first,
                     int64_t last, const void *panel, int64_t next_n, int64_t next_k, float (*total)[COLUMNS]) {
    float scale[DEPTH / 2][COLUMNS], start[DEPTH / 2][COLUMNS];
    const int64_t group = w->kind == FLOATS ? DEPTH : w->group, g = k / group, groups = (depth + group - 1) / group;
    for (int64_t i = 0; w->kind == INT4 && i < groups; i++) load_scales(w, n, g + i, scale[i], start[i]);
    for (int64_t p = first; p < last; p++, total += ROWS) {
        const int rows = (int)least(a->M - p * ROWS, ROWS);
        const int64_t before = (k / a->depth * a->panels + p) * a->depth * ROWS;
        const char *x = (const char *)a->data + before * (w->kind == FLOATS ? 4 : 2);
        if (next_n < w->N && next_k < w->K)
            prefetch(w, next_n, next_k, least(w->K - next_k, a->depth), p - first, last - first);
        if (w->kind == FLOATS) {
            floats_tiles[rows - 1]((const float *)x, panel, depth, total);
            continue;
        }
        for (int64_t i = 0; i < groups; i++) {
            const int64_t done = i * group, pairs = (least(depth - done, group) + 1) / 2;
            const int64_t at = ((g + i) * a->panels + p) * ROWS;
            codes_tiles[rows - 1]((const int32_t *)x + done / 2 * ROWS, (const int16_t *)panel + done * COLUMNS, pairs,
                                  w->kind == INT4 ? scale[i] : NULL, w->kind == INT4 && !w->table ? start[i] : NULL,
                                  a->scale + at, a->sum + at, total);
        }
    }
}

static inline void put_eight(char *to, enum dtype dtype, __m256 a) {
    if (dtype == FLOAT32) {
        _mm256_storeu_ps((float *)to, a);
    } else if (dtype == FLOAT16) {
        _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(a, 0));
    } else { /* to nearest, ties to even */
        const __m256i bits = _mm256_castps_si256(a);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i half = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
        half = _mm256_blendv_epi8(_mm256_srli_epi32(half, 16), _mm256_set1_epi32(0x7FC0),
                                  _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
        _mm_storeu_si128((__m128i *)to, _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
    }
}

/* Sums of the panels first..last of activations with COLUMNS outputs, scaled, into out [M, N]. */
static void finish(const weights *w, const activations *a, enum dtype dtype, int64_t n, int64_t first, int64_t last,
                   float (*total)[COLUMNS], char *out) {
    const int64_t count = least(w->N - n, COLUMNS), size = size_of(dtype);
    float factor[COLUMNS], added[COLUMNS] = {0};
    for (int c = 0; c < COLUMNS; c++)
        factor[c] = w->kind == INT4 ? w->unit : w->kind == INT8 && c < count ? from_bfloat16(w->scales[n + c]) : 1;
    if (w->bias) widen((const char *)w->bias + n * size, dtype, count, added);
    for (int64_t m = first * ROWS; m < least(last * ROWS, a->M); m++, total++) {
        char kept[COLUMNS * 4], *to = out + (m * w->N + n) * size;
        for (int i = 0; i < COLUMNS; i += 8)
            put_eight((count == COLUMNS ? to : kept) + i * size, dtype,
                      _mm256_fmadd_ps(_mm256_loadu_ps(*total + i), _mm256_loadu_ps(factor + i),
                                      _mm256_loadu_ps(added + i)));
        if (count < COLUMNS) memcpy(to, kept, count * size);
    }
}

/* Some rows of activations with outputs n..stop. */
static void rectangle(const weights *w, const activations *a, enum dtype dtype, int64_t first, int64_t last, int64_t n,
                      int64_t stop, void *panel, float (*total)[COLUMNS], char *out) {
    const int64_t tiles = (last - first) * ROWS;
    memset(total, 0, (stop - n + COLUMNS - 1) / COLUMNS * tiles * sizeof(*total));
    for (int64_t k = 0; k < w->K; k += a->depth) {
        const int64_t depth = least(w->K - k, a->depth);
        float(*sums)[COLUMNS] = total;
        for (int64_t i = n; i < stop; i += COLUMNS, sums += tiles) {
            const int64_t next = i + COLUMNS < stop;
            pack(w, i, k, depth, panel);
            multiply(w, a, i, k, depth, first, last, panel, next ? i + COLUMNS : n, next ? k : k + a->depth, sums);
        }
    }
    for (int64_t i = n; i < stop; i += COLUMNS, total += tiles) finish(w, a, dtype, i, first, last, total, out);
}

/* The activations of panel p and one panel of features. */
static void lay_out(const void *x, enum dtype dtype, int64_t K, int64_t group, int64_t k, int64_t p, activations *a) {
    const int64_t depth = least(K - k, a->depth), rows = least(a->M - p * ROWS, ROWS);
    const int64_t at = (k / a->depth * a->panels + p) * a->depth * ROWS;
    for (int64_t r = 0; r < rows; r++) {
        float values[DEPTH + GROUP] = {0};
        widen((const char *)x + ((p * ROWS + r) * K + k) * size_of(dtype), dtype, depth, values);
        if (!group) {
            for (int64_t i = 0; i < depth; i++) ((float *)a->data)[at + i * ROWS + r] = values[i];
            continue;
        }
        for (int64_t i = 0; i < depth; i += group) {
            int16_t q[GROUP_MOST];
            int32_t sum;
            const int64_t to = ((k + i) / group * a->panels + p) * ROWS + r;
            quantize_group(values + i, group, q, a->scale + to, &sum);
            a->sum[to] = a->scale[to] * (float)sum;
            for (int64_t j = 0; j < group && i + j < a->depth; j += 2)
                memcpy((int32_t *)a->data + at / 2 + (i + j) / 2 * ROWS + r, q + j, 4);
        }
    }
}

typedef struct {
    const void *x;
    enum dtype dtype;
    const weights *w;
    activations a;
    int64_t blocks, width, tasks;
    char *out;
} sharing;

static void lay_out_piece(void *argument, int64_t start, int64_t stop) {
    sharing *s = argument;
    for (int64_t i = start; i < stop; i++)
        lay_out(s->x, s->dtype, s->w->K, s->w->group, i / s->a.panels * s->a.depth, i % s->a.panels, &s->a);
}

static void rectangles(void *argument, int64_t start, int64_t stop) {
    const sharing *s = argument;
    float panel[DEPTH][COLUMNS] __attribute__((aligned(LINE)));
    float total[WIDTH / COLUMNS * (HEIGHT + ROWS)][COLUMNS] __attribute__((aligned(LINE)));
    for (int64_t i = start; i < stop; i++) {
        const int64_t b = i / s->tasks, n = i % s->tasks * s->width, panels = s->a.panels;
        rectangle(s->w, &s->a, s->dtype, b * panels / s->blocks, (b + 1) * panels / s->blocks, n,
                  least(s->w->N, n + s->width), panel, total, s->out);
    }
}

static int product(const void *x, enum dtype dtype, int64_t M, const weights *w, char *out, crew who) {
    const int64_t group = w->group, K = w->K; /* 0 of floats */
    const int64_t blocks = (M + HEIGHT - 1) / HEIGHT, panels = (M + ROWS - 1) / ROWS;
    activations a = {M, panels, group ? DEPTH / group * group : DEPTH, NULL, NULL, NULL};
    const int64_t steps = (K + a.depth - 1) / a.depth, groups = group ? (K + group - 1) / group : 0;
    const int64_t bytes = steps * panels * a.depth * ROWS * (group ? 2 : 4), scales = groups * panels * ROWS * 4;
    const int64_t even = w->N / (4 * threads_of(who) * (blocks > 4 ? 4 : blocks)) / 32 * 32; /* some for each thread */
    const int64_t width = even < 32 ? 32 : even > WIDTH ? WIDTH : even, tasks = (w->N + width - 1) / width;
    a.data = aligned_alloc(LINE, (bytes + 2 * scales + LINE) / LINE * LINE);
    if (!a.data) return -1;
    a.scale = (float *)((char *)a.data + bytes), a.sum = a.scale + groups * panels * ROWS;
    sharing s = {x, dtype, w, a, blocks, width, tasks, out};
    each(who, steps * panels, a.depth * ROWS * 4, lay_out_piece, &s);
    each(who, blocks * tasks, MOST_BYTES, rectangles, &s);
    free(a.data);
    return 0;
}

/* Some thousands of rows would take much memory at once. */
static int products(const void *x, enum dtype dtype, int64_t M, const weights *w, void *out, crew who) {
    const int64_t size = size_of(dtype);
    for (int64_t m = 0; m < M; m += MOST)
        if (product((const char *)x + m * w->K * size, dtype, least(M - m, MOST), w, (char *)out + m * w->N * size,
                    who))
            return -1;
    return 0;
}

/* The products of cpu.c, with the same arguments. */

int linear_float(const void *x, int dtype, int64_t M, int64_t K, const void *data, const void *bias, int64_t N,
                 void *out, crew who) {
    const weights w = {FLOATS, dtype, data, N, K, K, 1, NULL, NULL, 1, bias, 0};
    return products(x, dtype, M, &w, out, who);
}

/* The same with weights [K, N]. */
int linear_columns(const void *x, int dtype, int64_t M, int64_t K, const void *data, const void *bias, int64_t N,
                   void *out, crew who) {
    const weights w = {FLOATS, dtype, data, N, K, 1, N, NULL, NULL, 1, bias, 0};
    return products(x, dtype, M, &w, out, who);
}

int linear_int8(const void *x, int dtype, int64_t M, int64_t K, const int8_t *codes, const uint16_t *scales, int64_t N,
                void *out, crew who) {
    const weights w = {INT8, dtype, (const char *)codes, N, K, K, 1, scales, NULL, 1, NULL, GROUP};
    return products(x, dtype, M, &w, out, who);
}

/* With blocks of 32 rows, and an even `group` of at most GROUP_MOST input features. A sum is the same to the bit. */
int linear_int4(const void *x, int dtype, int64_t M, int64_t K, const uint8_t *codes, const uint16_t *scales,
                const float *table, int64_t N, int64_t group, void *out, crew who) {
    int16_t integers[16];
    const float unit = table ? integer_table(table, group, integers) : 1;
    const weights w = {INT4, dtype, (const char *)codes, N, K, 0, 0, scales, table ? integers : NULL, unit, NULL, group};
    return products(x, dtype, M, &w, out, who);
}
