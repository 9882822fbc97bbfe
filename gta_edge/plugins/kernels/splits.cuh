// How the cache's length is divided among blocks: what both kernels of few new tokens know.
#pragma once

#include "tiles.cuh"

namespace gta {

constexpr int warps_n = GTA_DECODE_WARPS_N;  // warps that take slices of 16 tokens in turn
constexpr int min_tokens = GTA_DECODE_MIN_TOKENS;  // of a split: each one more is work for the second kernel
constexpr int round_tokens = slice_tokens * warps_n;
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

}  // namespace gta
