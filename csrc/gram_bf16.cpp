// C += Aᵀ B for bfloat16 A and B, with the dot products of AVX512-BF16 or the tiles of AMX: exact products of token pairs,
// summed in float32. Where only the upper triangle is wanted (A = B, a Hessian) the work is halved.
//
// Tokens come in batches. Each batch is summed on its own (in pieces of 512 tokens) and its sum rounded to C's
// integers, so C does not depend on the order of the batches, nor on who else adds to it, nor on the threads.
//
// What limits AMX is memory: panels are used for several squares of C while they are in the second-level cache.
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "solver.h"
#include "threads.h"

#if defined(__AMX_BF16__)
#include "amx_tiles.h"
#endif

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

// The register tile: 24 accumulators of 16 floats, or four tiles of AMX. Token pairs of a piece are padded to `PAIRS`.
#if defined(__AMX_BF16__)
constexpr int ROWS = 32, VECTORS = 2, PAIRS = 16;
#else
constexpr int ROWS = 8, VECTORS = 3, PAIRS = 1;
#endif
constexpr int PANEL = VECTORS * 16;  // columns that are packed into one panel
constexpr int64_t DEPTH = 256;       // token pairs per pass and, at most, per piece: a panel is 48 KiB, or 32
constexpr int64_t MOST_PANELS = 8;     // of each factor, in a task

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
    const int64_t rest = (tokens + 1) / 2 % PAIRS;
    if (rest) std::memset(packed, 0, static_cast<size_t>((PAIRS - rest) * PANEL) * sizeof(uint32_t));
}

// The sums of a register tile over token pairs, times the factors of its row and its column and rounded, are added to C.
// Only the first `height` rows and `width` columns exist.
template <class Sums>
void add_scaled(const Sums& sum, const float* row_factors, const float* column_factors, int32_t* C, int64_t n, int64_t height, int64_t width) {
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

// C[0 … ROWS, 0 … PANEL] += what ROWS columns of one panel and all of another make. On AMX the rows come from `turn`.
#if defined(__AMX_BF16__)
void tile(const uint32_t* rows, const uint32_t* panel, int64_t pairs, const float* row_factors,
          const float* column_factors, int32_t* C, int64_t n, int64_t height, int64_t width) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < pairs; k += PAIRS, rows += PAIRS * PANEL, panel += PAIRS * PANEL) {
        _tile_loadd(4, rows, 64);
        _tile_loadd(6, panel, PANEL * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + 16, PANEL * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, rows + 16 * PAIRS, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    alignas(64) __m512 sum[ROWS][VECTORS];
    _tile_stored(0, &sum[0][0], sizeof sum[0]);
    _tile_stored(1, &sum[0][1], sizeof sum[0]);
    _tile_stored(2, &sum[16][0], sizeof sum[0]);
    _tile_stored(3, &sum[16][1], sizeof sum[0]);
    add_scaled(sum, row_factors, column_factors, C, n, height, width);
}

// 16 × 16 words of a panel, transposed.
void transpose(const uint32_t* from, uint32_t* to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * PANEL);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // then a[i + j] has columns j, 4 + j, 8 + j and 12 + j of rows i … i + 3
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        const __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44), high = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
        const __m512i low2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44), high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
        _mm512_storeu_si512(to + j * 16, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(to + (4 + j) * 16, _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_storeu_si512(to + (8 + j) * 16, _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(to + (12 + j) * 16, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}

// A packed panel as the left factors of tiles: [PAIRS token pairs][16 columns], column by column.
void turn(const uint32_t* panel, int64_t pairs, uint32_t* turned) {
    for (int64_t k = 0; k < pairs; k += PAIRS, panel += PAIRS * PANEL)
        for (int column = 0; column < PANEL; column += 16, turned += 16 * PAIRS) transpose(panel + column, turned);
}
#else
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
    add_scaled(sum, row_factors, column_factors, C, n, height, width);
}
#endif

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
            const int64_t left = ends[batch] - row, count = left < 2 * DEPTH ? left : 2 * DEPTH;
            const int64_t pairs = ((count + 1) / 2 + PAIRS - 1) / PAIRS * PAIRS;
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

// Both factors of the pieces of one panel. `left` may be `right`.
void pack(const GramBf16& problem, const std::vector<Piece>& pieces, int64_t panel, uint32_t* left, uint32_t* right) {
    const int64_t n = problem.n, column = panel * PANEL;
    for (const Piece& piece : pieces) {
        const int64_t at = (panel * DEPTH + piece.first) * PANEL;
        pack_panel(problem.B + piece.row * n, piece.count, n, column, right + at);
#if defined(__AMX_BF16__)
        const uint32_t* source = right + at;
        alignas(64) uint32_t other[DEPTH * PANEL];
        if (problem.A != problem.B) {
            pack_panel(problem.A + piece.row * n, piece.count, n, column, other);
            source = other;
        }
        turn(source, piece.pairs, left + at);
#else
        if (left != right) pack_panel(problem.A + piece.row * n, piece.count, n, column, left + at);
#endif
    }
}

}  // namespace

void gram_bf16(const GramBf16& problem, int threads) {
    const int64_t panels = (problem.n + PANEL - 1) / PANEL, size = panels * DEPTH * PANEL;
    const int64_t group = std::max<int64_t>(1, std::min(MOST_PANELS, panels / (2 * threads))), groups = (panels + group - 1) / group;
    const bool shared = problem.A == problem.B && PAIRS == 1;
    std::unique_ptr<uint32_t[]> packed(new uint32_t[static_cast<size_t>(shared ? size : 2 * size)]);
    uint32_t *const right = packed.get(), *const left = shared ? right : right + size;
    for (const std::vector<Piece>& pieces : passes(problem.ends, problem.batches)) {
        parallel_for(panels, threads, [&](int64_t panel) { pack(problem, pieces, panel, left, right); });
        const Pass pass{left, right, pieces, problem};
        parallel_for(groups * groups, threads, [&](int64_t task) {
            const int64_t column = task / groups * group, first = task % groups * group;
            if (problem.upper && first > column) return;
#if defined(__AMX_BF16__)
            const TileUnit unit;
#endif
            for (int64_t j = column; j < std::min(panels, column + group); j++)
                pass.run(j, first, std::min(problem.upper ? j + 1 : panels, first + group));
        });
    }
}

}  // namespace FEWBIT_ISA
}  // namespace fewbit
