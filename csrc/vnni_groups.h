// The end of a group: its sums are scaled and added to the outputs.
#pragma once

#include "vnni_activations.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

// ---- Scales, zero points, results ----

__m512 read16(const void* p, DType type, int64_t at, __mmask16 mask) {
    if (type == DType::float32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + at);
    const __m256i h = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + at);
    return type == DType::float16 ? _mm512_cvtph_ps(h) : (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}

void write16(void* p, DType type, int64_t at, __mmask16 mask, __m512 v) {
    if (type == DType::float32) {
        _mm512_mask_storeu_ps(static_cast<float*>(p) + at, mask, v);
    } else {
        const __m256i h = type == DType::float16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)
                                                  : (__m256i)_mm512_cvtneps_pbh(v);
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + at, mask, h);
    }
}

struct Grid {
    __m512 scale, zero;

    Grid() = default;
    // For sums of codes less `centre`.
    Grid(const PackedWeight& w, int64_t group, int64_t block, int centre) {
        const int64_t at = w.grid(block, group);
        scale = read16(w.scales, w.scale_type, at, 0xffff);
        const __m512i z = w.zeros ? _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(w.zeros + at))) : _mm512_set1_epi32(w.zero);
        zero = _mm512_cvtepi32_ps(_mm512_sub_epi32(z, _mm512_set1_epi32(centre)));
    }
};

// The weights of a tile, s (q − z) rounded once to bfloat16, as words of pairs [pairs][16 outputs]. The grid is for codes
// less `Bfloat16<BITS>::CENTRE`.
template <int BITS>
void fold(const Bfloat16<BITS>& math, const Tile<BITS>& tile, const Grid& grid, uint32_t* words) {
    alignas(64) static constexpr uint16_t interleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(interleave), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const __m512 shift = _mm512_mul_ps(grid.scale, grid.zero);
    static_for<static_cast<int>(tile_inputs(BITS) / 2)>([&](auto k) {
        const __m512i codes = math.template word<decltype(k)::value, 1>(tile);
        const __m512 even = _mm512_fmsub_ps((__m512)_mm512_slli_epi32(codes, 16), grid.scale, shift);
        const __m512 odd = _mm512_fmsub_ps((__m512)_mm512_and_si512(codes, upper), grid.scale, shift);
        const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
        _mm512_storeu_si512(words + decltype(k)::value * 16, _mm512_permutexvar_epi16(order, pairs));
    });
}

inline void write_result(const PackedWeight& w, const MatMul& p, int64_t token, int64_t block, __m512 y) {
    const __mmask16 mask = existing(w.outputs - block * BLOCK);
    if (p.bias) y = _mm512_add_ps(y, read16(p.bias, p.bias_type, block * BLOCK, mask));
    write16(p.y, p.type, token * w.outputs + block * BLOCK, mask, y);
}

// ---- Groups ----

// What the sums of a group start from. Where the zero point is the same everywhere, int8 products have it from the
// start (CENTRED).
template <class Math, bool CENTRED>
inline typename Math::Sum start(const PackedWeight& w, const RowTile& tile, int64_t at, bool last) {
    if constexpr (CENTRED) return _mm512_set1_epi32(last ? -w.zero * static_cast<int>(tile.sums[at]) : 0);
    return Math::zero();
}

// Scales the sums of a group (or, without `last`, of a part of it) and adds them to the totals.
template <class Math, int ROWS, int BLOCKS, bool SPLIT, bool CENTRED, int TOKENS = ROWS / (SPLIT ? 2 : 1)>
inline void add_group(const Grid* grid, const RowTile& tile, int64_t group, bool last,
                      const typename Math::Sum (&sum)[ROWS][BLOCKS], __m512 (&total)[TOKENS][BLOCKS]) {
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
        const int64_t at = group * TOKENS + t;
        const __m512 x_sum = _mm512_set1_ps(last ? tile.sums[at] : 0.0f);
#pragma GCC unroll 4
        for (int n = 0; n < BLOCKS; n++) {
            const auto both = SPLIT ? Math::add(sum[SPLIT ? 2 * t : t][n], sum[SPLIT ? 2 * t + 1 : t][n]) : sum[t][n];
            __m512 value = Math::value(both), scale = grid[n].scale;
            if constexpr (!CENTRED) value = _mm512_fnmadd_ps(grid[n].zero, x_sum, value);
            if constexpr (Math::INT8) scale = _mm512_mul_ps(scale, _mm512_set1_ps(tile.scales[at]));
            total[t][n] = _mm512_fmadd_ps(value, scale, total[t][n]);
        }
    }
}

// The same as a separate function. Where the sums fill the registers, the compiler would otherwise write them
// to memory in every turn of the inner loop, for want of room after it.
template <class Math, int ROWS, int BLOCKS, bool SPLIT, bool CENTRED, int TOKENS = ROWS / (SPLIT ? 2 : 1)>
__attribute__((noinline)) void add_group_apart(const Grid* grid, const RowTile& tile, int64_t group, bool last,
                                               const typename Math::Sum (&sum)[ROWS][BLOCKS], __m512 (&total)[TOKENS][BLOCKS]) {
    add_group<Math, ROWS, BLOCKS, SPLIT, CENTRED>(grid, tile, group, last, sum, total);
}

}  // namespace
}  // namespace FEWBIT_ISA
}  // namespace fewbit
