// Runs the launches of a job: one block at a time, every thread of the block a fiber of this one OS thread.
//
// A GPU promises little about order, so that little is all a kernel gets here. At every barrier and every operation of
// a warp, a seeded generator says which thread goes on: each with the same chance, or one warp as far as it comes
// before the next one. Blocks run in any order. An asynchronous copy happens at once or when it is waited for, or in
// between. Shared memory starts as garbage. A kernel that lacks a barrier or a wait is then wrong for most seeds.
//
// Besides, every access to shared memory is compared with the latest ones to the same bytes: two of different threads,
// one of them a write, with no barrier of the block or of their warp in between, are a fault even where the result
// happens to be right (unless a caller wants to see the results of such a kernel). A shuffle, a vote, ldmatrix and mma
// wait for the whole warp, but order no memory accesses. That a thread reads and writes the same place in one statement
// may count as the reading alone (see simulator.py).
//
// This file is compiled without sanitizers; the kernels are compiled with them. What it reads and writes for a kernel
// it therefore checks itself.
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "arithmetic.h"
#include "kernels.h"
#include "primitives.cuh"

SimulationIndex threadIdx, blockIdx, blockDim, gridDim;

namespace {

using gta::u32;
using gta::u8;

constexpr int warp_size = 32, max_threads = 1024;
constexpr size_t stack_bytes = 128 << 10, guard_bytes = 64 << 10;  // whole pages also where these have 64 KiB

enum class Operation {
    none, block_barrier, warp_barrier, shuffle, vote, load_4, load_4_t, load_2, load_2_t, f16, bf16
};
const char* const names[] = {
    "nothing",         "block_barrier",
    "warp_barrier",    "shuffle_xor",
    "any_of_warp",     "load_matrices (four)",
    "load_matrices_transposed (four)", "load_matrices (two)",
    "load_matrices_transposed (two)",  "mma_f16",
    "mma_bf16",
};

struct Copy {
    void* shared;
    const void* global;
    int bytes;
    bool valid, done;
    long group;
};

struct Fiber {
    void* resume[5];  // of __builtin_setjmp
    u8* stack = nullptr;
    void* fake_stack = nullptr;
    bool started = false, exited = false;
    Operation waits = Operation::none;
    int line = 0;
    long committed = 0;  // groups of copies
    std::vector<Copy> copies;
};

struct Warp {
    Operation operation;
    int line;
    u32 arrived, at_block_barrier, exited;  // a bit a lane
    u32 words[warp_size];                   // what the lanes bring to a shuffle or a vote
    int masks[warp_size];
    alignas(16) u8 rows[warp_size][16];     // ... to ldmatrix
    u32 results[warp_size][4];
    Fragments fragments;
};

Fiber fibers[max_threads];
Warp warps[max_threads / warp_size];
u32 runnable[max_threads / warp_size];  // a bit a lane
u32 runnable_warps;                     // a bit a warp

int threads, current = -1, waiting_at_barrier, exited;
u8* shared_begin;
size_t shared_bytes;

void* main_resume[5];
const void* main_stack;
size_t main_stack_bytes;

const Kernel* kernel;
const Argument* arguments;

// --- chance ----------------------------------------------------------------------------------------------------------

uint64_t state;

u32 random_bits() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return static_cast<u32>(z >> 32);
}

u32 random_below(u32 n) { return static_cast<u32>(static_cast<uint64_t>(random_bits()) * n >> 32); }

u32 random_bit_of(u32 set, u32 bits) {
    const u32 turn = bits & 31;
    const u32 turned = set >> turn | set << ((32 - turn) & 31);
    return (turn + static_cast<u32>(__builtin_ctz(turned))) & 31;
}

// How a block is run, drawn once a block.
bool by_priority;
u8 priorities[max_threads / warp_size];  // the warps in the order in which they go on, if by priority
u32 eager_copies;                        // how many of 256 happen at once

int next_thread() {
    const u32 bits = random_bits();
    if (!runnable_warps) fault("no thread can go on");  // the checks at the barriers should have told why
    u32 warp;
    if (by_priority) {
        const int count = threads / warp_size;
        if (bits >> 24 == 0) std::swap(priorities[0], priorities[random_below(static_cast<u32>(count))]);
        int i = 0;
        while (!(runnable_warps >> priorities[i] & 1)) ++i;
        warp = priorities[i];
    } else {
        warp = random_bit_of(runnable_warps, bits >> 8);
    }
    const u32 lane = random_bit_of(runnable[warp], bits);
    runnable[warp] &= ~(1u << lane);
    if (!runnable[warp]) runnable_warps &= ~(1u << warp);
    return static_cast<int>(warp * warp_size + lane);
}

void make_runnable(int warp, u32 lanes) {
    runnable[warp] |= lanes;
    runnable_warps |= 1u << warp;
}

// --- fibers ----------------------------------------------------------------------------------------------------------
// Contexts start a fiber; after that __builtin_setjmp and __builtin_longjmp switch, since swapcontext asks the kernel
// for the signal mask each time, and the C library's longjmp makes AddressSanitizer forget what it knows of the stack.

void run_thread();

void allocate_stack(Fiber& fiber) {
    const size_t size = stack_bytes + guard_bytes;
    void* memory = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fault("no memory for the threads' stacks");
    fiber.stack = static_cast<u8*>(memory) + guard_bytes;  // stacks grow down, into the guard
    if (mprotect(fiber.stack, stack_bytes, PROT_READ | PROT_WRITE)) fault("no memory for the threads' stacks");
}

[[noreturn, gnu::noinline]] void start(Fiber& fiber) {
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = stack_bytes;
    context.uc_link = nullptr;
    makecontext(&context, run_thread, 0);
    setcontext(&context);
    abort();
}

[[noreturn, gnu::noinline]] void jump(void** to) { __builtin_longjmp(to, 1); }

[[noreturn, gnu::noinline]] void enter(int thread, void** fake_stack) {
    Fiber& fiber = fibers[thread];
    __sanitizer_start_switch_fiber(fake_stack, fiber.stack, stack_bytes);
    current = thread;
    threadIdx.x = static_cast<u32>(thread);
    if (fiber.started) jump(fiber.resume);
    fiber.started = true;
    start(fiber);
}

[[noreturn, gnu::noinline]] void enter_main(Fiber& from) {
    __sanitizer_start_switch_fiber(&from.fake_stack, main_stack, main_stack_bytes);
    jump(main_resume);
}

// Lets another thread go on; returns when the scheduler chooses this one again.
[[gnu::noinline]] void park() {
    const int next = next_thread();
    if (next == current) return;
    if (__builtin_setjmp(fibers[current].resume) == 0) enter(next, &fibers[current].fake_stack);
    __sanitizer_finish_switch_fiber(fibers[current].fake_stack, nullptr, nullptr);
}

// The same of a thread that has ended; returns when a next block begins.
[[gnu::noinline]] void park_ended() {
    Fiber& fiber = fibers[current];
    if (__builtin_setjmp(fiber.resume) == 0) {
        if (exited == threads) enter_main(fiber);
        enter(next_thread(), &fiber.fake_stack);
    }
    __sanitizer_finish_switch_fiber(fibers[current].fake_stack, nullptr, nullptr);
}

[[gnu::noinline]] void run_block() {
    static void* fake_stack;
    if (__builtin_setjmp(main_resume) == 0) enter(next_thread(), &fake_stack);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// --- what waits ------------------------------------------------------------------------------------------------------

int lane_of(int thread) { return thread % warp_size; }

int warp_of(int thread) { return thread / warp_size; }

const char* describe(Operation operation) { return names[static_cast<int>(operation)]; }

// A fault that two threads have part in: the one that runs and another.
[[noreturn]] void fault_together(const char* what, int other) {
    const Fiber& fiber = fibers[other];
    if (fiber.exited) fault("%s, but thread %d has exited", what, other);
    fault("%s, but thread %d waits at %s (line %d)", what, other, describe(fiber.waits), fiber.line);
}

int first_of(int warp, u32 lanes) { return warp * warp_size + __builtin_ctz(lanes); }

std::string here(Operation operation, int line) {
    return std::string("this thread is at ") + describe(operation) + " (line " + std::to_string(line) + ")";
}

void begin_wait(Operation operation, int line) {
    fibers[current].waits = operation;
    fibers[current].line = line;
}

// Whether the operation must be the same instruction in all lanes (".aligned").
bool is_aligned(Operation operation) { return operation >= Operation::load_4; }

// Comes back when all lanes have come and `complete` has been called once.
template <typename Complete>
void wait_for_warp(Operation operation, int line, const Complete& complete) {
    const int index = warp_of(current);
    Warp& warp = warps[index];
    begin_wait(operation, line);
    if (const u32 others = warp.at_block_barrier | warp.exited)
        fault_together(here(operation, line).c_str(), first_of(index, others));
    if (!warp.arrived) {
        warp.operation = operation;
        warp.line = line;
    } else if (warp.operation != operation || (warp.line != line && is_aligned(operation))) {
        fault_together(here(operation, line).c_str(), first_of(index, warp.arrived));
    }
    warp.arrived |= 1u << lane_of(current);
    if (warp.arrived == ~0u) {
        complete(warp);
        warp.arrived = 0;
        make_runnable(index, ~0u);
    }
    park();
    fibers[current].waits = Operation::none;
}

Warp& own_warp() { return warps[warp_of(current)]; }

void exit_thread() {
    const int index = warp_of(current);
    Warp& warp = warps[index];
    fibers[current].exited = true;
    if (warp.arrived) fault_together("this thread exits", first_of(index, warp.arrived));
    if (waiting_at_barrier)
        for (int i = 0; i < threads / warp_size; ++i)
            if (warps[i].at_block_barrier) fault_together("this thread exits", first_of(i, warps[i].at_block_barrier));
    warp.exited |= 1u << lane_of(current);
    ++exited;
}

void run_thread() {
    const void* stack;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
    if (!main_stack) {  // the first thread of all is entered from there
        main_stack = stack;
        main_stack_bytes = size;
    }
    for (;;) {
        kernel->call(arguments);
        exit_thread();
        park_ended();
    }
}

// --- races -----------------------------------------------------------------------------------------------------------
// AddressSanitizer calls a function before each access of a kernel; the linker puts those at the end of this file in
// the place of its own.

constexpr gta::u16 nobody = 0xffff;

struct Access {
    u32 warp_epoch;
    gta::u16 thread;
    void* place;  // in the program
};

// The latest accesses to a byte of shared memory. Epochs end at barriers, and with the block, so nothing is reset.
struct Byte {
    u32 write_epoch, read_epoch;
    u32 awaited;  // the block in which an asynchronous copy to this byte is not waited for
    Access write;
    Access reads[2];  // enough that whoever writes next is concurrent with one of them if with any
};

bool races_are_faults;
std::vector<Byte> history;
u32 epoch, warp_epochs[max_threads / warp_size], block_count;

// Whether no barrier is between the access, of this epoch of the block, and this moment.
bool is_concurrent(const Access& access) {
    if (access.thread == current || access.thread == nobody) return false;
    return warp_of(access.thread) != warp_of(current) || access.warp_epoch == warp_epochs[warp_of(current)];
}

[[noreturn]] void fault_of_race(bool is_write, const Byte& byte, const char* other, const Access& access) {
    char place[512] = "";
    __sanitizer_symbolize_pc(access.place, "%S", place, sizeof(place));
    fault("race: this thread %s byte %td of shared memory; thread %d %s (%s)", is_write ? "writes" : "reads",
          &byte - history.data(), access.thread, other, place);
}

void note_read(Byte& byte, const Access& access) {
    Access& first = byte.reads[0];
    Access& second = byte.reads[1];
    const int warp = warp_of(access.thread);
    if (byte.read_epoch != epoch) {
        byte.read_epoch = epoch;
        first = access;
        second.thread = nobody;
    } else if (warp_of(first.thread) != warp) {
        if (second.thread == nobody || warp_of(second.thread) != warp) second = access;
    } else if (first.thread == access.thread || first.warp_epoch != access.warp_epoch) {
        first = access;
    } else if (second.thread == nobody || second.thread == access.thread ||
               (warp_of(second.thread) == warp && second.warp_epoch != access.warp_epoch)) {
        second = access;
    }
}

void note_access(const void* pointer, size_t bytes, bool is_write, void* place) {
    const auto offset = reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(shared_begin);
    if (!races_are_faults || offset >= shared_bytes || bytes > shared_bytes - offset) return;
    const Access access{warp_epochs[warp_of(current)], static_cast<gta::u16>(current), place};
    for (Byte *byte = &history[offset], *end = byte + bytes; byte != end; ++byte) {
        if (byte->awaited == block_count)
            fault_of_race(is_write, *byte, "copies to there and has not waited for that", byte->write);
        if (byte->write_epoch == epoch && is_concurrent(byte->write))
            fault_of_race(is_write, *byte, "wrote it, with no barrier since", byte->write);
        if (!is_write) {
            note_read(*byte, access);
            continue;
        }
        if (byte->read_epoch == epoch)
            for (const Access& read : byte->reads)
                if (is_concurrent(read)) fault_of_race(is_write, *byte, "read it, with no barrier since", read);
        byte->write_epoch = epoch;
        byte->write = access;
    }
}

void note_copy_begins(const Copy& copy, void* place) {
    note_access(copy.shared, static_cast<size_t>(copy.bytes), true, place);
    Byte* byte = &history[static_cast<size_t>(static_cast<u8*>(copy.shared) - shared_begin)];
    for (int i = 0; i < copy.bytes; ++i) byte[i].awaited = block_count;
}

void note_copy_ends(const Copy& copy) {
    Byte* byte = &history[static_cast<size_t>(static_cast<u8*>(copy.shared) - shared_begin)];
    for (int i = 0; i < copy.bytes; ++i) byte[i].awaited = 0;
    note_access(copy.shared, static_cast<size_t>(copy.bytes), true, byte->write.place);
}

// --- shared memory and asynchronous copies ---------------------------------------------------------------------------

bool in_shared_memory(const void* pointer, size_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(pointer), begin = reinterpret_cast<uintptr_t>(shared_begin);
    return address >= begin && address - begin <= shared_bytes && bytes <= shared_bytes - (address - begin);
}

std::string describe_shared(const void* pointer) {
    const auto offset = static_cast<const u8*>(pointer) - shared_begin;
    return "byte " + std::to_string(offset) + " of " + std::to_string(shared_bytes) + " bytes of shared memory";
}

void check_shared(const char* what, const void* pointer, size_t bytes) {
    if (!in_shared_memory(pointer, bytes))
        fault("%s: %zu bytes from %s", what, bytes, describe_shared(pointer).c_str());
    if (reinterpret_cast<uintptr_t>(pointer) % bytes)
        fault("%s: misaligned address, %s", what, describe_shared(pointer).c_str());
}

void perform(Copy& copy) {
    if (copy.done) return;
    copy.done = true;
    if (!copy.valid) {
        std::memset(copy.shared, 0, static_cast<size_t>(copy.bytes));
    } else if (copy.bytes == 16) {
        std::memcpy(copy.shared, copy.global, 16);
    } else {
        std::memcpy(copy.shared, copy.global, 4);
    }
}

long long copied_bytes = 0;  // by asynchronous copies, from global memory

void copy_async(const char* name, void* shared, const void* global, int bytes, bool valid, void* place) {
    const auto size = static_cast<size_t>(bytes);
    check_shared(name, shared, size);
    if (reinterpret_cast<uintptr_t>(global) % size) fault("%s: misaligned source %p", name, global);
    if (valid) {
        copied_bytes += bytes;
        if (in_shared_memory(global, 1)) fault("%s: the source is in shared memory", name);
        const auto* stack = fibers[current].stack;
        if (global >= stack && global < stack + stack_bytes) fault("%s: the source is a local variable", name);
        // Names the buffer that the source is beside.
        if (void* bad = __asan_region_is_poisoned(const_cast<void*>(global), size)) {
            void* frame = __builtin_frame_address(0);
            __asan_report_error(__builtin_return_address(0), frame, frame, bad, 0, size);
        }
        static_cast<void>(*static_cast<const volatile u8*>(global));  // of no buffer at all: better here than later
    }
    Fiber& fiber = fibers[current];
    Copy copy{shared, global, bytes, valid, false, fiber.committed};
    if (races_are_faults) note_copy_begins(copy, place);
    const u32 bits = random_bits();
    if ((bits & 0xff) < eager_copies) perform(copy);
    fiber.copies.push_back(copy);
    if (bits >> 28 == 0) {  // one in 16
        make_runnable(warp_of(current), 1u << lane_of(current));
        park();
    }
}

// --- blocks ----------------------------------------------------------------------------------------------------------

void begin_block() {
    shared_begin = static_cast<u8*>(malloc(shared_bytes ? shared_bytes : 16));
    if (!shared_begin) fault("no memory for %zu bytes of shared memory", shared_bytes);
    if (!shared_bytes) __asan_poison_memory_region(shared_begin, 16);
    // Numbers in some blocks; in others a NaN whether bytes are read as 16-bit or as 32-bit floats, and a huge integer.
    const u32 always = random_bits() & 1 ? 0x7fc07fc0 : 0;
    for (size_t i = 0; i < shared_bytes; i += 4) {
        const u32 garbage = random_bits() | always;
        std::memcpy(shared_begin + i, &garbage, std::min<size_t>(4, shared_bytes - i));
    }
    const u32 choice = random_bits();
    by_priority = choice & 1;
    eager_copies = choice & 2 ? 0 : choice & 4 ? 256 : 128;
    const int count = threads / warp_size;
    for (int i = 0; i < count; ++i) {
        priorities[i] = static_cast<u8>(i);
        std::swap(priorities[i], priorities[random_below(static_cast<u32>(i) + 1)]);
        Warp& warp = warps[i];
        warp.arrived = warp.at_block_barrier = warp.exited = 0;
        make_runnable(i, ~0u);
    }
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack) allocate_stack(fiber);
        fiber.exited = false;
        fiber.waits = Operation::none;
        fiber.committed = 0;
        fiber.copies.clear();
    }
    exited = waiting_at_barrier = 0;
    ++epoch;
    ++block_count;
    if (history.size() < shared_bytes) history.resize(shared_bytes);
}

void run_grid() {
    const u32 count = gridDim.x * gridDim.y * gridDim.z;
    std::vector<u32> order(count);
    for (u32 i = 0; i < count; ++i) {
        order[i] = i;
        std::swap(order[i], order[random_below(i + 1)]);
    }
    for (const u32 block : order) {
        blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
        begin_block();
        run_block();
        current = -1;
        free(shared_begin);
        shared_begin = nullptr;
    }
}

// --- the job ---------------------------------------------------------------------------------------------------------
// All numbers are little-endian and 64 bits long. A job: the number of buffers; of each its size and bytes; the number
// of launches; of each the name's length and bytes, the grid, the threads of a block, the bytes of shared memory, the
// seed, the number of arguments, and of each its kind and two words: a pointer's buffer and offset, or a number's bits.
// The result: the bytes of the buffers.

struct Buffer {
    u8* bytes;
    size_t size;
};

void read_bytes(FILE* file, void* bytes, size_t size) {
    if (size && fread(bytes, size, 1, file) != 1) fault("the job ends early");
}

long long read_number(FILE* file) {
    long long number;
    read_bytes(file, &number, 8);
    return number;
}

Argument read_argument(FILE* file, const std::vector<Buffer>& buffers) {
    Argument argument;
    argument.kind = read_number(file);
    const long long first = read_number(file), second = read_number(file);
    argument.i64 = first;
    if (argument.kind == Argument::null) argument.address = nullptr;
    if (argument.kind == Argument::pointer) argument.address = buffers.at(static_cast<size_t>(first)).bytes + second;
    if (argument.kind == Argument::int32) argument.i32 = static_cast<int>(first);
    if (argument.kind == Argument::float32) {
        const u32 bits = static_cast<u32>(first);
        std::memcpy(&argument.f32, &bits, 4);
    }
    if (argument.kind == Argument::words) {  // memory of its own, as a table of addresses
        const size_t count = static_cast<size_t>(first);
        u8* const words = static_cast<u8*>(malloc(8 * count));
        if (!words) fault("no memory for %zu words", count);
        for (size_t i = 0; i < count; ++i) {
            const Argument word = read_argument(file, buffers);
            std::memcpy(words + 8 * i, &word.i64, 8);
        }
        argument.kind = Argument::pointer;
        argument.address = words;
    }
    return argument;
}

void check_arguments(const std::vector<Argument>& list) {
    const size_t expected = strlen(kernel->kinds);
    if (list.size() != expected) fault("%s takes %zu arguments, not %zu", kernel->name, expected, list.size());
    for (size_t i = 0; i < expected; ++i)
        if ("ppilf"[list[i].kind] != kernel->kinds[i])
            fault("argument %zu of %s is of kind %c, not %c (pointer, int32, long, float)", i, kernel->name,
                  kernel->kinds[i], "ppilf"[list[i].kind]);
}

void run_launch(FILE* file, const std::vector<Buffer>& buffers) {
    std::string name(static_cast<size_t>(read_number(file)), ' ');
    read_bytes(file, name.data(), name.size());
    kernel = std::find_if(kernels, kernels + kernel_count, [&](const Kernel& k) { return name == k.name; });
    if (kernel == kernels + kernel_count) fault("there is no kernel %s", name.c_str());
    for (u32* size : {&gridDim.x, &gridDim.y, &gridDim.z}) *size = static_cast<u32>(read_number(file));
    threads = static_cast<int>(read_number(file));
    if (threads < warp_size || threads > max_threads || threads % warp_size)
        fault("a block of %d threads: must be whole warps, and at most %d", threads, max_threads);
    blockDim = {static_cast<u32>(threads), 1, 1};
    shared_bytes = static_cast<size_t>(read_number(file));
    state = static_cast<uint64_t>(read_number(file));
    std::vector<Argument> list(static_cast<size_t>(read_number(file)));
    for (Argument& argument : list) argument = read_argument(file, buffers);
    check_arguments(list);
    arguments = list.data();
    run_grid();
}

// Of exactly the size, so that AddressSanitizer knows where it ends.
Buffer read_buffer(FILE* file) {
    Buffer buffer{nullptr, static_cast<size_t>(read_number(file))};
    buffer.bytes = static_cast<u8*>(malloc(buffer.size ? buffer.size : 16));
    if (!buffer.bytes) fault("no memory for a buffer of %zu bytes", buffer.size);
    if (!buffer.size) __asan_poison_memory_region(buffer.bytes, 16);
    read_bytes(file, buffer.bytes, buffer.size);
    return buffer;
}

}  // namespace

namespace {

void print_thread() {
    if (shared_begin && current >= 0)
        fprintf(stderr, "simulation fault: %s, thread %d of block (%u, %u, %u): ", kernel->name, current, blockIdx.x,
                blockIdx.y, blockIdx.z);
    else
        fprintf(stderr, "simulation fault: ");
}

// After a sanitizer's report, which knows of one thread only.
void print_thread_at_death() {
    print_thread();
    fprintf(stderr, "see the sanitizer's report\n");
}

}  // namespace

void fault(const char* format, ...) {
    print_thread();
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fprintf(stderr, "\n");
    if (shared_begin && current >= 0) __sanitizer_print_stack_trace();
    fflush(stderr);
    _exit(1);
}

namespace gta {

u8* shared_memory() { return shared_begin; }

u32 shared_address(const void* pointer) {
    if (!in_shared_memory(pointer, 0)) fault("shared_address: not an address in shared memory");
    return static_cast<u32>(static_cast<const u8*>(pointer) - shared_begin);
}

void block_barrier(int line) {
    const int index = warp_of(current);
    Warp& warp = warps[index];
    begin_wait(Operation::block_barrier, line);
    const auto fault_with = [&](int other) { fault_together(here(Operation::block_barrier, line).c_str(), other); };
    if (warp.arrived) fault_with(first_of(index, warp.arrived));
    if (exited)
        for (int i = 0; i < threads / warp_size; ++i)
            if (warps[i].exited) fault_with(first_of(i, warps[i].exited));
    warp.at_block_barrier |= 1u << lane_of(current);
    if (++waiting_at_barrier == threads) {
        waiting_at_barrier = 0;
        ++epoch;
        for (int i = 0; i < threads / warp_size; ++i) {
            warps[i].at_block_barrier = 0;
            make_runnable(i, ~0u);
        }
    }
    park();
    fibers[current].waits = Operation::none;
}

void warp_barrier(int line) { 
    wait_for_warp(Operation::warp_barrier, line, [](Warp& warp) { ++warp_epochs[&warp - warps]; });
}

float shuffle_xor(float value, int lane_mask, int line) {
    Warp& warp = own_warp();
    const int lane = lane_of(current);
    warp.words[lane] = as_bits(value);
    warp.masks[lane] = lane_mask & 31;
    wait_for_warp(Operation::shuffle, line, [](Warp& all) {
        for (int i = 0; i < warp_size; ++i) all.results[i][0] = all.words[i ^ all.masks[i]];
    });
    return as_float(warp.results[lane][0]);
}

bool any_of_warp(bool condition, int line) {
    Warp& warp = own_warp();
    const int lane = lane_of(current);
    warp.words[lane] = condition;
    wait_for_warp(Operation::vote, line, [](Warp& all) {
        u32 any = 0;
        for (const u32 word : all.words) any |= word;
        for (auto& result : all.results) result[0] = any;
    });
    return warp.results[lane][0] != 0;
}

void copy_16_async(void* shared, const void* global, bool valid) {
    copy_async("copy_16_async", shared, global, 16, valid, __builtin_return_address(0));
}

void copy_4_async(void* shared, const void* global, bool valid) {
    copy_async("copy_4_async", shared, global, 4, valid, __builtin_return_address(0));
}

void commit_copies() { ++fibers[current].committed; }

void wait_until_pending(int groups) {
    Fiber& fiber = fibers[current];
    const long needed = fiber.committed - groups;  // the groups before this one are waited for
    const bool backwards = random_bits() & 1;      // copies have no order
    auto& copies = fiber.copies;
    if (backwards) std::reverse(copies.begin(), copies.end());
    size_t kept = 0;
    for (Copy& copy : copies) {
        const bool ends = copy.group < needed;
        if (ends || random_below(256) < eager_copies) perform(copy);
        if (ends) {
            if (races_are_faults) note_copy_ends(copy);
        } else {
            copies[kept++] = copy;
        }
    }
    copies.resize(kept);
}

}  // namespace gta

namespace {

template <bool transposed, int n>
void load(u32 (&r)[n], const void* row, int line, void* place) {
    constexpr Operation operation = n == 4 ? (transposed ? Operation::load_4_t : Operation::load_4)
                                           : (transposed ? Operation::load_2_t : Operation::load_2);
    Warp& warp = own_warp();
    const int lane = lane_of(current);
    if (lane < 8 * n) {
        check_shared(describe(operation), row, 16);
        note_access(row, 16, false, place);
        std::memcpy(warp.rows[lane], row, 16);
    }
    wait_for_warp(operation, line, [](Warp& all) {
        for (int i = 0; i < warp_size; ++i)
            for (int matrix = 0; matrix < n; ++matrix) {
                const auto element = [&](int k) {
                    const int row = transposed ? 2 * (i % 4) + k : i / 4, column = transposed ? i / 4 : 2 * (i % 4) + k;
                    gta::u16 bits;
                    std::memcpy(&bits, &all.rows[8 * matrix + row][2 * column], 2);
                    return static_cast<u32>(bits);
                };
                all.results[i][matrix] = element(0) | element(1) << 16;
            }
    });
    std::memcpy(r, warp.results[lane], sizeof(r));
}

template <Operation operation, void (*compute)(Fragments&)>
void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], int line) {
    Warp& warp = own_warp();
    const int lane = lane_of(current);
    std::memcpy(warp.fragments.a[lane], a, sizeof(a));
    std::memcpy(warp.fragments.b[lane], b, sizeof(b));
    std::memcpy(warp.fragments.c[lane], c, sizeof(c));
    wait_for_warp(operation, line, [](Warp& all) {
        compute(all.fragments);
        std::memcpy(all.results, all.fragments.c, sizeof(all.results));
    });
    std::memcpy(c, warp.results[lane], sizeof(c));
}

}  // namespace

#define CALLER __builtin_return_address(0)

namespace gta {

void load_matrices(u32 (&r)[4], const void* row, int line) { load<false>(r, row, line, CALLER); }

void load_matrices_transposed(u32 (&r)[4], const void* row, int line) { load<true>(r, row, line, CALLER); }

void load_matrices(u32 (&r)[2], const void* row, int line) { load<false>(r, row, line, CALLER); }

void load_matrices_transposed(u32 (&r)[2], const void* row, int line) { load<true>(r, row, line, CALLER); }

void mma_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], int line) {
    mma<Operation::f16, mma_fragments_f16>(c, a, b, line);
}

void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], int line) {
    mma<Operation::bf16, mma_fragments_bf16>(c, a, b, line);
}

}  // namespace gta

// UndefinedBehaviorSanitizer calls this before its report.
extern "C" void __ubsan_on_report() { print_thread_at_death(); }

// Before an access of a kernel; "__real_" is what it would have called.
#define ACCESS(name, bytes, is_write)                                       \
    extern "C" void __real___asan_##name(const void*);                      \
    extern "C" void __wrap___asan_##name(const void* pointer) {             \
        __real___asan_##name(pointer);                                      \
        note_access(pointer, bytes, is_write, __builtin_return_address(0)); \
    }
#define ACCESS_OF_SIZE(name, is_write)                                      \
    extern "C" void __real___asan_##name(const void*, size_t);              \
    extern "C" void __wrap___asan_##name(const void* pointer, size_t bytes) { \
        __real___asan_##name(pointer, bytes);                               \
        note_access(pointer, bytes, is_write, __builtin_return_address(0)); \
    }
ACCESS(load1, 1, false)
ACCESS(load2, 2, false)
ACCESS(load4, 4, false)
ACCESS(load8, 8, false)
ACCESS(load16, 16, false)
ACCESS(store1, 1, true)
ACCESS(store2, 2, true)
ACCESS(store4, 4, true)
ACCESS(store8, 8, true)
ACCESS(store16, 16, true)
ACCESS_OF_SIZE(loadN, false)
ACCESS_OF_SIZE(storeN, true)

int main(int count, char** values) {
    if (count != 4) fault("the arguments are the paths of a job and its result, and whether races are faults, 1 or 0");
    races_are_faults = *values[3] == '1';
    __sanitizer_set_death_callback(print_thread_at_death);
    FILE* job = fopen(values[1], "rb");
    if (!job) fault("%s cannot be read", values[1]);
    std::vector<Buffer> buffers(static_cast<size_t>(read_number(job)));
    for (Buffer& buffer : buffers) buffer = read_buffer(job);
    for (long long launches = read_number(job); launches; --launches) run_launch(job, buffers);
    fclose(job);
    FILE* result = fopen(values[2], "wb");
    if (!result) fault("%s cannot be written", values[2]);
    for (const Buffer& buffer : buffers)
        if (buffer.size && fwrite(buffer.bytes, buffer.size, 1, result) != 1) fault("the result cannot be written");
    if (fwrite(&copied_bytes, sizeof copied_bytes, 1, result) != 1) fault("the result cannot be written");
    if (fclose(result)) fault("the result cannot be written");
    return 0;
}
