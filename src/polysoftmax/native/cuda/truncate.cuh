// top-k, top-p and min-p without a sort: the last token that is kept is found digit by digit.
//
// Tokens are ordered by logit and then by index. A digit of 11 bits is found from what each of its values adds up to:
// a count for top-k, a mass for top-p. Masses are whole numbers, so that their sums do not depend on the order of the
// threads. A block has a row; it reads it once from memory, and again from the cache for each digit.
//
// A specialisation S says FORMULA, X, C, WIDTH, THREADS and PACKS as for rows; THREADS is the whole block.

const int DIGIT = 11, BINS = 1 << DIGIT, SHARE = BINS / 32;
const int MOST_LEADING = 1024;    // tokens that fit the place of the bins, with their indices

struct FilterArguments {
    const void* x;
    Mask where;
    void *top, *out;
    int* index;
    Index n, rows, x_stride;
    Parameter temperature, k, p, min_p;
};

// A prefix of the order: what comes before `end`, and of what is equal to it that with an index below `limit`.
template <class X>
struct Prefix {
    BitsOf<X> end;
    Index limit;

    DEVICE bool holds(BitsOf<X> order, Index i) const { return order > end || (order == end && i < limit); }
};

template <class S>
struct FilterKernel {
    using X = typename S::X;
    using C = typename S::C;
    using Key = BitsOf<X>;
    static constexpr int W = S::WIDTH, PACKS = S::PACKS, BITS = 8 * sizeof(X);
    static constexpr bool LEADING = S::FORMULA == SAMPLE_LEADING;

    // The greatest of a row, and a NaN in `odd` if there is one.
    struct Top {
        C top, odd;
    };

    // Where among several what is needed is reached: how much of it is left for there, and how much there is.
    struct Place {
        Amount left, there;
        Index which;
    };

    const FilterArguments& a;
    char* shared;
    Amount* bins;
    Index row;
    int member;
    const X* x;
    MaskedRow mask;
    X* out;
    C top, scale;
    RowTemperature<C> t;

    DEVICE FilterKernel(const FilterArguments& arguments, char* shared) : a(arguments), shared(shared) {
        bins = (Amount*)(shared + SCRATCH);
        row = block_index();
        member = thread_index();
        x = (const X*)a.x + row * a.x_stride;
        mask = a.where.of(row);
        out = (X*)a.out + row * a.n;
        t = a.temperature.as_temperature<C>(row);
        scale = scale_of_amounts<C>(a.n);
    }

    DEVICE X entry_at(Index i) const {
        return mask.exists(i) ? x[i] : rounded<X>(-infinity<C>());
    }

    // Call body(index of the first, entries, how many there are) for every access of this thread.
    template <class Body>
    DEVICE void visit(Body body) const {
        const X nothing = rounded<X>(-infinity<C>());
        for (Index first = (Index)member * W; first < a.n; first += (Index)S::THREADS * W * PACKS) {
            Pack<X, W> packs[PACKS];
            UNROLL for (int j = 0; j < PACKS; j++) {
                Index i = first + (Index)j * S::THREADS * W;
                if (i + W <= a.n) packs[j].load(x + i);
            }
            UNROLL for (int j = 0; j < PACKS; j++) {
                Index i = first + (Index)j * S::THREADS * W;
                int count = i + W <= a.n ? W : i < a.n ? (int)(a.n - i) : 0;
                UNROLL for (int e = 0; e < W; e++) {
                    if (count < W && e < count) packs[j].set(e, x[i + e]);
                    if (e < count && !mask.exists(i + e)) packs[j].set(e, nothing);
                }
                if (count) body(i, packs[j], count);
            }
        }
    }

    template <class Body>
    DEVICE void visit_entries(Body body) const {
        visit([&](Index i, const Pack<X, W>& pack, int count) {
            UNROLL for (int e = 0; e < W; e++) {
                if (e < count) body(i + e, pack.get(e));
            }
        });
    }

    DEVICE Top find_top() const {
        Top mine{-infinity<C>(), 0};
        visit_entries([&](Index, X entry) {
            C value = widen(entry);
            mine.top = greater(mine.top, value);
            if (value != value) mine.odd = value;
        });
        return merged<S::THREADS>(
            mine, shared, [](const Top& p, const Top& q) { return Top{greater(p.top, q.top), p.odd + q.odd}; });
    }

    DEVICE C probability(C value) const { return exp(over_temperature(value - top, t)); }    // of the greatest: 1

    // Which of 32 shares, one a lane, the first lane's first, holds the last that is needed. Every warp finds the same.
    DEVICE Place lane_of(Amount own, Amount need) const {
        Amount before = 0, all = own;
        UNROLL for (int mask = 1; mask < 32; mask *= 2) {
            Amount other = across(all, mask);
            if (member & mask) before += other;
            all += other;
        }
        Place found{0, 0, 0};
        if (before < need && need <= before + own) found = Place{need - before, own, member % 32};
        return merged<32>(found, shared, [](const Place& p, const Place& q) {
            return Place{p.left + q.left, p.there + q.there, p.which + q.which};
        });
    }

    // The highest bin down to which, from the top, the bins hold what is needed.
    DEVICE Place bin_of(Amount need) const {
        int lane = member % 32;
        Amount sum = 0;
        for (int i = 0; i < SHARE; i++) sum += bins[BINS - SHARE * (lane + 1) + (i + lane) % SHARE];
        Place share = lane_of(sum, need);
        const Amount* last = bins + BINS - 1 - SHARE * share.which;
        Place pair = lane_of(last[-2 * lane] + last[-2 * lane - 1], share.left);
        Index bin = last - 2 * pair.which - bins;
        if (pair.left <= bins[bin]) return Place{pair.left, bins[bin], bin};
        return Place{pair.left - bins[bin], bins[bin - 1], bin - 1};
    }

    DEVICE Amount all_bins() const {
        Amount sum = 0;
        for (int i = member; i < BINS; i += S::THREADS) sum += bins[i];
        return merged<S::THREADS>(sum, shared, [](Amount p, Amount q) { return p + q; });
    }

    // The key of the last entry that is needed, if they come by their keys, the greatest first, and visit(add) adds
    // each. The lowest bits stay 0 if everything with the others is needed. `need` may be told from the sum of all.
    template <class K, class Visit, class Need>
    DEVICE Place descend(int bits, Visit visit_all, Need need_of) {
        Place found{0, 0, 0};
        for (int left = bits; left > 0 && (left == bits || found.left < found.there);) {
            int shift = left > DIGIT ? left - DIGIT : 0;
            block_barrier();
            for (int i = member; i < BINS; i += S::THREADS) bins[i] = 0;
            block_barrier();
            visit_all([&](K key, Amount weight) {
                if (weight && (left == bits || key >> left == (K)found.which >> left)) {
                    add_in_block(&bins[(key >> shift) & ((1 << (left - shift)) - 1)], weight);
                }
            });
            block_barrier();
            Place next = bin_of(left == bits ? need_of(all_bins()) : found.left);
            found = Place{next.left, next.there, found.which | (Index)((K)next.which << shift)};
            left = shift;
        }
        return found;
    }

    DEVICE Prefix<X> everything() const { return Prefix<X>{0, a.n}; }

    // What a token counts for: its mass, or 1.
    DEVICE Amount weight_of(Key order, bool by_mass) const {
        if (LEADING || !by_mass) return 1;
        return amount_of(probability(widen(number_of<X>(order))), scale);
    }

    // The shortest prefix of another that has a share p of its mass, or k tokens of it.
    DEVICE Prefix<X> shortest(const Prefix<X>& whole, bool by_mass, double p, Amount k) {
        Place last = descend<Key>(
            BITS,
            [&](auto add) {
                visit_entries([&](Index i, X entry) {
                    Key order = order_of(entry);
                    if (whole.holds(order, i)) add(order, weight_of(order, by_mass));
                });
            },
            [&](Amount all) { return by_mass ? share_of(p, all) : k; });
        Key end = (Key)last.which;
        if (last.left == last.there || last.left + weight_of(end, by_mass) > last.there) return Prefix<X>{end, a.n};
        Place lowest = descend<Word>(
            bit_length(a.n),
            [&](auto add) {
                for (Index i = member; i < a.n; i += S::THREADS) {
                    Key order = order_of(entry_at(i));
                    if (order == end && whole.holds(order, i)) add((Word)(a.n - 1 - i), weight_of(order, by_mass));
                }
            },
            [&](Amount) { return last.left; });
        return Prefix<X>{end, a.n - lowest.which};
    }

    DEVICE void write(const Prefix<X>& kept, C min_p) const {
        const X nothing = rounded<X>(-infinity<C>());
        visit([&](Index first, Pack<X, W>& pack, int count) {
            UNROLL for (int e = 0; e < W; e++) {
                bool keep = kept.holds(order_of(pack.get(e)), first + e);
                if (min_p > 0) keep = keep && probability(widen(pack.get(e))) >= min_p;
                if (!keep) pack.set(e, nothing);
            }
            write_pack(first, pack, count);
        });
    }

    DEVICE void write_pack(Index first, const Pack<X, W>& pack, int count) const {
        if (count == W) return pack.store(out + first);
        UNROLL for (int e = 0; e < W; e++) {
            if (e < count) out[first + e] = pack.get(e);
        }
    }

    DEVICE void write_nan() const {
        const X nan = rounded<X>(nan_of<C>());
        visit([&](Index first, Pack<X, W>& pack, int count) {
            UNROLL for (int e = 0; e < W; e++) pack.set(e, nan);
            write_pack(first, pack, count);
        });
    }

    // The leading tokens in the order of their indices: collected as they come, and each put where its rank says.
    DEVICE void write_leading(int k) {
        Prefix<X> kept = shortest(everything(), false, 1, k);
        Amount* taken = bins;
        C* values = (C*)(bins + 1);
        int* indices = (int*)(values + MOST_LEADING);
        block_barrier();
        if (member == 0) *taken = 0;
        block_barrier();
        visit_entries([&](Index i, X entry) {
            if (!kept.holds(order_of(entry), i)) return;
            Amount place = add_in_block(taken, 1);
            values[place] = widen(entry);
            indices[place] = (int)i;
        });
        block_barrier();
        for (int i = member; i < k; i += S::THREADS) {
            int rank = 0;
            for (int j = 0; j < k; j++) rank += indices[j] < indices[i];
            ((C*)a.out)[row * k + rank] = values[i];
            a.index[row * k + rank] = indices[i];
        }
    }

    DEVICE void write_leading_nan(int k) const {
        for (int i = member; i < k; i += S::THREADS) {
            ((C*)a.out)[row * k + i] = nan_of<C>();
            a.index[row * k + i] = i;
        }
    }

    DEVICE void run() {
        Top found = find_top();
        top = found.top;
        bool known = found.odd == found.odd;
        double k = a.k.of<C>(row), p = a.p.of<C>(row), min_p = a.min_p.of<C>(row);
        if constexpr (LEADING) {
            if (member == 0) ((C*)a.top)[row] = known ? top : nan_of<C>();
            return known ? write_leading((int)k) : write_leading_nan((int)k);
        }
        bool answered = known && top < infinity<C>() && k >= 0 && p >= 0 && p <= 1 && min_p >= 0 && min_p <= 1;
        if (!answered || !t.has_answer()) return write_nan();
        Prefix<X> kept = everything();
        // Of two searches one is often off: a loop, so that they are compiled once.
        for (int by_mass = 0; by_mass < 2 && finite(top); by_mass++) {
            if (by_mass ? p < 1 : k > 0 && k < (double)a.n) kept = shortest(kept, by_mass, p, (Amount)ceil(k));
        }
        write(kept, finite(top) ? (C)min_p : 0);
    }
};

#define FILTER_PARAMETERS                                                                                          \
    const void *x, MASK_PARAMETERS, void *top, void *out, int *index, Index n, Index rows, Index x_stride,         \
        GIVEN_PARAMETERS(temperature), GIVEN_PARAMETERS(k), GIVEN_PARAMETERS(p), GIVEN_PARAMETERS(min_p)
#define FILTER_ARGUMENTS                                                                                           \
    {                                                                                                              \
        x, MASK, top, out, index, n, rows, x_stride, GIVEN(temperature), GIVEN(k), GIVEN(p), GIVEN(min_p)          \
    }

template <class S>
DEVICE void run_filter(const FilterArguments& arguments, char* shared) {
    FilterKernel<S>(arguments, shared).run();
}
