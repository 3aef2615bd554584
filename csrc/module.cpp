// The Python module fewbit._native: pointers in, nothing out. src/fewbit/solver/native.py checks shapes and
// types and is its only caller. No torch headers, so that one build serves every version of torch.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#include "kernels.h"
#include "threads.h"

namespace nb = nanobind;

namespace fewbit {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

struct Kernels {
    const char* isa;
    void (*grid_rows)(const GridProblem&, int64_t, float*);
    void (*ldlq_rows)(const LdlqProblem&, int64_t);
};

// What this processor can run, best first.
std::vector<Kernels> kernels() {
    std::vector<Kernels> found;
#if defined(FEWBIT_HAVE_X86)
    if (cpu().avx512) found.push_back({"avx512", avx512::grid_rows, avx512::ldlq_rows});
    if (cpu().avx2) found.push_back({"avx2", avx2::grid_rows, avx2::ldlq_rows});
#endif
    found.push_back({"generic", generic::grid_rows, generic::ldlq_rows});
    return found;
}

Kernels choose(const char* isa) {
    for (const Kernels& candidate : kernels())
        if (std::strcmp(isa, "best") == 0 || std::strcmp(isa, candidate.isa) == 0) return candidate;
    throw std::invalid_argument(std::string("this processor has no ") + isa);
}

void fit_grid(Address W, Address D, Address starts, int64_t m, int64_t n, int64_t G, Address coarse, int64_t coarse_count,
              Address fine, int64_t fine_count, Address offsets, int64_t offset_count, int bits, bool sym,
              Address scales, Address zeros, int threads, const char* isa) {
    const GridProblem problem{at<const float>(W), at<const float>(D), at<const int32_t>(starts), m, n, G,
                              at<const float>(coarse), coarse_count, at<const float>(fine), fine_count,
                              at<const int32_t>(offsets), offset_count, bits, sym, at<float>(scales), at<float>(zeros)};
    int64_t widest = 0;
    for (int64_t g = 0; g < G; g++)
        widest = std::max<int64_t>(widest, problem.starts[g + 1] - problem.starts[g]);
    // One piece of scratch memory per task in flight would need the thread's number; a task of many rows
    // brings its own instead, and the allocation disappears in its work.
    constexpr int64_t TILES_PER_TASK = 4;
    const int64_t tiles = (m + GRID_ROWS - 1) / GRID_ROWS;
    const auto kernel = choose(isa).grid_rows;
    const int64_t tasks = (tiles + TILES_PER_TASK - 1) / TILES_PER_TASK;
    const size_t scratch_bytes = static_cast<size_t>(widest * GRID_ROWS) * sizeof(float);
    parallel_for(tasks, threads, [&](int64_t task) {
        float* scratch = static_cast<float*>(::operator new(scratch_bytes, std::align_val_t(64)));
        const int64_t last = std::min(tiles, (task + 1) * TILES_PER_TASK);
        for (int64_t tile = task * TILES_PER_TASK; tile < last; tile++) kernel(problem, tile * GRID_ROWS, scratch);
        ::operator delete(scratch, std::align_val_t(64));
    });
}

void ldlq_block(Address W, Address T, Address F, Address d, Address scales, Address zeros, Address groups, int64_t m,
                int64_t k, int bits, Address codes, Address E, Address loss, int threads, const char* isa) {
    const LdlqProblem problem{at<const float>(W), at<const float>(T), at<const float>(F), at<const float>(d),
                              at<const float>(scales), at<const float>(zeros), at<const int32_t>(groups), m, k, bits,
                              at<uint8_t>(codes), at<float>(E), at<float>(loss)};
    const auto kernel = choose(isa).ldlq_rows;
    parallel_for((m + LDLQ_ROWS - 1) / LDLQ_ROWS, threads, [&](int64_t task) { kernel(problem, task * LDLQ_ROWS); });
}

#if defined(FEWBIT_HAVE_BF16)
void product(Address A, Address B, Address C, int64_t tokens, int64_t n, bool upper, int threads) {
    product_bf16(at<const uint16_t>(A), at<const uint16_t>(B), at<float>(C), tokens, n, upper, threads);
}
#endif

nb::list instruction_sets() {
    nb::list names;
    for (const Kernels& candidate : kernels()) names.append(candidate.isa);
#if defined(FEWBIT_HAVE_BF16)
    if (cpu().avx512_bf16) names.append("avx512_bf16");
#endif
    return names;
}

}  // namespace
}  // namespace fewbit

NB_MODULE(_native, m) {
    using release = nb::call_guard<nb::gil_scoped_release>;
    m.def("instruction_sets", &fewbit::instruction_sets);
    m.def("fit_grid", &fewbit::fit_grid, release());
    m.def("ldlq_block", &fewbit::ldlq_block, release());
#if defined(FEWBIT_HAVE_BF16)
    m.def("product_bf16", &fewbit::product, release());
#endif
}
