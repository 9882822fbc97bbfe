// The op's optional inputs, from the macros that say which there are (gta_edge/plugins/attention/tiling.py makes them).
//
// GTA_IF_...(text) is the text in a build that has the input, and nothing in the others: their kernels have neither the
// parameter nor a trace of it in their code.
#pragma once

#include "sizes.cuh"

#if GTA_HAS_POSITIONS
#define GTA_IF_POSITIONS(...) __VA_ARGS__
#else
#define GTA_IF_POSITIONS(...)
#endif
#if GTA_BIAS_ROWS
#define GTA_IF_BIAS(...) __VA_ARGS__
#else
#define GTA_IF_BIAS(...)
#endif
#if GTA_HAS_BRANCHES
#define GTA_IF_BRANCHES(...) __VA_ARGS__
#else
#define GTA_IF_BRANCHES(...)
#endif
#if GTA_OBSERVE
#define GTA_IF_OBSERVED(...) __VA_ARGS__
#else
#define GTA_IF_OBSERVED(...)
#endif
#if GTA_CACHE_VALUE_BITS  // of a cache in blocks, of which there is none with the inputs above
#define GTA_IF_BLOCKS(...) __VA_ARGS__
#else
#define GTA_IF_BLOCKS(...)
#endif

namespace gta {

constexpr int bias_rows = GTA_BIAS_ROWS;  // R: rows of the cache that have a bias
constexpr bool has_branches = GTA_HAS_BRANCHES != 0;
constexpr bool observed = GTA_OBSERVE != 0;
constexpr bool observes_mass = GTA_OBSERVE == 1;  // else, where observed, the last position that gave enough
constexpr int max_branches = 64;                  // bits of a word: queries of a tree
constexpr int max_observed_tokens = has_branches ? max_branches : 16;
constexpr float absent_received = observes_mass ? 0.0f : -1.0f;  // of a row that is new
static_assert(bias_rows >= 0 && bias_rows <= 8);
static_assert(GTA_OBSERVE >= 0 && GTA_OBSERVE <= 2);

#if GTA_HAS_POSITIONS
// RoPE position of a new token, of `given` [B, T]. What memory says is not trusted: outside the tables, of `positions`
// rows, the nearest one is taken. Of rows past the tokens, which are computed and thrown away, any will do.
GTA_DEVICE int rope_position(const i64* given, int batch_row, int token, int tokens, int positions) {
    const i64 position = token < tokens ? given[i64{batch_row} * tokens + token] : 0;
    return position < 0 ? 0 : position >= positions ? positions - 1 : static_cast<int>(position);
}
#endif

// Distance of the scores of two query rows in the workspace: slices are written whole.
GTA_DEVICE i64 scores_pitch(int capacity) { return i64{ceil_div(capacity, 16)} * 16; }

// The biases of the first tokens of a slice, those that a thread has the scores of, times `factor`.
struct Bias {
    float of[2] = {0.0f, 0.0f};

    GTA_DEVICE void load(const float* row_bias, int batch_row, float factor) {  // [B, R]
        const int first = lane_of_warp() % 4 * 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            of[i] = first + i < bias_rows ? row_bias[batch_row * bias_rows + first + i] * factor : 0.0f;
        }
    }
};

// Of a tree, which rows of the cache the two query rows of a thread see.
struct Branches {
    const i64* words = nullptr;  // of the sequence, [W]: bit t of word i, whether query t sees row start + i
    int start = 0, width = 0;
    int query[2] = {0, 0};

    // Of 16 tokens from `first` on: bit 4 n + i, whether score i of this thread's tile n is of a row that is not seen.
    GTA_DEVICE u32 hidden(int first) const {
        u32 bits = 0;
        if (first + 16 > start) {  // the whole warp agrees
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int place = first + 8 * n + lane_of_warp() % 4 * 2 + i - start;
                    const i64 word = place < 0 ? -1 : place < width ? words[place] : 0;
                    bits |= word >> query[0] & 1 ? 0u : 1u << (4 * n + i);
                    bits |= word >> query[1] & 1 ? 0u : 1u << (4 * n + 2 + i);
                }
            }
        }
        return bits;
    }
};

// Where the scores of the two query rows of a thread are written for whoever knows what they are relative to.
struct ObservedScores {
    float* of[2] = {nullptr, nullptr};  // by token; null where nobody observes the row
    int end = 0;

    GTA_DEVICE void keep(const float (&seen)[2][4], int first) const {
        struct alignas(8) Pair {
            float x[2];
        };
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (of[half] != nullptr && first < end) {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    *reinterpret_cast<Pair*>(of[half] + first + 8 * n + lane_of_warp() % 4 * 2) =
                        Pair{{seen[n][2 * half], seen[n][2 * half + 1]}};
                }
            }
        }
    }
};

// Where a tree begins: past the cache, all rows are shared; far before it, all are past the words, and nobody sees them.
GTA_DEVICE int start_of_branches(const i64* branch_start, int batch_row, int capacity) {
    constexpr int far = 1 << 30;
    const i64 start = branch_start[batch_row];
    return start < 32 - far ? 32 - far : start > capacity ? capacity : static_cast<int>(start);
}

}  // namespace gta
