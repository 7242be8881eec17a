// softmax, log_softmax, logsumexp, and their derivatives, as _softmax.py defines them. z stands for (x - max) / T, p for the
// probabilities, y for the answer, g for a cotangent, d for a tangent.
#pragma once

#include "problem.hpp"
#include "rows.hpp"

// A choice between numbers that have both been loaded: a load under a condition would not become vectors.
template <class C>
BOTH C choose(bool condition, C x, C otherwise = 0) {
    return condition ? x : otherwise;
}

// The scores z of rows of logits. Without options there is neither a temperature nor a mask.
template <bool options, class Rows>
struct Scores {
    using C = typename Rows::Real;
    using Index = typename Rows::Index;

    typename Rows::template Column<const C> x;
    typename Rows::template Column<const uint8_t> where;
    typename Rows::template Value<C> half, divisor, bound, top;
    typename Rows::template Value<Temperature<C>> temperature;

    Scores(Rows& rows, int logits, int t, int mask)
        : x(rows.template column<const C>(logits)), where(rows.template column<const uint8_t>(mask)) {
        if (options) {
            auto value = rows.template value<C>(t, 1);
            temperature = rows.row([&](auto r) { return temperature_of(value[r]); });
            half = rows.row([&](auto r) { return temperature[r].half; });
            divisor = rows.row([&](auto r) { return temperature[r].divisor; });
            bound = rows.row([&](auto r) { return temperature[r].bound; });
        }
        top = rows.max([&](auto i) { return logit(i); });
        if (options && rows.some([&](auto r) { return top[r] == -infinity<C>(); })) {
            // -inf - -inf is NaN, which is right for a row of -inf, and not for a row without entries.
            auto any = this->any(rows);
            top = rows.row([&](auto r) { return any[r] > 0 ? top[r] : 0; });
        }
    }

    // 1 for a row with entries, and otherwise -inf.
    auto any(Rows& rows) const {
        return rows.max([&](auto i) { return exists(i) ? (C)1 : -infinity<C>(); });
    }

    BOTH bool exists(Index i) const { return options ? where[i] != 0 : true; }
    BOTH C logit(Index i) const { return choose(exists(i), x[i], -infinity<C>()); }
    BOTH bool at_top(Index i) const { return logit(i) == top[i]; }

    BOTH C z(Index i) const {
        if (!options) return logit(i) - top[i];
        return over_temperature(halved_distance(logit(i), top[i], half[i]), divisor[i], bound[i]);
    }

    // A tangent or cotangent over T.
    BOTH C over(C slope, Index i) const { return options ? slope_over_temperature(slope, temperature[i]) : slope; }
};

// log Σ exp(z) of each row. The terms at the maximum, which are 1, stay out of the sum, so that a logarithm close to 0
// keeps its digits.
template <class Rows, class V>
BOTH auto log_of_sum(Rows& rows, const V& count, const V& rest) {
    using C = typename Rows::Real;
    // Inlined by force: GCC would call what several formulas share, and a loop over calls does not become vectors.
    return rows.row([&](auto r) __attribute__((always_inline)) {
        C none = count[r] == 0;
        return log(count[r]) + log1p(rest[r] / (count[r] + none));
    });
}

// A sum over the entries of a row at the maximum, and over the others, whose digits are not lost beside it.
template <class Rows>
struct Apart {
    using C = typename Rows::Real;
    typename Rows::template Value<C> at_top, rest;
};

// Σ exp(z), which at the maximum counts. One that is there alone has a probability of 1 less the others'.
template <bool options, class Rows>
BOTH auto set_apart(Rows& rows, const Scores<options, Rows>& s) {
    using C = typename Rows::Real;
    auto sums = rows.template sums<2>([&](auto i) {
        C e = exp(s.z(i));
        bool top = s.at_top(i);
        return Terms<C, 2>{{top ? (C)1 : (C)0, top ? (C)0 : e}};
    });
    return Apart<Rows>{rows.term(sums, 0), rows.term(sums, 1)};
}

// The maximum, the number of entries at it, and Σ exp(z) over the others, as _partial.py defines them.
template <bool options, class Rows>
void partial(const Problem& p, Rows& rows) {
    using C = typename Rows::Real;
    Scores<options, Rows> s(rows, 0, 1, 2);
    const auto apart = set_apart(rows, s);
    const auto t = rows.template value<C>(1, 1);
    auto count = apart.at_top;
    if (rows.some([&](auto r) { return s.top[r] == -infinity<C>(); })) {
        // What a row is padded with is equal to that maximum, too.
        const auto existing = rows.sum([&](auto i) { return s.exists(i) ? (C)1 : (C)0; });
        count = rows.row([&](auto r) {
            const C all = options ? existing[r] : (C)p.n;
            return s.top[r] == -infinity<C>() ? all : apart.at_top[r];
        });
    }
    const auto is_number = rows.row([&](auto r) { return apart.rest[r] == apart.rest[r] || !(t[r] >= 0); });
    rows.put(3, rows.row([&](auto r) {
        const C top = count[r] == 0 ? -infinity<C>() : s.top[r];
        return is_number[r] ? top : nan_of<C>();
    }));
    rows.put(4, rows.row([&](auto r) { return is_number[r] ? t[r] >= 0 ? count[r] : nan_of<C>() : 0; }));
    rows.put(5, rows.row([&](auto r) { return is_number[r] ? apart.rest[r] : 0; }));
}

template <bool options, class Rows>
BOTH auto log_total(Rows& rows, const Scores<options, Rows>& s, const Apart<Rows>& apart) {
    using C = typename Rows::Real;
    auto logarithm = log_of_sum(rows, apart.at_top, apart.rest);
    return rows.row([&](auto r) { return s.top[r] == infinity<C>() ? nan_of<C>() : logarithm[r]; });
}

template <bool options, class Rows>
BOTH auto log_total(Rows& rows, const Scores<options, Rows>& s) {
    return log_total(rows, s, set_apart(rows, s));
}

// v less its entry at the class that has more than half of the probability, and the mean of that. At the class itself the
// difference is 0, and what the others add to the mean is not lost beside it.
template <class Rows>
struct BesideSure {
    using C = typename Rows::Real;
    typename Rows::template Value<C> own, mean;

    template <class P, class V>
    BOTH BesideSure(Rows& rows, const P& p, const V& v) {
        auto sums = rows.template sums<3>([&](auto i) {
            C share = p(i), entry = v(i);
            bool sure = share > (C)0.5;
            return Terms<C, 3>{{sure ? entry : 0, sure ? 0 : share * entry, sure ? (C)1 : 0}};
        });
        own = rows.term(sums, 0), mean = rows.term(sums, 1);
        auto found = rows.term(sums, 2);
        // Less own in every term, and not in the sum, of which nothing is left where the others' entries are close to own.
        if (rows.some([&](auto r) { return found[r] > 0; })) {
            mean = rows.sum([&](auto i) {
                C share = p(i), beside = v(i) - own[i];
                return share > (C)0.5 ? 0 : share * beside;
            });
        }
    }

    BOTH C less_mean(C p, C v, typename Rows::Index i) const {
        C beside = v - own[i];
        return choose(!(p > (C)0.5), beside) - mean[i];
    }
};

// y = exp(z) / Σ exp(z), written to y.
template <bool options, class Rows, class Y>
BOTH void write_softmax(Rows& rows, const Scores<options, Rows>& s, const Y& y) {
    using C = typename Rows::Real;
    auto total = rows.sum([&](auto i) {
        C e = exp(s.z(i));
        y[i] = e;
        return e;
    });
    auto inverse = rows.row([&](auto r) { return 1 / total[r]; });
    rows.each([&](auto i) {
        C p = y[i] * inverse[i];
        y[i] = s.exists(i) ? p : 0;
    });
}

template <bool options, class Rows>
void softmax(const Problem&, Rows& rows) {
    Scores<options, Rows> s(rows, 0, 1, 2);
    write_softmax(rows, s, rows.column(3));
}

template <bool options, class Rows>
void log_softmax(const Problem&, Rows& rows) {
    using C = typename Rows::Real;
    Scores<options, Rows> s(rows, 0, 1, 2);
    auto y = rows.column(3);
    auto total = log_total(rows, s);
    rows.each([&](auto i) {
        C log_p = s.z(i) - total[i];
        y[i] = s.exists(i) ? log_p : -infinity<C>();
    });
}

// The gradients for the logits, gz / T, and for the temperature, -Σ gz·z / T, of which either may not be wanted. gz may
// stand where the first is written.
template <bool options, class Rows, class G>
BOTH void pull_scores(Rows& rows, const Scores<options, Rows>& s, const G& gz, int gx, int gt) {
    using C = typename Rows::Real;
    if (rows.column(gt)) {
        // No score of a row with NaN is a number, and nothing moves.
        auto sums = rows.template sums<2>([&](auto i) {
            C z = s.z(i), c = gz(i), v = s.logit(i);
            bool alive = z > -infinity<C>();
            return Terms<C, 2>{{choose(alive, c) * choose(alive, z), v == v ? (C)0 : (C)1}};
        });
        auto moment = rows.term(sums, 0), nans = rows.term(sums, 1);
        rows.put(gt, rows.row([&](auto r) { return s.over(nans[r] > 0 ? 0 : -moment[r], r); }));
    }
    auto slope = rows.column(gx);
    if (slope) rows.each([&](auto i) { slope[i] = s.over(gz(i), i); });
}

// gz = y·(g - Σ y·g)
template <class Rows, class Y, class G>
BOTH auto pull_of_softmax(Rows& rows, Y y, G g) {
    using C = typename Rows::Real;
    auto alive = [=](auto i) { return choose(y[i] != 0, g[i]); };
    const BesideSure<Rows> beside(rows, [=](auto i) { return (C)y[i]; }, alive);
    return [=](auto i) {
        C p = y[i], slope = p * beside.less_mean(p, alive(i), i);
        return choose(p != 0, slope);
    };
}

template <class Rows>
void softmax_pull_of_answer(const Problem&, Rows& rows) {
    auto gx = rows.column(5);
    auto gz = pull_of_softmax(rows, rows.column(3), rows.column(4));
    rows.each([&](auto i) { gx[i] = gz(i); });
}

template <bool options, class Rows>
void softmax_pull(const Problem&, Rows& rows) {
    Scores<options, Rows> s(rows, 0, 1, 2);
    auto y = rows.column(3);
    if (!y) {
        y = rows.column(7);
        write_softmax(rows, s, y);
    }
    pull_scores(rows, s, pull_of_softmax(rows, y, rows.column(4)), 5, 6);
}

// gz = g - exp(y)·Σ g, which is (1 - p)·g - p·(Σ g - g) at the class that has more than half of the probability.
template <class Rows, class Y, class G>
BOTH auto pull_of_log_softmax(Rows& rows, Y y, G g) {
    using C = typename Rows::Real;
    auto sure = [=](auto i) { return y(i) > (C)-0.69314718; };
    auto sums = rows.template sums<3>([&](auto i) {
        C c = g(i), log_p = y(i);
        return Terms<C, 3>{{sure(i) ? 0 : c, sure(i) ? c : 0, sure(i) ? log_p : 0}};
    });
    auto rest = rows.term(sums, 0), own = rows.term(sums, 1), log_p = rows.term(sums, 2);
    auto total = rows.row([&](auto r) { return rest[r] + own[r]; });
    auto at_sure = rows.row([&](auto r) { return -expm1(log_p[r]) * own[r] - exp(log_p[r]) * rest[r]; });
    return [=](auto i) {
        C slope = g(i) - exp(y(i)) * total[i], own_slope = at_sure[i];
        return choose(sure(i), own_slope, slope);
    };
}

template <class Rows>
void log_softmax_pull_of_answer(const Problem&, Rows& rows) {
    auto y = rows.column(3), g = rows.column(4), gx = rows.column(5);
    auto gz = pull_of_log_softmax(rows, [=](auto i) { return y[i]; }, [=](auto i) { return g[i]; });
    rows.each([&](auto i) { gx[i] = gz(i); });
}

template <bool options, class Rows>
void log_softmax_pull(const Problem&, Rows& rows) {
    using C = typename Rows::Real;
    Scores<options, Rows> s(rows, 0, 1, 2);
    auto y = rows.column(3), g = rows.column(4);
    if (!y) {
        y = rows.column(7);
        auto log_sum = log_total(rows, s);
        rows.each([&](auto i) { y[i] = s.z(i) - log_sum[i]; });
    }
    auto gz = pull_of_log_softmax(
        rows, [&](auto i) { return choose(s.exists(i), y[i], -infinity<C>()); },
        [&](auto i) { return choose(s.exists(i), g[i]); });
    pull_scores(rows, s, gz, 5, 6);
}

// dy = y·(dz - Σ y·dz)
template <bool options, class Rows>
void softmax_push(const Problem&, Rows& rows) {
    using C = typename Rows::Real;
    Scores<options, Rows> s(rows, 0, 1, 2);
    auto dx = rows.column(3), dy = rows.column(4), y = rows.column(5);
    write_softmax(rows, s, y);
    auto dz = [&](auto i) { return s.over(choose(y[i] != 0, dx[i]), i); };
    const BesideSure<Rows> beside(rows, [&](auto i) { return (C)y[i]; }, dz);
    rows.each([&](auto i) {
        C p = y[i], slope = p * beside.less_mean(p, dz(i), i);
        dy[i] = choose(p != 0, slope);
    });
}

// dy = dz - Σ p·dz
template <bool options, class Rows>
void log_softmax_push(const Problem&, Rows& rows) {
    using C = typename Rows::Real;
    Scores<options, Rows> s(rows, 0, 1, 2);
    auto dx = rows.column(3), dy = rows.column(4), p = rows.column(5);
    auto total = log_total(rows, s);
    rows.each([&](auto i) { p[i] = exp(choose(s.exists(i), s.z(i) - total[i], -infinity<C>())); });
    auto dz = [&](auto i) { return s.over(choose(s.exists(i), dx[i]), i); };
    const BesideSure<Rows> beside(
        rows, [&](auto i) { return (C)p[i]; }, [&](auto i) { return choose(p[i] != 0, dz(i)); });
    rows.each([&](auto i) {
        C slope = beside.less_mean(p[i], dz(i), i);
        dy[i] = choose(s.exists(i), slope);
    });
}

// Logits with weights: an entry without weight, or under a mask, does not exist. Without options all weights are 1.
template <bool options, class Rows>
struct Weighted {
    using C = typename Rows::Real;
    using Index = typename Rows::Index;

    typename Rows::template Column<const C> x, weights;
    typename Rows::template Column<const uint8_t> where;
    typename Rows::template Value<C> top;

    explicit Weighted(Rows& rows)
        : x(rows.template column<const C>(0)),
          weights(rows.template column<const C>(1)),
          where(rows.template column<const uint8_t>(2)) {
        top = rows.max([&](auto i) { return logit(i); });
    }

    BOTH bool exists(Index i) const { return options ? (where[i] != 0) & (weights[i] != 0) : true; }
    BOTH C logit(Index i) const { return choose(exists(i), x[i], -infinity<C>()); }
    BOTH C weight(Index i) const { return choose(exists(i), weights[i]); }
};

// y = max + log Σ w·exp(x - max). The terms at the maximum stay out of the sum, as in log_of_sum.
template <bool options, class Rows>
void logsumexp(const Problem&, Rows& rows) {
    using C = typename Rows::Real;
    Weighted<options, Rows> w(rows);
    auto sums = rows.template sums<2>([&](auto i) {
        C e = exp(w.logit(i) - w.top[i]), weight = options ? w.weight(i) : 1;
        bool top = w.logit(i) == w.top[i];
        return Terms<C, 2>{{top ? weight : 0, top ? 0 : e * weight}};
    });
    auto most = rows.term(sums, 0), rest = rows.term(sums, 1);
    if (!options) {
        auto logarithm = log_of_sum(rows, most, rest);
        return rows.put(3, rows.row([&](auto r) { return w.top[r] + logarithm[r]; }));
    }
    rows.put(3, rows.row([&](auto r) {
        bool apart = most[r] > 0;
        return w.top[r] + (log(apart ? most[r] : most[r] + rest[r]) + (apart ? log1p(rest[r] / most[r]) : (C)0));
    }));
}

// dy/dx = w·exp(x - max) / Σ w·exp(x - max), and dy/dw the same without the first w; times g.
template <bool options, class Rows>
void logsumexp_pull(const Problem&, Rows& rows) {
    using C = typename Rows::Real;
    Weighted<options, Rows> w(rows);
    auto g = rows.value(3);
    auto gx = rows.column(4), gw = rows.column(5), terms = rows.column(6);
    auto top = rows.row([&](auto r) { return w.top[r] == -infinity<C>() ? 0 : w.top[r]; });
    auto total = rows.sum([&](auto i) {
        C x = w.logit(i), e = x == infinity<C>() ? x : exp(x - top[i]);
        terms[i] = e;
        return options ? e * w.weight(i) : e;
    });
    auto divisor = rows.row([&](auto r) { return total[r] == 0 ? 1 : total[r]; });
    if (gx) {
        rows.each([&](auto i) { gx[i] = (options ? terms[i] * w.weight(i) : terms[i]) / divisor[i] * g[i]; });
    }
    if (gw) {
        rows.each([&](auto i) {
            C e = w.logit(i) > -infinity<C>() ? terms[i] : 0;
            gw[i] = e / divisor[i] * g[i];
        });
    }
}
