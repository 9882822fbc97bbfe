// The model's sizes and types, from the macros that specialise a build (gta_edge/plugins/attention/tiling.py makes them).
#pragma once

#include "cache_type.cuh"

namespace gta {

constexpr int query_heads = GTA_QUERY_HEADS;    // n_q
constexpr int key_heads = GTA_KEY_HEADS;        // n_k
constexpr int latent_heads = GTA_LATENT_HEADS;  // n_c
constexpr int key_dim = GTA_KEY_DIM;            // d_k
constexpr int latent_dim = GTA_LATENT_DIM;      // d_l
constexpr int expansion = GTA_EXPANSION;        // e: a query head's output is e d_l wide
constexpr int head_dim = expansion * latent_dim;
constexpr i64 hidden_size = i64{query_heads} * head_dim;  // H

constexpr bool has_gate = GTA_HAS_GATE != 0;
constexpr bool has_decoder = GTA_HAS_VALUE_DECODER != 0;  // without, a query head's output is its mix

static_assert(key_dim % 16 == 0 && key_dim >= 16 && key_dim <= 128);
static_assert(latent_dim % 16 == 0 && latent_dim >= 16 && latent_dim <= 256);
static_assert(query_heads % key_heads == 0 && query_heads % latent_heads == 0);
static_assert(has_decoder || expansion == 1);

constexpr int key_bytes = key_dim * int{sizeof(CacheElement)};
constexpr int latent_bytes = latent_dim * int{sizeof(CacheElement)};

constexpr int key_pitch = pitch_of(key_bytes);
constexpr int latent_pitch = pitch_of(latent_bytes);
constexpr int query_pitch = pitch_of(2 * key_dim);

constexpr float log2_e = 1.4426950408889634f;
constexpr float infinity = __builtin_bit_cast(float, 0x7f800000u);

// Tokens that a sequence's cache holds before this call. What memory says is not trusted: it may be anything.
GTA_DEVICE int past_tokens(const i64* past_length, int row, int capacity) {
    const i64 length = past_length[row];
    return length < 0 ? 0 : length > capacity ? capacity : static_cast<int>(length);
}

// Tokens that it holds afterwards; those past the capacity are dropped.
GTA_DEVICE int present_tokens(int past, int tokens, int capacity) {
    return tokens > capacity - past ? capacity : past + tokens;
}

}  // namespace gta
