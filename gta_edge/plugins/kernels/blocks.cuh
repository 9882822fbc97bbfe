// A cache in blocks of 32 rows: keys in 4 bits, a scale and a minimum for each channel of a block; values (latents) in 4
// or 2 bits, a scale and a minimum for each row. gta_edge/numerics/cache_codes.py has the formulas.
//
//   key_cache     [B, n_k, S/32, d_k, 16 bytes]   a channel's 32 tokens, a unit
//   key_scale     fp16 [B, n_k, S/32, 2, d_k]     scales, minima
//   latent_cache  [B, n_c, S, d_l bits / 8 bytes] units of 32 or 64 channels
//   latent_scale  fp16 [B, n_c, S, 2]             scale, minimum
//   key_open, latent_open  [B, n, 32, d]          the latest rows in 16 bits, row r in place r % 32
//
// A unit is 8 words of 16 bits, the lowest first. Bits b n ... b n + b - 1 of word w are code 8 n + w: ldmatrix,
// transposed, gives a thread the words of its column of two channels (two tokens), and each n is the right operand of
// one matmul.
//
// Row s is read from its codes by the query of row p if s / 32 < p / 32, else in 16 bits. So what is read depends on
// rows alone, and not on how they came: a prompt at once, in parts and token by token give the same cache.
#pragma once

#include "tiles.cuh"

namespace gta {

constexpr int unit_values = 128 / value_bits;  // of a row: channels of 16 bytes
constexpr int key_codes_bytes = 16 * key_dim;  // of a block and head
constexpr int key_groups_bytes = 4 * key_dim;
constexpr int key_block_bytes = key_codes_bytes + key_groups_bytes;
constexpr int value_bytes = latent_dim * value_bits / 8;  // of a row and head
constexpr int value_pitch = pitch_of(value_bytes);
constexpr int value_block_bytes = block_tokens * (value_pitch + 4);  // rows, then their scales and minima
static_assert(in_blocks && latent_dim % unit_values == 0);

// --- codes as right operands -----------------------------------------------------------------------------------------

// Codes of so many bits as pairs of fp16. A logical instruction takes one constant beside registers, and there are two:
// the masks can be `kept` in registers, where these are not short.
template <int bits, bool kept>
struct Widen {
    static constexpr int fitting = 10 / bits;  // that a number's 10 bits have place for
    u32 masks[fitting];

    GTA_DEVICE Widen() {
#pragma unroll
        for (int i = 0; i < fitting; ++i) {
            const u32 mask = ((1u << bits) - 1) * 0x00010001u << bits * i;
            masks[i] = kept ? in_register(mask) : mask;
        }
    }

    // Codes n of two words, exactly: bits are set in a number whose last bit is worth 1 (at 1024), and what is too much
    // is taken off. Bits that are k places higher are worth 2^k as much.
    GTA_DEVICE u32 of(u32 words, int n) const {
        const int place = bits * (n % fitting);
        const u32 pair = (words >> (bits * n - place) & masks[n % fitting]) | 0x64006400u;
        const u32 less = static_cast<u32>(place) << 10;
        return fma_f16x2(pair, (0x3c00u - less) * 0x00010001u, (0xe400u - less) * 0x00010001u);
    }
};

template <bool kept>
struct Decoding {
    Widen<4, kept> keys;
    Widen<value_bits, kept> values;
};

// Rows of whole blocks in shared memory: of each key head, of each block, codes and then scales and minima; of each
// latent head, rows of codes, and then scales and minima of them all.
template <int count, class Decoding>
struct CodeTile {
    static constexpr int tokens = count;
    static constexpr int blocks = count / block_tokens;
    static_assert(count % block_tokens == 0);
    const Decoding& decoding;
    const u8 *key_blocks, *value_blocks;
    mutable u32 words[2], scales[2], minima[2];

    GTA_DEVICE CodeTile(const Decoding& decoding, const u8* keys, const u8* values)
        : decoding(decoding), key_blocks(keys), value_blocks(values) {}

    // Rows of the query's own block are not read here.
    GTA_DEVICE static bool hides(int row, int limit) { return row >= limit - limit % block_tokens; }

    // As of a CachedTile, asked in the order of the loops: what several operands are made of is kept.
    GTA_DEVICE void keys(u32 (&b)[2][2], int head, int block, int step) const {
        if (block % 2 == 0) {
            const u8* const codes = key_blocks + (head * blocks + block / 2) * key_block_bytes;
            const u8* const groups = codes + key_codes_bytes + 32 * step;
            const int lane = lane_of_warp();
            load_matrices_transposed(words, codes + 16 * (16 * step + lane % 16));
            load_matrices(scales, groups + lane / 8 % 2 * 16);  // all rows of a matrix are one
            load_matrices(minima, groups + 2 * key_dim + lane / 8 % 2 * 16);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                b[half][i] = fma_f16x2(decoding.keys.of(words[i], block % 2 * 2 + half), scales[i], minima[i]);
            }
        }
    }

    GTA_DEVICE const float* row_scales() const { return nullptr; }

    GTA_DEVICE void latents(u32 (&b)[2][2], int head, int step, int block) const {
        constexpr int unit_blocks = unit_values / 16;
        const u8* const rows = value_blocks + head * blocks * value_block_bytes;
        const int lane = lane_of_warp();
        if (block == 0) {
            struct alignas(8) Pair {
                u32 x[2];
            };
            const u8* const groups = rows + count * value_pitch + 64 * step + lane % 4 * 8;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const Pair pair = *reinterpret_cast<const Pair*>(groups + 32 * i);
                scales[i] = pick_bytes(pair.x[0], pair.x[1], 0x5410);
                minima[i] = pick_bytes(pair.x[0], pair.x[1], 0x7632);
            }
        }
        if (block % unit_blocks == 0) {
            load_matrices_transposed(words, rows + (16 * step + lane % 16) * value_pitch + block / unit_blocks * 16);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const u32 codes = decoding.values.of(words[i], block % unit_blocks * 2 + half);
                b[half][i] = fma_f16x2(codes, scales[i], minima[i]);
            }
        }
    }
};

// --- rows of 16 bits -------------------------------------------------------------------------------------------------

struct Blocks {  // addresses as above
    u8 *key_cache, *latent_cache;
    u16 *key_scale, *latent_scale;
};

// Rows that are not in codes yet: those of the open block, and those that are new.
struct RecentRows {
    const Element* key;     // [B, T, n_k d_k]
    const Element* latent;  // [B, T, n_c d_l]
    const Element* key_open;
    const Element* latent_open;
    const Element* cos;  // [P, d_k/2]
    const Element* sin;
    int tokens, positions, batch_row, past, present;

    // Elements 8 unit ... 8 unit + 7 of a row's key, and those d_k/2 further on; zeros past the last row.
    GTA_DEVICE void load_key(float (&low)[8], float (&high)[8], int head, int row, int unit) const {
        if (row < past) {
            const Element* from = key_open + ((i64{batch_row} * key_heads + head) * block_tokens +
                                              row % block_tokens) * key_dim + 8 * unit;
            unpack(low, load_vector(from));
            unpack(high, load_vector(from + key_dim / 2));
        } else if (row < present) {
            const i64 angles = table_row(row, positions);
            float exact_low[8], exact_high[8];
            rotate(exact_low, exact_high, new_key(head, row), cos + angles, sin + angles, unit);
            unpack(low, pack(exact_low));  // as it will be kept
            unpack(high, pack(exact_high));
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                low[j] = high[j] = 0.0f;
            }
        }
    }

    // Elements 8 unit ... 8 unit + 7 of a row's latent.
    GTA_DEVICE Vector load_latent(int head, int row, int unit) const {
        if (row >= present) {
            return Vector{};
        }
        const Element* const kept =
            latent_open + ((i64{batch_row} * latent_heads + head) * block_tokens + row % block_tokens) * latent_dim;
        return load_vector((row < past ? kept : new_latent(head, row)) + 8 * unit);
    }

    GTA_DEVICE const Element* new_key(int head, int row) const {
        return key + ((i64{batch_row} * tokens + row - past) * key_heads + head) * key_dim;
    }

    GTA_DEVICE const Element* new_latent(int head, int row) const {
        return latent + ((i64{batch_row} * tokens + row - past) * latent_heads + head) * latent_dim;
    }

    // Brings `count` rows of a key head from `first` on into shared memory, as fp16; the work of a block. Each
    // `slice_rows` of them begin `slice_bytes` further.
    template <int count, int threads, int slice_rows = count, int slice_bytes = 0>
    GTA_DEVICE void stage_keys(u8* tile, int head, int first) const {
        constexpr int units = key_dim / 16;
#pragma unroll 1
        for (int i = threadIdx.x; i < count * units; i += threads) {
            const int row = i / units, unit = i % units;
            u8* const to = tile + row / slice_rows * slice_bytes + row % slice_rows * key_pitch + 16 * unit;
            float low[8], high[8];
            load_key(low, high, head, first + row, unit);
            store_f16(to, low);
            store_f16(to + key_dim, high);
        }
    }

    template <int count, int threads, int slice_rows = count, int slice_bytes = 0>
    GTA_DEVICE void stage_latents(u8* tile, int head, int first) const {
        constexpr int units = latent_dim / 8;
#pragma unroll 2
        for (int i = threadIdx.x; i < count * units; i += threads) {
            const int row = i / units, unit = i % units;
            float values[8];
            unpack(values, load_latent(head, first + row, unit));
            store_f16(tile + row / slice_rows * slice_bytes + row % slice_rows * latent_pitch + 16 * unit, values);
        }
    }

    GTA_DEVICE static void store_f16(u8* to, const float (&values)[8]) {
        Vector vector;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            vector.word[i] = pack_f16(values[2 * i], values[2 * i + 1]);
        }
        *reinterpret_cast<Vector*>(to) = vector;
    }
};

// --- closing a block -------------------------------------------------------------------------------------------------

// Values that share a scale and a minimum, from the least and the largest of them.
template <int bits>
struct Group {
    static constexpr int levels = (1 << bits) - 1;
    u32 scale_and_minimum;  // fp16
    float inverse, minimum;

    GTA_DEVICE void set(float low, float high, bool has_nan) {
        const float step = (high - low) * (1.0f / (1 << bits));  // exact, as is half of it
        scale_and_minimum = pack_f16(step < 0x1p-24f ? 0x1p-24f : step, low + step * 0.5f);
        const bool finite = (scale_and_minimum & 0x7c00u) != 0x7c00u && (scale_and_minimum & 0x7c000000u) != 0x7c000000u;
        scale_and_minimum = finite && !has_nan ? scale_and_minimum : 0x7fff7fffu;
        inverse = finite && !has_nan ? exact_reciprocal(unpack_f16(static_cast<u16>(scale_and_minimum))) : 0.0f;
        minimum = finite && !has_nan ? unpack_f16(static_cast<u16>(scale_and_minimum >> 16)) : 0.0f;
    }

    GTA_DEVICE u32 code(float value) const {  // of NaN, 0
        const int nearest = nearest_integer((value - minimum) * inverse);
        return static_cast<u32>(nearest < 0 ? 0 : nearest > levels ? levels : nearest);
    }
};

struct Range {
    float low = infinity, high = -infinity;
    bool has_nan = false;

    GTA_DEVICE void take(float value) {
        low = value < low ? value : low;
        high = value > high ? value : high;
        has_nan = has_nan || value != value;
    }

    GTA_DEVICE void take_other(int lane_mask) {  // what another lane has
        const float other_low = shuffle_xor(low, lane_mask), other_high = shuffle_xor(high, lane_mask);
        low = other_low < low ? other_low : low;
        high = other_high > high ? other_high : high;
    }
};

constexpr int key_parts = ceil_div(key_dim / 16, 4);  // of the keys of a block and head: 64 channels, the work of a warp

// Writes the codes of one part of a block's keys, with their scales and minima: a lane has 16 channels of the four rows
// that are in one word of a unit.
GTA_DEVICE void close_keys(const Blocks& blocks, const RecentRows& rows, int head, int block, int part, int capacity) {
    const int lane = lane_of_warp(), unit = 4 * part + lane % 4, word = lane / 4;
    const bool active = unit < key_dim / 16;
    Range ranges[2][8];
    if (active) {
#pragma unroll 1
        for (int n = 0; n < 4; ++n) {
            float values[2][8];
            rows.load_key(values[0], values[1], head, block * block_tokens + 8 * n + word, unit);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                ranges[0][j].take(values[0][j]);
                ranges[1][j].take(values[1][j]);
            }
        }
    }
    Group<4> groups[2][8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            Range& range = ranges[half][j];
#pragma unroll
            for (int mask = 4; mask < warp_size; mask *= 2) {
                range.take_other(mask);
                range.has_nan = shuffle_xor(range.has_nan ? 1.0f : 0.0f, mask) != 0.0f || range.has_nan;
            }
            groups[half][j].set(range.low, range.high, range.has_nan);
        }
    }
    if (!active) {
        return;
    }
    u32 words[2][8] = {};
#pragma unroll 1
    for (int n = 0; n < 4; ++n) {
        float values[2][8];
        rows.load_key(values[0], values[1], head, block * block_tokens + 8 * n + word, unit);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            words[0][j] |= groups[0][j].code(values[0][j]) << 4 * n;
            words[1][j] |= groups[1][j].code(values[1][j]) << 4 * n;
        }
    }
    const i64 place = (i64{rows.batch_row} * key_heads + head) * (capacity / block_tokens) + block;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int channel = half * (key_dim / 2) + 8 * unit;
        u16* const codes = reinterpret_cast<u16*>(blocks.key_cache + place * key_codes_bytes) + 8 * channel + word;
        Vector scales, minima;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            codes[8 * j] = static_cast<u16>(words[half][j]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 a = groups[half][2 * j].scale_and_minimum, b = groups[half][2 * j + 1].scale_and_minimum;
            scales.word[j] = pick_bytes(a, b, 0x5410);
            minima.word[j] = pick_bytes(a, b, 0x7632);
        }
        if (word == 0) {
            u16* const to = blocks.key_scale + place * (2 * key_dim) + channel;
            *reinterpret_cast<Vector*>(to) = scales;
            *reinterpret_cast<Vector*>(to + key_dim) = minima;
        }
    }
}

// Likewise of one row's values: a lane has 8 channels, which are the same bits of all words of a unit.
GTA_DEVICE void close_values(const Blocks& blocks, const RecentRows& rows, int head, int row, int capacity) {
    constexpr int unit_lanes = unit_values / 8;
    const int lane = lane_of_warp();
    const bool active = lane < latent_dim / 8;
    float values[8];
    Range range;
    if (active) {
        unpack(values, rows.load_latent(head, row, lane));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            range.take(values[j]);
        }
    }
#pragma unroll
    for (int mask = 1; mask < warp_size; mask *= 2) {
        range.take_other(mask);
    }
    Group<value_bits> group;
    group.set(range.low, range.high, any_of_warp(range.has_nan));
    u32 words[4] = {};
    if (active) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            words[j / 2] |= group.code(values[j]) << (value_bits * (lane % unit_lanes) + j % 2 * 16);
        }
    }
#pragma unroll
    for (int mask = 1; mask < unit_lanes; mask *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            words[i] |= as_bits(shuffle_xor(as_float(words[i]), mask));
        }
    }
    const i64 place = (i64{rows.batch_row} * latent_heads + head) * capacity + row;
    if (lane == 0) {
        *reinterpret_cast<u32*>(blocks.latent_scale + 2 * place) = group.scale_and_minimum;
    }
    if (active && lane % unit_lanes == 0) {
        *reinterpret_cast<Vector*>(blocks.latent_cache + place * value_bytes + lane / unit_lanes * 16) =
            Vector{{words[0], words[1], words[2], words[3]}};
    }
}

// Writes the codes of a block whose last row is new, of some heads; the work of `warps` warps, of which this is `warp`.
GTA_DEVICE void close_block(const Blocks& blocks, const RecentRows& rows, int first_key, int keys, int first_latent,
                            int latents, int block, int capacity, int warp, int warps) {
#pragma unroll 1
    for (int i = warp; i < keys * key_parts; i += warps) {
        close_keys(blocks, rows, first_key + i / key_parts, block, i % key_parts, capacity);
    }
#pragma unroll 1
    for (int i = warp; i < latents * block_tokens; i += warps) {
        close_values(blocks, rows, first_latent + i / block_tokens, block * block_tokens + i % block_tokens, capacity);
    }
}

// Copies the codes of a head's blocks from `first` to `end` into a CodeTile's memory; zeros past the end.
template <int blocks, int threads>
GTA_DEVICE void copy_key_blocks(u8* to, const u8* codes, const u16* groups, int first, int end, int thread) {
    copy_rows<key_codes_bytes, key_block_bytes, blocks, threads>(to, codes, first, end, thread);
    copy_rows<key_groups_bytes, key_block_bytes, blocks, threads>(to + key_codes_bytes, groups, first, end, thread);
}

template <int blocks, int threads>
GTA_DEVICE void copy_value_blocks(u8* to, const u8* codes, const u16* groups, int first, int end, int thread) {
    constexpr int rows = blocks * block_tokens;
    copy_rows<value_bytes, value_pitch, rows, threads>(to, codes, first * block_tokens, end * block_tokens, thread);
    copy_rows<4 * block_tokens, 4 * block_tokens, blocks, threads>(to + rows * value_pitch, groups, first, end, thread);
}

// Writes a new row's key or latent to its place in the open block; the work of a warp, heads of keys counted first.
GTA_DEVICE void append_open(Element* key_open, Element* latent_open, const RecentRows& rows, int head, int row) {
    if (head < key_heads) {
        const i64 place = (i64{rows.batch_row} * key_heads + head) * block_tokens + row % block_tokens;
        const i64 angles = table_row(row, rows.positions);
        append_key(key_open + place * key_dim, nullptr, rows.new_key(head, row), rows.cos + angles, rows.sin + angles);
    } else {
        const i64 place = (i64{rows.batch_row} * latent_heads + head - key_heads) * block_tokens + row % block_tokens;
        append_latent(latent_open + place * latent_dim, nullptr, rows.new_latent(head - key_heads, row));
    }
}

// The same of all `tokens` new rows of `rows / tokens` sequences; the work of `warps` warps, this one's `warp`.
GTA_DEVICE void append_open_rows(const Element* key, const Element* latent, Element* key_open, Element* latent_open,
                                 const i64* past_length, const Element* cos, const Element* sin, int rows, int tokens,
                                 int capacity, int positions, int warp, int warps) {
    constexpr int heads = key_heads + latent_heads;
    for (int i = warp; i < rows * heads; i += warps) {
        const int batch_row = i / heads / tokens, token = i / heads % tokens;
        const int past = past_tokens(past_length, batch_row, capacity);
        const int present = present_tokens(past, tokens, capacity);
        const RecentRows recent{key, latent, key_open, latent_open, cos, sin, tokens, positions, batch_row, past, present};
        if (past + token < present) {
            append_open(key_open, latent_open, recent, i % heads, past + token);
        }
    }
}

}  // namespace gta
