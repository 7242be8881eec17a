// Rows: how a formula sees them.
//
// A formula is written once, as reductions and maps over an index i, on contiguous rows of the compute dtype. Long rows
// run `Along`: the lanes of a vector hold neighbours of one row, and a row's values (its maximum, a sum) are scalars.
// Many short rows run `Across`: each lane holds a row of its own, and a row's values are vectors. Few short ones run
// along, too, in memory that is padded to whole vectors. The order of every sum follows from the length of the row alone,
// never from the rows around it, threads, strides or the width of vectors.
#pragma once

#include <stdint.h>

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
    int64_t top_k, draws;    // 0: no top_k that is common to all rows; draws are tokens a row
    bool one_key;            // to be folded with the index of each row
    int64_t with_each_key;   // draws with each key of a row
    bool distinct;           // these are
    const int32_t* keys;     // 2 words for each key
    const int64_t* index;    // of each row in the batch, in C order
    C* y;
    const int64_t* given_tokens;    // draws a row, as tokens, logprobs and reals
    int64_t* tokens;
    C* logprobs;
    const C* reals;
    C* of_row;    // a number a row, as an answer
    const int32_t* words[4];
    int32_t* answers[2];
    Pieces pieces;           // null, or: there is so little to share that the threads may share a row
};
