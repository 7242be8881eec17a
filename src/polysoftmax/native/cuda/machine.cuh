// What the kernels ask of the machine: who a thread is, barriers, words from other threads, and its own instructions. The
// tests give the same functions on the host, so that the kernels themselves run there.
#define DEVICE __device__ __forceinline__
#define ONCE _Pragma("unroll 1")    // a loop whose body is long

using Index = long long;
using Amount = uint64_t;

DEVICE int thread_index() { return threadIdx.x; }
DEVICE Index block_index() { return blockIdx.x; }
DEVICE void block_barrier() { __syncthreads(); }
DEVICE Word word_across(Word word, int mask) { return __shfl_xor_sync(0xffffffffu, word, mask); }

// Clusters are older than none of the architectures that the launcher gives them to: sm_90 and newer.
DEVICE int cluster_rank() {
    Word rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

// Not the aligned form, which asks that a warp has come together again after its last branch.
DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive;\n\tbarrier.cluster.wait;" ::: "memory");
#endif
}

// A word of another block's shared memory, at the place where `own` stands in this one's.
DEVICE Word word_of_rank(const Word* own, int rank) {
    Word word = 0;
#if __CUDA_ARCH__ >= 900
    Word here = (Word)__cvta_generic_to_shared(own), there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(there) : "memory");
#endif
    return word;
}

// Add to a number in shared memory, whatever the other threads of the block do; the answer is what it was.
DEVICE Word add_in_block(Word* to, Word more) { return atomicAdd(to, more); }

DEVICE float greater(float x, float y) { return fmaxf(x, y); }    // a NaN loses
DEVICE double greater(double x, double y) { return fmax(x, y); }

// 2^x for terms of a sum. The rounding of x weighs as much as the term does, so one instruction is enough.
DEVICE float quick_exp2(float x) {
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE double quick_exp2(double x) { return exp2(x); }

// A NaN wins.
DEVICE float greater_or_nan(float x, float y) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(x), "f"(y));
    return most;
}

DEVICE double greater_or_nan(double x, double y) { return x > y || x != x ? x : y; }

// The same for two numbers of 16 bits each; the pointer says of which kind.
DEVICE Word greater_or_nan_pair(Word x, Word y, const Half*) {
    Word most;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(most) : "r"(x), "r"(y));
    return most;
}

DEVICE Word greater_or_nan_pair(Word x, Word y, const BFloat*) {
    Word most;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(x), "r"(y));
    return most;
}

// W entries in accesses of up to 16 bytes.
template <int BYTES>
struct Access;
template <>
struct Access<1> {
    using Type = unsigned char;
};
template <>
struct Access<2> {
    using Type = unsigned short;
};
template <>
struct Access<4> {
    using Type = unsigned int;
};
template <>
struct Access<8> {
    using Type = uint2;
};
template <>
struct Access<16> {
    using Type = uint4;
};

// In PTX, since the compiler splits many a store of 16 bytes of float or double into two of 8.
DEVICE void store_16_bytes(void* to, const void* from) {
    Word words[4];
    memcpy(words, from, sizeof(words));
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

template <class T, int W>
struct Pack {
    static constexpr int SIZE = W * sizeof(T), STEP = SIZE < 16 ? SIZE : 16;
    using Unit = typename Access<STEP>::Type;
    alignas(STEP) T at[W];

    DEVICE void load(const T* from) {
        UNROLL for (int i = 0; i < SIZE / STEP; i++) ((Unit*)at)[i] = ((const Unit*)from)[i];
    }
    DEVICE void store(T* to) const {
        if constexpr (STEP == 16) {
            UNROLL for (int i = 0; i < SIZE; i += 16) store_16_bytes((char*)to + i, (const char*)at + i);
        } else {
            *(Unit*)to = *(const Unit*)at;
        }
    }
};
