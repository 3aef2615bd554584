// Products with quantized weights: y = x Ŵᵀ + bias, ŵ = scale · (code − zero).
//
// The weight is held in tiles. A tile is 16 outputs (one per 32-bit lane) by the inputs that fill whole
// words: 16, 32, 8 and 4 inputs at 2, 3, 4 and 8 bits. For 2, 4 and 8 bits the word of a lane is the word of
// the checkpoint: input i of the tile at bit bits·i. At 3 bits the two low bits of inputs 0–15 and of 16–31
// are two vectors and the high bits a third one, laid out so that one byte-wise operation joins them.
// A row of tiles holds the inputs group by group; a group that does not fill its last tile is padded.
// Tiles of one block of 16 outputs follow each other, then comes the next block. So do its scales and zero points, which
// are read sequentially beside the tiles. Scales and zero points of outputs that do not exist are 0.
#pragma once

#include <cstdint>

namespace fewbit {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

constexpr int64_t BLOCK = 16;  // outputs of a tile

// What a tile looks like at each width.
constexpr int64_t tile_inputs(int bits) { return bits == 3 ? 32 : 32 / bits; }
constexpr int64_t tile_bytes(int bits) { return bits == 3 ? 192 : 64; }

struct PackedWeight {
    const uint8_t* tiles;
    const void* scales;  // (blocks, groups, BLOCK)
    DType scale_type;
    const uint8_t* zeros;  // (blocks, groups, BLOCK), or null where every zero point is `zero`
    int zero;
    const int32_t* order;   // (positions) the input at each position of a row of tiles, `inputs` for padding;
                            // null where position i is input i
    const int32_t* starts;  // (groups + 1): group g is tiles starts[g] … starts[g + 1]
    int64_t outputs, inputs, groups;
    int bits;

    int64_t tiles_per_block() const { return starts[groups]; }
    int64_t positions() const { return tiles_per_block() * tile_inputs(bits); }
    int64_t blocks() const { return (outputs + BLOCK - 1) / BLOCK; }
    int64_t block_bytes() const { return tiles_per_block() * tile_bytes(bits); }
    // The first of the scales and zero points of a group.
    int64_t grid(int64_t block, int64_t group) const { return (block * groups + group) * BLOCK; }
};

// What becomes of x: 16 bits of every number are kept; for many tokens it is rounded to what is fastest, where x is not
// float32: with AMX to bfloat16, with VNNI to 8 bits per token and 16 inputs; it is rounded to 8 bits per token and group.
enum class Rounding : int { none = 0, fast_prefill = 1, int8 = 2 };

struct MatMul {
    const void* x;  // (tokens, inputs)
    void* y;        // (tokens, outputs)
    DType type;    // of x and y
    int64_t tokens;
    const void* bias;  // (outputs), or null
    DType bias_type;
    Rounding rounding;
};

#define FEWBIT_MATMUL(ISA) \
    namespace ISA {        \
    void matmul(const PackedWeight& weight, const MatMul& product, int threads); \
    /* qweight int32 (words, outputs) of a checkpoint -> weight.tiles, and back: only bits of inputs that exist are set. */ \
    void pack_tiles(const PackedWeight& weight, const uint32_t* qweight, uint8_t* tiles, int threads); \
    void unpack_tiles(const PackedWeight& weight, uint32_t* qweight, int threads); \
    /* The weight (outputs, inputs), computed in float32 and rounded once. */ \
    void dequantize_tiles(const PackedWeight& weight, void* out, DType type, int threads); \
    }

FEWBIT_MATMUL(generic)
#if defined(FEWBIT_HAVE_X86)
FEWBIT_MATMUL(avx2)
FEWBIT_MATMUL(avx512)
#endif
#if defined(FEWBIT_HAVE_BF16)
namespace vnni {  // AVX-512 with VNNI and BF16
void matmul(const PackedWeight& weight, const MatMul& product, int threads);
}
#endif
#if defined(FEWBIT_HAVE_AMX)
namespace amx {  // the same, and for many tokens AMX
void matmul(const PackedWeight& weight, const MatMul& product, int threads);
}
#endif

// The same with Rounding::int8, faster.
#define FEWBIT_MATMUL_INT8(ISA) \
    namespace ISA {             \
    void matmul_int8(const PackedWeight& weight, const MatMul& product, int threads); \
    }

#if defined(FEWBIT_HAVE_INT8_X86)
FEWBIT_MATMUL_INT8(avx2)
FEWBIT_MATMUL_INT8(avx512)
FEWBIT_MATMUL_INT8(avx512_vnni)
#endif
#if defined(FEWBIT_HAVE_AVX_VNNI)
FEWBIT_MATMUL_INT8(avx_vnni)
#endif
#if defined(FEWBIT_HAVE_INT8_ARM)
FEWBIT_MATMUL_INT8(neon)
FEWBIT_MATMUL_INT8(dotprod)
#endif

}  // namespace fewbit
