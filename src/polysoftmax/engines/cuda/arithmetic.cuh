// The arithmetic of the kernels: what one entry contributes, how parts of a row are merged, random variates, rounding.
//
// NVRTC compiles this for the GPU, and any C++17 compiler for the host, where the tests hold each function to the
// array API formulas. It includes no CUDA header: there may be no toolkit beside NVRTC.
#if defined(__CUDACC__)
#define BOTH __host__ __device__ __forceinline__
#else
#include <cmath>
#include <cstring>
#define BOTH inline
using namespace std;
#endif

namespace polysoftmax {

using Index = long long;
using Word = unsigned int;
using Amount = unsigned long long;

// 16-bit numbers are storage alone: everything is computed in float and rounded once, to nearest, ties to even.

struct Half {
    unsigned short bits;
};

struct BFloat {
    unsigned short bits;
};

BOTH float float_of_bits(Word bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

BOTH Word bits_of_float(float x) {
    Word bits;
    memcpy(&bits, &x, 4);
    return bits;
}

BOTH float widen(float x) { return x; }
BOTH double widen(double x) { return x; }
BOTH float widen(BFloat x) { return float_of_bits((Word)x.bits << 16); }

BOTH float widen(Half x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    Word sign = (Word)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    float magnitude = rest < 0x400 ? (float)rest * 0x1p-24f : float_of_bits((rest << 13) + 0x38000000);
    return float_of_bits(sign | bits_of_float(magnitude));
#endif
}

template <class T>
struct Rounded;

template <>
struct Rounded<float> {
    BOTH static float of(float x) { return x; }
};

template <>
struct Rounded<double> {
    BOTH static double of(double x) { return x; }
};

template <>
struct Rounded<BFloat> {
    BOTH static BFloat of(float x) {
#if defined(__CUDA_ARCH__)
        BFloat y;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
        return y;
#else
        Word bits = bits_of_float(x);
        if (x != x) return BFloat{0x7fff};
        return BFloat{(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
    }
};

template <>
struct Rounded<Half> {
    BOTH static Half of(float x) {
#if defined(__CUDA_ARCH__)
        Half y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
        return y;
#else
        Word bits = bits_of_float(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
        if (rest > 0x7f800000) return Half{0x7fff};
        if (rest >= 0x477ff000) return Half{(unsigned short)(sign | 0x7c00)};
        if (rest < 0x38800000) {
            // Adding 1/2 leaves a multiple of 2^-24, the spacing of subnormal numbers, in the last bits.
            Word shifted = bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000;
            return Half{(unsigned short)(sign | shifted)};
        }
        rest -= 0x38000000;
        return Half{(unsigned short)(sign | (rest + 0xfff + (rest >> 13 & 1)) >> 13)};
#endif
    }
};

template <class C>
BOTH C infinity() {
    return (C)float_of_bits(0x7f800000);
}

template <class C>
BOTH C nan_of() {
    return (C)float_of_bits(0x7fc00000);
}

template <class C>
BOTH bool finite(C x) {
    return x - x == 0;
}

BOTH float exponential(float x) { return expf(x); }
BOTH double exponential(double x) { return exp(x); }
BOTH float logarithm(float x) { return logf(x); }
BOTH double logarithm(double x) { return log(x); }
BOTH float logarithm_plus_1(float x) { return log1pf(x); }
BOTH double logarithm_plus_1(double x) { return log1p(x); }
BOTH float greater(float x, float y) { return fmaxf(x, y); }    // a NaN loses
BOTH double greater(double x, double y) { return fmax(x, y); }

// 2^x for terms of a sum. The rounding of x weighs as much as the term does, so one instruction is enough.
BOTH float quick_exp2(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

BOTH double quick_exp2(double x) { return exp2(x); }

// The temperature of a row. At the limits T = 0 and T = inf, and where T has no answer, a distance d from the maximum
// becomes -inf below `bound` and 0, or NaN, above: `zero`·d, since a NaN has to stay one.
template <class C>
struct Temperature {
    C value, scale, bound, zero;
    bool given, limit;
};

template <class C>
BOTH Temperature<C> temperature_of(bool given, C value) {
    const C log2_e = (C)1.4426950408889634, largest = (C)0x1.fffffep+127;
    Temperature<C> t{value, log2_e, 0, 0, given, false};
    if (given) {
        t.limit = !(value > 0 && value < infinity<C>());
        // A scale of inf would make NaN of the maximum itself.
        t.scale = log2_e / value < largest ? log2_e / value : largest;
        if (value == infinity<C>()) t.bound = -(sizeof(C) == 4 ? largest : (C)1.7976931348623157e308);
        if (!(value >= 0)) {
            t.bound = -infinity<C>();
            t.zero = nan_of<C>();
        }
    }
    return t;
}

// (x - max) / T for a distance from the maximum.
template <class C>
BOTH C over_temperature(C distance, const Temperature<C>& t) {
    if (!t.given) return distance;
    if (t.limit) return distance < t.bound ? -infinity<C>() : t.zero * distance;
    return distance / t.value;
}

// A tangent or cotangent over T: nothing moves at the limits.
template <class C>
BOTH C over_regular_temperature(C slope, const Temperature<C>& t) {
    if (!t.given) return slope;
    return t.limit ? 0 : slope / t.value;
}

// exp((x - max) / T) for a sum.
template <class C>
BOTH C term(C distance, const Temperature<C>& t) {
    if (t.limit) return distance < t.bound ? 0 : 1 + t.zero * distance;
    return quick_exp2(distance * t.scale);
}

// Σ exp((x - top) / T) over a part of a row: the number of its entries at the top, and the sum of the others, so that a
// logarithm close to 0 keeps its digits. `lost` is what rounding has cost `rest`. A NaN among the entries is a NaN in
// `rest`; a row without an answer has a top of -inf or +inf.
template <class C>
struct Total {
    C top, count, rest, lost;
};

template <class C>
BOTH Total<C> no_entries() {
    return Total<C>{-infinity<C>(), 0, 0, 0};
}

template <class C>
BOTH void add_exactly(Total<C>& a, C more) {
    C sum = a.rest + more, part = sum - a.rest;
    a.lost += (a.rest - (sum - part)) + (more - part);
    a.rest = sum;
}

// The greater top comes first whichever way round the arguments are, so that all threads get the same bits.
template <class C>
BOTH Total<C> merge(Total<C> a, Total<C> b, const Temperature<C>& t) {
    if (a.top == b.top) {
        a.count += b.count;
        a.rest += b.rest;
        a.lost += b.lost;
        return a;
    }
    Total<C> high = a.top > b.top ? a : b, low = a.top > b.top ? b : a;
    C factor = term(low.top - high.top, t);
    high.rest += (low.count + low.rest) * factor;
    high.lost += low.lost * factor;
    return high;
}

// Σ of W numbers, in a tree.
template <int W, class C>
BOTH C tree_sum(const C* x) {
    if constexpr (W == 1) {
        return x[0];
    } else {
        return tree_sum<W / 2>(x) + tree_sum<W - W / 2>(x + W / 2);
    }
}

// Add W entries to a part of a row. Entries that do not exist are -inf.
template <int W, class C>
BOTH void add_entries(Total<C>& a, const C* x, const Temperature<C>& t) {
    C top = a.top;
    for (int i = 0; i < W; i++) top = greater(top, x[i]);
    if (top > a.top) a = merge(a, Total<C>{top, 0, 0, 0}, t);
    C reference = finite(top) ? top : 0, terms[W];
    for (int i = 0; i < W; i++) {
        bool at_top = x[i] == top;
        a.count += at_top ? 1 : 0;
        C distance = x[i] - reference;
        terms[i] = at_top ? 0 : term(distance, t);
    }
    add_exactly(a, tree_sum<W>(terms));
}

template <class C>
BOTH C sum_of(const Total<C>& a) {
    return finite(a.top) ? a.count + (a.rest + a.lost) : nan_of<C>();
}

// log Σ exp(x - top), with the terms at the top kept out of the sum.
template <class C>
BOTH C log_of_sum(const Total<C>& a) {
    C rest = a.rest + a.lost;
    return logarithm(a.count) + logarithm_plus_1(rest / a.count);
}

template <class C>
BOTH C logsumexp_of(const Total<C>& a) {
    if (finite(a.top)) return a.top + log_of_sum(a);
    return a.rest != a.rest ? a.rest : a.top;
}

// The loss of a row for a target class at the logit x: log Σ exp(x - top) + (top - x), weighted, and the z-loss.
template <class C>
BOTH C loss_of(const Total<C>& a, C x, C weight, C z_loss) {
    if (!finite(a.top)) return nan_of<C>();
    C log_total = log_of_sum(a), nll = log_total + (a.top - x);
    C y = weight == 0 && nll == infinity<C>() ? 0 : weight * nll;
    C z = a.top + log_total;
    return z_loss != 0 ? y + z_loss * (z * z) : y;
}

// Unsigned integers in the order of the numbers that they stand for; -0 is 0.
template <int BYTES>
struct Unsigned;
template <>
struct Unsigned<2> {
    using Type = unsigned short;
};
template <>
struct Unsigned<4> {
    using Type = Word;
};
template <>
struct Unsigned<8> {
    using Type = Amount;
};
template <class X>
using Order = typename Unsigned<sizeof(X)>::Type;

template <class X>
BOTH Order<X> order_of(X x) {
    const Order<X> sign = (Order<X>)1 << (8 * sizeof(X) - 1);
    Order<X> bits;
    memcpy(&bits, &x, sizeof(X));
    if (bits == sign) bits = 0;
    return bits & sign ? ~bits : bits | sign;
}

template <class X>
BOTH X number_of(Order<X> order) {
    const Order<X> sign = (Order<X>)1 << (8 * sizeof(X) - 1);
    Order<X> bits = order & sign ? order ^ sign : ~order;
    X x;
    memcpy(&x, &bits, sizeof(X));
    return x;
}

BOTH int digits_of(Index n) {
    int digits = 1;
    while (n >> digits) digits++;
    return digits;
}

// Probabilities, of which the greatest is 1, as whole numbers: n of them have a sum of at most 2^62.
template <class C>
BOTH C scale_of_amounts(Index n) {
    return (C)float_of_bits((Word)(127 + 62 - digits_of(n)) << 23);
}

template <class C>
BOTH Amount amount_of(C probability, C scale) {
    return (Amount)(probability * scale + (C)0.5);
}

// What a share of p of an amount is reached by: something, even for p = 0.
BOTH Amount share_of_amount(double p, Amount all) {
    double share = ceil(p * (double)all);
    return share < 1 ? 1 : share < (double)all ? (Amount)share : all;
}

struct Words {
    Word first, second;
};

// Threefry-2x32 with 20 rounds: the block for the counter (index, domain).
// Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
BOTH Word rotated(Word x, int by) { return x << by | x >> (32 - by); }

BOTH Words random_words(Words key, Word index, Word domain) {
    const int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    const Word schedule[3] = {key.first, key.second, key.first ^ key.second ^ 0x1BD11BDA};
    Word a = index + key.first, b = domain + key.second;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int group = 0; group < 5; group++) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
        for (int i = 0; i < 4; i++) {
            a += b;
            b = rotated(b, rotations[group % 2][i]) ^ a;
        }
        a += schedule[(group + 1) % 3];
        b += schedule[(group + 2) % 3] + group + 1;
    }
    return Words{a, b};
}

enum Domain : Word { BLOCK_VARIATES = 1, TOKEN_VARIATES = 2, NEW_KEYS = 3 };

// In (0, 1), with the resolution of 32 bits near 0. Every step is exact or rounded as the array formula rounds it.
BOTH float uniform_of(Word word) {
    float u = ((float)(word >> 16) * 65536.0f + (float)(word & 65535) + 0.5f) * 0x1p-32f;
    return fminf(u, 1.0f - 0x1p-24f);
}

BOTH float gumbel_of(Word word) { return -logf(-log1pf(-uniform_of(word))); }

// The best score so far; the lowest index among equals.
template <class C>
struct Best {
    C score;
    Index index;
};

template <class C>
BOTH Best<C> merge(Best<C> a, Best<C> b) {
    return a.score > b.score || (a.score == b.score && a.index < b.index) ? a : b;
}

// A score with its variate: at T = 0 there is none, and the entries that are left are equal.
template <class C>
BOTH C noisy_score(C score, const Temperature<C>& t, Words key, Index index, Word domain) {
    if (score == -infinity<C>()) return score;
    if (t.given && t.value == 0) return 0;
    return score + (C)gumbel_of(random_words(key, (Word)index, domain).first);
}

}  // namespace polysoftmax
