// What the kernels ask of the machine: who a thread is, barriers, words from other threads, and its own instructions. The
// tests give the same functions on the host, so that the kernels themselves run there.
#define DEVICE __device__ __forceinline__
#define ONCE _Pragma("unroll 1")    // a loop whose body is long
#define SOME _Pragma("unroll 4")

using Index = long long;
using Amount = uint64_t;

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_threads() { return blockDim.x; }
DEVICE Index block_index() { return blockIdx.x; }
DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }
DEVICE Word word_across(Word word, int mask) { return __shfl_xor_sync(0xffffffffu, word, mask); }
DEVICE bool any_in_warp(bool mine) { return __any_sync(0xffffffffu, mine); }

// Clusters are older than none of the architectures that the launcher gives them to: sm_90 and newer. Others have no such
// registers, and blocks of their own.
#if __CUDA_ARCH__ >= 900
#define READ_REGISTER(name, word) asm("mov.u32 %0, %%" name ";" : "=r"(word))
#else
#define READ_REGISTER(name, word)
#endif

DEVICE int cluster_rank() {
    Word rank = 0;
    READ_REGISTER("cluster_ctarank", rank);
    return rank;
}

DEVICE int cluster_size() {
    Word size = 1;
    READ_REGISTER("cluster_nctarank", size);
    return size;
}

DEVICE Index cluster_index() {
    Word index = 0;
    READ_REGISTER("clusterid.x", index);
    return index;
}

// The two halves of a barrier of a cluster, between which a thread may do what concerns nobody else. Not the aligned
// form, which asks that a warp has come together again after its last branch.
DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive;" ::: "memory");
#endif
}

DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

// Of two launches, one after the other, the second may begin once all blocks of the first have said so; what the first has
// written, the second sees after it has waited. A launch that is not told to begin early has nothing to wait for.
DEVICE void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

DEVICE void wait_for_last_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Write a word to another block's shared memory, at the place where `own` stands in this one's.
DEVICE void give_word(Word* own, Word word, int rank) {
#if __CUDA_ARCH__ >= 900
    Word here = (Word)__cvta_generic_to_shared(own), there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(word) : "memory");
#endif
}

// Of a number that may be the same as before, the compiler keeps nothing that it has found from it: registers are dearer
// than to find it again.
DEVICE void forget(int& number) { asm volatile("" : "+r"(number)); }
DEVICE void forget(Word& bits) { asm volatile("" : "+r"(bits)); }
DEVICE void forget(float& number) { asm volatile("" : "+f"(number)); }

// Add to a number in shared memory, whatever the other threads of the block do; the answer is what it was.
DEVICE Word add_in_block(Word* to, Word more) { return atomicAdd(to, more); }

DEVICE float greater(float x, float y) { return fmaxf(x, y); }    // a NaN loses
DEVICE double greater(double x, double y) { return fmax(x, y); }

// 2^x for terms of a sum. The rounding of x weighs as much as the term does, so one instruction is enough. What would be
// subnormal is 0.
DEVICE float quick_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
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

// Copy 16 bytes to shared memory, past the registers. This thread sees them once it has waited for all its copies.
DEVICE void copy_16_bytes(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((Word)__cvta_generic_to_shared(to)),
                 "l"(__cvta_generic_to_global(from))
                 : "memory");
}

DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

template <bool FIRST, class A, class B>
struct Either {
    using Type = A;
};
template <class A, class B>
struct Either<false, A, B> {
    using Type = B;
};

// Numbers of 16 bits are kept in pairs: alone, each would take a register.
template <class T, int W>
struct Pack {
    static constexpr bool IN_PAIRS = sizeof(T) == 2 && W % 2 == 0;
    static constexpr int SIZE = W * sizeof(T), STEP = SIZE < 16 ? SIZE : 16;
    using Unit = typename Access<STEP>::Type;
    using Kept = typename Either<IN_PAIRS, Word, T>::Type;
    alignas(STEP) Kept kept[SIZE / sizeof(Kept)];

    DEVICE T get(int i) const {
        if constexpr (IN_PAIRS) {
            return T{(uint16_t)(kept[i / 2] >> 16 * (i % 2))};
        } else {
            return kept[i];
        }
    }
    DEVICE void set(int i, T one) {
        if constexpr (IN_PAIRS) {
            Word other = kept[i / 2] & (i % 2 ? 0xffff : 0xffff0000);
            kept[i / 2] = other | (Word)one.bits << 16 * (i % 2);
        } else {
            kept[i] = one;
        }
    }
    DEVICE void fill(T one) {
        for (Kept& of : kept) {
            if constexpr (IN_PAIRS) {
                of = one.bits | (Word)one.bits << 16;
            } else {
                of = one;
            }
        }
    }
    DEVICE void load(const T* from) {
        UNROLL for (int i = 0; i < SIZE / STEP; i++) ((Unit*)kept)[i] = ((const Unit*)from)[i];
    }
    // Write to shared memory.
    DEVICE void put(T* to) const {
        UNROLL for (int i = 0; i < SIZE / STEP; i++) ((Unit*)to)[i] = ((const Unit*)kept)[i];
    }
    DEVICE void store(T* to) const {
        if constexpr (STEP == 16) {
            UNROLL for (int i = 0; i < SIZE; i += 16) store_16_bytes((char*)to + i, (const char*)kept + i);
        } else {
            *(Unit*)to = *(const Unit*)kept;
        }
    }
    // Move each entry to the place before its own.
    DEVICE void drop_first() {
        if constexpr (IN_PAIRS) {
            UNROLL for (int i = 1; i < W / 2; i++) kept[i - 1] = kept[i - 1] >> 16 | kept[i] << 16;
            kept[W / 2 - 1] >>= 16;
        } else {
            UNROLL for (int i = 1; i < W; i++) kept[i - 1] = kept[i];
        }
    }
    DEVICE void forget_all() {
        if constexpr (IN_PAIRS || sizeof(T) == 4) {
            for (Kept& one : kept) forget(one);
        }
    }
};

// What the machine does with two numbers of 16 bits at once, the first of which is in the lower half of a word.
template <class T>
constexpr bool IS_BFLOAT = false;
template <>
constexpr bool IS_BFLOAT<BFloat> = true;

template <class T>
DEVICE void widen_pair(Word pair, float* to) {
    if constexpr (IS_BFLOAT<T>) {
        to[0] = of_bits<float>(pair << 16);
        to[1] = of_bits<float>(pair & 0xffff0000);
    } else {
        to[0] = widen(T{(uint16_t)pair});
        to[1] = widen(T{(uint16_t)(pair >> 16)});
    }
}

template <class T>
DEVICE Word round_pair(const float* from) {
    Word pair;
    if constexpr (IS_BFLOAT<T>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(from[1]), "f"(from[0]));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(from[1]), "f"(from[0]));
    }
    return pair;
}

// The greater of each; a NaN loses.
template <class T>
DEVICE Word greater_pair(Word x, Word y) {
    Word pair;
    if constexpr (IS_BFLOAT<T>) {
        asm("max.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(x), "r"(y));
    } else {
        asm("max.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(x), "r"(y));
    }
    return pair;
}

// The same, but a NaN wins.
template <class T>
DEVICE Word greater_or_nan_pair(Word x, Word y) {
    Word pair;
    if constexpr (IS_BFLOAT<T>) {
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(x), "r"(y));
    } else {
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(x), "r"(y));
    }
    return pair;
}
