// The op for few new tokens: the cache's length is split among blocks, which read every cached row once for all query
// heads of its group; a second kernel combines their mixes and applies the value decoder and the gate, where there are.
//
// Which tokens a block takes follows from the lengths in device memory, so the same launches serve every step.

#include "attention.cuh"

namespace gta {

constexpr int stages = GTA_DECODE_STAGES;  // slices per warp in flight or in use

// One slice in shared memory: the keys of each head, the latents of each head, then the scales of both.
constexpr int latents_offset = group_keys * slice_tokens * key_pitch;
constexpr int scales_offset = latents_offset + group_latents * slice_tokens * latent_pitch;
constexpr int scales_bytes = quantised ? (group_keys + group_latents) * slice_tokens * 4 : 0;
constexpr int slice_bytes = scales_offset + scales_bytes;
constexpr int query_offset = stages * warps_n * slice_bytes;
constexpr int used_bytes = query_offset + block_rows * query_pitch;
static_assert((used_bytes > merge_bytes ? used_bytes : merge_bytes) == GTA_DECODE_SHARED_BYTES);

struct Slices {  // the cached rows of one group
    const CacheElement *keys, *latents;
    const float *key_scales, *latent_scales;
    int capacity, end;

    // Starts the copy of 16 tokens; the work of the warps that share the slice.
    GTA_DEVICE void copy(u8* slice, int first, int thread) const {
        constexpr int threads = warp_size * warps_m;
#pragma unroll
        for (int head = 0; head < group_keys; ++head) {
            copy_rows<key_bytes, key_pitch, slice_tokens, threads>(slice + head * slice_tokens * key_pitch,
                                                                  keys + i64{head} * capacity * key_dim, first, end,
                                                                  thread);
        }
#pragma unroll
        for (int head = 0; head < group_latents; ++head) {
            copy_rows<latent_bytes, latent_pitch, slice_tokens, threads>(
                slice + latents_offset + head * slice_tokens * latent_pitch,
                latents + i64{head} * capacity * latent_dim, first, end, thread);
        }
        if constexpr (quantised) {
            float* scales = reinterpret_cast<float*>(slice + scales_offset);
#pragma unroll
            for (int head = 0; head < group_keys; ++head) {
                copy_scales<slice_tokens, threads>(scales + head * slice_tokens, key_scales + i64{head} * capacity,
                                                   first, end, thread);
            }
#pragma unroll
            for (int head = 0; head < group_latents; ++head) {
                copy_scales<slice_tokens, threads>(scales + (group_keys + head) * slice_tokens,
                                                   latent_scales + i64{head} * capacity, first, end, thread);
            }
        }
    }
};

}  // namespace gta

GTA_KERNEL(gta::decode_threads)
gta_decode_split(const gta::Element* query,             // [B, T, n_q d_k]
                 const gta::Element* key,               // [B, T, n_k d_k]
                 const gta::Element* latent,            // [B, T, n_c d_l]
                 gta::CacheElement* key_cache,          // [B, n_k, S, d_k]
                 gta::CacheElement* latent_cache,       // [B, n_c, S, d_l]
                 float* key_scale,                      // [B, n_k, S]
                 float* latent_scale,                   // [B, n_c, S]
                 const gta::i64* past_length,           // [B]
                 const gta::Element* __restrict__ cos,  // [P, d_k/2]
                 const gta::Element* __restrict__ sin,
                 float* __restrict__ mixes,  // [B T n_q, splits, d_l]
                 float* __restrict__ sums,   // [B T n_q, splits, 2]: largest score (log 2), sum of weights
                 GTA_IF_POSITIONS(const gta::i64* token_positions, )  // [B, T]
                 GTA_IF_BIAS(const float* row_bias, )                 // [B, R]
                 GTA_IF_BRANCHES(const gta::i64* branch_start, )      // [B]
                 GTA_IF_BRANCHES(const gta::i64* branches, )          // [B, W]
                 GTA_IF_OBSERVED(const float* query_weight, )         // [B, T]
                 GTA_IF_OBSERVED(float* __restrict__ scores, )        // [B T n_q, S rounded up]: log 2, -inf if not seen
                 int tokens, int capacity, int positions GTA_IF_BRANCHES(, int branch_rows), float scale) {
    using namespace gta;
    const int split = blockIdx.x, splits = gridDim.x, group = blockIdx.y % groups, batch_row = blockIdx.z;
    const int first_row = blockIdx.y / groups * block_rows;  // of the group's (token, query head) rows
    const int past = past_tokens(past_length, batch_row, capacity);
    const int present = present_tokens(past, tokens, capacity);
    const int per_split = split_tokens(present, splits);
    const i64 start = i64{split} * per_split;
    if (start >= present) {
        return;
    }
    const int begin = static_cast<int>(start), end = min_of(begin + per_split, present);
    const int rounds = ceil_div(end - begin, round_tokens);
    const int first_key = group * key_heads / groups, first_latent = group * latent_heads / groups;
    const i64 key_rows = (i64{batch_row} * key_heads + first_key) * capacity;
    const i64 latent_rows = (i64{batch_row} * latent_heads + first_latent) * capacity;

    const int warp = threadIdx.x / warp_size, lane = lane_of_warp(), warp_m = warp % warps_m, warp_n = warp / warps_m;
    const NewTokens fresh{key, latent, key_cache, latent_cache, key_scale, latent_scale, cos, sin, tokens, capacity,
                          positions GTA_IF_POSITIONS(, token_positions)};
    const Slices slices{key_cache + key_rows * key_dim,
                        latent_cache + latent_rows * latent_dim,
                        quantised ? key_scale + key_rows : nullptr,
                        quantised ? latent_scale + latent_rows : nullptr,
                        capacity,
                        end};
    u8* const shared = shared_memory();
    u8* const query_tile = shared + query_offset;

    // The new rows of this split are written just before the first copy that meets them.
    bool appended = past >= end;
    const auto copy = [&](int round) {
        if (round < rounds) {
            if (__builtin_expect(!appended && begin + (round + 1) * round_tokens > past, 0)) {
                constexpr int heads = group_keys + group_latents;
                for (int i = warp; i < tokens * heads; i += warps_m * warps_n) {
                    const int token = i / heads, head = i % heads, cache_row = past + token;
                    if (cache_row >= begin && cache_row < end) {
                        if (head < group_keys) {
                            fresh.append_key_of(batch_row, token, first_key + head, cache_row);
                        } else {
                            fresh.append_latent_of(batch_row, token, first_latent + head - group_keys, cache_row);
                        }
                    }
                }
                block_barrier();
                appended = true;
            }
            u8* slice = shared + (round % stages * warps_n + warp_n) * slice_bytes;
            slices.copy(slice, begin + round * round_tokens + warp_n * slice_tokens, warp_m * warp_size + lane);
        }
        commit_copies();
    };
#pragma unroll 1
    for (int round = 0; round < stages - 1; ++round) {
        copy(round);
    }

    const int rows = tokens * group_queries;
    store_query<block_rows, decode_threads>(query_tile, cos, sin, positions, [&](int row, int& position) {
        const int token = (first_row + row) / group_queries, head = (first_row + row) % group_queries;
        position = past + token;
        GTA_IF_POSITIONS(position = rope_position(token_positions, batch_row, token, tokens, positions);)
        return first_row + row < rows
                   ? query + ((i64{batch_row} * tokens + token) * query_heads + group * group_queries + head) * key_dim
                   : nullptr;
    });
    block_barrier();

    const int row = first_row + 16 * warp_m + lane / 4;
    const Heads heads(row);
    int limit[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        limit[half] = has_branches ? end - 1 : min_of(past + (row + 8 * half) / group_queries, end - 1);
    }
    Attention attention;
    GTA_IF_BIAS(attention.bias.load(row_bias, batch_row, log2_e);)
#if GTA_HAS_BRANCHES
    attention.branches.words = branches + i64{batch_row} * branch_rows;
    attention.branches.start = start_of_branches(branch_start, batch_row, capacity);
    attention.branches.width = branch_rows;
    for (int half = 0; half < 2; ++half) {
        attention.branches.query[half] = min_of((row + 8 * half) / group_queries, max_branches - 1);
    }
#endif
#if GTA_OBSERVE
    attention.observed_scores.end = end;
    for (int half = 0; half < 2; ++half) {
        const int own = row + 8 * half, token = own / group_queries;
        if (own < rows && query_weight[i64{batch_row} * tokens + token] != 0.0f) {
            const i64 query_row = (i64{batch_row} * tokens + token) * query_heads + group * group_queries;
            attention.observed_scores.of[half] = scores + (query_row + own % group_queries) * scores_pitch(capacity);
        }
    }
#endif
#pragma unroll
    for (int step = 0; step < key_dim / 16; ++step) {
        query_operand(attention.query[step], query_tile + 16 * warp_m * query_pitch, step);
    }

    for (int round = 0; round < rounds; ++round) {
        wait_for_copies<stages - 2>();
        if constexpr (warps_m == 1) {
            warp_barrier();  // a slice belongs to one warp
        } else {
            block_barrier();
        }
        copy(round + stages - 1);  // to where the last round's slice was
        const u8* slice = shared + (round % stages * warps_n + warp_n) * slice_bytes;
        const CachedTile<slice_tokens, latents_offset, scales_offset> tile{slice};
        attention.add(tile, begin + round * round_tokens + warp_n * slice_tokens, limit, heads, scale * log2_e);
    }
    attention.softmax.finish();

    const auto place = [&](int group_row) {  // of a row's result in the workspace
        const int token = group_row / group_queries, head = group * group_queries + group_row % group_queries;
        return ((i64{batch_row} * tokens + token) * query_heads + head) * splits + split;
    };
    write_mixes(attention, shared, mixes, sums, first_row, rows, place);
}

#include "combine.cuh"  // the second kernel, of the same splits
