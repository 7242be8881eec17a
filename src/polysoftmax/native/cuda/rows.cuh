// One row, or several short ones, in a block or a cluster of blocks: every kernel that is not a draw.
//
// A specialisation S says the kind of formula, the types and the layout, as far as machine code depends on them:
//   KIND        formulas of one kind share a kernel; the launch says which one it is
//   X, C        dtypes of the input, and to compute in
//   WIDTH       entries in an access; 1 where the arrays of a row do not share an alignment
//   THREADS     threads of a warp that share a row; more than 32: all of the block, a power of two that the launch says
//   BLOCK       the most threads of a block
//   PACKS       accesses of a thread that are under way together
//   CLUSTER     whether blocks share a row; the launch says how many
//   HELD        whether the row stays where it is read to; else it is read again to be written
//   STAGED      whether accesses of a thread may stay in shared memory, beside the PACKS in registers: as many as the launch says
//   GENERAL     whether there is a temperature, a mask, an answer wider than the row, or a formula that few ask for; most
//               calls have none of these, and need not pay for the questions

enum Kind {
    PROBABILITIES,
    REDUCTIONS,
    LOSS_SLOPES,
    PULLBACKS,
    SOFTMAX_PULLBACKS,
    LOG_SOFTMAX_PULLBACKS,
    TRUNCATE,
    SAMPLE_LEADING
};

// As the launcher numbers them.
enum Formula {
    SOFTMAX,
    LOG_SOFTMAX,
    LOGSUMEXP_SLOPE,
    CROSS_ENTROPY_SLOPE,
    LOG_PROB_SLOPE,
    ENTROPY_SLOPE,
    LOGSUMEXP,
    CROSS_ENTROPY,
    LOG_PROB,
    ENTROPY,
    SOFTMAX_VJP,
    LOG_SOFTMAX_VJP,
    SOFTMAX_PULLBACK,
    LOG_SOFTMAX_PULLBACK
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
    double label_smoothing, z_loss;
    Index formula, staged;
    Index widens;    // whether the answer is in C
};

template <class S>
struct RowKernel {
    using X = typename S::X;
    using C = typename S::C;
    static constexpr int W = S::WIDTH, PACKS = S::PACKS;
    static constexpr bool REDUCES = S::KIND == REDUCTIONS;
    static constexpr bool IS_PLAIN = S::KIND == SOFTMAX_PULLBACKS, IS_LOG = S::KIND == LOG_SOFTMAX_PULLBACKS;
    static constexpr bool HAS_SECOND = S::KIND == PULLBACKS || IS_PLAIN || IS_LOG;
    // Whether a formula of few calls has its place here.
    static constexpr bool IS_OPEN = S::GENERAL && !HAS_SECOND;
    static constexpr bool MAY_WIDEN = sizeof(X) < sizeof(C) && (REDUCES || IS_OPEN);

    const RowArguments& a;
    char* shared;
    const Formula formula;
    int team;          // how many threads have a row together
    int merges = 0;    // so far
    int member;        // which of the row's threads this is
    Index row;
    bool present;
    const X *x, *second;
    MaskedRow mask;
    int head, packs, extra;    // entries before the first whole access, whole accesses, entries outside them
    RowTemperature<C> t;
    Total<C> total;
    C inverse, log_total = 0;    // 1 / Σ, log Σ
    C others = -1;    // 1 - p of the class at the top where that has more than half of the probability; else negative
    C moment, own = 0;    // a mean or sum over the second array, and its entry at the class with more than half
    C beside = 0;    // the sum but for that class
    Index target;
    int target_position = -1;    // -1 of a class that there is not
    bool counts = true;    // of a row that does not, the loss is 0, and so are the slopes
    C target_logit, weight = 1, pull_of_z = 0, cotangent = 1;    // of the row's loss
    C possible = 0, spread = 0;    // how many logits are above -inf, and Σ (top - x) of these
    C mean = 0;    // of (x - top) / T, under the softmax

    Pack<X, W> held[PACKS], held_second[HAS_SECOND ? PACKS : 1];
    Pack<X, 1> held_extra, held_extra_second;

    DEVICE RowKernel(const RowArguments& arguments, char* shared)
        : a(arguments),
          shared(shared),
          formula((Formula)arguments.formula),
          team(threads() * (S::CLUSTER ? cluster_size() : 1)) {
        const int rows = S::THREADS > 32 ? 1 : S::BLOCK / S::THREADS;
        member = thread_index() % S::THREADS + (S::CLUSTER ? cluster_rank() * threads() : 0);
        row = (S::CLUSTER ? cluster_index() : block_index()) * rows + thread_index() / S::THREADS;
        present = row < a.rows;
        if (!present) row = 0;    // it has to take part in what a warp does together
        x = (const X*)a.x + row * a.x_stride;
        second = (const X*)a.second + row * a.second_stride;
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

    DEVICE static int threads() { return S::THREADS > 32 ? block_threads() : S::THREADS; }

    DEVICE bool is(Formula one) const { return formula == one; }
    DEVICE bool is_slope_of_loss() const {
        return S::KIND == LOSS_SLOPES || (IS_OPEN && !REDUCES && (is(CROSS_ENTROPY_SLOPE) || is(LOG_PROB_SLOPE)));
    }
    DEVICE bool is_log_prob() const { return IS_OPEN && REDUCES && is(LOG_PROB); }
    DEVICE bool is_loss() const { return is_slope_of_loss() || (REDUCES && is(CROSS_ENTROPY)) || is_log_prob(); }
    DEVICE bool smooths() const { return IS_OPEN && is_loss() && a.label_smoothing != 0; }
    DEVICE bool weighs_scores() const { return IS_OPEN && (is(ENTROPY) || is(ENTROPY_SLOPE)); }
    // Of an answer, which has its digits, and not of logits.
    DEVICE bool is_pullback() const {
        return HAS_SECOND && sizeof(X) == sizeof(C) && (is(SOFTMAX_PULLBACK) || is(LOG_SOFTMAX_PULLBACK));
    }
    DEVICE bool pulls_softmax() const {
        return IS_PLAIN || (HAS_SECOND && !IS_LOG && (is(SOFTMAX_VJP) || is(SOFTMAX_PULLBACK)));
    }
    DEVICE bool pulls_log_softmax() const { return HAS_SECOND && !pulls_softmax(); }
    // Whether the logarithm of the sum is wanted, or 1 - p, and so the terms at the top kept out of the sum.
    DEVICE bool sets_apart() const {
        if (HAS_SECOND) return pulls_log_softmax();
        if (S::KIND == PROBABILITIES) return is(LOG_SOFTMAX) || is_slope_of_loss();
        return true;
    }
    DEVICE bool widens() const { return MAY_WIDEN && a.widens; }

    // An entry outside the whole accesses: each of the first threads has one.
    DEVICE bool has_extra() const { return W > 1 && member < extra; }
    DEVICE int extra_position() const { return member < head ? member : (int)a.n - extra + member; }

    DEVICE bool has_pack(int chunk, int j) const { return (chunk * PACKS + j) * team < packs - member; }
    DEVICE int pack_position(int chunk, int j) const { return head + member * W + (chunk * PACKS + j) * team * W; }
    DEVICE int chunks() const { return S::HELD ? 1 : (packs + team * PACKS - 1) / (team * PACKS); }

    // What stands for an entry that does not exist: it adds nothing to any sum.
    DEVICE X nothing() const { return rounded<X>(is_pullback() && pulls_softmax() ? (C)0 : -infinity<C>()); }

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
        return (X*)(shared + 2 * bytes_of_merge<S::THREADS, S::CLUSTER>()) + (j * threads() + thread_index()) * W;
    }

    DEVICE int accesses_staged() const { return S::STAGED ? (int)a.staged : 0; }

    // Read a chunk: all its accesses first, and then what depends on one.
    DEVICE void load(int chunk) {
        SOME for (int j = 0; j < accesses_staged(); j++) {
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
        if constexpr (S::STAGED) wait_for_copies();
        SOME for (int j = 0; j < accesses_staged(); j++) {
            Pack<X, W> pack;
            pack.load(staged(j));
            body(pack, pack);
        }
        if (chunk == 0 && has_extra()) body(held_extra, held_extra_second);
    }

    // Call body(position, entries, entries of the second array) for the accesses that there are.
    template <class Body>
    DEVICE void visit_positions(Body body) {
        forget(team), forget(member);
        int count = chunks();
        for (int chunk = 0; chunk < count; chunk++) {
            if (!S::HELD) load(chunk);
            UNROLL for (int j = 0; j < PACKS; j++) {
                if (has_pack(chunk, j)) body(pack_position(chunk, j), held[j], held_second[HAS_SECOND ? j : 0]);
            }
            SOME for (int j = 0; j < accesses_staged(); j++) {
                if (!has_pack(0, PACKS + j)) continue;
                Pack<X, W> pack;
                pack.load(staged(j));
                body(pack_position(0, PACKS + j), pack, pack);
            }
        }
        if (has_extra()) body(extra_position(), held_extra, held_extra_second);
    }

    // Memory for a merge, in turns. A cluster's first waits until all its blocks have begun.
    DEVICE char* memory_to_merge() {
        if (S::CLUSTER && merges == 0) cluster_wait();
        return shared + merges++ % 2 * bytes_of_merge<S::THREADS, S::CLUSTER>();
    }

    template <class T, class Merge>
    DEVICE T merge_row(const T& mine, Merge merge_two) {
        return merged_once<S::THREADS, S::CLUSTER>(mine, memory_to_merge(), merge_two);
    }

    template <class T>
    DEVICE T sum_of_row(const T& mine) {
        return merge_row(mine, [](const T& p, const T& q) { return p + q; });
    }

    // What a thread finds of a sum or mean over the second array: its entry at a class with more than half, if there is one.
    struct Mean {
        C own, has_sure, of_others;

        DEVICE Mean operator+(const Mean& more) const {
            return Mean{own + more.own, has_sure + more.has_sure, of_others + more.of_others};
        }
    };

    // Find Σ exp((x - top) / T): each warp under its own maximum, so that one merge is enough.
    DEVICE void sum_up() {
        Total<C> mine = no_entries<C>();
        C of_second = 0, most = -infinity<C>();    // of log p, where that is given
        if constexpr (S::HELD) {
            visit([&](const auto& pack, const auto& other) {
                C& top = is_pullback() ? most : mine.top;
                top = greater(top, top_of(pack));
                if (pulls_log_softmax()) of_second += sum_of_pack(other);
            });
            if (!is_pullback()) {
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
                if (is_pullback()) {
                    most = greater(most, top);
                } else {
                    top = top_of_warp(top);
                    if (top > mine.top) sum.scale(term_below(mine.top, top, t));
                    mine.top = top;
                }
                visit_held(chunk, [&](const auto& pack, const auto& other) {
                    if (!is_pullback()) terms += sum_of_terms(pack, top);
                    if (pulls_log_softmax()) others += sum_of_pack(other);
                });
                sum.add(terms);
                sum_of_second.add(others);
                if (chunk == 0) weigh_target();
            }
            mine.sum = sum.value();
            of_second = sum_of_second.value();
        }
        if (is_pullback()) {
            Mean found = sum_of_row(Mean{0, is_sure(most) ? (C)1 : 0, of_second});
            moment = found.of_others;
            return sum_up_beside(found.has_sure > 0);
        }
        if (pulls_log_softmax()) moment = sum_of_row(of_second);
        mine.sum = merged_in_warp<S::THREADS>(mine.sum, [](C p, C q) { return p + q; });
        total = merged_across_warps<S::THREADS, S::CLUSTER>(
            mine, memory_to_merge(), [&](const Total<C>& p, const Total<C>& q) { return merge(p, q, t); });
        inverse = 1 / sum_of(total);
        if (sets_apart()) set_apart();
        if (pulls_log_softmax()) sum_up_beside(others >= 0);
        if (smooths()) look_at_spread();
        if (weighs_scores()) average_scores();
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
    // have no registers for the rest.
    template <int N>
    DEVICE void widen_again(Pack<X, N> pack, C* to) const {
        pack.forget_all();
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
        rest = sum_of_row(rest);
        // Or the bits of a row would depend on the others in its warp.
        if (!close) return;
        log_total = log1p(rest);
        others = rest * inverse;
    }

    // Whether an entry, a logit or a log p, is that of a class with more than half of the probability.
    DEVICE bool is_sure(C entry) const {
        return is_pullback() ? entry > (C)-0.69314718 : others >= 0 && entry == total.top;
    }

    // Of a row with such a class, the sum over the second array but for it, beside which nothing may be left of the others.
    DEVICE void sum_up_beside(bool has_sure) {
        if (S::THREADS < 32 ? !any_in_warp(has_sure) : !has_sure) return;
        C sum = 0;
        visit([&](const auto& pack, const auto& other) {
            constexpr int N = sizeof(pack) / sizeof(X);
            C v[N], g[N];
            widen_again(pack, v);
            widen_again(other, g);
            UNROLL for (int i = 0; i < N; i++) g[i] = is_sure(v[i]) ? 0 : g[i];
            sum += tree_sum<N>(g);
        });
        beside = sum_of_row(sum);
    }

    // What label smoothing asks of a row: how many classes are possible, and how far they are below the greatest.
    DEVICE void look_at_spread() {
        LongSum<C> count, distances;
        visit([&](const auto& pack, const auto&) {
            constexpr int N = sizeof(pack) / sizeof(X);
            C v[N];
            widen_again(pack, v);
            UNROLL for (int i = 0; i < N; i++) {
                count.add(v[i] > -infinity<C>() ? 1 : 0);
                distances.add(v[i] > -infinity<C>() ? total.top - v[i] : 0);
            }
        });
        possible = sum_of_row(count.value());
        spread = sum_of_row(distances.value());
    }

    DEVICE void average_scores() {
        LongSum<C> sum;
        visit([&](const auto& pack, const auto&) {
            constexpr int N = sizeof(pack) / sizeof(X);
            C v[N];
            widen_again(pack, v);
            UNROLL for (int i = 0; i < N; i++) {
                C z = score_below(v[i], total.top, t), term = exp(z);
                v[i] = term != 0 ? term * z : 0;
            }
            sum.add(tree_sum<N>(v));
        });
        mean = sum_of_row(sum.value()) * inverse;
    }

    // Whether the mask hides all of a row, whose entropy is 0: each thread of the row gets the answer.
    DEVICE bool is_hidden() {
        bool unanswered = mask.where && inverse != inverse;
        if (S::THREADS < 32 ? !any_in_warp(unanswered) : !unanswered) return false;
        C found = 0;
        for (int i = member; i < (int)a.n; i += team) found = mask.exists(i) ? 1 : found;
        return sum_of_row(found) == 0 && unanswered;
    }

    // exp((x - top) / T) for an answer. One of 16 bits takes one instruction: beside its own rounding that of the
    // exponent, at most 88·2^-24 of the value, is nothing.
    DEVICE C exp_of(C logit, bool is_narrow) const {
        C z = score_below(logit, total.top, t);
        return is_narrow ? quick_exp2(z * (C)1.4426950408889634) : exp(z);
    }

    // The probabilities of an access. In a row without an answer, what the mask hides is 0 all the same, but not its slope.
    template <int N>
    DEVICE void probabilities(int position, const Pack<X, N>& pack, C* y) const {
        widen_again(pack, y);
        if (sizeof(X) == 2 && !widens()) {
            UNROLL for (int i = 0; i < N; i++) y[i] = exp_of(y[i], true) * inverse;
        } else {
            UNROLL for (int i = 0; i < N; i++) y[i] = exp_of(y[i], false) * inverse;
        }
        if (S::GENERAL && inverse != inverse && (HAS_SECOND || is(SOFTMAX))) {
            UNROLL for (int i = 0; i < N; i++) y[i] = mask.exists(position + i) ? y[i] : 0;
        }
    }

    // y of the softmax, and the cotangent where y is not 0.
    template <int N>
    DEVICE void weighted(int position, const Pack<X, N>& pack, const Pack<X, N>& other, C* y, C* g) const {
        if (is_pullback()) {
            widen_all(pack, y);
        } else {
            probabilities(position, pack, y);
        }
        widen_all(other, g);
        UNROLL for (int i = 0; i < N; i++) g[i] = y[i] != 0 ? g[i] : 0;
    }

    // The mean less the cotangent of a class with more than half of the probability, which may be all of it.
    DEVICE void sum_up_weighted() {
        Mean found{0, 0, 0};
        visit_positions([&](int position, const auto& pack, const auto& other) {
            constexpr int N = sizeof(pack) / sizeof(X);
            C y[N], g[N];
            weighted(position, pack, other, y, g);
            UNROLL for (int i = 0; i < N; i++) {
                bool sure = y[i] > (C)0.5;
                found.own += sure ? g[i] : 0;
                found.has_sure = sure ? 1 : found.has_sure;
                g[i] = sure ? 0 : y[i] * g[i];
            }
            found.of_others += tree_sum<N>(g);
        });
        found = sum_of_row(found);
        own = found.own;
        moment = found.of_others;
        bool has_sure = found.has_sure > 0;
        if (S::THREADS < 32 ? !any_in_warp(has_sure) : !has_sure) return;
        // Less its cotangent in each term, and not in the sum, of which nothing is left where theirs are close to it.
        C less = 0;
        visit_positions([&](int position, const auto& pack, const auto& other) {
            constexpr int N = sizeof(pack) / sizeof(X);
            C y[N], g[N];
            weighted(position, pack, other, y, g);
            UNROLL for (int i = 0; i < N; i++) g[i] = y[i] > (C)0.5 ? 0 : y[i] * (g[i] - own);
            less += tree_sum<N>(g);
        });
        less = sum_of_row(less);
        // Or the bits of a row would depend on the others in its warp.
        if (has_sure) moment = less;
    }

    template <int N>
    DEVICE void answer(int position, const Pack<X, N>& pack, const Pack<X, N>& other) const {
        C v[N], g[N];
        if constexpr (HAS_SECOND) {
            if (pulls_softmax()) {
                weighted(position, pack, other, v, g);
                UNROLL for (int i = 0; i < N; i++) {
                    C beside = v[i] > (C)0.5 ? 0 : g[i] - own;
                    v[i] = slope_over_temperature(v[i] != 0 ? v[i] * (beside - moment) : 0, t);
                }
            } else {
                if (is_pullback()) {
                    widen_all(pack, v);
                    UNROLL for (int i = 0; i < N; i++) v[i] = exp(v[i]);
                } else {
                    probabilities(position, pack, v);
                }
                widen_again(other, g);
                UNROLL for (int i = 0; i < N; i++) {
                    C slope = g[i] - v[i] * moment;
                    if (v[i] >= (C)0.5) {
                        C entry[N];
                        widen_again(pack, entry);
                        C lacking = is_pullback() ? -expm1(entry[i]) : others;
                        slope = is_sure(entry[i]) ? lacking * g[i] - v[i] * beside : slope;
                    }
                    v[i] = slope_over_temperature(slope, t);
                }
            }
        } else if (is_slope_of_loss()) {
            probabilities(position, pack, v);
            smooths() ? slopes_of_smoothed_loss(position, pack, v) : slopes_of_loss<N>(position, v);
        } else if (is(LOG_SOFTMAX)) {
            widen_again(pack, v);
            UNROLL for (int i = 0; i < N; i++) v[i] = score_below(v[i], total.top, t) - log_total;
            if (S::GENERAL && log_total != log_total) {
                UNROLL for (int i = 0; i < N; i++) v[i] = mask.exists(position + i) ? v[i] : -infinity<C>();
            }
        } else if (IS_OPEN && is(ENTROPY_SLOPE)) {
            probabilities(position, pack, v);
            widen_again(pack, g);
            UNROLL for (int i = 0; i < N; i++) {
                C z = score_below(g[i], total.top, t);
                v[i] = slope_over_temperature(v[i] != 0 ? v[i] * (mean - z) * cotangent : 0, t);
            }
        } else {
            probabilities(position, pack, v);
        }
        write<N>(position, v);
    }

    template <int N>
    DEVICE void slopes_of_loss(int position, C* v) const {
        const C share = weight + pull_of_z;
        const int here = target_position - position;
        C own = 0;
        if ((Word)here < N) {
            UNROLL for (int i = 0; i < N; i++) own = here == i ? v[i] : own;
            own = (own * pull_of_z - lacking_of(own) * weight) * cotangent;
        }
        UNROLL for (int i = 0; i < N; i++) v[i] = v[i] * share * cotangent;
        if ((Word)here < N) {
            UNROLL for (int i = 0; i < N; i++) v[i] = here == i ? own : v[i];
        }
        if (S::GENERAL) {
            UNROLL for (int i = 0; i < N; i++) v[i] = slope_over_temperature(v[i], t);
        }
    }

    // p·Σ c - c of the target probabilities c, which are smoothed over the possible classes and have a sum of 1.
    template <int N>
    DEVICE void slopes_of_smoothed_loss(int position, const Pack<X, N>& pack, C* v) const {
        const C smoothing = (C)a.label_smoothing, part = smoothing / possible;
        C logits[N];
        widen_again(pack, logits);
        UNROLL for (int i = 0; i < N; i++) {
            bool is_target = target_position == position + i;
            C share = logits[i] == -infinity<C>() ? 0 : part, c = is_target ? share + (1 - smoothing) : share;
            C rest = is_target ? smoothing - share : 1 - share;
            C slope = v[i] > (C)0.5 ? v[i] * rest - lacking_of(v[i]) * c : v[i] - c;
            v[i] = (slope * weight + v[i] * pull_of_z) * cotangent;
        }
    }

    template <int N>
    DEVICE void write(int position, const C* v) const {
        if constexpr (MAY_WIDEN) {
            if (a.widens) {
                Pack<C, N> y;
                round_all(v, y);
                y.store((C*)a.out + row * a.n + position);
                return;
            }
        }
        Pack<X, N> y;
        round_all(v, y);
        y.store((X*)a.out + row * a.n + position);
    }

    // Whether there is a class to know: the loss is for one thread to write.
    DEVICE bool has_target() const { return is_loss() && (!REDUCES || member == 0); }

    DEVICE void read_target() {
        if (has_target()) target = ((const Index*)a.targets)[a.targets_map.offset(row)];
    }

    // Not before a part of the row is there: whoever waited for the class sooner would have to wait for that part, too.
    DEVICE void weigh_target() {
        if (!has_target()) return;
        counts = !a.ignores || target != a.ignore_index;
        bool known = target >= 0 && target < a.n;
        target_position = known ? (int)target : -1;
        if (a.weight) weight = ((const C*)a.weight)[(known ? target : 0) * a.weight_stride];
        if (!known) weight = nan_of<C>();
        // Now, since whoever waited for it at the end would wait alone.
        if (REDUCES || is(LOG_PROB_SLOPE)) target_logit = known ? (C)widen(x[target]) : nan_of<C>();
    }

    // Whether a row has a log-probability that is finite: there is no slope elsewhere.
    DEVICE bool has_log_prob() const {
        bool known = target_position >= 0 && mask.exists(target_position);
        return known && inverse == inverse && score_below(target_logit, total.top, t) > -infinity<C>();
    }

    DEVICE void read_cotangent() { cotangent = ((const C*)a.cotangent)[a.cotangent_map.offset(row)]; }

    // What probabilities are multiplied by to be the slopes of logsumexp: those of a row without a finite logit are 0.
    DEVICE void scale_slopes() {
        read_cotangent();
        C scale = finite(total.top) ? inverse : total.sum != total.sum ? total.sum : 1;
        total.top = total.top == -infinity<C>() ? 0 : total.top;
        inverse = scale * cotangent;
    }

    // The loss of a smoothed row: (1 - ε)·nll + ε·(the mean of nll over the possible classes).
    DEVICE C smoothed_loss() const {
        const C smoothing = (C)a.label_smoothing;
        C nll = log_total + (total.top - target_logit), mean_nll = log_total + spread / possible;
        C y = smoothing == 1 ? mean_nll : (1 - smoothing) * nll + smoothing * mean_nll;
        C z = total.top + log_total;
        return weight * y + (a.z_loss != 0 ? (C)a.z_loss * (z * z) : 0);
    }

    // The log-probability of a class, of which nothing is left where the mask hides it.
    DEVICE C log_prob_of_row() const {
        if (target_position < 0) return nan_of<C>();
        if (!mask.exists(target_position)) return -infinity<C>();
        return score_below(target_logit, total.top, t) - log_total;
    }

    DEVICE C value_of_row() const {
        if (is(LOGSUMEXP)) return logsumexp_of(total, log_total);
        if (!counts) return 0;
        if (weighs_scores()) return log_total - mean;
        if (is_log_prob()) return member == 0 ? log_prob_of_row() : 0;
        return smooths() ? smoothed_loss() : loss_of(total, log_total, target_logit, weight, (C)a.z_loss);
    }

    DEVICE void write_zeros() {
        visit_positions([&](int position, const auto& pack, const auto&) {
            constexpr int N = sizeof(pack) / sizeof(X);
            C zeros[N];
            UNROLL for (int i = 0; i < N; i++) zeros[i] = 0;
            write<N>(position, zeros);
        });
    }

    DEVICE void run() {
        if constexpr (S::CLUSTER) cluster_arrive();
        if (is_loss()) read_target();
        const bool has_sum = !(is_pullback() && pulls_softmax());
        if (S::HELD || !has_sum) load(0);
        if (has_sum) sum_up();
        if (pulls_softmax()) sum_up_weighted();
        if (weighs_scores()) counts = !is_hidden();
        if constexpr (REDUCES) {
            C y = value_of_row();
            if (member != 0 || !present) return;
            if (sizeof(X) < sizeof(C) && !a.widens) {
                ((X*)a.out)[row] = rounded<X>(y);
            } else {
                ((C*)a.out)[row] = y;
            }
        } else {
            if (is_loss()) pull_of_z = a.z_loss == 0 ? 0 : 2 * (C)a.z_loss * (total.top + log_total);
            if (is_loss() || weighs_scores()) read_cotangent();
            // Of log p, and not of the loss, which is -log p.
            if (is_loss() && is(LOG_PROB_SLOPE)) cotangent = -cotangent, counts = has_log_prob();
            if (S::KIND == PROBABILITIES && is(LOGSUMEXP_SLOPE)) scale_slopes();
            if (!counts) return write_zeros();
            visit_positions([&](int position, const auto& pack, const auto& other) { answer(position, pack, other); });
        }
    }
};

#define ROW_PARAMETERS                                                                                             \
    const void *x, const void *second, void *out, Index n, Index rows, Index x_stride, Index second_stride,        \
        GIVEN_PARAMETERS(temperature), MASK_PARAMETERS, const void *targets, MAP_PARAMETERS(targets_row),          \
        const void *weight, const void *cotangent, MAP_PARAMETERS(cotangent_row), Index weight_stride,             \
        Index ignores, Index ignore_index, double label_smoothing, double z_loss, Index formula, Index staged,     \
        Index widens
#define ROW_ARGUMENTS                                                                                              \
    {                                                                                                              \
        x, second, out, n, rows, x_stride, second_stride, GIVEN(temperature), MASK, targets, MAP(targets_row),     \
            weight, cotangent, MAP(cotangent_row), weight_stride, ignores, ignore_index, label_smoothing, z_loss,  \
            formula, staged, widens                                                                                \
    }

template <class S>
DEVICE void run_rows(const RowArguments& arguments, char* shared) {
    RowKernel<S>(arguments, shared).run();
}
