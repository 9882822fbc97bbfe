// The op for many new tokens: one kernel appends them to the cache, another walks over it, a block for each query head
// and tile of tokens, and applies the value decoder and the gate, where there are, to what it has mixed.

#include "output.cuh"
#include "tiles.cuh"

namespace gta {

constexpr int warps = GTA_PREFILL_WARPS;
constexpr int row_tiles = GTA_PREFILL_ROW_TILES;  // tiles of 16 query rows of each warp
constexpr int keys = GTA_PREFILL_KEYS;            // tokens of the cache in shared memory at once, times two
constexpr int columns = GTA_PREFILL_COLUMNS;      // output columns at once
constexpr int append_warps = GTA_APPEND_WARPS;
constexpr int prefill_threads = warp_size * warps;
constexpr int warp_rows = 16 * row_tiles;
constexpr int block_rows = warps * warp_rows;

// Shared memory: the queries; then keys, latents and scales of two tiles, in turn; then, in their place, two tiles of
// the value decoder.
constexpr int cache_offset = block_rows * query_pitch;
constexpr int latents_offset = keys * key_pitch;
constexpr int scales_offset = latents_offset + keys * latent_pitch;
constexpr int cache_bytes = scales_offset + (quantised ? 2 * keys * 4 : 0);
constexpr int decoder_pitch = pitch_of(2 * columns);
constexpr int decoder_bytes = latent_dim * decoder_pitch;
constexpr int later_bytes = 2 * (has_decoder && decoder_bytes > cache_bytes ? decoder_bytes : cache_bytes);
static_assert(cache_offset + later_bytes == GTA_PREFILL_SHARED_BYTES);
static_assert(latent_dim % columns == 0 && columns % 16 == 0 && keys % 16 == 0);

// A tile of the value decoder, its rows in the order of the accumulators' columns.
GTA_DEVICE void copy_decoder(u8* tile, const Element* decoder, int first_column) {
    constexpr int units = columns / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < latent_dim * units; i += prefill_threads) {
        const int row = i / units, unit = i % units;
        copy_16_async(tile + latent_place(row) * decoder_pitch + 16 * unit,
                      decoder + i64{row} * head_dim + first_column + 8 * unit, true);
    }
}

// Right operand that picks, of a block of 16 accumulator columns, the 8 latent columns of the lower or upper half.
GTA_DEVICE void picking_operand(u32 (&b)[2], int upper) {
    const int column = 8 * upper + lane_of_warp() / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int place = latent_place(column) - 8 * half - lane_of_warp() % 4 * 2;
        b[half] = place == 0 ? one : place == 1 ? one << 16 : 0u;
    }
}

struct Rows {  // what one warp works on: row_tiles tiles of 16 query rows, of one head
    Softmax softmax[row_tiles];
    float mix[row_tiles][latent_dim / 8][4] = {};
    Bias bias;  // of a quantised cache in the unit of scaled scores, else of what is multiplied by `factor`

    // Takes in the tile of keys and latents from token `first` on. `limit[...]` is the last token that a row sees,
    // `factor` is positive.
    template <class WaitForLatents>
    GTA_DEVICE void add(const u8* query_rows, const u8* tile, int first, const int (&limit)[row_tiles][2],
                        bool all_visible, float factor, WaitForLatents wait_for_latents) {
        const int pair = lane_of_warp() % 4;
        float scores[row_tiles][keys / 8][4] = {};
#pragma unroll
        for (int step = 0; step < key_dim / 16; ++step) {
            u32 query[row_tiles][4];
#pragma unroll
            for (int m = 0; m < row_tiles; ++m) {
                query_operand(query[m], query_rows + 16 * m * query_pitch, step);
            }
#pragma unroll
            for (int block = 0; block < keys / 16; ++block) {
                u32 operands[2][2];
                key_operands(operands, tile + 16 * block * key_pitch, step);
#pragma unroll
                for (int m = 0; m < row_tiles; ++m) {
                    mma(scores[m][2 * block], query[m], operands[0]);
                    mma(scores[m][2 * block + 1], query[m], operands[1]);
                }
            }
        }

        const float* key_scales = reinterpret_cast<const float*>(tile + scales_offset);
        const float* latent_scales = key_scales + keys;
        if constexpr (quantised) {
            wait_for_latents();  // their scales are part of the scores
        }
        float key_factor[keys / 8][2], shift[keys / 8][2], unscaled[keys / 8][2];  // of this thread's tokens
        if constexpr (quantised) {
#pragma unroll
            for (int n = 0; n < keys / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int token = 8 * n + 2 * pair + i;
                    key_factor[n][i] = key_scales[token] * factor;
                    const float scale = usable_scale(latent_scales[token]);
                    shift[n][i] = logarithm_2(scale);
                    unscaled[n][i] = reciprocal(scale);
                }
            }
        }
        u32 weights[row_tiles][keys / 8][2];
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
            float candidate[2] = {-infinity, -infinity};
#pragma unroll
            for (int n = 0; n < keys / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if constexpr (quantised) {
                        scores[m][n][i] = scores[m][n][i] * key_factor[n][i % 2] + shift[n][i % 2];
                    }
                }
            }
            if constexpr (bias_rows > 0) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    scores[m][0][i] += first == 0 ? bias.of[i % 2] : 0.0f;
                }
            }
            if (!all_visible) {  // the whole warp agrees
#pragma unroll
                for (int n = 0; n < keys / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int token = 8 * n + 2 * pair + i % 2;
                        scores[m][n][i] = first + token > limit[m][i / 2] ? -infinity : scores[m][n][i];
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < keys / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    candidate[i / 2] = max_of(candidate[i / 2], scores[m][n][i]);
                }
            }
            if constexpr (!quantised) {  // scores are scaled where they are used: one instruction less for each
                candidate[0] *= factor;
                candidate[1] *= factor;
            }
            float shrink[2];
            if (softmax[m].raise(shrink, candidate)) {
#pragma unroll
                for (int n = 0; n < latent_dim / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        mix[m][n][i] *= shrink[i / 2];
                    }
                }
            }
            const float base[2] = {softmax[m].base(0), softmax[m].base(1)};
#pragma unroll
            for (int n = 0; n < keys / 8; ++n) {
                float weight[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    weight[i] = power_of_2(scores[m][n][i] * (quantised ? 1.0f : factor) - base[i / 2]);
                    if constexpr (quantised) {
                        const int token = 8 * n + 2 * pair + i % 2;
                        const bool visible = all_visible || first + token <= limit[m][i / 2];
                        softmax[m].sum[i / 2] += visible ? weight[i] * unscaled[n][i % 2] : 0.0f;
                    } else {
                        softmax[m].sum[i / 2] += weight[i];
                    }
                }
                weights[m][n][0] = pack(weight[0], weight[1]);
                weights[m][n][1] = pack(weight[2], weight[3]);
            }
        }

        if constexpr (!quantised) {
            wait_for_latents();
        }
#pragma unroll
        for (int step = 0; step < keys / 16; ++step) {
#pragma unroll
            for (int block = 0; block < latent_dim / 16; ++block) {
                u32 operands[2][2];
                latent_operands(operands, tile + latents_offset + 16 * step * latent_pitch, block);
#pragma unroll
                for (int m = 0; m < row_tiles; ++m) {
                    const u32 left[4] = {weights[m][2 * step][0], weights[m][2 * step][1], weights[m][2 * step + 1][0],
                                         weights[m][2 * step + 1][1]};
                    mma(mix[m][2 * block], left, operands[0]);
                    mma(mix[m][2 * block + 1], left, operands[1]);
                }
            }
        }
    }

    // One over the sums of weights of each of the thread's rows, when all of the cache is taken in.
    GTA_DEVICE void finish(float (&inverse)[row_tiles][2]) {
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
            softmax[m].finish();
            inverse[m][0] = reciprocal(softmax[m].sum[0]);
            inverse[m][1] = reciprocal(softmax[m].sum[1]);
        }
    }

    // Calls `write` for each of the thread's rows with the place of its first column in the output, where token 0 has
    // its own at `first_place`.
    template <class Write>
    GTA_DEVICE static void for_rows(i64 first_place, int first_row, int tokens, Write write) {
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = first_row + 16 * m + lane_of_warp() / 4 + 8 * half;
                if (token < tokens) {
                    write(first_place + token * hidden_size, m, half);
                }
            }
        }
    }

    // Writes the mixes, as they are.
    GTA_DEVICE void write(Element* output, const Element* gate, i64 first_place, int first_row, int tokens) {
        const int pair = lane_of_warp() % 4;
        float inverse[row_tiles][2];
        finish(inverse);
        for_rows(first_place, first_row, tokens, [&](i64 place, int m, int half) {
#pragma unroll
            for (int n = 0; n < latent_dim / 8; n += 2) {  // of 16 columns a thread has four: two pairs side by side
                const float factor = inverse[m][half];
                const float a[2] = {mix[m][n][2 * half] * factor, mix[m][n][2 * half + 1] * factor};
                const float b[2] = {mix[m][n + 1][2 * half] * factor, mix[m][n + 1][2 * half + 1] * factor};
                const i64 block = place + 8 * n;
                if constexpr (quantised) {
                    write_outputs(output, gate, block + 4 * pair, a[0], b[0]);
                    write_outputs(output, gate, block + 4 * pair + 2, a[1], b[1]);
                } else {
                    write_outputs(output, gate, block + 2 * pair, a[0], a[1]);
                    write_outputs(output, gate, block + 2 * pair + 8, b[0], b[1]);
                }
            }
        });
    }

    // Writes what the head's value decoder, [d_l, e d_l], makes of the mixes. Its tiles come to where the cache's are.
    GTA_DEVICE void write_decoded(Element* output, const Element* gate, i64 first_place, int first_row, int tokens,
                                  const Element* decoder, u8* tiles) {
        const int lane = lane_of_warp();
        wait_for_copies<0>();
        block_barrier();  // the cache's tiles make room for the value decoder's
        copy_decoder(tiles, decoder, 0);
        commit_copies();

        // The mixes as left operands; like a model that computes in this type, they are rounded to it.
        float inverse[row_tiles][2];
        u32 mixed[row_tiles][latent_dim / 16][4];
        finish(inverse);
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
            for (int n = 0; n < latent_dim / 8; ++n) {
                const float* x = mix[m][n];
                mixed[m][n / 2][n % 2 * 2] = pack(x[0] * inverse[m][0], x[1] * inverse[m][0]);
                mixed[m][n / 2][n % 2 * 2 + 1] = pack(x[2] * inverse[m][1], x[3] * inverse[m][1]);
            }
        }

        for (int repeat = 0; repeat < expansion; ++repeat) {
#pragma unroll
            for (int part = 0; part < latent_dim / columns; ++part) {
                const int chunk = repeat * (latent_dim / columns) + part, first_column = chunk * columns;
                wait_for_copies<0>();
                block_barrier();
                if (first_column + columns < head_dim) {
                    copy_decoder(tiles + (chunk + 1) % 2 * decoder_bytes, decoder, first_column + columns);
                }
                commit_copies();

                const u8* const tile = tiles + chunk % 2 * decoder_bytes;
                float sums[row_tiles][columns / 8][4] = {};
#pragma unroll
                for (int step = 0; step < latent_dim / 16; ++step) {
#pragma unroll
                    for (int block = 0; block < columns / 16; ++block) {
                        u32 pairs[4];
                        load_matrices_transposed(
                            pairs, tile + (16 * step + lane % 16) * decoder_pitch + 32 * block + 16 * (lane / 16));
#pragma unroll
                        for (int m = 0; m < row_tiles; ++m) {
                            mma(sums[m][2 * block], mixed[m][step], {pairs[0], pairs[1]});
                            mma(sums[m][2 * block + 1], mixed[m][step], {pairs[2], pairs[3]});
                        }
                    }
                }
#pragma unroll
                for (int n = 0; n < columns / 8; ++n) {  // the tiled mix that the decoder adds to
                    u32 picking[2];
                    picking_operand(picking, n % 2);
#pragma unroll
                    for (int m = 0; m < row_tiles; ++m) {
                        mma(sums[m][n], mixed[m][part * (columns / 16) + n / 2], picking);
                    }
                }
                for_rows(first_place + first_column, first_row, tokens, [&](i64 place, int m, int half) {
#pragma unroll
                    for (int n = 0; n < columns / 8; ++n) {
                        write_outputs(output, gate, place + lane % 4 * 2 + 8 * n, sums[m][n][2 * half],
                                      sums[m][n][2 * half + 1]);
                    }
                });
            }
        }
    }
};

}  // namespace gta

GTA_KERNEL(gta::warp_size* gta::append_warps)
gta_append(const gta::Element* key,               // [B, T, n_k d_k]
           const gta::Element* latent,            // [B, T, n_c d_l]
           gta::CacheElement* key_cache,          // [B, n_k, S, d_k]
           gta::CacheElement* latent_cache,       // [B, n_c, S, d_l]
           float* key_scale,                      // [B, n_k, S]
           float* latent_scale,                   // [B, n_c, S]
           const gta::i64* past_length,           // [B]
           const gta::Element* __restrict__ cos,  // [P, d_k/2]
           const gta::Element* __restrict__ sin,
           GTA_IF_POSITIONS(const gta::i64* token_positions, )  // [B, T]
           GTA_IF_OBSERVED(const float* query_weight, )         // [B, T]
           GTA_IF_OBSERVED(const float* decay, )                // [B]
           GTA_IF_OBSERVED(float* received, )                   // [B, S]
           int tokens, int capacity, int positions) {
    using namespace gta;
    const int token = blockIdx.x * append_warps + threadIdx.x / warp_size, head = blockIdx.y, row = blockIdx.z;
    const int past = past_tokens(past_length, row, capacity);
    if (token >= tokens || token >= capacity - past) {
        return;
    }
    const NewTokens fresh{key, latent, key_cache, latent_cache, key_scale, latent_scale, cos, sin, tokens, capacity,
                          positions GTA_IF_POSITIONS(, token_positions)};
#if GTA_OBSERVE
    if (head == 0 && lane_of_warp() == 0) {  // no attention is observed here: whoever asks for it gets no number
        const bool asked = query_weight[i64{row} * tokens + token] != 0.0f || decay[row] != 1.0f;
        received[i64{row} * capacity + past + token] = asked ? as_float(0x7fffffffu) : absent_received;
    }
#endif
    if (head < key_heads) {
        fresh.append_key_of(row, token, head, past + token);
    } else {
        fresh.append_latent_of(row, token, head - key_heads, past + token);
    }
}

GTA_KERNEL(gta::prefill_threads)
gta_prefill(const gta::Element* query,                       // [B, T, n_q d_k]
            const gta::Element* gate,                        // [B, T, H], or null
            const gta::Element* __restrict__ value_decoder,  // [n_q, d_l, e d_l], or null
            const gta::CacheElement* key_cache,              // [B, n_k, S, d_k]
            const gta::CacheElement* latent_cache,           // [B, n_c, S, d_l]
            const float* key_scale,                          // [B, n_k, S]
            const float* latent_scale,                       // [B, n_c, S]
            const gta::i64* past_length,                     // [B]
            const gta::Element* __restrict__ cos,            // [P, d_k/2]
            const gta::Element* __restrict__ sin,
            gta::Element* __restrict__ output,                   // [B, T, H]
            GTA_IF_POSITIONS(const gta::i64* token_positions, )  // [B, T]
            GTA_IF_BIAS(const float* row_bias, )                 // [B, R]
            int tokens, int capacity, int positions, float scale) {
    using namespace gta;
    const int head = blockIdx.x, batch_row = blockIdx.z, thread = threadIdx.x;
    const int first_token = (gridDim.y - 1 - blockIdx.y) * block_rows;  // the longest walks start first
    const int past = past_tokens(past_length, batch_row, capacity);
    const int end = present_tokens(past, min_of(first_token + block_rows, tokens), capacity);  // of what is seen
    const int tiles = ceil_div(end, keys);
    const int key_head = head / (query_heads / key_heads), latent_head = head / (query_heads / latent_heads);
    const i64 key_row = (i64{batch_row} * key_heads + key_head) * capacity;
    const i64 latent_row = (i64{batch_row} * latent_heads + latent_head) * capacity;
    const CacheElement* const all_keys = key_cache + key_row * key_dim;
    const CacheElement* const all_latents = latent_cache + latent_row * latent_dim;

    u8* const shared = shared_memory();
    u8* const cache_tiles = shared + cache_offset;
    const auto copy_keys = [&](int tile) {
        if (tile < tiles) {
            u8* const to = cache_tiles + tile % 2 * cache_bytes;
            copy_rows<key_bytes, key_pitch, keys, prefill_threads>(to, all_keys, tile * keys, end, thread);
            if constexpr (quantised) {
                copy_scales<keys, prefill_threads>(reinterpret_cast<float*>(to + scales_offset), key_scale + key_row,
                                                   tile * keys, end, thread);
            }
        }
        commit_copies();
    };
    const auto copy_latents = [&](int tile) {
        if (tile < tiles) {
            u8* const to = cache_tiles + tile % 2 * cache_bytes;
            copy_rows<latent_bytes, latent_pitch, keys, prefill_threads>(to + latents_offset, all_latents, tile * keys,
                                                                        end, thread);
            if constexpr (quantised) {
                copy_scales<keys, prefill_threads>(reinterpret_cast<float*>(to + scales_offset) + keys,
                                                   latent_scale + latent_row, tile * keys, end, thread);
            }
        }
        commit_copies();
    };

    copy_keys(0);
    copy_latents(0);
    store_query<block_rows, prefill_threads>(shared, cos, sin, positions, [&](int row, int& position) {
        const int token = first_token + row;
        position = past + token;
        GTA_IF_POSITIONS(position = rope_position(token_positions, batch_row, token, tokens, positions);)
        return token < tokens ? query + ((i64{batch_row} * tokens + token) * query_heads + head) * key_dim : nullptr;
    });

    const int lane = lane_of_warp(), first_row = first_token + thread / warp_size * warp_rows;
    int limit[row_tiles][2];
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) {
        limit[m][0] = min_of(past + first_row + 16 * m + lane / 4, end - 1);
        limit[m][1] = min_of(past + first_row + 16 * m + lane / 4 + 8, end - 1);
    }
    Rows rows;
    GTA_IF_BIAS(rows.bias.load(row_bias, batch_row, quantised ? log2_e : reciprocal(scale));)
    for (int tile = 0; tile < tiles; ++tile) {
        wait_for_copies<1>();  // for this tile's keys; its latents may still be under way
        block_barrier();
        copy_keys(tile + 1);
        const bool all_visible = (tile + 1) * keys <= min_of(past + first_row + 1, end);
        rows.add(shared + thread / warp_size * warp_rows * query_pitch, cache_tiles + tile % 2 * cache_bytes,
                 tile * keys, limit, all_visible, scale * log2_e, [&] {
                     wait_for_copies<1>();
                     block_barrier();
                     copy_latents(tile + 1);
                 });
    }
    const i64 first_place = i64{batch_row} * tokens * hidden_size + head * head_dim;  // of the output: token 0
    if constexpr (has_decoder) {
        rows.write_decoded(output, gate, first_place, first_row, tokens,
                           value_decoder + i64{head} * latent_dim * head_dim, cache_tiles);
    } else {
        rows.write(output, gate, first_place, first_row, tokens);
    }
}
