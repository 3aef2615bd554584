// y = x Ŵᵀ with x rounded to 8 bits per token and group, x_k ≈ a_g u_k: sums of integers, scaled in float32.
//
//   y_n = Σ_g s_gn a_g · (Σ_k u_k q_kn − z_gn Σ_k u_k)
//
// Compiled once per instruction set that has products of bytes. For few tokens, codes are unpacked on the way to the
// product, so that every packed byte is read once. For many, the bytes of a few blocks of outputs are unpacked into the
// second-level cache and used for all tokens. Every output is summed in an order that depends on neither the threads
// nor the other tokens.
#include <algorithm>

#include "static_for.h"
#include "int8_activations.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

// Rows and vectors of outputs whose sums and operands fit into the registers.
constexpr int MOST_ROWS = 4;
#if defined(__AVX512F__)
constexpr int vectors(int rows) { return rows == 1 ? 2 : rows < 4 ? 4 : 3; }
#elif defined(__AVX2__)
constexpr int vectors(int rows) { return rows == 2 ? 4 : 2; }
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int vectors(int) { return 4; }
#else
constexpr int vectors(int rows) { return rows < 4 ? 4 : 2; }  // a sum is two vectors
#endif
constexpr int blocks_of(int count) { return count > PARTS ? count / PARTS : 1; }  // that hold this many vectors

// From here on unpacking once is faster than unpacking for every few rows.
constexpr int64_t UNPACKED_FROM = 40;

// Where the words of a few blocks are, and what of the next blocks to fetch meanwhile: with several tiles of rows, each of
// these `passes` over the blocks prefetches its share of the next; a single one prefetches a fixed distance.
struct Words {
    const uint8_t* first;  // of the first block
    int64_t block_bytes;
    int64_t pass, passes;

    static constexpr int64_t AHEAD = 1536;

    // At tile i of `count` blocks.
    void fetch(const uint8_t* tile, int64_t at, int64_t bytes, int count) const {
        const int64_t next = (count - 1) * block_bytes;
        const int64_t distance = passes > 1 ? count * block_bytes : AHEAD + (at + AHEAD < block_bytes ? 0 : next);
        for (int n = 0; n < count; n++)
            for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(tile + n * block_bytes + distance + line);
    }
};

// Scales and, where they differ, zero points (less the centre of the codes) of one group, from `output` on.
template <int OUTPUTS>
inline void read_grids(const PackedWeight& w, int64_t group, int64_t output, int centre, float* scales, float* zeros) {
    constexpr int64_t SOME = std::min<int64_t>(OUTPUTS, BLOCK);
    for (int64_t first = 0; first < OUTPUTS; first += SOME) {
        const int64_t at = w.grid((output + first) / BLOCK, group) + output % BLOCK;
        read_numbers(w.scales, w.scale_type, at, SOME, scales + first);
        if (w.zeros)
            for (int64_t n = 0; n < SOME; n++) zeros[first + n] = static_cast<float>(w.zeros[at + n] - centre);
    }
}

// `count` outputs of one token.
__attribute__((noinline)) void write_result(const PackedWeight& w, const MatMul& p, int64_t token, int64_t output, int64_t count,
                                            float* y) {
    float bias[BLOCK];
    for (int64_t n = 0; n < count; n += BLOCK) {
        const int64_t some = std::min(BLOCK, count - n);
        if (p.bias) {
            read_numbers(p.bias, p.bias_type, output + n, some, bias);
            for (int64_t i = 0; i < some; i++) y[n + i] += bias[i];
        }
        write_numbers(p.y, p.type, token * w.outputs + output + n, some, y + n);
    }
}

// Consecutive outputs from `output` on, for the rows of a tile. Where all zero points are the same, the sums start with
// them.
template <int BITS, class Tile, int ROWS, int VECTORS>
void multiply(const PackedWeight& w, const MatMul& p, const RowTile& rows, const Words& words, int64_t output) {
    using Sums = Dots<BITS>;
    constexpr int CHAINS = ROWS * VECTORS < 4 && Tile::WORDS > 1 ? 2 : 1;  // to hide the latency of a dot product
    constexpr int TILE_WORDS = Tile::WORDS;
    constexpr int64_t PER_TILE = Packed<BITS>::WORDS / TILE_WORDS, MOST = Sums::MOST ? Sums::MOST / TILE_WORDS : INT64_MAX;
    const uint8_t* const from = words.first + output % BLOCK * 4;
    int64_t fetch = words.pass;
    Floats total[ROWS][VECTORS] = {};
    alignas(64) float scales[VECTORS * WIDTH] = {}, zeros[VECTORS * WIDTH] = {};
    for (int64_t g = 0; g < w.groups; g++) {
        Ints sum[ROWS][VECTORS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const int start = w.zeros ? 0 : (Sums::CENTRE - w.zero) * static_cast<int>(rows.sums[g * ROWS + r]);
#pragma GCC unroll 4
            for (int n = 0; n < VECTORS; n++) sum[r][n] = Ints{} + start;
        }
        const int64_t end = w.starts[g + 1] * PER_TILE;
        for (int64_t i = w.starts[g] * PER_TILE; i < end;) {
            typename Sums::Sum part[CHAINS][ROWS][VECTORS];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int n = 0; n < VECTORS; n++) {
                    part[0][r][n] = Sums::from(sum[r][n]);
                    if constexpr (CHAINS == 2) part[1][r][n] = Sums::from(Ints{});
                }
            const int64_t stop = MOST < end - i ? i + MOST : end;
            for (; i < stop; i++) {
                const uint8_t* const tile = from + i * Tile::BYTES;
                if (Tile::WORDS > 1 || BITS == 8 ? i == fetch : false) {
                    words.fetch(tile, i * Tile::BYTES, Tile::BYTES, blocks_of(VECTORS));
                    fetch += words.passes;
                }
                const uint32_t* x = rows.words + i * TILE_WORDS * ROWS;
                static_for<TILE_WORDS>([&](auto word) {
                    constexpr int k = decltype(word)::value;
                    Ints codes[VECTORS];
#pragma GCC unroll 4
                    for (int n = 0; n < VECTORS; n++)
                        codes[n] = Tile(tile + n / PARTS * words.block_bytes + n % PARTS * WIDTH * 4).template word<k>();
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; r++) {
                        const Ints same = Ints{} + static_cast<int32_t>(x[k * ROWS + r]);
#pragma GCC unroll 4
                        for (int n = 0; n < VECTORS; n++) {
                            auto& chain = part[k % CHAINS][r][n];
                            chain = Sums::dot(chain, codes[n], same);
                        }
                    }
                });
            }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int n = 0; n < VECTORS; n++) {
                    sum[r][n] = Sums::add(sum[r][n], part[0][r][n]);
                    if constexpr (CHAINS == 2) sum[r][n] += Sums::add(Ints{}, part[1][r][n]);
                }
        }
        read_grids<VECTORS * WIDTH>(w, g, output, Sums::CENTRE, scales, zeros);
#pragma GCC unroll 4
        for (int n = 0; n < VECTORS; n++) {
            const Floats scale = floats_at(scales + n * WIDTH), zero = floats_at(zeros + n * WIDTH);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                Floats value = to_float(sum[r][n]);
                if (w.zeros) value -= zero * rows.sums[g * ROWS + r];
                total[r][n] += value * (scale * rows.scales[g * ROWS + r]);
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        alignas(64) float y[VECTORS * WIDTH];
        std::memcpy(y, total[r], sizeof y);
        write_result(w, p, rows.token + r, output, std::min<int64_t>(VECTORS * WIDTH, w.outputs - output), y);
    }
}

// A few blocks as bytes: tiles of 8 bits in `words`.
template <int BITS>
void unpack(const PackedWeight& w, int64_t block, int64_t blocks, uint8_t* words) {
    using Tile = Packed<BITS>;
    for (int64_t n = 0; n < blocks; n++)
        for (int64_t i = 0; i < w.tiles_per_block(); i++, words += Tile::WORDS * 64)
            for (int part = 0; part < PARTS; part++) {
                const Tile tile(w.tiles + (block + n) * w.block_bytes() + i * Tile::BYTES + part * WIDTH * 4);
                static_for<Tile::WORDS>([&](auto word) {
                    const Ints codes = tile.template word<decltype(word)::value>();
                    std::memcpy(words + decltype(word)::value * 64 + part * WIDTH * 4, &codes, sizeof codes);
                });
            }
}

// All rows with `blocks` blocks (at most the blocks of VECTORS vectors) from `block` on.
template <int BITS, class Tile>
void multiply_blocks(const PackedWeight& w, const MatMul& p, const Activations& x, Words words, int64_t block, int64_t blocks) {
    words.passes = static_cast<int64_t>(x.tiles.size());
    for (words.pass = 0; words.pass < words.passes; words.pass++) {
        const RowTile& rows = x.tiles[static_cast<size_t>(words.pass)];
        const auto with = [&](auto count) {
            constexpr int ROWS = decltype(count)::value, VECTORS = vectors(ROWS), ONE = std::min(VECTORS, PARTS);
            Words here = words;
            int64_t done = 0;
            const auto step = [&](auto size) {
                constexpr int SIZE = decltype(size)::value;
                here.first = words.first + done * WIDTH / BLOCK * words.block_bytes;
                multiply<BITS, Tile, ROWS, SIZE>(w, p, rows, here, block * BLOCK + done * WIDTH);
                done += SIZE;
            };
            while (done + VECTORS <= blocks * PARTS) step(std::integral_constant<int, VECTORS>());
            while (done < blocks * PARTS) step(std::integral_constant<int, ONE>());
        };
        switch (rows.tokens) {
            case 4: with(std::integral_constant<int, 4>()); break;
            case 2: with(std::integral_constant<int, 2>()); break;
            default: with(std::integral_constant<int, 1>());
        }
    }
}

template <int BITS>
void run(const PackedWeight& w, const MatMul& p, int threads) {
    const Activations x = Activations::make<BITS>(w, p, MOST_ROWS, threads);
    const int64_t group = blocks_of(vectors(static_cast<int>(x.tiles.front().tokens)));
    const int64_t units = (w.blocks() + group - 1) / group;
    const bool unpacked = BITS != 8 && p.tokens >= UNPACKED_FROM;
    // A few long pieces per thread: neighbours are read by the same thread, and a late thread leaves work to the others.
    const int64_t pieces = threads == 1 ? 1 : std::min<int64_t>(units, 4 * threads);
    parallel_for(pieces, threads, [&](int64_t piece) {
        const int64_t bytes = w.positions() * BLOCK;  // of an unpacked block
        const Buffer<uint8_t> panel(unpacked ? group * bytes : 0);
        const int64_t first = units * piece / pieces * group, last = std::min(w.blocks(), units * (piece + 1) / pieces * group);
        for (int64_t block = first; block < last; block += group) {
            const int64_t blocks = std::min(group, last - block);
            if (unpacked) {
                unpack<BITS>(w, block, blocks, panel.data());
                multiply_blocks<BITS, Unpacked>(w, p, x, {panel.data(), bytes, 0, 1}, block, blocks);
            } else {
                const Words words{w.tiles + block * w.block_bytes(), w.block_bytes(), 0, 1};
                multiply_blocks<BITS, Packed<BITS>>(w, p, x, words, block, blocks);
            }
        }
    });
}

}  // namespace

void matmul_int8(const PackedWeight& w, const MatMul& p, int threads) {
    with_bits(w.bits, [&](auto bits) { run<decltype(bits)::value>(w, p, threads); });
}

}  // namespace FEWBIT_ISA
}  // namespace fewbit
