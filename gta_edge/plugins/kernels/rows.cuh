// Query rows of one head over tiles of the cache, as each warp of the prefill kernels computes them, and the output that
// they become.
#pragma once

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
static_assert(latent_dim % columns == 0 && columns % 16 == 0 && keys % 16 == 0);

constexpr int query_bytes = block_rows * query_pitch;
constexpr int decoder_pitch = pitch_of(2 * columns);
constexpr int decoder_bytes = has_decoder ? latent_dim * decoder_pitch : 0;  // of a tile of the value decoder

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
    template <class Tile, class Limits, class WaitForLatents>
    GTA_DEVICE void add(const u8* query_rows, const Tile& tile, int first, const Limits& limit, bool all_visible,
                        float factor, WaitForLatents wait_for_latents) {
        static_assert(Tile::tokens == keys);
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
                tile.keys(operands, 0, block, step);
#pragma unroll
                for (int m = 0; m < row_tiles; ++m) {
                    mma_cached(scores[m][2 * block], query[m], operands[0]);
                    mma_cached(scores[m][2 * block + 1], query[m], operands[1]);
                }
            }
        }

        const float* const key_scales = tile.row_scales();
        const float* const latent_scales = key_scales + keys;
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
                        scores[m][n][i] = tile.hides(first + token, limit[m][i / 2]) ? -infinity : scores[m][n][i];
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
                weights[m][n][0] = pack_cached(weight[0], weight[1]);
                weights[m][n][1] = pack_cached(weight[2], weight[3]);
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
                tile.latents(operands, 0, step, block);
#pragma unroll
                for (int m = 0; m < row_tiles; ++m) {
                    const u32 left[4] = {weights[m][2 * step][0], weights[m][2 * step][1], weights[m][2 * step + 1][0],
                                         weights[m][2 * step + 1][1]};
                    mma_cached(mix[m][2 * block], left, operands[0]);
                    mma_cached(mix[m][2 * block + 1], left, operands[1]);
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
