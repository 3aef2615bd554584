// Codes out of tiles into the operands of AVX-512's dot products, and these dot products themselves.
#pragma once

#include <immintrin.h>

#include "static_for.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

template <int BITS>
struct Tile {
    static constexpr int QUADS = tile_inputs(BITS) / 4;
    __m512i v[BITS == 3 ? 3 : 1];

    Tile() = default;
    explicit Tile(const uint8_t* p) {
        for (int i = 0; i < (BITS == 3 ? 3 : 1); i++) v[i] = _mm512_loadu_si512(p + 64 * i);
    }

    // Pair I of the inputs: codes from bit AT of the 16-bit words on. Around them is anything.
    template <int I, int AT = 0>
    __m512i pair() const {
        if constexpr (BITS == 3) {
            return shifted<I % 2 ? 8 : 0>(joined<I / 2, AT>());
        } else {
            return shifted<I * BITS - AT>(v[0]);
        }
    }

    // Four inputs: the bytes are their codes.
    template <int I>
    __m512i quad() const {
        if constexpr (BITS == 8) {
            return v[0];
        } else if constexpr (BITS == 3) {
            return _mm512_and_si512(joined<I>(), _mm512_set1_epi8(7));
        } else {
            return _mm512_and_si512(_mm512_srli_epi16(v[0], I * BITS), _mm512_set1_epi8((1 << BITS) - 1));
        }
    }

private:
    template <int RIGHT>
    static __m512i shifted(__m512i words) {
        if constexpr (RIGHT > 0) return _mm512_srli_epi16(words, RIGHT);
        if constexpr (RIGHT < 0) return _mm512_slli_epi16(words, -RIGHT);
        return words;
    }

    // 3 bits: quad I, codes from bit AT of the bytes on, with anything around them.
    template <int I, int AT = 0>
    __m512i joined() const {
        const __m512i low = shifted<2 * (I % 4) - AT>(v[I / 4]), high = shifted<I - 2 - AT>(v[2]);
        return _mm512_ternarylogic_epi32(_mm512_set1_epi8(3 << AT), low, high, 0xca);  // where 3: low, elsewhere: high
    }
};

// The positions of 16 consecutive values in the order in which the dot products meet them.
template <int BITS>
__m512i sequence(bool int8) {
    alignas(64) static constexpr int32_t pairs2[16] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
    alignas(64) static constexpr int32_t pairs4[16] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
    alignas(64) static constexpr int32_t pairs8[16] = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};  // and 3
    alignas(64) static constexpr int32_t quads2[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    alignas(64) static constexpr int32_t quads4[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
    alignas(64) static constexpr int32_t quads8[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};  // and 3
    const int32_t* table = int8 ? (BITS == 2 ? quads2 : BITS == 4 ? quads4 : quads8)
                                : (BITS == 2 ? pairs2 : BITS == 4 ? pairs4 : pairs8);
    return _mm512_load_si512(table);
}

// ---- The two kinds of dot products ----

// Codes less CENTRE as bfloat16. For few rows what counts is to make them with few shifts and permutations, which the
// processor does where it does dot products; logic is done everywhere.
template <int BITS>
struct Bfloat16 {
    using Sum = __m512;
    static constexpr bool INT8 = false;
    static constexpr int PER_WORD = 2;
    static constexpr int64_t MOST_ROWS = 8;  // with three blocks of outputs, the sums fill the registers
    static constexpr int64_t STEP = 0;
    // 3 bits: the code is put into the fraction of 8.0, which it makes 8 + code.
    static constexpr int CENTRE = BITS == 3 ? -8 : 1 << (BITS - 1);

    // 2 and 4 bits: codes less CENTRE by the low five bits of a word. 8 bits: the same of the low and of the high digit.
    __m512i low, high;

    Bfloat16() {
        alignas(64) uint16_t words[32], high_words[32];
        for (int i = 0; i < 32; i++) {
            const int digit = i & (BITS == 2 ? 3 : 15);
            words[i] = to_bfloat16(static_cast<float>(digit - (BITS == 8 ? 0 : CENTRE)));
            high_words[i] = to_bfloat16(static_cast<float>(16 * digit - CENTRE));
        }
        low = _mm512_load_si512(words);
        high = _mm512_load_si512(high_words);
    }

    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum dot(Sum sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
    static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
    static __m512 value(Sum sum) { return sum; }

    // 8 bits, few rows: two dot products per pair, one for each digit. With more rows it pays to make one number of them.
    static constexpr int digits(int rows) { return BITS == 8 && rows < 4 ? 2 : 1; }

    // Dot product I of a tile is with word I / DIGITS of x.
    template <int I, int DIGITS>
    __m512i word(const Tile<BITS>& tile) const {
        if constexpr (BITS == 3) {
            const __m512i code = _mm512_set1_epi16(7 << 4), eight = _mm512_set1_epi16(0x4100);
            const __m512i pair = tile.template pair<I, 4>();  // apart: the next line is a macro in clang
            return _mm512_ternarylogic_epi32(pair, code, eight, 0xea);  // a and b, or c
        } else if constexpr (DIGITS == 2) {
            const __m512i codes = tile.template pair<I / 2>();
            return I % 2 ? _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), high) : _mm512_permutexvar_epi16(codes, low);
        } else if constexpr (BITS == 8) {
            const __m512i first = number(_mm512_srli_epi32(tile.v[0], 8 * I)), second = number(_mm512_srli_epi32(tile.v[0], 8 * I + 16));
            return _mm512_mask_mov_epi16(_mm512_srli_epi32(first, 16), 0xaaaaaaaau, second);
        } else {
            return _mm512_permutexvar_epi16(tile.template pair<I>(), low);
        }
    }

private:
    // The low byte less CENTRE, exact in the upper half: the byte is put into the fraction of 2²³.
    static __m512i number(__m512i bytes) {
        const __m512i bits = _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi32(255), _mm512_set1_epi32(0x4b000000), 0xea);
        return (__m512i)_mm512_sub_ps((__m512)bits, _mm512_set1_ps(8388608.0f + CENTRE));
    }
};

template <int BITS>
struct Int8 {
    using Sum = __m512i;
    static constexpr bool INT8 = true;
    static constexpr int PER_WORD = 4;
    static constexpr int64_t MOST_ROWS = 4;  // leaves registers for the totals: every group ends in scaling
    static constexpr int64_t STEP = 0;       // inputs that share a scale; 0: all of a group
    static constexpr int CENTRE = 0;

    static Sum zero() { return _mm512_setzero_si512(); }
    static Sum dot(Sum sum, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(sum, w, x); }
    static Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
    static __m512 value(Sum sum) { return _mm512_cvtepi32_ps(sum); }

    static constexpr int digits(int) { return 1; }

    template <int I, int DIGITS>
    __m512i word(const Tile<BITS>& tile) const {
        return tile.template quad<I>();
    }
};

// x rounded in finer steps: a third of the squared error, at three quarters of the speed.
template <int BITS>
struct FineInt8 : Int8<BITS> {
    static constexpr int64_t STEP = 16;
};

}  // namespace
}  // namespace FEWBIT_ISA
}  // namespace fewbit
