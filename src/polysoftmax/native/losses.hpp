// cross_entropy, entropy, kl_divergence and their gradients, as _losses.py defines them.
#pragma once

#include "softmax.hpp"

struct LossOptions {
    bool ignores;
    int64_t ignored;
    double smoothing, z_loss;

    explicit LossOptions(const Problem& p)
        : ignores(p.options[0] != 0), ignored(p.options[1]), smoothing(p.real_option(2)), z_loss(p.real_option(3)) {}
};

// c·nll, where a class without weight adds 0 even if it is impossible.
template <class C>
BOTH C times(C c, C nll) {
    return c == 0 && nll == infinity<C>() ? 0 : c * nll;
}

// The maximum of rows of logits, and log Σ exp(x - max), which is NaN where the maximum is not finite.
template <class Rows>
struct Likelihood {
    using C = typename Rows::Real;
    using Index = typename Rows::Index;
    template <class T>
    using Value = typename Rows::template Value<T>;

    typename Rows::template Column<const C> x;
    Value<C> top, log_total;

    explicit Likelihood(Rows& rows) : x(rows.template column<const C>(0)) {
        top = rows.max([&](auto i) { return x[i]; });
        auto sums = rows.template sums<2>([&](auto i) {
            C e = exp(x[i] - top[i]);
            bool at_top = x[i] == top[i];
            return Terms<C, 2>{{at_top ? (C)1 : (C)0, at_top ? (C)0 : e}};
        });
        auto count = rows.term(sums, 0), rest = rows.term(sums, 1);
        auto logarithm = log_of_sum(rows, count, rest);
        log_total = rows.row([&](auto r) { return finite(top[r]) ? logarithm[r] : nan_of<C>(); });
    }

    BOTH C nll(Index i) const { return log_total[i] - (x[i] - top[i]); }
    BOTH C z_loss(C factor, Index r) const {
        C value = top[r] + log_total[r];
        return factor != 0 ? factor * (value * value) : 0;
    }
};

// The target class of each row: `known` if there is such a class, `counts` unless it is ignored.
template <class Rows>
struct Classes {
    template <class T>
    using Value = typename Rows::template Value<T>;
    using Index = typename Rows::Index;

    Value<int64_t> place;
    Value<bool> known, counts;

    Classes(Rows& rows, const LossOptions& o) {
        auto target = rows.template value<int64_t>(1);
        counts = rows.row([&](auto r) { return !(o.ignores && target[r] == o.ignored); });
        known = rows.row([&](auto r) { return target[r] >= 0 && target[r] < rows.n; });
        place = rows.row([&](auto r) { return known[r] ? target[r] : (int64_t)0; });
    }
};

// ε / C' of each row: what smoothing adds to the target of every possible class.
template <class Rows>
BOTH auto smoothing_share(Rows& rows, const LossOptions& o) {
    using C = typename Rows::Real;
    auto x = rows.template column<const C>(0);
    const C smoothing = (C)o.smoothing;
    if (!o.smoothing) return rows.row([](auto) { return (C)0; });
    auto possible = rows.sum([&](auto i) { return x[i] == -infinity<C>() ? (C)0 : (C)1; });
    return rows.row([&](auto r) { return smoothing / possible[r]; });
}

// The loss where each row has a target class.
template <class Rows>
void cross_entropy_of_classes(const Problem& problem, Rows& rows) {
    using C = typename Rows::Real;
    const LossOptions o(problem);
    const Classes<Rows> target(rows, o);
    const Likelihood<Rows> likely(rows);
    auto weight = rows.template column<const C>(2);
    const C keep = (C)(1 - o.smoothing), z_factor = (C)o.z_loss;
    auto loss = rows.row([&](auto r) {
        C nll = likely.log_total[r] + (likely.top[r] - likely.x.at(r, target.place[r]));
        C c = weight ? keep * weight.at(r, target.place[r]) : keep;
        return times(c, nll);
    });
    if (o.smoothing) {
        auto share = smoothing_share(rows, o);
        auto spread = rows.sum([&](auto i) {
            C c = likely.x[i] == -infinity<C>() ? 0 : share[i];
            return times(c * weight[i], likely.nll(i));
        });
        loss = rows.row([&](auto r) { return loss[r] + spread[r]; });
    }
    rows.put(3, rows.row([&](auto r) {
        C y = target.known[r] ? loss[r] + likely.z_loss(z_factor, r) : nan_of<C>();
        return target.counts[r] ? y : 0;
    }));
}

// The loss where each row has a probability for every class.
template <class Rows>
void cross_entropy_of_probabilities(const Problem& problem, Rows& rows) {
    using C = typename Rows::Real;
    const LossOptions o(problem);
    const Likelihood<Rows> likely(rows);
    auto q = rows.template column<const C>(1), weight = rows.template column<const C>(2);
    auto share = smoothing_share(rows, o);
    const C keep = (C)(1 - o.smoothing), z_factor = (C)o.z_loss;
    auto loss = rows.sum([&](auto i) {
        C c = keep * q[i] + (likely.x[i] == -infinity<C>() ? 0 : share[i]);
        return times(c * weight[i], likely.nll(i));
    });
    rows.put(3, rows.row([&](auto r) { return loss[r] + likely.z_loss(z_factor, r); }));
}

// exp(x - max), written, and what a slope is made of: 1 / Σ, what the others have beside a class that is alone at the
// maximum, and 2·z_loss·logsumexp.
template <class Rows>
struct Slope {
    using C = typename Rows::Real;
    using Index = typename Rows::Index;
    typename Rows::template Column<const C> x;
    typename Rows::template Value<C> top, inverse, others, pull_of_z;
    typename Rows::template Value<bool> alone;

    template <class Y>
    Slope(Rows& rows, const LossOptions& o, const Y& terms) : x(rows.template column<const C>(0)) {
        // Not the members: what is written to the terms could change those, as far as the compiler knows.
        auto logits = x;
        auto greatest = rows.max([&](auto i) { return logits[i]; });
        rows.each([&](auto i) { terms[i] = exp(logits[i] - greatest[i]); });
        auto sums = rows.template sums<2>([&](auto i) {
            C e = terms[i];
            bool at_top = logits[i] == greatest[i];
            return Terms<C, 2>{{at_top ? (C)1 : (C)0, at_top ? (C)0 : e}};
        });
        top = greatest;
        const Apart<Rows> apart{rows.term(sums, 0), rows.term(sums, 1)};
        inverse = rows.row([&](auto r) { return finite(top[r]) ? 1 / (apart.at_top[r] + apart.rest[r]) : nan_of<C>(); });
        others = rows.row([&](auto r) { return apart.rest[r] * inverse[r]; });
        alone = rows.row([&](auto r) { return apart.at_top[r] == 1; });
        const C factor = (C)(2 * o.z_loss);
        if (factor == 0) {
            pull_of_z = rows.row([](auto) { return (C)0; });
        } else {
            auto logarithm = log_of_sum(rows, apart.at_top, apart.rest);
            pull_of_z = rows.row([&](auto r) { return factor * (top[r] + logarithm[r]); });
        }
    }

    BOTH bool is_sure(Index r, C logit) const { return alone[r] & (logit == top[r]); }
    // p·Σ c - c + 2·z_loss·logsumexp·p, of a class like any other, and of the sure one, where `rest` is Σ c of the others.
    BOTH C of(C p, C total, C c, Index r) const { return p * total - c + pull_of_z[r] * p; }
    BOTH C of_sure(C rest, C c, Index r) const {
        return inverse[r] * rest - others[r] * c + pull_of_z[r] * inverse[r];
    }
};

// Σ c over the classes at the maximum, and over the others.
template <class Rows, class F>
BOTH auto weights_apart(Rows& rows, const Slope<Rows>& slope, F c) {
    using C = typename Rows::Real;
    auto sums = rows.template sums<2>([&](auto i) {
        C share = c(i);
        bool at_top = slope.x[i] == slope.top[i];
        return Terms<C, 2>{{at_top ? share : 0, at_top ? 0 : share}};
    });
    return Apart<Rows>{rows.term(sums, 0), rows.term(sums, 1)};
}

// (p·Σ c - c + 2·z_loss·logsumexp·p)·g, where c is 0 but for the class, or spread over all by smoothing.
template <class Rows>
void cross_entropy_of_classes_pull(const Problem& problem, Rows& rows) {
    using C = typename Rows::Real;
    const LossOptions o(problem);
    const Classes<Rows> target(rows, o);
    auto weight = rows.template column<const C>(2);
    auto g = rows.value(3);
    auto gx = rows.column(4);
    const Slope<Rows> slope(rows, o, gx);
    auto share = smoothing_share(rows, o);
    const C keep = (C)(1 - o.smoothing);
    auto at_class = rows.row([&](auto r) { return weight ? keep * weight.at(r, target.place[r]) : keep; });
    auto is_sure = rows.row([&](auto r) { return slope.is_sure(r, slope.x.at(r, target.place[r])); });
    auto scale = rows.row([&](auto r) { return target.known[r] ? g[r] : nan_of<C>(); });
    // A row that is ignored is 0 whatever its logits are, which may be NaN.
    auto write = [&](auto r, int64_t i, C y) { gx.at(r, i) = target.counts[r] ? y : 0; };
    auto p_of_class = rows.row([&](auto r) { return gx.at(r, target.place[r]) * slope.inverse[r]; });
    if (!o.smoothing) {
        auto factor = rows.row([&](auto r) { return (at_class[r] + slope.pull_of_z[r]) * scale[r]; });
        rows.each([&](auto i) {
            C y = gx[i] * slope.inverse[i] * factor[i];
            gx[i] = target.counts[i] ? y : 0;
        });
        rows.row([&](auto r) {
            C p = p_of_class[r], others = is_sure[r] ? slope.others[r] : 1 - p;
            write(r, target.place[r], (slope.pull_of_z[r] * p - others * at_class[r]) * scale[r]);
            return 0;
        });
        return;
    }
    auto spread = [&](auto i) {
        C c = slope.x[i] == -infinity<C>() ? 0 : share[i];
        return c * weight[i];
    };
    const Apart<Rows> spread_apart = weights_apart(rows, slope, spread);
    auto total = rows.row([&](auto r) { return spread_apart.at_top[r] + spread_apart.rest[r] + at_class[r]; });
    auto of_sure = rows.row([&](auto r) {
        C own = is_sure[r] ? at_class[r] : 0;
        return slope.of_sure(spread_apart.rest[r] + (at_class[r] - own), spread_apart.at_top[r] + own, r) * scale[r];
    });
    auto of_class = rows.row([&](auto r) {
        int64_t t = target.place[r];
        C c = ((slope.x.at(r, t) == -infinity<C>() ? 0 : share[r]) + keep) * weight.at(r, t);
        C y = slope.of(p_of_class[r], total[r], c, r) * scale[r];
        return is_sure[r] ? of_sure[r] : y;
    });
    rows.each([&](auto i) {
        C y = slope.of(gx[i] * slope.inverse[i], total[i], spread(i), i) * scale[i], own = of_sure[i];
        y = choose(slope.is_sure(i, slope.x[i]), own, y);
        gx[i] = target.counts[i] ? y : 0;
    });
    rows.row([&](auto r) {
        write(r, target.place[r], of_class[r]);
        return 0;
    });
}

template <class Rows>
void cross_entropy_of_probabilities_pull(const Problem& problem, Rows& rows) {
    using C = typename Rows::Real;
    const LossOptions o(problem);
    auto q = rows.template column<const C>(1), weight = rows.template column<const C>(2);
    auto g = rows.value(3);
    auto gx = rows.column(4);
    const Slope<Rows> slope(rows, o, gx);
    auto share = smoothing_share(rows, o);
    const C keep = (C)(1 - o.smoothing);
    auto c = [&](auto i) {
        C smoothed = keep * q[i] + (slope.x[i] == -infinity<C>() ? 0 : share[i]);
        return smoothed * weight[i];
    };
    const Apart<Rows> apart = weights_apart(rows, slope, c);
    auto total = rows.row([&](auto r) { return apart.at_top[r] + apart.rest[r]; });
    auto of_sure = rows.row([&](auto r) { return slope.of_sure(apart.rest[r], apart.at_top[r], r); });
    rows.each([&](auto i) {
        C y = slope.of(gx[i] * slope.inverse[i], total[i], c(i), i), own = of_sure[i];
        gx[i] = choose(slope.is_sure(i, slope.x[i]), own, y) * g[i];
    });
}

// -Σ p·log p = log Σ exp(z) - Σ p·z. Both are at least 0, so nothing cancels.
template <bool options, class Rows>
BOTH auto entropy_of(Rows& rows, const Scores<options, Rows>& s, typename Rows::template Value<typename Rows::Real>& log_sum) {
    using C = typename Rows::Real;
    auto sums = rows.template sums<3>([&](auto i) {
        C z = s.z(i), e = exp(z);
        bool top = s.at_top(i);
        return Terms<C, 3>{{top ? (C)1 : (C)0, top ? (C)0 : e, e * choose(e != 0, z)}};
    });
    auto count = rows.term(sums, 0), rest = rows.term(sums, 1), moment = rows.term(sums, 2);
    log_sum = log_of_sum(rows, count, rest);
    auto y = rows.row([&](auto r) { return log_sum[r] - moment[r] / (count[r] + rest[r]); });
    if (!options) return y;
    auto any = s.any(rows);
    return rows.row([&](auto r) { return any[r] > 0 ? y[r] : 0; });
}

template <bool options, class Rows>
void entropy(const Problem&, Rows& rows) {
    Scores<options, Rows> s(rows, 0, 1, 2);
    typename Rows::template Value<typename Rows::Real> log_sum;
    rows.put(3, entropy_of(rows, s, log_sum));
}

// gz = -p·(log p + y)·g
template <bool options, class Rows>
void entropy_pull(const Problem&, Rows& rows) {
    using C = typename Rows::Real;
    Scores<options, Rows> s(rows, 0, 1, 2);
    typename Rows::template Value<C> log_sum;
    auto y = entropy_of(rows, s, log_sum);
    auto g = rows.value(3);
    pull_scores(rows, s, [&](auto i) {
        C log_p = choose(s.exists(i), s.z(i) - log_sum[i], -infinity<C>());
        C p = exp(log_p);
        return -p * (choose(p != 0, log_p) + y[i]) * g[i];
    }, 4, 5);
}

// Of two rows of logits with one temperature and one mask: p, q, q - p and log p - log q.
template <bool options, class Rows>
struct Pair {
    using C = typename Rows::Real;
    using Index = typename Rows::Index;

    Scores<options, Rows> a, b;
    typename Rows::template Value<C> log_a, log_b, others_a, others_b;
    typename Rows::template Value<bool> sure_a, sure_b;    // whether one class is alone at the maximum

    explicit Pair(Rows& rows) : a(rows, 0, 2, 3), b(rows, 1, 2, 3) {
        find_others(rows, a, log_a, others_a, sure_a);
        find_others(rows, b, log_b, others_b, sure_b);
    }

    template <class Log, class Sure>
    BOTH static void find_others(Rows& rows, const Scores<options, Rows>& s, Log& log_sum, Log& others, Sure& sure) {
        const Apart<Rows> apart = set_apart(rows, s);
        log_sum = log_total(rows, s, apart);
        others = rows.row([&](auto r) { return apart.rest[r] / (apart.at_top[r] + apart.rest[r]); });
        sure = rows.row([&](auto r) { return apart.at_top[r] == 1 && finite(s.top[r]); });
    }

    BOTH C log_p(Index i) const { return choose(a.exists(i), a.z(i) - log_a[i], -infinity<C>()); }
    BOTH C log_q(Index i) const { return choose(a.exists(i), b.z(i) - log_b[i], -infinity<C>()); }
    BOTH C ratio(Index i, C p) const { return choose(p != 0, log_p(i)) - choose(p != 0, log_q(i)); }

    BOTH C difference(Index i, C p) const {
        C q = exp(log_q(i)), of_b = others_b[i];
        C others = choose(b.at_top(i) & sure_b[i], of_b, 1 - q), difference = others_a[i] - others;
        return choose(a.at_top(i) & sure_a[i], difference, q - p);
    }
};

// Σ p·r + q - p with r = log p - log q: p and q have the same sum, and no term is negative.
template <bool options, class Rows>
BOTH auto divergence_of(Rows& rows, const Pair<options, Rows>& pair) {
    using C = typename Rows::Real;
    return rows.sum([&](auto i) {
        C p = exp(pair.log_p(i)), r = pair.ratio(i, p);
        bool near = (r < (C)0.5) & (r > (C)-0.5) & (p != 0);
        C close = p * excess(choose(near, r)), far = pair.difference(i, p) + p * r;
        C y = choose(near, close, far);
        return choose(!(y < 0), y);
    });
}

template <bool options, class Rows>
void kl_divergence(const Problem&, Rows& rows) {
    const Pair<options, Rows> pair(rows);
    rows.put(4, divergence_of(rows, pair));
}

// gz is p·(log p - log q - y)·g for the one, (q - p)·g for the other; both pull at the temperature.
template <bool options, class Rows>
void kl_divergence_pull(const Problem&, Rows& rows) {
    using C = typename Rows::Real;
    const Pair<options, Rows> pair(rows);
    auto g = rows.value(4);
    auto y = divergence_of(rows, pair);
    pull_scores(rows, pair.a, [&](auto i) {
        C p = exp(pair.log_p(i));
        return p * (pair.ratio(i, p) - y[i]) * g[i];
    }, 5, 7);
    auto of_p = rows.value(7);
    pull_scores(rows, pair.b, [&](auto i) { return pair.difference(i, exp(pair.log_p(i))) * g[i]; }, 6, 7);
    if (rows.column(7)) {
        auto of_q = rows.value(7);
        rows.put(7, rows.row([&](auto r) { return of_p[r] + of_q[r]; }));
    }
}
