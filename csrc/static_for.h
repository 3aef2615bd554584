// Loops and choices whose index is a constant of the compiler.
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

// f(integral_constant) for the bits of a code.
template <class F>
inline void with_bits(int bits, F f) {
    switch (bits) {
        case 2: f(std::integral_constant<int, 2>()); break;
        case 3: f(std::integral_constant<int, 3>()); break;
        case 4: f(std::integral_constant<int, 4>()); break;
        default: f(std::integral_constant<int, 8>());
    }
}

}  // namespace
}  // namespace FEWBIT_ISA
}  // namespace fewbit
