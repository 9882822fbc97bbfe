// The output: what the gate, where the model has one, lets through of a query head's values.
#pragma once

#include "sizes.cuh"

namespace gta {

GTA_DEVICE float opening(float gate) { return reciprocal(1.0f + power_of_2(-log2_e * gate)); }

GTA_DEVICE void write_output(Element* output, const Element* gate, i64 place, float value) {
    if constexpr (has_gate) {
        value *= opening(unpack(gate[place]));
    }
    output[place] = static_cast<Element>(pack(value, 0.0f));
}

// Two that are side by side, the first in an even place.
GTA_DEVICE void write_outputs(Element* output, const Element* gate, i64 place, float low, float high) {
    if constexpr (has_gate) {
        const u32 gates = *reinterpret_cast<const u32*>(gate + place);
        low *= opening(unpack_low(gates));
        high *= opening(unpack_high(gates));
    }
    *reinterpret_cast<u32*>(output + place) = pack(low, high);
}

}  // namespace gta
