// Numbers of 8 bits: how a quantised cache is written and read.
#pragma once

#include "cache_type.cuh"

namespace gta {

// A cached value is an 8-bit one times a float32 scale, one per token and head.

constexpr float largest_code = int8_cache ? 127.0f : 448.0f;  // of e4m3, 448

// Two 8-bit values, in the low bytes of both halves, as two exact 16-bit floats.
GTA_DEVICE u32 widen(u32 codes) {
    if constexpr (int8_cache && bf16) {
        // 0x4300 is 128 and its last bit is worth 1; with the sign bit set as the exponent's lowest, 256
        const u32 low = (codes & 0x007f007fu) | 0x43004300u;
        const u32 offset = (codes & 0x00800080u) | 0x43004300u;
        return fma_bf16x2(offset, 0xbf80bf80u, low);
    } else if constexpr (int8_cache) {
        // 0x6400 is 1024 and its last bit is worth 1; less 1024 + 128
        return fma_f16x2((codes ^ 0x00800080u) | 0x64006400u, 0x3c003c00u, 0xe480e480u);
    } else if constexpr (bf16) {
        // e4m3's exponent is 120 lower in bf16's terms; subnormal values are subnormal bf16 until multiplied
        const u32 moved = (codes & 0x00800080u) << 8 | (codes & 0x007f007fu) << 4;
        return fma_bf16x2(moved, 0x7b807b80u, 0x80008000u);
    } else {
        const u32 moved = (codes & 0x00800080u) << 8 | (codes & 0x007f007fu) << 7;
        return fma_f16x2(moved, 0x5c005c00u, 0x80008000u);
    }
}

// A float32 as e4m3, to nearest even; what is larger than 448 becomes 448.
GTA_DEVICE u32 to_e4m3(float value) {
    const u32 sign = as_bits(value) >> 24 & 0x80u;
    const float size = as_float(as_bits(value) & 0x7fffffffu);
    if (!(size < 448.0f)) {
        return sign | 0x7eu;
    }
    if (size < 0.015625f) {  // below 2^-6 values are 2^-9 apart; 8 of them is the first normal one
        return sign | static_cast<u32>(nearest_integer(size * 512.0f));
    }
    const u32 bits = as_bits(size);
    const u32 rounded = (bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20;
    return sign | (rounded - ((127 - 7) << 3));
}

GTA_DEVICE u32 to_code(float value) {  // |value| is at most about largest_code
    if constexpr (int8_cache) {
        const int code = nearest_integer(value);
        return static_cast<u32>(code > 127 ? 127 : code < -127 ? -127 : code) & 0xffu;
    } else {
        return to_e4m3(value);
    }
}

// Scales are at least 2^-60, so that they can be inverted, and so that a row of zeros weighs next to nothing where
// weights are multiplied by scales. NaN stays NaN.
GTA_DEVICE float usable_scale(float scale) { return scale < 0x1p-60f ? 0x1p-60f : scale; }

// A row's scale from its largest magnitude.
GTA_DEVICE float scale_of(float largest) { return usable_scale(largest * (1.0f / largest_code)); }

}  // namespace gta
