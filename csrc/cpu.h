// What this processor can run, found once at load time.
#pragma once

namespace fewbit {

struct Cpu {
    bool avx2 = false;         // with FMA and float16 conversions
    bool avx_vnni = false;     // AVX2 and dot products of int8 quadruples
    bool avx512 = false;       // F, BW, DQ and VL
    bool avx512_vnni = false;  // F, BW, DQ, VL and dot products of int8 quadruples
    bool avx512_bf16 = false;  // F, BW, DQ, VL and dot products of bfloat16 pairs
    bool amx_bf16 = false;     // tiles of bfloat16, which the operating system lets this process use
    bool dotprod = false;      // ARM: dot products of int8 quadruples
};

const Cpu& cpu();

}  // namespace fewbit
