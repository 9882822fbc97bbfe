// x times quantised weights for few rows: memory is the bound, and every weight is read once.
//
// A block takes tiles of 16 outputs in turn, its warps share the inputs in units of 128. Each warp copies the units
// that it multiplies next into stages of its own, across the border of one tile and the next, so that loads do not stop
// while the warps' sums are added up.

#include "weights.cuh"

namespace gta {

constexpr int stages = GTA_FEW_STAGES;
constexpr int max_threads = GTA_FEW_THREADS;
constexpr int lane_vectors = unit_vectors / warp_size;
constexpr int stage_bytes = 16 * unit_vectors + 2 * unit_scales;
constexpr int chains = block_steps > 4 ? 2 : 1;  // of mma that wait for each other, in a block of inputs
static_assert(stages >= 2 && stage_bytes == GTA_FEW_STAGE_BYTES);

// Adds a unit's part of the sums. `codes` (quantised weights) and `scales` are this lane's in a stage, `x` its rows of
// ldmatrix.
template <int row_tiles>
GTA_DEVICE void add_unit(float (&sums)[row_tiles][4], const Widening& widening, const u8* codes, const u8* scales,
                         const u8* const (&x)[row_tiles]) {
    Vector vectors[lane_vectors];
#pragma unroll
    for (int i = 0; i < lane_vectors; ++i) {
        vectors[i] = *reinterpret_cast<const Vector*>(codes + 16 * warp_size * i);
    }
#pragma unroll
    for (int block = 0; block < unit_steps / block_steps; ++block) {
        float part[chains][row_tiles][4] = {};
#pragma unroll
        for (int step = block * block_steps; step < (block + 1) * block_steps; step += 2) {
            u32 left[2][4];
            widening.operand(left[0], vectors, step);
            widening.operand(left[1], vectors, step + 1);
#pragma unroll
            for (int m = 0; m < row_tiles; ++m) {
                u32 right[4];
                load_matrices(right, x[m] + 2 * step_inputs * step);
                mma(part[0][m], left[0], {right[0], right[1]});
                mma(part[chains - 1][m], left[1], {right[2], right[3]});
            }
        }
        u32 pair = 0x3c003c00u;  // 1, 1
        if constexpr (block_size != 0) {
            pair = reinterpret_cast<const u32*>(scales)[block];
        }
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
            if constexpr (chains == 2) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    part[0][m][i] += part[1][m][i];
                }
            }
            add_scaled(sums[m], part[0][m], pair);
        }
    }
}

// Copies a warp's units one after the other, tile by tile, into its stages in turn.
struct Copies {
    const u8* codes;  // this lane's of the next unit
    const u8* scales;
    i64 skipped;  // units from the end of the warp's part of a tile to that of the block's next tile
    u8* to;       // the next stage, this lane's place
    int left, own, next_unit = 0, next_stage = 0;

    GTA_DEVICE void next() {
        if (left > 0) {
#pragma unroll
            for (int i = 0; i < lane_vectors; ++i) {
                copy_16_async(to + 16 * warp_size * i, codes + 16 * warp_size * i, true);
            }
            if (lane_of_warp() < unit_scales / 8) {
                copy_16_async(to + 16 * unit_vectors, scales, true);
            }
            --left;
            const bool tile_ends = ++next_unit == own;
            next_unit = tile_ends ? 0 : next_unit;
            const i64 units = tile_ends ? skipped + 1 : 1;
            codes += units * (16 * unit_vectors);
            scales += units * (2 * unit_scales);
            const bool wraps = ++next_stage == stages;
            next_stage = wraps ? 0 : next_stage;
            to += wraps ? -(stages - 1) * stage_bytes : stage_bytes;
        }
        commit_copies();
    }
};

template <int row_tiles>
GTA_DEVICE void matmul_few(const Element* x, const Vector* weight, const u16* scale, const Element* bias,
                           const Outputs& outputs, int rows, int in_features) {
    const int lane = lane_of_warp(), warp = threadIdx.x / warp_size, warps = blockDim.x / warp_size;
    const int units = ceil_div(in_features, unit_inputs), out_features = outputs.all();
    const int tiles = ceil_div(out_features, tile_outputs);
    const int share = ceil_div(units, warps), first = warp * share;
    const int own = min_of(share, units - first);  // units of this warp, at least 1
    const int own_tiles = ceil_div(tiles - blockIdx.x, gridDim.x);

    // Shared memory: x; the warps' stages; the warps' sums of two tiles, in turn.
    const int pitch = pitch_of(2 * unit_inputs * units);
    u8* const rows_of_x = shared_memory();
    u8* const own_stages = rows_of_x + rows * pitch + warp * stages * stage_bytes;
    float* const all_sums = reinterpret_cast<float*>(rows_of_x + rows * pitch + warps * stages * stage_bytes);

    // Of x what this warp multiplies, and zeros where weights are padding; it arrives with the first unit.
    for (int i = lane; i < own * (unit_inputs / 8); i += warp_size) {
        const int input = first * unit_inputs + 8 * i;
        const bool valid = input < in_features;
        for (int row = 0; row < rows; ++row) {
            copy_16_async(rows_of_x + row * pitch + 2 * input, x + (valid ? i64{row} * in_features + input : 0), valid);
        }
    }
    const i64 first_unit = i64{blockIdx.x} * units + first;
    Copies copies{reinterpret_cast<const u8*>(weight + first_unit * unit_vectors + lane),
                  reinterpret_cast<const u8*>(scale + first_unit * unit_scales + 8 * lane),
                  i64{gridDim.x} * units - own, own_stages + 16 * lane, own * own_tiles, own};
#pragma unroll
    for (int i = 0; i < stages - 1; ++i) {
        copies.next();
    }

    // The places in x that this lane addresses in ldmatrix. Missing rows are the last one again: what comes of them is
    // not written.
    const u8* first_x[row_tiles];
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) {
        first_x[m] = rows_of_x + min_of(8 * m + lane % 8, rows - 1) * pitch + 2 * unit_inputs * first + lane / 8 * 16;
    }
    const Widening widening;
    const u8* codes = own_stages + 16 * lane;
    const u8* scales = own_stages + 16 * unit_vectors + lane / 4 * (4 * unit_blocks);
    int stage = 0, turn = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        // Of the output that this thread finishes, loaded now, so that nothing waits for it.
        const int output = tile * tile_outputs + threadIdx.x % tile_outputs;
        const bool finishes = static_cast<int>(threadIdx.x) < rows * tile_outputs && output < out_features;
        const float factor = finishes ? channel_scale(scale, output) : 0.0f;
        const float shift = finishes && bias != nullptr ? unpack(bias[output]) : 0.0f;

        float sums[row_tiles][4] = {};
        const u8* places[row_tiles];
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
            places[m] = first_x[m];
        }
        for (int i = 0; i < own; ++i) {
            wait_for_copies<stages - 2>();
            warp_barrier();  // the other lanes' copies are there, and the stage before was read by all
            copies.next();
            add_unit(sums, widening, codes, scales, places);
#pragma unroll
            for (int m = 0; m < row_tiles; ++m) {
                places[m] += 2 * unit_inputs;
            }
            const bool wraps = ++stage == stages;
            stage = wraps ? 0 : stage;
            const int step = wraps ? -(stages - 1) * stage_bytes : stage_bytes;
            codes += step;
            scales += step;
        }

        // The warps' sums, always in the same order. A warp that comes to the tile after next finds its place read,
        // since all have passed the barrier of the next one.
        float* const sums_of_tile = all_sums + turn * warps * rows * tile_outputs;
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = 8 * m + lane % 4 * 2 + i % 2, column = lane / 4 + i / 2 * 8;
                if (row < rows) {
                    sums_of_tile[(warp * rows + row) * tile_outputs + column] = sums[m][i];
                }
            }
        }
        block_barrier();
        if (finishes) {
            const Place place = place_of(outputs, output);
            for (int i = threadIdx.x; i < rows * tile_outputs; i += blockDim.x) {
                float sum = 0.0f;
                for (int part = 0; part < warps; ++part) {
                    sum += sums_of_tile[part * rows * tile_outputs + i];
                }
                place.to[i64{i / tile_outputs} * place.size] = static_cast<Element>(pack(sum * factor + shift, 0.0f));
            }
        }
        turn ^= 1;
    }
}

}  // namespace gta

GTA_KERNEL(gta::max_threads)
gta_matmul_8_rows(const gta::Element* x,                   // [rows, K]
                  const gta::Vector* __restrict__ weight,  // packed, as is the scale
                  const gta::u16* __restrict__ scale,
                  const gta::Element* __restrict__ bias,  // [N], or null
                  gta::Element* __restrict__ output_0,    // [rows, size_0], and so on
                  gta::Element* __restrict__ output_1, gta::Element* __restrict__ output_2,
                  gta::Element* __restrict__ output_3, int rows, int in_features, int size_0, int size_1, int size_2,
                  int size_3) {
    using namespace gta;
    const Outputs outputs{{output_0, output_1, output_2, output_3}, {size_0, size_1, size_2, size_3}};
    matmul_few<1>(x, weight, scale, bias, outputs, rows, in_features);
}

GTA_KERNEL(gta::max_threads)
gta_matmul_16_rows(const gta::Element* x,                   // [rows, K]
                   const gta::Vector* __restrict__ weight,  // packed, as is the scale
                   const gta::u16* __restrict__ scale,
                   const gta::Element* __restrict__ bias,  // [N], or null
                   gta::Element* __restrict__ output_0,    // [rows, size_0], and so on
                   gta::Element* __restrict__ output_1, gta::Element* __restrict__ output_2,
                   gta::Element* __restrict__ output_3, int rows, int in_features, int size_0, int size_1, int size_2,
                   int size_3) {
    using namespace gta;
    const Outputs outputs{{output_0, output_1, output_2, output_3}, {size_0, size_1, size_2, size_3}};
    matmul_few<2>(x, weight, scale, bias, outputs, rows, in_features);
}
