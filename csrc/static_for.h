// Loops whose index is a constant of the compiler.
#pragma once

#include <utility>

#include "dtype.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

template <int... I, class F>
inline void static_for_indices(std::integer_sequence<int, I...>, F f) {
    (f(std::integral_constant<int, I>()), ...);
}

// f(integral_constant) for 0 … COUNT − 1.
template <int COUNT, class F>
inline void static_for(F f) {
    static_for_indices(std::make_integer_sequence<int, COUNT>(), f);
}

}  // namespace
}  // namespace FEWBIT_ISA
}  // namespace fewbit
