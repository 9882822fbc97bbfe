// The op for many new tokens with a cache in blocks, in three launches: one writes the codes of all blocks that the new
// rows fill; one walks over codes, and then over the blocks that its queries are in, whose rows are in 16 bits; one writes
// the last rows to the open block, which the second still reads as it was.

#include "blocks.cuh"
#include "rows.cuh"

namespace gta {

static_assert(keys % block_tokens == 0);
constexpr int tile_blocks = keys / block_tokens;

// Shared memory: the queries; then the codes of two tiles, in turn; then, in their place, a tile of rows of 16 bits; then
// two tiles of the value decoder.
constexpr int values_offset = tile_blocks * key_block_bytes;
constexpr int codes_bytes = values_offset + tile_blocks * value_block_bytes;
constexpr int latents_offset = keys * key_pitch;
constexpr int rows_bytes = latents_offset + keys * latent_pitch;
constexpr int cache_bytes = 2 * codes_bytes > rows_bytes ? 2 * codes_bytes : rows_bytes;
static_assert(query_bytes + (2 * decoder_bytes > cache_bytes ? 2 * decoder_bytes : cache_bytes) ==
              GTA_PREFILL_SHARED_BYTES);

// The last token that each of a thread's rows sees, limit[m][half]: computed where it is asked for, which is seldom.
struct Limits {
    struct OfTile {
        int first, last;
        GTA_DEVICE int operator[](int half) const { return min_of(first + 8 * half, last); }
    };
    int first, last;
    GTA_DEVICE OfTile operator[](int m) const { return {first + 16 * m, last}; }
};

}  // namespace gta

GTA_KERNEL(gta::warp_size* gta::append_warps)
gta_append(const gta::Element* key,               // [B, T, n_k d_k]
           const gta::Element* latent,            // [B, T, n_c d_l]
           gta::u8* key_cache,                    // [B, n_k, S/32, d_k, 16]
           gta::u8* latent_cache,                 // [B, n_c, S, d_l bits / 8]
           gta::u16* key_scale,                   // [B, n_k, S/32, 2, d_k]
           gta::u16* latent_scale,                // [B, n_c, S, 2]
           const gta::Element* key_open,          // [B, n_k, 32, d_k]
           const gta::Element* latent_open,       // [B, n_c, 32, d_l]
           const gta::i64* past_length,           // [B]
           const gta::Element* __restrict__ cos,  // [P, d_k/2]
           const gta::Element* __restrict__ sin, int tokens, int capacity, int positions) {
    using namespace gta;
    const int head = blockIdx.y, batch_row = blockIdx.z;
    const int past = past_tokens(past_length, batch_row, capacity);
    const int present = present_tokens(past, tokens, capacity);
    const int block = past / block_tokens + static_cast<int>(blockIdx.x);
    if (block >= present / block_tokens) {
        return;
    }
    const RecentRows rows{key, latent, key_open, latent_open, cos, sin, tokens, positions, batch_row, past, present};
    const Blocks blocks{key_cache, latent_cache, key_scale, latent_scale};
    const bool of_keys = head < key_heads;
    close_block(blocks, rows, head, of_keys, head - key_heads, !of_keys, block, capacity, threadIdx.x / warp_size,
                append_warps);
}

GTA_KERNEL(gta::prefill_threads)
gta_prefill(const gta::Element* query,                       // [B, T, n_q d_k]
            const gta::Element* key,                         // [B, T, n_k d_k]
            const gta::Element* latent,                      // [B, T, n_c d_l]
            const gta::Element* gate,                        // [B, T, H], or null
            const gta::Element* __restrict__ value_decoder,  // [n_q, d_l, e d_l], or null
            const gta::u8* key_cache,                        // [B, n_k, S/32, d_k, 16]
            const gta::u8* latent_cache,                     // [B, n_c, S, d_l bits / 8]
            const gta::u16* key_scale,                       // [B, n_k, S/32, 2, d_k]
            const gta::u16* latent_scale,                    // [B, n_c, S, 2]
            const gta::Element* key_open,                    // [B, n_k, 32, d_k]
            const gta::Element* latent_open,                 // [B, n_c, 32, d_l]
            const gta::i64* past_length,                     // [B]
            const gta::Element* __restrict__ cos,            // [P, d_k/2]
            const gta::Element* __restrict__ sin,
            gta::Element* __restrict__ output,  // [B, T, H]
            int tokens, int capacity, int positions, float scale) {
    using namespace gta;
    const int head = blockIdx.x, batch_row = blockIdx.z, thread = threadIdx.x;
    const int first_token = (gridDim.y - 1 - blockIdx.y) * block_rows;  // the longest walks start first
    const int past = past_tokens(past_length, batch_row, capacity);
    const int end = present_tokens(past, min_of(first_token + block_rows, tokens), capacity);  // of what is seen
    const int code_blocks = (end - 1) / block_tokens;  // of the last query
    const int tiles = ceil_div(code_blocks, tile_blocks);
    const int key_head = head / (query_heads / key_heads), latent_head = head / (query_heads / latent_heads);

    u8* const shared = shared_memory();
    u8* const cached = shared + query_bytes;
    const auto copy_keys = [&](int tile) {
        if (tile < tiles) {
            const i64 key_block = i64{computed_anew(batch_row * key_heads + key_head)} * (capacity / block_tokens);
            copy_key_blocks<tile_blocks, prefill_threads>(
                cached + tile % 2 * codes_bytes, key_cache + key_block * key_codes_bytes,
                key_scale + key_block * (2 * key_dim), tile * tile_blocks, code_blocks, thread);
        }
        commit_copies();
    };
    const auto copy_values = [&](int tile) {
        if (tile < tiles) {
            const i64 latent_row = i64{computed_anew(batch_row * latent_heads + latent_head)} * capacity;
            copy_value_blocks<tile_blocks, prefill_threads>(
                cached + tile % 2 * codes_bytes + values_offset, latent_cache + latent_row * value_bytes,
                latent_scale + latent_row * 2, tile * tile_blocks, code_blocks, thread);
        }
        commit_copies();
    };

    copy_keys(0);
    copy_values(0);
    store_query<block_rows, prefill_threads>(shared, cos, sin, positions, [&](int row, int& position) {
        const int token = first_token + row;
        position = past + token;
        return token < tokens ? query + ((i64{batch_row} * tokens + token) * query_heads + head) * key_dim : nullptr;
    });

    const int lane = lane_of_warp(), first_row = first_token + thread / warp_size * warp_rows;
    const u8* const query_rows = shared + thread / warp_size * warp_rows * query_pitch;
    const Limits limit{past + first_row + lane / 4, end - 1};
    // The block of the warp's first row; that of its last one is this or the next.
    static_assert(warp_rows <= block_tokens);
    const int first_block = min_of(past + first_row, end - 1) / block_tokens * block_tokens;
    const Decoding<false> decoding;
    Rows rows;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        wait_for_copies<1>();  // for this tile's keys; its values may still be under way
        block_barrier();
        copy_keys(tile + 1);
        const auto wait_for_values = [&] {
            wait_for_copies<1>();
            block_barrier();
            copy_values(tile + 1);
        };
        const int first = tile * keys;
        if (first < first_block + block_tokens) {
            const u8* const codes = cached + tile % 2 * codes_bytes;
            const CodeTile<keys, Decoding<false>> in_codes{decoding, codes, codes + values_offset};
            rows.add(query_rows, in_codes, first, limit, first + keys <= first_block, scale * log2_e, wait_for_values);
        } else {
            wait_for_values();
        }
    }
    wait_for_copies<0>();

    // The blocks that the queries are in, where rows before this call are in the open block.
    const RecentRows recent{key, latent, key_open, latent_open, cos, sin, tokens, positions, batch_row, past, end};
#pragma unroll 1
    for (int first = min_of(past + first_token, end - 1) / block_tokens * block_tokens; first < end; first += keys) {
        block_barrier();  // the tile before makes room
        recent.stage_keys<keys, prefill_threads>(cached, key_head, first);
        recent.stage_latents<keys, prefill_threads>(cached + latents_offset, latent_head, first);
        block_barrier();
        if (first < first_block + 2 * block_tokens && first + keys > first_block) {  // the whole warp agrees
            rows.add(query_rows, CachedTile<keys, latents_offset>{cached}, first, limit, false,
                     scale * log2_e, [] {});
        }
    }
    const i64 first_place = i64{batch_row} * tokens * hidden_size + head * head_dim;  // of the output: token 0
    if constexpr (has_decoder) {
        rows.write_decoded(output, gate, first_place, first_row, tokens,
                           value_decoder + i64{head} * latent_dim * head_dim, cached);
    } else {
        rows.write(output, gate, first_place, first_row, tokens);
    }
}

GTA_KERNEL(gta::warp_size* gta::append_warps)
gta_append_open(const gta::Element* key,               // [B, T, n_k d_k]
                const gta::Element* latent,            // [B, T, n_c d_l]
                gta::Element* key_open,                // [B, n_k, 32, d_k]
                gta::Element* latent_open,             // [B, n_c, 32, d_l]
                const gta::i64* past_length,           // [B]
                const gta::Element* __restrict__ cos,  // [P, d_k/2]
                const gta::Element* __restrict__ sin, int tokens, int capacity, int positions) {
    using namespace gta;
    const int head = blockIdx.y, batch_row = blockIdx.z;
    const int past = past_tokens(past_length, batch_row, capacity);
    const int present = present_tokens(past, tokens, capacity);
    const int first = past > present - block_tokens ? past : present - block_tokens;  // earlier ones are overwritten
    const int row = first + static_cast<int>(blockIdx.x) * append_warps + threadIdx.x / warp_size;
    if (row < present) {
        const RecentRows rows{key, latent, key_open, latent_open, cos, sin, tokens, positions, batch_row, past, present};
        append_open(key_open, latent_open, rows, head, row);
    }
}
