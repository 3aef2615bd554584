// Vectors of the size that the instruction set has: a tile's sixteen lanes are PARTS of them. (The compiler splits
// larger ones badly.) The vector types are an extension of gcc and clang; other compilers get arrays and vectorise the
// loops over them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "numbers.h"

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
