// The race: who wins a draw, without logarithms. A token of weight w wins if log w + G is the greatest sum, G = -log E being
// its Gumbel variate. As well, it is the first to arrive: the time E / w, with E = -log(1 - u), is the least one.
//
// A time is bounded from below, by the number u alone. If the second bound lies above the time of the first token, that one
// has won, and no logarithm but its own is computed. Otherwise the race is too close to call, and the sums decide, as they
// are defined in _sampling.py: tokens are those of the definition to the last bit.
#pragma once

#include "rows.hpp"
#include "truncation.hpp"

constexpr int vector = 8, abreast = 2, group = vector * abreast;
using Times = Lanes<float>::Type;
using Places = Lanes<float>::Places;
using WordLanes = Word __attribute__((vector_size(32), may_alias));

// 1 / w, the time that a token takes for its E. Below the normal numbers w is not precise: what weighs so little may not
// win unless the sums say so (`last_call`).
constexpr float slowest = 1e38f;

template <class C>
BOTH float slowness_of(C w) {
    return w >= (C)0x1p-126f ? (float)(1 / w) : slowest;
}

// The time of the first token after which the sums are asked. E is 2^-33 or more, so a token of weight below 2^-126 needs
// 2^93 = 1e28 or more, in exact arithmetic and as a sum.
constexpr float last_call = 1e27f;

// How much later, as a ratio, the second has to arrive. Rounding moves the sums, whose parts are below 90 and 23 up to
// `last_call`, by 1.5e-5 at most each (in float: an ulp of either part, half an ulp of the sum), and the bound by 1e-6.
constexpr float clear_lead = 1 + 0x1p-13f;

// At most -log(1 - u), and that within a hundredth up to u = 1/2: the series of u·(6 - u) / (6 - 4u) is
// u + u²/2 + u³/3 + 2/9·u⁴ + 4/27·u⁵ + ..., none of whose coefficients is above that of the logarithm.
BOTH Times least_time(WordLanes word) {
    const Times u = __builtin_convertvector((Places)(word >> 1), Times) * 0x1p-31f;
    return u * (6 - u) / (6 - 4 * u);
}

// The first word of each block, as `random_words` computes it, for vectors of counters: one vector alone would wait for its
// own results. K is a word for all lanes, or has one for each.
template <class K>
BOTH void draw_words(const K (&first)[abreast], const K (&second)[abreast], Domain domain, WordLanes (&a)[abreast]) {
    constexpr int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    WordLanes b[abreast];
    K schedule[3][abreast];
#pragma GCC unroll 2
    for (int v = 0; v < abreast; v++) {
        schedule[0][v] = first[v];
        schedule[1][v] = second[v];
        schedule[2][v] = first[v] ^ second[v] ^ 0x1BD11BDA;
        a[v] += first[v];
        b[v] = WordLanes{} + (second[v] + (Word)domain);
    }
#pragma GCC unroll 5
    for (int round = 0; round < 5; round++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const int by = rotations[round % 2][i];
#pragma GCC unroll 2
            for (int v = 0; v < abreast; v++) {
                a[v] += b[v];
                b[v] = (b[v] << by | b[v] >> (32 - by)) ^ a[v];
            }
        }
#pragma GCC unroll 2
        for (int v = 0; v < abreast; v++) {
            a[v] += schedule[(round + 1) % 3][v];
            b[v] += schedule[(round + 2) % 3][v] + (Word)(round + 1);
        }
    }
}

// The least time in each lane, whose it is, and the second.
struct Leaders {
    Times best = Times{} + infinity<float>(), second = best;
    Places at = {};

    BOTH void meet(Times time, Places whose) {
        const Places sooner = time < best;
        const Times later = sooner ? best : time;
        second = later < second ? later : second;
        at = sooner ? whose : at;
        best = sooner ? time : best;
    }

    BOTH void meet(const Leaders& others) {
        second = others.second < second ? others.second : second;
        meet(others.best, others.at);
    }

    BOTH void meet_across() {
        meet(turned(Places{4, 5, 6, 7, 0, 1, 2, 3}));
        meet(turned(Places{2, 3, 0, 1, 6, 7, 4, 5}));
        meet(turned(Places{1, 0, 3, 2, 5, 4, 7, 6}));
    }

  private:
    BOTH Leaders turned(Places by) const {
        Leaders y;
        y.best = __builtin_shuffle(best, by);
        y.second = __builtin_shuffle(second, by);
        y.at = __builtin_shuffle(at, by);
        return y;
    }
};

// Several draws, side by side, in their two stages: a block, and a token in it.
struct Batch {
    static constexpr int64_t most = 64;
    int64_t count = 0;
    alignas(64) Word first[most] = {}, second[most] = {}, fold[most] = {};    // the key, and what it is folded with
    alignas(64) int32_t slot[most] = {}, run[most] = {};    // the row, and the place of the chosen block among its blocks
    alignas(64) int32_t leader[most] = {};
    alignas(64) Word counter[most] = {};                    // of the leader
    alignas(64) float slowness[most] = {}, rival[most] = {}, limit[most] = {};
    int64_t* token[most];

    void add(int64_t row, Words key, Word by, int64_t* to) {
        first[count] = key.first;
        second[count] = key.second;
        fold[count] = by;
        slot[count] = (int32_t)row;
        run[count] = 0;
        token[count++] = to;
    }

    Words key(int64_t d) const { return Words{first[d], second[d]}; }

    // For lanes in vectors, of which those behind the last draw hold what an earlier one has left.
    int64_t in_groups() const { return (count + group - 1) / group * group; }

    // The first draw with a key takes the key itself.
    APART void fold_keys() {
        const int64_t draws = in_groups();
#pragma GCC ivdep
        for (int64_t d = 0; d < draws; d++) {
            const Words own{first[d], second[d]}, next = random_words(own, fold[d], NEW_KEYS);
            first[d] = fold[d] ? next.first : own.first;
            second[d] = fold[d] ? next.second : own.second;
        }
    }

    // Let the sums decide what is too close to call: `decide(d)` for these draws.
    template <class F>
    void settle(Domain domain, F decide) {
        set_limits(domain);
        for (int64_t d = 0; d < count; d++) {
            if (!(rival[d] > limit[d] && limit[d] < last_call)) decide(d);
        }
    }

  private:
    APART void set_limits(Domain domain) {
        const int64_t draws = in_groups();
#pragma GCC ivdep
        for (int64_t d = 0; d < draws; d++) {
            const Word word = random_words(Words{first[d], second[d]}, counter[d], domain).first;
            limit[d] = -log1p(-uniform_of(word)) * slowness[d] * clear_lead;
        }
    }
};

// The race of `count` tokens with one key. `slowness` goes on to the end of a group, where nothing wins; `counters(i)` are
// those of tokens i and behind it.
template <class Counters>
BOTH void race_along(Batch& batch, int64_t d, Domain domain, const float* slowness, int64_t count, Counters counters) {
    const Word first[abreast] = {batch.first[d], batch.first[d]}, second[abreast] = {batch.second[d], batch.second[d]};
    Leaders leaders;
    for (int64_t start = 0; start < count; start += group) {
        WordLanes words[abreast] = {counters(start), counters(start + vector)};
        draw_words(first, second, domain, words);
#pragma GCC unroll 2
        for (int v = 0; v < abreast; v++) {
            const int64_t i = start + v * vector;
            leaders.meet(least_time(words[v]) * *(const Times*)(slowness + i), Places{0, 1, 2, 3, 4, 5, 6, 7} + (int32_t)i);
        }
    }
    leaders.meet_across();
    batch.leader[d] = leaders.at[0];
    batch.rival[d] = leaders.second[0];
}

// The races of the draws from `start` on, a draw in each lane: token i of draw d has `counter(d, i)` and `slowness(d, i)`.
template <class Counter, class Slowness>
BOTH void race_across(Batch& batch, int64_t start, Domain domain, int64_t count, Counter counter, Slowness slowness) {
    WordLanes first[abreast], second[abreast];
    Leaders leaders[abreast];
#pragma GCC unroll 2
    for (int v = 0; v < abreast; v++) {
        first[v] = *(const WordLanes*)(batch.first + start + v * vector);
        second[v] = *(const WordLanes*)(batch.second + start + v * vector);
    }
    for (int64_t i = 0; i < count; i++) {
        WordLanes words[abreast];
        alignas(64) float slow[group];
#pragma GCC unroll 2
        for (int v = 0; v < abreast; v++) words[v] = counter(start + v * vector, i);
        for (int l = 0; l < group; l++) slow[l] = slowness(start + l, i);
        draw_words(first, second, domain, words);
#pragma GCC unroll 2
        for (int v = 0; v < abreast; v++) {
            leaders[v].meet(least_time(words[v]) * ((const Times*)slow)[v], Places{} + (int32_t)i);
        }
    }
#pragma GCC unroll 2
    for (int v = 0; v < abreast; v++) {
        *(Places*)(batch.leader + start + v * vector) = leaders[v].at;
        *(Times*)(batch.rival + start + v * vector) = leaders[v].second;
    }
}

// The place of the best sum score(i) + variate, the first among equals; without variates at T = 0.
template <class C, class Score, class Counter>
APART int64_t first_best(int64_t count, Words key, Domain domain, bool greedy, Score score, Counter counter) {
    constexpr int64_t chunk = 32;
    C best = -infinity<C>();
    int64_t at = 0;
    for (int64_t start = 0; start < count; start += chunk) {
        const int64_t length = count - start < chunk ? count - start : chunk;
        float noise[chunk];
        if (!greedy) {
            for (int64_t l = 0; l < length; l++) noise[l] = gumbel_of(random_words(key, counter(start + l), domain).first);
        }
        for (int64_t l = 0; l < length; l++) {
            const C sum = greedy ? score(start + l) : score(start + l) + noise[l];
            at = sum > best ? start + l : at;
            best = sum > best ? sum : best;
        }
    }
    return at;
}
