// Weights of 4 or 8 bits in the order in which tensor cores take them, as the left operand: 16 outputs a tile, 128
// inputs a unit (gta_edge/plugins/matmul/packing.py has the layout), and the fp16 scales that blocks of inputs share.
#pragma once

#include "numbers.cuh"

namespace gta {

constexpr int code_bits = GTA_CODE_BITS;
constexpr int block_size = GTA_BLOCK_SIZE;  // inputs that share a scale; 0: all of an output do

static_assert(code_bits == 4 || code_bits == 8);
static_assert(block_size == 32 || block_size == 64 || block_size == 128 || (block_size == 0 && code_bits == 8));

constexpr int tile_outputs = 16;
constexpr int unit_inputs = 128;
constexpr int step_inputs = 16;  // of one tensor core matmul
constexpr int unit_steps = unit_inputs / step_inputs;
constexpr int unit_blocks = block_size == 0 ? 0 : unit_inputs / block_size;  // scales of an output in a unit
constexpr int block_steps = block_size == 0 ? unit_steps : block_size / step_inputs;
constexpr int unit_vectors = tile_outputs * unit_inputs * code_bits / 8 / 16;  // 16 bytes each
constexpr int vector_steps = unit_steps * warp_size / unit_vectors;            // that a lane's 16 bytes are enough for
constexpr int unit_scales = tile_outputs * unit_blocks;

// Makes left operands.
struct Widening {
    // Which bits of a word are weights: the lower and the upper nibbles of its bytes, or, of the lower bytes, all but
    // the highest bit, and that bit. A logical instruction takes one constant beside registers, and there are two.
    u32 low = kept_in_register(code_bits == 4 ? 0x000f000fu : 0x007f007fu);
    u32 high = kept_in_register(code_bits == 4 ? 0x00f000f0u : 0x00800080u);

    // Left operand of step `step`, as integers, from this lane's vectors of the steps from 0 on. They are exact in both
    // formats: a weight's bits are set in a number whose last bit is worth 1, and what is too much is taken off.
    template <int n>
    GTA_DEVICE void operand(u32 (&a)[4], const Vector (&codes)[n], int step) const {
        const u32(&word)[4] = codes[step / vector_steps].word;
        if constexpr (code_bits == 4) {
            const u32 nibbles = word[step % vector_steps];
            if constexpr (bf16) {  // 0x4300 is 128; less 128 + 8
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    a[i] = fma_bf16x2((nibbles >> 4 * i & low) | 0x43004300u, 0x3f803f80u, 0xc308c308u);
                }
            } else {  // 0x6400 is 1024; less 1024 + 8. Of the nibbles 4 bits higher, a 16th, less 64 + 8.
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    const u32 pair = nibbles >> 4 * i;
                    a[i] = fma_f16x2((pair & low) | 0x64006400u, 0x3c003c00u, 0xe408e408u);
                    a[i + 1] = fma_f16x2((pair & high) | 0x64006400u, 0x2c002c00u, 0xd480d480u);
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 bytes = word[2 * (step % vector_steps) + i / 2];
                const u32 selector = i % 2 ? 0x4342u : 0x4140u;
                if constexpr (bf16) {  // 128 + the lower 7 bits; less 128, or 256 where the highest is not set
                    const u32 pair = pick_bytes(bytes, 0, selector);
                    a[i] = fma_bf16x2((pair & high) ^ 0x43804380u, 0xbf80bf80u, (pair & low) | 0x43004300u);
                } else {  // less 1024 + 128
                    a[i] = fma_f16x2(pick_bytes(bytes, 0x64646464u, selector), 0x3c003c00u, 0xe480e480u);
                }
            }
        }
    }
};

// Adds a block's sums of integers. A thread holds of a tile's sums two outputs, lane / 4 and 8 further, of two rows,
// 2 (lane % 4) and the next; `scales` are those of the two outputs.
GTA_DEVICE void add_scaled(float (&sums)[4], const float (&block)[4], u32 scales) {
    const float low = unpack_f16(static_cast<u16>(scales)), high = unpack_f16(static_cast<u16>(scales >> 16));
    sums[0] += low * block[0];
    sums[1] += low * block[1];
    sums[2] += high * block[2];
    sums[3] += high * block[3];
}

// The scale of an output that has but one, else 1.
GTA_DEVICE float channel_scale(const u16* scale, int output) {
    if constexpr (block_size == 0) {
        return unpack_f16(scale[output / 16 * 16 + output % 8 * 2 + output % 16 / 8]);
    } else {
        return 1.0f;
    }
}

// --- outputs, side by side along N, each with memory of its own ------------------------------------------------------

constexpr int max_outputs = 4;

struct Outputs {
    Element* data[max_outputs];
    int size[max_outputs];  // 0 where there is none; all but the last are multiples of 16

    GTA_DEVICE int all() const { return size[0] + size[1] + size[2] + size[3]; }
};

struct Place {
    Element* to;  // of row 0
    int size;     // of the output, and so the distance of rows
};

GTA_DEVICE Place place_of(const Outputs& outputs, int output) {
    Place place{outputs.data[0] + output, outputs.size[0]};
    int before = outputs.size[0];
#pragma unroll
    for (int i = 1; i < max_outputs; ++i) {
        if (outputs.size[i] > 0 && output >= before) {
            place = Place{outputs.data[i] + (output - before), outputs.size[i]};
        }
        before += outputs.size[i];
    }
    return place;
}

}  // namespace gta
