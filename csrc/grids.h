// Scales and zero points of a few blocks of outputs, block by block, as float32. In a checkpoint those of one block are far
// apart, each group in another page of memory: several tiles of rows would fetch and convert them again and again.
#pragma once

#include <algorithm>

#include "activations.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

class Grids {
public:
    static constexpr int64_t BLOCKS = 16;  // at a time: 512 bytes of each group

    explicit Grids(const PackedWeight& w)
        : w_(w), scales_(BLOCKS * w.groups * BLOCK), zeros_(w.zeros ? BLOCKS * w.groups * BLOCK : 0) {}

    // Those of BLOCKS blocks from `block` on; zero points less `centre`.
    void read(int64_t block, int centre) {
        const int64_t first = block * BLOCK, blocks = std::min(BLOCKS, w_.blocks() - block);
        for (int64_t g = 0; g < w_.groups; g++)
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t output = first + b * BLOCK, count = std::min(BLOCK, w_.outputs - output);
                float* scales = scales_.data() + (b * w_.groups + g) * BLOCK;
                read_numbers(w_.scales, w_.scale_type, g * w_.outputs + output, count, scales);
                if (!w_.zeros) continue;
                float* zeros = zeros_.data() + (b * w_.groups + g) * BLOCK;
                for (int64_t n = 0; n < count; n++)
                    zeros[n] = static_cast<float>(w_.zeros[g * w_.outputs + output + n] - centre);
            }
        block_ = block;
    }

    // Sixteen numbers. What is beyond the last output is never written.
    const float* scales(int64_t block, int64_t group) const { return scales_.data() + ((block - block_) * w_.groups + group) * BLOCK; }
    const float* zeros(int64_t block, int64_t group) const { return zeros_.data() + ((block - block_) * w_.groups + group) * BLOCK; }

private:
    const PackedWeight& w_;
    Buffer<float> scales_, zeros_;
    int64_t block_ = 0;
};

}  // namespace
}  // namespace FEWBIT_ISA
}  // namespace fewbit
