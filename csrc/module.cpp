// The Python module fewbit._native: pointers in, nothing out. src/fewbit/native.py checks shapes and
// types and is its only caller. No torch headers, so that one build serves every version of torch.
#include <nanobind/nanobind.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#include "kernels.h"
#include "matmul.h"
#include "steps.h"
#include "threads.h"

namespace nb = nanobind;

namespace fewbit {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

using Product = void (*)(const PackedWeight&, const MatMul&, int);

struct Kernels {
    const char* isa;
    Product matmul, matmul_int8;
    void (*grid_rows)(const GridProblem&, int64_t, float*);
    void (*ldlq_rows)(const LdlqProblem&, int64_t);
    void (*pack_tiles)(const PackedWeight&, const uint32_t*, uint8_t*, int);
    void (*unpack_tiles)(const PackedWeight&, uint32_t*, int);
    void (*dequantize_tiles)(const PackedWeight&, void*, Number, int);
    void (*rms_norm)(const RmsNorm&, int);
    void (*silu_gate)(const SiluGate&, int);
    void (*token_attention)(const Attention&, int);
    void (*prompt_attention)(const Attention&, int);
};

#define FEWBIT_ENTRY(NAME, ISA, PRODUCT, INT8_PRODUCT)                                                              \
    {NAME, PRODUCT, INT8_PRODUCT, ISA::grid_rows, ISA::ldlq_rows, ISA::pack_tiles, ISA::unpack_tiles, ISA::dequantize_tiles, \
     ISA::rms_norm, ISA::silu_gate, ISA::token_attention, ISA::prompt_attention}

std::vector<Kernels> find_kernels() {
    std::vector<Kernels> found;
#if defined(FEWBIT_HAVE_BF16)
    if (cpu().avx512_bf16 && cpu().avx512_vnni)
        found.push_back(FEWBIT_ENTRY("avx512_vnni", avx512, vnni::matmul, vnni::matmul));
#endif
#if defined(FEWBIT_HAVE_INT8_X86)
    if (cpu().avx512_vnni) found.push_back(FEWBIT_ENTRY("avx512_int8", avx512, avx512::matmul, avx512_vnni::matmul_int8));
    if (cpu().avx512) found.push_back(FEWBIT_ENTRY("avx512", avx512, avx512::matmul, avx512::matmul_int8));
#if defined(FEWBIT_HAVE_AVX_VNNI)
    if (cpu().avx_vnni) found.push_back(FEWBIT_ENTRY("avx_vnni", avx2, avx2::matmul, avx_vnni::matmul_int8));
#endif
    if (cpu().avx2) found.push_back(FEWBIT_ENTRY("avx2", avx2, avx2::matmul, avx2::matmul_int8));
#elif defined(FEWBIT_HAVE_X86)
    if (cpu().avx512) found.push_back(FEWBIT_ENTRY("avx512", avx512, avx512::matmul, avx512::matmul));
    if (cpu().avx2) found.push_back(FEWBIT_ENTRY("avx2", avx2, avx2::matmul, avx2::matmul));
#elif defined(FEWBIT_HAVE_INT8_ARM)
    if (cpu().dotprod) found.push_back(FEWBIT_ENTRY("dotprod", generic, generic::matmul, dotprod::matmul_int8));
    found.push_back(FEWBIT_ENTRY("neon", generic, generic::matmul, neon::matmul_int8));
#endif
    found.push_back(FEWBIT_ENTRY("generic", generic, generic::matmul, generic::matmul));
    return found;
}

// What this processor can run, best first.
const std::vector<Kernels>& kernels() {
    static const std::vector<Kernels> found = find_kernels();
    return found;
}

const Kernels& choose(const char* isa) {
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
void product(Address A, Address B, Address C, Address ends, int64_t batches, int64_t n, Address row_factors,
             Address column_factors, bool upper, int threads) {
    product_bf16({at<const uint16_t>(A), at<const uint16_t>(B), at<int32_t>(C), at<const int64_t>(ends),
                  at<const float>(row_factors), at<const float>(column_factors), batches, n, upper},
                 threads);
}
#endif

// What the three functions of a packed weight have in common; src/fewbit/kernels/cpu/layout.py makes it.
struct Packed {
    PackedWeight weight;

    Packed(Address tiles, Address scales, int scale_type, Address zeros, bool one_per_group, Address order, Address starts,
           int64_t outputs, int64_t inputs, int64_t groups, int bits, int64_t tiles_per_block)
        : weight{at<const uint8_t>(tiles), at<const void>(scales), static_cast<Number>(scale_type), one_per_group ? at<const uint8_t>(zeros) : nullptr, *at<const uint8_t>(zeros),
                 at<const int32_t>(order), at<const int32_t>(starts), outputs, inputs, groups, bits} {
        bool sound = weight.starts[0] == 0 && weight.starts[groups] == tiles_per_block;
        for (int64_t g = 0; g < groups; g++) sound = sound && weight.starts[g] <= weight.starts[g + 1];
        if (!sound) throw std::invalid_argument("starts do not divide the tiles into groups");
    }

    void pack(Address qweight, Address tiles, int threads) const {
        choose("best").pack_tiles(weight, at<const uint32_t>(qweight), at<uint8_t>(tiles), threads);
    }
    void unpack(Address qweight, int threads) const { choose("best").unpack_tiles(weight, at<uint32_t>(qweight), threads); }
    void dequantize(Address out, int type, int threads) const {
        choose("best").dequantize_tiles(weight, at<void>(out), static_cast<Number>(type), threads);
    }
    void matmul(Address x, Address y, int type, int64_t tokens, Address bias, int bias_type, int rounding, int threads,
                const char* isa) const {
        const MatMul product{at<const void>(x), at<void>(y), static_cast<Number>(type), tokens,
                             at<const void>(bias), static_cast<Number>(bias_type), static_cast<Rounding>(rounding)};
        const Kernels& kernels = choose(isa);
        (product.rounding == Rounding::int8 ? kernels.matmul_int8 : kernels.matmul)(weight, product, threads);
    }
};

void rms_norm(Address x, Address weight, Address y, int type, int64_t rows, int64_t n, float eps, int threads, const char* isa) {
    choose(isa).rms_norm({at<const void>(x), at<const void>(weight), at<void>(y), static_cast<Number>(type), rows, n, eps},
                         threads);
}

void silu_gate(Address x, Address y, int type, int64_t rows, int64_t n, int threads, const char* isa) {
    choose(isa).silu_gate({at<const void>(x), at<void>(y), static_cast<Number>(type), rows, n}, threads);
}

void attention(Address q, Address keys, Address values, Address y, int type, int64_t batch, int64_t heads, int64_t key_heads,
               int64_t queries, int64_t length, int64_t size, int64_t q_batch, int64_t q_head, int64_t q_token,
               int64_t key_batch, int64_t key_head, int64_t key_token, int64_t value_batch, int64_t value_head,
               int64_t value_token, float scale, bool causal, int threads, const char* isa) {
    const Attention problem{at<const void>(q), at<const void>(keys), at<const void>(values), at<void>(y),
                            static_cast<Number>(type), batch, heads, key_heads, queries, length, size, q_batch, q_head,
                            q_token, key_batch, key_head, key_token, value_batch, value_head, value_token, scale, causal};
    (queries == 1 ? choose(isa).token_attention : choose(isa).prompt_attention)(problem, threads);
}

void advise_huge_pages(Address address, size_t bytes) {
#if defined(__linux__)
    constexpr size_t HUGE_PAGE = size_t{1} << 21;
    const size_t first = (address + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, last = (address + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (last > first) madvise(at<void>(first), last - first, MADV_HUGEPAGE);  // advice: refusing it is no error
#else
    (void)address, (void)bytes;
#endif
}

// The caller knows that the pages are those of a file: what was read of them can be read again.
void forget_pages(Address address, size_t bytes) {
#if defined(__linux__)
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
    if (last > first) madvise(at<void>(first), last - first, MADV_DONTNEED);
#else
    (void)address, (void)bytes;
#endif
}

// Whether the best of them has a product of its own for 8-bit activations.
bool own_int8() { return choose("best").matmul_int8 != choose("best").matmul; }

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
    m.def("own_int8", &fewbit::own_int8);
    m.def("fit_grid", &fewbit::fit_grid, release());
    m.def("ldlq_block", &fewbit::ldlq_block, release());
    m.def("rms_norm", &fewbit::rms_norm, release());
    m.def("silu_gate", &fewbit::silu_gate, release());
    m.def("attention", &fewbit::attention, release());
    m.def("advise_huge_pages", &fewbit::advise_huge_pages);
    m.def("forget_pages", &fewbit::forget_pages);
    nb::class_<fewbit::Packed>(m, "Packed")
        .def(nb::init<fewbit::Address, fewbit::Address, int, fewbit::Address, bool, fewbit::Address, fewbit::Address, int64_t,
                      int64_t, int64_t, int, int64_t>())
        .def("pack", &fewbit::Packed::pack, release())
        .def("unpack", &fewbit::Packed::unpack, release())
        .def("dequantize", &fewbit::Packed::dequantize, release())
        .def("matmul", &fewbit::Packed::matmul, release());
#if defined(FEWBIT_HAVE_BF16)
    m.def("product_bf16", &fewbit::product, release());
#endif
}
