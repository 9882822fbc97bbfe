// The type of cached values, which are of 16 bits as all others, of 8 with a scale for each row, or, in blocks of rows,
// of 4 bits and less (blocks.cuh), in which case the rows of the last block are of 16.
#pragma once

#include "numbers.cuh"

namespace gta {

constexpr bool int8_cache = GTA_CACHE_INT8 != 0;
constexpr bool fp8_cache = GTA_CACHE_FP8 != 0;
constexpr bool quantised = int8_cache || fp8_cache;
constexpr int value_bits = GTA_CACHE_VALUE_BITS;
constexpr bool in_blocks = value_bits != 0;
static_assert(int8_cache + fp8_cache + in_blocks <= 1 && (value_bits == 0 || value_bits == 2 || value_bits == 4));

template <bool narrow>
struct CacheElementOf {
    using type = Element;
};
template <>
struct CacheElementOf<true> {
    using type = u8;
};
using CacheElement = CacheElementOf<quantised>::type;

}  // namespace gta
