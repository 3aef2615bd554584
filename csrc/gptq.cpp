// One block of GPTQ (in its LDLQ form) for 32 rows at a time, one row per lane.
#include "solver.h"
#include "simd.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

// Columns whose targets are kept in registers, and vectors of rows that hide each other's latency.
#if defined(__AVX512F__)
constexpr int COLUMNS = 8, VECTORS = 2;
#else
constexpr int COLUMNS = 4, VECTORS = 1;
#endif
constexpr int TILE_ROWS = VECTORS * LANES;
static_assert(ROUND_ROWS % TILE_ROWS == 0, "whole vectors");

struct alignas(64) Tile {
    float w[ROUND_COLUMNS][TILE_ROWS];
    float te[ROUND_COLUMNS][TILE_ROWS];  // the targets of columns to come, the errors w − ŵ of finished ones
};

class BlockRounder {
public:
    BlockRounder(const RoundBlock& problem, int64_t row)
        : p_(problem), row_(row), rows_(problem.m - row < TILE_ROWS ? problem.m - row : TILE_ROWS) {}

    void run(Tile& tile) {
        for (int64_t i = 0; i < p_.k; i++) {
            copy_in(tile.w[i], p_.W + i * p_.m);
            copy_in(tile.te[i], p_.T + i * p_.m);
        }
        for (int v = 0; v < VECTORS; v++) loss_[v] = all(0.0f);
        for (int64_t first = 0; first < p_.k; first += COLUMNS) columns(tile, first);
        float loss[TILE_ROWS];
        for (int v = 0; v < VECTORS; v++) store(loss + v * LANES, loss_[v]);
        std::memcpy(p_.loss + row_, loss, static_cast<size_t>(rows_) * sizeof(float));
        for (int64_t i = 0; i < p_.k; i++)
            std::memcpy(p_.E + i * p_.m + row_, tile.te[i], static_cast<size_t>(rows_) * sizeof(float));
    }

private:
    void copy_in(float* to, const float* from) {
        std::memcpy(to, from + row_, static_cast<size_t>(rows_) * sizeof(float));
        for (int64_t r = rows_; r < TILE_ROWS; r++) to[r] = 0.0f;
    }

    // Finish columns first … first + COLUMNS: add what the columns before them owe, then one by one.
    void columns(Tile& tile, int64_t first) {
        const int count = p_.k - first < COLUMNS ? static_cast<int>(p_.k - first) : COLUMNS;
        Lanes t[COLUMNS][VECTORS];
        for (int c = 0; c < COLUMNS; c++)
            for (int v = 0; v < VECTORS; v++) t[c][v] = c < count ? load(tile.te[first + c] + v * LANES) : all(0.0f);
        if (count == COLUMNS) {
            for (int64_t j = 0; j < first; j++) {
                const float* f = p_.F + j * p_.k + first;
                for (int v = 0; v < VECTORS; v++) {
                    const Lanes e = load(tile.te[j] + v * LANES);
                    for (int c = 0; c < COLUMNS; c++) t[c][v] += e * all(f[c]);
                }
            }
        } else {
            for (int64_t j = 0; j < first; j++)
                for (int c = 0; c < count; c++)
                    for (int v = 0; v < VECTORS; v++)
                        t[c][v] += load(tile.te[j] + v * LANES) * all(p_.F[j * p_.k + first + c]);
        }
        for (int c = 0; c < count; c++) {
            Lanes e[VECTORS];
            column(tile, first + c, t[c], e);
            const float* f = p_.F + (first + c) * p_.k + first;
            for (int later = c + 1; later < count; later++)
                for (int v = 0; v < VECTORS; v++) t[later][v] += e[v] * all(f[later]);
        }
    }

    // q = clamp(round(t / s) + z), ŵ = s (q − z), e = w − ŵ.
    void column(Tile& tile, int64_t i, const Lanes* t, Lanes* e) {
        const int64_t group = p_.groups[i];
        if (group != group_) {
            group_ = group;
            copy_in(s_, p_.scales + group * p_.m);
            copy_in(z_, p_.zeros + group * p_.m);
            for (int64_t r = rows_; r < TILE_ROWS; r++) s_[r] = 1.0f;
        }
        const Lanes levels = all(static_cast<float>((1 << p_.bits) - 1)), d = all(p_.d[i]);
        float q[TILE_ROWS];
        for (int v = 0; v < VECTORS; v++) {
            const Lanes s = load(s_ + v * LANES), z = load(z_ + v * LANES);
            const Lanes centered = round_even(clamp(t[v] / s, all(0.0f) - z, levels - z));
            const Lanes w_hat = centered * s, r = t[v] - w_hat;
            loss_[v] += (r * d) * r;
            e[v] = load(tile.w[i] + v * LANES) - w_hat;
            store(tile.te[i] + v * LANES, e[v]);
            store(q + v * LANES, centered + z);
        }
        uint8_t* codes = p_.codes + i * p_.m + row_;
        for (int64_t r = 0; r < rows_; r++) codes[r] = static_cast<uint8_t>(q[r]);
    }

    const RoundBlock& p_;
    int64_t row_, rows_, group_ = -1;
    Lanes loss_[VECTORS];
    alignas(64) float s_[TILE_ROWS], z_[TILE_ROWS];
};

}  // namespace

void round_rows(const RoundBlock& problem, int64_t row) {
    const int64_t end = problem.m - row < ROUND_ROWS ? problem.m : row + ROUND_ROWS;
    Tile tile;
    for (; row < end; row += TILE_ROWS) BlockRounder(problem, row).run(tile);
}

}  // namespace FEWBIT_ISA
}  // namespace fewbit
