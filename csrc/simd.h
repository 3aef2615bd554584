// Vectors of floats in two sizes. `Lanes`: always sixteen floats, one per row of the weight, for the solver. `Floats`:
// as many as the instruction set holds, for products; a tile's sixteen lanes are PARTS of them. (Compilers split larger
// vectors badly.) The vector types are an extension of gcc and clang; other compilers get arrays and vectorize the loops.
// Compiled once per instruction set, into the namespace that the build names, so that the linker never merges two
// versions of an inline function.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "dtype.h"

#ifndef FEWBIT_ISA
#error "the build defines FEWBIT_ISA: generic, avx2 or avx512"
#endif

namespace fewbit {
namespace FEWBIT_ISA {

constexpr int LANES = 16;

#if !defined(__GNUC__) && !defined(__clang__) && !defined(FEWBIT_PLAIN_LANES)
#define FEWBIT_PLAIN_LANES
#endif

#if !defined(FEWBIT_PLAIN_LANES)

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Mask __attribute__((vector_size(64)));

static inline Lanes select(Mask mask, Lanes a, Lanes b) { return mask ? a : b; }
static inline Mask both(Mask a, Mask b) { return a & b; }

#else

struct Mask {
    int32_t v[LANES];
};

struct Lanes {
    float v[LANES];
};

#define FEWBIT_LANEWISE(RESULT, NAME, EXPRESSION)                  \
    static inline RESULT NAME(const Lanes& a, const Lanes& b) {    \
        RESULT r;                                                  \
        for (int l = 0; l < LANES; l++) r.v[l] = (EXPRESSION);     \
        return r;                                                  \
    }
FEWBIT_LANEWISE(Lanes, operator+, a.v[l] + b.v[l])
FEWBIT_LANEWISE(Lanes, operator-, a.v[l] - b.v[l])
FEWBIT_LANEWISE(Lanes, operator*, a.v[l] * b.v[l])
FEWBIT_LANEWISE(Lanes, operator/, a.v[l] / b.v[l])
FEWBIT_LANEWISE(Mask, operator<, a.v[l] < b.v[l] ? -1 : 0)
FEWBIT_LANEWISE(Mask, operator==, a.v[l] == b.v[l] ? -1 : 0)
#undef FEWBIT_LANEWISE

static inline Lanes& operator+=(Lanes& a, const Lanes& b) { return a = a + b; }
static inline Lanes select(const Mask& mask, const Lanes& a, const Lanes& b) {
    Lanes r;
    for (int l = 0; l < LANES; l++) r.v[l] = mask.v[l] ? a.v[l] : b.v[l];
    return r;
}
static inline Mask both(const Mask& a, const Mask& b) {
    Mask r;
    for (int l = 0; l < LANES; l++) r.v[l] = a.v[l] & b.v[l];
    return r;
}

#endif

static inline Lanes load(const float* p) {
    Lanes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }

static inline Lanes all(float x) {
#if defined(__AVX512F__) && !defined(FEWBIT_PLAIN_LANES)
    return (Lanes)_mm512_set1_ps(x);
#else
    float v[LANES];
    for (int l = 0; l < LANES; l++) v[l] = x;
    return load(v);
#endif
}

static inline Lanes min(Lanes a, Lanes b) {
#if defined(__AVX512F__) && !defined(FEWBIT_PLAIN_LANES)
    return (Lanes)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return select(a < b, a, b);
#endif
}

static inline Lanes max(Lanes a, Lanes b) {
#if defined(__AVX512F__) && !defined(FEWBIT_PLAIN_LANES)
    return (Lanes)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select(b < a, a, b);
#endif
}

static inline Lanes clamp(Lanes x, Lanes low, Lanes high) { return min(max(x, low), high); }

// Half to even, for |x| < 2^22: adding 1.5 · 2^23 leaves no bits for the fraction.
static inline Lanes round_even(Lanes x) {
    const Lanes magic = all(12582912.0f);
    return (x + magic) - magic;
}

// To the nearest float16 and back, half to even, for 0 <= x <= 65504. Below 2^-14 float16 has steps of 2^-24: adding 0.5
// leaves no smaller bits.
static inline Lanes round_half(Lanes x) {
    const Lanes subnormal = (x + all(0.5f)) - all(0.5f);
    const Mask small = x < all(1.0f / 16384.0f);
    uint32_t bits[LANES];
    std::memcpy(bits, &x, sizeof bits);
    for (int l = 0; l < LANES; l++) bits[l] = (bits[l] + 0xfffu + ((bits[l] >> 13) & 1u)) & ~0x1fffu;
    std::memcpy(&x, bits, sizeof bits);
    return select(small, subnormal, x);
}

}  // namespace FEWBIT_ISA
}  // namespace fewbit

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int PARTS = static_cast<int>(BLOCK) / WIDTH;

#if defined(__GNUC__) || defined(__clang__)
typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));

inline Ints field(Ints words, int shift, int mask) { return (words >> shift) & mask; }
inline Floats to_float(Ints codes) { return __builtin_convertvector(codes, Floats); }
inline Floats times(Floats v, float x) { return v * x; }
#else
struct Floats {
    float v[WIDTH];
};
struct Ints {
    int32_t v[WIDTH];
};

inline Ints field(Ints words, int shift, int mask) {
    for (int i = 0; i < WIDTH; i++) words.v[i] = (words.v[i] >> shift) & mask;
    return words;
}
inline Ints operator|(Ints a, Ints b) {
    for (int i = 0; i < WIDTH; i++) a.v[i] |= b.v[i];
    return a;
}
inline Ints operator<<(Ints a, int shift) {
    for (int i = 0; i < WIDTH; i++) a.v[i] <<= shift;
    return a;
}
inline Floats to_float(Ints codes) {
    Floats f;
    for (int i = 0; i < WIDTH; i++) f.v[i] = static_cast<float>(codes.v[i]);
    return f;
}
inline Floats times(Floats v, float x) {
    for (int i = 0; i < WIDTH; i++) v.v[i] *= x;
    return v;
}
inline Floats operator+(Floats a, Floats b) {
    for (int i = 0; i < WIDTH; i++) a.v[i] += b.v[i];
    return a;
}
#endif

inline Ints ints_at(const void* p) {
    Ints v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Floats floats_at(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

}  // namespace
}  // namespace FEWBIT_ISA
}  // namespace fewbit
