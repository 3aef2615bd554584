// The grid search for sixteen rows at a time, one row per lane.
#include <limits>

#include "solver.h"
#include "simd.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

constexpr int AT_ONCE = 4;  // candidates per pass over the weights of a group
constexpr int LEAST_SQUARES_STEPS = 2;
constexpr float SMALLEST_SCALE = 1.0f / 16777216.0f;
constexpr float LARGEST_SCALE = 65504.0f;
constexpr float TINY = 1e-37f;

// s as float16 will hold it: not zero, finite, with its sign.
Lanes storable(Lanes s) {
    const Lanes zero = all(0.0f);
    const Mask negative = s < zero;
    const Lanes size = clamp(select(negative, zero - s, s), all(SMALLEST_SCALE), all(LARGEST_SCALE));
    const Lanes rounded = round_half(size);
    return select(negative, zero - rounded, rounded);
}

// The weights of one group, and the best scale and zero point so far.
class Search {
public:
    Search(const float* w, const float* D, int64_t width, const GridProblem& problem)
        : w_(w), D_(D), width_(width), problem_(problem) {
        levels_ = static_cast<float>((1 << problem.bits) - 1);
        zero_ = static_cast<float>(1 << (problem.bits - 1));
        low_ = high_ = all(0.0f);
        for (int64_t i = 0; i < width; i++) {
            low_ = min(low_, load(w + i * LANES));
            high_ = max(high_, load(w + i * LANES));
        }
        best_error_ = all(std::numeric_limits<float>::infinity());
        s = all(1.0f);
        z = all(zero_);
    }

    void run() {
        if (problem_.sym) {
            symmetric();
        } else {
            asymmetric();
        }
        flush();
        const Lanes best_s = s, best_z = z;
        for (int64_t i = 0; i < problem_.fine_count; i++)
            for (int offset = problem_.sym ? 0 : -1; offset <= (problem_.sym ? 0 : 1); offset++)
                attempt(best_s * all(problem_.fine[i]), valid(best_z + all(static_cast<float>(offset))));
        flush();
        for (int step = 0; step < LEAST_SQUARES_STEPS; step++) {
            attempt(least_squares(), z);
            flush();
        }
        const Mask empty = low_ == high_;
        s = select(empty, all(1.0f), s);
        z = select(empty, all(zero_), z);
    }

    Lanes s, z;

private:
    void symmetric() {
        const Lanes largest = max(all(0.0f) - low_, high_);
        attempt(largest * all(2 / levels_), z);  // the min-max grid: nothing worse is ever returned
        const Lanes base = largest / all(zero_);
        for (int64_t i = 0; i < problem_.coarse_count; i++) {
            attempt(base * all(problem_.coarse[i]), z);
            attempt(base * all(-problem_.coarse[i]), z);
        }
    }

    void asymmetric() {
        const Lanes base = (high_ - low_) / all(levels_);
        attempt(base, valid(round_even((all(0.0f) - low_) / max(base, all(TINY)))));
        for (int64_t i = 0; i < problem_.coarse_count; i++) {
            const Lanes scale = base * all(problem_.coarse[i]);
            const Lanes middle =
                round_even(all(levels_ / 2) - (high_ + low_) / max(scale + scale, all(TINY)));
            for (int64_t k = 0; k < problem_.offset_count; k++) {
                const Lanes offset = all(static_cast<float>(problem_.offsets[k]));
                attempt(scale, valid(middle + offset));
            }
        }
    }

    // A zero point that every reader of the format takes.
    Lanes valid(Lanes zero) const { return clamp(zero, all(1.0f), all(levels_)); }

    void attempt(Lanes scale, Lanes zero) {
        candidate_s_[waiting_] = storable(scale);
        candidate_z_[waiting_] = zero;
        if (++waiting_ == AT_ONCE) flush();
    }

    // Measure the waiting candidates and keep what is better.
    void flush() {
        if (waiting_ == 0) return;
        for (int c = waiting_; c < AT_ONCE; c++) {
            candidate_s_[c] = candidate_s_[0];
            candidate_z_[c] = candidate_z_[0];
        }
        Lanes inverse[AT_ONCE], low[AT_ONCE], high[AT_ONCE], error[AT_ONCE];
        for (int c = 0; c < AT_ONCE; c++) {
            inverse[c] = all(1.0f) / candidate_s_[c];
            low[c] = all(0.0f) - candidate_z_[c];
            high[c] = all(levels_) - candidate_z_[c];
            error[c] = all(0.0f);
        }
        for (int64_t i = 0; i < width_; i++) {
            const Lanes w = load(w_ + i * LANES), D = all(D_[i]);
            for (int c = 0; c < AT_ONCE; c++) {
                const Lanes q = clamp(round_even(w * inverse[c]), low[c], high[c]);
                const Lanes e = q * candidate_s_[c] - w;
                error[c] += (e * D) * e;
            }
        }
        for (int c = 0; c < waiting_; c++) {
            const Mask better = error[c] < best_error_;
            best_error_ = select(better, error[c], best_error_);
            s = select(better, candidate_s_[c], s);
            z = select(better, candidate_z_[c], z);
        }
        waiting_ = 0;
    }

    // The scale that is best for the codes of the best grid: Σ D w q / Σ D q².
    Lanes least_squares() const {
        const Lanes inverse = all(1.0f) / s, low = all(0.0f) - z, high = all(levels_) - z;
        Lanes product = all(0.0f), norm = all(0.0f);
        for (int64_t i = 0; i < width_; i++) {
            const Lanes w = load(w_ + i * LANES), D = all(D_[i]);
            const Lanes q = clamp(round_even(w * inverse), low, high);
            product += (q * D) * w;
            norm += (q * D) * q;
        }
        const Lanes fitted = product / max(norm, all(TINY));
        return select(both(all(0.0f) < norm, all(0.0f) < fitted * s), fitted, s);
    }

    const float* w_;
    const float* D_;
    int64_t width_;
    const GridProblem& problem_;
    float levels_, zero_;
    Lanes low_, high_, best_error_;
    Lanes candidate_s_[AT_ONCE], candidate_z_[AT_ONCE];
    int waiting_ = 0;
};

}  // namespace

void grid_rows(const GridProblem& p, int64_t row, float* scratch) {
    static_assert(GRID_ROWS == LANES, "one row per lane");
    const int64_t rows = p.m - row < LANES ? p.m - row : LANES;
    for (int64_t g = 0; g < p.G; g++) {
        const int64_t first = p.starts[g], width = p.starts[g + 1] - first;
        for (int64_t r = 0; r < LANES; r++) {
            const float* source = p.W + (row + (r < rows ? r : 0)) * p.n + first;
            for (int64_t i = 0; i < width; i++) scratch[i * LANES + r] = source[i];
        }
        Search search(scratch, p.D + first, width, p);
        search.run();
        float s[LANES], z[LANES];
        store(s, search.s);
        store(z, search.z);
        for (int64_t r = 0; r < rows; r++) {
            p.scales[(row + r) * p.G + g] = s[r];
            p.zeros[(row + r) * p.G + g] = z[r];
        }
    }
}

}  // namespace FEWBIT_ISA
}  // namespace fewbit
