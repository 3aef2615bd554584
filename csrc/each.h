// Loops whose index is a constant of the compiler.
#pragma once

#include <utility>

#include "numbers.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

template <int... I, class F>
inline void each_index(std::integer_sequence<int, I...>, F f) {
    (f(std::integral_constant<int, I>()), ...);
}

// f(integral_constant) for 0 … COUNT − 1.
template <int COUNT, class F>
inline void each(F f) {
    each_index(std::make_integer_sequence<int, COUNT>(), f);
}

}  // namespace
}  // namespace FEWBIT_ISA
}  // namespace fewbit
