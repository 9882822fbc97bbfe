// Tiles in shared memory, and the operands that the tensor cores take from them.
//
// A tile's rows are tokens (or query rows), `pitch` bytes apart. With 8-bit values, the loads of 16-bit elements take
// two of them at once, so the columns of a block of 16 arrive in another order:
//   8-bit keys     column 4 p + j takes the place 2 p + j % 2 + 8 (j / 2) of the matmul's inner dimension, and the
//                 query's layout is in that order (query_place);
//   8-bit latents  column 2 n + u takes the place 8 u + n of the matmul's columns (latent_column, latent_place).
#pragma once

#include "cache.cuh"

namespace gta {

constexpr int slice_tokens = 16;  // tokens of one tensor core matmul
constexpr int block_tokens = 32;  // that a cache in blocks quantises together

// Copies rows first ... first + count - 1 of `row_bytes` each into a tile; rows from `end` on become zeros.
//
// Rows follow one another in the cache, so a thread's units are a fixed distance apart; where the threads are a whole
// number of rows, so are their places in the tile.
template <int row_bytes, int pitch, int count, int threads>
GTA_DEVICE void copy_rows(u8* tile, const void* rows, int first, int end, int thread) {
    constexpr int units = row_bytes / 16;
    const u8* const from = static_cast<const u8*>(rows) + i64{first} * row_bytes + thread * 16;
    u8* const to = tile + thread / units * pitch + thread % units * 16;
    const int valid_units = min_of(end - first, count) * units - thread;  // from this thread's first one on
#pragma unroll
    for (int start = 0; start < count * units; start += threads) {
        if (count * units % threads == 0 || start + thread < count * units) {
            const int i = start + thread;
            u8* const place =
                threads % units == 0 ? to + start / units * pitch : tile + i / units * pitch + i % units * 16;
            copy_16_async(place, from + start * 16, start < valid_units);
        }
    }
}

// Likewise of one float per row; what is past the end becomes zero.
template <int count, int threads>
GTA_DEVICE void copy_scales(float* tile, const float* scales, int first, int end, int thread) {
#pragma unroll
    for (int start = 0; start < count; start += threads) {
        const int i = start + thread;
        if (i < count) {
            const bool valid = first + i < end;
            copy_4_async(tile + i, scales + (valid ? first + i : 0), valid);
        }
    }
}

// Place of an even column, and of the next one beside it, in the query's tile.
GTA_DEVICE int query_place(int column) {
    return quantised ? column / 16 * 16 + column % 16 / 4 * 2 + column % 4 / 2 * 8 : column;
}

// Column of the latent that accumulator tile `tile`, column n, holds.
GTA_DEVICE int latent_column(int tile, int n) {
    return quantised ? tile / 2 * 16 + 2 * n + tile % 2 : tile * 8 + n;
}

// And the other way: place of a column among the accumulators' columns, counted through the tiles.
GTA_DEVICE int latent_place(int column) {
    return quantised ? column / 16 * 16 + column % 2 * 8 + column % 16 / 2 : column;
}

// What meets the cache in a matmul is of the compute type; fp16 with a cache in blocks, whose scales are.
GTA_DEVICE u32 pack_cached(float low, float high) {
    if constexpr (bf16 && !in_blocks) {
        return pack_bf16(low, high);
    } else {
        return pack_f16(low, high);
    }
}

GTA_DEVICE void mma_cached(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    if constexpr (bf16 && !in_blocks) {
        mma_bf16(c, a, b);
    } else {
        mma_f16(c, a, b);
    }
}

// Rotates the query rows of one tile into shared memory. Row r belongs to `source(r)`; rows without one are zero.
template <int rows, int threads, class Source>
GTA_DEVICE void store_query(u8* tile, const Element* cos, const Element* sin, int positions, Source source) {
    constexpr int units = key_dim / 16;
    for (int i = threadIdx.x; i < rows * units; i += threads) {
        const int row = i / units, unit = i % units;
        float low[8] = {}, high[8] = {};
        int position = 0;
        const Element* query = source(row, position);
        if (query != nullptr) {
            const i64 angles = table_row(position, positions);
            rotate(low, high, query, cos + angles, sin + angles, unit);
        }
        u8* to = tile + row * query_pitch;
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            *reinterpret_cast<u32*>(to + 2 * query_place(8 * unit + j)) = pack_cached(low[j], low[j + 1]);
            *reinterpret_cast<u32*>(to + 2 * query_place(key_dim / 2 + 8 * unit + j)) = pack_cached(high[j], high[j + 1]);
        }
    }
}

// Left operand: 16 query rows, inner columns 16 step ... 16 step + 15.
GTA_DEVICE void query_operand(u32 (&a)[4], const u8* tile, int step) {
    const int lane = lane_of_warp();
    load_matrices(a, tile + lane % 16 * query_pitch + 32 * step + 16 * (lane / 16));
}

// Right operands of the scores of 16 tokens, 8 each: inner columns 16 step ... 16 step + 15.
GTA_DEVICE void key_operands(u32 (&b)[2][2], const u8* tile, int step) {
    const int lane = lane_of_warp();
    if constexpr (quantised) {
        u32 codes[2];
        load_matrices(codes, tile + lane % 16 * key_pitch + 16 * step);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            b[half][0] = widen(pick_bytes(codes[half], 0, 0x4140));
            b[half][1] = widen(pick_bytes(codes[half], 0, 0x4342));
        }
    } else {
        u32 pairs[4];
        load_matrices(pairs, tile + (lane % 8 + lane / 16 * 8) * key_pitch + 32 * step + lane / 8 % 2 * 16);
        b[0][0] = pairs[0], b[0][1] = pairs[1], b[1][0] = pairs[2], b[1][1] = pairs[3];
    }
}

// Right operands of the mix of 16 tokens: accumulator tiles 2 block and 2 block + 1.
GTA_DEVICE void latent_operands(u32 (&b)[2][2], const u8* tile, int block) {
    const int lane = lane_of_warp();
    if constexpr (quantised) {
        u32 codes[2];
        load_matrices_transposed(codes, tile + lane % 16 * latent_pitch + 16 * block);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            b[0][half] = widen(pick_bytes(codes[half], 0, 0x4240));
            b[1][half] = widen(pick_bytes(codes[half], 0, 0x4341));
        }
    } else {
        u32 pairs[4];
        load_matrices_transposed(pairs, tile + lane % 16 * latent_pitch + 32 * block + 16 * (lane / 16));
        b[0][0] = pairs[0], b[0][1] = pairs[1], b[1][0] = pairs[2], b[1][1] = pairs[3];
    }
}

// Tokens as they are cached, in shared memory: their keys of each head, their latents of each head, and, of 8 bits, the
// scales of both.
template <int count, int latents_at, int scales_at = 0>
struct CachedTile {
    static constexpr int tokens = count;
    const u8* memory;

    // Whether a row of the cache is not for the query that sees rows up to `limit`; of a cache in blocks those before its
    // own block are not, which are in codes.
    GTA_DEVICE static bool hides(int row, int limit) {
        return row > limit || (in_blocks && row < limit - limit % block_tokens);
    }

    // Operands of the tokens from 16 block or 16 step on.
    GTA_DEVICE void keys(u32 (&b)[2][2], int head, int block, int step) const {
        key_operands(b, memory + (head * count + 16 * block) * key_pitch, step);
    }

    GTA_DEVICE void latents(u32 (&b)[2][2], int head, int step, int block) const {
        latent_operands(b, memory + latents_at + (head * count + 16 * step) * latent_pitch, block);
    }

    GTA_DEVICE const float* row_scales() const { return reinterpret_cast<const float*>(memory + scales_at); }
};

// Online softmax of two query rows of a thread (rows lane / 4 and lane / 4 + 8 of a tile): about the largest score so
// far, and the sum of weights, of this thread's tokens only, relative to it. Scores are logarithms to base 2.
//
// Of a quantised cache, the logarithm of a latent's scale is part of its score, so that weight times scale, which meets
// the 8-bit values, never leaves the 16-bit range; the sum takes the weights without it.
struct Softmax {
    float maximum[2] = {-infinity, -infinity};
    float sum[2] = {0.0f, 0.0f};

    // Weights may grow to 2 to this power before everything is scaled down again: most slices then need no scaling.
    static constexpr float slack = 8.0f;

    GTA_DEVICE float base(int half) const { return maximum[half] == -infinity ? 0.0f : maximum[half]; }

    // Takes in the largest of new scores per row; tells whether any row of the warp has to be scaled, and by what.
    GTA_DEVICE bool raise(float (&factor)[2], float (&candidate)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            candidate[half] = max_of(candidate[half], shuffle_xor(candidate[half], 1));
            candidate[half] = max_of(candidate[half], shuffle_xor(candidate[half], 2));
        }
        if (!any_of_warp(candidate[0] > maximum[0] + slack || candidate[1] > maximum[1] + slack)) {
            return false;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float before = maximum[half];
            maximum[half] = max_of(before, candidate[half]);
            factor[half] = power_of_2(before - base(half));
            sum[half] *= factor[half];
        }
        return true;
    }

    // Adds up what the four threads of a row hold.
    GTA_DEVICE void finish() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] += shuffle_xor(sum[half], 1);
            sum[half] += shuffle_xor(sum[half], 2);
        }
    }
};

}  // namespace gta
