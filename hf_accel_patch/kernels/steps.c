/* A list of operators on tensors that lie where they lay when they were noted, run one after another.
 *
 * Elementwise operators read float32, bfloat16 or float16 with any strides, compute in float32 as PyTorch does, and round
 * once. The larger products and attention are calls of the functions in cpu.c and decode.c, which share them with the
 * threads that wait for that (team.h). Most of what is here takes less time than that would.
 */
#include "products.h"
#include "team.h"

enum { DIMS = 5, CHUNK = 512, LANES = 16, SPAN = 8 * CHUNK, MANY = 1 << 15 /* numbers, which threads share */ };
enum kind {
    COPY, ADD, SUBTRACT, MULTIPLY, DIVIDE, NEGATE, RSQRT, SQUARE, CUBE, SILU, SIGMOID, EXP, TANH, GELU, GELU_TANH, RELU,
    COS, SIN,                                  /* elementwise */
    LESS_EQUAL, GREATER, BOTH, PLUS, TO_FLOAT, /* of integers */
    MEAN, SUM, LAYER_NORM,                     /* over the last dimension */
    MOVE, GATHER, SCATTER,                                                                  /* bytes */
    LINEAR_INT4, LINEAR_INT8, LINEAR_FLOAT, ATTEND
};

/* Pointers, and for each dimension its size and the strides of the output and of two inputs, in elements. An input that
 * is NULL is the number `scalar`. `extra`: see the operators. */
typedef struct {
    int64_t kind, dtypes[3], dims, sizes[DIMS], strides[3][DIMS];
    char *out, *a, *b;
    double scalar;
    int64_t extra[6];
} operator;

static inline int64_t width(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* n <= CHUNK numbers, `stride` apart, as float32. */
static void load(const char *from, int64_t dtype, int64_t stride, int64_t n, float *to) {
    if (stride == 0) {
        const float value = dtype == FLOAT32    ? *(const float *)from
                            : dtype == BFLOAT16 ? from_bfloat16(*(const uint16_t *)from)
                                                : _cvtsh_ss(*(const uint16_t *)from);
        for (int64_t i = 0; i < n; i++) to[i] = value;
    } else if (dtype == FLOAT32) {
        const float *p = (const float *)from;
        if (stride == 1) memcpy(to, p, n * sizeof(float));
        else
            for (int64_t i = 0; i < n; i++) to[i] = p[i * stride];
    } else if (dtype == BFLOAT16) {
        const uint16_t *p = (const uint16_t *)from;
        if (stride == 1)
            for (int64_t i = 0; i < n; i++) to[i] = from_bfloat16(p[i]);
        else
            for (int64_t i = 0; i < n; i++) to[i] = from_bfloat16(p[i * stride]);
    } else {
        const uint16_t *p = (const uint16_t *)from;
        int64_t i = 0;
        if (stride == 1)
            for (; i + 8 <= n; i += 8)
                _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + i))));
        for (; i < n; i++) to[i] = _cvtsh_ss(p[i * stride]);
    }
}

static void store(const float *from, int64_t n, char *to, int64_t dtype, int64_t stride) {
    if (dtype == FLOAT32) {
        float *p = (float *)to;
        if (stride == 1) memcpy(p, from, n * sizeof(float));
        else
            for (int64_t i = 0; i < n; i++) p[i * stride] = from[i];
    } else if (dtype == BFLOAT16) {
        uint16_t *p = (uint16_t *)to;
        if (stride == 1)
            for (int64_t i = 0; i < n; i++) p[i] = to_bfloat16(from[i]);
        else
            for (int64_t i = 0; i < n; i++) p[i * stride] = to_bfloat16(from[i]);
    } else {
        uint16_t *p = (uint16_t *)to;
        int64_t i = 0;
        if (stride == 1)
            for (; i + 8 <= n; i += 8)
                _mm_storeu_si128((__m128i *)(p + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
        for (; i < n; i++) p[i * stride] = _cvtss_sh(from[i], 0);
    }
}

static inline float power_of_two(int32_t n) {
    const uint32_t bits = (uint32_t)(n + 127) << 23;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* e^x within 2 units of the last place; 0 below -87.3. A loop of it is vectorized. */
static inline float exponential(float x) {
    const float t = x < -87.3f ? -87.3f : x > 88.7228f ? 88.7228f : x;
    const float n = rintf(t * 1.44269504f);
    const float r = (t - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t power = (int32_t)(n == n ? n : 0.0f), half = power / 2; /* in two steps: 2^128 is no float */
    const float y = p * power_of_two(half) * power_of_two(power - half);
    return x < -87.3f ? 0.0f : x > 88.7228f ? INFINITY : y;
}

/* Near 0 a polynomial (Cephes), elsewhere by e^x; within 3e-7. */
static inline float hyperbolic_tangent(float x) {
    const float a = fabsf(x), z = x * x;
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const float small = x + x * z * p, large = 1.0f - 2.0f / (exponential(2.0f * a) + 1.0f);
    return a < 0.625f ? small : copysignf(large, x);
}

/* Abramowitz and Stegun 7.1.26: within 4e-7. */
static inline float error_function(float x) {
    const float a = fabsf(x), t = 1.0f / (1.0f + 0.3275911f * a);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    return copysignf(1.0f - p * t * exponential(-a * a), x);
}

#define EACH(expression) \
    for (int64_t i = 0; i < n; i++) y[i] = (expression); \
    break

static void calculate(int64_t kind, const float *a, const float *b, int64_t n, float *y) {
    switch (kind) {
        case COPY: EACH(a[i]);
        case ADD: EACH(a[i] + b[i]);
        case SUBTRACT: EACH(a[i] - b[i]);
        case MULTIPLY: EACH(a[i] * b[i]);
        case DIVIDE: EACH(a[i] / b[i]);
        case NEGATE: EACH(-a[i]);
        case RSQRT: EACH(1.0f / sqrtf(a[i]));
        case SQUARE: EACH(a[i] * a[i]);
        case CUBE: EACH(a[i] * a[i] * a[i]);
        case SILU: EACH(a[i] / (1.0f + exponential(-a[i])));
        case SIGMOID: EACH(1.0f / (1.0f + exponential(-a[i])));
        case EXP: EACH(exponential(a[i]));
        case TANH: EACH(hyperbolic_tangent(a[i]));
        case GELU: EACH(0.5f * a[i] * (1.0f + error_function(a[i] * 0.70710678f)));
        case GELU_TANH: EACH(0.5f * a[i] * (1.0f + hyperbolic_tangent(0.79788456f * (a[i] + 0.044715f * a[i] * a[i] * a[i]))));
        case RELU: EACH(a[i] < 0.0f ? 0.0f : a[i]);
        case COS: EACH(cosf(a[i]));
        case SIN: EACH(sinf(a[i]));
    }
}

/* Goes over all dimensions but the last. `at`: where the output and the inputs are then, in elements. */
static int next(const operator *o, int64_t *index, int64_t *at) {
    for (int64_t d = o->dims - 2; d >= 0; d--) {
        for (int j = 0; j < 3; j++) at[j] += o->strides[j][d];
        if (++index[d] < o->sizes[d]) return 1;
        for (int j = 0; j < 3; j++) at[j] -= o->sizes[d] * o->strides[j][d];
        index[d] = 0;
    }
    return 0;
}

/* From `start` to `stop` in the last dimension. */
static void span(const operator *o, const int64_t *at, int64_t start, int64_t stop) {
    const int64_t last = o->dims - 1, *dtypes = o->dtypes;
    const int64_t step[3] = {o->strides[0][last], o->strides[1][last], o->strides[2][last]};
    float a[CHUNK], b[CHUNK], y[CHUNK];
    if (!o->b || !o->a)
        for (int64_t i = 0; i < CHUNK && i < stop - start; i++) (o->b ? a : b)[i] = (float)o->scalar;
    for (; start < stop; start += CHUNK) {
        const int64_t n = stop - start < CHUNK ? stop - start : CHUNK;
        if (o->a) load(o->a + (at[1] + start * step[1]) * width(dtypes[1]), dtypes[1], step[1], n, a);
        if (o->b) load(o->b + (at[2] + start * step[2]) * width(dtypes[2]), dtypes[2], step[2], n, b);
        calculate(o->kind, a, b, n, y);
        store(y, n, o->out + (at[0] + start * step[0]) * width(dtypes[0]), dtypes[0], step[0]);
    }
}

/* Of a contiguous operator, item by item of SPAN numbers. */
static void spans(void *argument, int64_t start, int64_t stop) {
    const operator *o = argument;
    const int64_t size = o->sizes[0], at[3] = {0};
    span(o, at, start * SPAN, stop * SPAN < size ? stop * SPAN : size);
}

static void elementwise(const operator *o, crew who) {
    const int64_t size = o->sizes[o->dims - 1];
    int64_t index[DIMS] = {0}, at[3] = {0};
    if (o->dims == 1 && size >= MANY) {
        each(who, (size + SPAN - 1) / SPAN, SPAN * sizeof(float), spans, (void *)o);
        return;
    }
    do span(o, at, 0, size);
    while (next(o, index, at));
}

#define EACH_INTEGER(type, expression)                                  \
    for (int64_t i = 0; i < size; i++) {                                \
        const int64_t a = at[1] + i * step[1], b = at[2] + i * step[2]; \
        ((type *)to)[at[0] + i * step[0]] = (expression);               \
        (void)b;                                                        \
    }                                                                   \
    break

/* int64 compared, or added to the number `extra[0]`, or as float32; bools of which both are to be true. */
static void integers(const operator *o) {
    const int64_t last = o->dims - 1, size = o->sizes[last];
    const int64_t step[3] = {o->strides[0][last], o->strides[1][last], o->strides[2][last]};
    const int64_t *A = (const int64_t *)o->a, *B = (const int64_t *)(o->b ? o->b : (const char *)&o->extra[0]);
    const uint8_t *first = (const uint8_t *)o->a, *second = (const uint8_t *)o->b;
    char *to = o->out;
    int64_t index[DIMS] = {0}, at[3] = {0};
    do {
        switch (o->kind) {
            case LESS_EQUAL: EACH_INTEGER(uint8_t, A[a] <= B[b]);
            case GREATER: EACH_INTEGER(uint8_t, A[a] > B[b]);
            case BOTH: EACH_INTEGER(uint8_t, first[a] && second[b]);
            case PLUS: EACH_INTEGER(int64_t, A[a] + B[b]);
            case TO_FLOAT: EACH_INTEGER(float, (float)A[a]);
        }
    } while (next(o, index, at));
}

static inline float total(const float *lanes) {
    float half[LANES];
    memcpy(half, lanes, sizeof half);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) half[i] += half[i + n];
    return half[0];
}

/* The sum of n numbers less `shift`, or of their squares. */
static float sum(const char *from, int64_t dtype, int64_t stride, int64_t size, float shift, int squares) {
    float lanes[LANES] = {0}, x[CHUNK];
    for (int64_t start = 0; start < size; start += CHUNK) {
        const int64_t n = size - start < CHUNK ? size - start : CHUNK;
        load(from + start * stride * width(dtype), dtype, stride, n, x);
        for (int64_t i = n; i < (n + LANES - 1) / LANES * LANES; i++) x[i] = shift;
        if (squares)
            for (int64_t i = 0; i < n; i += LANES)
                for (int j = 0; j < LANES; j++) lanes[j] += (x[i + j] - shift) * (x[i + j] - shift);
        else
            for (int64_t i = 0; i < n; i += LANES)
                for (int j = 0; j < LANES; j++) lanes[j] += x[i + j] - shift;
    }
    return total(lanes);
}

/* Of a, over its last dimension, into an output whose stride there is 0. */
static void reduce(const operator *o) {
    const int64_t last = o->dims - 1, size = o->sizes[last];
    int64_t index[DIMS] = {0}, at[3] = {0};
    do {
        float y = sum(o->a + at[1] * width(o->dtypes[1]), o->dtypes[1], o->strides[1][last], size, 0, 0);
        if (o->kind == MEAN) y /= (float)size;
        store(&y, 1, o->out + at[0] * width(o->dtypes[0]), o->dtypes[0], 1);
    } while (next(o, index, at));
}

/* Of contiguous rows; weight `b` and bias extra[0] of the dtype of the input, or NULL. `scalar`: epsilon. */
static void layer_norm(const operator *o) {
    const int64_t last = o->dims - 1, size = o->sizes[last], dtype = o->dtypes[1], bytes = width(dtype);
    const char *bias = (const char *)o->extra[0];
    int64_t index[DIMS] = {0}, at[3] = {0};
    float x[CHUNK], w[CHUNK];
    do {
        const char *row = o->a + at[1] * bytes;
        char *to = o->out + at[0] * bytes;
        const float mean = sum(row, dtype, 1, size, 0, 0) / (float)size;
        const float inverse = 1.0f / sqrtf(sum(row, dtype, 1, size, mean, 1) / (float)size + (float)o->scalar);
        for (int64_t start = 0; start < size; start += CHUNK) {
            const int64_t n = size - start < CHUNK ? size - start : CHUNK;
            load(row + start * bytes, dtype, 1, n, x);
            for (int64_t i = 0; i < n; i++) x[i] = (x[i] - mean) * inverse;
            if (o->b) {
                load(o->b + start * bytes, dtype, 1, n, w);
                for (int64_t i = 0; i < n; i++) x[i] *= w[i];
            }
            if (bias) {
                load(bias + start * bytes, dtype, 1, n, w);
                for (int64_t i = 0; i < n; i++) x[i] += w[i];
            }
            store(x, n, to + start * bytes, dtype, 1);
        }
    } while (next(o, index, at));
}

/* Elements of extra[0] bytes, as they are. */
static void move(const operator *o) {
    const int64_t last = o->dims - 1, size = o->sizes[last], bytes = o->extra[0];
    const int64_t to_step = o->strides[0][last], from_step = o->strides[1][last];
    int64_t index[DIMS] = {0}, at[3] = {0};
    do {
        char *to = o->out + at[0] * bytes;
        const char *from = o->a + at[1] * bytes;
        if (to_step == 1 && from_step == 1) memcpy(to, from, size * bytes);
        else
            for (int64_t i = 0; i < size; i++) memcpy(to + i * to_step * bytes, from + i * from_step * bytes, bytes);
    } while (next(o, index, at));
}

/* Rows of a [extra[1], ...], extra[0] bytes each and extra[2] bytes apart, by the int64 indices at `b`. A negative one
 * counts from the end. Returns -1 where there is no such row. */
static int gather(const operator *o) {
    const int64_t *rows = (const int64_t *)o->b, bytes = o->extra[0];
    for (int64_t i = 0; i < o->sizes[0]; i++) {
        const int64_t row = rows[i] < 0 ? rows[i] + o->extra[1] : rows[i];
        if (row < 0 || row >= o->extra[1]) return -1;
        memcpy(o->out + i * bytes, o->a + row * o->extra[2], bytes);
    }
    return 0;
}

/* out [B', K, C, D] at [rows[b], :, places[b, t]] = a [B, T, K, D], in elements of extra[0] bytes, the last dimension of
 * both contiguous. sizes: B, T, K, D; strides of the output: of B', K, C, and of a: of B, T, K. b: rows, int64 [B, 1].
 * extra[1]: places, int64 [B, T]; extra[2], extra[3]: B' and C; extra[4], extra[5]: strides of rows and of places. */
static int scatter(const operator *o) {
    const int64_t *rows = (const int64_t *)o->b, *places = (const int64_t *)o->extra[1], bytes = o->extra[0];
    const int64_t *to = o->strides[0], *from = o->strides[1], *size = o->sizes;
    for (int64_t b = 0; b < size[0]; b++)
        for (int64_t t = 0; t < size[1]; t++) {
            int64_t row = rows[b * o->extra[4]], place = places[b * o->extra[5] + t];
            row = row < 0 ? row + o->extra[2] : row;
            place = place < 0 ? place + o->extra[3] : place;
            if (row < 0 || row >= o->extra[2] || place < 0 || place >= o->extra[3]) return -1;
            for (int64_t k = 0; k < size[2]; k++)
                memcpy(o->out + (row * to[0] + k * to[1] + place * to[2]) * bytes,
                       o->a + (b * from[0] + t * from[1] + k * from[2]) * bytes, size[3] * bytes);
        }
    return 0;
}

typedef int (*linear_int4)(const void *, int, int64_t, int64_t, const void *, const void *, const void *, int64_t, int64_t,
                           void *, crew);
typedef int (*linear_int8)(const void *, int, int64_t, int64_t, const void *, const void *, int64_t, void *, crew);
typedef int (*linear_float)(const void *, int, int64_t, int64_t, const void *, const void *, int64_t, void *, crew);
typedef int (*attention)(const void *);

/* Products: sizes M, K, N, and the group of int4; extra: the function, codes or weight, scales or bias, table. Attention:
 * extra: the function and its argument, whose eleventh number is the crew. */
static int call(const operator *o, crew who) {
    const int64_t *size = o->sizes, *e = o->extra;
    const int dtype = (int)o->dtypes[1];
    switch (o->kind) {
        case LINEAR_INT4:
            return ((linear_int4)e[0])(o->a, dtype, size[0], size[1], (void *)e[1], (void *)e[2], (void *)e[3], size[2],
                                       size[3], o->out, who);
        case LINEAR_INT8:
            return ((linear_int8)e[0])(o->a, dtype, size[0], size[1], (void *)e[1], (void *)e[2], size[2], o->out,
                                       who);
        case LINEAR_FLOAT:
            return ((linear_float)e[0])(o->a, dtype, size[0], size[1], (void *)e[1], (void *)e[2], size[2], o->out,
                                        who);
        default: ((int64_t *)e[1])[10] = who; return ((attention)e[0])((void *)e[1]);
    }
}

static int64_t in_order(const operator *operators, int64_t count, crew who) {
    for (int64_t i = 0; i < count; i++) {
        const operator *o = operators + i;
        int failed = 0;
        if (o->kind < LESS_EQUAL) elementwise(o, who);
        else if (o->kind < MEAN) integers(o);
        else if (o->kind < LAYER_NORM) reduce(o);
        else if (o->kind == LAYER_NORM) layer_norm(o);
        else if (o->kind == MOVE) move(o);
        else if (o->kind == GATHER) failed = gather(o);
        else if (o->kind == SCATTER) failed = scatter(o);
        else failed = call(o, who);
        if (failed) return i + 1;
    }
    return 0;
}

/* Runs them in order. Returns 0, or the place of the one that failed, from 1 on. The threads are woken once for all. */
int64_t run(const operator *operators, int64_t count, int threads) {
    if (threads == 1) return in_order(operators, count, 1);
    int64_t failed = 0;
    team t = {.threads = threads};
#pragma omp parallel num_threads(threads)
    {
        if (omp_get_thread_num() == 0) {
            failed = in_order(operators, count, (crew)&t);
            __atomic_store_n(&t.ticket, OVER, __ATOMIC_RELEASE);
        } else {
            follow(&t);
        }
    }
    return failed;
}
