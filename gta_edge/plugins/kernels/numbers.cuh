// Numbers of 16 bits, their matmul on tensor cores (mma), and the few sizes that all kernels share.
#pragma once

#include <primitives.cuh>

namespace gta {

constexpr bool bf16 = GTA_COMPUTE_BF16 != 0;

using Element = u16;  // fp16 or bf16: inputs and outputs

constexpr int warp_size = 32;

// Distance of rows in shared memory: an odd number of 16-byte units, so that 8 rows' units are in different banks.
GTA_DEVICE constexpr int pitch_of(int row_bytes) { return (row_bytes / 16 | 1) * 16; }
GTA_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
GTA_DEVICE int min_of(int a, int b) { return a < b ? a : b; }
GTA_DEVICE int lane_of_warp() { return threadIdx.x % warp_size; }

GTA_DEVICE u32 pack(float low, float high) {
    if constexpr (bf16) {
        return pack_bf16(low, high);
    } else {
        return pack_f16(low, high);
    }
}

GTA_DEVICE float unpack(u16 bits) {
    if constexpr (bf16) {
        return as_float(u32{bits} << 16);
    } else {
        return unpack_f16(bits);
    }
}

GTA_DEVICE float unpack_low(u32 pair) { return unpack(static_cast<u16>(pair)); }
GTA_DEVICE float unpack_high(u32 pair) { return unpack(static_cast<u16>(pair >> 16)); }

GTA_DEVICE void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    if constexpr (bf16) {
        mma_bf16(c, a, b);
    } else {
        mma_f16(c, a, b);
    }
}

constexpr u32 one = bf16 ? 0x3f80u : 0x3c00u;

}  // namespace gta
