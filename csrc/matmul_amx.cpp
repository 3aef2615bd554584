// y = x Ŵᵀ for many tokens on the tile unit of newer Xeons (AMX): bfloat16 times bfloat16, sums in float32.
//
// Sixteen tokens by 32 inputs are a tile of x, 32 inputs by sixteen outputs a tile of the weight, sixteen tokens by sixteen
// outputs a tile of sums. Panels of outputs are unpacked into the second-level cache, with their scales and zero points and
// one rounding to bfloat16, as in a dense bfloat16 weight, and used for many tokens. Every output is summed in an order that
// depends on neither the threads nor the other tokens.
#include <immintrin.h>

#include <algorithm>
#include <atomic>

#include "amx_tiles.h"
#include "vnni_groups.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

constexpr int64_t TOKENS = 16, INPUTS = 32, TILE_WORDS = TOKENS * INPUTS / 2;  // a tile has 1 KiB

// What is in the second-level cache at a time: the weights of 128 outputs and 2048 inputs, and the sums of 512 tokens.
constexpr int64_t MOST_BLOCKS = 8, PANEL_POSITIONS = 2048, PANEL_TOKENS = 512;

int64_t tiles_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// All rows of x as bfloat16: [tiles of tokens][tiles of inputs][16 tokens][32 inputs], padded with zeros.
template <int BITS>
Buffer<uint32_t> read_tokens(const PackedWeight& w, const MatMul& p, int threads) {
    const int64_t along = tiles_of(w.positions(), INPUTS), tiles = tiles_of(p.tokens, TOKENS);
    const bool as_it_is = p.type == DType::bfloat16 && w.positions() == w.inputs && !w.order && w.inputs % 16 == 0;
    Buffer<uint32_t> all(tiles * along * TILE_WORDS, false);
    parallel_for(tiles, threads, [&](int64_t tile) {
        uint32_t* const first = all.data() + tile * along * TILE_WORDS;
        if (w.positions() % INPUTS) std::fill_n(first + (along - 1) * TILE_WORDS, TILE_WORDS, 0u);
        if ((tile + 1) * TOKENS > p.tokens) std::fill_n(first, along * TILE_WORDS, 0u);
        Row row(w);
        const __m256i order = _mm512_cvtepi32_epi16(sequence<BITS>(false));
        for (int64_t token = tile * TOKENS; token < std::min(p.tokens, (tile + 1) * TOKENS); token++) {
            const float* values = as_it_is ? nullptr : row.read(p, token);
            const uint16_t* numbers = static_cast<const uint16_t*>(p.x) + token * w.inputs;
            uint32_t* const words = first + token % TOKENS * INPUTS / 2;
            for (int64_t i = 0; i < w.positions(); i += 16) {
                const __m256i v = as_it_is ? _mm256_loadu_si256((const __m256i*)(numbers + i))
                                           : (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(values + i));
                _mm256_storeu_si256((__m256i*)(words + i / INPUTS * TILE_WORDS + i % INPUTS / 2), _mm256_permutexvar_epi16(order, v));
            }
        }
    });
    return all;
}

// Tiles first … last of one block, as words of pairs of inputs [pairs][16 outputs]; the rest of the last tile is 0.
template <int BITS>
void unpack_block(const PackedWeight& w, int64_t block, int64_t first, int64_t last, uint32_t* words) {
    constexpr int64_t WORDS = tile_inputs(BITS) / 2 * BLOCK;
    const Bfloat16<BITS> math;
    const uint8_t* tiles = w.tiles + block * w.block_bytes();
    for (int64_t g = std::upper_bound(w.starts, w.starts + w.groups + 1, first) - w.starts - 1; g < w.groups && w.starts[g] < last; g++) {
        const Grid grid(w, g, block, math.CENTRE);
        for (int64_t i = std::max<int64_t>(first, w.starts[g]); i < std::min<int64_t>(last, w.starts[g + 1]); i++)
            fold(math, Tile<BITS>(tiles + i * tile_bytes(BITS)), grid, words + (i - first) * WORDS);
    }
    const int64_t used = (last - first) * WORDS;
    std::fill(words + used, words + tiles_of(used, TILE_WORDS) * TILE_WORDS, 0u);
}

// A row of tiles, or several rows `stride` words apart.
struct Tiles {
    const uint32_t* words;
    int64_t stride;
};

// Sums of ROWS × 16 tokens and BLOCKS × 16 outputs, in rows `stride` bytes apart; `add`: to those that are there.
template <int ROWS, int BLOCKS>
void multiply(Tiles x, Tiles weights, int64_t count, bool add, float* sums, int64_t stride) {
    float* below = sums + TOKENS * stride / 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (add) {
        _tile_loadd(0, sums, stride);
        if constexpr (BLOCKS == 2) _tile_loadd(1, sums + BLOCK, stride);
        if constexpr (ROWS == 2) _tile_loadd(2, below, stride);
        if constexpr (ROWS == 2 && BLOCKS == 2) _tile_loadd(3, below + BLOCK, stride);
    }
    for (int64_t k = 0; k < count; k++, x.words += TILE_WORDS, weights.words += TILE_WORDS) {
        _tile_loadd(4, x.words, 64);
        _tile_loadd(6, weights.words, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (BLOCKS == 2) {
            _tile_loadd(7, weights.words + weights.stride, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (ROWS == 2) {
            _tile_loadd(5, x.words + x.stride, 64);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (BLOCKS == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, stride);
    if constexpr (BLOCKS == 2) _tile_stored(1, sums + BLOCK, stride);
    if constexpr (ROWS == 2) _tile_stored(2, below, stride);
    if constexpr (ROWS == 2 && BLOCKS == 2) _tile_stored(3, below + BLOCK, stride);
}

// The same for `blocks` blocks of outputs, two at a time.
template <int ROWS>
void multiply_blocks(Tiles x, Tiles weights, int64_t blocks, int64_t count, bool add, float* sums, int64_t stride) {
    for (int64_t n = 0; n < blocks; n += 2, weights.words += 2 * weights.stride, sums += 2 * BLOCK) {
        if (blocks - n >= 2) {
            multiply<ROWS, 2>(x, weights, count, add, sums, stride);
        } else {
            multiply<ROWS, 1>(x, weights, count, add, sums, stride);
        }
    }
}

// Sums of one token and a whole panel → y; `bias` has 16 numbers for each block.
void write_token(const PackedWeight& w, const MatMul& p, int64_t token, int64_t block, int64_t blocks, const float* sums, const float* bias) {
    const auto sum = [&](int64_t n) { return _mm512_add_ps(_mm512_loadu_ps(sums + n * BLOCK), _mm512_loadu_ps(bias + n * BLOCK)); };
    int64_t n = 0;
    if (p.type == DType::bfloat16) {
        uint16_t* y = static_cast<uint16_t*>(p.y) + token * w.outputs + block * BLOCK;
        for (; n + 2 <= blocks && (block + n + 2) * BLOCK <= w.outputs; n += 2)
            _mm512_storeu_si512(y + n * BLOCK, (__m512i)_mm512_cvtne2ps_pbh(sum(n + 1), sum(n)));
    }
    for (; n < blocks; n++)
        write16(p.y, p.type, token * w.outputs + (block + n) * BLOCK, existing(w.outputs - (block + n) * BLOCK), sum(n));
}

// Panels of outputs, for the tokens of `p`; `x` from `read_tokens`.
template <int BITS>
void panel_tasks(const PackedWeight& w, const MatMul& p, const uint32_t* x, int64_t first_token, int64_t last_token, int64_t width, std::atomic<int64_t>& next) {
    const TileUnit unit;
    const int64_t positions = w.positions(), tasks = tiles_of(w.blocks(), width), along = tiles_of(positions, INPUTS) * TILE_WORDS;
    const int64_t rows = tiles_of(last_token - first_token, TOKENS), stride = width * BLOCK;
    const int64_t weight_stride = tiles_of(std::min(positions, PANEL_POSITIONS), INPUTS) * TILE_WORDS;
    const Buffer<uint32_t> weights(width * weight_stride, false);
    const bool whole = positions <= PANEL_POSITIONS;  // sums are finished at once
    const Buffer<float> sums((whole ? 2 : rows) * TOKENS * stride, false), bias(stride);
    for (int64_t task = next++; task < tasks; task = next++) {
        const int64_t block = task * width, blocks = std::min(width, w.blocks() - block);
        if (p.bias) read_numbers(p.bias, p.bias_type, block * BLOCK, std::min(blocks * BLOCK, w.outputs - block * BLOCK), bias.data());
        for (int64_t from = 0; from < positions; from += PANEL_POSITIONS) {
            const int64_t to = std::min(positions, from + PANEL_POSITIONS), count = tiles_of(to - from, INPUTS);
            for (int64_t n = 0; n < blocks; n++)
                unpack_block<BITS>(w, block + n, from / tile_inputs(BITS), to / tile_inputs(BITS), weights.data() + n * weight_stride);
            for (int64_t t = 0; t < rows; t += 2) {
                const Tiles here{x + (first_token / TOKENS + t) * along + from / INPUTS * TILE_WORDS, along}, there{weights.data(), weight_stride};
                float* at = sums.data() + (whole ? 0 : t) * TOKENS * stride;
                if (rows - t >= 2) {
                    multiply_blocks<2>(here, there, blocks, count, from > 0, at, stride * 4);
                } else {
                    multiply_blocks<1>(here, there, blocks, count, from > 0, at, stride * 4);
                }
                if (to < positions) continue;
                const int64_t token = first_token + t * TOKENS;
                for (int64_t r = 0; r < std::min(2 * TOKENS, last_token - token); r++)
                    write_token(w, p, token + r, block, blocks, at + r * stride, bias.data());
            }
        }
    }
}

template <int BITS>
void run(const PackedWeight& w, const MatMul& p, int threads) {
    const Buffer<uint32_t> x = read_tokens<BITS>(w, p, threads);
    // Narrower panels where the outputs are too few to keep all threads busy.
    const int64_t width = std::min(MOST_BLOCKS, std::max<int64_t>(2, w.blocks() / (4 * threads) / 2 * 2));
    for (int64_t first = 0; first < p.tokens; first += PANEL_TOKENS) {
        std::atomic<int64_t> next{0};
        parallel_for(threads, threads, [&](int64_t) {
            panel_tasks<BITS>(w, p, x.data(), first, std::min(p.tokens, first + PANEL_TOKENS), width, next);
        });
    }
}

}  // namespace

void matmul(const PackedWeight& w, const MatMul& p, int threads) {
    constexpr int64_t FROM = 16;  // a tile of tokens; below, tiles would hold more zeros than tokens
    const bool rounded = p.type == DType::bfloat16 || (p.type == DType::float16 && p.rounding == Rounding::fast_prefill);
    if (p.tokens < FROM || !rounded || p.rounding == Rounding::int8) return vnni::matmul(w, p, threads);
    with_bits(w.bits, [&](auto bits) { run<decltype(bits)::value>(w, p, threads); });
}

}  // namespace FEWBIT_ISA
}  // namespace fewbit
