// C += Aᵀ B for bfloat16 A and B, with the dot products of AVX512-BF16: exact products of token pairs, summed
// in float32. Where only the upper triangle is wanted (A = B, a Hessian) the work is halved.
//
// Tokens come in batches. Each batch is summed on its own (in pieces of 512 tokens) and its sum rounded to C's
// integers, so C does not depend on the order of the batches, nor on who else adds to it, nor on the threads.
#include <immintrin.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "solver.h"
#include "threads.h"

namespace fewbit {
namespace {

constexpr int ROWS = 8, VECTORS = 3;   // the register tile: 24 accumulators of 16 floats
constexpr int PANEL = VECTORS * 16;    // columns that are packed into one panel
constexpr int64_t DEPTH = 256;         // token pairs per pass and, at most, per piece: a panel is 48 KiB
constexpr int64_t PANELS_PER_TASK = 8;

// Tokens row … row + count of one batch; in a packed panel, pairs first … first + pairs.
struct Piece {
    int64_t row, count, first, pairs;
};

// One piece of a panel: rows of PANEL words, each the values of one column in two tokens.
void pack_panel(const uint16_t* X, int64_t tokens, int64_t n, int64_t column, uint32_t* packed) {
    const int64_t width = n - column < PANEL ? n - column : PANEL;
    alignas(64) uint16_t edge[2][PANEL] = {};
    for (int64_t t = 0; t < tokens; t += 2, packed += PANEL) {
        const uint16_t* a = X + t * n + column;
        const uint16_t* b = a + n;
        if (width < PANEL || t + 1 == tokens) {
            std::memcpy(edge[0], a, static_cast<size_t>(width) * 2);
            if (t + 1 < tokens) {
                std::memcpy(edge[1], b, static_cast<size_t>(width) * 2);
            } else {
                std::memset(edge[1], 0, sizeof edge[1]);
            }
            a = edge[0];
            b = edge[1];
        }
        for (int v = 0; v < PANEL; v += 16) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(a + v)));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(b + v)));
            _mm512_storeu_si512(packed + v, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

// C[0 … ROWS, 0 … PANEL] += the sum over pairs, times the factors of its row and its column, rounded: for columns
// `rows` of one panel and all of another. Only the first `height` rows and `width` columns exist.
void tile(const uint32_t* rows, const uint32_t* panel, int64_t pairs, const float* row_factors,
          const float* column_factors, int32_t* C, int64_t n, int64_t height, int64_t width) {
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++, rows += PANEL, panel += PANEL) {
        __m512bh b[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) b[v] = (__m512bh)_mm512_loadu_si512(panel + v * 16);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(rows[r]));
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], a, b[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        if (r >= height) break;
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            const int64_t left = width - v * 16;
            if (left <= 0) continue;
            const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
            const __m512 factor = _mm512_maskz_loadu_ps(mask, column_factors + v * 16);
            const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(sum[r][v], _mm512_set1_ps(row_factors[r])), factor);
            int32_t* c = C + r * n + v * 16;
            const __m512i before = _mm512_maskz_loadu_epi32(mask, c);
            _mm512_mask_storeu_epi32(c, mask, _mm512_add_epi32(before, _mm512_cvtps_epi32(scaled)));
        }
    }
}

struct Pass {
    const uint32_t *A, *B;  // packed
    const std::vector<Piece>& pieces;
    const GramBf16& problem;

    // Columns of panel j of B against columns of panels first … last of A.
    void run(int64_t j, int64_t first, int64_t last) const {
        const int64_t n = problem.n, column = j * PANEL, width = n - column;
        for (int64_t i = first; i < last; i++)
            for (int64_t r = 0; r < PANEL && i * PANEL + r < n; r += ROWS) {
                const int64_t row = i * PANEL + r;
                for (const Piece& piece : pieces)
                    tile(A + (i * DEPTH + piece.first) * PANEL + r, B + (j * DEPTH + piece.first) * PANEL, piece.pairs,
                         problem.row_factors + row, problem.column_factors + column, problem.C + row * n + column, n,
                         n - row, width);
            }
    }
};

// The pieces of all batches, in passes.
std::vector<std::vector<Piece>> passes(const int64_t* ends, int64_t batches) {
    std::vector<std::vector<Piece>> result(1);
    int64_t row = 0, depth = 0;
    for (int64_t batch = 0; batch < batches; batch++)
        while (row < ends[batch]) {
            const int64_t left = ends[batch] - row, count = left < 2 * DEPTH ? left : 2 * DEPTH, pairs = (count + 1) / 2;
            if (depth + pairs > DEPTH) {
                result.emplace_back();
                depth = 0;
            }
            result.back().push_back({row, count, depth, pairs});
            row += count;
            depth += pairs;
        }
    return result;
}

}  // namespace

void gram_bf16(const GramBf16& problem, int threads) {
    const int64_t n = problem.n;
    const int64_t panels = (n + PANEL - 1) / PANEL;
    const int64_t tasks_per_panel = (panels + PANELS_PER_TASK - 1) / PANELS_PER_TASK;
    const int64_t matrices = problem.A == problem.B ? 1 : 2;
    std::unique_ptr<uint32_t[]> packed(new uint32_t[static_cast<size_t>(matrices * panels * DEPTH * PANEL)]);
    uint32_t* const packed_a = packed.get() + (matrices - 1) * panels * DEPTH * PANEL;
    for (const std::vector<Piece>& pieces : passes(problem.ends, problem.batches)) {
        parallel_for(matrices * panels, threads, [&](int64_t task) {
            const int64_t p = task % panels;
            const uint16_t* source = task < panels ? problem.B : problem.A;
            for (const Piece& piece : pieces)
                pack_panel(source + piece.row * n, piece.count, n, p * PANEL,
                           packed.get() + (task * DEPTH + piece.first) * PANEL);
        });
        const Pass pass{packed_a, packed.get(), pieces, problem};
        parallel_for(panels * tasks_per_panel, threads, [&](int64_t task) {
            const int64_t j = task / tasks_per_panel, first = task % tasks_per_panel * PANELS_PER_TASK;
            const int64_t end = problem.upper ? j + 1 : panels;
            pass.run(j, first, first + PANELS_PER_TASK < end ? first + PANELS_PER_TASK : end);
        });
    }
}

}  // namespace fewbit
