// C += Aᵀ B for bfloat16 A and B, with the dot products of AVX512-BF16: exact products of token pairs, summed
// in float32. Where only the upper triangle is wanted (A = B, a Hessian) the work is halved. Every tile of C
// belongs to one task and its tokens are added in order, so the result does not depend on the threads.
#include <immintrin.h>

#include <cstdlib>
#include <cstring>
#include <memory>

#include "kernels.h"
#include "threads.h"

namespace fewbit {
namespace {

constexpr int ROWS = 8, VECTORS = 3;   // the register tile: 24 accumulators of 16 floats
constexpr int PANEL = VECTORS * 16;    // columns that are packed together
constexpr int64_t DEPTH = 256;         // token pairs per pass: a panel is 48 KiB
constexpr int64_t PANELS_PER_TASK = 8;

// Panel p of the packed tokens: DEPTH × PANEL words, each the values of one column in two tokens.
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

// C[0 … ROWS, 0 … PANEL] += Σ over pairs, for columns `rows` of one panel and all of another.
// Only the first `height` rows and `width` columns exist.
void tile(const uint32_t* rows, const uint32_t* panel, int64_t pairs, float* C, int64_t n, int64_t height, int64_t width) {
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
            float* c = C + r * n + v * 16;
            _mm512_mask_storeu_ps(c, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, c), sum[r][v]));
        }
    }
}

struct Pass {
    const uint32_t *A, *B;  // packed
    float* C;
    int64_t n, pairs;

    // Columns of panel j of B against those of panels first … last of A.
    void run(int64_t j, int64_t first, int64_t last) const {
        const int64_t width = n - j * PANEL;
        for (int64_t i = first; i < last; i++)
            for (int64_t r = 0; r < PANEL && i * PANEL + r < n; r += ROWS) {
                const int64_t row = i * PANEL + r;
                tile(A + i * DEPTH * PANEL + r, B + j * DEPTH * PANEL, pairs, C + row * n + j * PANEL, n, n - row, width);
            }
    }
};

}  // namespace

void product_bf16(const uint16_t* A, const uint16_t* B, float* C, int64_t tokens, int64_t n, bool upper, int threads) {
    const int64_t panels = (n + PANEL - 1) / PANEL;
    const int64_t pieces = (panels + PANELS_PER_TASK - 1) / PANELS_PER_TASK;
    const int64_t matrices = A == B ? 1 : 2;
    std::unique_ptr<uint32_t[]> packed(new uint32_t[static_cast<size_t>(matrices * panels * DEPTH * PANEL)]);
    uint32_t* const packed_a = packed.get() + (matrices - 1) * panels * DEPTH * PANEL;
    for (int64_t t = 0; t < tokens; t += 2 * DEPTH) {
        const int64_t count = tokens - t < 2 * DEPTH ? tokens - t : 2 * DEPTH;
        parallel_for(matrices * panels, threads, [&](int64_t task) {
            const int64_t p = task % panels;
            const uint16_t* source = task < panels ? B : A;
            pack_panel(source + t * n, count, n, p * PANEL, packed.get() + task * DEPTH * PANEL);
        });
        const Pass pass{packed_a, packed.get(), C, n, (count + 1) / 2};
        parallel_for(panels * pieces, threads, [&](int64_t task) {
            const int64_t j = task / pieces, first = task % pieces * PANELS_PER_TASK, end = upper ? j + 1 : panels;
            pass.run(j, first, first + PANELS_PER_TASK < end ? first + PANELS_PER_TASK : end);
        });
    }
}

}  // namespace fewbit
