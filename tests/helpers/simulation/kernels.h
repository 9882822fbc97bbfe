// What the driver knows of the kernels that it is linked with.
#pragma once

struct Argument {
    enum Kind : long long { null, pointer, int32, int64, float32, words };
    long long kind;
    union {
        void* address;
        int i32;
        long long i64;
        float f32;
    };
};

struct Kernel {
    const char* name;
    const char* kinds;  // one letter a parameter: p(ointer), i(nt32), l(ong, 64 bits), f(loat32)
    void (*call)(const Argument* arguments);
};

extern const Kernel kernels[];
extern const int kernel_count;
