// Sums of products of codes and int8 activations: what each instruction set has for them, by the macros of the compiler.
//
// A word is four codes or four activations. VNNI and ARM's dotprod add four products to a 32-bit sum. AVX2 and AVX-512BW
// add two to 16 bits, and NEON multiplies into 16 bits: there, parts of a sum (`Sum`) are in 16 bits, for at most MOST
// words, and then added to the 32-bit one.
#pragma once

#include "simd.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)

template <int BITS>
struct Dots {
    using Sum = Ints;
    static constexpr int MOST = 0;  // any number: the part is the sum
#if defined(__ARM_FEATURE_DOTPROD)
    static constexpr int CENTRE = BITS == 8 ? 128 : 0;  // taken from the codes, which are signed here
    static Sum dot(Sum sum, Ints codes, Ints x) { return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)x); }
#else
    static constexpr int CENTRE = 0;
#if defined(__AVX512VNNI__)
    static Sum dot(Sum sum, Ints codes, Ints x) { return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x); }
#else
    static Sum dot(Sum sum, Ints codes, Ints x) { return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)x); }
#endif
#endif
    static Sum from(Ints sum) { return sum; }
    static Ints add(Ints, Sum sum) { return sum; }
};

#elif defined(__AVX2__)

#if defined(__AVX512BW__)
inline Ints pairs16(Ints codes, Ints x) { return (Ints)_mm512_maddubs_epi16((__m512i)codes, (__m512i)x); }
inline Ints add16(Ints a, Ints b) { return (Ints)_mm512_add_epi16((__m512i)a, (__m512i)b); }
inline Ints fours(Ints pairs) { return (Ints)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi16(1)); }
inline Ints magnitude(Ints codes) { return (Ints)_mm512_abs_epi8((__m512i)codes); }
inline Ints with_sign(Ints x, Ints codes) {
    return (Ints)_mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask((__m512i)codes), _mm512_setzero_si512(), (__m512i)x);
}
#else
inline Ints pairs16(Ints codes, Ints x) { return (Ints)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x); }
inline Ints add16(Ints a, Ints b) { return (Ints)_mm256_add_epi16((__m256i)a, (__m256i)b); }
inline Ints fours(Ints pairs) { return (Ints)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1)); }
inline Ints magnitude(Ints codes) { return (Ints)_mm256_abs_epi8((__m256i)codes); }
inline Ints with_sign(Ints x, Ints codes) { return (Ints)_mm256_sign_epi8((__m256i)x, (__m256i)codes); }
#endif

template <int BITS>
struct Dots {
    using Sum = Ints;
    static constexpr int CENTRE = 0;
    static constexpr int MOST = 32767 / (2 * 127 * ((1 << BITS) - 1));
    static Sum dot(Sum sum, Ints codes, Ints x) { return add16(sum, pairs16(codes, x)); }
    static Sum from(Ints) { return Ints{}; }
    static Ints add(Ints before, Sum sum) { return before + fours(sum); }
};

// Codes less 128, whose sign is given to x: two products of at most 128 · 127 fit into 16 bits.
template <>
struct Dots<8> {
    using Sum = Ints;
    static constexpr int CENTRE = 128;
    static constexpr int MOST = 0;
    static Sum dot(Sum sum, Ints codes, Ints x) { return sum + fours(pairs16(magnitude(codes), with_sign(x, codes))); }
    static Sum from(Ints sum) { return sum; }
    static Ints add(Ints, Sum sum) { return sum; }
};

#elif defined(__ARM_NEON)

template <int BITS>
struct Dots {
    struct Sum {
        int16x8_t low, high;
    };
    static constexpr int CENTRE = BITS == 8 ? 128 : 0;
    static constexpr int MOST = 32767 / (127 * (BITS == 8 ? 128 : (1 << BITS) - 1));
    static Sum dot(Sum sum, Ints codes, Ints x) {
        return {vmlal_s8(sum.low, vget_low_s8((int8x16_t)codes), vget_low_s8((int8x16_t)x)),
                vmlal_high_s8(sum.high, (int8x16_t)codes, (int8x16_t)x)};
    }
    static Sum from(Ints) { return {vdupq_n_s16(0), vdupq_n_s16(0)}; }
    static Ints add(Ints before, Sum sum) { return before + (Ints)vpaddq_s32(vpaddlq_s16(sum.low), vpaddlq_s16(sum.high)); }
};

#else
#error "no products of bytes here: csrc/matmul.cpp does their work"
#endif

// One vector of a tile, as words of codes: word I has the codes of inputs `code_input(BITS, I, 0 … 3)`.
template <int BITS>
struct Packed {
    static constexpr int WORDS = static_cast<int>(tile_inputs(BITS)) / 4, BYTES = static_cast<int>(tile_bytes(BITS));
    Ints v[BITS == 3 ? 3 : 1];

    explicit Packed(const uint8_t* p) {
        for (int i = 0; i < BYTES / 64; i++) v[i] = ints_at(p + 64 * i);
    }

    template <int I>
    Ints word() const {
        if constexpr (BITS == 3) {
            const Ints high = I < 2 ? v[2] << (I < 2 ? 2 - I : 0) : v[2] >> (I < 2 ? 0 : I - 2);
            return ((v[I / 4] >> (2 * (I % 4))) & 0x03030303) | (high & 0x04040404);
        } else if constexpr (BITS == 8) {
            return Dots<8>::CENTRE ? v[0] ^ static_cast<int32_t>(0x80808080u) : v[0];
        } else {
            return (v[0] >> (I * BITS)) & (BITS == 2 ? 0x03030303 : 0x0f0f0f0f);
        }
    }
};

// One word of a tile that was unpacked before.
struct Unpacked {
    static constexpr int WORDS = 1, BYTES = 64;
    Ints v;

    explicit Unpacked(const uint8_t* p) : v(ints_at(p)) {}

    template <int I>
    Ints word() const {
        return v;
    }
};

constexpr int code_input(int bits, int word, int byte) {
    return bits == 2 ? 4 * byte + word : bits == 4 ? 2 * byte + word : 4 * word + byte;
}

}  // namespace
}  // namespace FEWBIT_ISA
}  // namespace fewbit
