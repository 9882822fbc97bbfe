// What the rows of the cache have received of the attention, from the scores that the splits have written: the sum of
// weights that they are relative to is known only when all splits are combined.
#pragma once

#include "splits.cuh"

namespace gta {

// The largest score of a query row, 0 where it sees nothing, and the sum of its weights relative to that; of the
// `active` splits' results from `from` on. Every warp works it out for itself.
struct Total {
    float base, sum = 0.0f;

    GTA_DEVICE Total(const float* sums, i64 from, int active) {
        const int lane = lane_of_warp();
        float maximum = -infinity;
        for (int first = 0; first < active; first += warp_size) {
            maximum = max_of(maximum, sums[2 * (from + min_of(first + lane, active - 1))]);
        }
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) {
            maximum = max_of(maximum, shuffle_xor(maximum, mask));
        }
        base = maximum == -infinity ? 0.0f : maximum;
        for (int first = 0; first < active; first += warp_size) {
            const i64 split = from + min_of(first + lane, active - 1);
            const float part = power_of_2(sums[2 * split] - base) * sums[2 * split + 1];
            sum += first + lane < active ? part : 0.0f;
        }
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) {
            sum += shuffle_xor(sum, mask);
        }
    }
};

struct Observation {
    const float *sums, *scores;  // of the first kernel
    const float* query_weight;   // [B, T]
    const float* decay;          // [B]
    const i64* past_length;      // [B]
    const i64* token_positions;  // [B, T]; null where tokens follow on the cache's rows
    float* received;             // [B, S], updated in place
    int batch, tokens, capacity, splits;

    // A weight that is 1 up to what the approximations of powers and reciprocals lose counts as 1.
    static constexpr float enough = 1.0f - 0x1p-16f;

    // The work of one of `blocks` blocks; `totals` is shared memory, [T n_q, 2].
    GTA_DEVICE void run(float* totals, int block, int blocks) const {
        const int chunks = ceil_div(capacity, combine_threads);
        for (int i = block; i < batch * chunks; i += blocks) {
            const int batch_row = i / chunks, first = i % chunks * combine_threads;
            const int past = past_tokens(past_length, batch_row, capacity);
            const int present = present_tokens(past, tokens, capacity);
            if (first < present) {  // the whole block agrees
                load_totals(totals, batch_row, present);
                block_barrier();
                const int row = first + static_cast<int>(threadIdx.x);
                if (row < present) {
                    float* const place = received + i64{batch_row} * capacity + row;
                    *place = of_row(totals, batch_row, row, past, row < past ? *place : absent_received);
                }
                block_barrier();  // the next totals take these' place
            }
        }
    }

    // Of each query row, what its scores are relative to, and what their powers are multiplied by: 0 if that is all.
    GTA_DEVICE void load_totals(float* totals, int batch_row, int present) const {
        const int active = ceil_div(present, split_tokens(present, splits));
        for (int i = threadIdx.x / warp_size; i < tokens * query_heads; i += combine_threads / warp_size) {
            const float weight = query_weight[i64{batch_row} * tokens + i / query_heads];
            float base = 0.0f, factor = 0.0f;
            if (weight != 0.0f) {
                const Total total(sums, (i64{batch_row} * tokens * query_heads + i) * splits, active);
                base = total.base;
                factor = total.sum > 0.0f ? weight * reciprocal(total.sum) : 0.0f;
            }
            if (lane_of_warp() == 0) {
                totals[2 * i] = base;
                totals[2 * i + 1] = factor;
            }
        }
    }

    GTA_DEVICE float of_row(const float* totals, int batch_row, int row, int past, float before) const {
        const float* const own = scores + i64{batch_row} * tokens * query_heads * scores_pitch(capacity) + row;
        float result = observes_mass ? before * decay[batch_row] : before;
#pragma unroll 4
        for (int i = 0; i < tokens * query_heads; ++i) {
            const float factor = totals[2 * i + 1];
            if (factor != 0.0f) {
                const float weight = power_of_2(own[i * scores_pitch(capacity)] - totals[2 * i]) * factor;
                if constexpr (observes_mass) {
                    result += weight;
                } else if (weight >= enough) {
                    const int token = i / query_heads;
                    const i64 position = token_positions == nullptr
                                             ? i64{past} + token
                                             : token_positions[i64{batch_row} * tokens + token];
                    result = max_of(result, static_cast<float>(position));
                }
            }
        }
        return result;
    }
};

}  // namespace gta
