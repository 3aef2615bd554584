// The Python module fewbit._native. src/fewbit/native.py is its only caller. Arrays are checked here for dtype, number of
// dimensions, layout and device, and their shapes against each other. Exceptions are the functions that a model calls for
// every token (a product, a norm, a gate, attention) and `Packed`: they take addresses, because checking would take a
// measurable share of a small product; their callers in Python check. No torch headers: one build serves every version.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

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
#include "solver.h"
#include "matmul.h"
#include "fused_ops.h"
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
    void (*round_rows)(const RoundBlock&, int64_t);
    void (*sum_of_squares)(const SumOfSquares&, int64_t);
    void (*pack_tiles)(const PackedWeight&, const uint32_t*, uint8_t*, int);
    void (*unpack_tiles)(const PackedWeight&, uint32_t*, int);
    void (*dequantize_tiles)(const PackedWeight&, void*, DType, int);
    void (*rms_norm)(const RmsNorm&, int);
    void (*silu_mul)(const SiluMul&, int);
    void (*token_attention)(const Attention&, int);
    void (*prompt_attention)(const Attention&, int);
};

#define FEWBIT_ENTRY(NAME, ISA, PRODUCT, INT8_PRODUCT)                                                              \
    {NAME, PRODUCT, INT8_PRODUCT, ISA::grid_rows, ISA::round_rows, ISA::sum_of_squares, ISA::pack_tiles, ISA::unpack_tiles, \
     ISA::dequantize_tiles, ISA::rms_norm, ISA::silu_mul, ISA::token_attention, ISA::prompt_attention}

std::vector<Kernels> find_kernels() {
    std::vector<Kernels> found;
#if defined(FEWBIT_HAVE_AMX)
    if (cpu().amx_bf16) found.push_back(FEWBIT_ENTRY("amx", avx512, amx::matmul, amx::matmul));
#endif
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

// Contiguous arrays in host memory; `In` is only read.
template <class T, int DIMENSIONS>
using In = nb::ndarray<const T, nb::ndim<DIMENSIONS>, nb::c_contig, nb::device::cpu>;
template <class T, int DIMENSIONS>
using Out = nb::ndarray<T, nb::ndim<DIMENSIONS>, nb::c_contig, nb::device::cpu>;

DType dtype_of(nb::dlpack::dtype type) {
    if (type == nb::dtype<float>()) return DType::float32;
    if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && type.bits == 16) return DType::float16;
    if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && type.bits == 16) return DType::bfloat16;
    throw std::invalid_argument("neither float32 nor float16 nor bfloat16");
}

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

template <class Array>
bool has_shape(const Array& array, size_t rows, size_t columns) {
    return array.shape(0) == rows && array.shape(1) == columns;
}

void fit_grid(In<float, 2> W, In<float, 1> D, In<int32_t, 1> starts, In<float, 1> coarse, In<float, 1> fine,
              In<int32_t, 1> offsets, int bits, bool sym, Out<float, 2> scales, Out<float, 2> zeros, int threads,
              const char* isa) {
    const size_t m = W.shape(0), n = W.shape(1), G = scales.shape(1);
    require(D.size() == n, "D does not have one number per column of W");
    require(starts.size() == G + 1 && has_shape(scales, m, G) && has_shape(zeros, m, G),
            "scales and zeros do not have one number per row of W and group");
    const GridProblem problem{W.data(), D.data(), starts.data(), int64_t(m), int64_t(n), int64_t(G),
                              coarse.data(), int64_t(coarse.size()), fine.data(), int64_t(fine.size()),
                              offsets.data(), int64_t(offsets.size()), bits, sym, scales.data(), zeros.data()};
    int64_t widest = 0, before = 0;
    for (size_t g = 0; g <= G; g++) {
        const int64_t start = problem.starts[g];
        require(before <= start && start <= int64_t(n), "starts do not divide the columns into groups");
        widest = std::max(widest, start - before);
        before = start;
    }
    // One scratch buffer per running task would need the thread's number; instead a task of many rows allocates its
    // own, and the allocation is negligible.
    constexpr int64_t TILES_PER_TASK = 4;
    const int64_t tiles = (problem.m + GRID_ROWS - 1) / GRID_ROWS;
    const auto kernel = choose(isa).grid_rows;
    const int64_t tasks = (tiles + TILES_PER_TASK - 1) / TILES_PER_TASK;
    const size_t scratch_bytes = static_cast<size_t>(widest * GRID_ROWS) * sizeof(float);
    nb::gil_scoped_release release;
    parallel_for(tasks, threads, [&](int64_t task) {
        float* scratch = static_cast<float*>(::operator new(scratch_bytes, std::align_val_t(64)));
        const int64_t last = std::min(tiles, (task + 1) * TILES_PER_TASK);
        for (int64_t tile = task * TILES_PER_TASK; tile < last; tile++) kernel(problem, tile * GRID_ROWS, scratch);
        ::operator delete(scratch, std::align_val_t(64));
    });
}

void round_block(In<float, 2> W, In<float, 2> T, In<float, 2> F, In<float, 1> d, In<float, 2> scales, In<float, 2> zeros,
                 In<int32_t, 1> groups, int bits, Out<uint8_t, 2> codes, Out<float, 2> E, Out<float, 1> loss, int threads,
                 const char* isa) {
    const size_t k = W.shape(0), m = W.shape(1), G = scales.shape(0);
    require(k <= size_t(ROUND_COLUMNS), "a block has too many columns");
    require(has_shape(T, k, m) && has_shape(codes, k, m) && has_shape(E, k, m), "T, codes and E do not have the shape of W");
    require(has_shape(F, k, k) && d.size() == k && groups.size() == k, "F, d and groups do not have the size of the block");
    require(has_shape(scales, G, m) && has_shape(zeros, G, m) && loss.size() == m,
            "scales, zeros and loss do not have one number per row of the layer");
    for (size_t i = 0; i < k; i++)
        require(0 <= groups.data()[i] && size_t(groups.data()[i]) < G, "a column's group does not exist");
    const RoundBlock problem{W.data(), T.data(), F.data(), d.data(), scales.data(), zeros.data(), groups.data(),
                             int64_t(m), int64_t(k), bits, codes.data(), E.data(), loss.data()};
    const auto kernel = choose(isa).round_rows;
    nb::gil_scoped_release release;
    parallel_for((problem.m + ROUND_ROWS - 1) / ROUND_ROWS, threads, [&](int64_t task) { kernel(problem, task * ROUND_ROWS); });
}

using Activations = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void sum_of_squares(Activations X, Out<float, 1> sums, int threads, const char* isa) {
    const size_t n = X.shape(1);
    require(sums.size() == n, "sums does not have one number per column of X");
    const SumOfSquares problem{X.data(), dtype_of(X.dtype()), int64_t(X.shape(0)), int64_t(n), sums.data()};
    const auto kernel = choose(isa).sum_of_squares;
    nb::gil_scoped_release release;
    parallel_for((problem.n + SQUARE_COLUMNS - 1) / SQUARE_COLUMNS, threads,
                 [&](int64_t task) { kernel(problem, task * SQUARE_COLUMNS); });
}

#if defined(FEWBIT_HAVE_BF16)
void gram(Activations A, Activations B, Out<int32_t, 2> C, In<int64_t, 1> ends, In<float, 1> row_factors,
          In<float, 1> column_factors, bool upper, int threads, const char* isa) {
    constexpr nb::dlpack::dtype BFLOAT16{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
    const size_t tokens = A.shape(0), n = A.shape(1);
    require(A.dtype() == BFLOAT16 && B.dtype() == BFLOAT16, "A and B are not bfloat16");
    require(has_shape(B, tokens, n) && has_shape(C, n, n), "A, B and C do not have the shapes of a product");
    require(row_factors.size() == n && column_factors.size() == n, "there is not one factor per row and column");
    int64_t before = 0;
    for (size_t b = 0; b < ends.size(); b++) {
        require(before <= ends.data()[b] && ends.data()[b] <= int64_t(tokens), "ends do not divide the tokens into batches");
        before = ends.data()[b];
    }
    const GramBf16 problem{static_cast<const uint16_t*>(A.data()), static_cast<const uint16_t*>(B.data()), C.data(),
                           ends.data(), row_factors.data(), column_factors.data(), int64_t(ends.size()), int64_t(n), upper};
    auto* kernel = bf16::gram_bf16;
#if defined(FEWBIT_HAVE_AMX)
    if (std::strcmp(choose(isa).isa, "amx") == 0) kernel = amx::gram_bf16;
#else
    choose(isa);  // its name is checked all the same
#endif
    nb::gil_scoped_release release;
    kernel(problem, threads);
}
#endif

// A packed weight, which src/fewbit/kernels/cpu/packed.py checks; it points into tensors that the caller keeps alive.
struct Packed {
    PackedWeight weight;

    Packed(Address tiles, Address scales, int scale_type, Address zeros, bool one_per_group, Address order, Address starts,
           int64_t outputs, int64_t inputs, int64_t groups, int bits, int64_t tiles_per_block)
        : weight{at<const uint8_t>(tiles), at<const void>(scales), static_cast<DType>(scale_type), one_per_group ? at<const uint8_t>(zeros) : nullptr, *at<const uint8_t>(zeros),
                 at<const int32_t>(order), at<const int32_t>(starts), outputs, inputs, groups, bits} {
        bool sound = weight.starts[0] == 0 && weight.starts[groups] == tiles_per_block;
        for (int64_t g = 0; g < groups; g++) sound = sound && weight.starts[g] <= weight.starts[g + 1];
        if (!sound) throw std::invalid_argument("starts do not divide the tiles into groups");
    }

    void pack(In<int32_t, 2> qweight, Out<uint8_t, 3> tiles, int threads) const {
        require_words(qweight);
        require(tiles.size() == size_t(weight.blocks() * weight.block_bytes()), "the tiles do not have the size of the weight");
        nb::gil_scoped_release release;
        choose("best").pack_tiles(weight, reinterpret_cast<const uint32_t*>(qweight.data()), tiles.data(), threads);
    }
    void unpack(Out<int32_t, 2> qweight, int threads) const {
        require_words(qweight);
        nb::gil_scoped_release release;
        choose("best").unpack_tiles(weight, reinterpret_cast<uint32_t*>(qweight.data()), threads);
    }
    void dequantize(nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu> out, int threads) const {
        require(has_shape(out, size_t(weight.outputs), size_t(weight.inputs)), "out does not have the shape of the weight");
        const DType type = dtype_of(out.dtype());
        nb::gil_scoped_release release;
        choose("best").dequantize_tiles(weight, out.data(), type, threads);
    }
    void matmul(Address x, Address y, int type, int64_t tokens, Address bias, int bias_type, int rounding, int threads,
                const char* isa) const {
        const MatMul product{at<const void>(x), at<void>(y), static_cast<DType>(type), tokens,
                             at<const void>(bias), static_cast<DType>(bias_type), static_cast<Rounding>(rounding)};
        const Kernels& kernels = choose(isa);
        (product.rounding == Rounding::int8 ? kernels.matmul_int8 : kernels.matmul)(weight, product, threads);
    }

private:
    template <class Array>
    void require_words(const Array& qweight) const {
        const int64_t words = weight.bits == 3 ? (weight.inputs + 31) / 32 * 3 : (weight.inputs * weight.bits + 31) / 32;
        require(int64_t(qweight.shape(0)) >= words && int64_t(qweight.shape(1)) == weight.outputs,
                "qweight does not have the shape of the weight");
    }
};

void rms_norm(Address x, Address weight, Address y, int type, int64_t rows, int64_t n, float eps, int threads, const char* isa) {
    choose(isa).rms_norm({at<const void>(x), at<const void>(weight), at<void>(y), static_cast<DType>(type), rows, n, eps},
                         threads);
}

void silu_mul(Address x, Address y, int type, int64_t rows, int64_t n, int threads, const char* isa) {
    choose(isa).silu_mul({at<const void>(x), at<void>(y), static_cast<DType>(type), rows, n}, threads);
}

void attention(Address q, Address keys, Address values, Address y, int type, int64_t batch, int64_t heads, int64_t key_heads,
               int64_t queries, int64_t length, int64_t size, int64_t q_batch, int64_t q_head, int64_t q_token,
               int64_t key_batch, int64_t key_head, int64_t key_token, int64_t value_batch, int64_t value_head,
               int64_t value_token, float scale, bool causal, int threads, const char* isa) {
    const Attention problem{at<const void>(q), at<const void>(keys), at<const void>(values), at<void>(y),
                            static_cast<DType>(type), batch, heads, key_heads, queries, length, size, q_batch, q_head,
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

// The caller knows that the pages belong to a mapped file, so that they can be read again.
void drop_pages(Address address, size_t bytes) {
#if defined(__linux__)
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
    if (last > first) madvise(at<void>(first), last - first, MADV_DONTNEED);
#else
    (void)address, (void)bytes;
#endif
}

// Whether the best instruction set has its own products for 8-bit activations.
bool has_int8_products() { return choose("best").matmul_int8 != choose("best").matmul; }

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
    const auto exact = nb::arg().noconvert();  // refuse other dtypes and layouts instead of copying
    m.def("instruction_sets", &fewbit::instruction_sets);
    m.def("has_int8_products", &fewbit::has_int8_products);
    m.def("fit_grid", &fewbit::fit_grid, exact, exact, exact, exact, exact, exact, nb::arg(), nb::arg(), exact, exact,
          nb::arg(), nb::arg());
    m.def("round_block", &fewbit::round_block, exact, exact, exact, exact, exact, exact, exact, nb::arg(), exact, exact,
          exact, nb::arg(), nb::arg());
    m.def("sum_of_squares", &fewbit::sum_of_squares, exact, exact, nb::arg(), nb::arg());
    m.def("rms_norm", &fewbit::rms_norm, release());
    m.def("silu_mul", &fewbit::silu_mul, release());
    m.def("attention", &fewbit::attention, release());
    m.def("advise_huge_pages", &fewbit::advise_huge_pages);
    m.def("drop_pages", &fewbit::drop_pages);
    nb::class_<fewbit::Packed>(m, "Packed")
        .def(nb::init<fewbit::Address, fewbit::Address, int, fewbit::Address, bool, fewbit::Address, fewbit::Address, int64_t,
                      int64_t, int64_t, int, int64_t>())
        .def("pack", &fewbit::Packed::pack, exact, exact, nb::arg())
        .def("unpack", &fewbit::Packed::unpack, exact, nb::arg())
        .def("dequantize", &fewbit::Packed::dequantize, exact, nb::arg())
        .def("matmul", &fewbit::Packed::matmul, release());
#if defined(FEWBIT_HAVE_BF16)
    m.def("gram_bf16", &fewbit::gram, exact, exact, exact, exact, exact, exact, nb::arg(), nb::arg(), nb::arg());
#endif
}
