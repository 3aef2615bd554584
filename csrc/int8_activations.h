// x rounded to 8 bits, one scale per token and group, as words of four inputs in the order of the packed codes.
#pragma once

#include <vector>

#include "activations.h"
#include "int8_dots.h"
#include "threads.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

// Rows that are multiplied in one pass.
struct RowTile {
    int64_t token, tokens;
    uint32_t* words;  // [positions / 4][tokens]
    float* sums;      // [groups][tokens], of the integers
    float* scales;    // [groups][tokens], what they are multiples of
};

// `count` values become integers of at most 127 in magnitude. Returns what they are multiples of.
float round_to_int8(float* values, int64_t count, int8_t* out) {
    uint32_t most = 0;  // the bits of magnitudes are in their order, and not-a-number is above all
    for (int64_t i = 0; i < count; i++) most = std::max(most, to_bits(values[i]) & 0x7fffffffu);
    const float largest = from_bits(most), inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    // Two loops, so that the product is rounded by itself, as on processors without a fused operation.
    for (int64_t i = 0; i < count; i++) values[i] *= inverse;
    // 1.5 · 2²³ leaves no bits for the fraction: half to even, and the low byte is the integer.
    for (int64_t i = 0; i < count; i++) out[i] = static_cast<int8_t>(to_bits(values[i] + 12582912.0f) & 255u);
    return largest / 127.0f;
}

template <int BITS>
void prepare(const PackedWeight& w, const MatMul& p, const RowTile& tile) {
    constexpr int INPUTS = static_cast<int>(tile_inputs(BITS));
    Row row(w);
    const Buffer<int8_t> rounded(w.positions());
    for (int64_t t = 0; t < tile.tokens; t++) {
        float* values = row.read(p, tile.token + t);
        for (int64_t g = 0; g < w.groups; g++) {
            const int64_t first = w.starts[g] * INPUTS, count = w.starts[g + 1] * INPUTS - first;
            tile.scales[g * tile.tokens + t] = round_to_int8(values + first, count, rounded.data() + first);
            int32_t sum = 0;
            for (int64_t i = first; i < first + count; i++) sum += rounded[i];
            tile.sums[g * tile.tokens + t] = static_cast<float>(sum);
        }
        uint32_t* words = tile.words + t;
        for (int64_t i = 0; i < w.positions(); i += INPUTS)
            for (int word = 0; word < INPUTS / 4; word++, words += tile.tokens) {
                int8_t bytes[4];
                for (int byte = 0; byte < 4; byte++) bytes[byte] = rounded[i + code_input(BITS, word, byte)];
                std::memcpy(words, bytes, 4);
            }
    }
}

// All rows of x, in tiles of at most `most_rows`.
class Activations {
public:
    template <int BITS>
    static Activations make(const PackedWeight& w, const MatMul& p, int64_t most_rows, int threads) {
        const int64_t row_words = w.positions() / 4;
        Activations all(p.tokens * row_words, 2 * p.tokens * w.groups);
        for (int64_t token = 0; token < p.tokens;) {
            int64_t count = most_rows;
            while (count > p.tokens - token) count /= 2;
            all.tiles.push_back({token, count, all.words_.data() + token * row_words, all.numbers_.data() + token * w.groups,
                                 all.numbers_.data() + (p.tokens + token) * w.groups});
            token += count;
        }
        parallel_for(static_cast<int64_t>(all.tiles.size()), threads,
                     [&](int64_t i) { prepare<BITS>(w, p, all.tiles[static_cast<size_t>(i)]); });
        return all;
    }

    std::vector<RowTile> tiles;

private:
    Activations(int64_t words, int64_t numbers) : words_(words), numbers_(numbers) {}

    Buffer<uint32_t> words_;
    Buffer<float> numbers_;
};

}  // namespace
}  // namespace FEWBIT_ISA
}  // namespace fewbit
