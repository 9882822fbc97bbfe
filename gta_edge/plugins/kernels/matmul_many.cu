// x times quantised weights for many rows: a block computes a tile of rows and outputs.
//
// Weights go straight from global memory to registers, in the order in which tensor cores take them, a step of 64
// inputs ahead; x goes through shared memory, some steps ahead. Integers are multiplied, and the sums of those that
// share a scale are multiplied by it in float32.

#include "weights.cuh"

namespace gta {

constexpr int output_warps = GTA_MANY_OUTPUT_WARPS;
constexpr int row_warps = GTA_MANY_ROW_WARPS;
constexpr int output_tiles = GTA_MANY_OUTPUT_TILES;  // of 16 outputs, of each warp
constexpr int row_tiles = GTA_MANY_ROW_TILES;        // of 8 rows, of each warp
constexpr int stages = GTA_MANY_STAGES;
constexpr int threads = warp_size * output_warps * row_warps;
constexpr int warp_rows = 8 * row_tiles;
constexpr int warp_outputs = tile_outputs * output_tiles;
constexpr int block_rows = row_warps * warp_rows;
constexpr int block_outputs = output_warps * warp_outputs;
constexpr int half_inputs = unit_inputs / 2;  // of one stage
constexpr int half_steps = unit_steps / 2;
constexpr int lane_vectors = unit_vectors / 2 / warp_size;
constexpr int part_steps = block_steps < half_steps ? block_steps : half_steps;
constexpr int half_parts = half_steps / part_steps;  // of one scale each

// Shared memory: stages of x; later, in their place, the block's results.
constexpr int x_pitch = pitch_of(2 * half_inputs);
constexpr int result_pitch = pitch_of(2 * block_outputs);
constexpr int x_bytes = stages * block_rows * x_pitch, result_bytes = block_rows * result_pitch;
static_assert((x_bytes > result_bytes ? x_bytes : result_bytes) == GTA_MANY_SHARED_BYTES);
static_assert(row_tiles % 2 == 0 && stages >= 2);

// Copies x, 64 inputs of the block's rows at a time, into the stages in turn; zeros where there is no such row or
// input.
struct CopiesOfX {
    static constexpr int units = half_inputs / 8, row_step = threads / units;
    static_assert(threads % units == 0 && block_rows % row_step == 0);

    const Element* from;  // this thread's first unit of the next stage
    u8* to;
    int inputs;        // from there on
    const int rows;    // from the thread's first row on
    const i64 stride;  // of x's rows that are row_step apart
    int stage = 0;

    GTA_DEVICE CopiesOfX(u8* stages_of_x, const Element* x, int first_row, int all_rows, int in_features)
        : from(x + i64{first_row + int(threadIdx.x) / units} * in_features + threadIdx.x % units * 8),
          to(stages_of_x + threadIdx.x / units * x_pitch + threadIdx.x % units * 16),
          inputs(in_features - int(threadIdx.x) % units * 8),
          rows(all_rows - first_row - int(threadIdx.x) / units),
          stride(i64{row_step} * in_features) {}

    GTA_DEVICE void next(bool present) {
        if (present) {
#pragma unroll
            for (int i = 0; i < block_rows / row_step; ++i) {
                copy_16_async(to + i * row_step * x_pitch, from + i * stride, i * row_step < rows && inputs > 0);
            }
            from += half_inputs;
            inputs -= half_inputs;
            const bool wraps = ++stage == stages;
            stage = wraps ? 0 : stage;
            to += wraps ? -(stages - 1) * block_rows * x_pitch : block_rows * x_pitch;
        }
        commit_copies();
    }
};

struct Stretch {  // of 64 inputs, what a lane needs of 16 outputs
    Vector codes[lane_vectors];
    u32 scales[half_parts];  // of two outputs each
};

struct Weights {  // of one warp, its tiles of 16 outputs
    const Vector* codes[output_tiles];
    const u32* scales[output_tiles];

    // Of the unit that the pointers are at, the lower or upper half.
    GTA_DEVICE void load(Stretch (&to)[output_tiles], int half) const {
#pragma unroll
        for (int tile = 0; tile < output_tiles; ++tile) {
#pragma unroll
            for (int i = 0; i < lane_vectors; ++i) {
                to[tile].codes[i] = codes[tile][(half * lane_vectors + i) * warp_size];
            }
            if constexpr (block_size != 0) {
#pragma unroll
                for (int i = 0; i < half_parts; ++i) {
                    to[tile].scales[i] = scales[tile][half * unit_blocks / 2 + i];
                }
            }
        }
    }

    GTA_DEVICE void to_next_unit() {
#pragma unroll
        for (int tile = 0; tile < output_tiles; ++tile) {
            codes[tile] += unit_vectors;
            scales[tile] += unit_scales / 2;
        }
    }
};

using Sums = float[output_tiles][row_tiles][4];

// Adds what `part_steps` steps are of the sums, whose inputs share scales.
GTA_DEVICE void add_part(Sums& sums, const Widening& widening, const Stretch (&weights)[output_tiles], const u8* x,
                         int part_of_stage) {
    u32 left[output_tiles][part_steps][4];
#pragma unroll
    for (int tile = 0; tile < output_tiles; ++tile) {
#pragma unroll
        for (int step = 0; step < part_steps; ++step) {
            widening.operand(left[tile][step], weights[tile].codes, part_of_stage * part_steps + step);
        }
    }
#pragma unroll
    for (int m = 0; m < row_tiles; m += 2) {
        float part[output_tiles][2][4] = {};
#pragma unroll
        for (int step = 0; step < part_steps; ++step) {
            u32 right[4];
            load_matrices(right, x + 8 * m * x_pitch + 2 * step_inputs * (part_of_stage * part_steps + step));
#pragma unroll
            for (int tile = 0; tile < output_tiles; ++tile) {
                mma(part[tile][0], left[tile][step], {right[0], right[1]});
                mma(part[tile][1], left[tile][step], {right[2], right[3]});
            }
        }
#pragma unroll
        for (int tile = 0; tile < output_tiles; ++tile) {
            const u32 scales = block_size == 0 ? 0x3c003c00u : weights[tile].scales[part_of_stage];  // or 1, 1
            add_scaled(sums[tile][m], part[tile][0], scales);
            add_scaled(sums[tile][m + 1], part[tile][1], scales);
        }
    }
}

// Rounds this warp's sums into shared memory, with the scale of an output where it has but one, and the bias.
GTA_DEVICE void store_results(u8* results, const Sums& sums, const u16* scale, const Element* bias, int first_output,
                              int out_features) {
    const int lane = lane_of_warp();
#pragma unroll
    for (int tile = 0; tile < output_tiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int column = tile_outputs * tile + 8 * half + lane / 4, output = first_output + column;
            const bool present = output < out_features;
            const float factor = present ? channel_scale(scale, output) : 0.0f;
            const float shift = present && bias != nullptr ? unpack(bias[output]) : 0.0f;
#pragma unroll
            for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int row = 8 * m + lane % 4 * 2 + i;
                    const float sum = sums[tile][m][2 * half + i] * factor + shift;
                    *reinterpret_cast<Element*>(results + row * result_pitch + 2 * column) =
                        static_cast<Element>(pack(sum, 0.0f));
                }
            }
        }
    }
}

GTA_DEVICE void write_results(const Outputs& outputs, const u8* results, int first_row, int rows, int first_output,
                              int out_features) {
    constexpr int units = block_outputs / 8;
    for (int i = threadIdx.x; i < block_rows * units; i += threads) {
        const int row = first_row + i / units, output = first_output + i % units * 8;
        if (row < rows && output < out_features) {
            const u8* const from = results + i / units * result_pitch + i % units * 16;
            const Place place = place_of(outputs, output);
            Element* const to = place.to + i64{row} * place.size;
            if (place.size % 8 == 0) {  // then rows begin at multiples of 16 bytes, and this one does not end within
                *reinterpret_cast<Vector*>(to) = *reinterpret_cast<const Vector*>(from);
            } else {
                for (int j = 0; j < min_of(8, out_features - output); ++j) {
                    to[j] = reinterpret_cast<const Element*>(from)[j];
                }
            }
        }
    }
}

}  // namespace gta

GTA_KERNEL(gta::threads)
gta_matmul(const gta::Element* x,                   // [rows, K]
           const gta::Vector* __restrict__ weight,  // packed, as is the scale
           const gta::u16* __restrict__ scale,
           const gta::Element* __restrict__ bias,  // [N], or null
           gta::Element* __restrict__ output_0,    // [rows, size_0], and so on
           gta::Element* __restrict__ output_1, gta::Element* __restrict__ output_2,
           gta::Element* __restrict__ output_3, int rows, int in_features, int size_0, int size_1, int size_2,
           int size_3) {
    using namespace gta;
    const Outputs outputs{{output_0, output_1, output_2, output_3}, {size_0, size_1, size_2, size_3}};
    const int lane = lane_of_warp(), warp = threadIdx.x / warp_size;
    const int warp_row = warp / output_warps * warp_rows, warp_output = warp % output_warps * warp_outputs;
    const int first_row = blockIdx.x * block_rows, first_output = blockIdx.y * block_outputs;
    const int units = ceil_div(in_features, unit_inputs), halves = 2 * units, out_features = outputs.all();
    const int last_tile = ceil_div(out_features, tile_outputs) - 1;

    Weights weights;
#pragma unroll
    for (int i = 0; i < output_tiles; ++i) {  // past the last tile, that one again: its results are not written
        const i64 tile = min_of((first_output + warp_output) / tile_outputs + i, last_tile);
        weights.codes[i] = weight + tile * units * unit_vectors + lane;
        weights.scales[i] =
            reinterpret_cast<const u32*>(scale + tile * units * unit_scales) + lane / 4 * unit_blocks;
    }
    Stretch stretches[2][output_tiles];
    weights.load(stretches[0], 0);

    u8* const shared = shared_memory();
    CopiesOfX copies(shared, x, first_row, rows, in_features);
#pragma unroll
    for (int i = 0; i < stages - 1; ++i) {
        copies.next(i < halves);
    }

    // Of ldmatrix, each lane addresses a row: 8 rows and 8 inputs a matrix.
    const u8* own_x = shared + (warp_row + lane % 8 + lane / 16 * 8) * x_pitch + lane / 8 % 2 * 16;
    const Widening widening;
    Sums sums = {};
    int stage = 0;
    for (int unit = 0; unit < units; ++unit) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            wait_for_copies<stages - 2>();
            block_barrier();  // all copies of this stage are there, and the stage before was read by all
            copies.next(2 * unit + half + stages - 1 < halves);
            if (half == 1 && unit + 1 < units) {
                weights.to_next_unit();
            }
            weights.load(stretches[1 - half], 1 - half);  // at the end, what is not used again
#pragma unroll
            for (int part = 0; part < half_parts; ++part) {
                add_part(sums, widening, stretches[half], own_x, part);
            }
            const bool wraps = ++stage == stages;
            stage = wraps ? 0 : stage;
            own_x += wraps ? -(stages - 1) * block_rows * x_pitch : block_rows * x_pitch;
        }
    }

    block_barrier();  // x was read by all
    store_results(shared + warp_row * result_pitch + 2 * warp_output, sums, scale, bias, first_output + warp_output,
                  out_features);
    block_barrier();
    write_results(outputs, shared, first_row, rows, first_output, out_features);
}
