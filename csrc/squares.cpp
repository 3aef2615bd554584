// Sums of squares of the columns of a matrix of activations; they fix the units of a Hessian.
#include <algorithm>

#include "dtype.h"
#include "solver.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

constexpr int64_t ROWS = 64;  // summed in float before they are added in double

template <class T, class Convert>
void add_columns(const T* X, const SumOfSquares& problem, int64_t first, int64_t count, Convert convert) {
    double total[SQUARE_COLUMNS] = {};
    for (int64_t a = 0; a < problem.tokens; a += ROWS) {
        float part[SQUARE_COLUMNS] = {};
        const int64_t b = std::min(a + ROWS, problem.tokens);
        for (int64_t t = a; t < b; t++) {
            const T* x = X + t * problem.n + first;
            for (int64_t i = 0; i < count; i++) {
                const float value = convert(x[i]);
                part[i] += value * value;
            }
        }
        for (int64_t i = 0; i < count; i++) total[i] += part[i];
    }
    for (int64_t i = 0; i < count; i++) problem.sums[first + i] = static_cast<float>(total[i]);
}

}  // namespace

void sum_of_squares(const SumOfSquares& problem, int64_t first) {
    const int64_t count = std::min(SQUARE_COLUMNS, problem.n - first);
    switch (problem.type) {
        case DType::float32:
            add_columns(static_cast<const float*>(problem.X), problem, first, count, [](float x) { return x; });
            break;
        case DType::float16:
            add_columns(static_cast<const uint16_t*>(problem.X), problem, first, count, [](uint16_t x) { return from_float16(x); });
            break;
        case DType::bfloat16:
            add_columns(static_cast<const uint16_t*>(problem.X), problem, first, count, [](uint16_t x) { return from_bfloat16(x); });
            break;
    }
}

}  // namespace FEWBIT_ISA
}  // namespace fewbit
