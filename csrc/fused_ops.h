// What a model does between its products: norms, gates, and attention of one new token to those before it.
#pragma once

#include <cstdint>

#include "matmul.h"

namespace fewbit {

// y = weight · round(x / √(mean(x²) + eps)), row by row; rounded twice, as transformers' models round.
struct RmsNorm {
    const void* x;       // (rows, n)
    const void* weight;  // (n)
    void* y;             // (rows, n)
    DType type;         // of all three
    int64_t rows, n;
    float eps;
};

// y = round(silu(gate)) · up.
struct SiluMul {
    const void* x;  // (rows, 2n): gate, then up
    void* y;        // (rows, n)
    DType type;
    int64_t rows, n;
};

// softmax(scale · Q Kᵀ) V. Each head of keys serves heads / key_heads consecutive heads of queries.
struct Attention {
    const void* q;       // (batch, heads, queries, size), with the strides below, in elements
    const void* keys;    // (batch, key_heads, length, size), likewise
    const void* values;  // as the keys
    void* y;             // (batch, queries, heads, size), contiguous
    DType type;
    int64_t batch, heads, key_heads, queries, length, size;
    int64_t q_batch, q_head, q_token;
    int64_t key_batch, key_head, key_token;
    int64_t value_batch, value_head, value_token;
    float scale;
    bool causal;  // query i sees the keys 0 … i, and there are as many
};

#define FEWBIT_FUSED_OPS(ISA)                                       \
    namespace ISA {                                             \
    void rms_norm(const RmsNorm& problem, int threads);         \
    void silu_mul(const SiluMul& problem, int threads);       \
    /* One query for each text and head, which sees all keys. */ \
    void token_attention(const Attention& problem, int threads); \
    void prompt_attention(const Attention& problem, int threads); \
    }

FEWBIT_FUSED_OPS(generic)
#if defined(FEWBIT_HAVE_X86)
FEWBIT_FUSED_OPS(avx2)
FEWBIT_FUSED_OPS(avx512)
#endif

}  // namespace fewbit
