// y = x Ŵᵀ with the dot products of AVX-512: pairs of bfloat16 (x as it is; float32 and float16 as the sum of two
// bfloat16) or quadruples of int8 (x rounded per token and group, or finer: per token and 16 inputs). Codes enter the
// products exactly; scales and zero points are applied to the sums of a group in float32, the zero points through
// the sums of x:
//
//   y_n = Σ_g s_gn · (Σ_k x_k (q_kn − c) − (z_gn − c) Σ_k x_k)
//
// For few tokens, tiles are unpacked on the way to the dot product, so that every packed byte is read once. For many,
// 48 outputs are unpacked into the second-level cache and used for all tokens. Every output is summed
// in an order that depends on neither the threads nor the other tokens.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "vnni_groups.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

// ---- Few tokens: tiles unpacked on the way ----

// Fetches the scales and zero points of a group; past the last one, of the next block.
void expect_group(const PackedWeight& w, int64_t group, int64_t block) {
    const int64_t at = w.grid(block, group), size = w.scale_type == DType::float32 ? 4 : 2;
    _mm_prefetch(static_cast<const char*>(w.scales) + at * size, _MM_HINT_T0);
    if (w.zeros) _mm_prefetch(reinterpret_cast<const char*>(w.zeros + at), _MM_HINT_T0);
}

template <int BITS, class Math, int ROWS, int BLOCKS, bool SPLIT, bool CENTRED>
void direct(const PackedWeight& w, const MatMul& p, const RowTile& tile, int64_t block) {
    constexpr int TOKENS = ROWS / (SPLIT ? 2 : 1);
    constexpr int DIGITS = Math::digits(ROWS);
    constexpr int CHAINS = ROWS > 1 ? 1 : BLOCKS > 1 ? 2 : 4;  // enough independent sums to hide the latency of a dot product
    constexpr int64_t BYTES = tile_bytes(BITS), WORDS = tile_inputs(BITS) / Math::PER_WORD, PREFETCH_BYTES = 384;
    const Math math;
    const uint8_t* weights = w.tiles + block * w.block_bytes();
    const int64_t block_bytes = w.block_bytes();
    const int64_t next = (BLOCKS - 1) * block_bytes;  // what follows the end of a block is, in the next call, its successor
    __m512 total[TOKENS][BLOCKS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
        for (int n = 0; n < BLOCKS; n++) total[t][n] = _mm512_setzero_ps();
    const int64_t prefetch_groups = 1 + PREFETCH_BYTES * w.groups / block_bytes;
    for (int64_t g = 0; g < w.groups; g++) {
        if constexpr (ROWS <= 4)
            for (int n = 0; n < BLOCKS; n++) expect_group(w, g + prefetch_groups, block + n);
        typename Math::Sum sum[ROWS * CHAINS][BLOCKS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS * CHAINS; r++) {
            const auto first = r < ROWS ? start<Math, CENTRED>(w, tile, g * TOKENS + r, true) : Math::zero();
#pragma GCC unroll 4
            for (int n = 0; n < BLOCKS; n++) sum[r][n] = first;
        }
        for (int64_t i = w.starts[g]; i < w.starts[g + 1]; i++) {
            const uint32_t* x = tile.words + i * WORDS * ROWS;
            Tile<BITS> codes[BLOCKS];
#pragma GCC unroll 4
            for (int n = 0; n < BLOCKS; n++) {
                const uint8_t* from = weights + n * block_bytes + i * BYTES;
                if constexpr (ROWS <= 4) {
                    const uint8_t* prefetch = from + PREFETCH_BYTES + (i * BYTES + PREFETCH_BYTES < block_bytes ? 0 : next);
                    for (int64_t line = 0; line < BYTES; line += 64) _mm_prefetch((const char*)(prefetch + line), _MM_HINT_T0);
                }
                codes[n] = Tile<BITS>(from);
            }
            static_for<static_cast<int>(WORDS) * DIGITS>([&](auto dot) {
                constexpr int k = decltype(dot)::value;
                __m512i v[BLOCKS];
#pragma GCC unroll 4
                for (int n = 0; n < BLOCKS; n++) v[n] = math.template word<k, DIGITS>(codes[n]);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const __m512i broadcast = _mm512_set1_epi32(static_cast<int>(x[k / DIGITS * ROWS + r]));
#pragma GCC unroll 4
                    for (int n = 0; n < BLOCKS; n++) {
                        auto& s = sum[CHAINS > 1 ? k % CHAINS : r][n];
                        s = Math::dot(s, v[n], broadcast);
                    }
                }
            });
        }
#pragma GCC unroll 4
        for (int chain = 1; chain < CHAINS; chain++)
#pragma GCC unroll 4
            for (int n = 0; n < BLOCKS; n++) sum[0][n] = Math::add(sum[0][n], sum[chain][n]);
        typename Math::Sum finished[ROWS][BLOCKS];
        Grid grid[BLOCKS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int n = 0; n < BLOCKS; n++) finished[r][n] = sum[r][n];
#pragma GCC unroll 4
        for (int n = 0; n < BLOCKS; n++) grid[n] = Grid(w, g, block + n, Math::CENTRE);
        if constexpr (ROWS * BLOCKS > 12) {
            add_group_apart<Math, ROWS, BLOCKS, SPLIT, CENTRED>(grid, tile, g, true, finished, total);
        } else {
            add_group<Math, ROWS, BLOCKS, SPLIT, CENTRED>(grid, tile, g, true, finished, total);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
        for (int n = 0; n < BLOCKS; n++) write_result(w, p, tile.token + t, block + n, total[t][n]);
}

// Calls f(integral_constant) with the rows of a tile.
template <bool SPLIT, class F>
void with_rows(const RowTile& tile, F f) {
    switch (tile.tokens * (SPLIT ? 2 : 1)) {
        case 8: f(std::integral_constant<int, 8>()); break;
        case 4: f(std::integral_constant<int, 4>()); break;
        case 2: f(std::integral_constant<int, 2>()); break;
        default:
            if constexpr (!SPLIT) f(std::integral_constant<int, 1>());
    }
}

// Blocks first … last of the outputs, BLOCKS at a time.
template <int BITS, class Math, bool SPLIT, bool CENTRED, int BLOCKS>
void direct_blocks(const PackedWeight& w, const MatMul& p, const Activations& x, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block += BLOCKS)
        for (const RowTile& tile : x.tiles)
            with_rows<SPLIT>(tile, [&](auto rows) {
                constexpr int ROWS = decltype(rows)::value;
                if (last - block >= BLOCKS) {
                    direct<BITS, Math, ROWS, BLOCKS, SPLIT, CENTRED>(w, p, tile, block);
                } else {
                    for (int64_t one = block; one < last; one++) direct<BITS, Math, ROWS, 1, SPLIT, CENTRED>(w, p, tile, one);
                }
            });
}

template <int BITS, class Math, bool SPLIT, bool CENTRED>
void few_tokens(const PackedWeight& w, const MatMul& p, int threads) {
    const Activations x = Activations::make<BITS, Math, SPLIT>(w, p, threads);
    // Eight rows and three blocks fill the registers, and so do four rows with their totals; fewer leave room for four blocks.
    // Rows of several blocks are read side by side: memory serves several sequential reads at once.
    const int64_t rows = x.tiles.front().tokens * (SPLIT ? 2 : 1);
    const int64_t group = rows < 4 ? 4 : 3, units = (w.blocks() + group - 1) / group;
    // A few long pieces per thread: neighbours are read by the same thread, and a late thread leaves work to the others.
    const int64_t pieces = threads == 1 ? 1 : std::min<int64_t>(units, 4 * threads);
    parallel_for(pieces, threads, [&](int64_t piece) {
        const int64_t first = units * piece / pieces * group;
        const int64_t last = std::min(w.blocks(), units * (piece + 1) / pieces * group);
        if (rows < 4) {
            direct_blocks<BITS, Math, SPLIT, CENTRED, 4>(w, p, x, first, last);
        } else {
            direct_blocks<BITS, Math, SPLIT, CENTRED, 3>(w, p, x, first, last);
        }
    });
}

// ---- Many tokens: outputs unpacked once, then used for all of them ----

constexpr int PANEL_BLOCKS = 3;
constexpr int64_t PANEL_POSITIONS = 5120;  // at 2 bytes and 48 outputs half of a one-megabyte cache

// Part of a group in a panel: whole steps, or all that is left. Folded weights have no groups: their scale is in them.
struct Segment {
    int64_t group, first_tile, last_tile, first_step;
    bool last;
};

// Whether weights are unpacked with their scale: one rounding to bfloat16, as in a dense bfloat16 weight.
template <class Math, bool SPLIT>
constexpr bool FOLDED = !Math::INT8 && !SPLIT;

// A step of `words` words: its sums, scaled, are added to the group's sums.
template <class Math, int ROWS>
inline void add_step(const uint32_t* x, const uint32_t* weights, int64_t stride, const float* scales, int words, __m512 (&group)[ROWS][PANEL_BLOCKS]) {
    typename Math::Sum sum[ROWS][PANEL_BLOCKS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
        for (int n = 0; n < PANEL_BLOCKS; n++) sum[r][n] = Math::zero();
#pragma GCC unroll 4
    for (int i = 0; i < words; i++) {
        __m512i v[PANEL_BLOCKS];
#pragma GCC unroll 3
        for (int n = 0; n < PANEL_BLOCKS; n++) v[n] = _mm512_loadu_si512(weights + n * stride + i * 16);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const __m512i broadcast = _mm512_set1_epi32(static_cast<int>(x[i * ROWS + r]));
#pragma GCC unroll 3
            for (int n = 0; n < PANEL_BLOCKS; n++) sum[r][n] = Math::dot(sum[r][n], v[n], broadcast);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
        const __m512 scale = _mm512_set1_ps(scales[r]);
#pragma GCC unroll 3
        for (int n = 0; n < PANEL_BLOCKS; n++) group[r][n] = _mm512_fmadd_ps(Math::value(sum[r][n]), scale, group[r][n]);
    }
}

// The last step of a group, shorter than others, is added to the totals by itself: this is rare, and here it takes no registers.
template <class Math, int ROWS>
__attribute__((noinline)) void add_rest(const uint32_t* x, const uint32_t* weights, int64_t stride, const float* scales, int words,
                                        const Grid* grids, float* totals) {
    __m512 group[ROWS][PANEL_BLOCKS];
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < PANEL_BLOCKS; n++) group[r][n] = _mm512_setzero_ps();
    add_step<Math, ROWS>(x, weights, stride, scales, words, group);
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < PANEL_BLOCKS; n++, totals += 16)
            _mm512_storeu_ps(totals, _mm512_fmadd_ps(group[r][n], grids[n].scale, _mm512_loadu_ps(totals)));
}

template <int BITS, class Math, bool SPLIT>
class Panel {
public:
    Panel(const PackedWeight& w, int64_t block, int64_t blocks, uint32_t* words, Grid* grids)
        : w_(w), block_(block), blocks_(blocks), words_(words), grids_(grids) {}

    void unpack(const std::vector<Segment>& segments) {
        first_tile_ = segments.front().first_tile;
        stride_ = (segments.back().last_tile - first_tile_) * WORDS * 16;
        for (int64_t n = 0; n < blocks_; n++)
            for (size_t s = 0; s < segments.size(); s++) {
                const Segment& segment = segments[s];
                const Grid grid(w_, segment.group, block_ + n, Math::CENTRE);
                grids_[s * PANEL_BLOCKS + static_cast<size_t>(n)] = grid;
                for (int64_t i = segment.first_tile; i < segment.last_tile; i++)
                    unpack_tile(Tile<BITS>(w_.tiles + (block_ + n) * w_.block_bytes() + i * tile_bytes(BITS)), grid,
                                words_ + n * stride_ + (i - first_tile_) * WORDS * 16);
            }
    }

    // Adds the products with the ROWS rows of a tile to the totals [tokens][PANEL_BLOCKS][16].
    template <int ROWS, bool CENTRED>
    void multiply(const RowTile& tile, const std::vector<Segment>& segments, float* totals) const {
        constexpr int TOKENS = ROWS / (SPLIT ? 2 : 1);
        __m512 total[TOKENS][PANEL_BLOCKS];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 3
            for (int n = 0; n < PANEL_BLOCKS; n++) total[t][n] = _mm512_loadu_ps(totals + (t * PANEL_BLOCKS + n) * 16);
        for (size_t s = 0; s < segments.size();) {
            const size_t end = FOLDED<Math, SPLIT> ? segments.size() : s + 1;  // folded segments are one
            typename Math::Sum sum[ROWS][PANEL_BLOCKS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const auto first = start<Math, CENTRED>(w_, tile, segments[s].group * TOKENS + r, segments[s].last);
#pragma GCC unroll 3
                for (int n = 0; n < PANEL_BLOCKS; n++) sum[r][n] = first;
            }
            const int64_t first = segments[s].first_tile * WORDS, count = segments[end - 1].last_tile * WORDS - first;
            const uint32_t* x = tile.words + first * ROWS;
            const uint32_t* weights = words_ + (first - first_tile_ * WORDS) * 16;
            for (int64_t k = 0; k < count; k++, x += ROWS, weights += 16) {
                __m512i v[PANEL_BLOCKS];
#pragma GCC unroll 3
                for (int n = 0; n < PANEL_BLOCKS; n++) v[n] = _mm512_loadu_si512(weights + n * stride_);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const __m512i broadcast = _mm512_set1_epi32(static_cast<int>(x[r]));
#pragma GCC unroll 3
                    for (int n = 0; n < PANEL_BLOCKS; n++) sum[r][n] = Math::dot(sum[r][n], v[n], broadcast);
                }
            }
            if constexpr (FOLDED<Math, SPLIT>) {
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 3
                    for (int n = 0; n < PANEL_BLOCKS; n++) total[t][n] = _mm512_add_ps(total[t][n], sum[t][n]);
            } else {
                add_group<Math, ROWS, PANEL_BLOCKS, SPLIT, CENTRED>(grids_ + s * PANEL_BLOCKS, tile, segments[s].group, segments[s].last, sum, total);
            }
            s = end;
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 3
            for (int n = 0; n < PANEL_BLOCKS; n++) _mm512_storeu_ps(totals + (t * PANEL_BLOCKS + n) * 16, total[t][n]);
    }

    // The same where every STEP inputs share a scale: the sums of steps are added up in float32.
    template <int ROWS>
    __attribute__((noinline)) void multiply_steps(const RowTile& tile, const std::vector<Segment>& segments, float* totals) const {
        constexpr int STEP_WORDS = static_cast<int>(Math::STEP) / Math::PER_WORD;
        const Grid* grids = grids_;
        for (const Segment& segment : segments) {
            const uint32_t* x = tile.words + segment.first_tile * WORDS * ROWS;
            const uint32_t* weights = words_ + (segment.first_tile - first_tile_) * WORDS * 16;
            const float* scales = tile.scales + segment.first_step * ROWS;
            int64_t count = (segment.last_tile - segment.first_tile) * WORDS;
            __m512 group[ROWS][PANEL_BLOCKS];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
                for (int n = 0; n < PANEL_BLOCKS; n++) group[r][n] = _mm512_setzero_ps();
            for (; count >= STEP_WORDS; count -= STEP_WORDS, x += STEP_WORDS * ROWS, weights += STEP_WORDS * 16, scales += ROWS)
                add_step<Math, ROWS>(x, weights, stride_, scales, STEP_WORDS, group);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const __m512 x_sum = _mm512_set1_ps(segment.last ? tile.sums[segment.group * ROWS + r] : 0.0f);
#pragma GCC unroll 3
                for (int n = 0; n < PANEL_BLOCKS; n++) {
                    float* const total = totals + (r * PANEL_BLOCKS + n) * 16;
                    const __m512 value = _mm512_fnmadd_ps(grids[n].zero, x_sum, group[r][n]);
                    _mm512_storeu_ps(total, _mm512_fmadd_ps(value, grids[n].scale, _mm512_loadu_ps(total)));
                }
            }
            if (count > 0) add_rest<Math, ROWS>(x, weights, stride_, scales, static_cast<int>(count), grids, totals);
            grids += PANEL_BLOCKS;
        }
    }

private:
    static constexpr int64_t WORDS = tile_inputs(BITS) / Math::PER_WORD;  // of a lane in a tile

    void unpack_tile(const Tile<BITS>& tile, const Grid& grid, uint32_t* words) const {
        if constexpr (!FOLDED<Math, SPLIT>) {
            static_for<static_cast<int>(WORDS)>([&](auto k) {
                _mm512_storeu_si512(words + decltype(k)::value * 16, math_.template word<decltype(k)::value, 1>(tile));
            });
        } else {
            fold(math_, tile, grid, words);
        }
    }

    const Math math_{};
    const PackedWeight& w_;
    int64_t block_, blocks_, first_tile_ = 0, stride_ = 0;
    uint32_t* words_;
    Grid* grids_;  // [segments][PANEL_BLOCKS]
};

// The groups, cut where a panel is full.
template <class Math>
std::vector<std::vector<Segment>> panel_segments(const PackedWeight& w) {
    const int64_t inputs = tile_inputs(w.bits), limit = PANEL_POSITIONS / inputs;
    const int64_t unit = std::max<int64_t>(1, Math::STEP / inputs);  // what is cut off has whole steps
    int64_t step = 0, used = 0;
    std::vector<std::vector<Segment>> panels(1);
    for (int64_t g = 0; g < w.groups; g++) {
        for (int64_t first = w.starts[g]; first < w.starts[g + 1];) {
            if (limit - used < unit) panels.emplace_back(), used = 0;
            const int64_t last = std::min<int64_t>(w.starts[g + 1], first + (limit - used) / unit * unit);
            const int64_t before = Math::STEP ? (first - w.starts[g]) * inputs / Math::STEP : 0;
            panels.back().push_back({g, first, last, step + before, last == w.starts[g + 1]});
            used += last - first;
            first = last;
        }
        step += steps_of<Math>(w, g);
    }
    return panels;
}

template <int BITS, class Math, bool SPLIT, bool CENTRED>
void panel_tasks(const PackedWeight& w, const MatMul& p, const Activations& x, std::atomic<int64_t>& next) {
    const auto panels = panel_segments<Math>(w);
    const int64_t positions = std::min(PANEL_POSITIONS, w.positions()), total_size = PANEL_BLOCKS * 16;
    Buffer<uint32_t> words(positions / Math::PER_WORD * total_size);
    Buffer<float> totals(p.tokens * total_size);
    size_t most = 0;
    for (const auto& segments : panels) most = std::max(most, segments.size());
    Buffer<Grid> grids(static_cast<int64_t>(most) * PANEL_BLOCKS);
    const int64_t tasks = (w.blocks() + PANEL_BLOCKS - 1) / PANEL_BLOCKS;
    for (int64_t task = next++; task < tasks; task = next++) {
        const int64_t block = task * PANEL_BLOCKS, blocks = std::min<int64_t>(PANEL_BLOCKS, w.blocks() - block);
        std::memset(totals.data(), 0, static_cast<size_t>(p.tokens * total_size) * sizeof(float));
        Panel<BITS, Math, SPLIT> panel(w, block, blocks, words.data(), grids.data());
        for (const std::vector<Segment>& segments : panels) {
            panel.unpack(segments);
            for (const RowTile& tile : x.tiles) {
                with_rows<SPLIT>(tile, [&](auto rows) {
                    float* at = totals.data() + tile.token * total_size;
                    constexpr int ROWS = decltype(rows)::value;
                    if constexpr (Math::STEP > 0) {
                        panel.template multiply_steps<ROWS>(tile, segments, at);
                    } else {
                        panel.template multiply<ROWS, CENTRED>(tile, segments, at);
                    }
                });
            }
        }
        for (int64_t token = 0; token < p.tokens; token++)
            for (int64_t n = 0; n < blocks; n++)
                write_result(w, p, token, block + n, _mm512_loadu_ps(totals.data() + token * total_size + n * 16));
    }
}

template <int BITS, class Math, bool SPLIT, bool CENTRED>
void many_tokens(const PackedWeight& w, const MatMul& p, int threads) {
    const Activations x = Activations::make<BITS, Math, SPLIT>(w, p, threads);
    std::atomic<int64_t> next{0};
    parallel_for(threads, threads, [&](int64_t) { panel_tasks<BITS, Math, SPLIT, CENTRED>(w, p, x, next); });
}

// From `from` tokens on unpacking once is faster than unpacking for every few rows (benchmarks/kernels_cpu.py).
template <int BITS, class Math, bool SPLIT, bool CENTRED = false>
void multiply_all(const PackedWeight& w, const MatMul& p, int64_t from, int threads) {
    if (p.tokens >= from) {
        many_tokens<BITS, Math, SPLIT, CENTRED>(w, p, threads);
    } else {
        few_tokens<BITS, Math, SPLIT, CENTRED>(w, p, threads);
    }
}

template <int BITS>
void run(const PackedWeight& w, const MatMul& p, int threads) {
    constexpr int64_t PANEL_FROM_INT8 = 40;
    if (p.rounding == Rounding::fast_prefill && p.tokens >= PANEL_FROM_INT8 && p.type != DType::float32) {
        many_tokens<BITS, FineInt8<BITS>, false, false>(w, p, threads);
    } else if (p.rounding == Rounding::int8 && w.zeros) {
        multiply_all<BITS, Int8<BITS>, false>(w, p, PANEL_FROM_INT8, threads);
    } else if (p.rounding == Rounding::int8) {
        multiply_all<BITS, Int8<BITS>, false, true>(w, p, PANEL_FROM_INT8, threads);
    } else if (p.type == DType::bfloat16) {
        multiply_all<BITS, Bfloat16<BITS>, false>(w, p, 64, threads);
    } else {
        multiply_all<BITS, Bfloat16<BITS>, true>(w, p, 32, threads);
    }
}

}  // namespace

void matmul(const PackedWeight& w, const MatMul& p, int threads) {
    with_bits(w.bits, [&](auto bits) { run<decltype(bits)::value>(w, p, threads); });
}

}  // namespace FEWBIT_ISA
}  // namespace fewbit
