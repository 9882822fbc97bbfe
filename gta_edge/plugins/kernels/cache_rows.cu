// Rows of caches between two steps: copied, folded into others, their keys rotated. One launch serves all layers and
// tensors: a table has their addresses. A warp takes a row of all heads; no row is written that another warp reads.

#include "elements.cuh"

namespace gta {

constexpr int row_warps = GTA_ROW_WARPS;
constexpr int row_threads = warp_size * row_warps;
constexpr int lane_values = 8;  // of a row, in registers of each lane: element lane + 32 j
constexpr int max_width = warp_size * lane_values;
constexpr int parts = 3;  // of a layer: keys, latents, what rows have received

// One tensor [B, n, S, width] as the table has it, five numbers of 64 bits.
struct Part {
    i64 address;    // 0 if there is none
    i64 scales;     // float32 [B, n, S]; 0 if there are none
    i64 heads;      // n
    i64 row_bytes;  // of a row of one head
    i64 capacity;   // S

    // Where a head's row lies among all of the tensor's.
    GTA_DEVICE i64 place(int batch_row, int head, int row) const {
        return (batch_row * heads + head) * capacity + row;
    }
    GTA_DEVICE float* scale(i64 place) const { return reinterpret_cast<float*>(scales) + place; }
    GTA_DEVICE CacheElement* values(i64 place) const {
        return reinterpret_cast<CacheElement*>(address + place * row_bytes);
    }
    GTA_DEVICE int width() const { return static_cast<int>(row_bytes) / int{sizeof(CacheElement)}; }
};

// What stands in a line of moves, folds or rotations. A line that cannot be is passed over: memory is not trusted.
struct Line {
    int layer, batch_row, source, target;

    GTA_DEVICE Line(const int* lines, int i)
        : layer(lines[4 * i]), batch_row(lines[4 * i + 1]), source(lines[4 * i + 2]), target(lines[4 * i + 3]) {}

    GTA_DEVICE bool valid(int layers, int batch) const {
        return layer >= 0 && layer < layers && batch_row >= 0 && batch_row < batch;
    }
};

GTA_DEVICE bool holds(const Part& part, int row) { return row >= 0 && row < part.capacity; }

GTA_DEVICE float read_value(const CacheElement* from, [[maybe_unused]] float scale) {
    if constexpr (quantised) {
        return unpack_low(widen(*from)) * scale;
    } else {
        return unpack(*from);
    }
}

// Writes a row of which each lane has elements lane + 32 j; with 8 bits, the row's scale too.
GTA_DEVICE void write_row(const Part& part, i64 place, const float (&values)[lane_values]) {
    const int lane = lane_of_warp(), width = part.width();
    CacheElement* const row = part.values(place);
    if constexpr (quantised) {
        u32 largest = 0;  // bits of a magnitude: of NaN they are above infinity's
#pragma unroll
        for (int j = 0; j < lane_values; ++j) {
            const u32 bits = lane + warp_size * j < width ? as_bits(values[j]) & 0x7fffffffu : 0u;
            largest = bits > largest ? bits : largest;
        }
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) {
            const u32 other = as_bits(shuffle_xor(as_float(largest), mask));
            largest = other > largest ? other : largest;
        }
        const float scale = scale_of(as_float(largest)), inverse = reciprocal(scale);
        for (int j = 0; j < lane_values; ++j) {
            if (lane + warp_size * j < width) {
                row[lane + warp_size * j] = static_cast<CacheElement>(to_code(values[j] * inverse));
            }
        }
        if (lane == 0) {
            *part.scale(place) = scale;
        }
    } else {
        for (int j = 0; j < lane_values; ++j) {
            if (lane + warp_size * j < width) {
                row[lane + warp_size * j] = static_cast<CacheElement>(pack(values[j], 0.0f));
            }
        }
    }
}

template <class Unit>
GTA_DEVICE void copy_row(const Part& part, const Line& line) {
    const int units = static_cast<int>(part.row_bytes) / int{sizeof(Unit)};
    for (int i = lane_of_warp(); i < units * static_cast<int>(part.heads); i += warp_size) {
        const int head = i / units, unit = i % units;
        const i64 from = part.place(line.batch_row, head, line.source), to = part.place(line.batch_row, head, line.target);
        reinterpret_cast<Unit*>(part.address + to * part.row_bytes)[unit] =
            reinterpret_cast<const Unit*>(part.address + from * part.row_bytes)[unit];
    }
}

}  // namespace gta

// Copies rows: key, latent, their scales, and what they have received.
GTA_KERNEL(gta::row_threads)
gta_cache_move(const gta::i64* table,  // [L, 3, 5]
               const int* moves,       // [N, 4]: layer, sequence, source row, target row
               int count, int layers, int batch) {
    using namespace gta;
    const int i = blockIdx.x * row_warps + threadIdx.x / warp_size;
    if (i >= count) {
        return;
    }
    const Line line(moves, i);
    if (!line.valid(layers, batch)) {
        return;
    }
    const Part part = reinterpret_cast<const Part*>(table)[line.layer * parts + blockIdx.y];
    if (part.address == 0 || !holds(part, line.source) || !holds(part, line.target)) {
        return;
    }
    if (part.row_bytes % int{sizeof(Vector)} == 0) {
        copy_row<Vector>(part, line);
    } else {
        copy_row<u32>(part, line);
    }
    if (part.scales != 0) {
        for (int head = lane_of_warp(); head < part.heads; head += warp_size) {
            *part.scale(part.place(line.batch_row, head, line.target)) =
                *part.scale(part.place(line.batch_row, head, line.source));
        }
    }
}

// Makes each target the sum of weight times source over its folds; a warp for a target.
GTA_KERNEL(gta::row_threads)
gta_cache_fold(const gta::i64* table,  // [L, 3, 5]
               const int* folds,       // [F, 4]: layer, sequence, source row, target row, those of a target together
               const float* weights,   // [F]
               const int* starts,      // [N + 1]: where each target's folds begin
               int count, int layers, int batch) {
    using namespace gta;
    const int i = blockIdx.x * row_warps + threadIdx.x / warp_size;
    if (i >= count) {
        return;
    }
    const int begin = starts[i], end = starts[i + 1];
    const Line target(folds, begin);
    if (!target.valid(layers, batch)) {
        return;
    }
    const Part part = reinterpret_cast<const Part*>(table)[target.layer * parts + blockIdx.y];
    if (!holds(part, target.target) || part.width() > max_width) {
        return;
    }
    const int lane = lane_of_warp(), width = part.width();
    for (int head = 0; head < part.heads; ++head) {
        float sum[lane_values] = {};
        for (int fold = begin; fold < end; ++fold) {
            const int source = folds[4 * fold + 2];
            const float weight = weights[fold];
            if (!holds(part, source) || weight == 0.0f) {  // of a row that nothing stays of, not even NaN does
                continue;
            }
            const i64 place = part.place(target.batch_row, head, source);
            const float scale = quantised ? *part.scale(place) : 1.0f;
#pragma unroll
            for (int j = 0; j < lane_values; ++j) {
                if (lane + warp_size * j < width) {
                    sum[j] += weight * read_value(part.values(place) + lane + warp_size * j, scale);
                }
            }
        }
        warp_barrier();  // all have read the row, which may be written in its place
        write_row(part, part.place(target.batch_row, head, target.target), sum);
    }
}

// Rotates keys as if their positions were others.
GTA_KERNEL(gta::row_threads)
gta_cache_rotate(const gta::i64* table,  // [L, 3, 5]
                 const int* rows,        // [N, 4]: layer, sequence, row, and which angles
                 const float* cos,       // [A, d_k/2]
                 const float* sin, int count, int angles, int layers, int batch) {
    using namespace gta;
    const int i = blockIdx.x * row_warps + threadIdx.x / warp_size;
    if (i >= count) {
        return;
    }
    const Line line(rows, i);
    if (!line.valid(layers, batch) || line.target < 0 || line.target >= angles) {
        return;
    }
    const Part part = reinterpret_cast<const Part*>(table)[line.layer * parts];
    if (!holds(part, line.source) || part.width() > max_width) {
        return;
    }
    const int lane = lane_of_warp(), width = part.width(), half = width / 2;
    const i64 first_angle = i64{line.target} * half;
    for (int head = 0; head < part.heads; ++head) {
        const i64 place = part.place(line.batch_row, head, line.source);
        const CacheElement* const key = part.values(place);
        const float scale = quantised ? *part.scale(place) : 1.0f;
        float turned[lane_values] = {};
#pragma unroll
        for (int j = 0; j < lane_values; ++j) {
            const int own = lane + warp_size * j;
            if (own < width) {
                const int pair = own < half ? own : own - half;
                const float a = read_value(key + pair, scale), b = read_value(key + half + pair, scale);
                const float c = cos[first_angle + pair], s = sin[first_angle + pair];
                turned[j] = own < half ? a * c - b * s : b * c + a * s;
            }
        }
        warp_barrier();  // all have read the row, which is written in its place
        write_row(part, place, turned);
    }
}
