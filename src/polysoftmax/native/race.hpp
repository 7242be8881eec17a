// The race: who wins a draw, without logarithms. A token of weight w wins if log w + G is the greatest sum, G = -log E being
// its Gumbel variate. As well, it is the first to arrive: the time E / w, with E = -log(1 - u), is the least one.
//
// A time is bounded from below, by the number u alone. If the second bound lies above the time of the first token, that one
// has won, and no logarithm but its own is computed. Otherwise the race is too close to call, and the sums decide, as they
// are defined in _sampling.py: tokens are those of the definition to the last bit.
#pragma once

#include "rows.hpp"
#include "truncation.hpp"

// Lanes of a vector, and the entries whose number arrays are filled up to. Words are computed in four vectors at a time, or
// two at an end: one alone would wait for its own results.
constexpr int vector = 8, group = 2 * vector;
using Times = Lanes<float>::Type;
using Places = int32_t __attribute__((vector_size(32), may_alias));
using WordLanes = Word __attribute__((vector_size(32), may_alias));

BOTH Times& lanes(float* of) { return *(Times*)of; }
BOTH const Times& lanes(const float* of) { return *(const Times*)of; }
BOTH Places& lanes(int32_t* of) { return *(Places*)of; }
BOTH WordLanes& lanes(Word* of) { return *(WordLanes*)of; }

// 1 / w, the time that a token takes for its E. Below the normal numbers w is not precise: what weighs so little may not
// win unless the sums say so (`last_call`).
constexpr float slowest = 1e38f;

template <class C>
BOTH float slowness_of(C w) {
    const float y = (float)(1 / w);
    return w >= (C)0x1p-126f ? y : slowest;
}

// The time of the first token after which the sums are asked. E is 2^-33 or more, so a token of weight below 2^-126 needs
// 2^93 = 1e28 or more, in exact arithmetic and as a sum.
constexpr float last_call = 1e27f;

// How much later, as a ratio, the second has to arrive. Rounding moves the sums, whose parts are below 90 and 23 up to
// `last_call`, by 1.5e-5 at most each (in float: an ulp of either part, half an ulp of the sum), and the bound by 1e-6.
constexpr float clear_lead = 1 + 0x1p-13f;

// At most -log(1 - u), and that within a hundredth up to u = 2/3. With s = u / (2 - u), the logarithm is
// 2s·Σ s^2k / (2k + 1), and this is 2s / (1 - s²/3) = 2s·Σ s^2k / 3^k, none of whose coefficients is greater.
BOTH Times least_time(WordLanes word) {
    const Times u = __builtin_convertvector((Places)(word >> 1), Times) * 0x1p-31f;
    return u * (6 - 3 * u) / (6 - u * (6 - u));
}

// `random_words` for vectors of counters a, which become the first words; b become the second ones. K is a word for all
// lanes, or has one for each.
template <int abreast, class K>
BOTH void draw_words(const K (&first)[abreast], const K (&second)[abreast], Domain domain, WordLanes (&a)[abreast],
                     WordLanes (&b)[abreast]) {
    constexpr int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    K schedule[3][abreast];
#pragma GCC unroll 4
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
#pragma GCC unroll 4
            for (int v = 0; v < abreast; v++) {
                a[v] += b[v];
                b[v] = (b[v] << by | b[v] >> (32 - by)) ^ a[v];
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < abreast; v++) {
            a[v] += schedule[(round + 1) % 3][v];
            b[v] += schedule[(round + 2) % 3][v] + (Word)(round + 1);
        }
    }
}

// How many vectors are computed with at a time.
template <int number>
struct Abreast {
    static constexpr int count = number;
};

// Call f for vectors from `start` on, with their number.
template <class F>
BOTH void in_vectors(int64_t count, F f) {
    int64_t start = 0;
    for (; count - start > 2 * vector; start += 4 * vector) f(Abreast<4>(), start);
    if (start < count) f(Abreast<2>(), start);
}

// The least time in each lane, whose it is and by which word, and the second.
struct Leaders {
    Times best = Times{} + infinity<float>(), second = best;
    Places at = {};
    WordLanes word = {};

    BOTH void meet(WordLanes drawn, Times slowness, Places whose) {
        const Times time = least_time(drawn) * slowness;
        word = time < best ? drawn : word;
        meet(time, whose);
    }

    // Afterwards the first lane has the leader of all; words stay in their lanes.
    BOTH void meet_across() {
        meet_turned(Places{4, 5, 6, 7, 0, 1, 2, 3});
        meet_turned(Places{2, 3, 0, 1, 6, 7, 4, 5});
        meet_turned(Places{1, 0, 3, 2, 5, 4, 7, 6});
    }

  private:
    BOTH void meet(Times time, Places whose) {
        const Places sooner = time < best;
        const Times later = sooner ? best : time;
        second = later < second ? later : second;
        at = sooner ? whose : at;
        best = sooner ? time : best;
    }

    BOTH void meet_turned(Places by) {
        const Times others = __builtin_shuffle(second, by);
        second = others < second ? others : second;
        meet(__builtin_shuffle(best, by), __builtin_shuffle(at, by));
    }
};

// Several draws, side by side, in their two stages: a block, and a token in it.
struct Batch {
    static constexpr int64_t most = 64;
    int64_t count = 0;
    alignas(64) Word first[most] = {}, second[most] = {}, fold[most] = {};    // the key, and what it is folded with
    alignas(64) int32_t slot[most] = {}, run[most] = {};    // the row, and the place of the chosen block among its blocks
    alignas(64) int32_t place[most] = {};                   // of a race's first candidate, where rows lie side by side
    // Who leads, by which word; the bound of the second's time.
    alignas(64) int32_t leader[most] = {};
    alignas(64) Word word[most] = {};
    alignas(64) float slowness[most] = {}, rival[most] = {}, limit[most] = {};
    int64_t* token[most];

    // As many draws as there is room for, of `number` with one key, which is folded with `by` and the numbers behind it.
    int64_t add(int64_t number, int64_t row, Words key, Word by, int64_t* to) {
        const int64_t start = count, end = start + number < most ? start + number : most;
        for (int64_t d = start; d < end; d++) {
            first[d] = key.first;
            second[d] = key.second;
            fold[d] = by + (Word)(d - start);
            slot[d] = (int32_t)row;
            token[d] = to + (d - start);
        }
        count = end;
        return end - start;
    }

    Words key(int64_t d) const { return Words{first[d], second[d]}; }

    // The first draw with a key takes the key itself.
    APART void fold_keys() {
        in_vectors(count, [&](auto abreast, int64_t start) {
            constexpr int vectors = abreast.count;
            WordLanes k0[vectors], k1[vectors], a[vectors], b[vectors];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                k0[v] = lanes(first + start + v * vector);
                k1[v] = lanes(second + start + v * vector);
                a[v] = lanes(fold + start + v * vector);
            }
            draw_words(k0, k1, NEW_KEYS, a, b);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                const WordLanes by = lanes(fold + start + v * vector);
                lanes(first + start + v * vector) = by != 0 ? a[v] : k0[v];
                lanes(second + start + v * vector) = by != 0 ? b[v] : k1[v];
            }
        });
    }

    // Let the sums decide what is too close to call: `decide(d)` for these draws.
    template <class F>
    BOTH void settle(F decide) {
        set_limits();
        for (int64_t d = 0; d < count; d++) {
            if (!(rival[d] > limit[d])) decide(d);
        }
    }

  private:
    // The time of the leader and some more; those behind the last draw only complete a vector.
    APART void set_limits() {
        const int64_t draws = (count + group - 1) / group * group;
#pragma GCC ivdep
        for (int64_t d = 0; d < draws; d++) {
            const float time = -log1p(-uniform_of(word[d])) * slowness[d] * clear_lead;
            limit[d] = time < last_call ? time : infinity<float>();
        }
    }
};

// The race of `count` candidates with one key. `slowness` goes on to the end of a group, where nothing wins; `counters(i)`
// are those of candidates i and behind it.
template <class Counters>
BOTH void race_along(Batch& batch, int64_t d, Domain domain, const float* slowness, int64_t count, Counters counters) {
    const Word key_first = batch.first[d], key_second = batch.second[d];
    Leaders leaders;
    in_vectors(count, [&](auto abreast, int64_t start) {
        constexpr int vectors = abreast.count;
        Word first[vectors], second[vectors];
        WordLanes words[vectors], others[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            first[v] = key_first;
            second[v] = key_second;
            words[v] = counters(start + v * vector);
        }
        draw_words(first, second, domain, words, others);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const int64_t i = start + v * vector;
            leaders.meet(words[v], lanes(slowness + i), Places{0, 1, 2, 3, 4, 5, 6, 7} + (int32_t)i);
        }
    });
    leaders.meet_across();
    const int32_t leader = leaders.at[0];
    batch.leader[d] = leader;
    batch.word[d] = leaders.word[leader % vector];
    batch.slowness[d] = slowness[leader];
    batch.rival[d] = leaders.second[0];
}

BOTH Times gathered(const float* x, const int32_t* at) {
    return Times{x[at[0]], x[at[1]], x[at[2]], x[at[3]], x[at[4]], x[at[5]], x[at[6]], x[at[7]]};
}

// The races of all draws, each in a lane: candidate i of draw d stands at slowness[place[d] + i * pitch], and the counters of
// candidates i are those of `counters(d, i)` for the draws from d on.
template <class Counters>
BOTH void race_across(Batch& batch, Domain domain, int64_t count, const float* slowness, int64_t pitch, Counters counters) {
    in_vectors(batch.count, [&](auto abreast, int64_t start) {
        constexpr int vectors = abreast.count;
        WordLanes first[vectors], second[vectors];
        Leaders leaders[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            first[v] = lanes(batch.first + start + v * vector);
            second[v] = lanes(batch.second + start + v * vector);
        }
        for (int64_t i = 0; i < count; i++) {
            WordLanes words[vectors], others[vectors];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) words[v] = counters(start + v * vector, i);
            draw_words(first, second, domain, words, others);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                const Times slow = gathered(slowness + i * pitch, batch.place + start + v * vector);
                leaders[v].meet(words[v], slow, Places{} + (int32_t)i);
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            lanes(batch.leader + start + v * vector) = leaders[v].at;
            lanes(batch.word + start + v * vector) = leaders[v].word;
            lanes(batch.rival + start + v * vector) = leaders[v].second;
        }
    });
    const int64_t draws = batch.count;
    for (int64_t d = 0; d < draws; d++) batch.slowness[d] = slowness[batch.place[d] + batch.leader[d] * pitch];
}

// The place of the best sum score(i) + variate, the first among equals; without variates at T = 0.
template <class C, class Score, class Counter>
APART int32_t first_best(int64_t count, Words key, Domain domain, bool greedy, Score score, Counter counter) {
    constexpr int64_t chunk = 32;
    C best = -infinity<C>();
    int32_t at = 0;
    for (int64_t start = 0; start < count; start += chunk) {
        const int64_t length = count - start < chunk ? count - start : chunk;
        float noise[chunk];
        if (!greedy) {
            for (int64_t l = 0; l < length; l++) noise[l] = gumbel_of(random_words(key, counter(start + l), domain).first);
        }
        for (int64_t l = 0; l < length; l++) {
            const C sum = greedy ? score(start + l) : score(start + l) + noise[l];
            at = sum > best ? (int32_t)(start + l) : at;
            best = sum > best ? sum : best;
        }
    }
    return at;
}
