// x as operands of the dot products: rounded, in their order, rows that are multiplied in one pass side by side.
#pragma once

#include <algorithm>
#include <vector>

#include "activations.h"
#include "threads.h"
#include "vnni_codes.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

__mmask16 existing(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1); }

// Rows that are multiplied in one pass: `tokens` of them, each as one row of words or as two (SPLIT) that add up to it.
struct RowTile {
    int64_t token, tokens;
    uint32_t* words;   // [positions / PER_WORD][rows]
    float* sums;       // [groups][tokens]; where steps have scales, of x as it was rounded, otherwise of what enters the products
    float* scales;     // [steps][tokens], int8 only
};

// Inputs of a group that share a scale: all, or STEP of them, and the rest at its end.
template <class Math>
int64_t steps_of(const PackedWeight& w, int64_t group) {
    const int64_t inputs = (w.starts[group + 1] - w.starts[group]) * tile_inputs(w.bits);
    return !Math::INT8 ? 0 : Math::STEP ? (inputs + Math::STEP - 1) / Math::STEP : 1;
}

float sum16(const float* p, int64_t count) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(existing(count - i), p + i));
    return _mm512_reduce_add_ps(sum);
}

float largest16(const float* p, int64_t count) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int64_t i = 0; i < count; i += 16) {
        const __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(existing(count - i), p + i));
        nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, v);
    }
    return nan ? from_bits(0x7fc00000u) : _mm512_reduce_max_ps(most);
}

// bfloat16 words of one row; with `rest`, also words of the rounding error. Returns through `sums` [groups].
void bfloat16_row(const PackedWeight& w, float* values, uint32_t* words, uint32_t* rest, int64_t stride, float* sums, int64_t sum_stride) {
    const int64_t positions = w.positions(), inputs = tile_inputs(w.bits);
    for (int64_t i = 0; i < positions; i += 16) {
        const __m512 v = _mm512_loadu_ps(values + i);
        const __m256i h = (__m256i)_mm512_cvtneps_pbh(v);
        const __m512 rounded = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
        alignas(32) uint32_t parts[2][8];
        _mm256_store_si256((__m256i*)parts[0], h);
        __m512 used = rounded;
        if (rest) {
            // An infinite or huge x has no rest.
            const __m512 left = _mm512_sub_ps(v, rounded);
            const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(left), _mm512_set1_ps(3e38f), _CMP_LT_OQ);
            const __m256i l = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mov_ps(finite, left));
            _mm256_store_si256((__m256i*)parts[1], l);
            used = _mm512_add_ps(used, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(l), 16));
        }
        _mm512_storeu_ps(values + i, used);
        if (stride == 1 && !rest) {  // the buffer has room for whole vectors
            _mm256_storeu_si256((__m256i*)(words + i / 2), h);
            continue;
        }
        const int64_t count = std::min<int64_t>(8, (positions - i) / 2);
        for (int64_t j = 0; j < count; j++) {
            words[(i / 2 + j) * stride] = parts[0][j];
            if (rest) rest[(i / 2 + j) * stride] = parts[1][j];
        }
    }
    for (int64_t g = 0; g < w.groups; g++)
        sums[g * sum_stride] = sum16(values + w.starts[g] * inputs, (w.starts[g + 1] - w.starts[g]) * inputs);
}

// int8 words of one row, one scale per group.
void int8_row(const PackedWeight& w, const float* values, uint32_t* words, int64_t stride, float* sums, float* scales) {
    const int64_t inputs = tile_inputs(w.bits);
    for (int64_t g = 0; g < w.groups; g++) {
        const int64_t first = w.starts[g] * inputs, last = w.starts[g + 1] * inputs;
        const float most = largest16(values + first, last - first);
        const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = first; i < last; i += 16) {
            const __m512 v = _mm512_maskz_loadu_ps(existing(last - i), values + i);
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse)));
            sum = _mm512_add_epi32(sum, q);
            alignas(16) uint32_t parts[4];
            _mm_store_si128((__m128i*)parts, _mm512_cvtepi32_epi8(q));
            for (int64_t j = 0; j < std::min<int64_t>(4, (last - i) / 4); j++) words[(i / 4 + j) * stride] = parts[j];
        }
        sums[g * stride] = static_cast<float>(_mm512_reduce_add_epi32(sum));
        scales[g * stride] = most / 127.0f;
    }
}

// One row as bytes, one scale for 16 inputs or the last ones of a group.
void int8_steps_row(const PackedWeight& w, const float* values, int8_t* bytes, int64_t stride, float* sums, float* scales) {
    const int64_t inputs = tile_inputs(w.bits);
    for (int64_t g = 0; g < w.groups; g++) {
        const int64_t last = w.starts[g + 1] * inputs;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = w.starts[g] * inputs; i < last; i += 16, scales += stride) {
            const __m512 v = _mm512_maskz_loadu_ps(existing(last - i), values + i);
            // As integers magnitudes are in their order, and not-a-number is above all.
            const uint32_t bits = _mm512_reduce_max_epu32(_mm512_castps_si512(_mm512_abs_ps(v)));
            const float most = from_bits(bits);
            const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse)));
            _mm_storeu_si128((__m128i*)(bytes + i), _mm512_cvtepi32_epi8(q));  // what is too much is written over
            *scales = most / 127.0f;
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(*scales), sum);
        }
        sums[g * stride] = _mm512_reduce_add_ps(sum);
    }
}

// Rows of bytes, `stride` apart, as words side by side.
void interleave(const int8_t* bytes, int64_t stride, int64_t rows, int64_t count, uint32_t* words) {
    if (rows != 4) {
        for (int64_t i = 0; i < count; i++)
            for (int64_t r = 0; r < rows; r++) std::memcpy(words + i * rows + r, bytes + r * stride + 4 * i, 4);
        return;
    }
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t i = 0; i < count; i += 4) {
        __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(bytes + 4 * i)));
        v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(bytes + stride + 4 * i)), 1);
        v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(bytes + 2 * stride + 4 * i)), 2);
        v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(bytes + 3 * stride + 4 * i)), 3);
        _mm512_mask_storeu_epi32(words + 4 * i, existing(4 * (count - i)), _mm512_permutexvar_epi32(order, v));
    }
}

template <int BITS, class Math, bool SPLIT>
void prepare(const PackedWeight& w, const MatMul& p, const RowTile& tile) {
    Row row(w);
    const __m512i order = sequence<BITS>(Math::INT8);
    const int64_t rows = tile.tokens * (SPLIT ? 2 : 1), positions = w.positions(), stride = positions + 16;
    const Buffer<int8_t> bytes(Math::STEP ? rows * stride : 0, false);
    for (int64_t t = 0; t < tile.tokens; t++) {
        float* values = row.read(p, tile.token + t);
        for (int64_t i = 0; i < positions; i += 16)
            _mm512_storeu_ps(values + i, _mm512_permutexvar_ps(order, _mm512_loadu_ps(values + i)));
        uint32_t* words = tile.words + t * (SPLIT ? 2 : 1);
        if constexpr (Math::STEP > 0) {
            int8_steps_row(w, values, bytes.data() + t * stride, rows, tile.sums + t, tile.scales + t);
        } else if constexpr (Math::INT8) {
            int8_row(w, values, words, rows, tile.sums + t, tile.scales + t);
        } else {
            bfloat16_row(w, values, words, SPLIT ? words + 1 : nullptr, rows, tile.sums + t, tile.tokens);
        }
    }
    if constexpr (Math::STEP > 0) interleave(bytes.data(), stride, rows, positions / 4, tile.words);
}

// All rows of x, in tiles.
class Activations {
public:
    template <int BITS, class Math, bool SPLIT>
    static Activations make(const PackedWeight& w, const MatMul& p, int threads) {
        constexpr int64_t rows_per_token = SPLIT ? 2 : 1;
        const int64_t row_words = w.positions() / Math::PER_WORD;
        int64_t steps = 0;
        for (int64_t g = 0; g < w.groups; g++) steps += steps_of<Math>(w, g);
        Activations all(p.tokens * rows_per_token * row_words, p.tokens * (w.groups + steps));
        for (int64_t token = 0; token < p.tokens;) {
            int64_t count = Math::MOST_ROWS / rows_per_token;
            while (count > p.tokens - token) count /= 2;
            all.tiles.push_back({token, count, all.words_.data() + token * rows_per_token * row_words,
                                 all.numbers_.data() + token * w.groups, all.numbers_.data() + p.tokens * w.groups + token * steps});
            token += count;
        }
        parallel_for(static_cast<int64_t>(all.tiles.size()), threads,
                     [&](int64_t i) { prepare<BITS, Math, SPLIT>(w, p, all.tiles[static_cast<size_t>(i)]); });
        return all;
    }

    std::vector<RowTile> tiles;

private:
    Activations(int64_t words, int64_t numbers) : words_(words, false), numbers_(numbers, false) {}

    Buffer<uint32_t> words_;
    Buffer<float> numbers_;
};

}  // namespace
}  // namespace FEWBIT_ISA
}  // namespace fewbit
