// The arithmetic of the primitives (PTX ISA), in integers and in doubles that hold every intermediate result.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "arithmetic.h"
#include "primitives.cuh"

namespace {

constexpr gta::u16 not_a_number = 0x7fff;  // the only NaN that conversions and fma give, in both formats

struct Format {
    int precision;  // bits of the significand, the hidden one included
    int least_exponent;
    gta::u16 infinity;
};

constexpr Format f16{11, -14, 0x7c00}, bf16{8, -126, 0x7f80};

uint64_t bits_of(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, 8);
    return bits;
}

// The nearest number of the format, of two the even one.
gta::u16 rounded(double value, const Format& format) {
    if (std::isnan(value)) return not_a_number;
    const uint64_t bits = bits_of(value);
    const auto sign = static_cast<gta::u16>(bits >> 48 & 0x8000);
    const int exponent = static_cast<int>(bits >> 52 & 0x7ff) - 1023;
    if (exponent == 1024) return sign | format.infinity;
    if (exponent == -1023) return sign;  // no sum or product of 16-bit numbers, and no float, is a subnormal double
    const uint64_t significand = (bits & ((1ull << 52) - 1)) | 1ull << 52;
    const int below = exponent < format.least_exponent ? format.least_exponent - exponent : 0;
    const int dropped = 53 - format.precision + below;
    if (dropped > 53) return sign;  // less than half of the least number
    uint64_t quotient = significand >> dropped;
    const uint64_t rest = significand & ((1ull << dropped) - 1), half = 1ull << (dropped - 1);
    if (rest > half || (rest == half && (quotient & 1))) ++quotient;
    // The quotient's hidden bit raises the exponent's field by the one that tells normal numbers from subnormal ones.
    if (!below) quotient += static_cast<uint64_t>(exponent - format.least_exponent) << (format.precision - 1);
    return sign | static_cast<gta::u16>(quotient < format.infinity ? quotient : format.infinity);
}

// Of the finite numbers between two doubles, the one with an odd last bit: what is rounded again to fewer bits is then
// rounded as the sum itself would be.
double sum_to_odd(double a, double b) {
    const double sum = a + b;
    if (!std::isfinite(sum)) return sum;
    const double b_part = sum - a;
    const double error = (a - (sum - b_part)) + (b - b_part);
    uint64_t bits = bits_of(sum);
    if (error == 0 || (bits & 1)) return sum;
    bits += (error > 0) == (sum > 0) ? 1 : -1;
    double odd;
    std::memcpy(&odd, &bits, 8);
    return odd;
}

inline float float_of_f16(gta::u32 bits) {
    const gta::u32 sign = (bits & 0x8000) << 16, shifted = (bits & 0x7fff) << 13;
    const float subnormal = gta::as_float(shifted + 0x38800000) - gta::as_float(0x38800000);
    const gta::u32 normal = shifted + 0x38000000 + (shifted >= 0x0f800000 ? 0x38000000 : 0);
    return gta::as_float(sign | (shifted < 0x00800000 ? gta::as_bits(subnormal) : normal));
}

inline float float_of_bf16(gta::u32 bits) { return gta::as_float(bits << 16); }

template <float (*widen)(gta::u32)>
gta::u32 fma_pair(gta::u32 a, gta::u32 b, gta::u32 c, const Format& format) {
    gta::u32 result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const auto half = [&](gta::u32 pair) { return static_cast<double>(widen(pair >> shift & 0xffff)); };
        result |= static_cast<gta::u32>(rounded(sum_to_odd(half(a) * half(b), half(c)), format)) << shift;
    }
    return result;
}

template <float (*widen)(gta::u32)>
void mma(Fragments& lanes) {
    alignas(16) gta::u32 bits[24][16];  // the rows of a, then the columns of b
    alignas(16) float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, p = lane % 4 * 2;
        const auto put = [](gta::u32* place, gta::u32 pair) { place[0] = pair & 0xffff, place[1] = pair >> 16; };
        for (int i = 0; i < 4; ++i) put(&bits[g + i % 2 * 8][p + i / 2 * 8], lanes.a[lane][i]);
        for (int i = 0; i < 2; ++i) put(&bits[16 + g][p + i * 8], lanes.b[lane][i]);
        for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][p + i % 2] = lanes.c[lane][i];
    }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k) a[row][k] = widen(bits[row][k]);
    for (int column = 0; column < 8; ++column) {
        float values[16];
        for (int k = 0; k < 16; ++k) values[k] = widen(bits[16 + column][k]);
        for (int k = 0; k < 16; ++k) b[k][column] = values[k];
    }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) lanes.c[lane][i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

}  // namespace

void mma_fragments_f16(Fragments& lanes) { mma<float_of_f16>(lanes); }

void mma_fragments_bf16(Fragments& lanes) { mma<float_of_bf16>(lanes); }

namespace gta {

float power_of_2(float x) {
    constexpr float least = std::numeric_limits<float>::min();
    const float y = std::exp2(std::fabs(x) < least ? 0.0f : x);
    return y < least ? 0.0f : y;
}

float logarithm_2(float x) { return std::log2(x); }

float reciprocal(float x) { return 1.0f / x; }

float inverse_root(float x) { return 1.0f / std::sqrt(x); }

int nearest_integer(float x) {
    if (std::isnan(x)) return 0;
    if (x >= 0x1p31f) return std::numeric_limits<int>::max();
    if (x < -0x1p31f) return std::numeric_limits<int>::min();
    return static_cast<int>(std::nearbyint(x));
}

u32 pick_bytes(u32 a, u32 b, u32 selector) {
    if (selector & 0x8888) fault("pick_bytes(..., 0x%04x): the copies of a byte's sign are not simulated", selector);
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<u32>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

u32 pack_f16(float low, float high) { return rounded(low, f16) | static_cast<u32>(rounded(high, f16)) << 16; }

u32 pack_bf16(float low, float high) { return rounded(low, bf16) | static_cast<u32>(rounded(high, bf16)) << 16; }

float unpack_f16(u16 bits) { return float_of_f16(bits); }

u32 fma_f16x2(u32 a, u32 b, u32 c) { return fma_pair<float_of_f16>(a, b, c, f16); }

u32 fma_bf16x2(u32 a, u32 b, u32 c) { return fma_pair<float_of_bf16>(a, b, c, bf16); }

}  // namespace gta
