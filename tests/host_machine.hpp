// The machine of the CUDA kernels on the host: each thread is a fiber, and whoever waits at a barrier lets the others
// run. It stands in for machine.cuh, so that the kernels themselves run where there is no GPU.
#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <type_traits>
#include <vector>

#define DEVICE inline
#undef UNROLL    // unrolled loops would only take longer to compile
#define UNROLL
#define ONCE
#define SOME

namespace polysoftmax {

using Index = long long;
using Amount = uint64_t;

struct Barrier {
    int size, count = 0;
    long generation = 0;
};

struct Fiber {
    ucontext_t context;
    jmp_buf here;
    int thread, block;
    bool started = false, done = false;
};

const size_t STACK = 64 << 10;

struct Host {
    int threads, cluster, shared_bytes;
    Index first_block;
    std::vector<Fiber> fibers;
    std::vector<Barrier> warps, blocks;
    Barrier whole;
    std::vector<Word> words;
    std::vector<char> shared;
    jmp_buf scheduler;
    Fiber* now;
    long progress;
    void (*body)(const void* self, char* shared);
    const void* self;
};

inline Host* host;

#if defined(MACHINE)    // compiled once, for all kernels
// A fiber starts in a context of its own. Later changes are jumps, which spare the system calls of swapcontext.
void resume(Fiber& fiber) {
    host->now = &fiber;
    if (_setjmp(host->scheduler)) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

void yield() {
    if (!_setjmp(host->now->here)) _longjmp(host->scheduler, 1);
}

void wait(Barrier& barrier) {
    long generation = barrier.generation;
    if (++barrier.count == barrier.size) {
        barrier.count = 0;
        barrier.generation++;
        host->progress++;
        return;
    }
    while (barrier.generation == generation) yield();
}
#else
void wait(Barrier& barrier);
#endif

inline int thread_index() { return host->now->thread; }
inline int block_threads() { return host->threads; }
inline int cluster_size() { return host->cluster; }
inline Index block_index() { return host->first_block + host->now->block; }
inline Index cluster_index() { return host->first_block / host->cluster; }
inline int cluster_rank() { return host->now->block; }
inline void block_barrier() { wait(host->blocks[host->now->block]); }
inline void warp_barrier() { wait(host->warps[(host->now->block * host->threads + host->now->thread) / 32]); }
inline void copy_16_bytes(void* to, const void* from) { memcpy(to, from, 16); }
inline void wait_for_copies() {}
inline void let_next_launch_begin() {}
inline void wait_for_last_launch() {}    // launches run one after the other
inline void cluster_arrive() {}    // whoever waits has arrived, too
inline void cluster_wait() { wait(host->whole); }

inline Word word_across(Word word, int mask) {
    int lane = host->now->block * host->threads + host->now->thread;
    Barrier& warp = host->warps[lane / 32];
    host->words[lane] = word;
    wait(warp);
    Word other = host->words[lane ^ mask];
    wait(warp);
    return other;
}

inline bool any_in_warp(bool mine) {
    Word any = mine;
    for (int mask = 1; mask < 32; mask *= 2) any |= word_across(any, mask);
    return any;
}

inline void give_word(Word* own, Word word, int rank) {
    size_t offset = (const char*)own - host->shared.data() - (size_t)host->now->block * host->shared_bytes;
    memcpy(host->shared.data() + (size_t)rank * host->shared_bytes + offset, &word, 4);
}

inline void forget(int&) {}

inline Word add_in_block(Word* to, Word more) {
    Word before = *to;
    *to += more;
    return before;
}

inline float greater(float x, float y) { return fmaxf(x, y); }
inline double greater(double x, double y) { return fmax(x, y); }
template <class C>
C greater_or_nan(C x, C y) {
    return x > y || x != x ? x : y;
}

inline float quick_exp2(float x) { return exp2f(x); }
inline double quick_exp2(double x) { return exp2(x); }

inline bool misaligned = false;    // an access that a GPU would refuse

template <class T, int W>
struct Pack {
    static constexpr bool IN_PAIRS = sizeof(T) == 2 && W % 2 == 0;
    using Kept = std::conditional_t<IN_PAIRS, Word, T>;
    union {
        T at[W];
        Kept kept[W * sizeof(T) / sizeof(Kept)];
    };

    void check(const T* p) const {
        if ((size_t)p % (sizeof(at) < 16 ? sizeof(at) : 16)) misaligned = true;
    }
    T get(int i) const { return at[i]; }
    void set(int i, T one) { at[i] = one; }
    void fill(T one) {
        for (T& of : at) of = one;
    }
    void load(const T* from) {
        check(from);
        memcpy(at, from, sizeof(at));
    }
    void store(T* to) const {
        check(to);
        memcpy(to, at, sizeof(at));
    }
    void put(T* to) const { store(to); }
    void drop_first() {
        for (int i = 1; i < W; i++) at[i - 1] = at[i];
    }
    void forget_all() {}
};

template <class T>
void widen_pair(Word pair, float* to) {
    T both[2];
    memcpy(both, &pair, 4);
    to[0] = widen(both[0]), to[1] = widen(both[1]);
}

template <class T>
Word round_pair(const float* from) {
    T both[2]{rounded<T>(from[0]), rounded<T>(from[1])};
    Word pair;
    memcpy(&pair, both, 4);
    return pair;
}

template <class T, class Choose>
Word chosen_pair(Word x, Word y, Choose choose) {
    float first[2], second[2], chosen[2];
    widen_pair<T>(x, first), widen_pair<T>(y, second);
    for (int i = 0; i < 2; i++) chosen[i] = choose(first[i], second[i]);
    return round_pair<T>(chosen);
}

template <class T>
Word greater_pair(Word x, Word y) {
    return chosen_pair<T>(x, y, [](float p, float q) { return greater(p, q); });
}

template <class T>
Word greater_or_nan_pair(Word x, Word y) {
    return chosen_pair<T>(x, y, [](float p, float q) { return greater_or_nan(p, q); });
}

#if defined(MACHINE)
void start() {
    Fiber& me = *host->now;
    host->body(host->self, host->shared.data() + (size_t)me.block * host->shared_bytes);
    me.done = true;
    host->progress++;
    yield();
}

// Run every cluster of a launch, one after another. 0: all is well; 1: threads wait for each other forever; 2: misaligned.
int launch(
    Index grid, int cluster, int threads, int shared_bytes, void (*body)(const void* self, char* shared), const void* self) {
    Host machine;
    host = &machine;
    misaligned = false;
    int all = cluster * threads;
    char* stacks = (char*)mmap(nullptr, all * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    machine.threads = threads, machine.cluster = cluster, machine.shared_bytes = shared_bytes;
    machine.body = body, machine.self = self;
    bool stuck = false;
    for (Index i = 0; i < grid && !stuck; i++) {
        machine.first_block = i * cluster;
        machine.fibers = std::vector<Fiber>(all);
        machine.warps = std::vector<Barrier>((all + 31) / 32, Barrier{threads < 32 ? threads : 32});
        machine.blocks = std::vector<Barrier>(cluster, Barrier{threads});
        machine.whole = Barrier{all};
        machine.words = std::vector<Word>(all);
        machine.shared = std::vector<char>((size_t)cluster * shared_bytes, (char)0xA5);
        for (int k = 0; k < all; k++) {
            Fiber& fiber = machine.fibers[k];
            fiber.thread = k % threads, fiber.block = k / threads;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = stacks + k * STACK;
            fiber.context.uc_stack.ss_size = STACK;
            makecontext(&fiber.context, start, 0);
        }
        for (int left = all; left && !stuck;) {
            machine.progress = left = 0;
            for (Fiber& fiber : machine.fibers) {
                if (fiber.done) continue;
                resume(fiber);
                left += !fiber.done;
            }
            stuck = left && !machine.progress;
        }
    }
    munmap(stacks, all * STACK);
    return stuck ? 1 : misaligned ? 2 : 0;
}
#else
int launch(Index grid, int cluster, int threads, int shared_bytes, void (*)(const void*, char*), const void*);
#endif

template <class Body>
int launch_all(Index grid, int cluster, int threads, int shared_bytes, const Body& body) {
    auto run = [](const void* self, char* shared) { (*(const Body*)self)(shared); };
    return launch(grid, cluster, threads, shared_bytes, run, &body);
}

}  // namespace polysoftmax
