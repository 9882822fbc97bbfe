// The op for few new tokens: the cache's length is split among blocks, which read every cached row once for all query
// heads of its group; a second kernel combines their mixes and applies the value decoder and the gate, where there are.
//
// Which tokens a block takes follows from the lengths in device memory, so the same launches serve every step.

#include "splits.cuh"

namespace gta {

constexpr int groups = GTA_DECODE_GROUPS;
constexpr int warps_m = GTA_DECODE_WARPS_M;  // tiles of 16 query rows, a warp each
constexpr int stages = GTA_DECODE_STAGES;    // slices per warp in flight or in use
constexpr int decode_threads = warp_size * warps_m * warps_n;

GTA_DEVICE constexpr int at_least_1(int n) { return n < 1 ? 1 : n; }
constexpr int group_queries = query_heads / groups;
constexpr int group_keys = at_least_1(key_heads / groups);
constexpr int group_latents = at_least_1(latent_heads / groups);

// One slice in shared memory: the keys of each head, the latents of each head, then the scales of both.
constexpr int latents_offset = group_keys * slice_tokens * key_pitch;
constexpr int scales_offset = latents_offset + group_latents * slice_tokens * latent_pitch;
constexpr int scales_bytes = quantised ? (group_keys + group_latents) * slice_tokens * 4 : 0;
constexpr int slice_bytes = scales_offset + scales_bytes;
constexpr int block_rows = 16 * warps_m;
constexpr int query_offset = stages * warps_n * slice_bytes;
constexpr int merge_pitch = latent_dim + 4;  // floats: a row's mix, its largest score and its sum
constexpr int merge_bytes = warps_n > 1 ? warps_n * block_rows * merge_pitch * 4 : 0;
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

    // Takes in one slice; `limit` is the last token that each of the thread's rows sees, `factor` is positive.
    GTA_DEVICE void add(const u8* slice, int first, const int (&limit)[2], const Heads& heads, float factor) {
        const int pair = lane_of_warp() % 4;
        float scores[2][4] = {};
#pragma unroll
        for (int head = 0; head < group_keys; ++head) {
#pragma unroll
            for (int step = 0; step < key_dim / 16; ++step) {
                u32 keys[2][2], kept[4];
                key_operands(keys, slice + head * slice_tokens * key_pitch, step);
                if constexpr (group_keys > 1) {
                    keep_rows(kept, query[step], heads.key, head);
                }
                mma(scores[0], group_keys > 1 ? kept : query[step], keys[0]);
                mma(scores[1], group_keys > 1 ? kept : query[step], keys[1]);
            }
        }

        const float* scales = reinterpret_cast<const float*>(slice + scales_offset);
        float unscaled[2][4], candidate[2] = {-infinity, -infinity};
        GTA_IF_BRANCHES(const u32 hidden = branches.hidden(first);)
        GTA_IF_OBSERVED(float seen[2][4];)  // scores as they are observed: without the latents' scales
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = 8 * n + 2 * pair + i % 2, half = i / 2;
                bool visible = first + token <= limit[half];
                GTA_IF_BRANCHES(visible = visible && !(hidden >> (4 * n + i) & 1u);)
                if constexpr (quantised) {
                    const float scale = usable_scale(scales[(group_keys + heads.latent[half]) * slice_tokens + token]);
                    const float key_scale = scales[heads.key[half] * slice_tokens + token];
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
            for (int tile = 0; tile < latent_dim / 8; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    mix[tile][i] *= shrink[i / 2];
                }
            }
        }

        u32 weights[4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float base = softmax.base(i / 2);
                scores[n][i] = power_of_2(scaled_first ? scores[n][i] - base : scores[n][i] * factor - base);
                softmax.sum[i / 2] += quantised ? scores[n][i] * unscaled[n][i] : scores[n][i];
            }
            weights[2 * n] = pack(scores[n][0], scores[n][1]);
            weights[2 * n + 1] = pack(scores[n][2], scores[n][3]);
        }
#pragma unroll
        for (int head = 0; head < group_latents; ++head) {
            u32 kept[4];
            if constexpr (group_latents > 1) {
                keep_rows(kept, weights, heads.latent, head);
            }
            const u8* latents = slice + latents_offset + head * slice_tokens * latent_pitch;
#pragma unroll
            for (int block = 0; block < latent_dim / 16; ++block) {
                u32 operands[2][2];
                latent_operands(operands, latents, block);
                mma(mix[2 * block], group_latents > 1 ? kept : weights, operands[0]);
                mma(mix[2 * block + 1], group_latents > 1 ? kept : weights, operands[1]);
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
        attention.add(slice, begin + round * round_tokens + warp_n * slice_tokens, limit, heads, scale * log2_e);
    }
    attention.softmax.finish();

    const auto place = [&](int group_row) {  // of a row's result in the workspace
        const int token = group_row / group_queries, head = group * group_queries + group_row % group_queries;
        return ((i64{batch_row} * tokens + token) * query_heads + head) * splits + split;
    };
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

#include "combine.cuh"  // the second kernel, of the same splits
