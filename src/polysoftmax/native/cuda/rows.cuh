// One row, or several short ones, in a block or a cluster of blocks: every kernel that is not a draw.
//
// A specialisation S says the types, the formula and the layout:
//   X, Y, C     dtypes of the input, of the answer, and to compute in
//   WIDTH       entries in an access; 1 where the arrays of a row do not share an alignment
//   THREADS     threads of a block that share a row: a power of two
//   BLOCK       threads of a block: THREADS, or more for several rows of up to 32 threads each
//   PACKS       accesses of a thread that are under way together
//   CLUSTER     blocks that share a row
//   HELD        whether the row stays where it is read to; else it is read again to be written
//   STAGED      accesses of a thread that stay in shared memory, beside the PACKS in registers
//   GENERAL     whether there is a temperature or a mask; most calls have neither, and need not pay for the questions

enum Formula {
    SOFTMAX,
    LOG_SOFTMAX,
    LOGSUMEXP,
    SOFTMAX_VJP,
    LOG_SOFTMAX_VJP,
    SOFTMAX_PULLBACK,
    LOG_SOFTMAX_PULLBACK,
    CROSS_ENTROPY,
    CROSS_ENTROPY_SLOPE,
    TRUNCATE,
    SAMPLE_LEADING
};

struct RowArguments {
    const void *x, *second;
    void* out;
    Index n, rows, x_stride, second_stride;
    Parameter temperature;
    Mask where;
    const void* targets;
    RowMap targets_map;
    const void *weight, *cotangent;
    RowMap cotangent_map;
    Index weight_stride, ignores, ignore_index;
    double z_loss;
};

template <class S>
struct RowKernel {
    using X = typename S::X;
    using Y = typename S::Y;
    using C = typename S::C;
    static constexpr int W = S::WIDTH, PACKS = S::PACKS, TEAM = S::THREADS * S::CLUSTER;
    static constexpr Formula F = S::FORMULA;
    static constexpr bool REDUCES = F == LOGSUMEXP || F == CROSS_ENTROPY;
    static constexpr bool IS_PULLBACK = F == SOFTMAX_PULLBACK || F == LOG_SOFTMAX_PULLBACK;
    static constexpr bool HAS_SECOND = F == SOFTMAX_VJP || F == LOG_SOFTMAX_VJP || IS_PULLBACK;
    static constexpr bool SUMS_SECOND = F == LOG_SOFTMAX_VJP || F == LOG_SOFTMAX_PULLBACK;
    static constexpr bool IS_LOSS = F == CROSS_ENTROPY || F == CROSS_ENTROPY_SLOPE;
    // Whether the logarithm of the sum is wanted, or 1 - p, and so the terms at the top kept out of the sum.
    static constexpr bool SETS_APART = REDUCES || F == LOG_SOFTMAX || F == LOG_SOFTMAX_VJP || F == CROSS_ENTROPY_SLOPE;

    const RowArguments& a;
    char* shared;
    int merges = 0;    // so far
    int member;    // which of the row's threads this is
    Index row;
    bool present;
    const X *x, *second;
    Y* out;
    MaskedRow mask;
    int head, packs, extra;    // entries before the first whole access, whole accesses, entries outside them
    RowTemperature<C> t;
    Total<C> total;
    C inverse, log_total = 0;    // 1 / Σ, log Σ
    C others = -1;    // 1 - p of the class at the top where that has more than half of the probability; else negative
    C moment, own = 0;    // a mean or sum over the second array, and its entry at the class with more than half
    Index target;
    int target_position;    // -1 of a class that there is not
    bool counts;    // and so has a loss
    C target_logit, weight, pull_of_z, cotangent;    // of the row's loss

    Pack<X, W> held[PACKS], held_second[HAS_SECOND ? PACKS : 1];
    Pack<X, 1> held_extra, held_extra_second;

    DEVICE RowKernel(const RowArguments& arguments, char* shared) : a(arguments), shared(shared) {
        constexpr int ROWS = S::BLOCK / S::THREADS;
        member = thread_index() % S::THREADS + (S::CLUSTER > 1 ? cluster_rank() * S::THREADS : 0);
        row = block_index() / S::CLUSTER * ROWS + thread_index() / S::THREADS;
        present = row < a.rows;
        if (!present) row = 0;    // it has to take part in what a warp does together
        x = (const X*)a.x + row * a.x_stride;
        second = (const X*)a.second + row * a.second_stride;
        out = (Y*)a.out + row * (REDUCES ? 1 : a.n);
        t = row_temperature<C>(false, 1);
        if constexpr (S::GENERAL) t = a.temperature.as_temperature<C>(row), mask = a.where.of(row);
        const int n = (int)a.n;
        head = 0;
        if (W > 1) {
            head = (W - (int)((unsigned long long)x / sizeof(X) % W)) % W;
            head = head < n ? head : n;
        }
        packs = present ? (n - head) / W : 0;
        extra = present ? n - packs * W : 0;
    }

    // An entry outside the whole accesses: each of the first threads has one.
    DEVICE bool has_extra() const { return W > 1 && member < extra; }
    DEVICE int extra_position() const { return member < head ? member : (int)a.n - extra + member; }

    DEVICE bool has_pack(int chunk, int j) const { return (chunk * PACKS + j) * TEAM < packs - member; }
    DEVICE int pack_position(int chunk, int j) const { return head + member * W + (chunk * PACKS + j) * TEAM * W; }
    DEVICE int chunks() const { return S::HELD ? 1 : (packs + TEAM * PACKS - 1) / (TEAM * PACKS); }

    // What stands for an entry that does not exist: it adds nothing to any sum.
    DEVICE static X nothing() { return rounded<X>(F == SOFTMAX_PULLBACK ? (C)0 : -infinity<C>()); }

    template <int N>
    DEVICE void load_pack(bool there, int position, Pack<X, N>& to, Pack<X, N>& to_second) const {
        if (there) {
            to.load(x + position);
            if constexpr (HAS_SECOND) to_second.load(second + position);
        } else {
            to.fill(nothing());
            if constexpr (HAS_SECOND) to_second.fill(rounded<X>((C)0));
        }
    }

    template <int N>
    DEVICE void hide(bool there, int position, Pack<X, N>& from, Pack<X, N>& from_second) const {
        if (!S::GENERAL || !mask.where || !there) return;
        UNROLL for (int i = 0; i < N; i++) {
            if (mask.exists(position + i)) continue;
            from.set(i, nothing());
            if constexpr (HAS_SECOND) from_second.set(i, rounded<X>((C)0));
        }
    }

    // An access of this thread in shared memory.
    DEVICE X* staged(int j) const {
        return (X*)(shared + 2 * SLOTS<S::THREADS, S::CLUSTER>) + (j * S::THREADS + thread_index()) * W;
    }

    // Read a chunk: all its accesses first, and then what depends on one.
    DEVICE void load(int chunk) {
        UNROLL for (int j = 0; j < S::STAGED; j++) {
            if (has_pack(0, PACKS + j)) {
                copy_16_bytes(staged(j), x + pack_position(0, PACKS + j));
            } else {
                Pack<X, W> none;
                none.fill(nothing());
                none.put(staged(j));
            }
        }
        UNROLL for (int j = 0; j < PACKS; j++) {
            load_pack(has_pack(chunk, j), pack_position(chunk, j), held[j], held_second[HAS_SECOND ? j : 0]);
        }
        if (chunk == 0 && has_extra()) load_pack(true, extra_position(), held_extra, held_extra_second);
        UNROLL for (int j = 0; j < PACKS; j++) {
            hide(has_pack(chunk, j), pack_position(chunk, j), held[j], held_second[HAS_SECOND ? j : 0]);
        }
        if (chunk == 0) hide(has_extra(), extra_position(), held_extra, held_extra_second);
    }

    // Call body(entries, entries of the second array) for every access of this thread, entries that do not exist too.
    template <class Body>
    DEVICE void visit(Body body) {
        for (int chunk = 0; chunk == 0 || chunk < chunks(); chunk++) {
            if (!S::HELD) load(chunk);
            visit_held(chunk, body);
        }
    }

    template <class Body>
    DEVICE void visit_held(int chunk, Body body) {
        UNROLL for (int j = 0; j < PACKS; j++) body(held[j], held_second[HAS_SECOND ? j : 0]);
        if constexpr (S::STAGED > 0) wait_for_copies();
        SOME for (int j = 0; j < S::STAGED; j++) {
            Pack<X, W> pack;
            pack.load(staged(j));
            body(pack, pack);
        }
        if (chunk == 0 && has_extra()) body(held_extra, held_extra_second);
    }

    // Call body(position, entries, entries of the second array) for the accesses that there are.
    template <class Body>
    DEVICE void visit_positions(Body body) {
        int count = chunks();
        for (int chunk = 0; chunk < count; chunk++) {
            if (!S::HELD) load(chunk);
            UNROLL for (int j = 0; j < PACKS; j++) {
                if (has_pack(chunk, j)) body(pack_position(chunk, j), held[j], held_second[HAS_SECOND ? j : 0]);
            }
            SOME for (int j = PACKS; j < PACKS + S::STAGED; j++) {
                if (!has_pack(0, j)) continue;
                Pack<X, W> pack;
                pack.load(staged(j - PACKS));
                body(pack_position(0, j), pack, pack);
            }
        }
        if (has_extra()) body(extra_position(), held_extra, held_extra_second);
    }

    // Memory for a merge, in turns. A cluster's first waits until all its blocks have begun.
    DEVICE char* memory_to_merge() {
        if (S::CLUSTER > 1 && merges == 0) cluster_wait();
        return shared + merges++ % 2 * SLOTS<S::THREADS, S::CLUSTER>;
    }

    template <class T, class Merge>
    DEVICE T merge_row(const T& mine, Merge merge_two) {
        return merged_once<S::THREADS, S::CLUSTER>(mine, memory_to_merge(), merge_two);
    }

    // Find Σ exp((x - top) / T): each warp under its own maximum, so that one merge is enough.
    DEVICE void sum_up() {
        Total<C> mine = no_entries<C>();
        C of_second = 0;
        auto add = [](C p, C q) { return p + q; };
        if constexpr (S::HELD) {
            visit([&](const auto& pack, const auto& other) {
                if constexpr (!IS_PULLBACK) mine.top = greater(mine.top, top_of(pack));
                if constexpr (SUMS_SECOND) of_second += sum_of_pack(other);
            });
            if constexpr (!IS_PULLBACK) {
                mine.top = top_of_warp(mine.top);
                weigh_target();
                visit([&](const auto& pack, const auto&) { mine.sum += sum_of_terms(pack, mine.top); });
            }
        } else {
            LongSum<C> sum, sum_of_second;
            for (int chunk = 0; chunk == 0 || chunk < chunks(); chunk++) {
                load(chunk);
                C top = mine.top, terms = 0, others = 0;
                visit_held(chunk, [&](const auto& pack, const auto&) { top = greater(top, top_of(pack)); });
                if constexpr (!IS_PULLBACK) {
                    top = top_of_warp(top);
                    if (top > mine.top) sum.scale(term_below(mine.top, top, t));
                    mine.top = top;
                }
                visit_held(chunk, [&](const auto& pack, const auto& other) {
                    if constexpr (!IS_PULLBACK) terms += sum_of_terms(pack, top);
                    if constexpr (SUMS_SECOND) others += sum_of_pack(other);
                });
                sum.add(terms);
                sum_of_second.add(others);
                if (chunk == 0) weigh_target();
            }
            mine.sum = sum.value();
            of_second = sum_of_second.value();
        }
        if constexpr (SUMS_SECOND) moment = merge_row(of_second, add);
        if constexpr (IS_PULLBACK) return;
        mine.sum = merged_in_warp<S::THREADS>(mine.sum, add);
        total = merged_across_warps<S::THREADS, S::CLUSTER>(
            mine, memory_to_merge(), [&](const Total<C>& p, const Total<C>& q) { return merge(p, q, t); });
        inverse = 1 / sum_of(total);
        if constexpr (SETS_APART) set_apart();
    }

    // 1 - p. Of those above a half, the one at the top has the probability 1 / Σ.
    DEVICE C lacking_of(C p) const { return others >= 0 && p == inverse ? others : 1 - p; }

    DEVICE C top_of_warp(C top) const {
        return merged_in_warp<S::THREADS>(top, [](C p, C q) { return greater(p, q); });
    }

    template <int N>
    DEVICE C sum_of_pack(const Pack<X, N>& pack) const {
        C v[N];
        widen_all(pack, v);
        return tree_sum<N>(v);
    }

    template <int N>
    DEVICE C sum_of_terms(const Pack<X, N>& pack, C top) const {
        C reference = finite(top) ? top : 0, v[N];
        widen_all(pack, v);
        UNROLL for (int i = 0; i < N; i++) v[i] = term_below(v[i], reference, t);
        return tree_sum<N>(v);
    }

    // Widen entries that were widened before. Where the compiler knows that they are the same, it may keep them all, and
    // have no registers for the rest: so it must not know that the bits to change are 0.
    template <int N>
    DEVICE void widen_again(Pack<X, N> pack, C* to) const {
        pack.change((Word)(a.rows >> 32));
        widen_all(pack, to);
    }

    // The closer a sum is to 1, the more of its digits the term at the top takes from the logarithm, and from what 1 - p
    // is there: it is set apart.
    DEVICE void set_apart() {
        log_total = log(sum_of(total));
        bool close = finite(total.top) && total.sum < 2;
        if (S::THREADS < 32 ? !any_in_warp(close) : !close) return;
        C rest = 0;
        visit([&](const auto& pack, const auto&) {
            constexpr int N = sizeof(pack) / sizeof(X);
            C v[N];
            widen_again(pack, v);
            UNROLL for (int i = 0; i < N; i++) {
                v[i] = v[i] == total.top ? 0 : term_below(v[i], total.top, t);
            }
            rest += tree_sum<N>(v);
        });
        rest = merge_row(rest, [](C p, C q) { return p + q; });
        // Or the bits of a row would depend on the others in its warp.
        if (!close) return;
        log_total = log1p(rest);
        others = rest * inverse;
    }

    // exp((x - top) / T) for an answer. One of 16 bits takes one instruction: beside its own rounding that of the
    // exponent, at most 88·2^-24 of the value, is nothing.
    DEVICE C exp_of(C logit) const {
        C z = score_below(logit, total.top, t);
        return sizeof(Y) == 2 ? quick_exp2(z * (C)1.4426950408889634) : exp(z);
    }

    // The probabilities of an access. In a row without an answer, what the mask hides is 0 all the same.
    template <int N>
    DEVICE void probabilities(int position, const Pack<X, N>& pack, C* y) const {
        if constexpr (F == CROSS_ENTROPY_SLOPE) {
            widen_again(pack, y);
        } else {
            widen_all(pack, y);
        }
        UNROLL for (int i = 0; i < N; i++) y[i] = exp_of(y[i]) * inverse;
        if (S::GENERAL && inverse != inverse) {
            UNROLL for (int i = 0; i < N; i++) y[i] = mask.exists(position + i) ? y[i] : 0;
        }
    }

    // y of the softmax, and the cotangent where y is not 0.
    template <int N>
    DEVICE void weighted(int position, const Pack<X, N>& pack, const Pack<X, N>& other, C* y, C* g) const {
        if constexpr (F == SOFTMAX_PULLBACK) {
            widen_all(pack, y);
        } else {
            probabilities(position, pack, y);
        }
        widen_all(other, g);
        UNROLL for (int i = 0; i < N; i++) g[i] = y[i] != 0 ? g[i] : 0;
    }

    DEVICE void sum_up_weighted() {
        struct {
            C own, moment, others;
        } sums{0, 0, 0};
        visit_positions([&](int position, const auto& pack, const auto& other) {
            constexpr int N = sizeof(pack) / sizeof(X);
            C y[N], g[N];
            weighted(position, pack, other, y, g);
            UNROLL for (int i = 0; i < N; i++) {
                bool sure = y[i] > (C)0.5;
                sums.own += sure ? g[i] : 0;
                y[i] = sure ? 0 : y[i];
                g[i] = y[i] * g[i];
            }
            sums.moment += tree_sum<N>(g);
            sums.others += tree_sum<N>(y);
        });
        sums = merge_row(sums, [](const auto& p, const auto& q) {
            auto sum = p;
            sum.own += q.own, sum.moment += q.moment, sum.others += q.others;
            return sum;
        });
        own = sums.own;
        moment = sums.moment - own * sums.others;
    }

    template <int N>
    DEVICE void answer(int position, const Pack<X, N>& pack, const Pack<X, N>& other) const {
        C v[N], g[N];
        if constexpr (F == SOFTMAX_VJP || F == SOFTMAX_PULLBACK) {
            weighted(position, pack, other, v, g);
            UNROLL for (int i = 0; i < N; i++) {
                C beside = v[i] > (C)0.5 ? 0 : g[i] - own;
                v[i] = slope_over_temperature(v[i] != 0 ? v[i] * (beside - moment) : 0, t);
            }
        } else if constexpr (SUMS_SECOND) {
            if constexpr (F == LOG_SOFTMAX_PULLBACK) {
                widen_all(pack, v);
                UNROLL for (int i = 0; i < N; i++) v[i] = exp(v[i]);
            } else {
                probabilities(position, pack, v);
            }
            widen_all(other, g);
            UNROLL for (int i = 0; i < N; i++) {
                C slope = g[i] - v[i] * moment;
                if (v[i] > (C)0.5) {
                    C lacking = F == LOG_SOFTMAX_PULLBACK ? -expm1((C)widen(pack.get(i))) : lacking_of(v[i]);
                    slope = lacking * g[i] - v[i] * (moment - g[i]);
                }
                v[i] = slope_over_temperature(slope, t);
            }
        } else if constexpr (F == CROSS_ENTROPY_SLOPE) {
            probabilities(position, pack, v);
            const C share = weight + pull_of_z;
            UNROLL for (int i = 0; i < N; i++) g[i] = v[i] * share * cotangent;
            if ((Word)(target_position - position) < N) {
                UNROLL for (int i = 0; i < N; i++) {
                    if (target_position == position + i) g[i] = (v[i] * pull_of_z - lacking_of(v[i]) * weight) * cotangent;
                }
            }
            UNROLL for (int i = 0; i < N; i++) v[i] = g[i];
        } else if constexpr (F == LOG_SOFTMAX) {
            widen_again(pack, v);
            UNROLL for (int i = 0; i < N; i++) v[i] = score_below(v[i], total.top, t) - log_total;
            if (S::GENERAL && log_total != log_total) {
                UNROLL for (int i = 0; i < N; i++) v[i] = mask.exists(position + i) ? v[i] : -infinity<C>();
            }
        } else {
            probabilities(position, pack, v);
        }
        Pack<Y, N> y;
        round_all(v, y);
        y.store(out + position);
    }

    // Whether there is a class to know: the loss is for one thread to write.
    DEVICE bool has_target() const { return F == CROSS_ENTROPY_SLOPE || (F == CROSS_ENTROPY && member == 0); }

    DEVICE void read_target() {
        if (has_target()) target = ((const Index*)a.targets)[a.targets_map.offset(row)];
    }

    // Not before a part of the row is there: whoever waited for the class sooner would have to wait for that part, too.
    DEVICE void weigh_target() {
        if (!has_target()) return;
        counts = !a.ignores || target != a.ignore_index;
        bool known = target >= 0 && target < a.n;
        target_position = known ? (int)target : -1;
        weight = 1;
        if (a.weight) weight = ((const C*)a.weight)[(known ? target : 0) * a.weight_stride];
        if (!known) weight = nan_of<C>();
        // Now, since whoever waited for it at the end would wait alone.
        if (F == CROSS_ENTROPY) target_logit = known ? (C)widen(x[target]) : nan_of<C>();
    }

    DEVICE void find_slope() {
        pull_of_z = a.z_loss == 0 ? 0 : 2 * (C)a.z_loss * (total.top + log_total);
        cotangent = ((const C*)a.cotangent)[a.cotangent_map.offset(row)];
    }

    DEVICE void write_zeros() {
        visit_positions([&](int position, const auto& pack, const auto&) {
            Pack<Y, sizeof(pack) / sizeof(X)> zeros;
            zeros.fill(rounded<Y>((C)0));
            zeros.store(out + position);
        });
    }

    DEVICE void run() {
        if constexpr (S::CLUSTER > 1) cluster_arrive();
        if constexpr (IS_LOSS) read_target();
        if constexpr (S::HELD || F == SOFTMAX_PULLBACK) load(0);
        if constexpr (F != SOFTMAX_PULLBACK) sum_up();
        if constexpr (F == SOFTMAX_VJP || F == SOFTMAX_PULLBACK) sum_up_weighted();
        if constexpr (F == CROSS_ENTROPY_SLOPE) find_slope();
        if constexpr (REDUCES) {
            if (member != 0 || !present) return;
            C y = 0;
            if (F == LOGSUMEXP) {
                y = logsumexp_of(total, log_total);
            } else if (counts) {
                y = loss_of(total, log_total, target_logit, weight, (C)a.z_loss);
            }
            out[0] = rounded<Y>(y);
        } else {
            if (IS_LOSS && !counts) return write_zeros();
            visit_positions([&](int position, const auto& pack, const auto& other) { answer(position, pack, other); });
        }
    }
};

#define ROW_PARAMETERS                                                                                             \
    const void *x, const void *second, void *out, Index n, Index rows, Index x_stride, Index second_stride,        \
        GIVEN_PARAMETERS(temperature), MASK_PARAMETERS, const void *targets, MAP_PARAMETERS(targets_row),          \
        const void *weight, const void *cotangent, MAP_PARAMETERS(cotangent_row), Index weight_stride,             \
        Index ignores, Index ignore_index, double z_loss
#define ROW_ARGUMENTS                                                                                              \
    {                                                                                                              \
        x, second, out, n, rows, x_stride, second_stride, GIVEN(temperature), MASK, targets, MAP(targets_row),     \
            weight, cotangent, MAP(cotangent_row), weight_stride, ignores, ignore_index, z_loss                    \
    }

template <class S>
DEVICE void run_rows(const RowArguments& arguments, char* shared) {
    RowKernel<S>(arguments, shared).run();
}
