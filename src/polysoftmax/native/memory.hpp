// Memory: how entries come from any layout and dtype, and go back.
#pragma once

#include <stdint.h>

#include "arithmetic.hpp"
#include "problem.hpp"

// A count in floats: the next whole number, and -1 for NaN, which no language's conversion is sure of.
template <class From>
BOTH int64_t count_of(From x) {
    const From limit = (From)0x1p62;
    if (!(x > -limit)) return -1;
    if (x >= limit) return (int64_t)1 << 62;
    int64_t whole = (int64_t)x;
    return whole + (whole < x);
}

template <class To, class From>
BOTH To converted(From x) {
    if constexpr (!(To)0.5 && (From)0.5) return (To)count_of(x);
    else return (To)x;
}
template <class To>
BOTH To converted(Half x) { return (To)widen(x); }
template <class To>
BOTH To converted(BFloat x) { return (To)widen(x); }

#if defined(__F16C__)
// The instructions of the CPU, eight at a time; a NaN is the same one everywhere.
using Eight = float __attribute__((vector_size(32)));
using EightAnywhere = float __attribute__((vector_size(32), aligned(4), may_alias));
using EightHalves = short __attribute__((vector_size(16)));
using EightHalvesAnywhere = short __attribute__((vector_size(16), aligned(2), may_alias));

inline void widen_all(const Half* from, float* to, int64_t count) {
    for (; count >= 8; count -= 8, from += 8, to += 8) {
        *(EightAnywhere*)to = __builtin_ia32_vcvtph2ps256(*(const EightHalvesAnywhere*)from);
    }
    for (int64_t i = 0; i < count; i++) to[i] = widen(from[i]);
}

inline void round_all_to_half(const float* from, Half* to, int64_t count) {
    const Eight nan = Eight{} + __builtin_nanf("");
    for (; count >= 8; count -= 8, from += 8, to += 8) {
        Eight x = *(const EightAnywhere*)from;
        *(EightHalvesAnywhere*)to = (EightHalves)__builtin_ia32_vcvtps2ph256(x == x ? x : nan, 0);
    }
    for (int64_t i = 0; i < count; i++) round_to(from[i], to[i]);
}
#endif

template <class To, class From>
void convert_from(const char* from, To* to, int64_t count) {
    const From* x = (const From*)from;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; i++) to[i] = converted<To>(x[i]);
}

template <class To>
void load(int dtype, const char* from, To* to, int64_t count) {
    switch (dtype) {
        case BOOL:
        case UINT8: return convert_from<To, uint8_t>(from, to, count);
        case INT8: return convert_from<To, int8_t>(from, to, count);
        case INT16: return convert_from<To, int16_t>(from, to, count);
        case UINT16: return convert_from<To, uint16_t>(from, to, count);
        case INT32: return convert_from<To, int32_t>(from, to, count);
        case UINT32: return convert_from<To, uint32_t>(from, to, count);
        case INT64: return convert_from<To, int64_t>(from, to, count);
        case UINT64: return convert_from<To, uint64_t>(from, to, count);
        case FLOAT16:
#if defined(__F16C__)
            if constexpr (sizeof(To) == 4 && (To)0.5) return widen_all((const Half*)from, to, count);
#endif
            return convert_from<To, Half>(from, to, count);
        case BFLOAT16: return convert_from<To, BFloat>(from, to, count);
        case FLOAT32: return convert_from<To, float>(from, to, count);
        case FLOAT64: return convert_from<To, double>(from, to, count);
    }
}

template <class To, class From>
void round_all(const From* from, char* to, int64_t count) {
    To* y = (To*)to;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; i++) round_to(from[i], y[i]);
}

template <class C>
void store(int dtype, const C* from, char* to, int64_t count) {
    switch (dtype) {
        case FLOAT16:
#if defined(__F16C__)
            if constexpr (sizeof(C) == 4) return round_all_to_half(from, (Half*)to, count);
#endif
            return round_all<Half>(from, to, count);
        case BFLOAT16: return round_all<BFloat>(from, to, count);
        case FLOAT32: return round_all<float>(from, to, count);
        case FLOAT64: return round_all<double>(from, to, count);
    }
}

using Line = uint32_t __attribute__((vector_size(32)));
using LineAnywhere = uint32_t __attribute__((vector_size(32), aligned(1), may_alias));

// Transpose eight lines of eight words each, in three steps that swap what stands off the diagonal of ever larger squares.
BOTH void transpose(Line (&a)[8]) {
    Line b[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; k += 2) {
        b[k] = __builtin_shuffle(a[k], a[k + 1], Line{0, 8, 2, 10, 4, 12, 6, 14});
        b[k + 1] = __builtin_shuffle(a[k], a[k + 1], Line{1, 9, 3, 11, 5, 13, 7, 15});
    }
#pragma GCC unroll 8
    for (int k = 0; k < 8; k += 4) {
#pragma GCC unroll 8
        for (int i = k; i < k + 2; i++) {
            a[i] = __builtin_shuffle(b[i], b[i + 2], Line{0, 1, 8, 9, 4, 5, 12, 13});
            a[i + 2] = __builtin_shuffle(b[i], b[i + 2], Line{2, 3, 10, 11, 6, 7, 14, 15});
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        b[i] = __builtin_shuffle(a[i], a[i + 4], Line{0, 1, 2, 3, 8, 9, 10, 11});
        b[i + 4] = __builtin_shuffle(a[i], a[i + 4], Line{4, 5, 6, 7, 12, 13, 14, 15});
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) a[i] = b[i];
}

// Move rows of eight words or more by squares, from lines at `from(k)` to lines at `to(k)`. The last square overlaps the
// one before it.
template <class From, class To>
BOTH void move_squares(int64_t length, From from, To to) {
    for (int64_t start = 0; start < length; start += 8) {
        int64_t j = start + 8 < length ? start : length - 8;
        Line lines[8];
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) lines[k] = *(const LineAnywhere*)from(j, k);
        transpose(lines);
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) *(LineAnywhere*)to(j, k) = lines[k];
    }
}

// Move the entries of rows that lie anywhere: entry j of row r at places[r] + j·step there, and at [r·pitch + j] or, where
// rows stand across, at [j·lanes + r] here. There, nothing need be aligned.
template <class T, bool in>
struct Move {
    T* here;
    char* const* places;
    int64_t rows, length, step, pitch, lanes;

    void all() const {
        constexpr int64_t size = sizeof(T);
        const bool packed = step == size, across = lanes != 0;
        const bool evenly = even(0, rows, length * size), neighbours = !packed && even(0, rows, size);
        if (packed && !across) {
            for (int64_t r = 0; r < rows; r++) copy(here + r * pitch, places[r], length);
        } else if (neighbours && across) {
            for (int64_t j = 0; j < length; j++) copy(here + j * lanes, places[0] + j * step, rows);
        } else if (size == 4 && length >= 8 && (neighbours || packed)) {
            const int64_t whole = rows / 8 * 8;
            for (int64_t r = 0; r < whole; r += 8) squares(r, packed);
            entries(whole, rows);
        } else if (packed && evenly && rows == 32) {
            switch (length) {
                case 2: return few<2>();
                case 3: return few<3>();
                case 4: return few<4>();
                case 5: return few<5>();
                case 6: return few<6>();
                case 7: return few<7>();
                default: return entries(0, rows);
            }
        } else {
            entries(0, rows);
        }
    }

    BOTH static void copy(T* here, char* there, int64_t count) {
        if (in) __builtin_memcpy(here, there, count * sizeof(T));
        else __builtin_memcpy(there, here, count * sizeof(T));
    }

    BOTH static void one(T* here, char* there) {
        if (in) __builtin_memcpy(here, there, sizeof(T));
        else __builtin_memcpy(there, here, sizeof(T));
    }

    bool even(int64_t first, int64_t last, int64_t apart) const {
        bool found = true;
        for (int64_t r = first + 1; r < last; r++) found &= places[r] - places[r - 1] == apart;
        return found;
    }

    void squares(int64_t r, bool packed) const {
        // In locals: as far as the compiler knows, what is written could change the members.
        char *at[8], *const own = (char*)(here + (lanes ? r : r * pitch));
        for (int k = 0; k < 8; k++) at[k] = places[r + k];
        const int64_t line = (lanes ? lanes : pitch) * (int64_t)sizeof(T), count = length, apart = step;
        auto across_here = [=](int64_t j, int k) { return own + (j + k) * line; };
        auto across_there = [=](int64_t j, int k) { return at[0] + (j + k) * apart; };
        auto along_here = [=](int64_t j, int k) { return own + k * line + j * (int64_t)sizeof(T); };
        auto along_there = [=](int64_t j, int k) { return at[k] + j * apart; };
        if (packed && in) move_squares(count, along_there, across_here);
        else if (packed) move_squares(count, across_here, along_there);
        else if (in) move_squares(count, across_there, along_here);
        else move_squares(count, along_here, across_there);
    }

    // Rows of so few entries, one behind the other, for as many lanes as there are.
    template <int n>
    void few() const {
        for (int r = 0; r < 32; r++) {
#pragma GCC unroll 8
            for (int j = 0; j < n; j++) one(here + j * 32 + r, places[0] + (r * n + j) * (int64_t)sizeof(T));
        }
    }

    void entries(int64_t first, int64_t last) const {
        const int64_t of_row = lanes ? 1 : pitch, of_entry = lanes ? lanes : 1, band = 16;
        for (int64_t start = 0; start < length; start += band) {
            int64_t end = start + band < length ? start + band : length;
            for (int64_t r = first; r < last; r++) {
                for (int64_t j = start; j < end; j++) one(here + r * of_row + j * of_entry, places[r] + j * step);
            }
        }
    }
};

template <bool in>
void move_bytes(int size, char* here, char* const* places, int64_t rows, int64_t length, int64_t step, int64_t pitch,
                int64_t lanes) {
    switch (size) {
        case 1: return Move<uint8_t, in>{(uint8_t*)here, places, rows, length, step, pitch, lanes}.all();
        case 2: return Move<uint16_t, in>{(uint16_t*)here, places, rows, length, step, pitch, lanes}.all();
        case 4: return Move<uint32_t, in>{(uint32_t*)here, places, rows, length, step, pitch, lanes}.all();
        case 8: return Move<uint64_t, in>{(uint64_t*)here, places, rows, length, step, pitch, lanes}.all();
    }
}
