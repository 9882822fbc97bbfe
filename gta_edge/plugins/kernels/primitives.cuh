// What the kernels ask of the hardware, one PTX instruction a function (PTX ISA, "Instruction Set").
//
// The kernels include this file as <primitives.cuh>, without any other header, so that NVRTC needs no toolkit; whoever
// compiles them for something else puts a file of this name, with the same functions, earlier on the include path.
#pragma once

#define GTA_DEVICE __device__ __forceinline__
#define GTA_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)

namespace gta {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

struct alignas(16) Vector {  // what one thread reads or writes at once
    u32 word[4];
};

// --- the block's shared memory, of the size given at launch ----------------------------------------------------------

GTA_DEVICE u8* shared_memory() {
    extern __shared__ Vector dynamic_shared_memory[];
    return reinterpret_cast<u8*>(dynamic_shared_memory);
}

GTA_DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// --- barriers, shuffles and votes; every thread of the block or warp takes part ---------------------------------------

GTA_DEVICE void block_barrier() { asm volatile("barrier.sync.aligned 0;" ::: "memory"); }

GTA_DEVICE void warp_barrier() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

GTA_DEVICE float shuffle_xor(float value, int lane_mask) {
    float result;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=f"(result) : "f"(value), "r"(lane_mask));
    return result;
}

GTA_DEVICE bool any_of_warp(bool condition) {
    int result;
    asm volatile("{ .reg .pred p, q; setp.ne.s32 p, %1, 0; vote.sync.any.pred q, p, 0xffffffff; selp.s32 %0, 1, 0, q; }"
                 : "=r"(result)
                 : "r"(static_cast<int>(condition)));
    return result != 0;
}

// The same number, where a grid has one block along z. The compiler does not know that, and keeps it in a register; a
// constant it would put into one anew at each use.
GTA_DEVICE u32 kept_in_register(u32 number) { return number + blockIdx.z; }

// The same number, of which the compiler knows nothing: what is made of it is computed there, and not ahead of a loop,
// where it would take registers all along.
GTA_DEVICE int computed_anew(int number) {
    asm volatile("" : "+r"(number));
    return number;
}

// As kept_in_register, for grids of any shape: blocks have threads along x alone.
GTA_DEVICE u32 in_register(u32 number) { return number + threadIdx.z; }

// --- copies from global to shared memory that run beside the computation ------------------------------------------

// 16 bytes, past the L1 cache; zeros are written, and nothing is read, where `valid` is false.
GTA_DEVICE void copy_16_async(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                 : "memory");
}

GTA_DEVICE void copy_4_async(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 4 : 0)
                 : "memory");
}

// Closes the group of this thread's copies since the last call.
GTA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's groups, the latest ones, are still under way.
template <int pending>
GTA_DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// --- tensor cores ---------------------------------------------------------------------------------------------------

// Lane l gives the address of row l % 8 of matrix l / 8 (8 rows of 16 bytes); register i receives from matrix i the
// two 16-bit elements 2 (l % 4), 2 (l % 4) + 1 of row l / 4.
GTA_DEVICE void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same of the transposed matrices: elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
GTA_DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Two matrices, from the addresses of lanes 0 to 15; the other lanes' addresses are not used.
GTA_DEVICE void load_matrices(u32 (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

GTA_DEVICE void load_matrices_transposed(u32 (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a b for a 16x16, b 16x8, c 16x8. With g = lane / 4 and p = lane % 4, a thread holds of
//   a: rows g, g + 8, g, g + 8 at columns 2p, 2p + 1 (first two registers) and 2p + 8, 2p + 9 (last two);
//   b: rows 2p, 2p + 1 (first register) and 2p + 8, 2p + 9 (second) of column g;
//   c: columns 2p, 2p + 1 of row g (first two) and of row g + 8 (last two).
GTA_DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

GTA_DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- arithmetic -----------------------------------------------------------------------------------------------------

// The larger of two; of a number and NaN, the number.
GTA_DEVICE float max_of(float a, float b) {
    float y;
    asm("max.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

GTA_DEVICE float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

GTA_DEVICE float logarithm_2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

GTA_DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rounded to the nearest number.
GTA_DEVICE float exact_reciprocal(float x) {
    float y;
    asm("rcp.rn.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

GTA_DEVICE float inverse_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

GTA_DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }

GTA_DEVICE u32 as_bits(float value) { return __float_as_uint(value); }

// To the nearest integer, to the even one of two; saturates.
GTA_DEVICE int nearest_integer(float x) {
    int y;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// Bytes 0 to 3 of a and 4 to 7 of b, chosen by the selector's four hex digits, the lowest first.
GTA_DEVICE u32 pick_bytes(u32 a, u32 b, u32 selector) {
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
    return result;
}

// Two floats rounded to a pair of 16-bit ones, `low` in the lower half.
GTA_DEVICE u32 pack_f16(float low, float high) {
    u32 result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

GTA_DEVICE u32 pack_bf16(float low, float high) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

GTA_DEVICE float unpack_f16(u16 bits) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
    return result;
}

// a b + c of pairs of 16-bit floats, rounded once.
GTA_DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
    u32 result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

GTA_DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

}  // namespace gta
