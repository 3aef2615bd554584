// See fused_ops.h. Everything is computed in float32, and results do not depend on the number of threads.
#include "fused_ops.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "fused_ops_math.h"
#include "threads.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

constexpr int64_t PIECE = 512;       // numbers that are read, processed and written at a time
constexpr int64_t POSITIONS = 256;   // tokens in one task of the attention
constexpr int64_t WORTHWHILE = 1 << 14;  // numbers that a thread should have before another one helps

// On as many threads as have something to do.
template <class Body>
void in_parallel(int64_t tasks, int64_t numbers, int threads, Body&& body) {
    const int64_t useful = std::max<int64_t>(1, numbers / WORTHWHILE);
    parallel_for(tasks, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t task) { body(task); });
}

// To the nearest number of the type, in float32.
inline void round_to(DType type, float* x, int64_t count) {
    if (type == DType::bfloat16) {
        for (int64_t i = 0; i < count; i++) x[i] = from_bfloat16(to_bfloat16(x[i]));
    } else if (type == DType::float16) {
        for (int64_t i = 0; i < count; i++) x[i] = from_float16(to_float16(x[i]));
    }
}

void norm_row(const RmsNorm& problem, int64_t row) {
    alignas(64) float x[PIECE];
    alignas(64) float weight[PIECE];
    const int64_t n = problem.n, first = row * n;
    float squares = 0.0f;
    for (int64_t a = 0; a < n; a += PIECE) {
        const int64_t count = std::min(PIECE, n - a);
        std::fill(x + count / BLOCK * BLOCK, x + padded(count), 0.0f);
        read_numbers(problem.x, problem.type, first + a, count, x);
        squares += dot(x, x, padded(count));
    }
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(n) + problem.eps);
    for (int64_t a = 0; a < n; a += PIECE) {
        const int64_t count = std::min(PIECE, n - a);
        read_numbers(problem.x, problem.type, first + a, count, x);
        read_numbers(problem.weight, problem.type, a, count, weight);
        for (int64_t i = 0; i < count; i++) x[i] *= factor;
        round_to(problem.type, x, count);
        for (int64_t i = 0; i < count; i++) x[i] *= weight[i];
        write_numbers(problem.y, problem.type, first + a, count, x);
    }
}

// What one task of the attention leaves of its tokens, for each query: the largest score, the sum of the
// exponentials over it, and the sum of the values with these weights.
struct Partial {
    float *largest, *weights, *values;
};

void attend(const Attention& problem, int64_t batch, int64_t key_head, int64_t first, int64_t last, Partial out) {
    const int64_t size = problem.size, width = padded(size), queries = problem.heads / problem.key_heads;
    std::vector<float> memory(static_cast<size_t>(queries * (width + POSITIONS) + width), 0.0f);
    float *q = memory.data(), *scores = q + queries * width, *row = scores + queries * POSITIONS;
    for (int64_t g = 0; g < queries; g++) {
        const int64_t from = batch * problem.q_batch + (key_head * queries + g) * problem.q_head;
        read_numbers(problem.q, problem.type, from, size, q + g * width);
        for (int64_t i = 0; i < size; i++) q[g * width + i] *= problem.scale;
    }
    for (int64_t t = first; t < last; t++) {
        const int64_t from = batch * problem.key_batch + key_head * problem.key_head + t * problem.key_token;
        read_numbers(problem.keys, problem.type, from, size, row);
        for (int64_t g = 0; g < queries; g++) scores[g * POSITIONS + t - first] = dot(q + g * width, row, width);
    }
    for (int64_t g = 0; g < queries; g++) {
        float* of_query = scores + g * POSITIONS;
        const int64_t count = last - first;
        std::fill(of_query + count, of_query + padded(count), -std::numeric_limits<float>::infinity());
        out.largest[g] = largest_of(of_query, padded(count));
        out.weights[g] = exponentials(of_query, padded(count), out.largest[g]);
        std::fill(out.values + g * width, out.values + (g + 1) * width, 0.0f);
    }
    for (int64_t t = first; t < last; t++) {
        const int64_t from = batch * problem.value_batch + key_head * problem.value_head + t * problem.value_token;
        read_numbers(problem.values, problem.type, from, size, row);
        for (int64_t g = 0; g < queries; g++) {
            const float weight = scores[g * POSITIONS + t - first];
            float* sums = out.values + g * width;
            for (int64_t i = 0; i < width; i += WIDTH) put(sums + i, floats_at(sums + i) + times(floats_at(row + i), weight));
        }
    }
}

// The combined parts of one query: (parts), (parts), (parts, width).
void join(const Attention& problem, int64_t query, int64_t parts, int64_t stride, Partial from, float* sums) {
    const int64_t width = padded(problem.size);
    float largest = from.largest[0], total = 0.0f;
    for (int64_t p = 1; p < parts; p++) largest = std::max(largest, from.largest[p * stride]);
    std::fill(sums, sums + width, 0.0f);
    for (int64_t p = 0; p < parts; p++) {
        const float share = std::exp(from.largest[p * stride] - largest);
        total += share * from.weights[p * stride];
        for (int64_t i = 0; i < width; i++) sums[i] += share * from.values[p * stride * width + i];
    }
    for (int64_t i = 0; i < width; i++) sums[i] /= total;
    write_numbers(problem.y, problem.type, query * problem.size, problem.size, sums);
}

}  // namespace

void rms_norm(const RmsNorm& problem, int threads) {
    in_parallel(problem.rows, problem.rows * problem.n, threads, [&](int64_t row) { norm_row(problem, row); });
}

void silu_mul(const SiluMul& problem, int threads) {
    const int64_t n = problem.n, pieces = (n + PIECE - 1) / PIECE;
    in_parallel(problem.rows * pieces, problem.rows * n, threads, [&](int64_t task) {
        alignas(64) float gate[PIECE];
        alignas(64) float up[PIECE];
        const int64_t row = task / pieces, a = task % pieces * PIECE, count = std::min(PIECE, n - a);
        std::fill(gate + count / BLOCK * BLOCK, gate + padded(count), 0.0f);
        read_numbers(problem.x, problem.type, row * 2 * n + a, count, gate);
        read_numbers(problem.x, problem.type, row * 2 * n + n + a, count, up);
        for (int64_t i = 0; i < count; i += WIDTH) put(gate + i, silu(floats_at(gate + i)));
        round_to(problem.type, gate, count);
        for (int64_t i = 0; i < count; i++) gate[i] *= up[i];
        write_numbers(problem.y, problem.type, row * n + a, count, gate);
    });
}

void token_attention(const Attention& problem, int threads) {
    const int64_t width = padded(problem.size), heads = problem.heads, key_heads = problem.key_heads;
    const int64_t queries = heads / key_heads, parts = (problem.length + POSITIONS - 1) / POSITIONS;
    const int64_t of_text = parts * heads, all_parts = problem.batch * of_text;
    std::vector<float> memory(static_cast<size_t>(all_parts * (width + 2)));
    const Partial found{memory.data(), memory.data() + all_parts, memory.data() + 2 * all_parts};
    const auto at = [&](int64_t index) {
        return Partial{found.largest + index, found.weights + index, found.values + index * width};
    };
    const int64_t numbers = problem.batch * key_heads * problem.length * problem.size * 2;
    in_parallel(problem.batch * key_heads * parts, numbers, threads, [&](int64_t task) {
        const int64_t part = task % parts, head = task / parts % key_heads, batch = task / parts / key_heads;
        const int64_t first = part * POSITIONS, last = std::min(problem.length, first + POSITIONS);
        attend(problem, batch, head, first, last, at(batch * of_text + part * heads + head * queries));
    });
    std::vector<float> sums(static_cast<size_t>(width));
    for (int64_t query = 0; query < problem.batch * heads; query++)
        join(problem, query, parts, heads, at(query / heads * of_text + query % heads), sums.data());
}

}  // namespace FEWBIT_ISA
}  // namespace fewbit
