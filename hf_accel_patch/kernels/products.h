/* What C sources share: element types, and activations as integers. */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum dtype { FLOAT32, BFLOAT16, FLOAT16 };

enum { GROUP_MOST = 128 }; /* input features in a group of int4 codes */

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

static inline void widen(const void *x, enum dtype dtype, int64_t n, float *out) {
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

/* One group. The scale is the power of two that takes the largest value to 2^14 or above. */
static inline void quantize_group(const float *x, int64_t group, int16_t *q, float *scale, int32_t *sum) {
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

/* The largest magnitude of 16 values, which become integers whose products with a group of activations fit 32 bits. */
static inline float integer_table(const float *table, int64_t group, int16_t *out) {
    const float most = (float)(65536 / group - 1);
    float largest = 0;
    for (int i = 0; i < 16; i++) largest = fmaxf(largest, fabsf(table[i]));
    for (int i = 0; i < 16; i++) out[i] = (int16_t)rintf(table[i] / largest * most);
    return largest / most;
}
