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

// exp(x - max), written, and what a slope is made of: 1 / Σ, and 2·z_loss·logsumexp.
template <class Rows>
struct Slope {
    using C = typename Rows::Real;
    typename Rows::template Value<C> inverse, pull_of_z;

    template <class Y>
    Slope(Rows& rows, const LossOptions& o, const Y& terms) {
        auto x = rows.template column<const C>(0);
        auto top = rows.max([&](auto i) { return x[i]; });
        auto total = rows.sum([&](auto i) {
            C e = exp(x[i] - top[i]);
            terms[i] = e;
            return e;
        });
        inverse = rows.row([&](auto r) { return 1 / total[r]; });
        const C factor = (C)(2 * o.z_loss);
        pull_of_z = rows.row([&](auto r) { return factor != 0 ? factor * (top[r] + log(total[r])) : 0; });
    }
};

// (p·Σ c - c + 2·z_loss·logsumexp·p)·g, where c is 0 but for the class, or spread over all by smoothing.
template <class Rows>
void cross_entropy_of_classes_pull(const Problem& problem, Rows& rows) {
    using C = typename Rows::Real;
    const LossOptions o(problem);
    const Classes<Rows> target(rows, o);
    auto x = rows.template column<const C>(0), weight = rows.template column<const C>(2);
    auto g = rows.value(3);
    auto gx = rows.column(4);
    const Slope<Rows> slope(rows, o, gx);
    auto share = smoothing_share(rows, o);
    const C keep = (C)(1 - o.smoothing);
    auto at_class = rows.row([&](auto r) { return weight ? keep * weight.at(r, target.place[r]) : keep; });
    auto p_of_class = rows.row([&](auto r) { return gx.at(r, target.place[r]) * slope.inverse[r]; });
    auto scale = rows.row([&](auto r) { return target.known[r] ? g[r] : nan_of<C>(); });
    // A row that is ignored is 0 whatever its logits are, which may be NaN.
    auto write = [&](auto r, int64_t i, C y) { gx.at(r, i) = target.counts[r] ? y : 0; };
    if (!o.smoothing) {
        auto factor = rows.row([&](auto r) { return (at_class[r] + slope.pull_of_z[r]) * scale[r]; });
        rows.each([&](auto i) {
            C y = gx[i] * slope.inverse[i] * factor[i];
            gx[i] = target.counts[i] ? y : 0;
        });
        rows.row([&](auto r) {
            C y = ((p_of_class[r] - 1) * at_class[r] + slope.pull_of_z[r] * p_of_class[r]) * scale[r];
            write(r, target.place[r], y);
            return 0;
        });
        return;
    }
    auto spread = [&](auto i) {
        C c = x[i] == -infinity<C>() ? 0 : share[i];
        return c * weight[i];
    };
    auto spread_total = rows.sum(spread);
    auto total = rows.row([&](auto r) { return spread_total[r] + at_class[r]; });
    auto of_class = rows.row([&](auto r) {
        int64_t t = target.place[r];
        C c = (x.at(r, t) == -infinity<C>() ? 0 : share[r]) + keep, p = p_of_class[r];
        return (p * total[r] - c * weight.at(r, t) + slope.pull_of_z[r] * p) * scale[r];
    });
    rows.each([&](auto i) {
        C p = gx[i] * slope.inverse[i];
        C y = (p * total[i] - spread(i) + slope.pull_of_z[i] * p) * scale[i];
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
    auto x = rows.template column<const C>(0), q = rows.template column<const C>(1);
    auto weight = rows.template column<const C>(2);
    auto g = rows.value(3);
    auto gx = rows.column(4);
    const Slope<Rows> slope(rows, o, gx);
    auto share = smoothing_share(rows, o);
    const C keep = (C)(1 - o.smoothing);
    auto c = [&](auto i) {
        C smoothed = keep * q[i] + (x[i] == -infinity<C>() ? 0 : share[i]);
        return smoothed * weight[i];
    };
    auto total = rows.sum(c);
    rows.each([&](auto i) {
        C p = gx[i] * slope.inverse[i];
        gx[i] = (p * total[i] - c(i) + slope.pull_of_z[i] * p) * g[i];
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

// p, q and log p - log q of two rows of logits with one temperature and one mask.
template <bool options, class Rows>
struct Pair {
    using C = typename Rows::Real;
    using Index = typename Rows::Index;

    Scores<options, Rows> a, b;
    typename Rows::template Value<C> log_a, log_b;

    explicit Pair(Rows& rows) : a(rows, 0, 2, 3), b(rows, 1, 2, 3) {
        log_a = log_total(rows, a);
        log_b = log_total(rows, b);
    }

    BOTH C log_p(Index i) const { return choose(a.exists(i), a.z(i) - log_a[i], -infinity<C>()); }
    BOTH C log_q(Index i) const { return choose(a.exists(i), b.z(i) - log_b[i], -infinity<C>()); }
    BOTH C ratio(Index i, C p) const { return choose(p != 0, log_p(i)) - choose(p != 0, log_q(i)); }
};

// Σ p·(log p - log q)
template <bool options, class Rows>
void kl_divergence(const Problem&, Rows& rows) {
    using C = typename Rows::Real;
    const Pair<options, Rows> pair(rows);
    rows.put(4, rows.sum([&](auto i) {
        C p = exp(pair.log_p(i));
        return p * pair.ratio(i, p);
    }));
}

// gz is p·(log p - log q - y)·g for the one, (q - p)·g for the other; both pull at the temperature.
template <bool options, class Rows>
void kl_divergence_pull(const Problem&, Rows& rows) {
    using C = typename Rows::Real;
    const Pair<options, Rows> pair(rows);
    auto g = rows.value(4);
    auto y = rows.sum([&](auto i) {
        C p = exp(pair.log_p(i));
        return p * pair.ratio(i, p);
    });
    pull_scores(rows, pair.a, [&](auto i) {
        C p = exp(pair.log_p(i));
        return p * (pair.ratio(i, p) - y[i]) * g[i];
    }, 5, 7);
    auto of_p = rows.value(7);
    pull_scores(rows, pair.b, [&](auto i) { return (exp(pair.log_q(i)) - exp(pair.log_p(i))) * g[i]; }, 6, 7);
    if (rows.column(7)) {
        auto of_q = rows.value(7);
        rows.put(7, rows.row([&](auto r) { return of_p[r] + of_q[r]; }));
    }
}
