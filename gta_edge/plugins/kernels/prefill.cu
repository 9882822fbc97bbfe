// The op for many new tokens: one kernel appends them to the cache, another walks over it, a block for each query head
// and tile of tokens, and applies the value decoder and the gate, where there are, to what it has mixed.

#include "rows.cuh"

namespace gta {

// Shared memory: the queries; then keys, latents and scales of two tiles, in turn; then, in their place, two tiles of
// the value decoder.
constexpr int latents_offset = keys * key_pitch;
constexpr int scales_offset = latents_offset + keys * latent_pitch;
constexpr int cache_bytes = scales_offset + (quantised ? 2 * keys * 4 : 0);
constexpr int later_bytes = 2 * (decoder_bytes > cache_bytes ? decoder_bytes : cache_bytes);
static_assert(query_bytes + later_bytes == GTA_PREFILL_SHARED_BYTES);

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
    u8* const cache_tiles = shared + query_bytes;
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
        const CachedTile<keys, latents_offset, scales_offset> cached{cache_tiles + tile % 2 * cache_bytes};
        rows.add(shared + thread / warp_size * warp_rows * query_pitch, cached, tile * keys, limit, all_visible,
                 scale * log2_e, [&] {
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
