// What the driver's two sources share.
#pragma once

// The operands of a warp's matrix product, and its result in place of c, each lane's registers in a row.
struct Fragments {
    unsigned int a[32][4], b[32][2];
    float c[32][4];
};

void mma_fragments_f16(Fragments& lanes);
void mma_fragments_bf16(Fragments& lanes);

// Ends the process with a message about the thread that runs.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));
