// What the kernels read beside the tiles, in float32: rows of x, gathered into the order of the weight's positions, and the
// scales and zero points of a block.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "matmul.h"
#include "dtype.h"

namespace fewbit {
namespace FEWBIT_ISA {

// Memory at a multiple of 64 bytes, zeroed unless all of it is written before it is read. Not std::vector: this is compiled once per instruction set, and the linker keeps
// only one copy of a standard template, perhaps one that this processor cannot run.
template <class T>
class Buffer {
public:
    explicit Buffer(int64_t count = 0, bool zeroed = true) : data_(nullptr) {
        const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 64;  // whole vectors may be written at the end
        data_ = static_cast<T*>(::operator new(bytes, std::align_val_t(64)));
        if (zeroed) std::memset(static_cast<void*>(data_), 0, bytes);
    }
    ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
    Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    Buffer& operator=(Buffer&&) = delete;

    T* data() const { return data_; }
    T& operator[](int64_t i) const { return data_[i]; }

private:
    T* data_;
};

// Room for one row: positions are padded with zeros to a multiple of 16.
class Row {
public:
    explicit Row(const PackedWeight& weight)
        : weight_(weight),
          source_(weight.order ? weight.inputs + 1 : 0),
          values_((weight.positions() + 15) / 16 * 16) {}

    float* read(const MatMul& product, int64_t token) {
        const int64_t inputs = weight_.inputs, positions = weight_.positions();
        if (!weight_.order) {
            read_numbers(product.x, product.type, token * inputs, inputs, values_.data());
            for (int64_t p = inputs; p < positions; p++) values_[p] = 0.0f;
        } else {
            read_numbers(product.x, product.type, token * inputs, inputs, source_.data());
            for (int64_t p = 0; p < positions; p++) values_[p] = source_[weight_.order[p]];  // [inputs] is zero
        }
        return values_.data();
    }

private:
    const PackedWeight& weight_;
    Buffer<float> source_, values_;
};

// Scales and zero points of one block in one group.
static inline void read_grid(const PackedWeight& w, int64_t block, int64_t group, float* scales, float* zeros) {
    const int64_t at = w.grid(block, group);
    read_numbers(w.scales, w.scale_type, at, BLOCK, scales);
    for (int64_t n = 0; n < BLOCK; n++) zeros[n] = static_cast<float>(w.zeros ? w.zeros[at + n] : w.zero);
}

}  // namespace FEWBIT_ISA
}  // namespace fewbit
