// The type of cached values, which are of 16 bits as all others or of 8 with a scale for each row.
#pragma once

#include "numbers.cuh"

namespace gta {

constexpr bool int8_cache = GTA_CACHE_INT8 != 0;
constexpr bool fp8_cache = GTA_CACHE_FP8 != 0;
constexpr bool quantised = int8_cache || fp8_cache;

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
