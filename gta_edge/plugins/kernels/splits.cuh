// How the cache's length is divided among blocks: what both kernels of few new tokens know.
#pragma once

#include "tiles.cuh"

namespace gta {

constexpr int warps_n = GTA_DECODE_WARPS_N;  // warps that take slices in turn
constexpr int min_tokens = GTA_DECODE_MIN_TOKENS;  // of a split: each one more is work for the second kernel
constexpr int taken_tokens = in_blocks ? 2 * slice_tokens : slice_tokens;  // by a warp at once
constexpr int round_tokens = taken_tokens * warps_n;
static_assert(min_tokens % round_tokens == 0);

constexpr int combine_threads = GTA_COMBINE_THREADS;

struct alignas(16) Floats {
    float x[4];
};

// Tokens of each split of a sequence that holds `present`; splits from ceil_div(present, this) on have none.
GTA_DEVICE int split_tokens(int present, int splits) {
    const int even = ceil_div(ceil_div(present, splits), round_tokens) * round_tokens;
    return even < min_tokens ? min_tokens : even;
}

// Splits of a cache in blocks: those of rows in codes, and a last one of all others.
GTA_DEVICE int block_splits(int past, int splits) {
    const int in_codes = past - past % taken_tokens;
    return ceil_div(in_codes, split_tokens(in_codes, splits - 1)) + 1;
}

}  // namespace gta
