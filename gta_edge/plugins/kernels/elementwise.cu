// What a decoder layer does between its matmuls: the residual's addition with the RMSNorm after it, and SiLU(gate) * up.
//
// Sums of squares are float32. What torch's own operations round to 16 bits on the way is rounded here too.

#include "numbers.cuh"

namespace gta {

constexpr int max_threads = GTA_ELEMENTWISE_THREADS;
constexpr int vector_elements = 8;

GTA_DEVICE Vector read(const Element* from) { return *reinterpret_cast<const Vector*>(from); }
GTA_DEVICE void write(Element* to, const Vector& values) { *reinterpret_cast<Vector*>(to) = values; }

// The sum over the block's threads, in the same order for all of them.
GTA_DEVICE float sum_of_block(float value) {
#pragma unroll
    for (int mask = warp_size / 2; mask; mask /= 2) {
        value += shuffle_xor(value, mask);
    }
    float* sums = reinterpret_cast<float*>(shared_memory());
    if (lane_of_warp() == 0) {
        sums[threadIdx.x / warp_size] = value;
    }
    block_barrier();
    float sum = 0.0f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / warp_size; ++warp) {
        sum += sums[warp];
    }
    return sum;
}

GTA_DEVICE float silu(float x) { return x * reciprocal(1.0f + power_of_2(x * -1.4426950408889634f)); }

}  // namespace gta

using namespace gta;

// sum = x + addend, normed = sum / sqrt(mean of sum^2 + epsilon) * weight, a row for each block. Without an addend the
// sum is x, and is not written.
GTA_KERNEL(gta::max_threads)
gta_add_norm(const Element* x, const Element* addend, const Element* weight, Element* sum, Element* normed, int width,
             float epsilon) {
    const int first = vector_elements * static_cast<int>(threadIdx.x);
    const i64 place = i64{blockIdx.x} * width + first;
    const bool used = first < width;
    Vector values{}, factors{};
    float squares = 0.0f;
    if (used) {
        values = read(x + place);
        factors = read(weight + first);
        if (addend != nullptr) {
            const Vector more = read(addend + place);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                values.word[i] = pack(unpack_low(values.word[i]) + unpack_low(more.word[i]),
                                      unpack_high(values.word[i]) + unpack_high(more.word[i]));
            }
            write(sum + place, values);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float low = unpack_low(values.word[i]), high = unpack_high(values.word[i]);
            squares += low * low + high * high;
        }
    }
    const float inverse = inverse_root(sum_of_block(squares) / static_cast<float>(width) + epsilon);
    if (used) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values.word[i] = pack(unpack_low(values.word[i]) * inverse * unpack_low(factors.word[i]),
                                  unpack_high(values.word[i]) * inverse * unpack_high(factors.word[i]));
        }
        write(normed + place, values);
    }
}

// output = SiLU(gate) * up.
GTA_KERNEL(gta::max_threads)
gta_silu_multiply(const Element* gate, const Element* up, Element* output, int vectors) {
    const int vector = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (vector >= vectors) {
        return;
    }
    const i64 place = i64{vector} * vector_elements;
    Vector values = read(gate + place);
    const Vector factors = read(up + place);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 rounded = pack(silu(unpack_low(values.word[i])), silu(unpack_high(values.word[i])));
        values.word[i] = pack(unpack_low(rounded) * unpack_low(factors.word[i]),
                              unpack_high(rounded) * unpack_high(factors.word[i]));
    }
    write(output + place, values);
}
