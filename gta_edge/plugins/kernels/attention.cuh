// Attention of a few query rows over tiles of the cache, as each warp of the decode kernels computes it, and what the
// warps of a block, which take tiles in turn, make of their parts.
#pragma once

#include "splits.cuh"

namespace gta {

constexpr int groups = GTA_DECODE_GROUPS;
constexpr int warps_m = GTA_DECODE_WARPS_M;  // tiles of 16 query rows, a warp each
constexpr int decode_threads = warp_size * warps_m * warps_n;
constexpr int block_rows = 16 * warps_m;
constexpr int merge_pitch = latent_dim + 4;  // floats: a row's mix, its largest score and its sum
constexpr int merge_bytes = warps_n > 1 ? warps_n * block_rows * merge_pitch * 4 : 0;

GTA_DEVICE constexpr int at_least_1(int n) { return n < 1 ? 1 : n; }
constexpr int group_queries = query_heads / groups;
constexpr int group_keys = at_least_1(key_heads / groups);
constexpr int group_latents = at_least_1(latent_heads / groups);

// Which of a group's key and latent heads the two query rows of a thread use.
struct Heads {
    int key[2], latent[2];

    GTA_DEVICE explicit Heads(int row) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = (row + 8 * half) % group_queries;
            key[half] = group_keys == 1 ? 0 : query / (group_queries / group_keys);
            latent[half] = group_latents == 1 ? 0 : query / (group_queries / group_latents);
        }
    }
};

// Keeps of a left operand the rows that use one head; the others become zero, and so does what they add.
GTA_DEVICE void keep_rows(u32 (&kept)[4], const u32 (&a)[4], const int (&heads)[2], int head) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        kept[i] = heads[i % 2] == head ? a[i] : 0u;
    }
}

// Whether scores are scaled, which takes an instruction for each, before anything else is done with them.
constexpr bool scaled_first = quantised || bias_rows > 0 || observed;

struct Attention {
    Softmax softmax;
    float mix[latent_dim / 8][4] = {};
    u32 query[key_dim / 16][4];
    GTA_IF_BIAS(Bias bias;)
    GTA_IF_BRANCHES(Branches branches;)
    GTA_IF_OBSERVED(ObservedScores observed_scores;)

    // Takes in one tile; `limit` is the last token that each of the thread's rows sees, `factor` is positive.
    template <class Tile>
    GTA_DEVICE void add(const Tile& tile, int first, const int (&limit)[2], const Heads& heads, float factor) {
        constexpr int tokens = Tile::tokens;
        const int pair = lane_of_warp() % 4;
        float scores[tokens / 8][4] = {};
#pragma unroll
        for (int head = 0; head < group_keys; ++head) {
#pragma unroll
            for (int step = 0; step < key_dim / 16; ++step) {
                u32 kept[4];
                if constexpr (group_keys > 1) {
                    keep_rows(kept, query[step], heads.key, head);
                }
#pragma unroll
                for (int block = 0; block < tokens / 16; ++block) {
                    u32 keys[2][2];
                    tile.keys(keys, head, block, step);
                    mma_cached(scores[2 * block], group_keys > 1 ? kept : query[step], keys[0]);
                    mma_cached(scores[2 * block + 1], group_keys > 1 ? kept : query[step], keys[1]);
                }
            }
        }

        const float* const scales = tile.row_scales();
        float unscaled[tokens / 8][4], candidate[2] = {-infinity, -infinity};
        GTA_IF_BRANCHES(const u32 hidden = branches.hidden(first);)
        GTA_IF_OBSERVED(float seen[tokens / 8][4];)  // scores as they are observed: without the latents' scales
#pragma unroll
        for (int n = 0; n < tokens / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = 8 * n + 2 * pair + i % 2, half = i / 2;
                bool visible = !tile.hides(first + token, limit[half]);
                GTA_IF_BRANCHES(visible = visible && !(hidden >> (4 * n + i) & 1u);)
                if constexpr (quantised) {
                    const float scale = usable_scale(scales[(group_keys + heads.latent[half]) * tokens + token]);
                    const float key_scale = scales[heads.key[half] * tokens + token];
                    float score = scores[n][i] * (key_scale * factor);
                    GTA_IF_BIAS(score += n == 0 && first == 0 ? bias.of[i % 2] : 0.0f;)
                    GTA_IF_OBSERVED(seen[n][i] = visible ? score : -infinity;)
                    scores[n][i] = score + logarithm_2(scale);
                    unscaled[n][i] = visible ? reciprocal(scale) : 0.0f;
                } else if constexpr (scaled_first) {
                    scores[n][i] *= factor;
                    GTA_IF_BIAS(scores[n][i] += n == 0 && first == 0 ? bias.of[i % 2] : 0.0f;)
                    GTA_IF_OBSERVED(seen[n][i] = visible ? scores[n][i] : -infinity;)
                }
                scores[n][i] = visible ? scores[n][i] : -infinity;
                candidate[half] = max_of(candidate[half], scores[n][i]);
            }
        }
        GTA_IF_OBSERVED(observed_scores.keep(seen, first);)
        if constexpr (!scaled_first) {  // scores are scaled where they are used: one instruction less for each
            candidate[0] *= factor;
            candidate[1] *= factor;
        }

        float shrink[2];
        if (softmax.raise(shrink, candidate)) {
#pragma unroll
            for (int n = 0; n < latent_dim / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    mix[n][i] *= shrink[i / 2];
                }
            }
        }

        u32 weights[tokens / 16][4];
#pragma unroll
        for (int n = 0; n < tokens / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float base = softmax.base(i / 2);
                scores[n][i] = power_of_2(scaled_first ? scores[n][i] - base : scores[n][i] * factor - base);
                softmax.sum[i / 2] += quantised ? scores[n][i] * unscaled[n][i] : scores[n][i];
            }
            weights[n / 2][n % 2 * 2] = pack_cached(scores[n][0], scores[n][1]);
            weights[n / 2][n % 2 * 2 + 1] = pack_cached(scores[n][2], scores[n][3]);
        }
#pragma unroll
        for (int head = 0; head < group_latents; ++head) {
#pragma unroll
            for (int step = 0; step < tokens / 16; ++step) {
                u32 kept[4];
                if constexpr (group_latents > 1) {
                    keep_rows(kept, weights[step], heads.latent, head);
                }
#pragma unroll
                for (int block = 0; block < latent_dim / 16; ++block) {
                    u32 operands[2][2];
                    tile.latents(operands, head, step, block);
                    mma_cached(mix[2 * block], group_latents > 1 ? kept : weights[step], operands[0]);
                    mma_cached(mix[2 * block + 1], group_latents > 1 ? kept : weights[step], operands[1]);
                }
            }
        }
    }
};

// Writes the mixes of a block's query rows, and what they are relative to, to where `place` has the results of a row.
// `shared` is the block's shared memory, which may still be in use for tiles.
template <class Place>
GTA_DEVICE void write_mixes(const Attention& attention, u8* shared, float* __restrict__ mixes, float* __restrict__ sums,
                            int first_row, int rows, Place place) {
    const int warp = threadIdx.x / warp_size, lane = lane_of_warp(), warp_m = warp % warps_m, warp_n = warp / warps_m;
    const int row = first_row + 16 * warp_m + lane / 4;
    if constexpr (warps_n == 1) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (row + 8 * half < rows) {
                const i64 to = place(row + 8 * half);
#pragma unroll
                for (int tile = 0; tile < latent_dim / 8; ++tile) {
                    mixes[to * latent_dim + latent_column(tile, lane % 4 * 2)] = attention.mix[tile][2 * half];
                    mixes[to * latent_dim + latent_column(tile, lane % 4 * 2 + 1)] = attention.mix[tile][2 * half + 1];
                }
                if (lane % 4 == 0) {
                    sums[2 * to] = attention.softmax.maximum[half];
                    sums[2 * to + 1] = attention.softmax.sum[half];
                }
            }
        }
    } else {
        wait_for_copies<0>();
        block_barrier();  // the slices' memory is used anew
        float* const merge = reinterpret_cast<float*>(shared);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float* to = merge + (warp_n * block_rows + 16 * warp_m + lane / 4 + 8 * half) * merge_pitch;
#pragma unroll
            for (int tile = 0; tile < latent_dim / 8; ++tile) {
                to[latent_column(tile, lane % 4 * 2)] = attention.mix[tile][2 * half];
                to[latent_column(tile, lane % 4 * 2 + 1)] = attention.mix[tile][2 * half + 1];
            }
            if (lane % 4 == 0) {
                to[latent_dim] = attention.softmax.maximum[half];
                to[latent_dim + 1] = attention.softmax.sum[half];
            }
        }
        block_barrier();
        constexpr int units = latent_dim / 4;
        for (int i = threadIdx.x; i < min_of(block_rows, rows - first_row) * units; i += decode_threads) {
            const int merged_row = i / units, unit = i % units;
            const float* from = merge + merged_row * merge_pitch;
            float maximum = -infinity;
#pragma unroll
            for (int n = 0; n < warps_n; ++n) {
                maximum = max_of(maximum, from[n * block_rows * merge_pitch + latent_dim]);
            }
            const float base = maximum == -infinity ? 0.0f : maximum;
            Floats mix{};
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < warps_n; ++n) {
                const float* part = from + n * block_rows * merge_pitch;
                const float weight = power_of_2(part[latent_dim] - base);
                const Floats values = *reinterpret_cast<const Floats*>(part + 4 * unit);
                sum += weight * part[latent_dim + 1];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    mix.x[j] += weight * values.x[j];
                }
            }
            const i64 to = place(first_row + merged_row);
            *reinterpret_cast<Floats*>(mixes + to * latent_dim + 4 * unit) = mix;
            if (unit == 0) {
                sums[2 * to] = maximum;
                sums[2 * to + 1] = sum;
            }
        }
    }
}

}  // namespace gta
