// Checkpoint words ↔ tiles, and tiles → numbers. Sixteen outputs at a time; every loop over them vectorizes.
#include <cstring>

#include "activations.h"
#include "threads.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

// Where a code lies in the column of a checkpoint, or in the lane of a tile: `low` bits at `shift` of `word`,
// the rest at `high_shift` of `high_word`.
struct CodePosition {
    int64_t word, high_word;
    int shift, low, high_shift;
};

CodePosition in_checkpoint(int64_t input, int bits) {
    const int64_t bit = input * bits;
    const int shift = static_cast<int>(bit % 32), low = shift + bits > 32 ? 32 - shift : bits;
    return {bit / 32, bit / 32 + 1, shift, low, 0};
}

CodePosition in_tile(int64_t position, int bits) {
    if (bits != 3) return {0, 0, static_cast<int>(position) * bits, bits, 0};
    const int quad = static_cast<int>(position / 4), byte = static_cast<int>(position % 4);
    return {quad / 4, 2, 8 * byte + 2 * (quad % 4), 2, 8 * byte + quad};
}

// Words of 16 outputs, `stride` apart, of which `count` exist.
struct Lanes16 {
    uint32_t v[BLOCK] = {};
};

Lanes16 load(const uint32_t* p, int64_t count) {
    Lanes16 lanes;
    if (count >= BLOCK) {
        std::memcpy(lanes.v, p, sizeof lanes.v);
    } else {
        std::memcpy(lanes.v, p, static_cast<size_t>(count) * 4);
    }
    return lanes;
}

void join(uint32_t* p, const Lanes16& lanes, int64_t count) {
    for (int64_t n = 0; n < (count < BLOCK ? count : BLOCK); n++) p[n] |= lanes.v[n];
}

Lanes16 take(const uint32_t* words, int64_t stride, int64_t count, const CodePosition& at, int bits) {
    Lanes16 codes = load(words + at.word * stride, count);
    for (int64_t n = 0; n < BLOCK; n++) codes.v[n] = (codes.v[n] >> at.shift) & ((1u << at.low) - 1);
    if (at.low < bits) {
        const Lanes16 rest = load(words + at.high_word * stride, count);
        const uint32_t mask = (1u << (bits - at.low)) - 1;
        for (int64_t n = 0; n < BLOCK; n++) codes.v[n] |= ((rest.v[n] >> at.high_shift) & mask) << at.low;
    }
    return codes;
}

void put(uint32_t* words, int64_t stride, int64_t count, const CodePosition& at, int bits, const Lanes16& codes) {
    Lanes16 part;
    for (int64_t n = 0; n < BLOCK; n++) part.v[n] = (codes.v[n] & ((1u << at.low) - 1)) << at.shift;
    join(words + at.word * stride, part, count);
    if (at.low < bits) {
        for (int64_t n = 0; n < BLOCK; n++) part.v[n] = (codes.v[n] >> at.low) << at.high_shift;
        join(words + at.high_word * stride, part, count);
    }
}

int64_t input_at(const PackedWeight& w, int64_t position) { return w.order ? w.order[position] : position; }

}  // namespace

void pack_tiles(const PackedWeight& w, const uint32_t* qweight, uint8_t* tiles, int threads) {
    const int64_t inputs = tile_inputs(w.bits), bytes = tile_bytes(w.bits);
    parallel_for(w.blocks(), threads, [&](int64_t block) {
        uint32_t* const first = reinterpret_cast<uint32_t*>(tiles + block * w.block_bytes());
        const uint32_t* column = qweight + block * BLOCK;
        const int64_t count = w.outputs - block * BLOCK;
        // Tiles that are words of the checkpoint as they are.
        const int64_t whole = w.order || w.bits == 3 ? 0 : w.inputs / inputs;
        for (int64_t i = 0; i < whole; i++) {
            const Lanes16 words = load(column + i * w.outputs, count);
            std::memcpy(first + i * BLOCK, words.v, sizeof words.v);
        }
        std::memset(first + whole * BLOCK, 0, static_cast<size_t>(w.block_bytes() - whole * bytes));
        for (int64_t position = whole * inputs; position < w.positions(); position++) {
            const int64_t input = input_at(w, position);
            if (input >= w.inputs) continue;
            uint32_t* tile = first + position / inputs * bytes / 4;
            put(tile, BLOCK, BLOCK, in_tile(position % inputs, w.bits), w.bits,
                take(column, w.outputs, count, in_checkpoint(input, w.bits), w.bits));
        }
    });
}

void unpack_tiles(const PackedWeight& w, uint32_t* qweight, int threads) {
    const int64_t inputs = tile_inputs(w.bits), bytes = tile_bytes(w.bits);
    parallel_for(w.blocks(), threads, [&](int64_t block) {
        const uint32_t* tile = reinterpret_cast<const uint32_t*>(w.tiles + block * w.block_bytes());
        uint32_t* column = qweight + block * BLOCK;
        const int64_t count = w.outputs - block * BLOCK;
        for (int64_t position = 0; position < w.positions(); position++) {
            const int64_t input = input_at(w, position);
            if (position && position % inputs == 0) tile += bytes / 4;
            if (input >= w.inputs) continue;
            put(column, w.outputs, count, in_checkpoint(input, w.bits), w.bits,
                take(tile, BLOCK, BLOCK, in_tile(position % inputs, w.bits), w.bits));
        }
    });
}

void dequantize_tiles(const PackedWeight& w, void* out, DType type, int threads) {
    const int64_t inputs = tile_inputs(w.bits), bytes = tile_bytes(w.bits);
    parallel_for(w.blocks(), threads, [&](int64_t block) {
        const int64_t first = block * BLOCK, count = w.outputs - first < BLOCK ? w.outputs - first : BLOCK;
        // Space for padding at the end, and rows so far apart that a column does not fall into one set of the cache.
        const int64_t stride = (w.inputs + 16) / 16 * 16 + (w.inputs / 16 % 2 ? 0 : 16);
        const Buffer<float> rows(BLOCK * stride);
        for (int64_t g = 0; g < w.groups; g++) {
            float scale[BLOCK], zero[BLOCK];
            read_grid(w, block, g, scale, zero);
            for (int64_t position = w.starts[g] * inputs; position < w.starts[g + 1] * inputs; position++) {
                const uint8_t* tile = w.tiles + block * w.block_bytes() + position / inputs * bytes;
                const Lanes16 codes = take(reinterpret_cast<const uint32_t*>(tile), BLOCK, BLOCK,
                                           in_tile(position % inputs, w.bits), w.bits);
                float* column = rows.data() + (input_at(w, position) < w.inputs ? input_at(w, position) : w.inputs);
                for (int64_t n = 0; n < BLOCK; n++)
                    column[n * stride] = scale[n] * (static_cast<float>(codes.v[n]) - zero[n]);
            }
        }
        for (int64_t n = 0; n < count; n++)
            write_numbers(out, type, (first + n) * w.inputs, w.inputs, rows.data() + n * stride);
    });
}

}  // namespace FEWBIT_ISA
}  // namespace fewbit
