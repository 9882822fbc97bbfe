// One kernel source and the table by which the driver calls its kernels.
//
// GTA_SIMULATION_SOURCE is the source's path in quotes, GTA_SIMULATION_KERNELS the names: X(first) X(second).
#include GTA_SIMULATION_SOURCE

#include "kernels.h"

namespace {

template <typename T>
struct Parameter;  // no other types can be passed

template <typename T>
struct Parameter<T*> {
    static constexpr char kind = 'p';
    static T* of(const Argument& argument) { return static_cast<T*>(const_cast<void*>(argument.address)); }
};

template <>
struct Parameter<int> {
    static constexpr char kind = 'i';
    static int of(const Argument& argument) { return argument.i32; }
};

template <>
struct Parameter<unsigned int> {
    static constexpr char kind = 'i';
    static unsigned int of(const Argument& argument) { return static_cast<unsigned int>(argument.i32); }
};

template <>
struct Parameter<long long> {
    static constexpr char kind = 'l';
    static long long of(const Argument& argument) { return argument.i64; }
};

template <>
struct Parameter<float> {
    static constexpr char kind = 'f';
    static float of(const Argument& argument) { return argument.f32; }
};

template <int... i>
struct Indices {};

template <int n, int... i>
struct IndicesTo : IndicesTo<n - 1, n - 1, i...> {};

template <int... i>
struct IndicesTo<0, i...> {
    using type = Indices<i...>;
};

template <auto function>
struct Signature;

template <typename... P, void (*function)(P...)>
struct Signature<function> {
    static constexpr char kinds[] = {Parameter<P>::kind..., '\0'};

    template <int... i>
    static void expand(const Argument* arguments, Indices<i...>) {
        function(Parameter<P>::of(arguments[i])...);
    }

    static void call([[maybe_unused]] const Argument* arguments) {
        expand(arguments, typename IndicesTo<sizeof...(P)>::type());
    }
};

}  // namespace

#define X(name) {#name, Signature<&name>::kinds, &Signature<&name>::call},
extern const Kernel kernels[] = {GTA_SIMULATION_KERNELS};
#undef X

extern const int kernel_count = sizeof(kernels) / sizeof(kernels[0]);
