// The portable products against double, as a program: for processors that the test machine is not (test_other_processors.py).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "matmul.h"

namespace fewbit {
FEWBIT_MATMUL_INT8(generic)
}
using namespace fewbit;

static uint32_t state = 1;
static uint32_t draw(uint32_t below) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % below;
}

static float half(uint16_t h) { return std::ldexp(1.0f + (h & 1023) / 1024.0f, (h >> 10) - 15); }

struct Case {
    int bits;
    int64_t outputs, inputs, group;
    bool ordered;
};

// x as the products of 8-bit activations see it.
static void round_to_int8(std::vector<float>& x, const Case& c, const std::vector<int>& group_of, int64_t groups) {
    for (size_t row = 0; row < x.size(); row += c.inputs)
        for (int64_t g = 0; g < groups; g++) {
            float most = 0;
            for (int64_t i = 0; i < c.inputs; i++)
                if (group_of[i] == g) most = std::max(most, std::fabs(x[row + i]));
            for (int64_t i = 0; i < c.inputs; i++)
                if (group_of[i] == g && most > 0) {
                    const float scaled = x[row + i] * (127.0f / most);
                    x[row + i] = std::nearbyint(scaled) * (most / 127.0f);
                }
        }
}

static double worst(const Case& c, int64_t tokens, bool int8) {
    const int64_t groups = (c.inputs + c.group - 1) / c.group, per_tile = tile_inputs(c.bits);
    std::vector<int> group_of(c.inputs), codes(c.outputs * c.inputs);
    for (int64_t i = 0; i < c.inputs; i++) group_of[i] = static_cast<int>(i / c.group);
    if (c.ordered)
        for (int64_t i = c.inputs - 1; i > 0; i--) std::swap(group_of[i], group_of[draw(static_cast<uint32_t>(i + 1))]);
    for (int& code : codes) code = static_cast<int>(draw(1u << c.bits));
    std::vector<uint16_t> scales(groups * c.outputs);
    std::vector<uint8_t> zeros(groups * c.outputs);
    for (auto& s : scales) s = static_cast<uint16_t>(0x2000 + draw(0x0800));
    for (auto& z : zeros) z = static_cast<uint8_t>(draw(1u << c.bits));
    const int64_t words = c.bits == 3 ? (c.inputs + 31) / 32 * 3 : (c.inputs * c.bits + 31) / 32;
    std::vector<uint32_t> qweight(words * c.outputs);
    for (int64_t o = 0; o < c.outputs; o++)
        for (int64_t i = 0; i < c.inputs; i++)
            for (int b = 0; b < c.bits; b++)
                if (codes[o * c.inputs + i] >> b & 1) qweight[(i * c.bits + b) / 32 * c.outputs + o] |= 1u << ((i * c.bits + b) % 32);
    std::vector<int32_t> order, starts(1, 0);
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t i = 0; i < c.inputs; i++)
            if (group_of[i] == g) order.push_back(static_cast<int32_t>(i));
        while (order.size() % per_tile) order.push_back(static_cast<int32_t>(c.inputs));
        starts.push_back(static_cast<int32_t>(order.size() / per_tile));
    }
    PackedWeight w{nullptr, nullptr, DType::float16, nullptr, 0, order.data(), starts.data(), c.outputs, c.inputs, groups, c.bits};
    std::vector<uint16_t> block_scales(w.blocks() * groups * BLOCK);
    std::vector<uint8_t> block_zeros(block_scales.size()), tiles(w.blocks() * w.block_bytes());
    for (int64_t g = 0; g < groups; g++)
        for (int64_t o = 0; o < c.outputs; o++) {
            const int64_t at = w.grid(o / BLOCK, g) + o % BLOCK;
            block_scales[at] = scales[g * c.outputs + o];
            block_zeros[at] = zeros[g * c.outputs + o];
        }
    w.scales = block_scales.data();
    w.zeros = block_zeros.data();
    w.tiles = tiles.data();
    generic::pack_tiles(w, qweight.data(), tiles.data(), 2);
    std::vector<uint32_t> back(qweight.size());
    generic::unpack_tiles(w, back.data(), 2);
    if (back != qweight) return 1e9;
    std::vector<float> x(tokens * c.inputs), y(tokens * c.outputs), bias(c.outputs), dense(c.outputs * c.inputs);
    for (float& v : x) v = static_cast<float>(draw(2001)) / 1000.0f - 1.0f;
    for (float& v : bias) v = static_cast<float>(draw(100)) / 100.0f;
    const MatMul product{x.data(), y.data(), DType::float32, tokens, bias.data(), DType::float32, int8 ? Rounding::int8 : Rounding::none};
    (int8 ? generic::matmul_int8 : generic::matmul)(w, product, 2);
    if (int8) round_to_int8(x, c, group_of, groups);
    generic::dequantize_tiles(w, dense.data(), DType::float32, 2);
    double most = 0;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t o = 0; o < c.outputs; o++) {
            double truth = bias[o], size = std::fabs(bias[o]);
            for (int64_t i = 0; i < c.inputs; i++) {
                const int64_t at = group_of[i] * c.outputs + o;
                const double weight = half(scales[at]) * (codes[o * c.inputs + i] - zeros[at]);
                if (static_cast<float>(weight) != dense[o * c.inputs + i]) return 1e8;
                truth += x[t * c.inputs + i] * weight;
                size += std::fabs(x[t * c.inputs + i] * half(scales[at]) * (codes[o * c.inputs + i] + zeros[at]));
            }
            most = std::max(most, std::fabs(y[t * c.outputs + o] - truth) / (size + 1e-9));
        }
    return most;
}

int main() {
    double most = 0;
    for (int bits : {2, 3, 4, 8})
        for (const Case& c : {Case{bits, 16, 32, 32, false}, Case{bits, 37, 100, 24, false}, Case{bits, 37, 100, 24, true},
                              Case{bits, 1, 7, 7, false}, Case{bits, 50, 130, 130, true}, Case{bits, 100, 300, 300, false}})
            for (int64_t tokens : {1, 3, 7, 45})
                for (bool int8 : {false, true}) most = std::max(most, worst(c, tokens, int8));
    std::printf("largest relative error %g\n", most);
    return most < 2e-6 ? 0 : 1;
}
