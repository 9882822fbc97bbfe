// The second kernel of few new tokens: combines what the splits have mixed, and applies the value decoder and the gate,
// where there are. Where attention is observed, further blocks turn the splits' scores into what each row has received.
#pragma once

#include "observe.cuh"
#include "output.cuh"
#if GTA_CACHE_VALUE_BITS
#include "blocks.cuh"
#endif

namespace gta {

constexpr int columns = GTA_COMBINE_COLUMNS;
constexpr int column_units = columns / 8;                         // vectors of the value decoder, side by side
constexpr int decoder_rows = combine_threads / column_units;      // rows of it that are read at once
constexpr int decoder_rounds = (latent_dim + decoder_rows - 1) / decoder_rows;
constexpr int mix_units = latent_dim / 4;                         // vectors of one split's mix
constexpr int mix_splits = combine_threads / mix_units;           // splits that are read at once
static_assert(latent_dim <= combine_threads && columns <= combine_threads);
constexpr int parts_floats = mix_splits * latent_dim;
constexpr int decoded_floats = has_decoder ? latent_dim + decoder_rows * columns : 0;
constexpr int combine_bytes = (parts_floats + decoded_floats) * 4;
constexpr int totals_bytes = observed ? max_observed_tokens * query_heads * 2 * 4 : 0;
static_assert((combine_bytes > totals_bytes ? combine_bytes : totals_bytes) == GTA_COMBINE_SHARED_BYTES);

// The mix of one row and query head, of the `active` splits' results from `from` on: element threadIdx.x of it, 0 for
// further threads. `parts` is shared memory, [mix_splits, d_l].
GTA_DEVICE float combined_mix(float* parts, const float* mixes, const float* sums, i64 from, int active) {
    const int thread = threadIdx.x;
    const auto [base, sum] = Total(sums, from, active);

    const int mix_unit = thread % mix_units, first_split = thread / mix_units;
    if (mix_splits * mix_units == combine_threads || first_split < mix_splits) {
        Floats part{};
#pragma unroll 4
        for (int first = 0; first < active; first += mix_splits) {
            const i64 split = from + min_of(first + first_split, active - 1);
            const float power = power_of_2(sums[2 * split] - base);
            const float weight = first + first_split < active ? power : 0.0f;
            const Floats values = *reinterpret_cast<const Floats*>(mixes + split * latent_dim + 4 * mix_unit);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                part.x[j] += weight * values.x[j];
            }
        }
        *reinterpret_cast<Floats*>(parts + first_split * latent_dim + 4 * mix_unit) = part;
    }
    block_barrier();
    float total = 0.0f;
    if (thread < latent_dim) {
#pragma unroll
        for (int split = 0; split < mix_splits; ++split) {
            total += parts[split * latent_dim + thread];
        }
    }
    if constexpr (has_branches || bias_rows > 0) {
        return sum > 0.0f ? total * reciprocal(sum) : 0.0f;  // a query that sees nothing
    }
    return total * reciprocal(sum);
}

// A block's part of the value decoder, in registers for all its rows: of its columns, every decoder_rows-th row.
struct DecoderPart {
    Vector rows[decoder_rounds];
    int unit = threadIdx.x % column_units, first_row = threadIdx.x / column_units;

    GTA_DEVICE explicit DecoderPart(const Element* decoder) {  // [d_l, e d_l], from the block's first column on
#pragma unroll
        for (int round = 0; round < decoder_rounds; ++round) {
            const int i = round * decoder_rows + first_row;
            rows[round] = Vector{};
            if (latent_dim % decoder_rows == 0 || i < latent_dim) {
                rows[round] = load_vector(decoder + i64{i} * head_dim + 8 * unit);
            }
        }
    }

    // Column threadIdx.x of what it makes of a mix; `products` is shared memory, [decoder_rows, columns].
    GTA_DEVICE float of(float* products, const float* mix) const {
        float product[8] = {};
#pragma unroll
        for (int round = 0; round < decoder_rounds; ++round) {
            const int i = round * decoder_rows + first_row;
            float weights[8];
            unpack(weights, rows[round]);
            const float value = latent_dim % decoder_rows == 0 || i < latent_dim ? mix[i] : 0.0f;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                product[j] += value * weights[j];
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
            *reinterpret_cast<Floats*>(products + first_row * columns + 8 * unit + j) =
                Floats{{product[j], product[j + 1], product[j + 2], product[j + 3]}};
        }
        block_barrier();
        float total = 0.0f;
        if (static_cast<int>(threadIdx.x) < columns) {
#pragma unroll 8
            for (int i = 0; i < decoder_rows; ++i) {
                total += products[i * columns + threadIdx.x];
            }
        }
        return total;
    }
};

}  // namespace gta

GTA_KERNEL(gta::combine_threads)
gta_decode_combine(const float* mixes, const float* sums,
                   const gta::Element* gate,                        // [B, T, H], or null
                   const gta::Element* __restrict__ value_decoder,  // [n_q, d_l, e d_l], or null
                   const gta::i64* past_length,
                   gta::Element* __restrict__ output,  // [B, T, H]
                   GTA_IF_OBSERVED(GTA_IF_POSITIONS(const gta::i64* token_positions, ))  // [B, T]
                   GTA_IF_OBSERVED(const float* query_weight, )                          // [B, T]
                   GTA_IF_OBSERVED(const float* decay, )                                 // [B]
                   GTA_IF_OBSERVED(const float* scores, )                                // of the first kernel
                   GTA_IF_OBSERVED(float* received, )                                    // [B, S]
                   GTA_IF_BLOCKS(const gta::Element* key, )                // [B, T, n_k d_k]
                   GTA_IF_BLOCKS(const gta::Element* latent, )             // [B, T, n_c d_l]
                   GTA_IF_BLOCKS(gta::Element* key_open, )                 // [B, n_k, 32, d_k]
                   GTA_IF_BLOCKS(gta::Element* latent_open, )              // [B, n_c, 32, d_l]
                   GTA_IF_BLOCKS(const gta::Element* __restrict__ cos, )   // [P, d_k/2]
                   GTA_IF_BLOCKS(const gta::Element* __restrict__ sin, )
                   int rows, int tokens, int capacity, int splits GTA_IF_OBSERVED(, int mix_blocks)
                   GTA_IF_BLOCKS(, int mix_blocks, int positions)) {
    using namespace gta;
    const int thread = threadIdx.x, head = blockIdx.y, first_column = blockIdx.z * columns;
    float* const parts = reinterpret_cast<float*>(shared_memory());
    int row_blocks = gridDim.x;
#if GTA_OBSERVE || GTA_CACHE_VALUE_BITS
    row_blocks = mix_blocks;
    if (static_cast<int>(blockIdx.x) >= mix_blocks) {
        const int each = gridDim.y * gridDim.z;  // blocks that are side by side in x
        const int block = (blockIdx.x - mix_blocks) * each + blockIdx.y * gridDim.z + blockIdx.z;
        const int blocks = (gridDim.x - mix_blocks) * each;
#if GTA_OBSERVE
        const i64* new_positions = nullptr;
        GTA_IF_POSITIONS(new_positions = token_positions;)
        const Observation observation{sums,          scores,   query_weight,  decay,  past_length, new_positions,
                                      received,      rows / tokens, tokens, capacity, splits};
        observation.run(parts, block, blocks);
#else
        append_open_rows(key, latent, key_open, latent_open, past_length, cos, sin, rows, tokens, capacity, positions,
                         block * (combine_threads / warp_size) + thread / warp_size,
                         blocks * (combine_threads / warp_size));
#endif
        return;
    }
#endif
    const auto mix_of = [&](int row) {
        const int past = past_tokens(past_length, row / tokens, capacity);
        const int present = present_tokens(past, tokens, capacity);
        int active = ceil_div(present, split_tokens(present, splits));
        GTA_IF_BLOCKS(active = block_splits(past, splits);)
        return combined_mix(parts, mixes, sums, (i64{row} * query_heads + head) * splits, active);
    };
    const i64 first_place = head * head_dim + first_column;  // of the output, in its row

    if constexpr (has_decoder) {
        float* const mix = parts + parts_floats;    // [d_l]
        float* const products = mix + latent_dim;
        const DecoderPart decoder(value_decoder + i64{head} * latent_dim * head_dim + first_column);
        for (int row = blockIdx.x; row < rows; row += row_blocks) {
            const float own = mix_of(row);
            if (thread < latent_dim) {
                mix[thread] = own;
            }
            block_barrier();
            const float decoded = decoder.of(products, mix);
            if (thread < columns) {  // added to the tiled mix
                write_output(output, gate, row * hidden_size + first_place + thread,
                             mix[(first_column + thread) % latent_dim] + decoded);
            }
        }
    } else {
        for (int row = blockIdx.x; row < rows; row += row_blocks) {
            const float own = mix_of(row);
            if (thread < latent_dim) {
                write_output(output, gate, row * hidden_size + first_place + thread, own);
            }
            block_barrier();  // the next row takes the place of this one's parts
        }
    }
}
