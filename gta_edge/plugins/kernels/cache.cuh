// New keys and latents: RoPE, quantisation, and the row of the cache that they are written to.
#pragma once

#include "elements.cuh"
#include "features.cuh"

namespace gta {

struct alignas(8) Codes {  // 8 values of a quantised cache
    u32 word[2];
};

GTA_DEVICE void unpack(float (&values)[8], const Vector& vector) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[2 * i] = unpack_low(vector.word[i]);
        values[2 * i + 1] = unpack_high(vector.word[i]);
    }
}

GTA_DEVICE Vector pack(const float (&values)[8]) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        vector.word[i] = pack(values[2 * i], values[2 * i + 1]);
    }
    return vector;
}

GTA_DEVICE Vector load_vector(const Element* source) { return *reinterpret_cast<const Vector*>(source); }

// Turns elements 8 i ... 8 i + 7 of a query or key of one head, and those d_k/2 further on, by a position's angles:
// rotate-half, as in Llama. `cos` and `sin` are the position's rows of d_k/2.
GTA_DEVICE void rotate(float (&low)[8], float (&high)[8], const Element* source, const Element* cos, const Element* sin,
                       int i) {
    float a[8], b[8], c[8], s[8];
    unpack(a, load_vector(source + 8 * i));
    unpack(b, load_vector(source + key_dim / 2 + 8 * i));
    unpack(c, load_vector(cos + 8 * i));
    unpack(s, load_vector(sin + 8 * i));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        low[j] = a[j] * c[j] - b[j] * s[j];
        high[j] = b[j] * c[j] + a[j] * s[j];
    }
}

// The tables' row of a position; positions outside them, of tokens that are dropped anyway, take the last one.
GTA_DEVICE i64 table_row(int position, int positions) { return i64{min_of(position, positions - 1)} * (key_dim / 2); }

// The largest magnitude of all lanes' values; NaN, whose bits are above infinity's, wins.
GTA_DEVICE float max_of_warp(const float (&x)[8], const float (&y)[8]) {
    float maximum = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const u32 a = as_bits(x[j]) & 0x7fffffffu, b = as_bits(y[j]) & 0x7fffffffu, max_bits = a > b ? a : b;
        maximum = max_bits > as_bits(maximum) ? as_float(max_bits) : maximum;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        const float other = shuffle_xor(maximum, mask);
        maximum = as_bits(other) > as_bits(maximum) ? other : maximum;
    }
    return maximum;
}

GTA_DEVICE Codes to_codes(const float (&values)[8], float inverse_scale) {
    Codes codes{};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        codes.word[j / 4] |= to_code(values[j] * inverse_scale) << 8 * (j % 4);
    }
    return codes;
}

// Writes one head's new key to its row of the cache; the work of a warp.
GTA_DEVICE void append_key(CacheElement* row, float* scale, const Element* key, const Element* cos, const Element* sin) {
    const int lane = threadIdx.x % warp_size;
    const bool active = lane < key_dim / 16;
    float low[8] = {}, high[8] = {};
    if (active) {
        rotate(low, high, key, cos, sin, lane);
    }
    if constexpr (quantised) {
        const float row_scale = scale_of(max_of_warp(low, high)), inverse = reciprocal(row_scale);
        if (active) {
            *reinterpret_cast<Codes*>(row + 8 * lane) = to_codes(low, inverse);
            *reinterpret_cast<Codes*>(row + key_dim / 2 + 8 * lane) = to_codes(high, inverse);
        }
        if (lane == 0) {
            *scale = row_scale;
        }
    } else if (active) {
        *reinterpret_cast<Vector*>(row + 8 * lane) = pack(low);
        *reinterpret_cast<Vector*>(row + key_dim / 2 + 8 * lane) = pack(high);
    }
}

// Likewise one head's new latent, which is not rotated.
GTA_DEVICE void append_latent(CacheElement* row, float* scale, const Element* latent) {
    const int lane = threadIdx.x % warp_size;
    const bool active = lane < latent_dim / 8;
    if constexpr (quantised) {
        float values[8] = {};
        if (active) {
            unpack(values, load_vector(latent + 8 * lane));
        }
        const float row_scale = scale_of(max_of_warp(values, values));
        if (active) {
            *reinterpret_cast<Codes*>(row + 8 * lane) = to_codes(values, reciprocal(row_scale));
        }
        if (lane == 0) {
            *scale = row_scale;
        }
    } else if (active) {
        *reinterpret_cast<Vector*>(row + 8 * lane) = load_vector(latent + 8 * lane);
    }
}

// The same for any head of one token, keys counted first: what both ways of running the op call.
struct NewTokens {
    const Element* key;     // [B, T, n_k d_k]
    const Element* latent;  // [B, T, n_c d_l]
    CacheElement* key_cache;     // [B, n_k, S, d_k]
    CacheElement* latent_cache;  // [B, n_c, S, d_l]
    float* key_scale;            // [B, n_k, S], of a quantised cache
    float* latent_scale;         // [B, n_c, S]
    const Element* cos;          // [P, d_k/2]
    const Element* sin;
    int tokens, capacity, positions;
    GTA_IF_POSITIONS(const i64* token_positions;)  // [B, T]; without them, tokens follow on the cache's rows

    // To row `cache_row` of the cache.
    GTA_DEVICE void append_key_of(int row, int token, int head, int cache_row) const {
        int position = cache_row;
        GTA_IF_POSITIONS(position = rope_position(token_positions, row, token, tokens, positions);)
        const i64 place = (i64{row} * key_heads + head) * capacity + cache_row, angles = table_row(position, positions);
        const Element* source = key + ((i64{row} * tokens + token) * key_heads + head) * key_dim;
        append_key(key_cache + place * key_dim, quantised ? key_scale + place : nullptr, source, cos + angles,
                   sin + angles);
    }

    GTA_DEVICE void append_latent_of(int row, int token, int head, int cache_row) const {
        const i64 place = (i64{row} * latent_heads + head) * capacity + cache_row;
        const Element* source = latent + ((i64{row} * tokens + token) * latent_heads + head) * latent_dim;
        append_latent(latent_cache + place * latent_dim, quantised ? latent_scale + place : nullptr, source);
    }
};

}  // namespace gta
