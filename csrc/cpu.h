// What this processor can run, found once at load time.
#pragma once

namespace fewbit {

struct Cpu {
    bool avx2 = false;         // with FMA
    bool avx512 = false;       // F, BW, DQ and VL
    bool avx512_bf16 = false;  // the above and dot products of bfloat16 pairs
};

const Cpu& cpu();

}  // namespace fewbit
