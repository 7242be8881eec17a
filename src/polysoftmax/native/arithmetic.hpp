// The arithmetic of the kernels, for CPU and GPU: exponential and logarithms, rounding to 16 bits, the order of numbers,
// the limits of temperature, random variates. A function is straight-line code where a loop over it has to become vectors,
// and on a CPU it calls nothing: what the C library returns differs between machines. A fused multiply-add is written as
// one; on a CPU nothing else may become one. The file that includes this one opens the namespace.
#pragma once

#if defined(__CUDACC__)
// NVRTC has neither headers nor GCC's built-in functions.
#define BOTH __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define COPY memcpy
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <stdint.h>
#define BOTH inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define COPY __builtin_memcpy
#endif

using Word = uint32_t;

// Integers as wide as a number: for its bits, and for its place among all numbers.
template <int BYTES>
struct Integers;
template <>
struct Integers<2> {
    using Bits = uint16_t;
    using Place = int16_t;
};
template <>
struct Integers<4> {
    using Bits = uint32_t;
    using Place = int32_t;
};
template <>
struct Integers<8> {
    using Bits = uint64_t;
    using Place = int64_t;
};
template <class X>
using BitsOf = typename Integers<sizeof(X)>::Bits;
template <class X>
using PlaceOf = typename Integers<sizeof(X)>::Place;

template <class X>
BOTH BitsOf<X> bits_of(X x) {
    BitsOf<X> bits;
    COPY(&bits, &x, sizeof x);
    return bits;
}

template <class X>
BOTH X of_bits(BitsOf<X> bits) {
    X x;
    COPY(&x, &bits, sizeof x);
    return x;
}

template <class C>
BOTH C infinity() {
    return (C)of_bits<float>(0x7f800000);
}

template <class C>
constexpr C largest = 0x1.fffffep127f;
template <>
constexpr double largest<double> = 0x1.fffffffffffffp1023;

template <class C>
constexpr C least_normal = 0x1p-126f;
template <>
constexpr double least_normal<double> = 0x1p-1022;

template <class C>
BOTH C nan_of() {
    return (C)of_bits<float>(0x7fc00000);
}

template <class C>
BOTH bool finite(C x) {
    return x - x == 0;
}

#if defined(__CUDACC__)
// CUDA's own are within 2 ulp, and take the fewest instructions.
BOTH float exp(float z) { return ::expf(z); }
BOTH double exp(double z) { return ::exp(z); }
BOTH float log(float x) { return ::logf(x); }
BOTH double log(double x) { return ::log(x); }
BOTH float log1p(float z) { return ::log1pf(z); }
BOTH double log1p(double z) { return ::log1p(z); }
BOTH float expm1(float z) { return ::expm1f(z); }
BOTH double expm1(double z) { return ::expm1(z); }
#else
// What the functions below need to know of a dtype. `series` of exp is 1 + r + r²·q(r), with q from the values of
// (exp(r) - 1 - r) / r² at Chebyshev's points of |r| ≤ ½ ln 2.
template <class C>
struct Format;

template <>
struct Format<float> {
    static constexpr int mantissa = 23, bias = 127, exp_degree = 6, log_degree = 4;
    static constexpr float exp_series[] = {1.0f,         1.0f,          0.5f,        0.1666658f,
                                           0.04166655f,  0.008363173f,  0.001392618f};
    static constexpr float exp_least = -105.0f;
    static constexpr float per_ln2 = 1.44269504f, ln2 = 0x1.62e43p-1f, ln2_rest = -0x1.05c61p-29f;
    // ln 2 again, with so few digits in the first part that multiples of it are exact.
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};

template <>
struct Format<double> {
    static constexpr int mantissa = 52, bias = 1023, exp_degree = 11, log_degree = 10;
    static constexpr double exp_series[] = {
        1.0, 1.0, 0.5000000000000001, 0.16666666666666669, 0.041666666666624164, 0.008333333333330065,
        0.0013888888917196881, 0.0001984126986304067, 2.4801521322116825e-05, 2.7557268480116333e-06,
        2.762007599981065e-07, 2.5100375924709717e-08};
    static constexpr double exp_least = -746.0;
    static constexpr double per_ln2 = 1.4426950408889634, ln2 = 0x1.62e42fefa39efp-1, ln2_rest = 0x1.abc9e3b39803fp-56;
    static constexpr double ln2_high = 0.6931471803691238, ln2_low = 1.9082149292705877e-10;
};

BOTH float fused(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
BOTH double fused(double x, double y, double z) { return __builtin_fma(x, y, z); }

// 2^exponent, an integer in the range of normal numbers.
template <class C>
constexpr C power_of_2(int exponent) {
    C y = 1;
    for (; exponent > 0; exponent--) y *= 2;
    for (; exponent < 0; exponent++) y /= 2;
    return y;
}

// exp(z) for z ≤ 40, -inf or NaN, within 1 ulp: z = k·ln 2 + r, and the series for exp(r), times 2^k. The power is taken
// with k + 64 in place of k, which stays clear of subnormal numbers, and a subnormal answer is rounded once, at the end.
template <class C>
BOTH C exp(C z) {
    using F = Format<C>;
    // A number that is added to this loses its fraction, and ends on k and the exponent of 2^64 in its bits.
    constexpr C rounding = (C)1.5 * power_of_2<C>(F::mantissa) + (C)(F::bias + 64);
    C rounded = fused(z, F::per_ln2, rounding), k = rounded - rounding;
    C r = fused(k, -F::ln2_rest, fused(k, -F::ln2, z));
    C p = F::exp_series[F::exp_degree];
    UNROLL for (int i = F::exp_degree - 1; i >= 0; i--) p = fused(p, r, F::exp_series[i]);
    C y = p * of_bits<C>(bits_of(rounded) << F::mantissa) * (C)0x1p-64;
    return z < F::exp_least ? 0 : y;
}

// log(u) + small for a normal u > 0: u = 2^k·(1 + f) with 1 + f from √½ to √2, and log(1 + f) = 2·artanh(s) with
// s = f / (2 + f), arranged so that f itself, which is exact, is added last.
template <class C>
BOTH C log_near(C u, C small, C less_exponent) {
    using F = Format<C>;
    using Bits = BitsOf<C>;
    constexpr Bits one = (Bits)F::bias << F::mantissa;
    constexpr C shift = power_of_2<C>(F::mantissa);
    const Bits up_to_root = one - bits_of((C)0.70710678118654752);
    Bits bits = bits_of(u), exponent = (bits + up_to_root) >> F::mantissa;
    // There is no vector instruction for a conversion of 64-bit integers everywhere; this one is exact.
    C k = of_bits<C>(bits_of(shift) + exponent) - (shift + F::bias) - less_exponent;
    C f = of_bits<C>(bits - (exponent << F::mantissa) + one) - 1;
    C s = f / (2 + f), square = s * s, half = (C)0.5 * f * f;
    C p = (C)2 / (2 * F::log_degree + 1);
    UNROLL for (int i = F::log_degree - 1; i > 0; i--) p = fused(p, square, (C)2 / (2 * i + 1));
    C rest = fused(s, fused(square, p, half), fused(k, F::ln2_low, small));
    return fused(k, F::ln2_high, f - (half - rest));
}

// log(x), within 1 ulp: -inf at 0, NaN below.
template <class C>
BOTH C log(C x) {
    using F = Format<C>;
    constexpr C up = F::mantissa + 2;
    C scaled = x * power_of_2<C>(F::mantissa + 2);
    bool subnormal = x < least_normal<C>;
    C y = log_near(subnormal ? scaled : x, (C)0, subnormal ? up : (C)0);
    y = x < infinity<C>() ? y : x;
    y = x > 0 ? y : nan_of<C>();
    return x == 0 ? -infinity<C>() : y;
}

// log(1 + z), within 1 ulp: what rounding takes from 1 + z is added to the logarithm as its part of it.
template <class C>
BOTH C log1p(C z) {
    C u = 1 + z;
    C of_z = z - (u - 1), of_1 = 1 - (u - z);
    C lost = z < 1 ? of_z : of_1;
    C y = log_near(u, lost / u, (C)0);
    y = u < infinity<C>() ? y : u;
    y = u > 0 ? y : nan_of<C>();
    return u == 0 ? -infinity<C>() : y;
}

// exp(z) - 1 for z ≤ 40, within 4 ulp: the logarithm of the rounded exponential tells what rounding has taken from it.
// Source: W. Kahan; N. J. Higham, "Accuracy and Stability of Numerical Algorithms", section 1.14.1.
template <class C>
BOTH C expm1(C z) {
    C u = exp(z), y = (u - 1) * (z / log(u));
    return u == 1 ? z : u == 0 ? -1 : y;
}
#endif

// exp(-r) - 1 + r for r from -1/2 to 1/2: what is left of the series, r²/2 and less.
template <class C>
BOTH C excess(C r) {
    constexpr int terms = sizeof(C) == 4 ? 9 : 15;
    C factor = 1;
    UNROLL for (int k = terms; k > 2; k--) factor = 1 - factor * r * (C)(1.0 / k);
    return (C)0.5 * r * r * factor;
}

// 16-bit numbers are storage alone: everything is computed in float or double and rounded once, to nearest, ties to
// even.

struct Half {
    uint16_t bits;
};

struct BFloat {
    uint16_t bits;
};

BOTH float widen(float x) { return x; }
BOTH double widen(double x) { return x; }
BOTH float widen(BFloat x) { return of_bits<float>((uint32_t)x.bits << 16); }

BOTH float widen(Half x) {
#if defined(__CUDACC__)
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    uint32_t subnormal = bits_of((float)(int)rest * 0x1p-24f);
    uint32_t normal = (rest << 13) + (rest >= 0x7c00 ? 0x70000000 : 0x38000000);
    return of_bits<float>(sign | (rest < 0x400 ? subnormal : normal));
#endif
}

BOTH void round_to(float x, float& y) { y = x; }
BOTH void round_to(double x, double& y) { y = x; }
BOTH void round_to(double x, float& y) { y = (float)x; }
BOTH void round_to(float x, double& y) { y = x; }

BOTH void round_to(float x, BFloat& y) {
#if defined(__CUDACC__)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    y.bits = (uint16_t)(x == x ? rounded : 0x7fc0);
#endif
}

BOTH void round_to(float x, Half& y) {
#if defined(__CUDACC__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    // Added to 1/2, a float keeps as many digits as a subnormal half has.
    uint32_t subnormal = bits_of(of_bits<float>(rest) + 0.5f) - 0x3f000000;
    uint32_t normal = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
    uint32_t rounded = rest < 0x38800000 ? subnormal : normal;
    rounded = rest >= 0x477ff000 ? 0x7c00 : rounded;
    y.bits = (uint16_t)(rest > 0x7f800000 ? 0x7e00 : sign | rounded);
#endif
}

// Rounded to odd on the way, or a double would be rounded twice.
BOTH float rounded_to_odd(double x) {
    float y = (float)x;
    double back = y;
    uint32_t bits = bits_of(y);
    bits -= (back < 0 ? -back : back) > (x < 0 ? -x : x) ? 1 : 0;
    return of_bits<float>(back == x || x != x ? bits_of(y) : bits | 1);
}

BOTH void round_to(double x, BFloat& y) { round_to(rounded_to_odd(x), y); }
BOTH void round_to(double x, Half& y) { round_to(rounded_to_odd(x), y); }

template <class Y, class X>
BOTH Y rounded(X x) {
    Y y;
    round_to(x, y);
    return y;
}

BOTH float with_positive_zero(float x) { return x + 0; }
BOTH double with_positive_zero(double x) { return x + 0; }
BOTH Half with_positive_zero(Half x) { return x.bits == 0x8000 ? Half{0} : x; }
BOTH BFloat with_positive_zero(BFloat x) { return x.bits == 0x8000 ? BFloat{0} : x; }

// The integer that stands for a number in the order of numbers, -0 with 0: negative NaN, -inf, the numbers, inf, NaN.
template <class X>
BOTH PlaceOf<X> place(X x) {
    using P = PlaceOf<X>;
    constexpr int sign = 8 * sizeof(X) - 1;
    constexpr P magnitude = (P)((BitsOf<X>)~(BitsOf<X>)0 >> 1);
    P bits = (P)bits_of(with_positive_zero(x));
    return bits ^ (bits >> sign & magnitude);
}

template <class X>
BOTH X number(PlaceOf<X> at) {
    using P = PlaceOf<X>;
    constexpr int sign = 8 * sizeof(X) - 1;
    constexpr P magnitude = (P)((BitsOf<X>)~(BitsOf<X>)0 >> 1);
    return of_bits<X>((BitsOf<X>)(at ^ (at >> sign & magnitude)));
}

BOTH int bit_length(uint64_t v) {
#if defined(__CUDACC__)
    return 64 - __clzll(v);
#else
    return v ? 64 - __builtin_clzll(v) : 0;
#endif
}

// ⌈p·total⌉, at least 1, since the first token always stays. The product is rounded to double, as in the formula: then
// 0.9, which is above 9/10, asks for nine of ten equal masses.
BOTH uint64_t share_of(double p, uint64_t total) {
    const double product = p * (double)total;
    uint64_t share = (uint64_t)product;
    share += (double)share < product;
    return share < 1 ? 1 : share < total ? share : total;
}

// A subnormal temperature is taken for 0, as some libraries do.
template <class C>
BOTH bool is_zero_temperature(C value) {
    return value >= 0 && value < least_normal<C>;
}

// A row's temperature T. At the limits a distance d from the maximum becomes -inf below `bound`, and at T = inf d / inf is
// 0 for all that exists; where T has no answer the divisors are NaN. Above 1 distances are halved, as the divisor is, since
// one that overflows may have a quotient that does not.
template <class C>
struct Temperature {
    C half, divisor, bound, whole;
    bool limit;
};

template <class C>
BOTH Temperature<C> temperature_of(C value) {
    bool zero = is_zero_temperature(value), limit = zero || value == infinity<C>();
    C whole = zero ? 1 : value >= 0 ? value : nan_of<C>();
    C bound = zero ? 0 : value == infinity<C>() ? -largest<C> : -infinity<C>();
    C half = value > 1 ? (C)0.5 : (C)1;
    return Temperature<C>{half, half * whole, bound, whole, limit};
}

// x - top, halved: both products are exact.
template <class C>
BOTH C halved_distance(C x, C top, C half) {
    return half * x - half * top;
}

// (x - top) / T for a halved distance.
template <class C>
BOTH C over_temperature(C distance, C divisor, C bound) {
    C z = distance / divisor;
    return distance < bound ? -infinity<C>() : z;
}

// A tangent or cotangent over T: nothing moves at the limits, but NaN stays.
template <class C>
BOTH C slope_over_temperature(C slope, const Temperature<C>& t) {
    return t.limit ? 0 * slope : slope / t.whole;
}

struct Words {
    Word first, second;
};

BOTH Word rotated(Word x, int by) { return x << by | x >> (32 - by); }

// Threefry-2x32 with 20 rounds: the block for the counter (index, domain).
// Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
BOTH Words random_words(Words key, Word index, Word domain) {
    constexpr int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    const Word schedule[3] = {key.first, key.second, key.first ^ key.second ^ 0x1BD11BDA};
    Word a = index + key.first, b = domain + key.second;
    UNROLL for (int group = 0; group < 5; group++) {
        UNROLL for (int i = 0; i < 4; i++) {
            a += b;
            b = rotated(b, rotations[group % 2][i]) ^ a;
        }
        a += schedule[(group + 1) % 3];
        b += schedule[(group + 2) % 3] + (Word)group + 1;
    }
    return Words{a, b};
}

enum Domain : Word { BLOCK_VARIATES = 1, TOKEN_VARIATES = 2, NEW_KEYS = 3 };

// In (0, 1), with the resolution of 32 bits near 0. Every step is exact or rounded as the array formula rounds it.
BOTH float uniform_of(Word word) {
    float u = ((float)(int)(word >> 16) * 65536.0f + (float)(int)(word & 65535) + 0.5f) * 0x1p-32f;
    constexpr float most = 1.0f - 0x1p-24f;
    return u < most ? u : most;
}

BOTH float gumbel_of(Word word) { return -log(-log1p(-uniform_of(word))); }
