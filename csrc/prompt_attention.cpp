// Attention of all tokens of a prompt, in tiles: queries of one tile meet keys and values tile by tile, and no more
// than a tile of scores exists at a time (arXiv:2205.14135). See fused_ops.h; computed in float32.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "fused_ops.h"
#include "fused_ops_math.h"
#include "threads.h"

namespace fewbit {
namespace FEWBIT_ISA {
namespace {

constexpr int64_t QUERIES = 32;  // of each head, in a task
constexpr int64_t KEYS = 64;     // in a tile
constexpr float NONE = -std::numeric_limits<float>::infinity();

// Sums that fit into the registers: rows, and vectors per row.
#if defined(__AVX512F__)
constexpr int ROWS = 6, VECTORS = 4;
#elif defined(__AVX2__)
constexpr int ROWS = 4, VECTORS = 2;
#else
constexpr int ROWS = 4, VECTORS = 4;
#endif

// C (rows, columns) += A (rows, inner) B (inner, columns), of which R rows and V vectors of columns at once.
template <int R, int V>
void add_block(const float* A, int64_t a_row, const float* B, int64_t b_row, float* C, int64_t c_row, int64_t inner) {
    Floats sums[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = floats_at(C + r * c_row + v * WIDTH);
    for (int64_t k = 0; k < inner; k++) {
        Floats b[V];
        for (int v = 0; v < V; v++) b[v] = floats_at(B + k * b_row + v * WIDTH);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sums[r][v] = sums[r][v] + times(b[v], A[r * a_row + k]);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) put(C + r * c_row + v * WIDTH, sums[r][v]);
}

template <int V>
void add_rows(const float* A, int64_t a_row, const float* B, int64_t b_row, float* C, int64_t c_row, int64_t rows,
              int64_t inner) {
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS) add_block<ROWS, V>(A + r * a_row, a_row, B, b_row, C + r * c_row, c_row, inner);
    for (; r < rows; r++) add_block<1, V>(A + r * a_row, a_row, B, b_row, C + r * c_row, c_row, inner);
}

// C += A B; columns are a multiple of BLOCK.
void add_product(const float* A, int64_t a_row, const float* B, float* C, int64_t rows, int64_t inner, int64_t columns) {
    int64_t c = 0;
    for (; c + VECTORS * WIDTH <= columns; c += VECTORS * WIDTH)
        add_rows<VECTORS>(A, a_row, B + c, columns, C + c, columns, rows, inner);
    for (; c < columns; c += WIDTH) add_rows<1>(A, a_row, B + c, columns, C + c, columns, rows, inner);
}

// One task: the queries first … last of the heads that share a head of keys.
class Tile {
public:
    Tile(const Attention& problem, int64_t batch, int64_t key_head, int64_t first, int64_t last)
        : p(problem), batch(batch), key_head(key_head), first(first), count(last - first), width(padded(problem.size)),
          heads(problem.heads / problem.key_heads), rows(heads * count),
          memory(static_cast<size_t>(rows * (2 * width + KEYS + 2) + KEYS * 2 * width), 0.0f) {
        q = memory.data();
        sums = q + rows * width;
        scores = sums + rows * width;
        largest = scores + rows * KEYS;
        weights = largest + rows;
        keys = weights + rows;
        values = keys + KEYS * width;
        std::fill(largest, largest + rows, NONE);
    }

    void run() {
        for (int64_t row = 0; row < rows; row++) {
            float* to = q + row * width;
            const int64_t head = key_head * heads + row / count, token = first + row % count;
            read_numbers(p.q, p.type, batch * p.q_batch + head * p.q_head + token * p.q_token, p.size, to);
            for (int64_t i = 0; i < p.size; i++) to[i] *= p.scale;
        }
        const int64_t end = p.causal ? first + count : p.length;
        for (int64_t key = 0; key < end; key += KEYS) add_keys(key, std::min(KEYS, end - key));
        for (int64_t row = 0; row < rows; row++) {
            const int64_t head = key_head * heads + row / count, token = first + row % count;
            float* from = sums + row * width;
            for (int64_t i = 0; i < p.size; i++) from[i] /= weights[row];
            write_numbers(p.y, p.type, ((batch * p.queries + token) * p.heads + head) * p.size, p.size, from);
        }
    }

private:
    // Keys as columns (size, KEYS), values as rows (KEYS, width).
    void read_tile(int64_t key, int64_t n) {
        for (int64_t t = 0; t < n; t++) {
            const int64_t from = batch * p.key_batch + key_head * p.key_head + (key + t) * p.key_token;
            read_numbers(p.keys, p.type, from, p.size, values);
            for (int64_t i = 0; i < p.size; i++) keys[i * KEYS + t] = values[i];
        }
        for (int64_t t = 0; t < n; t++) {
            const int64_t from = batch * p.value_batch + key_head * p.value_head + (key + t) * p.value_token;
            read_numbers(p.values, p.type, from, p.size, values + t * width);
        }
    }

    void add_keys(int64_t key, int64_t n) {
        read_tile(key, n);
        std::fill(scores, scores + rows * KEYS, 0.0f);
        add_product(q, width, keys, scores, rows, p.size, KEYS);
        for (int64_t row = 0; row < rows; row++) {
            const int64_t seen = p.causal ? std::min(n, first + row % count - key + 1) : n;
            weigh(row, seen);
        }
        add_product(scores, KEYS, values, sums, rows, n, width);
    }

    // Scores of a row → weights relative to the largest score so far; what was summed before is made so, too.
    void weigh(int64_t row, int64_t seen) {
        float* score = scores + row * KEYS;
        for (int64_t t = std::max<int64_t>(seen, 0); t < KEYS; t++) score[t] = NONE;
        if (seen <= 0) {
            std::fill(score, score + KEYS, 0.0f);
            return;
        }
        const float before = largest[row], now = std::max(before, largest_of(score, KEYS));
        const float old = std::exp(before - now);
        weights[row] = weights[row] * old + exponentials(score, KEYS, now);
        largest[row] = now;
        float* of_row = sums + row * width;
        for (int64_t i = 0; i < width; i++) of_row[i] *= old;
    }

    const Attention& p;
    const int64_t batch, key_head, first, count, width, heads, rows;
    std::vector<float> memory;
    float *q, *sums, *scores, *largest, *weights, *keys, *values;
};

}  // namespace

void prompt_attention(const Attention& problem, int threads) {
    const int64_t tiles = (problem.queries + QUERIES - 1) / QUERIES;
    parallel_for(problem.batch * problem.key_heads * tiles, threads, [&](int64_t task) {
        // The last tiles have the most keys: they come first, so that no thread is left with one at the end.
        const int64_t tile = tiles - 1 - task / (problem.batch * problem.key_heads);
        const int64_t head = task % problem.key_heads, batch = task / problem.key_heads % problem.batch;
        const int64_t first = tile * QUERIES;
        Tile(problem, batch, head, first, std::min(problem.queries, first + QUERIES)).run();
    });
}

}  // namespace FEWBIT_ISA
}  // namespace fewbit
