// Rows: how a formula sees them, and how they come from and go back to memory of any layout and dtype.
//
// A formula is written once, as reductions and maps over an index i, on contiguous rows of the compute dtype. Long rows
// run `Along`: the lanes of a vector hold neighbours of one row, and a row's values (its maximum, a sum) are scalars.
// Many short rows run `Across`: each lane holds a row of its own, and a row's values are vectors. Few short ones run
// along, too, in memory that is padded to whole vectors. The order of every sum follows from the length of the row alone,
// never from the rows around it, threads, strides or the width of vectors.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "arithmetic.hpp"

using Pieces = void (*)(int64_t count, void (*piece)(void* context, int64_t index), void* context);

template <class C, int K>
struct Terms {
    C term[K];
};

template <class C, int K>
BOTH Terms<C, K> operator+(Terms<C, K> a, const Terms<C, K>& b) {
    for (int k = 0; k < K; k++) a.term[k] += b.term[k];
    return a;
}

// A sum of parts that come one by one, in a tree: equal numbers of parts meet, as bits do when a counter is incremented.
template <class T>
struct Tree {
    T waiting[64];
    uint64_t count = 0;
    int depth = 0;

    void add(T part) {
        for (uint64_t c = count++; c & 1; c >>= 1) part = waiting[--depth] + part;
        waiting[depth++] = part;
    }

    T total() {
        T sum = waiting[--depth];
        while (depth) sum = waiting[--depth] + sum;
        return sum;
    }
};

// A vector of 32 bytes, and one of places in it.
template <class C>
struct Lanes;
template <>
struct Lanes<float> {
    using Type = float __attribute__((vector_size(32), may_alias));
    using Places = int32_t __attribute__((vector_size(32)));
};
template <>
struct Lanes<double> {
    using Type = double __attribute__((vector_size(32), may_alias));
    using Places = int64_t __attribute__((vector_size(32)));
};

// Entries of a row that are added in eights, and the sums of these one by one: the order of short rows.
constexpr int longest_in_eights = 64, eight = 8;

// Rows that are `padded` have entries up to the next multiple of `vector`: logits of -inf, and else 0, which add nothing.
template <class C, bool padded = false>
struct Along {
    static constexpr int lanes = 256 / sizeof(C), chunk = 16 * lanes;
    static constexpr int64_t shortest_piece = 64 * chunk;
    static constexpr int most_pieces = 256, vector = 16, longest_padded = 1024 / sizeof(C);
    using Real = C;
    using Index = int64_t;
    using Lane = typename Lanes<C>::Type;

    template <class T>
    struct Value {
        T value;
        BOTH T operator[](int64_t) const { return value; }
    };

    template <class T>
    struct Column {
        T* entries;
        explicit operator bool() const { return entries; }
        BOTH T& operator[](int64_t i) const { return entries[i]; }
        BOTH T& at(int64_t, int64_t i) const { return entries[i]; }
    };

    int64_t n;
    char* const* operands;
    Pieces pieces;    // shares a long row between threads; null where threads have rows of their own

    template <class T = C>
    Column<T> column(int k) const {
        return Column<T>{(T*)operands[k]};
    }

    template <class T = C>
    Value<T> value(int k, T otherwise = 0) const {
        return Value<T>{operands[k] ? *(const T*)operands[k] : otherwise};
    }

    void put(int k, Value<C> row) const { *(C*)operands[k] = row.value; }

    template <class F>
    BOTH auto row(F f) const -> Value<decltype(f(int64_t()))> {
        return {f(int64_t(0))};
    }

    template <class F>
    BOTH bool some(F f) const {
        return f(int64_t(0));
    }

    // What a loop over the last `count` entries of a row runs to. The compiler sees that no part of a vector is left.
    BOTH static int64_t to_the_end(int64_t count) { return padded ? (count + vector - 1) / vector * vector : count; }

    // Cut at places that depend on n alone.
    int64_t piece() const {
        int64_t size = shortest_piece;
        while (size * most_pieces < n) size *= 2;
        return size;
    }

    template <class F>
    void by_pieces(F f) const {
        int64_t size = piece();
        struct Context {
            F& f;
            int64_t size, n;
        } context{f, size, n};
        auto one = [](void* given, int64_t k) {
            Context& c = *(Context*)given;
            int64_t start = k * c.size;
            c.f(k, start, start + c.size < c.n ? start + c.size : c.n);
        };
        int64_t count = (n + size - 1) / size;
        if (pieces) {
            pieces(count, one, &context);
        } else {
            for (int64_t k = 0; k < count; k++) one(&context, k);
        }
    }

    template <class F>
    Value<C> max(F f) const {
        if (n <= shortest_piece || !pieces) return {max_between(0, n, f)};
        C tops[most_pieces], top = -infinity<C>();
        by_pieces([&](int64_t k, int64_t start, int64_t end) { tops[k] = max_between(start, end, f); });
        for (int64_t k = 0, size = piece(); k * size < n; k++) top = tops[k] > top ? tops[k] : top;
        return {top};
    }

    template <class F>
    Value<C> sum(F f) const {
        return {sums<1>([&](int64_t i) { return Terms<C, 1>{{f(i)}}; }).term[0]};
    }

    // Σ of K terms an entry, in one pass.
    template <int K, class F>
    Terms<C, K> sums(F f) const {
        if (n <= shortest_piece || !pieces) return sums_between<K>(0, n, f);
        Terms<C, K> parts[most_pieces];
        by_pieces([&](int64_t k, int64_t start, int64_t end) { parts[k] = sums_between<K>(start, end, f); });
        Tree<Terms<C, K>> tree;
        for (int64_t k = 0, size = piece(); k * size < n; k++) tree.add(parts[k]);
        return tree.total();
    }

    template <int K>
    BOTH static Value<C> term(const Terms<C, K>& terms, int k) {
        return {terms.term[k]};
    }

    template <class F>
    void each(F f) const {
        if (n <= shortest_piece || !pieces) return each_between(0, n, f);
        by_pieces([&](int64_t, int64_t start, int64_t end) { each_between(start, end, f); });
    }

  private:
    template <class F>
    __attribute__((noinline)) static void each_between(int64_t start, int64_t end, F f) {
        const int64_t last = start + to_the_end(end - start);
#pragma GCC ivdep
        for (int64_t i = start; i < last; i++) f(i);
    }

    // What a row's entries are made into stands in memory, chunk by chunk, before it is reduced: loops of the one kind and
    // of the other both become vectors, and keep all they need in registers.
    template <class F>
    __attribute__((noinline)) static C max_between(int64_t start, int64_t end, F f) {
        alignas(64) C entries[chunk];
        C top = -infinity<C>();
        for (; start < end; start += chunk) {
            const int count = (int)to_the_end(start + chunk < end ? chunk : end - start);
#pragma GCC ivdep
            for (int l = 0; l < count; l++) entries[l] = f(start + l);
            const C greatest = in_lanes(entries, count, -infinity<C>(), [](Lane x, Lane y) { return y > x ? y : x; });
            top = greatest > top ? greatest : top;
        }
        return top;
    }

    template <int K, class F>
    BOTH static Terms<C, K> chunk_sums(int64_t start, int64_t n, F& f) {
        alignas(64) C terms[K][chunk];
        const int count = (int)to_the_end(n);
#pragma GCC ivdep
        for (int l = 0; l < count; l++) {
            Terms<C, K> entry = f(start + l);
#pragma GCC unroll 4
            for (int k = 0; k < K; k++) terms[k][l] = entry.term[k];
        }
        Terms<C, K> total;
#pragma GCC unroll 4
        for (int k = 0; k < K; k++) {
            total.term[k] = padded && n <= longest_in_eights
                                ? in_eights(terms[k], (int)n)
                                : in_lanes(terms[k], count, 0, [](Lane x, Lane y) { return x + y; });
        }
        return total;
    }

    template <int K, class F>
    __attribute__((noinline)) static Terms<C, K> sums_between(int64_t start, int64_t end, F f) {
        if (end - start <= chunk) return chunk_sums<K>(start, end - start, f);
        Tree<Terms<C, K>> tree;
        for (; start < end; start += chunk) tree.add(chunk_sums<K>(start, start + chunk < end ? chunk : end - start, f));
        return tree.total();
    }

    static C in_eights(const C* x, int n) {
        C total = 0;
        for (int start = 0; start < n; start += eight) {
            const int end = start + eight < n ? start + eight : n;
            C part = 0;
            for (int l = start; l < end; l++) part += x[l];
            total += part;
        }
        return total;
    }

    // Entry i goes to lane i % lanes; then halves of the lanes meet. What follows the entries is overwritten.
    template <class Meet>
    BOTH static C in_lanes(C* x, int count, C nothing, Meet meet) {
        constexpr int width = sizeof(Lane) / sizeof(C), vectors = lanes / width;
        for (; count % width; count++) x[count] = nothing;
        for (; count % lanes; count += width) *(Lane*)(x + count) = Lane{} + nothing;
        Lane met[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) met[v] = Lane{} + nothing;
        for (int l = 0; l < count; l += lanes) {
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) met[v] = meet(met[v], ((const Lane*)(x + l))[v]);
        }
#pragma GCC unroll 4
        for (int half = vectors / 2; half; half /= 2) {
#pragma GCC unroll 4
            for (int v = 0; v < half; v++) met[v] = meet(met[v], met[v + half]);
        }
        return across_lane(met[0], meet);
    }

    template <class Meet>
    BOTH static C across_lane(Lane x, Meet meet) {
        using Places = typename Lanes<C>::Places;
        if constexpr (sizeof(C) == 4) {
            x = meet(x, __builtin_shuffle(x, Places{4, 5, 6, 7, 0, 1, 2, 3}));
            x = meet(x, __builtin_shuffle(x, Places{2, 3, 0, 1, 6, 7, 4, 5}));
            x = meet(x, __builtin_shuffle(x, Places{1, 0, 3, 2, 5, 4, 7, 6}));
        } else {
            x = meet(x, __builtin_shuffle(x, Places{2, 3, 0, 1}));
            x = meet(x, __builtin_shuffle(x, Places{1, 0, 3, 2}));
        }
        return x[0];
    }
};

template <class C>
struct Across {
    // More than 16, or GCC would unroll the loops over them before it makes vectors.
    static constexpr int lanes = 32;
    using Real = C;

    struct Index {
        int j, lane;
    };

    template <class T>
    struct Value {
        T values[lanes];
        BOTH T operator[](Index i) const { return values[i.lane]; }
    };

    template <class T>
    struct Column {
        T* entries;    // those of one place in all rows stand side by side
        explicit operator bool() const { return entries; }
        BOTH T& operator[](Index i) const { return entries[i.j * lanes + i.lane]; }
        BOTH T& at(Index row, int64_t i) const { return entries[i * lanes + row.lane]; }
    };

    int64_t n;
    char* const* operands;

    template <class T = C>
    Column<T> column(int k) const {
        return Column<T>{(T*)operands[k]};
    }

    template <class T = C>
    Value<T> value(int k, T otherwise = 0) const {
        Value<T> row;
        for (int l = 0; l < lanes; l++) row.values[l] = operands[k] ? ((const T*)operands[k])[l] : otherwise;
        return row;
    }

    void put(int k, const Value<C>& row) const {
        for (int l = 0; l < lanes; l++) ((C*)operands[k])[l] = row.values[l];
    }

    template <class F>
    BOTH auto row(F f) const -> Value<decltype(f(Index()))> {
        Value<decltype(f(Index()))> values;
#pragma GCC ivdep
        for (int l = 0; l < lanes; l++) values.values[l] = f(Index{0, l});
        return values;
    }

    template <class F>
    BOTH bool some(F f) const {
        bool found = false;
        for (int l = 0; l < lanes; l++) found |= f(Index{0, l});
        return found;
    }

    template <class F>
    BOTH Value<C> max(F f) const {
        Value<C> top;
        for (int l = 0; l < lanes; l++) top.values[l] = -infinity<C>();
        for (int j = 0; j < n; j++) {
#pragma GCC ivdep
            for (int l = 0; l < lanes; l++) {
                C v = f(Index{j, l});
                top.values[l] = v > top.values[l] ? v : top.values[l];
            }
        }
        return top;
    }

    template <class F>
    BOTH Value<C> sum(F f) const {
        return sums<1>([&](Index i) { return Terms<C, 1>{{f(i)}}; }).sum[0];
    }

    template <int K>
    struct Sums {
        Value<C> sum[K];
    };

    template <int K, class F>
    BOTH Sums<K> sums(F f) const {
        Sums<K> total = {};
        for (int start = 0; start < n; start += eight) {
            Sums<K> part = {};
            int end = start + eight < n ? start + eight : (int)n;
            for (int j = start; j < end; j++) {
#pragma GCC ivdep
                for (int l = 0; l < lanes; l++) {
                    Terms<C, K> terms = f(Index{j, l});
#pragma GCC unroll 4
                    for (int k = 0; k < K; k++) part.sum[k].values[l] += terms.term[k];
                }
            }
            for (int k = 0; k < K; k++) {
                for (int l = 0; l < lanes; l++) total.sum[k].values[l] += part.sum[k].values[l];
            }
        }
        return total;
    }

    template <int K>
    BOTH static Value<C> term(const Sums<K>& sums, int k) {
        return sums.sum[k];
    }

    template <class F>
    BOTH void each(F f) const {
        for (int j = 0; j < n; j++) {
#pragma GCC ivdep
            for (int l = 0; l < lanes; l++) f(Index{j, l});
        }
    }
};

// Some rows for the kernels that select and draw: entry j of row r at [r·n + j]. What is absent is null.
template <class C>
struct Block {
    int64_t rows, n;
    const C* x;
    const uint8_t* where;
    const C* temperature;    // one number a row, as k, p, min_p
    const int64_t* k;
    const C* p;
    const C* min_p;
    int64_t top_k, draws;    // 0: no top_k that is common to all rows
    bool one_key;            // to be folded with the index of each row
    const int32_t* keys;     // 2·draws words a row, or 2 words a row (the same) where there is one key
    const int64_t* index;    // of each row in the batch, in C order
    C* y;
    int64_t* tokens;         // draws a row, as logprobs
    C* logprobs;
    const int32_t* words[4];
    int32_t* answers[2];
    Pieces pieces;           // null, or: there is so little to share that the threads may share a row
};

enum DType { BOOL, INT8, UINT8, INT16, UINT16, INT32, UINT32, INT64, UINT64, FLOAT16, BFLOAT16, FLOAT32, FLOAT64, DTYPES };

// What the address of an operand is: absent, that of its data, that of NumPy's description of the array, or no address but
// a float64 number.
enum Address { ABSENT, DATA, DESCRIPTION, NUMBER, ADDRESSES };

// What NumPy's __array_struct__ points at.
struct Description {
    int version, dimensions;
    char kind;
    int size, flags;
    const int64_t *shape, *strides;
    void* data;
};

inline int size_of(int dtype) {
    constexpr int8_t sizes[DTYPES] = {1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8};
    return sizes[dtype];
}

template <class T>
struct Code;
template <> struct Code<uint8_t> { static constexpr int dtype = UINT8; };
template <> struct Code<int32_t> { static constexpr int dtype = INT32; };
template <> struct Code<int64_t> { static constexpr int dtype = INT64; };
template <> struct Code<float> { static constexpr int dtype = FLOAT32; };
template <> struct Code<double> { static constexpr int dtype = FLOAT64; };

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

constexpr int most_operands = 12, most_dimensions = 17;

struct Operand {
    char* data;
    int dtype;
    int64_t step, strides[most_dimensions];
};

struct Problem {
    int kernel, dimensions, count, compute;
    int64_t n, rows, options[8], shape[most_dimensions];
    Operand operands[most_operands];
    int64_t index_strides[most_dimensions];    // of the rows in C order

    double real_option(int k) const {
        double x;
        __builtin_memcpy(&x, &options[k], sizeof x);
        return x;
    }
};

// Read the words of a problem. Dimensions are put into the order in which x lies in memory, and joined where all operands
// allow: what is computed for a row does not depend on when.
inline bool parse(const int64_t* words, const int64_t* addresses, Problem& p) {
    p.kernel = (int)words[0];
    int64_t dimensions = words[1];
    p.n = words[2];
    p.count = (int)words[3];
    p.compute = (int)words[4];
    if (dimensions < 0 || dimensions > 16 || p.n < 0 || words[3] < 1 || words[3] > most_operands) return false;
    if (words[0] != p.kernel || words[4] != p.compute) return false;
    if (p.compute != FLOAT32 && p.compute != FLOAT64) return false;
    for (int k = 0; k < 8; k++) p.options[k] = words[5 + k];
    const int64_t* shape = words + 13;
    const int64_t* operands = shape + dimensions;
    const int64_t width = 3 + dimensions;
    int order[most_dimensions];
    int64_t c_strides[most_dimensions], rows = 1;
    for (int d = (int)dimensions - 1; d >= 0; d--) {
        if (shape[d] < 0) return false;
        c_strides[d] = rows;
        rows *= shape[d];
    }
    p.rows = rows;
    auto reach = [&](int d) { return operands[3 + d] < 0 ? -operands[3 + d] : operands[3 + d]; };
    int kept = 0;
    for (int d = 0; d < dimensions; d++) {
        if (shape[d] == 1) continue;
        int at = kept++;
        for (; at > 0 && reach(order[at - 1]) < reach(d); at--) order[at] = order[at - 1];
        order[at] = d;
    }
    for (int k = 0; k < p.count; k++) {
        const int64_t* from = operands + k * width;
        Operand& one = p.operands[k];
        one.data = from[0] == ABSENT ? nullptr : from[0] == NUMBER ? (char*)&addresses[k] : (char*)addresses[k];
        one.dtype = (int)from[1];
        one.step = from[2];
        if (from[0] < 0 || from[0] >= ADDRESSES) return false;
        if (one.data && (from[1] < 0 || from[1] >= DTYPES)) return false;
        if (from[0] == DESCRIPTION) one.data = (char*)((const Description*)one.data)->data;
    }
    p.dimensions = 0;
    for (int i = 0; i < kept; i++) {
        int d = order[i], last = p.dimensions - 1;
        bool joins = last >= 0 && p.index_strides[last] == c_strides[d] * shape[d];
        for (int k = 0; joins && k < p.count; k++) {
            joins = !p.operands[k].data || p.operands[k].strides[last] == operands[k * width + 3 + d] * shape[d];
        }
        if (!joins) p.dimensions = ++last + 1;
        p.shape[last] = joins ? p.shape[last] * shape[d] : shape[d];
        p.index_strides[last] = c_strides[d];
        for (int k = 0; k < p.count; k++) p.operands[k].strides[last] = operands[k * width + 3 + d];
    }
    return true;
}

// The places of rows, `first` and those behind it.
inline void locate(const Problem& p, char* data, const int64_t* strides, int64_t first, int64_t count, char** places) {
    if (p.dimensions <= 1) {
        for (int64_t r = 0; r < count; r++) places[r] = data + (p.dimensions ? (first + r) * strides[0] : 0);
        return;
    }
    int64_t at[most_dimensions], rest = first;
    for (int d = p.dimensions - 1; d >= 0; d--) {
        at[d] = rest % p.shape[d];
        rest /= p.shape[d];
        data += at[d] * strides[d];
    }
    for (int64_t r = 0; r < count; r++) {
        places[r] = data;
        for (int d = p.dimensions - 1; d >= 0; d--) {
            data += strides[d];
            if (++at[d] < p.shape[d]) break;
            data -= at[d] * strides[d];
            at[d] = 0;
        }
    }
}

// What a formula takes and gives, a letter for each operand: logits (x), other reals (r, R), weights (o) and a mask (m) of n
// entries a row; a real (v, V) or an integer (i) a row; words (w, W); keys (k), tokens (T) and log-probabilities (L).
// Capitals are written. Behind the operands come `scratch` rows that the formula needs for itself.
template <class C>
struct Formula {
    const char* letters;
    int scratch;
    void (*along)(const Problem&, Along<C>&);
    void (*padded)(const Problem&, Along<C, true>&);
    void (*across)(const Problem&, Across<C>&);
    void (*block)(const Problem&, const Block<C>&, char* scratch);
    int64_t block_scratch;
    bool fills;    // absent weights, or an absent mask, are a row of ones
};

enum Layout { ALONG, PADDED, ACROSS };

// Some rows of a problem in one layout.
template <class C>
class Run {
  public:
    Run(const Problem& problem, const Formula<C>& formula, Layout layout, int64_t first, int64_t last, Pieces pieces, int threads)
        : p(problem), f(formula), first(first), last(last), share(pieces), threads(threads) {
        across = layout == ACROSS;
        padded = layout == PADDED;
        pitch = padded ? Along<C, true>::to_the_end(p.n) : p.n;
        for (int k = 0; k < p.count + f.scratch; k++) prepare(stages[k], k);
        choose_tile();
    }

    int all() {
        if (first == last) return 0;
        constexpr int64_t work = 1 << 14;
        int64_t per_piece = tile * (1 + work / (tile * (p.n + 16)));
        int64_t count = (last - first + per_piece - 1) / per_piece;
        if (threads > 1 && count < 2 * threads && p.n > 2 * Along<C>::shortest_piece) {
            inside = share;
            some(first, last);
        } else if (threads > 1 && count > 1) {
            this->per_piece = per_piece;
            share(count, [](void* given, int64_t k) { ((Run*)given)->piece(k); }, this);
        } else {
            some(first, last);
        }
        return failed;
    }

  private:
    struct Stage {
        char letter;
        const Operand* operand;    // null for scratch
        int64_t length, pitch;     // entries of a row, and how far the next row is
        int size, dtype;           // of an entry as the formula sees it
        bool writes, aligned, direct;
    };

    const Problem& p;
    const Formula<C>& f;
    const int64_t first, last;
    Pieces share;
    Pieces inside = nullptr;
    int threads;
    bool across, padded;
    int64_t pitch, tile = 1, per_piece = 1;
    int failed = 0;
    Stage stages[most_operands + 4];

    void piece(int64_t k) {
        int64_t start = first + k * per_piece;
        some(start, start + per_piece < last ? start + per_piece : last);
    }

    void prepare(Stage& s, int k) {
        s.operand = k < p.count ? &p.operands[k] : nullptr;
        s.letter = s.operand ? f.letters[k] : 'r';
        auto is_one_of = [&](const char* letters) { return __builtin_strchr(letters, s.letter) != nullptr; };
        bool is_row = is_one_of("xrRomwW"), is_draw = is_one_of("kTL");
        s.length = is_row ? p.n : is_draw ? p.options[1] : 1;
        if (s.letter == 'k') s.length = p.options[2] ? 2 : 2 * s.length;
        s.pitch = is_row ? pitch : s.length;
        s.dtype = s.letter == 'm' ? UINT8 : is_one_of("iT") ? INT64 : is_one_of("wWk") ? INT32 : Code<C>::dtype;
        s.size = size_of(s.dtype);
        s.writes = s.letter >= 'A' && s.letter <= 'Z';
        s.aligned = s.direct = false;
        if (!s.operand || !s.operand->data) return;
        const Operand& one = *s.operand;
        const int size = size_of(one.dtype);
        s.aligned = (int64_t)one.data % size == 0;
        for (int d = 0; d < p.dimensions; d++) s.aligned = s.aligned && one.strides[d] % size == 0;
        bool same = one.dtype == s.dtype || (s.dtype == UINT8 && one.dtype == BOOL) || (s.dtype == INT32 && one.dtype == UINT32);
        bool neighbours = one.step == size || s.length == 1;
        s.direct = same && s.aligned && !across && neighbours && s.pitch == s.length;
        // A block of rows is direct where they follow each other without a gap.
        if (f.block && !(p.dimensions == 0 || (p.dimensions == 1 && one.strides[0] == s.length * s.size))) s.direct = false;
    }

    bool filled(const Stage& s) const {
        return s.operand && !s.operand->data && f.fills && (s.letter == 'm' || s.letter == 'o');
    }

    bool absent(const Stage& s) const { return s.operand && !s.operand->data && !filled(s); }

    void choose_tile() {
        constexpr int64_t most = 1 << 24, line = 64;
        const int64_t cache = padded ? 1 << 13 : 1 << 15, row = pitch * (int64_t)sizeof(C) + 1;
        if (across) {
            tile = Across<C>::lanes;
            return;
        }
        bool gathers = false, neighbours = false;
        for (int k = 0; k < p.count; k++) {
            const Stage& s = stages[k];
            if (!s.operand->data || s.direct || s.length == 1) continue;
            gathers = true;
            neighbours = neighbours || s.operand->step != size_of(s.operand->dtype);
        }
        if (gathers || f.block) tile = 1 + cache / row;
        if (neighbours && tile < line && line * row <= most) tile = line / 2;
        if (tile > last - first) tile = last - first;
    }

    // Do some rows, a tile at a time, in memory that is allocated for them.
    void some(int64_t first, int64_t last) {
        const int64_t held = across ? Across<C>::lanes : tile;
        const int count = p.count + f.scratch;
        auto room = [](int64_t bytes) { return (bytes + 127) / 64 * 64; };
        int64_t bytes = room(count * held * sizeof(char*)) + room(held * sizeof(int64_t)) + room(f.block_scratch) + 64;
        for (int k = 0; k < count; k++) bytes += 2 * room(stages[k].direct || absent(stages[k]) ? 0 : held * stages[k].pitch * 8);
        char stack[4096];
        char* memory = bytes <= (int64_t)sizeof stack ? stack : (char*)malloc(bytes);
        if (!memory) {
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
            return;
        }
        char* next = memory + (64 - (int64_t)memory % 64);
        auto take = [&](int64_t size) {
            char* taken = next;
            next += room(size);
            return taken;
        };
        char** places[most_operands + 4];
        char *wide[most_operands + 4], *raw[most_operands + 4];
        char** all_places = (char**)take(count * held * sizeof(char*));
        int64_t* index = (int64_t*)take(held * sizeof(int64_t));
        char* block_scratch = take(f.block_scratch);
        for (int k = 0; k < count; k++) {
            const Stage& s = stages[k];
            places[k] = all_places + k * held;
            wide[k] = raw[k] = nullptr;
            if (s.direct || absent(s)) continue;
            wide[k] = take(held * s.pitch * s.size);
            // Lanes without a row, and what rows are padded with, are computed with, too.
            if (across || padded) __builtin_memset(wide[k], 0, held * s.pitch * s.size);
            if (!s.operand) continue;
            if (filled(s)) {
                fill(s, wide[k]);
                continue;
            }
            if (padded && s.letter == 'x') pad(s, wide[k]);
            if (s.operand->dtype == s.dtype) continue;
            raw[k] = take(held * s.pitch * size_of(s.operand->dtype));
            if (across) __builtin_memset(raw[k], 0, held * s.pitch * size_of(s.operand->dtype));
        }
        for (int64_t start = first; start < last; start += tile) {
            int64_t rows = start + tile < last ? tile : last - start;
            for (int k = 0; k < p.count; k++) {
                const Operand& one = *stages[k].operand;
                if (!one.data) continue;
                locate(p, one.data, one.strides, start, rows, places[k]);
                if (!stages[k].direct && !stages[k].writes) gather(stages[k], rows, places[k], raw[k], wide[k]);
            }
            if (f.block) {
                locate(p, nullptr, p.index_strides, start, rows, (char**)index);
                run_block(rows, places, wide, index, block_scratch);
            } else if (across) {
                Across<C> view{p.n, wide};
                f.across(p, view);
            } else {
                for (int64_t r = 0; r < rows; r++) run_row(r, count, places, wide);
            }
            for (int k = 0; k < p.count; k++) {
                const Stage& s = stages[k];
                if (s.writes && s.operand->data && !s.direct) scatter(s, rows, places[k], raw[k], wide[k]);
            }
        }
        if (memory != stack) free(memory);
    }

    void pad(const Stage& s, char* rows) {
        for (int64_t r = 0; r < tile; r++) {
            for (int64_t i = s.length; i < s.pitch; i++) ((C*)rows)[r * s.pitch + i] = -infinity<C>();
        }
    }

    // One row serves all.
    void fill(const Stage& s, char* row) {
        const int64_t entries = s.length * (across ? Across<C>::lanes : 1);
        if (s.letter == 'm') {
            __builtin_memset(row, 1, entries);
        } else {
            for (int64_t i = 0; i < entries; i++) ((C*)row)[i] = 1;
        }
    }

    void run_row(int64_t r, int count, char** const* places, char* const* wide) {
        char* operands[most_operands + 4];
        for (int k = 0; k < count; k++) {
            const Stage& s = stages[k];
            const int64_t own = filled(s) ? 0 : r;
            operands[k] = s.direct ? places[k][r] : wide[k] ? wide[k] + own * s.pitch * s.size : nullptr;
        }
        if (padded) {
            Along<C, true> view{p.n, operands, nullptr};
            f.padded(p, view);
        } else {
            Along<C> view{p.n, operands, inside};
            f.along(p, view);
        }
    }

    void run_block(int64_t rows, char** const* places, char* const* wide, const int64_t* index, char* scratch) {
        char* at[most_operands] = {};
        for (int k = 0; k < p.count; k++) at[k] = stages[k].direct ? places[k][0] : wide[k];
        Block<C> b = {};
        b.rows = rows;
        b.n = p.n;
        b.index = index;
        b.pieces = inside;
        b.top_k = p.options[0];
        b.draws = p.options[1];
        b.one_key = p.options[2];
        int words = 0, answers = 0, shares = 0;
        for (int k = 0; k < p.count; k++) {
            switch (f.letters[k]) {
                case 'x': b.x = (const C*)at[k]; break;
                case 'm': b.where = (const uint8_t*)at[k]; break;
                case 'i': b.k = (const int64_t*)at[k]; break;
                case 'k': b.keys = (const int32_t*)at[k]; break;
                case 'R': b.y = (C*)at[k]; break;
                case 'T': b.tokens = (int64_t*)at[k]; break;
                case 'L': b.logprobs = (C*)at[k]; break;
                case 'w': b.words[words++] = (const int32_t*)at[k]; break;
                case 'W': b.answers[answers++] = (int32_t*)at[k]; break;
                case 'v': (shares == 0 ? b.temperature : shares == 1 ? b.p : b.min_p) = (const C*)at[k], shares++; break;
            }
        }
        f.block(p, b, scratch);
    }

    void load_all(const Stage& s, const char* from, char* to, int64_t count) {
        switch (s.dtype) {
            case UINT8: return load(s.operand->dtype, from, (uint8_t*)to, count);
            case INT32: return load(s.operand->dtype, from, (int32_t*)to, count);
            case INT64: return load(s.operand->dtype, from, (int64_t*)to, count);
            default: return load(s.operand->dtype, from, (C*)to, count);
        }
    }

    void store_all(const Stage& s, const char* from, char* to, int64_t count) {
        if (s.dtype == Code<C>::dtype) return store(s.operand->dtype, (const C*)from, to, count);
        const int64_t* x = (const int64_t*)from;
        for (int64_t i = 0; i < count; i++) ((int32_t*)to)[i] = (int32_t)x[i];
    }

    // A long row that stands alone is converted by all threads.
    template <class G>
    void by_parts(int64_t length, G g) {
        Along<C> row{length, nullptr, inside};
        if (inside && length > Along<C>::shortest_piece) {
            row.by_pieces([&](int64_t, int64_t start, int64_t end) { g(start, end - start); });
        } else {
            g(0, length);
        }
    }

    // Whether rows go through memory of their own dtype one by one: side by side they would have what pads them between.
    bool one_by_one(const Stage& s) const { return !across && s.length > 1 && (padded || s.operand->step == size_of(s.operand->dtype)); }

    void gather(const Stage& s, int64_t rows, char* const* places, char* raw, char* wide) {
        const int64_t held = across ? Across<C>::lanes : 0, step = s.length == 1 ? 0 : s.operand->step;
        const int size = size_of(s.operand->dtype);
        const bool in_place = s.aligned && step == size;
        char* to = raw ? raw : wide;
        if (!raw || !one_by_one(s) || !in_place) move_bytes<true>(size, to, places, rows, s.length, step, s.pitch, held);
        if (!raw) return;
        if (!one_by_one(s)) return load_all(s, raw, wide, s.length * (across ? held : rows));
        for (int64_t r = 0; r < rows; r++) {
            const char* from = in_place ? places[r] : raw + r * s.pitch * size;
            char* own = wide + r * s.pitch * s.size;
            by_parts(s.length, [&](int64_t start, int64_t count) {
                load_all(s, from + start * size, own + start * s.size, count);
            });
        }
    }

    void scatter(const Stage& s, int64_t rows, char* const* places, char* raw, char* wide) {
        const int64_t held = across ? Across<C>::lanes : 0, step = s.length == 1 ? 0 : s.operand->step;
        const int size = size_of(s.operand->dtype);
        const bool in_place = s.aligned && step == size;
        if (raw && one_by_one(s)) {
            for (int64_t r = 0; r < rows; r++) {
                char* to = in_place ? places[r] : raw + r * s.pitch * size;
                const char* own = wide + r * s.pitch * s.size;
                by_parts(s.length, [&](int64_t start, int64_t count) {
                    store_all(s, own + start * s.size, to + start * size, count);
                });
            }
            if (in_place) return;
        } else if (raw) {
            store_all(s, wide, raw, s.length * (across ? held : rows));
        }
        move_bytes<false>(size, raw ? raw : wide, places, rows, s.length, step, s.pitch, held);
    }
};

// All rows of a problem: short ones across, but for a few that are left; those and others that are not long are padded.
template <class C>
int run_rows(const Problem& p, const Formula<C>& f, Pieces pieces, int threads) {
    constexpr int64_t few = 6;
    int64_t across = 0;
    if (!f.block && p.n <= longest_in_eights) {
        across = p.rows / Across<C>::lanes * Across<C>::lanes;
        if (p.rows - across > few) across = p.rows;
    }
    const Layout rest = !f.block && p.n <= Along<C>::longest_padded ? PADDED : ALONG;
    const int failed = across ? Run<C>(p, f, ACROSS, 0, across, pieces, threads).all() : 0;
    return failed || across == p.rows ? failed : Run<C>(p, f, rest, across, p.rows, pieces, threads).all();
}
