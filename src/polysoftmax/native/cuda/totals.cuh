// What a thread finds in its part of a row, and how parts are merged: totals, amounts, best scores.

// The temperature of a row, and log2(e) / T. Nothing is divided by a temperature that is not given, which is 1.
template <class C>
struct RowTemperature : Temperature<C> {
    C scale;
    bool given;

    DEVICE bool has_answer() const { return this->divisor == this->divisor; }
    DEVICE bool is_zero() const { return this->bound == 0; }
};

template <class C>
DEVICE RowTemperature<C> row_temperature(bool given, C value) {
    Temperature<C> t = temperature_of(value);
    // Redundant, but without it the compiler selects the divisor again for each entry.
    t.divisor = t.regular ? value : t.divisor;
    // A scale of inf would make NaN of the maximum itself.
    C scale = (C)1.4426950408889634 / t.divisor, most = largest<C>;
    return RowTemperature<C>{t, scale > most ? most : scale, given};
}

template <class C>
DEVICE C over_temperature(C distance, const RowTemperature<C>& t) {
    return t.given ? over_temperature(distance, t.divisor, t.bound) : distance;
}

template <class C>
DEVICE C over_regular_temperature(C slope, const RowTemperature<C>& t) {
    return t.given ? over_regular_temperature<C>(slope, (const Temperature<C>&)t) : slope;
}

// exp((x - max) / T) for a sum.
template <class C>
DEVICE C term(C distance, const RowTemperature<C>& t) {
    return distance < t.bound ? 0 : quick_exp2(distance * t.scale);
}

// Σ exp((x - top) / T) over a part of a row: the number of its entries at the top, and the sum of the others, so that a
// logarithm close to 0 keeps its digits. `lost` is what rounding has cost `rest`. A NaN among the entries is a NaN in
// `rest`; a row without an answer has a top of -inf or +inf.
template <class C>
struct Total {
    C top, count, rest, lost;
};

template <class C>
DEVICE Total<C> no_entries() {
    return Total<C>{-infinity<C>(), 0, 0, 0};
}

template <class C>
DEVICE void add_exactly(Total<C>& a, C more) {
    C sum = a.rest + more, part = sum - a.rest;
    a.lost += (a.rest - (sum - part)) + (more - part);
    a.rest = sum;
}

// The greater top comes first whichever way round the arguments are, so that all threads get the same bits.
template <class C>
DEVICE Total<C> merge(Total<C> a, Total<C> b, const RowTemperature<C>& t) {
    if (a.top == b.top) {
        a.count += b.count;
        a.rest += b.rest;
        a.lost += b.lost;
        return a;
    }
    Total<C> high = a.top > b.top ? a : b, low = a.top > b.top ? b : a;
    C factor = term(low.top - high.top, t);
    high.rest += (low.count + low.rest) * factor;
    high.lost += low.lost * factor;
    return high;
}

// Σ of W numbers, in a tree.
template <int W, class C>
DEVICE C tree_sum(const C* x) {
    if constexpr (W == 1) {
        return x[0];
    } else {
        return tree_sum<W / 2>(x) + tree_sum<W - W / 2>(x + W / 2);
    }
}

// Add W entries to a part of a row. Entries that do not exist are -inf.
template <int W, class C>
DEVICE void add_entries(Total<C>& a, const C* x, const RowTemperature<C>& t) {
    C top = a.top;
    for (int i = 0; i < W; i++) top = greater(top, x[i]);
    if (top > a.top) a = merge(a, Total<C>{top, 0, 0, 0}, t);
    C reference = finite(top) ? top : 0, terms[W];
    for (int i = 0; i < W; i++) {
        bool at_top = x[i] == top;
        a.count += at_top ? 1 : 0;
        C distance = x[i] - reference;
        terms[i] = at_top ? 0 : term(distance, t);
    }
    add_exactly(a, tree_sum<W>(terms));
}

template <class C>
DEVICE C sum_of(const Total<C>& a) {
    return finite(a.top) ? a.count + (a.rest + a.lost) : nan_of<C>();
}

// log Σ exp(x - top), with the terms at the top kept out of the sum.
template <class C>
DEVICE C log_of_sum(const Total<C>& a) {
    C rest = a.rest + a.lost;
    return log(a.count) + log1p(rest / a.count);
}

template <class C>
DEVICE C logsumexp_of(const Total<C>& a) {
    if (finite(a.top)) return a.top + log_of_sum(a);
    return a.rest != a.rest ? a.rest : a.top;
}

// The loss of a row for a target class at the logit x: log Σ exp(x - top) + (top - x), weighted, and the z-loss.
template <class C>
DEVICE C loss_of(const Total<C>& a, C x, C weight, C z_loss) {
    if (!finite(a.top)) return nan_of<C>();
    C log_total = log_of_sum(a), nll = log_total + (a.top - x);
    C y = weight == 0 && nll == infinity<C>() ? 0 : weight * nll;
    C z = a.top + log_total;
    return z_loss != 0 ? y + z_loss * (z * z) : y;
}

// Digits need unsigned integers: places, of which the lowest is 0.
template <class X>
constexpr BitsOf<X> lowest_place = (BitsOf<X>)1 << (8 * sizeof(X) - 1);

template <class X>
DEVICE BitsOf<X> order_of(X x) {
    return (BitsOf<X>)place(x) ^ lowest_place<X>;
}

template <class X>
DEVICE X number_of(BitsOf<X> order) {
    return number<X>((PlaceOf<X>)(order ^ lowest_place<X>));
}

// Probabilities, of which the greatest is 1, as whole numbers: n of them have a sum of at most 2^62.
template <class C>
DEVICE C scale_of_amounts(Index n) {
    return (C)of_bits<float>((Word)(127 + 62 - bit_length(n)) << 23);
}

template <class C>
DEVICE Amount amount_of(C probability, C scale) {
    return (Amount)(probability * scale + (C)0.5);
}

// The best score so far; the lowest index among equals.
template <class C>
struct Best {
    C score;
    Index index;
};

template <class C>
DEVICE Best<C> merge(Best<C> a, Best<C> b) {
    return a.score > b.score || (a.score == b.score && a.index < b.index) ? a : b;
}

// A score with its variate: at T = 0 there is none, and the entries that are left are equal.
template <class C>
DEVICE C noisy_score(C score, const RowTemperature<C>& t, Words key, Index index, Word domain) {
    if (score == -infinity<C>()) return score;
    if (t.is_zero()) return 0;
    return score + (C)gumbel_of(random_words(key, (Word)index, domain).first);
}
