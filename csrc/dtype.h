// float32, float16 and bfloat16 in memory, one number at a time; loops over them vectorize.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "matmul.h"

namespace fewbit {

static inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

static inline float from_bfloat16(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }

// To nearest, half to even; not-a-number stays one.
static inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

// The exponent is moved by a product, which also makes subnormal numbers right.
static inline float from_float16(uint16_t h) {
    const uint32_t magnitude = (h & 0x7fffu) << 13, sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const float moved = from_bits(magnitude) * from_bits(0x77800000u);  // 2^112
    const bool special = magnitude >= 0x0f800000u;           // infinity, not-a-number
    return from_bits(sign | (special ? magnitude | 0x7f800000u : to_bits(moved)));
}

static inline uint16_t to_float16(float x) {
    const uint32_t bits = to_bits(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // subnormal: the addition rounds at bit 2^-24
        half = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
    } else {
        half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    }
    return static_cast<uint16_t>(half | (sign >> 16));
}

static inline float number_at(const void* p, DType type, int64_t i) {
    switch (type) {
        case DType::float16: return from_float16(static_cast<const uint16_t*>(p)[i]);
        case DType::bfloat16: return from_bfloat16(static_cast<const uint16_t*>(p)[i]);
        default: return static_cast<const float*>(p)[i];
    }
}

// As many of `count` numbers as the processor converts by itself, several at a time. Returns how many.
static inline int64_t convert_float16(const uint16_t* h, int64_t count, float* out) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h + i))));
#elif defined(__aarch64__) && defined(__ARM_NEON)
    for (; i + 4 <= count; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h + i))));
#else
    (void)h, (void)count, (void)out;
#endif
    return i;
}

// `count` numbers from element `first` on, as float32.
static inline void read_numbers(const void* p, DType type, int64_t first, int64_t count, float* out) {
    if (type == DType::float32) {
        std::memcpy(out, static_cast<const float*>(p) + first, static_cast<size_t>(count) * 4);
    } else if (type == DType::bfloat16) {
        const uint16_t* h = static_cast<const uint16_t*>(p) + first;
        for (int64_t i = 0; i < count; i++) out[i] = from_bfloat16(h[i]);
    } else {
        const uint16_t* h = static_cast<const uint16_t*>(p) + first;
        for (int64_t i = convert_float16(h, count, out); i < count; i++) out[i] = from_float16(h[i]);
    }
}

static inline void write_numbers(void* p, DType type, int64_t first, int64_t count, const float* in) {
    if (type == DType::float32) {
        std::memcpy(static_cast<float*>(p) + first, in, static_cast<size_t>(count) * 4);
    } else if (type == DType::bfloat16) {
        uint16_t* h = static_cast<uint16_t*>(p) + first;
        for (int64_t i = 0; i < count; i++) h[i] = to_bfloat16(in[i]);
    } else {
        uint16_t* h = static_cast<uint16_t*>(p) + first;
        for (int64_t i = 0; i < count; i++) h[i] = to_float16(in[i]);
    }
}

}  // namespace fewbit
