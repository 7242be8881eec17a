// The C interface: which level of kernels runs, and on how many threads. This file is compiled for any CPU of its kind.
#include <cstdint>

#include "threads.hpp"

using Pieces = void (*)(int64_t count, void (*piece)(void* context, int64_t index), void* context);
using Kernels = int (*)(const int64_t* problem, const int64_t* addresses, Pieces pieces, int threads);

#if defined(__x86_64__)
namespace polysoftmax_v3 {
int run(const int64_t* problem, const int64_t* addresses, Pieces pieces, int threads);
}
namespace polysoftmax_v4 {
int run(const int64_t* problem, const int64_t* addresses, Pieces pieces, int threads);
}
#else
namespace polysoftmax_any {
int run(const int64_t* problem, const int64_t* addresses, Pieces pieces, int threads);
}
#endif

namespace {

struct Level {
    int number;
    Kernels kernels;
};

Level level_of(int number) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (number >= 4 && v4) return {4, polysoftmax_v4::run};
    return v3 ? Level{3, polysoftmax_v3::run} : Level{0, nullptr};
#else
    (void)number;
    return {8, polysoftmax_any::run};
#endif
}

std::atomic<int> chosen{4};

void share(int64_t count, void (*piece)(void*, int64_t), void* context) {
    Team::current().share(count, piece, context);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int polysoftmax_level() { return level_of(chosen).number; }

__attribute__((visibility("default"))) void polysoftmax_set_level(int level) { chosen = level; }

__attribute__((visibility("default"))) void polysoftmax_set_threads(int count) { Team::current().set_threads(count); }

__attribute__((visibility("default"))) int polysoftmax_threads() { return Team::current().threads(); }

__attribute__((visibility("default"))) const char* polysoftmax_compiler() {
#if defined(__clang__)
    return __VERSION__;
#else
    return "GCC " __VERSION__;
#endif
}

__attribute__((visibility("default"))) int polysoftmax_run(const int64_t* problem, const int64_t* addresses) {
    Level level = level_of(chosen);
    return level.kernels ? level.kernels(problem, addresses, share, Team::current().threads()) : 2;
}

}
