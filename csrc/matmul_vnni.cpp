// y = x Ŵᵀ with the dot products of AVX-512: pairs of bfloat16 (x as it is; float32 and float16 as the sum of two
// bfloat16) or quadruples of int8 (x rounded per token and group). Codes enter the products exactly; scales and
// zero points are applied to the sums of a group in float32, the zero points through the sums of x:
//
//   y_n = Σ_g s_gn · (Σ_k x_k (q_kn − c) − (z_gn − c) Σ_k x_k)
//
// For few tokens, tiles are unpacked on the way to the dot product, so that every packed byte is read once. For many,
// 48 outputs are unpacked into the second-level cache and used for all tokens. Every output is summed
// in an order that depends on neither the threads nor the other tokens.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "activations.h"
#include "threads.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

// ---- Codes out of tiles ----

template <int BITS>
struct Tile {
    static constexpr int PAIRS = tile_inputs(BITS) / 2, QUADS = tile_inputs(BITS) / 4;
    __m512i v[BITS == 3 ? 3 : 1];

    Tile() = default;
    explicit Tile(const uint8_t* p) {
        for (int i = 0; i < (BITS == 3 ? 3 : 1); i++) v[i] = _mm512_loadu_si512(p + 64 * i);
    }

    // Pair I of the inputs: codes in the low bits of the 16-bit words. Above them is anything.
    template <int I>
    __m512i pair() const {
        if constexpr (BITS == 3) {
            return I % 2 ? _mm512_srli_epi16(joined<I / 2>(), 8) : joined<I / 2>();
        } else {
            return _mm512_srli_epi16(v[0], I * BITS);
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
    // 3 bits: quad I, with anything above the codes.
    template <int I>
    __m512i joined() const {
        const __m512i low = _mm512_srli_epi16(v[I / 4], 2 * (I % 4));
        const __m512i high = I < 2 ? _mm512_slli_epi16(v[2], I < 2 ? 2 - I : 0) : _mm512_srli_epi16(v[2], I < 2 ? 0 : I - 2);
        return _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), low, high, 0xca);  // where 3: low, elsewhere: high
    }
};

template <int... I, class F>
inline void each_index(std::integer_sequence<int, I...>, F f) {
    (f(std::integral_constant<int, I>()), ...);
}

// f(integral_constant) for 0 … COUNT − 1.
template <int COUNT, class F>
inline void each(F f) {
    each_index(std::make_integer_sequence<int, COUNT>(), f);
}

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

template <int BITS>
struct Bfloat16 {
    using Sum = __m512;
    static constexpr bool INT8 = false;
    static constexpr int PER_WORD = 2;
    static constexpr int64_t MOST_ROWS = 8;  // with three blocks of outputs, the sums fill the registers
    static constexpr int CENTRE = 1 << (BITS - 1);

    // Codes − CENTRE by the low five bits of a word; at 8 bits those of the low and of the high digit.
    __m512i low, high;

    Bfloat16() {
        alignas(64) uint16_t words[32], high_words[32];
        for (int i = 0; i < 32; i++) {
            const int code = i & (BITS == 8 ? 15 : (1 << BITS) - 1);
            words[i] = to_bfloat16(static_cast<float>(code - (BITS == 8 ? 0 : CENTRE)));
            high_words[i] = to_bfloat16(static_cast<float>(16 * code - CENTRE));
        }
        low = _mm512_load_si512(words);
        high = _mm512_load_si512(high_words);
    }

    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum dot(Sum sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
    static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
    static __m512 value(Sum sum) { return sum; }

    // Dot product I of a tile is with word I / DIGITS of x.
    static constexpr int DIGITS = BITS == 8 ? 2 : 1, DOTS = Tile<BITS>::PAIRS * DIGITS;

    template <int I>
    __m512i word(const Tile<BITS>& tile) const {
        const __m512i codes = tile.template pair<I / DIGITS>();
        if constexpr (I % DIGITS == 1) return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), high);
        return _mm512_permutexvar_epi16(codes, low);
    }
};

template <int BITS>
struct Int8 {
    using Sum = __m512i;
    static constexpr bool INT8 = true;
    static constexpr int PER_WORD = 4;
    static constexpr int64_t MOST_ROWS = 4;  // leaves registers for the totals: every group ends in scaling
    static constexpr int CENTRE = 0;

    static Sum zero() { return _mm512_setzero_si512(); }
    static Sum dot(Sum sum, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(sum, w, x); }
    static Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
    static __m512 value(Sum sum) { return _mm512_cvtepi32_ps(sum); }

    static constexpr int DIGITS = 1, DOTS = Tile<BITS>::QUADS;

    template <int I>
    __m512i word(const Tile<BITS>& tile) const {
        return tile.template quad<I>();
    }
};

// ---- Scales, zero points, results ----

__mmask16 existing(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1); }

__m512 read16(const void* p, Number type, int64_t at, __mmask16 mask) {
    if (type == Number::float32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + at);
    const __m256i h = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + at);
    return type == Number::float16 ? _mm512_cvtph_ps(h) : (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}

void write16(void* p, Number type, int64_t at, __mmask16 mask, __m512 v) {
    if (type == Number::float32) {
        _mm512_mask_storeu_ps(static_cast<float*>(p) + at, mask, v);
    } else {
        const __m256i h = type == Number::float16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)
                                                  : (__m256i)_mm512_cvtneps_pbh(v);
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + at, mask, h);
    }
}

struct Grid {
    __m512 scale, zero;

    Grid() = default;
    Grid(const PackedWeight& w, int64_t group, int64_t block, int centre) {
        const __mmask16 mask = existing(w.outputs - block * BLOCK);
        const int64_t at = group * w.outputs + block * BLOCK;
        scale = read16(w.scales, w.scale_type, at, mask);
        const __m512i z = w.zeros ? _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w.zeros + at)) : _mm512_set1_epi32(w.zero);
        zero = _mm512_cvtepi32_ps(_mm512_sub_epi32(z, _mm512_set1_epi32(centre)));
    }
};

void write_result(const PackedWeight& w, const MatMul& p, int64_t token, int64_t block, __m512 y) {
    const __mmask16 mask = existing(w.outputs - block * BLOCK);
    if (p.bias) y = _mm512_add_ps(y, read16(p.bias, p.bias_type, block * BLOCK, mask));
    write16(p.y, p.type, token * w.outputs + block * BLOCK, mask, y);
}

// ---- Activations ----

// Rows that are multiplied together: `tokens` of them, each as one row of words or as two (SPLIT) that add up to it.
struct RowTile {
    int64_t token, tokens;
    uint32_t* words;   // [positions / PER_WORD][rows]
    float* sums;       // [groups][tokens]
    float* scales;     // [groups][tokens], int8 only
};


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

// bfloat16 words of one row; with `rest`, also those of what rounding took away. Returns through `sums` [groups].
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
void int8_row(const PackedWeight& w, float* values, uint32_t* words, int64_t stride, float* sums, float* scales, int64_t sum_stride) {
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
        sums[g * sum_stride] = static_cast<float>(_mm512_reduce_add_epi32(sum));
        scales[g * sum_stride] = most / 127.0f;
    }
}

template <int BITS, class Math, bool SPLIT>
void prepare(const PackedWeight& w, const MatMul& p, const RowTile& tile) {
    Row row(w);
    const __m512i order = sequence<BITS>(Math::INT8);
    const int64_t rows = tile.tokens * (SPLIT ? 2 : 1);
    for (int64_t t = 0; t < tile.tokens; t++) {
        float* values = row.read(p, tile.token + t);
        for (int64_t i = 0; i < w.positions(); i += 16)
            _mm512_storeu_ps(values + i, _mm512_permutexvar_ps(order, _mm512_loadu_ps(values + i)));
        uint32_t* words = tile.words + t * (SPLIT ? 2 : 1);
        if constexpr (Math::INT8) {
            int8_row(w, values, words, rows, tile.sums + t, tile.scales + t, tile.tokens);
        } else {
            bfloat16_row(w, values, words, SPLIT ? words + 1 : nullptr, rows, tile.sums + t, tile.tokens);
        }
    }
}

// All rows of x, in tiles.
class Activations {
public:
    template <int BITS, class Math, bool SPLIT>
    static Activations make(const PackedWeight& w, const MatMul& p, int threads) {
        constexpr int64_t rows_per_token = SPLIT ? 2 : 1;
        const int64_t row_words = w.positions() / Math::PER_WORD;
        Activations all(p.tokens * rows_per_token * row_words, 2 * p.tokens * w.groups);
        for (int64_t token = 0; token < p.tokens;) {
            int64_t count = Math::MOST_ROWS / rows_per_token;
            while (count > p.tokens - token) count /= 2;
            all.tiles.push_back({token, count, all.words_.data() + token * rows_per_token * row_words,
                                 all.numbers_.data() + token * w.groups, all.numbers_.data() + (p.tokens + token) * w.groups});
            token += count;
        }
        parallel_for(static_cast<int64_t>(all.tiles.size()), threads,
                     [&](int64_t i) { prepare<BITS, Math, SPLIT>(w, p, all.tiles[static_cast<size_t>(i)]); });
        return all;
    }

    std::vector<RowTile> tiles;

private:
    Activations(int64_t words, int64_t numbers) : words_(words), numbers_(numbers) {}

    Buffer<uint32_t> words_;
    Buffer<float> numbers_;
};

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

// The same as a function of its own. Where the sums fill the registers, the compiler would otherwise write them
// to memory in every turn of the inner loop, for want of room after it.
template <class Math, int ROWS, int BLOCKS, bool SPLIT, bool CENTRED, int TOKENS = ROWS / (SPLIT ? 2 : 1)>
__attribute__((noinline)) void add_group_apart(const Grid* grid, const RowTile& tile, int64_t group, bool last,
                                               const typename Math::Sum (&sum)[ROWS][BLOCKS], __m512 (&total)[TOKENS][BLOCKS]) {
    add_group<Math, ROWS, BLOCKS, SPLIT, CENTRED>(grid, tile, group, last, sum, total);
}

// ---- Few tokens: tiles unpacked on the way ----

// Scales and zero points of a few blocks are far from those of the next group: no hardware foresees them.
void expect_group(const PackedWeight& w, int64_t group, int64_t block, int64_t blocks) {
    if (group >= w.groups) return;
    const int64_t at = group * w.outputs + block * BLOCK, size = w.scale_type == Number::float32 ? 4 : 2;
    const char* scales = static_cast<const char*>(w.scales) + at * size;
    for (int64_t byte = 0; byte < blocks * BLOCK * size; byte += 64) _mm_prefetch(scales + byte, _MM_HINT_T0);
    if (w.zeros) _mm_prefetch(reinterpret_cast<const char*>(w.zeros + at), _MM_HINT_T0);
}

template <int BITS, class Math, int ROWS, int BLOCKS, bool SPLIT, bool CENTRED>
void direct(const PackedWeight& w, const MatMul& p, const RowTile& tile, int64_t block) {
    constexpr int TOKENS = ROWS / (SPLIT ? 2 : 1);
    constexpr int CHAINS = ROWS == 1 ? 2 : 1;  // enough independent sums to hide the latency of a dot product
    constexpr int64_t BYTES = tile_bytes(BITS), WORDS = tile_inputs(BITS) / Math::PER_WORD, AHEAD = 1536;
    const Math math;
    const uint8_t* weights = w.tiles + block * w.block_bytes();
    const int64_t block_bytes = w.block_bytes();
    const int64_t next = (BLOCKS - 1) * block_bytes;  // what follows the end of a block is, in the next call, its successor
    __m512 total[TOKENS][BLOCKS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
        for (int n = 0; n < BLOCKS; n++) total[t][n] = _mm512_setzero_ps();
    const int64_t groups_ahead = 1 + AHEAD * w.groups / block_bytes;
    for (int64_t g = 0; g < w.groups; g++) {
        if constexpr (ROWS <= 4) expect_group(w, g + groups_ahead, block, BLOCKS);
        typename Math::Sum sum[ROWS * CHAINS][BLOCKS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS * CHAINS; r++) {
            const auto first = r < ROWS ? start<Math, CENTRED>(w, tile, g * TOKENS + r, true) : Math::zero();
#pragma GCC unroll 4
            for (int n = 0; n < BLOCKS; n++) sum[r][n] = first;
        }
        for (int64_t i = w.starts[g]; i < w.starts[g + 1]; i++) {
            const uint32_t* x = tile.words + i * WORDS * ROWS;
            Tile<BITS> codes[BLOCKS];
#pragma GCC unroll 4
            for (int n = 0; n < BLOCKS; n++) {
                const uint8_t* from = weights + n * block_bytes + i * BYTES;
                if constexpr (ROWS <= 4) {
                    const uint8_t* ahead = from + AHEAD + (i * BYTES + AHEAD < block_bytes ? 0 : next);
                    for (int64_t line = 0; line < BYTES; line += 64) _mm_prefetch((const char*)(ahead + line), _MM_HINT_T0);
                }
                codes[n] = Tile<BITS>(from);
            }
            each<Math::DOTS>([&](auto dot) {
                constexpr int k = decltype(dot)::value;
                __m512i v[BLOCKS];
#pragma GCC unroll 4
                for (int n = 0; n < BLOCKS; n++) v[n] = math.template word<k>(codes[n]);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const __m512i broadcast = _mm512_set1_epi32(static_cast<int>(x[k / Math::DIGITS * ROWS + r]));
#pragma GCC unroll 4
                    for (int n = 0; n < BLOCKS; n++) {
                        auto& s = sum[CHAINS == 2 ? k % 2 : r][n];
                        s = Math::dot(s, v[n], broadcast);
                    }
                }
            });
        }
        if constexpr (CHAINS == 2)
            for (int n = 0; n < BLOCKS; n++) sum[0][n] = Math::add(sum[0][n], sum[1][n]);
        typename Math::Sum finished[ROWS][BLOCKS];
        Grid grid[BLOCKS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int n = 0; n < BLOCKS; n++) finished[r][n] = sum[r][n];
#pragma GCC unroll 4
        for (int n = 0; n < BLOCKS; n++) grid[n] = Grid(w, g, block + n, Math::CENTRE);
        if constexpr (ROWS * BLOCKS > 12) {
            add_group_apart<Math, ROWS, BLOCKS, SPLIT, CENTRED>(grid, tile, g, true, finished, total);
        } else {
            add_group<Math, ROWS, BLOCKS, SPLIT, CENTRED>(grid, tile, g, true, finished, total);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
        for (int n = 0; n < BLOCKS; n++) write_result(w, p, tile.token + t, block + n, total[t][n]);
}

// Calls f(integral_constant) with the rows of a tile.
template <bool SPLIT, class F>
void with_rows(const RowTile& tile, F f) {
    switch (tile.tokens * (SPLIT ? 2 : 1)) {
        case 8: f(std::integral_constant<int, 8>()); break;
        case 4: f(std::integral_constant<int, 4>()); break;
        case 2: f(std::integral_constant<int, 2>()); break;
        default:
            if constexpr (!SPLIT) f(std::integral_constant<int, 1>());
    }
}

// Blocks first … last of the outputs, BLOCKS at a time.
template <int BITS, class Math, bool SPLIT, bool CENTRED, int BLOCKS>
void direct_blocks(const PackedWeight& w, const MatMul& p, const Activations& x, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block += BLOCKS)
        for (const RowTile& tile : x.tiles)
            with_rows<SPLIT>(tile, [&](auto rows) {
                constexpr int ROWS = decltype(rows)::value;
                if (last - block >= BLOCKS) {
                    direct<BITS, Math, ROWS, BLOCKS, SPLIT, CENTRED>(w, p, tile, block);
                } else {
                    for (int64_t one = block; one < last; one++) direct<BITS, Math, ROWS, 1, SPLIT, CENTRED>(w, p, tile, one);
                }
            });
}

template <int BITS, class Math, bool SPLIT, bool CENTRED>
void few_tokens(const PackedWeight& w, const MatMul& p, const Activations& x, int threads) {
    // Eight rows and three blocks fill the registers, and so do four rows with their totals; fewer leave room for four blocks.
    const bool wide = x.tiles.front().tokens * (SPLIT ? 2 : 1) < 4;
    const int64_t together = wide ? 4 : 3, units = (w.blocks() + together - 1) / together;
    // A few long pieces per thread: neighbours are read by the same thread, and a late thread leaves work to the others.
    const int64_t pieces = threads == 1 ? 1 : std::min<int64_t>(units, 4 * threads);
    parallel_for(pieces, threads, [&](int64_t piece) {
        const int64_t first = units * piece / pieces * together;
        const int64_t last = std::min(w.blocks(), units * (piece + 1) / pieces * together);
        if (wide) {
            direct_blocks<BITS, Math, SPLIT, CENTRED, 4>(w, p, x, first, last);
        } else {
            direct_blocks<BITS, Math, SPLIT, CENTRED, 3>(w, p, x, first, last);
        }
    });
}

// ---- Many tokens: outputs unpacked once, then used for all of them ----

constexpr int PANEL_BLOCKS = 3;
constexpr int64_t PANEL_POSITIONS = 5120;  // at 2 bytes and 48 outputs half of a one-megabyte cache

// Part of a group in a panel. Folded weights have no groups: their scale is in them.
struct Segment {
    int64_t group, first_tile, last_tile;
    bool last;
};

// Whether weights are unpacked with their scale: one rounding to bfloat16, as in a dense bfloat16 weight.
template <class Math, bool SPLIT>
constexpr bool FOLDED = !Math::INT8 && !SPLIT;

template <int BITS, class Math, bool SPLIT>
class Panel {
public:
    Panel(const PackedWeight& w, int64_t block, int64_t blocks, uint32_t* words, Grid* grids)
        : w_(w), block_(block), blocks_(blocks), words_(words), grids_(grids) {}

    void unpack(const std::vector<Segment>& segments) {
        first_tile_ = segments.front().first_tile;
        stride_ = (segments.back().last_tile - first_tile_) * WORDS * 16;
        for (int64_t n = 0; n < blocks_; n++)
            for (size_t s = 0; s < segments.size(); s++) {
                const Segment& segment = segments[s];
                const Grid grid(w_, segment.group, block_ + n, FOLDED<Math, SPLIT> ? 0 : Math::CENTRE);
                grids_[s * PANEL_BLOCKS + static_cast<size_t>(n)] = grid;
                for (int64_t i = segment.first_tile; i < segment.last_tile; i++)
                    unpack_tile(Tile<BITS>(w_.tiles + (block_ + n) * w_.block_bytes() + i * tile_bytes(BITS)), grid,
                                words_ + n * stride_ + (i - first_tile_) * WORDS * 16);
            }
    }

    // Adds the products with the ROWS rows of a tile to the totals [tokens][PANEL_BLOCKS][16].
    template <int ROWS, bool CENTRED>
    void multiply(const RowTile& tile, const std::vector<Segment>& segments, float* totals) const {
        constexpr int TOKENS = ROWS / (SPLIT ? 2 : 1);
        __m512 total[TOKENS][PANEL_BLOCKS];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 3
            for (int n = 0; n < PANEL_BLOCKS; n++) total[t][n] = _mm512_loadu_ps(totals + (t * PANEL_BLOCKS + n) * 16);
        for (size_t s = 0; s < segments.size();) {
            const size_t end = FOLDED<Math, SPLIT> ? segments.size() : s + 1;  // folded segments are one
            typename Math::Sum sum[ROWS][PANEL_BLOCKS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const auto first = start<Math, CENTRED>(w_, tile, segments[s].group * TOKENS + r, segments[s].last);
#pragma GCC unroll 3
                for (int n = 0; n < PANEL_BLOCKS; n++) sum[r][n] = first;
            }
            const int64_t first = segments[s].first_tile * WORDS, count = segments[end - 1].last_tile * WORDS - first;
            const uint32_t* x = tile.words + first * ROWS;
            const uint32_t* weights = words_ + (first - first_tile_ * WORDS) * 16;
            for (int64_t k = 0; k < count; k++, x += ROWS, weights += 16) {
                __m512i v[PANEL_BLOCKS];
#pragma GCC unroll 3
                for (int n = 0; n < PANEL_BLOCKS; n++) v[n] = _mm512_loadu_si512(weights + n * stride_);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const __m512i broadcast = _mm512_set1_epi32(static_cast<int>(x[r]));
#pragma GCC unroll 3
                    for (int n = 0; n < PANEL_BLOCKS; n++) sum[r][n] = Math::dot(sum[r][n], v[n], broadcast);
                }
            }
            if constexpr (FOLDED<Math, SPLIT>) {
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 3
                    for (int n = 0; n < PANEL_BLOCKS; n++) total[t][n] = _mm512_add_ps(total[t][n], sum[t][n]);
            } else {
                add_group<Math, ROWS, PANEL_BLOCKS, SPLIT, CENTRED>(grids_ + s * PANEL_BLOCKS, tile, segments[s].group, segments[s].last, sum, total);
            }
            s = end;
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 3
            for (int n = 0; n < PANEL_BLOCKS; n++) _mm512_storeu_ps(totals + (t * PANEL_BLOCKS + n) * 16, total[t][n]);
    }

private:
    static constexpr int64_t WORDS = tile_inputs(BITS) / Math::PER_WORD;  // of a lane in a tile

    void unpack_tile(const Tile<BITS>& tile, const Grid& grid, uint32_t* words) const {
        if constexpr (Math::INT8) {
            each<Tile<BITS>::QUADS>([&](auto k) {
                _mm512_storeu_si512(words + decltype(k)::value * 16, tile.template quad<decltype(k)::value>());
            });
        } else {
            const __m512 scale = FOLDED<Math, SPLIT> ? grid.scale : _mm512_set1_ps(1.0f);
            const __m512 zero = FOLDED<Math, SPLIT> ? grid.zero : _mm512_set1_ps(static_cast<float>(Math::CENTRE));
            const __m512 shift = _mm512_mul_ps(scale, zero);
            const __m512i mask = _mm512_set1_epi32((1 << BITS) - 1);
            each<Tile<BITS>::PAIRS>([&](auto k) {
                const __m512i v = tile.template pair<decltype(k)::value>();
                const __m512 even = _mm512_cvtepi32_ps(_mm512_and_si512(v, mask));
                const __m512 odd = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(v, 16), mask));
                const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_fmsub_ps(even, scale, shift)));
                const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_fmsub_ps(odd, scale, shift)));
                _mm512_storeu_si512(words + decltype(k)::value * 16, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            });
        }
    }

    const PackedWeight& w_;
    int64_t block_, blocks_, first_tile_ = 0, stride_ = 0;
    uint32_t* words_;
    Grid* grids_;  // [segments][PANEL_BLOCKS]
};

// The groups, cut where a panel is full.
std::vector<std::vector<Segment>> panel_segments(const PackedWeight& w) {
    const int64_t limit = PANEL_POSITIONS / tile_inputs(w.bits);
    std::vector<std::vector<Segment>> panels(1);
    int64_t used = 0;
    for (int64_t g = 0; g < w.groups; g++)
        for (int64_t first = w.starts[g]; first < w.starts[g + 1];) {
            if (used == limit) panels.emplace_back(), used = 0;
            const int64_t last = std::min<int64_t>(w.starts[g + 1], first + limit - used);
            panels.back().push_back({g, first, last, last == w.starts[g + 1]});
            used += last - first;
            first = last;
        }
    return panels;
}

template <int BITS, class Math, bool SPLIT, bool CENTRED>
void panel_tasks(const PackedWeight& w, const MatMul& p, const Activations& x, std::atomic<int64_t>& next) {
    const auto panels = panel_segments(w);
    const int64_t positions = std::min(PANEL_POSITIONS, w.positions()), total_size = PANEL_BLOCKS * 16;
    Buffer<uint32_t> words(positions / Math::PER_WORD * total_size);
    Buffer<float> totals(p.tokens * total_size);
    size_t most = 0;
    for (const auto& segments : panels) most = std::max(most, segments.size());
    Buffer<Grid> grids(static_cast<int64_t>(most) * PANEL_BLOCKS);
    const int64_t tasks = (w.blocks() + PANEL_BLOCKS - 1) / PANEL_BLOCKS;
    for (int64_t task = next++; task < tasks; task = next++) {
        const int64_t block = task * PANEL_BLOCKS, blocks = std::min<int64_t>(PANEL_BLOCKS, w.blocks() - block);
        std::memset(totals.data(), 0, static_cast<size_t>(p.tokens * total_size) * sizeof(float));
        Panel<BITS, Math, SPLIT> panel(w, block, blocks, words.data(), grids.data());
        for (const std::vector<Segment>& segments : panels) {
            panel.unpack(segments);
            for (const RowTile& tile : x.tiles) {
                with_rows<SPLIT>(tile, [&](auto rows) {
                    float* at = totals.data() + tile.token * total_size;
                    constexpr int ROWS = decltype(rows)::value;
                    panel.template multiply<ROWS, CENTRED>(tile, segments, at);
                });
            }
        }
        for (int64_t token = 0; token < p.tokens; token++)
            for (int64_t n = 0; n < blocks; n++)
                write_result(w, p, token, block + n, _mm512_loadu_ps(totals.data() + token * total_size + n * 16));
    }
}

template <int BITS, class Math, bool SPLIT, bool CENTRED>
void many_tokens(const PackedWeight& w, const MatMul& p, const Activations& x, int threads) {
    std::atomic<int64_t> next{0};
    parallel_for(threads, threads, [&](int64_t) { panel_tasks<BITS, Math, SPLIT, CENTRED>(w, p, x, next); });
}

template <int BITS, class Math, bool SPLIT, bool CENTRED = false>
void run(const PackedWeight& w, const MatMul& p, int threads) {
    // From here on unpacking once is faster than unpacking for every few rows (benchmarks/kernels_cpu.py).
    constexpr int64_t PANEL_FROM = Math::INT8 ? 40 : SPLIT ? 32 : BITS == 8 ? 16 : 64;
    const Activations x = Activations::make<BITS, Math, SPLIT>(w, p, threads);
    if (p.tokens >= PANEL_FROM) {
        many_tokens<BITS, Math, SPLIT, CENTRED>(w, p, x, threads);
    } else {
        few_tokens<BITS, Math, SPLIT, CENTRED>(w, p, x, threads);
    }
}

template <int BITS>
void run_bits(const PackedWeight& w, const MatMul& p, int threads) {
    if (p.int8 && !w.zeros) {
        run<BITS, Int8<BITS>, false, true>(w, p, threads);
    } else if (p.int8) {
        run<BITS, Int8<BITS>, false>(w, p, threads);
    } else if (p.type == Number::bfloat16) {
        run<BITS, Bfloat16<BITS>, false>(w, p, threads);
    } else {
        run<BITS, Bfloat16<BITS>, true>(w, p, threads);
    }
}

}  // namespace

void matmul(const PackedWeight& w, const MatMul& p, int threads) {
    switch (w.bits) {
        case 2: run_bits<2>(w, p, threads); break;
        case 3: run_bits<3>(w, p, threads); break;
        case 4: run_bits<4>(w, p, threads); break;
        default: run_bits<8>(w, p, threads);
    }
}

}  // namespace FEWBIT_ISA
}  // namespace fewbit
