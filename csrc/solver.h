// The row-parallel kernels of the solver. Each is compiled once per instruction set and chosen at run time.
#pragma once

#include <cstdint>

#include "matmul.h"

namespace fewbit {

// One call of fit_grid; see src/fewbit/gptq/grid.py for the mathematics.
struct GridProblem {
    const float* W;         // (m, n)
    const float* D;         // (n)
    const int32_t* starts;  // (G + 1): group g is columns starts[g] … starts[g + 1]
    int64_t m, n, G;
    const float* coarse;
    int64_t coarse_count;
    const float* fine;
    int64_t fine_count;
    const int32_t* offsets;
    int64_t offset_count;
    int bits;
    bool sym;
    float* scales;  // (m, G)
    float* zeros;   // (m, G)
};

// One call of round_block; see src/fewbit/gptq/gptq.py. Matrices with m as the last dimension hold one
// column of the weight per row.
struct RoundBlock {
    const float* W;         // (k, m)
    const float* T;         // (k, m)
    const float* F;         // (k, k)
    const float* d;         // (k)
    const float* scales;    // (G, m)
    const float* zeros;     // (G, m)
    const int32_t* groups;  // (k)
    int64_t m, k;
    int bits;
    uint8_t* codes;  // (k, m)
    float* E;        // (k, m)
    float* loss;     // (m)
};

// One call of sum_of_squares; see src/fewbit/gptq/gram.py.
struct SumOfSquares {
    const void* X;  // (tokens, n)
    DType type;
    int64_t tokens, n;
    float* sums;  // (n)
};

constexpr int64_t GRID_ROWS = 16;
constexpr int64_t ROUND_ROWS = 32;
constexpr int64_t ROUND_COLUMNS = 128;  // the largest k
constexpr int64_t SQUARE_COLUMNS = 256;

#define FEWBIT_SOLVER(ISA)                                                                 \
    namespace ISA {                                                                         \
    /* Rows row … row + GRID_ROWS; scratch holds GRID_ROWS floats per column of a group. */ \
    void grid_rows(const GridProblem& problem, int64_t row, float* scratch);                \
    /* Rows row … row + ROUND_ROWS. */                                                       \
    void round_rows(const RoundBlock& problem, int64_t row);                                \
    /* Columns first … first + SQUARE_COLUMNS. */                                            \
    void sum_of_squares(const SumOfSquares& problem, int64_t first);                        \
    }

FEWBIT_SOLVER(generic)
#if defined(FEWBIT_HAVE_X86)
FEWBIT_SOLVER(avx2)
FEWBIT_SOLVER(avx512)
#endif

#if defined(FEWBIT_HAVE_BF16)
// C += Aᵀ B, every batch of tokens on its own, times the factors of the row and the column of C, rounded.
struct GramBf16 {
    const uint16_t *A, *B;         // bfloat16 (tokens, n)
    int32_t* C;                    // (n, n); of it, where `upper`, at least the upper triangle
    const int64_t* ends;           // (batches): tokens ends[b − 1] … ends[b] are batch b
    const float* row_factors;      // (n)
    const float* column_factors;   // (n)
    int64_t batches, n;
    bool upper;
};

namespace bf16 {  // AVX512-BF16
void gram_bf16(const GramBf16& problem, int threads);
}
#if defined(FEWBIT_HAVE_AMX)
namespace amx {
void gram_bf16(const GramBf16& problem, int threads);
}
#endif
#endif

}  // namespace fewbit
