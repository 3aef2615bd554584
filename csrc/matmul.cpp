// y = x Ŵᵀ in float32 on any processor: sixteen outputs at a time, unpacked on the way, each packed word read once for up
// to four tokens. Rounding x to 8 bits, where asked for, gives the numbers of the int8 kernel, not its speed.
// Many tokens are better served by `dequantize_tiles` and a dense product; the caller decides.
#include <algorithm>
#include <cmath>

#include "activations.h"
#include "threads.h"
#include "simd.h"
#include "static_for.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

// The codes of one input of a tile, for part `part` of the outputs.
template <int BITS>
inline Floats codes_at(const uint8_t* tile, int position, int part) {
    const uint8_t* words = tile + part * WIDTH * 4;
    if constexpr (BITS == 3) {
        const int quad = position / 4, byte = position % 4;
        const Ints low = field(ints_at(words + 64 * (quad / 4)), 8 * byte + 2 * (quad % 4), 3);
        const Ints high = field(ints_at(words + 128), 8 * byte + quad, 1);
        return to_float(low | (high << 2));
    } else {
        return to_float(field(ints_at(words), BITS * position, (1 << BITS) - 1));
    }
}

// x rounded to 8 bits per group: values become integers, and `scales` [groups] what they are multiples of.
void round_to_int8(const PackedWeight& w, float* values, float* scales) {
    const int64_t inputs = tile_inputs(w.bits);
    for (int64_t g = 0; g < w.groups; g++) {
        const int64_t first = w.starts[g] * inputs, last = w.starts[g + 1] * inputs;
        float most = 0.0f;
        for (int64_t i = first; i < last; i++) most = std::abs(values[i]) > most || values[i] != values[i] ? std::abs(values[i]) : most;
        const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
        for (int64_t i = first; i < last; i++) values[i] = std::nearbyint(values[i] * inverse);
        scales[g] = most / 127.0f;
    }
}

// Four tokens at most: their rows, and per group the sum of each row and what to multiply with.
struct Rows {
    Buffer<float> values, sums, scales;
};

Rows read_rows(const PackedWeight& w, const MatMul& p, int64_t token, int64_t tokens) {
    const int64_t positions = w.positions(), inputs = tile_inputs(w.bits);
    Rows rows{Buffer<float>(positions * tokens), Buffer<float>(w.groups * tokens), Buffer<float>(w.groups * tokens)};
    Row row(w);
    Buffer<float> scales(w.groups);
    for (int64_t t = 0; t < tokens; t++) {
        float* values = row.read(p, token + t);
        if (p.rounding == Rounding::int8) round_to_int8(w, values, scales.data());
        for (int64_t i = 0; i < positions; i++) rows.values[i * tokens + t] = values[i];
        for (int64_t g = 0; g < w.groups; g++) {
            float sum = 0.0f;
            for (int64_t i = w.starts[g] * inputs; i < w.starts[g + 1] * inputs; i++) sum += values[i];
            rows.sums[g * tokens + t] = sum;
            rows.scales[g * tokens + t] = p.rounding == Rounding::int8 ? scales[g] : 1.0f;
        }
    }
    return rows;
}

template <int BITS, int TOKENS>
void multiply(const PackedWeight& w, const MatMul& p, const Rows& rows, int64_t token, int64_t block) {
    constexpr int INPUTS = static_cast<int>(tile_inputs(BITS));
    const int64_t first = block * BLOCK, count = std::min<int64_t>(BLOCK, w.outputs - first);
    const uint8_t* tiles = w.tiles + block * w.block_bytes();
    float totals[TOKENS][BLOCK] = {};
    for (int64_t g = 0; g < w.groups; g++) {
        Floats sum[TOKENS][PARTS] = {};
        for (int64_t i = w.starts[g]; i < w.starts[g + 1]; i++) {
            const uint8_t* tile = tiles + i * tile_bytes(BITS);
            const float* x = rows.values.data() + i * INPUTS * TOKENS;
            for (int k = 0; k < INPUTS; k++, x += TOKENS)
                for (int part = 0; part < PARTS; part++) {
                    const Floats codes = codes_at<BITS>(tile, k, part);
                    for (int t = 0; t < TOKENS; t++) sum[t][part] = sum[t][part] + times(codes, x[t]);
                }
        }
        float scale[BLOCK], zero[BLOCK], sums[TOKENS][BLOCK];
        std::memcpy(sums, sum, sizeof sums);
        read_grid(w, block, g, scale, zero);
        for (int t = 0; t < TOKENS; t++) {
            const float x_sum = rows.sums[g * TOKENS + t], x_scale = rows.scales[g * TOKENS + t];
            for (int64_t n = 0; n < BLOCK; n++) totals[t][n] += (sums[t][n] - zero[n] * x_sum) * scale[n] * x_scale;
        }
    }
    float bias[BLOCK] = {};
    if (p.bias) read_numbers(p.bias, p.bias_type, first, count, bias);
    for (int t = 0; t < TOKENS; t++) {
        for (int64_t n = 0; n < BLOCK; n++) totals[t][n] += bias[n];
        write_numbers(p.y, p.type, (token + t) * w.outputs + first, count, totals[t]);
    }
}

template <int BITS>
void run(const PackedWeight& w, const MatMul& p, int threads) {
    for (int64_t token = 0; token < p.tokens;) {
        const int64_t tokens = p.tokens - token >= 4 ? 4 : p.tokens - token >= 2 ? 2 : 1;
        const Rows rows = read_rows(w, p, token, tokens);
        parallel_for(w.blocks(), threads, [&](int64_t block) {
            if (tokens == 4) {
                multiply<BITS, 4>(w, p, rows, token, block);
            } else if (tokens == 2) {
                multiply<BITS, 2>(w, p, rows, token, block);
            } else {
                multiply<BITS, 1>(w, p, rows, token, block);
            }
        });
        token += tokens;
    }
}

}  // namespace

void matmul(const PackedWeight& w, const MatMul& p, int threads) {
    with_bits(w.bits, [&](auto bits) { run<decltype(bits)::value>(w, p, threads); });
}

}  // namespace FEWBIT_ISA
}  // namespace fewbit
