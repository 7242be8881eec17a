// The log-probabilities of given tokens, their gradient, and the order of tokens, as _probability.py defines them.
#pragma once

#include <stdlib.h>

#include "softmax.hpp"
#include "truncation.hpp"

// Rows of logits with `count` tokens each. A token is `known` if there is such an index.
template <bool options, class Rows>
struct Tokens {
    using C = typename Rows::Real;
    using Index = typename Rows::Index;

    Scores<options, Rows> s;
    typename Rows::template Column<const int64_t> tokens;
    typename Rows::template Value<C> log_sum;
    int64_t n, count;

    Tokens(const Problem& p, Rows& rows)
        : s(rows, 0, 2, 3), tokens(rows.template column<const int64_t>(1)), n(p.n), count(p.options[1]) {
        log_sum = log_total(rows, s);
    }

    BOTH C log_p(Index r, int64_t k) const {
        const int64_t token = tokens.at(r, k);
        const bool known = token >= 0 && token < n;
        const int64_t at = known ? token : 0;
        const bool exists = options ? s.where.at(r, at) != 0 : true;
        const C distance = options ? halved_distance(s.x.at(r, at), s.top[r], s.half[r]) : s.x.at(r, at) - s.top[r];
        const C z = options ? over_temperature(distance, s.divisor[r], s.bound[r]) : distance;
        const C y = exists ? z - log_sum[r] : -infinity<C>();
        return known ? y : nan_of<C>();
    }
};

template <bool options, class Rows>
void log_prob(const Problem& p, Rows& rows) {
    const Tokens<options, Rows> t(p, rows);
    auto y = rows.column(7);
    for (int64_t k = 0; k < t.count; k++) {
        rows.row([&](auto r) {
            y.at(r, k) = t.log_p(r, k);
            return 0;
        });
    }
}

// The gradient of log_softmax for a cotangent that stands at the tokens. Where no token of a row has a slope, nothing moves.
template <bool options, class Rows>
void log_prob_pull(const Problem& p, Rows& rows) {
    using C = typename Rows::Real;
    const Tokens<options, Rows> t(p, rows);
    const Scores<options, Rows>& s = t.s;
    auto given = rows.column(7), gx = rows.column(8), g = rows.column(10);
    rows.each([&](auto i) { g[i] = 0; });
    auto moves = rows.row([](auto) { return false; });
    for (int64_t k = 0; k < t.count; k++) {
        moves = rows.row([&](auto r) {
            const bool has_slope = finite(t.log_p(r, k));
            if (has_slope) g.at(r, t.tokens.at(r, k)) += given.at(r, k);
            return moves[r] || has_slope;
        });
    }
    auto log_p = [&](auto i) { return choose(s.exists(i), s.z(i) - t.log_sum[i], -infinity<C>()); };
    auto gz = pull_of_log_softmax(rows, log_p, [&](auto i) { return (C)g[i]; });
    pull_scores(rows, s, gz, 8, 9);
    if (!rows.some([&](auto r) { return !moves[r]; })) return;
    if (gx) {
        rows.each([&](auto i) {
            C slope = gx[i];
            gx[i] = choose(moves[i], slope);
        });
    }
    if (rows.column(9)) {
        auto gt = rows.value(9);
        rows.put(9, rows.row([&](auto r) { return moves[r] ? gt[r] : (C)0; }));
    }
}

// With filters a row is truncated first, in memory of its own.
template <class C>
struct LeftOfRows {
    static constexpr int64_t spare = 64;    // entries that a short row may be padded with
    Shelf shelf;
    C *masked_row, *left, *spread, *slope;
    uint8_t* all;
    Survivors<C> survivors;

    LeftOfRows(char* memory, int64_t n)
        : shelf{memory}, masked_row(shelf.take<C>(n)), left(shelf.take<C>(n + spare)), spread(shelf.take<C>(n + spare)),
          slope(shelf.take<C>(n + spare)), all(shelf.take<uint8_t>(n + spare)), survivors(shelf, n) {}
};

template <class C>
int64_t left_scratch(int64_t n) {
    return LeftOfRows<C>(nullptr, n).shelf.used;
}

// Each row on its own, in the layout that it has without filters, so that its sums have the same order.
template <class C, class F>
void each_left_row(const Problem& p, const Block<C>& block, char* memory, F f) {
    const int64_t n = block.n, count = block.draws;
    LeftOfRows<C> scratch(memory, n);
    const bool padded = n <= Along<C>::longest_padded;
    const int64_t end = padded ? Along<C, true>::to_the_end(n) : n;
    for (int64_t j = 0; j < end; j++) scratch.all[j] = 1;
    for (int64_t r = 0; r < block.rows; r++) {
        truncate_row(masked(block, r, scratch.masked_row), n, Filters<C>(block, r), scratch.survivors, scratch.left);
        for (int64_t j = n; j < end; j++) scratch.left[j] = -infinity<C>();
        auto row_of = [&](auto* values, int64_t length) { return (char*)(values ? values + r * length : nullptr); };
        char* operands[] = {(char*)scratch.left,
                            row_of(block.given_tokens, count),
                            row_of(block.temperature, 1),
                            (char*)scratch.all,
                            nullptr, nullptr, nullptr,
                            row_of(block.reals, count),
                            (char*)(block.y ? scratch.slope : nullptr),
                            row_of(block.of_row, 1),
                            (char*)scratch.spread};
        if (block.logprobs) operands[7] = row_of(block.logprobs, count);
        if (padded) {
            Along<C, true> rows{n, operands, nullptr};
            f(rows);
        } else {
            Along<C> rows{n, operands, block.pieces};
            f(rows);
        }
        if (block.y) __builtin_memcpy(block.y + r * n, scratch.slope, n * sizeof(C));
    }
}

template <class C>
void log_prob_of_left(const Problem& p, const Block<C>& block, char* memory) {
    each_left_row(p, block, memory, [&](auto& rows) { log_prob<true>(p, rows); });
    if (!block.where) return;
    for (int64_t r = 0; r < block.rows; r++) {
        for (int64_t k = 0; k < block.draws; k++) {
            const int64_t token = block.given_tokens[r * block.draws + k];
            const bool exists = token < 0 || token >= block.n || block.where[r * block.n + token];
            if (!exists) block.logprobs[r * block.draws + k] = -infinity<C>();
        }
    }
}

template <class C>
void log_prob_of_left_pull(const Problem& p, const Block<C>& block, char* memory) {
    each_left_row(p, block, memory, [&](auto& rows) { log_prob_pull<true>(p, rows); });
}

// How many tokens stand before each of those given: -1 for one that does not exist, or in a row with NaN.
template <class C>
void ranks_of_rows(const Problem&, const Block<C>& block, char*) {
    for (int64_t r = 0; r < block.rows; r++) {
        const C* x = block.x + r * block.n;
        const uint8_t* where = block.where ? block.where + r * block.n : nullptr;
        int64_t nans = 0;
        for (int64_t j = 0; j < block.n; j++) nans += (!where || where[j]) && x[j] != x[j];
        for (int64_t k = 0; k < block.draws; k++) {
            const int64_t token = block.given_tokens[r * block.draws + k];
            const bool exists = token >= 0 && token < block.n && !nans && (!where || where[token]);
            int64_t before = 0;
            if (exists) {
                const C own = x[token];
                for (int64_t j = 0; j < token; j++) before += (!where || where[j]) & (x[j] >= own);
                for (int64_t j = token; j < block.n; j++) before += (!where || where[j]) & (x[j] > own);
            }
            block.tokens[r * block.draws + k] = exists ? before : -1;
        }
    }
}

template <class C>
struct Leader {
    PlaceOf<C> place;
    int32_t index;

    static int compare(const void* a, const void* b) {
        const Leader &x = *(const Leader*)a, &y = *(const Leader*)b;
        if (x.place != y.place) return x.place > y.place ? -1 : 1;
        return x.index < y.index ? -1 : 1;
    }
};

template <class C>
struct LeadingScratch {
    Shelf shelf;
    C* row;
    Leader<C>* leaders;
    Survivors<C> survivors;

    LeadingScratch(char* memory, int64_t n)
        : shelf{memory}, row(shelf.take<C>(n)), leaders(shelf.take<Leader<C>>(n)), survivors(shelf, n) {}
};

template <class C>
int64_t leading_scratch(int64_t n) {
    return LeadingScratch<C>(nullptr, n).shelf.used;
}

// The first tokens of each row, in order of logit and then index; -1 in a row that has no answer.
template <class C>
void leading_of_rows(const Problem&, const Block<C>& block, char* memory) {
    const int64_t n = block.n, count = block.draws;
    LeadingScratch<C> scratch(memory, n);
    for (int64_t r = 0; r < block.rows; r++) {
        const C* x = masked(block, r, scratch.row);
        int64_t* tokens = block.tokens + r * count;
        if (!scratch.survivors.find_leading(x, count)) {
            for (int64_t i = 0; i < count; i++) tokens[i] = -1;
            continue;
        }
        for (int64_t i = 0; i < count; i++) scratch.leaders[i] = {scratch.survivors.places[i], scratch.survivors.index_of(i)};
        qsort(scratch.leaders, count, sizeof(Leader<C>), Leader<C>::compare);
        for (int64_t i = 0; i < count; i++) tokens[i] = scratch.leaders[i].index;
    }
}
