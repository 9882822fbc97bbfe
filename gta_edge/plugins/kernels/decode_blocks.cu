// The op for few new tokens with a cache in blocks: as in decode.cu the cache's length is split among blocks of
// threads. All splits but the last one read codes of before this call, and mask nothing, since every query sees them
// all. The last one has the rest in 16 bits, the open block's rows and the new ones, and writes the codes of the block
// that they fill.
//
// What other blocks of threads read in this launch is not written in it: new rows take their places in the open block
// in the second launch.

#include "attention.cuh"
#include "blocks.cuh"

namespace gta {

constexpr int stages = GTA_DECODE_STAGES;  // slices of 32 tokens per warp in flight or in use

// One slice in shared memory: a block's keys of each head, its values of each head.
constexpr int values_offset = group_keys * key_block_bytes;
constexpr int slice_bytes = values_offset + group_latents * value_block_bytes;

// Rows of 16 bits, 31 of the open block and 16 new ones at most, in slices of 16 like those of decode.cu; behind them
// one of codes, of the first 32.
constexpr int recent_rows = 48;
constexpr int latents_offset = group_keys * slice_tokens * key_pitch;
constexpr int rows_bytes = latents_offset + group_latents * slice_tokens * latent_pitch;  // of a slice of 16 rows
constexpr int closed_offset = recent_rows / slice_tokens * rows_bytes;
constexpr int recent_bytes = closed_offset + slice_bytes;

constexpr int ring_bytes = stages * warps_n * slice_bytes;
constexpr int query_offset = ring_bytes > recent_bytes ? ring_bytes : recent_bytes;
constexpr int used_bytes = query_offset + block_rows * query_pitch;
static_assert((used_bytes > merge_bytes ? used_bytes : merge_bytes) == GTA_DECODE_SHARED_BYTES);
static_assert(taken_tokens == block_tokens);

constexpr int unlimited = 0x7fffffff;

struct Slices {  // the codes of one group of heads
    const u8 *keys, *values;
    const u16 *key_groups, *value_groups;
    int capacity, end;  // in blocks

    // Starts the copy of one block of rows; the work of `threads` threads.
    template <int threads>
    GTA_DEVICE void copy(u8* slice, int block, int thread) const {
#pragma unroll
        for (int head = 0; head < group_keys; ++head) {
            const i64 before = i64{head} * capacity;
            copy_key_blocks<1, threads>(slice + head * key_block_bytes, keys + before * key_codes_bytes,
                                        key_groups + before * (2 * key_dim), block, end, thread);
        }
#pragma unroll
        for (int head = 0; head < group_latents; ++head) {
            const i64 before = i64{head} * capacity * block_tokens;
            copy_value_blocks<1, threads>(slice + values_offset + head * value_block_bytes,
                                          values + before * value_bytes, value_groups + before * 2, block, end, thread);
        }
    }
};

}  // namespace gta

GTA_KERNEL(gta::decode_threads)
gta_decode_split(const gta::Element* query,             // [B, T, n_q d_k]
                 const gta::Element* key,               // [B, T, n_k d_k]
                 const gta::Element* latent,            // [B, T, n_c d_l]
                 gta::u8* key_cache,                    // [B, n_k, S/32, d_k, 16]
                 gta::u8* latent_cache,                 // [B, n_c, S, d_l bits / 8]
                 gta::u16* key_scale,                   // [B, n_k, S/32, 2, d_k]
                 gta::u16* latent_scale,                // [B, n_c, S, 2]
                 const gta::Element* key_open,          // [B, n_k, 32, d_k]
                 const gta::Element* latent_open,       // [B, n_c, 32, d_l]
                 const gta::i64* past_length,           // [B]
                 const gta::Element* __restrict__ cos,  // [P, d_k/2]
                 const gta::Element* __restrict__ sin,
                 float* __restrict__ mixes,  // [B T n_q, splits, d_l]
                 float* __restrict__ sums,   // [B T n_q, splits, 2]: largest score (log 2), sum of weights
                 int tokens, int capacity, int positions, float scale) {
    using namespace gta;
    const int split = blockIdx.x, splits = gridDim.x, group = blockIdx.y % groups, batch_row = blockIdx.z;
    const int first_row = blockIdx.y / groups * block_rows;  // of the group's (token, query head) rows
    const int past = past_tokens(past_length, batch_row, capacity);
    const int present = present_tokens(past, tokens, capacity);
    const int open_block = past / block_tokens, in_codes = open_block * block_tokens;
    const int recent_split = block_splits(past, splits) - 1;
    if (split > recent_split) {
        return;
    }
    const int per_split = split_tokens(in_codes, splits - 1);
    const int begin = split * per_split, end = min_of(begin + per_split, in_codes);  // of a split of codes
    const int rounds = ceil_div(end - begin, round_tokens);
    const int first_key = group * key_heads / groups, first_latent = group * latent_heads / groups;
    const i64 key_blocks = (i64{batch_row} * key_heads + first_key) * (capacity / block_tokens);
    const i64 latent_rows = (i64{batch_row} * latent_heads + first_latent) * capacity;

    const int warp = threadIdx.x / warp_size, lane = lane_of_warp(), warp_m = warp % warps_m, warp_n = warp / warps_m;
    Slices slices{key_cache + key_blocks * key_codes_bytes,
                  latent_cache + latent_rows * value_bytes,
                  key_scale + key_blocks * (2 * key_dim),
                  latent_scale + latent_rows * 2,
                  capacity / block_tokens,
                  end / block_tokens};
    u8* const shared = shared_memory();
    u8* const query_tile = shared + query_offset;
    const auto copy = [&](int round) {
        if (round < rounds) {
            u8* const slice = shared + (round % stages * warps_n + warp_n) * slice_bytes;
            const int first = begin + round * round_tokens + warp_n * block_tokens;
            slices.copy<warp_size * warps_m>(slice, first / block_tokens, warp_m * warp_size + lane);
        }
        commit_copies();
    };

    // Of the last split: whether new rows are in the next block, whose queries read the codes of this one.
    const bool recent = split == recent_split, crosses = (present - 1) / block_tokens > open_block;
    if (recent) {
        const RecentRows rows{key, latent,    key_open,  latent_open, cos,    sin,
                              tokens, positions, batch_row, past,        present};
        for (int head = 0; head < group_keys; ++head) {
            rows.stage_keys<recent_rows, decode_threads, slice_tokens, rows_bytes>(
                shared + head * slice_tokens * key_pitch, first_key + head, in_codes);
        }
        for (int head = 0; head < group_latents; ++head) {
            rows.stage_latents<recent_rows, decode_threads, slice_tokens, rows_bytes>(
                shared + latents_offset + head * slice_tokens * latent_pitch, first_latent + head, in_codes);
        }
        // Where several blocks have rows of the same group, one of them, or each of them the same: it reads them itself.
        if (present / block_tokens > open_block && (crosses || first_row == 0)) {
            const Blocks blocks{key_cache, latent_cache, key_scale, latent_scale};
            close_block(blocks, rows, first_key, group_keys, first_latent, group_latents, open_block, capacity, warp,
                        warps_m * warps_n);
            if (crosses) {
                block_barrier();
                slices.end = open_block + 1;
                slices.copy<decode_threads>(shared + closed_offset, open_block, threadIdx.x);
            }
        }
        commit_copies();
    } else {
#pragma unroll 1
        for (int round = 0; round < stages - 1; ++round) {
            copy(round);
        }
    }

    const int rows = tokens * group_queries;
    store_query<block_rows, decode_threads>(query_tile, cos, sin, positions, [&](int row, int& position) {
        const int token = (first_row + row) / group_queries, head = (first_row + row) % group_queries;
        position = past + token;
        return first_row + row < rows
                   ? query + ((i64{batch_row} * tokens + token) * query_heads + group * group_queries + head) * key_dim
                   : nullptr;
    });
    if (recent) {
        wait_for_copies<0>();
    }
    block_barrier();

    const int row = first_row + 16 * warp_m + lane / 4;
    const Heads heads(row);
    const Decoding<true> decoding;
    Attention attention;
#pragma unroll
    for (int step = 0; step < key_dim / 16; ++step) {
        query_operand(attention.query[step], query_tile + 16 * warp_m * query_pitch, step);
    }

    if (recent) {
        const int limit[2] = {min_of(past + row / group_queries, present - 1),
                              min_of(past + (row + 8) / group_queries, present - 1)};
#pragma unroll 1
        for (int slice = warp_n; in_codes + slice * slice_tokens < present; slice += warps_n) {
            const CachedTile<slice_tokens, latents_offset> tile{shared + slice * rows_bytes};
            attention.add(tile, in_codes + slice * slice_tokens, limit, heads, scale * log2_e);
        }
        if (crosses && warp_n == warps_n - 1) {
            const u8* const slice = shared + closed_offset;
            const CodeTile<block_tokens, Decoding<true>> tile{decoding, slice, slice + values_offset};
            attention.add(tile, in_codes, limit, heads, scale * log2_e);
        }
    } else {
        for (int round = 0; round < rounds; ++round) {
            wait_for_copies<stages - 2>();
            if constexpr (warps_m == 1) {
                warp_barrier();  // a slice belongs to one warp
            } else {
                block_barrier();
            }
            copy(round + stages - 1);  // to where the last round's slice was
            if (begin + round * round_tokens + warp_n * block_tokens < end) {  // the whole warp agrees
                const u8* const slice = shared + (round % stages * warps_n + warp_n) * slice_bytes;
                const CodeTile<block_tokens, Decoding<true>> tile{decoding, slice, slice + values_offset};
                attention.add(tile, 0, {unlimited, unlimited}, heads, scale * log2_e);
            }
        }
    }
    attention.softmax.finish();

    const auto place = [&](int group_row) {  // of a row's result in the workspace
        const int token = group_row / group_queries, head = group * group_queries + group_row % group_queries;
        return ((i64{batch_row} * tokens + token) * query_heads + head) * splits + split;
    };
    write_mixes(attention, shared, mixes, sums, first_row, rows, place);
}

#include "combine.cuh"  // the second kernel, of the same splits
