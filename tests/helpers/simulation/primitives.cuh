// The functions of gta_edge/plugins/kernels/primitives.cuh on the host, for one simulated thread at a time.
//
// What waits, and what needs the other lanes of the warp, is in driver.cpp, which switches between the threads. The
// functions that wait take the line of their call as a further argument, for the reports. No header is included here:
// a kernel compiles in a fraction of a second, and uses nothing by accident that a device compiler would not have.
#pragma once

#define GTA_DEVICE inline
#define GTA_KERNEL(threads)                                                                                \
    static_assert((threads) > 0 && (threads) <= 1024 && (threads) % 32 == 0, "no size of a block of whole warps"); \
    extern "C" void

struct SimulationIndex {
    unsigned int x, y, z;
};

// Those of the thread that runs; the driver sets them at each switch.
extern SimulationIndex threadIdx, blockIdx, blockDim, gridDim;

// What device compilers declare unasked, of <math.h>.
extern "C" float fabsf(float) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
extern "C" float fmaxf(float, float) noexcept;
extern "C" float fminf(float, float) noexcept;

namespace gta {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

struct alignas(16) Vector {  // what one thread reads or writes at once
    u32 word[4];
};

// --- the block's shared memory, of the size given at launch ----------------------------------------------------------

u8* shared_memory();

u32 shared_address(const void* pointer);

// --- barriers, shuffles and votes; every thread of the block or warp takes part --------------------------------------

void block_barrier(int line = __builtin_LINE());

void warp_barrier(int line = __builtin_LINE());

float shuffle_xor(float value, int lane_mask, int line = __builtin_LINE());

bool any_of_warp(bool condition, int line = __builtin_LINE());

GTA_DEVICE u32 kept_in_register(u32 number) { return number + blockIdx.z; }

GTA_DEVICE int computed_anew(int number) { return number; }

GTA_DEVICE u32 in_register(u32 number) { return number + threadIdx.z; }

// --- copies from global to shared memory, which happen at any time until they are waited for -------------------------

void copy_16_async(void* shared, const void* global, bool valid);

void copy_4_async(void* shared, const void* global, bool valid);

void commit_copies();

void wait_until_pending(int groups);

template <int pending>
GTA_DEVICE void wait_for_copies() {
    static_assert(pending >= 0, "a number of groups");
    wait_until_pending(pending);
}

// --- tensor cores ----------------------------------------------------------------------------------------------------

void load_matrices(u32 (&r)[4], const void* row, int line = __builtin_LINE());

void load_matrices_transposed(u32 (&r)[4], const void* row, int line = __builtin_LINE());

void load_matrices(u32 (&r)[2], const void* row, int line = __builtin_LINE());

void load_matrices_transposed(u32 (&r)[2], const void* row, int line = __builtin_LINE());

void mma_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], int line = __builtin_LINE());

void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], int line = __builtin_LINE());

// --- arithmetic ------------------------------------------------------------------------------------------------------

GTA_DEVICE float max_of(float a, float b) { return b > a || a != a ? b : a; }

float power_of_2(float x);

float logarithm_2(float x);

float reciprocal(float x);

GTA_DEVICE float exact_reciprocal(float x) { return 1.0f / x; }

float inverse_root(float x);

GTA_DEVICE float as_float(u32 bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

GTA_DEVICE u32 as_bits(float value) {
    u32 bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

int nearest_integer(float x);

u32 pick_bytes(u32 a, u32 b, u32 selector);

u32 pack_f16(float low, float high);

u32 pack_bf16(float low, float high);

float unpack_f16(u16 bits);

u32 fma_f16x2(u32 a, u32 b, u32 c);

u32 fma_bf16x2(u32 a, u32 b, u32 c);

}  // namespace gta
