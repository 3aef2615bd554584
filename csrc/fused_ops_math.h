// Arithmetic that the steps between products share. Compiled once per instruction set.
#pragma once

#include <cmath>

#include "simd.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

// Rows in scratch memory are padded to whole tiles' lanes, which are whole vectors everywhere.
inline int64_t padded(int64_t count) { return (count + BLOCK - 1) / BLOCK * BLOCK; }

inline void put(float* p, const Floats& v) { std::memcpy(p, &v, sizeof v); }

// e^x to within two units in the last place, from 0 to infinity: x = k ln 2 + r, and 2^k in two factors.
constexpr float FARTHEST = 104.0f, LOG2_E = 1.44269504f, LN2 = 0.693145752f, LN2_REST = 1.42860677e-6f;
constexpr float WHOLE = 12582912.0f;  // 1.5 · 2^23: added, it leaves an integer in the low bits
constexpr int32_t WHOLE_BITS = 0x4b400000;

#if defined(__GNUC__) || defined(__clang__)
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline Floats exponential(Floats x) {
    x = x < -FARTHEST ? Floats{} - FARTHEST : x;  // in this order not-a-number stays one
    x = x > FARTHEST ? Floats{} + FARTHEST : x;
    const Floats shifted = x * LOG2_E + WHOLE, k = shifted - WHOLE, r = (x - k * LN2) - k * LN2_REST;
    Floats e = r * (1.0f / 5040) + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    Ints exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent -= WHOLE_BITS;
    const Ints half = exponent >> 1, first = (half + 127) << 23, second = (exponent - half + 127) << 23;
    Floats low, high;
    std::memcpy(&low, &first, sizeof low);
    std::memcpy(&high, &second, sizeof high);
    return e * low * high;
}

inline Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }
#else
inline Floats operator*(Floats a, Floats b) {
    for (int i = 0; i < WIDTH; i++) a.v[i] *= b.v[i];
    return a;
}
inline Floats larger(Floats a, Floats b) {
    for (int i = 0; i < WIDTH; i++) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
inline Floats exponential(Floats x) {
    for (int i = 0; i < WIDTH; i++) x.v[i] = std::exp(x.v[i]);
    return x;
}
inline Floats silu(Floats x) {
    for (int i = 0; i < WIDTH; i++) x.v[i] = x.v[i] / (1.0f + std::exp(-x.v[i]));
    return x;
}
#endif

inline float sum(Floats a) {
    float v[WIDTH];
    put(v, a);
    for (int width = WIDTH / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
}

inline float largest_of(const float* x, int64_t count) {
    Floats most = floats_at(x);
    for (int64_t i = WIDTH; i < count; i += WIDTH) most = larger(most, floats_at(x + i));
    float v[WIDTH];
    put(v, most);
    for (int i = 1; i < WIDTH; i++) v[0] = v[0] < v[i] ? v[i] : v[0];
    return v[0];
}

inline float dot(const float* a, const float* b, int64_t count) {
    Floats total = floats_at(a) * floats_at(b);
    for (int64_t i = WIDTH; i < count; i += WIDTH) total = total + floats_at(a + i) * floats_at(b + i);
    return sum(total);
}

// x → e^(x − offset), in place; their sum.
inline float exponentials(float* x, int64_t count, float offset) {
    for (int64_t i = 0; i < count; i++) x[i] -= offset;
    Floats total = exponential(floats_at(x));
    put(x, total);
    for (int64_t i = WIDTH; i < count; i += WIDTH) {
        const Floats e = exponential(floats_at(x + i));
        put(x + i, e);
        total = total + e;
    }
    return sum(total);
}

}  // namespace
}  // namespace FEWBIT_ISA
}  // namespace fewbit
