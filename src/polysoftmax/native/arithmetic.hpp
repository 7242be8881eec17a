// The arithmetic of the kernels: exponential and logarithm, rounding to 16 bits, the limits of temperature, random
// variates. A function is straight-line code where a loop over it has to become vectors, and it calls nothing: what
// the C library answers differs between machines. A fused multiply-add is written as one; nothing else may become one.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define BOTH __host__ __device__ __forceinline__
#else
#define BOTH inline __attribute__((always_inline))
#endif

using Word = uint32_t;

BOTH float fused(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
BOTH double fused(double x, double y, double z) { return __builtin_fma(x, y, z); }

BOTH uint32_t bits_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof x);
    return bits;
}

BOTH uint64_t bits_of(double x) {
    uint64_t bits;
    __builtin_memcpy(&bits, &x, sizeof x);
    return bits;
}

BOTH float of_bits(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

BOTH double of_bits(uint64_t bits) {
    double x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

// What the functions below need to know of a dtype. `series` of exp is 1 + r + r²·q(r), with q from the values of
// (exp(r) - 1 - r) / r² at Chebyshev's points of |r| ≤ ½ ln 2.
template <class C>
struct Format;

template <>
struct Format<float> {
    using Bits = uint32_t;
    static constexpr int mantissa = 23, bias = 127, exp_degree = 6, log_degree = 4;
    static constexpr float exp_series[] = {1.0f,         1.0f,          0.5f,        0.1666658f,
                                           0.04166655f,  0.008363173f,  0.001392618f};
    static constexpr float exp_least = -105.0f;
    static constexpr float per_ln2 = 1.44269504f, ln2 = 0x1.62e43p-1f, ln2_rest = -0x1.05c61p-29f;
    // ln 2 again, with so few digits in the first part that multiples of it are exact.
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float largest = 0x1.fffffep127f, least_normal = 0x1p-126f;
};

template <>
struct Format<double> {
    using Bits = uint64_t;
    static constexpr int mantissa = 52, bias = 1023, exp_degree = 11, log_degree = 10;
    static constexpr double exp_series[] = {
        1.0, 1.0, 0.5000000000000001, 0.16666666666666669, 0.041666666666624164, 0.008333333333330065,
        0.0013888888917196881, 0.0001984126986304067, 2.4801521322116825e-05, 2.7557268480116333e-06,
        2.762007599981065e-07, 2.5100375924709717e-08};
    static constexpr double exp_least = -746.0;
    static constexpr double per_ln2 = 1.4426950408889634, ln2 = 0x1.62e42fefa39efp-1, ln2_rest = 0x1.abc9e3b39803fp-56;
    static constexpr double ln2_high = 0.6931471803691238, ln2_low = 1.9082149292705877e-10;
    static constexpr double largest = 0x1.fffffffffffffp1023, least_normal = 0x1p-1022;
};

template <class C>
BOTH C infinity() {
    return (C)__builtin_inff();
}

template <class C>
BOTH C nan_of() {
    return (C)__builtin_nanf("");
}

template <class C>
BOTH bool finite(C x) {
    return x - x == 0;
}

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
#pragma GCC unroll 16
    for (int i = F::exp_degree - 1; i >= 0; i--) p = fused(p, r, F::exp_series[i]);
    C y = p * of_bits((typename F::Bits)(bits_of(rounded) << F::mantissa)) * (C)0x1p-64;
    return z < F::exp_least ? 0 : y;
}

// log(u) + small for a normal u > 0: u = 2^k·(1 + f) with 1 + f from √½ to √2, and log(1 + f) = 2·artanh(s) with
// s = f / (2 + f), arranged so that f itself, which is exact, is added last.
template <class C>
BOTH C log_near(C u, C small, C less_exponent) {
    using F = Format<C>;
    using Bits = typename F::Bits;
    constexpr Bits one = (Bits)F::bias << F::mantissa;
    constexpr C shift = power_of_2<C>(F::mantissa);
    const Bits up_to_root = one - bits_of((C)0.70710678118654752);
    Bits bits = bits_of(u), exponent = (bits + up_to_root) >> F::mantissa;
    // There is no vector instruction for a conversion of 64-bit integers everywhere; this one is exact.
    C k = of_bits((Bits)(bits_of(shift) + exponent)) - (shift + F::bias) - less_exponent;
    C f = of_bits((Bits)(bits - (exponent << F::mantissa) + one)) - 1;
    C s = f / (2 + f), square = s * s, half = (C)0.5 * f * f;
    C p = (C)2 / (2 * F::log_degree + 1);
#pragma GCC unroll 16
    for (int i = F::log_degree - 1; i > 0; i--) p = fused(p, square, (C)2 / (2 * i + 1));
    C rest = fused(s, fused(square, p, half), fused(k, F::ln2_low, small));
    return fused(k, F::ln2_high, f - (half - rest));
}

// log(x), within 1 ulp: -inf at 0, NaN below.
template <class C>
BOTH C log(C x) {
    using F = Format<C>;
    constexpr C up = F::mantissa + 2;
    C scaled = x * power_of_2<C>(F::mantissa + 2);
    bool subnormal = x < F::least_normal;
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
BOTH float widen(BFloat x) { return of_bits((uint32_t)x.bits << 16); }

BOTH float widen(Half x) {
    uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    uint32_t subnormal = bits_of((float)(int)rest * 0x1p-24f);
    uint32_t normal = (rest << 13) + (rest >= 0x7c00 ? 0x70000000 : 0x38000000);
    return of_bits(sign | (rest < 0x400 ? subnormal : normal));
}

BOTH void round_to(float x, float& y) { y = x; }
BOTH void round_to(double x, double& y) { y = x; }
BOTH void round_to(double x, float& y) { y = (float)x; }
BOTH void round_to(float x, double& y) { y = x; }

BOTH void round_to(float x, BFloat& y) {
    uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    y.bits = (uint16_t)(x == x ? rounded : 0x7fc0);
}

BOTH void round_to(float x, Half& y) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    // Added to 1/2, a float keeps as many digits as a subnormal half has.
    uint32_t subnormal = bits_of(of_bits(rest) + 0.5f) - 0x3f000000;
    uint32_t normal = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
    uint32_t rounded = rest < 0x38800000 ? subnormal : normal;
    rounded = rest >= 0x477ff000 ? 0x7c00 : rounded;
    y.bits = (uint16_t)(rest > 0x7f800000 ? 0x7e00 : sign | rounded);
}

// Rounded to odd on the way, or a double would be rounded twice.
BOTH float rounded_to_odd(double x) {
    float y = (float)x;
    double back = y;
    uint32_t bits = bits_of(y);
    bits -= (back < 0 ? -back : back) > (x < 0 ? -x : x) ? 1 : 0;
    return of_bits(back == x || x != x ? bits_of(y) : bits | 1);
}

BOTH void round_to(double x, BFloat& y) { round_to(rounded_to_odd(x), y); }
BOTH void round_to(double x, Half& y) { round_to(rounded_to_odd(x), y); }

// A row's temperature T. At the limits a distance d from the maximum becomes -inf below `bound`, and at T = inf d / inf is
// 0 for all that exists; where T has no answer the divisor is NaN.
template <class C>
struct Temperature {
    C divisor, bound;
    bool regular;
};

template <class C>
BOTH Temperature<C> temperature_of(C value) {
    bool regular = value > 0 && value < infinity<C>();
    C divisor = value == 0 ? 1 : value >= 0 ? value : nan_of<C>();
    C bound = value == 0 ? 0 : value == infinity<C>() ? -Format<C>::largest : -infinity<C>();
    return Temperature<C>{divisor, bound, regular};
}

// (x - max) / T for a distance from the maximum.
template <class C>
BOTH C over_temperature(C distance, C divisor, C bound) {
    C z = distance / divisor;
    return distance < bound ? -infinity<C>() : z;
}

template <class C>
BOTH C over_temperature(C distance, const Temperature<C>& t) {
    return over_temperature(distance, t.divisor, t.bound);
}

// A tangent or cotangent over T: nothing moves at the limits.
template <class C>
BOTH C over_regular_temperature(C slope, const Temperature<C>& t) {
    return t.regular ? slope / t.divisor : 0;
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
#pragma GCC unroll 5
    for (int group = 0; group < 5; group++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
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
