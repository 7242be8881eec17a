// What a thread finds in its part of a row, and how parts are merged: totals, amounts, best scores.

template <class T, int W, class C>
DEVICE void widen_all(const Pack<T, W>& from, C* to) {
    if constexpr (Pack<T, W>::IN_PAIRS) {
        UNROLL for (int i = 0; i < W / 2; i++) widen_pair<T>(from.kept[i], to + 2 * i);
    } else {
        UNROLL for (int i = 0; i < W; i++) to[i] = widen(from.get(i));
    }
}

template <class T, int W, class C>
DEVICE void round_all(const C* from, Pack<T, W>& to) {
    if constexpr (Pack<T, W>::IN_PAIRS && sizeof(C) == 4) {
        UNROLL for (int i = 0; i < W / 2; i++) to.kept[i] = round_pair<T>(from + 2 * i);
    } else {
        UNROLL for (int i = 0; i < W; i++) to.set(i, rounded<T>(from[i]));
    }
}

// The greatest of the numbers that are not NaN.
template <class T, int W>
DEVICE auto top_of(const Pack<T, W>& pack) {
    if constexpr (Pack<T, W>::IN_PAIRS) {
        Word pair = pack.kept[0];
        UNROLL for (int i = 1; i < W / 2; i++) pair = greater_pair<T>(pair, pack.kept[i]);
        float both[2];
        widen_pair<T>(pair, both);
        return greater(both[0], both[1]);
    } else {
        auto top = widen(pack.get(0));
        UNROLL for (int i = 1; i < W; i++) top = greater(top, widen(pack.get(i)));
        return top;
    }
}

// The temperature of a row, and log2(e) over its divisor. Nothing is divided by a temperature that is not given, which is 1.
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
    t.divisor = value > 0 && !t.limit ? t.half * value : t.divisor;
    // A scale of inf would make NaN of the maximum itself.
    C scale = (C)1.4426950408889634 / t.divisor, most = largest<C>;
    return RowTemperature<C>{t, scale > most ? most : scale, given};
}

template <class C>
DEVICE C score_below(C x, C top, const RowTemperature<C>& t) {
    C distance = halved_distance(x, top, t.half);
    return t.given ? over_temperature(distance, t.divisor, t.bound) : distance;
}

template <class C>
DEVICE C slope_over_temperature(C slope, const RowTemperature<C>& t) {
    return t.given ? slope_over_temperature<C>(slope, (const Temperature<C>&)t) : slope;
}

// exp((x - top) / T) for a sum.
template <class C>
DEVICE C term_below(C x, C top, const RowTemperature<C>& t) {
    C distance = halved_distance(x, top, t.half);
    return distance < t.bound ? 0 : quick_exp2(distance * t.scale);
}

// Σ exp((x - top) / T) over a part of a row. A NaN among the entries is a NaN in the sum; a row without an answer has a
// top of -inf or +inf.
template <class C>
struct Total {
    C top, sum;
};

template <class C>
DEVICE Total<C> no_entries() {
    return Total<C>{-infinity<C>(), 0};
}

// The greater top comes first whichever way round the arguments are, so that all threads get the same bits.
template <class C>
DEVICE Total<C> merge(const Total<C>& a, const Total<C>& b, const RowTemperature<C>& t) {
    bool ordered = a.top > b.top;
    Total<C> high = ordered ? a : b, low = ordered ? b : a;
    // Of equals neither is scaled: -inf less -inf is no number.
    C factor = a.top == b.top ? 1 : term_below(low.top, high.top, t);
    return Total<C>{high.top, high.sum + low.sum * factor};
}

// A sum of many numbers, and what rounding has cost it.
template <class C>
struct LongSum {
    C sum = 0, lost = 0;

    DEVICE void add(C more) {
        C next = sum + more, part = next - sum;
        lost += (sum - (next - part)) + (more - part);
        sum = next;
    }
    DEVICE void scale(C by) { sum *= by, lost *= by; }
    DEVICE C value() const { return finite(sum) ? sum + lost : sum; }    // what an infinite sum has lost is NaN
};

// Σ of W numbers, in a tree.
template <int W, class C>
DEVICE C tree_sum(const C* x) {
    if constexpr (W == 1) {
        return x[0];
    } else {
        return tree_sum<W / 2>(x) + tree_sum<W - W / 2>(x + W / 2);
    }
}

template <class C>
DEVICE C sum_of(const Total<C>& a) {
    return finite(a.top) ? a.sum : nan_of<C>();
}

template <class C>
DEVICE C logsumexp_of(const Total<C>& a, C log_of_sum) {
    if (finite(a.top)) return a.top + log_of_sum;
    return a.sum != a.sum ? a.sum : a.top;
}

// The loss of a row for a target class at the logit x: log Σ exp(x - top) + (top - x), weighted, and the z-loss.
template <class C>
DEVICE C loss_of(const Total<C>& a, C log_of_sum, C x, C weight, C z_loss) {
    if (!finite(a.top)) return nan_of<C>();
    C nll = log_of_sum + (a.top - x);
    C y = weight == 0 && nll == infinity<C>() ? 0 : weight * nll;
    C z = a.top + log_of_sum;
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
    int index;
};

template <class C>
DEVICE Best<C> merge(Best<C> a, Best<C> b) {
    return a.score > b.score || (a.score == b.score && a.index < b.index) ? a : b;
}

// A score with its variate: at T = 0 there is none, and the entries that are left are equal.
template <class C>
DEVICE C noisy_score(C score, const RowTemperature<C>& t, Words key, int index, Word domain) {
    if (score == -infinity<C>()) return score;
    if (t.is_zero()) return 0;
    return score + (C)gumbel_of(random_words(key, (Word)index, domain).first);
}
