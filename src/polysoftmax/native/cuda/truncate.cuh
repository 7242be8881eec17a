// top-k, top-p and min-p without a sort: the last token that is kept is found in two or three readings of the row.
//
// Tokens are ordered by logit and then by index. A block has a row. It reads it once for the greatest of each part of it,
// of which the k-th is a bound of what top-k keeps; their masses give a bound of what top-p keeps. The tokens down to a
// bound are listed in shared memory, and the last one is looked for there. For top-p, and where too many tokens are at the
// bound, the row is read once more between the two, to add up what there is in each of 2048 steps of the logit; only what
// is in the step where the last token is has to be listed then. If the list is too short for that, too, because many
// tokens are equal, the row itself is searched.
//
// A search finds the last token from what the tokens of each bin add up to, a count or a mass. Masses are whole numbers,
// so that their sums do not depend on the order of the threads.
//
// A specialisation S says KIND, X, C, WIDTH, THREADS and PACKS as for rows; THREADS is the whole block.

const int DIGIT = 11, BINS = 1 << DIGIT;
const int LISTED = 2048;          // tokens that fit the list
const int MOST_LEADING = 1024;    // tokens that fit the place of the bins, with their indices

struct FilterArguments {
    const void* x;
    Mask where;
    void *top, *out;
    int* index;
    Index n, rows, x_stride;
    Parameter temperature, k, p, min_p;
};

template <class S>
struct FilterKernel {
    using X = typename S::X;
    using C = typename S::C;
    using Gap = decltype(BitsOf<X>() + 0u);    // how far a token is from the greatest, in the order of the numbers
    static constexpr int W = S::WIDTH, PACKS = S::PACKS, WARPS = S::THREADS / 32;
    static constexpr bool LEADING = S::KIND == SAMPLE_LEADING;

    // Tokens up to the gap `end`, and of those at that gap the ones with an index below `limit`.
    struct Prefix {
        Gap end;
        Word limit;

        DEVICE bool holds(Gap gap, Word i) const { return gap < end || (gap == end && i < limit); }
    };

    // The logits from one distance to another below the greatest, in steps of which there is a bin for each. Rounding
    // keeps their order, and that is all that matters. What is no number, since the greatest is infinite, is inside.
    struct Range {
        C steps, near, far;

        DEVICE bool holds(C step) const { return !(step < near) && !(step > far); }
    };

    // The parts of a row: the greatest of all, a NaN in `odd` if there is one, the least of them and how many there are,
    // of those in which a token exists.
    struct Parts {
        C top, odd, least;
        int count;
    };

    // Distances from the greatest: one within which are the first k tokens, or -1 if none is known; one beyond which a
    // search for a mass need not look; and one beyond which there is next to nothing in most rows.
    struct Bounds {
        C for_count, for_mass, usual;
    };

    // Where among the bins what is needed is reached: how much of it is left for there, how much there is, and in all.
    struct Place {
        Amount left, there, all;
        int bin;
    };

    // What stands on the list: its nearest and its farthest gap. There may be more than there is room for.
    struct List {
        Gap near, far;
        Word count;

        DEVICE bool fits() const { return count <= LISTED; }
    };

    struct Board {
        Amount sums[32];
        Place found;
        Word listed, taken;
    };

    const FilterArguments& a;
    char* shared;
    Word *low, *high, *indices;    // sums of 64 bits in two halves, since there are native atomics for those
    Gap* gaps;
    Board* board;
    Index row;
    int member;
    const X* x;
    const unsigned char* where;    // the row of the mask, if there is one
    X* out;
    Word n, head, packs, extra;    // entries before the first whole access, whole accesses, entries outside them
    C top, scale;
    Gap first;
    RowTemperature<C> t;
    List list;
    bool complete = false;    // whether all that any filter could leave is on the list

    DEVICE FilterKernel(const FilterArguments& arguments, char* shared) : a(arguments), shared(shared) {
        low = (Word*)(shared + SCRATCH);
        high = low + BINS;
        gaps = (Gap*)(high + BINS);
        indices = (Word*)(gaps + LISTED);
        board = (Board*)(indices + LISTED);
        row = block_index();
        member = thread_index();
        n = (Word)a.n;
        x = (const X*)a.x + row * a.x_stride;
        where = a.where.of(row).where;
        out = (X*)a.out + row * a.n;
        t = a.temperature.as_temperature<C>(row);
        scale = scale_of_amounts<C>(a.n);
        head = 0;
        if (W > 1) {
            head = (W - (Word)((unsigned long long)x / sizeof(X) % W)) % W;
            head = head < n ? head : n;
        }
        packs = (n - head) / W;
        extra = n - packs * W;
        list.count = LISTED + 1;
        if (member == 0) board->taken = 0;
    }

    // Read again where they are needed, rather than kept in registers.
    DEVICE double share() const { return a.p.of<C>(row); }
    DEVICE C least_probability() const { return (C)a.min_p.of<C>(row); }

    DEVICE static X nothing() { return rounded<X>(-infinity<C>()); }

    DEVICE void hide(Word at, Pack<X, W>& pack, int count) const {
        if (!where) return;
        UNROLL for (int e = 0; e < W; e++) {
            if (e < count && !where[((Index)at + e) * a.where.stride]) pack.set(e, nothing());
        }
    }

    // Call body(index of the first, entries, how many there are) for every access of this thread: W, or one of those
    // outside the whole accesses, with -inf after it. All that are under way together are waited for, and there is one
    // body for all: most are too long to stand there several times. The threads of a warp take each step together, those
    // that have nothing left with no entry: apart, they would read and write apart.
    template <class Body>
    DEVICE void visit(Body body) const {
        const Word lane = member % 32, leader = member - lane;
        bool has_extra = W > 1 && leader < extra;
        for (Word chunk = leader; chunk < packs || has_extra; chunk += S::THREADS * PACKS) {
            Pack<X, W> held[PACKS];
            Word at = head + (chunk + lane) * W;
            int accesses = 0, whole = 0, single = 0;
            // First, since registers that are read to cannot be written to before all has come.
            for (Pack<X, W>& one : held) one.fill(nothing());
            UNROLL for (int j = 0; j < PACKS; j++) {
                if (chunk + j * S::THREADS < packs) accesses = j + 1;
                if (chunk + lane + j * S::THREADS >= packs) continue;
                held[j].load(x + at + (Index)j * S::THREADS * W);
                whole = j + 1;
            }
            if (accesses == 0) {
                if ((Word)member < extra) {
                    at = (Word)member < head ? member : n - extra + member;
                    held[0].set(0, x[at]);
                    single = 1;
                }
                accesses = 1;
                has_extra = false;
            }
            ONCE for (; accesses > 0; accesses--, whole--, at += S::THREADS * W) {
                const int count = whole > 0 ? W : single;
                hide(at, held[0], count);
                body(at, held[0], count);
                warp_barrier();
                UNROLL for (int j = 1; j < PACKS; j++) held[j - 1] = held[j];
            }
        }
    }

    // Call body(which, entry) for the entries of an access, one body for all.
    template <class Body>
    DEVICE static void each(Pack<X, W> pack, int count, Body body) {
        ONCE for (int e = 0; e < count; e++) {
            body(e, pack.get(0));
            pack.drop_first();
        }
    }

    DEVICE void write_access(Word at, const Pack<X, W>& pack, int count) const {
        if (count == W) {
            pack.store(out + at);
        } else if (count > 0) {
            out[at] = pack.get(0);
        }
    }

    // The greatest of each part of the row: a thread has W of them, or one if that is enough.
    DEVICE Parts find_parts(Pack<X, W>& parts, bool few) const {
        parts.fill(nothing());
        visit([&](Word, const Pack<X, W>& pack, int) { keep_greater(parts, pack); });
        if (few) {
            UNROLL for (int e = 1; e < W; e++) {
                parts.set(0, greater_entry(parts.get(0), parts.get(e)));
                parts.set(e, nothing());
            }
        }
        Parts mine{-infinity<C>(), 0, infinity<C>(), 0};
        each(parts, W, [&](int, X part) {
            C value = widen(part);
            mine.top = greater(mine.top, value);
            if (value != value) mine.odd = value;
            if (value > -infinity<C>()) mine.least = lesser(mine.least, value), mine.count++;
        });
        return merged<S::THREADS>(mine, shared, [](const Parts& p, const Parts& q) {
            return Parts{greater(p.top, q.top), p.odd + q.odd, lesser(p.least, q.least), p.count + q.count};
        });
    }

    DEVICE static X greater_entry(X p, X q) { return rounded<X>(greater_or_nan(widen(p), widen(q))); }

    DEVICE static void keep_greater(Pack<X, W>& most, const Pack<X, W>& more) {
        if constexpr (Pack<X, W>::IN_PAIRS) {
            UNROLL for (int i = 0; i < W / 2; i++) most.kept[i] = greater_or_nan_pair<X>(most.kept[i], more.kept[i]);
        } else {
            UNROLL for (int e = 0; e < W; e++) most.set(e, greater_entry(most.get(e), more.get(e)));
        }
    }

    DEVICE static C lesser(C p, C q) { return -greater(-p, -q); }

    DEVICE static Amount sum_of_two(Amount p, Amount q) { return p + q; }

    DEVICE C probability(C value) const { return exp(score_below(value, top, t)); }    // of the greatest: 1

    DEVICE Gap gap_of(X entry) const { return first - order_of(entry); }
    DEVICE X entry_at_gap(Gap gap) const { return number_of<X>((BitsOf<X>)(first - gap)); }

    // What a token counts for: its mass, or 1.
    DEVICE Amount weight_of(C value, bool by_mass) const {
        return LEADING || !by_mass ? 1 : amount_of(probability(value), scale);
    }
    DEVICE Amount weight_at(Gap gap, bool by_mass) const { return weight_of(widen(entry_at_gap(gap)), by_mass); }

    // The same of the entries of an access, all under way together, and with one question about the temperature.
    DEVICE void weigh(const C* value, bool by_mass, Amount* weight) const {
        UNROLL for (int e = 0; e < W; e++) weight[e] = 1;
        if (LEADING || !by_mass) return;
        C z[W];
        UNROLL for (int e = 0; e < W; e++) z[e] = halved_distance(value[e], top, t.half);
        if (t.given) {
            UNROLL for (int e = 0; e < W; e++) z[e] = over_temperature(z[e], t.divisor, t.bound);
        }
        UNROLL for (int e = 0; e < W; e++) weight[e] = amount_of(exp(z[e]), scale);
    }

    DEVICE static C bounded(C distance) {
        const C most = largest<C>;
        return distance < most ? distance : most;
    }
    DEVICE static Range everything_in_range() { return Range{1, 0, infinity<C>()}; }

    DEVICE Range range_to(C distance) const {
        Range range{bounded((BINS - 1) / bounded(distance)), 0, 0};
        range.far = bounded(distance) * range.steps;
        return range;
    }

    DEVICE static Range only(const Range& range, int bin) {
        C last = of_bits<C>(bits_of((C)(bin + 1)) - 1);
        return Range{range.steps, (C)bin, bin < BINS - 1 ? lesser(range.far, last) : range.far};
    }

    // No step is between 0 and a number as small as this one.
    DEVICE static Range after(const Range& range) {
        C next = range.far > 0 ? of_bits<C>(bits_of(range.far) + 1) : (C)1e-30;
        return Range{range.steps, next, infinity<C>()};
    }

    DEVICE C step_of(const Range& range, C value) const { return bounded(top - value) * range.steps; }
    DEVICE static int bin_of(C step) { return step < BINS - 1 ? (int)step : BINS - 1; }

    // Adds to bins. What follows in the same bin is added together: where many tokens are equal, threads would wait for
    // each other.
    struct Adder {
        const FilterKernel& kernel;
        int bin = 0;
        Amount sum = 0;

        DEVICE void add(int to, Amount more) {
            if (to != bin) flush();
            bin = to;
            sum += more;
        }

        DEVICE void flush() {
            if (sum) kernel.add_to_bin(bin, sum);
            sum = 0;
        }
    };

    DEVICE void add_to_bin(int bin, Amount more) const {
        Word part = (Word)more, before = add_in_block(&low[bin], part);
        Word rest = (Word)(more >> 32) + ((Word)(before + part) < part ? 1 : 0);
        if (rest) add_in_block(&high[bin], rest);
    }

    DEVICE void clear_bins() const {
        for (int i = member; i < BINS; i += S::THREADS) low[i] = high[i] = 0;
        block_barrier();
    }

    // The sum of what the lanes before this one have; `all` becomes that of the warp.
    template <class Sum>
    DEVICE Sum before_lane(Sum& all) const {
        Sum before = 0;
        UNROLL for (int mask = 1; mask < 32; mask *= 2) {
            Sum other = across(all, mask);
            if (member & mask) before += other;
            all += other;
        }
        return before;
    }

    DEVICE Amount in_bin(int bin) const { return (Amount)high[bin] << 32 | low[bin]; }

    // The bin up to which, from the first, they hold what is needed, which may be told from the sum of all. If they do
    // not, it is the one after the last. Bins may be cleared at once when this has returned.
    template <class Need>
    DEVICE Place place_of(Need need_of) const {
        constexpr int OWN = BINS / S::THREADS;
        const int lane = member % 32, warp = member / 32;
        block_barrier();
        Amount own = 0;
        for (int i = 0; i < OWN; i++) own += in_bin(member * OWN + (i + lane) % OWN);
        Amount all = own, before = before_lane(all);
        if (lane == 0) board->sums[warp] = all;
        block_barrier();
        all = lane < WARPS ? board->sums[lane] : 0;
        Amount before_warp = before_lane(all);
        before += across(before_warp, lane ^ warp);
        const Amount need = need_of(all);
        if (before < need && need <= before + own) {
            int bin = member * OWN;
            while (need - before > in_bin(bin)) before += in_bin(bin++);
            board->found = Place{need - before, in_bin(bin), all, bin};
        }
        block_barrier();
        return need <= all ? board->found : Place{need - all, 0, all, BINS};
    }

    // A logit that at least `count` tokens reach, since the greatest of as many parts do.
    DEVICE C bound_of(const Pack<X, W>& parts, const Parts& found, Amount count) const {
        Range range = range_to(top - found.least);
        clear_bins();
        Adder adder{*this};
        each(parts, W, [&](int, X part) {
            C value = widen(part);
            if (value > -infinity<C>()) adder.add(bin_of(step_of(range, value)), 1);
        });
        adder.flush();
        const int last = place_of([&](Amount) { return count; }).bin;
        C least = top;
        each(parts, W, [&](int, X part) {
            C value = widen(part);
            if (value > -infinity<C>() && bin_of(step_of(range, value)) <= last) least = lesser(least, value);
        });
        return merged<S::THREADS>(least, shared, lesser);
    }

    // A distance from the greatest beyond which there is nothing of the shortest prefix that has a share p of the mass.
    // All that are lighter than the n-th part of the rest have less than the rest, and the total is at least that of the
    // parts. An exponential is right to much less than the 1% that is left for it, and a sum to less than 2^-50.
    DEVICE C distance_for_mass(const Pack<X, W>& parts, bool of_top) const {
        Amount mass = 0;
        each(parts, W, [&](int, X part) { mass += weight_of(widen(part), true); });
        mass = of_top ? amount_of((C)1, scale) : merged<S::THREADS>(mass, shared, sum_of_two);
        double light = ((1 - share() - 0x1p-50) * (double)mass - 2) / a.n - 0.5;
        // An amount is rounded, and what is rounded to 0 counts for nothing.
        double least = (light > 0.4 ? light : 0.4) / scale;
        return t.is_zero() ? 0 : (C)(t.divisor * (0.01 - log(least)));
    }

    // The parts are far above most tokens: four times as far down as the least of them there is next to nothing.
    DEVICE Bounds bounds_of(const Pack<X, W>& parts, const Parts& found, Amount k) const {
        Bounds bounds{-1, 0, bounded(4 * (top - found.least))};
        if (n <= LISTED || !finite(top)) return bounds;
        if (k > 0 && 2 * k <= (Amount)found.count) bounds.for_count = top - bound_of(parts, found, k);
        // What is not among the first k does not count for the total.
        if (!LEADING && share() < 1) bounds.for_mass = lesser(bounds.usual, distance_for_mass(parts, k > 0));
        return bounds;
    }

    // Which entries of an access a prefix holds.
    DEVICE Word held_by(const Prefix& whole, Word at, const Pack<X, W>& pack, int count) const {
        Word found = 0;
        each(pack, count, [&](int e, X entry) { found |= whole.holds(gap_of(entry), at + e) ? (Word)1 << e : 0; });
        return found;
    }

    // Add up a warp's tokens in the steps of a range. Where many are equal, threads would wait for each other.
    DEVICE void add_side_by_side(const C* value, int count, const Range& range, bool by_mass) const {
        const int lane = member % 32;
        ONCE for (int start = 0; start < count; start += 32) {
            const bool there = start + lane < count;
            const C own = value[there ? start + lane : start];
            const int bin = bin_of(step_of(range, own));
            Amount weight = there ? weight_of(own, by_mass) : 0;
            if (!any_in_warp(bin != bin_of(step_of(range, value[start])))) {
                weight = merged_in_warp<32>(weight, sum_of_two);
                if (lane != 0) weight = 0;
            }
            if (weight) add_to_bin(bin, weight);
        }
    }

    // Add up the tokens of a prefix in each step of a range. The answer is what there is of them, beyond it too.
    DEVICE Amount add_up(const Prefix& whole, const Range& range, bool by_mass) const {
        static_assert(S::THREADS * W * sizeof(C) <= LISTED * (sizeof(Gap) + sizeof(Word)), "no room for all of a warp");
        C* in_range = (C*)gaps + member / 32 * 32 * W;    // of the warp's accesses, in the place of the list
        clear_bins();
        Amount total = 0;
        const bool all = whole.end >= first && whole.limit == n;
        visit([&](Word at, const Pack<X, W>& pack, int count) {
            C value[W];
            Amount weight[W];
            widen_all(pack, value);
            weigh(value, by_mass, weight);
            Word counts = ~(Word)0, near = 0, own = 0;
            if (!all) counts = held_by(whole, at, pack, count);
            UNROLL for (int e = 0; e < W; e++) {
                bool one = counts >> e & 1 && value[e] > -infinity<C>();    // what is -inf may be no entry at all
                total += one ? weight[e] : 0;
                one = one && step_of(range, value[e]) <= range.far;
                near |= one ? (Word)1 << e : 0;
                own += one;
            }
            if (!any_in_warp(near)) return;
            // Most lanes have few of them: put side by side, they take as many steps less.
            Word found = own, place = before_lane(found);
            UNROLL for (int e = 0; e < W; e++) {
                if (near >> e & 1) in_range[place++] = value[e];
            }
            warp_barrier();
            add_side_by_side(in_range, (int)found, range, by_mass);
        });
        return merged<S::THREADS>(total, shared, sum_of_two);
    }

    // List what is in a range of a prefix, which holds all that comes before the range. That is written, too, what is
    // listed as if it were kept, and -inf for the rest.
    DEVICE void make_list(const Prefix& whole, const Range& range) {
        block_barrier();    // whoever still reads how long the last one is
        if (member == 0) board->listed = 0;
        block_barrier();
        List mine{~(Gap)0, 0, 0};
        Word place = 0;
        visit([&](Word at, Pack<X, W>& pack, int count) {
            Word inside = 0, keep = ~(Word)0;
            C value[W];
            widen_all(pack, value);
            UNROLL for (int e = 0; e < W; e++) {
                C step = step_of(range, value[e]);
                if (range.holds(step)) inside |= (Word)1 << e;
                if (!LEADING && step > range.far) keep &= ~((Word)1 << e);
            }
            if (inside) {
                each(pack, count, [&](int e, X entry) {
                    if (!(inside >> e & 1)) return;
                    Gap gap = gap_of(entry);
                    if (!whole.holds(gap, at + e)) {
                        keep &= ~((Word)1 << e);
                        return;
                    }
                    mine.near = gap < mine.near ? gap : mine.near;
                    mine.far = gap > mine.far ? gap : mine.far;
                    if (place < LISTED) place = add_in_block(&board->listed, 1);
                    if (place < LISTED) gaps[place] = gap, indices[place] = at + e;
                });
            }
            if constexpr (!LEADING) {
                keep &= probable(pack, keep, count);
                write_kept(at, pack, keep, count);
            }
        });
        list = merged<S::THREADS>(mine, shared, [](const List& p, const List& q) {
            return List{p.near < q.near ? p.near : q.near, p.far > q.far ? p.far : q.far, 0};
        });
        list.count = board->listed;
    }

    // Which entries of an access are as probable as min-p asks.
    DEVICE Word probable(const Pack<X, W>& pack, Word asked, int count) const {
        const C min_p = least_probability();
        if (!(min_p > 0)) return asked;
        Word found = 0;
        each(pack, count, [&](int e, X entry) {
            if (asked >> e & 1 && probability(widen(entry)) >= min_p) found |= (Word)1 << e;
        });
        return found;
    }

    DEVICE void write_kept(Word at, Pack<X, W>& pack, Word keep, int count) const {
        UNROLL for (int e = 0; e < W; e++) {
            if (!(keep >> e & 1)) pack.set(e, nothing());
        }
        write_access(at, pack, count);
    }

    // Call body(gap, index) for all that is in a range of a prefix: from the list, or from the row if it is too much.
    template <class Body>
    DEVICE void visit_candidates(const Prefix& whole, const Range& range, Body body) const {
        if (list.fits()) {
            for (Word i = member; i < list.count; i += S::THREADS) {
                if (whole.holds(gaps[i], indices[i])) body(gaps[i], indices[i]);
            }
            return;
        }
        visit([&](Word at, const Pack<X, W>& pack, int count) {
            each(pack, count, [&](int e, X entry) {
                if (!range.holds(step_of(range, widen(entry)))) return;
                Gap gap = gap_of(entry);
                if (whole.holds(gap, at + e)) body(gap, at + e);
            });
        });
    }

    // The last key that is needed, of keys below 1 << bits that visit(add) adds, the least first: digit by digit, until
    // all that is found is needed. Then the lowest bits, which have not been looked at, are 1.
    struct Last {
        Gap key;
        Amount left, there;
    };

    template <class Visit>
    DEVICE Last descend(int bits, Amount need, Visit visit_all) const {
        Last last{0, need, ~(Amount)0};
        while (bits > 0 && last.left != last.there) {
            const int shift = bits > DIGIT ? bits - DIGIT : 0;
            clear_bins();
            Adder adder{*this};
            visit_all([&](Gap key, Amount weight) {
                Gap digit = (key ^ last.key) >> shift;    // more than there are, if a digit before is another
                if (digit >> (bits - shift) == 0) adder.add((int)digit, weight);
            });
            adder.flush();
            Place place = place_of([&](Amount) { return last.left; });
            last = Last{last.key | (Gap)place.bin << shift, place.left, place.there};
            bits = shift;
        }
        if (bits > 0) last.key |= ((Gap)1 << bits) - 1;
        return last;
    }

    DEVICE static Prefix common(const Prefix& p, const Prefix& q) {
        bool shorter = p.end < q.end || (p.end == q.end && p.limit < q.limit);
        return shorter ? p : q;
    }

    // The prefix that ends with the last token that is needed of a range of another. Of several with its logit, which
    // are as heavy, it is found by their indices.
    DEVICE Prefix find_last(const Prefix& whole, const Range& range, bool by_mass, Amount need) const {
        Gap end = 0;
        for (bool by_index = false;; by_index = true) {
            const int bits = bit_length(by_index ? n - 1 : list.far - list.near);
            Last last = descend(bits, need, [&](auto add) {
                visit_candidates(whole, range, [&](Gap gap, Word i) {
                    if (!by_index) {
                        add(gap - list.near, weight_at(gap, by_mass));
                    } else if (gap == end) {
                        add(i, 1);
                    }
                });
            });
            if (by_index) return common(Prefix{end, (Word)last.key + 1}, whole);
            end = list.near + last.key;
            if (last.left == last.there) return common(Prefix{end, n}, whole);
            const Amount weight = weight_at(end, by_mass);
            need = weight > 1 ? (last.left - 1) / weight + 1 : last.left;
            if (need * weight > last.there - weight) return common(Prefix{end, n}, whole);
        }
    }

    DEVICE Prefix everything() const { return Prefix{~(Gap)0, n}; }

    // The shortest prefix of another that has a share p of its mass, or k tokens of it.
    DEVICE Prefix shortest(const Prefix& whole, const Bounds& bounds, bool by_mass, Amount k) {
        Range range = everything_in_range();
        Amount need = k;
        const bool small = n <= LISTED || !finite(top);
        // Whether the list may hold all that could be kept, and not only what could be the last.
        bool direct = small || (!by_mass && bounds.for_count >= 0);
        if (!small) range = range_to(bounds.for_count);
        while (!complete) {
            if (!direct) {
                range = range_to(by_mass ? bounds.for_mass : bounds.usual);
                const Amount total = add_up(whole, range, by_mass);
                Place place = place_of([&](Amount) { return by_mass ? share_of(share(), total) : k; });
                need = place.left;
                if (!LEADING && !by_mass && place.bin == BINS && need >= total - place.all) {
                    return Prefix{gap_of(nothing()), 0};    // no more than k exist
                }
                range = place.bin < BINS ? only(range, place.bin) : after(range);
            }
            make_list(whole, range);
            complete = direct && list.fits();
            if (list.fits() || !direct || !finite(top)) break;
            direct = false;
        }
        if (complete && by_mass) {
            Amount mass = 0;
            visit_candidates(whole, range, [&](Gap gap, Word) { mass += weight_at(gap, true); });
            need = share_of(share(), merged<S::THREADS>(mass, shared, sum_of_two));
        }
        return find_last(whole, range, by_mass, need);
    }

    DEVICE void write(const Prefix& kept) const {
        visit([&](Word at, Pack<X, W>& pack, int count) {
            Word keep = 0;
            UNROLL for (int e = 0; e < W; e++) {
                if (kept.holds(gap_of(pack.get(e)), at + e)) keep |= (Word)1 << e;
            }
            write_kept(at, pack, probable(pack, keep, count), count);
        });
    }

    // After a list was made, all but what stands on it is written as it should be.
    DEVICE void correct(const Prefix& kept) const {
        for (Word i = member; i < list.count; i += S::THREADS) {
            if (!kept.holds(gaps[i], indices[i])) out[indices[i]] = nothing();
        }
    }

    DEVICE void write_nan() const {
        visit([&](Word at, Pack<X, W>& pack, int count) {
            pack.fill(rounded<X>(nan_of<C>()));
            write_access(at, pack, count);
        });
    }

    // The leading tokens in the order of their indices: collected as they come, and each put where its rank says.
    DEVICE void write_leading(const Prefix& kept, int k) {
        if (!complete) make_list(kept, everything_in_range());
        C* values = (C*)low;
        Word* at = (Word*)(values + MOST_LEADING);
        for (Word i = member; i < list.count; i += S::THREADS) {
            if (!kept.holds(gaps[i], indices[i])) continue;
            Word place = add_in_block(&board->taken, 1);
            values[place] = widen(entry_at_gap(gaps[i]));
            at[place] = indices[i];
        }
        block_barrier();
        for (int i = member; i < k; i += S::THREADS) {
            int rank = 0;
            for (int j = 0; j < k; j++) rank += at[j] < at[i];
            ((C*)a.out)[row * k + rank] = values[i];
            a.index[row * k + rank] = (int)at[i];
        }
    }

    DEVICE void write_leading_nan(int k) const {
        for (int i = member; i < k; i += S::THREADS) {
            ((C*)a.out)[row * k + i] = nan_of<C>();
            a.index[row * k + i] = i;
        }
    }

    DEVICE void run() {
        const double k = a.k.of<C>(row);
        Pack<X, W> parts;
        Parts found = find_parts(parts, k > 0 && 4 * k <= S::THREADS);
        top = with_positive_zero(found.top);    // of 0 and -0, merging may take either
        first = order_of(rounded<X>(top));
        bool known = found.odd == found.odd;
        if constexpr (LEADING) {
            if (member == 0) ((C*)a.top)[row] = known ? top : nan_of<C>();
            if (!known) return write_leading_nan((int)k);
            const Bounds bounds = bounds_of(parts, found, (Amount)k);
            return write_leading(shortest(everything(), bounds, false, (Amount)k), (int)k);
        }
        const C min_p = least_probability();
        bool answered = known && top < infinity<C>() && k >= 0 && share() >= 0 && share() <= 1;
        if (!answered || !(min_p >= 0 && min_p <= 1) || !t.has_answer()) return write_nan();
        if (!finite(top)) return write(everything());    // nothing is probable, and so is nothing improbable
        const Amount count = k < (double)a.n ? (Amount)ceil(k) : 0;
        const Bounds bounds = bounds_of(parts, found, count);
        Prefix kept = everything();
        // Of two searches one is often off: a loop, so that they are compiled once.
        for (int by_mass = 0; by_mass < 2; by_mass++) {
            if (by_mass ? share() < 1 : count > 0) kept = shortest(kept, bounds, by_mass, count);
        }
        if (list.fits()) {
            correct(kept);
        } else {
            write(kept);
        }
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
    let_next_launch_begin();
    FilterKernel<S>(arguments, shared).run();
}
