// One row, or several short ones, in a block or a cluster of blocks: every kernel that is not a draw.
//
// A specialisation S says the types, the formula and the layout:
//   X, Y, C     dtypes of the input, of the answer, and to compute in
//   WIDTH       entries in an access; 1 where the arrays of a row do not share an alignment
//   THREADS     threads of a block that share a row: a power of two
//   BLOCK       threads of a block: THREADS, or more for several rows of up to 32 threads each
//   PACKS       accesses of a thread that are under way together
//   CLUSTER     blocks that share a row
//   HELD        whether the row stays in registers; else it is read again to be written
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

// Where the entry for a row stands in an array that has one a row, or a row for each: repeated, and broadcast.
struct RowMap {
    Index inner, period, stride;

    DEVICE Index offset(Index row) const { return (Index)((Word)row / (Word)inner % (Word)period) * stride; }
};

// A number for all rows, or one for each.
struct Parameter {
    const void* values;
    double value;
    RowMap map;

    template <class C>
    DEVICE double of(Index row) const {
        return values ? (double)((const C*)values)[map.offset(row)] : value;
    }

    template <class C>
    DEVICE RowTemperature<C> as_temperature(Index row) const {
        return row_temperature<C>(values || value != 1, (C)of<C>(row));
    }
};

// Which entries of one row exist: all of them where there is no mask.
struct MaskedRow {
    const unsigned char* where = nullptr;
    Index stride = 0;

    DEVICE bool exists(Index position) const { return !where || where[position * stride]; }
};

struct Mask {
    const void* where;
    RowMap map;
    Index stride;

    DEVICE MaskedRow of(Index row) const {
        return MaskedRow{where ? (const unsigned char*)where + map.offset(row) : nullptr, stride};
    }
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

// A value of the kind S, words at a time, from the thread whose index differs in `mask`.
template <class S>
DEVICE S across(const S& mine, int mask) {
    S other;
    Word words[sizeof(S) / 4];
    memcpy(words, &mine, sizeof(S));
    UNROLL for (int i = 0; i < (int)(sizeof(S) / 4); i++) words[i] = word_across(words[i], mask);
    memcpy(&other, words, sizeof(S));
    return other;
}

const int SCRATCH = 2304;    // bytes of shared memory that merging takes: 33 values of up to 64 bytes, and room

// Merge a value of every thread of a row; each gets the answer, with the same bits.
template <int THREADS, int CLUSTER, class S, class Merge>
DEVICE S merged(S mine, char* shared, Merge merge_two) {
    UNROLL for (int mask = 1; mask < (THREADS < 32 ? THREADS : 32); mask *= 2) {
        mine = merge_two(mine, across(mine, mask));
    }
    if constexpr (THREADS > 32) {
        constexpr int WARPS = THREADS / 32;
        S* slots = (S*)shared;
        int lane = thread_index() % 32;
        block_barrier();    // whoever still reads what the slots held before
        if (lane == 0) slots[thread_index() / 32] = mine;
        block_barrier();
        mine = slots[lane % WARPS];
        UNROLL for (int mask = 1; mask < WARPS; mask *= 2) mine = merge_two(mine, across(mine, mask));
    }
    if constexpr (CLUSTER > 1) {
        Word* own = (Word*)(shared + 32 * sizeof(S));
        if (thread_index() == 0) memcpy(own, &mine, sizeof(S));
        cluster_barrier();
        UNROLL for (int rank = 0; rank < CLUSTER; rank++) {
            S other;
            Word words[sizeof(S) / 4];
            UNROLL for (int i = 0; i < (int)(sizeof(S) / 4); i++) words[i] = word_of_rank(own + i, rank);
            memcpy(&other, words, sizeof(S));
            mine = rank == 0 ? other : merge_two(mine, other);
        }
        cluster_barrier();    // nobody's slot goes away before all have read it
    }
    return mine;
}

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

    const RowArguments& a;
    char* shared;
    int member;    // which of the row's threads this is
    Index row;
    bool present;
    const X *x, *second;
    Y* out;
    MaskedRow mask;
    Index head, packs, extra;    // entries before the first whole access, whole accesses, entries outside them
    RowTemperature<C> t;
    Total<C> total;
    C inverse, log_total, moment;    // 1 / Σ, log Σ, and the sum over the second array
    Index target;
    C weight, share, cotangent;    // of the loss of the row: slope = (p·share - weight at the target)·cotangent

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
        head = 0;
        if (W > 1) {
            head = (W - (Index)((unsigned long long)x / sizeof(X) % W)) % W;
            head = head < a.n ? head : a.n;
        }
        packs = present ? (a.n - head) / W : 0;
        extra = present ? a.n - packs * W : 0;
    }

    // An entry outside the whole accesses: each of the first threads has one.
    DEVICE bool has_extra() const { return W > 1 && member < extra; }
    DEVICE Index extra_position() const { return member < head ? member : a.n - extra + member; }

    DEVICE Index pack_index(Index chunk, int j) const { return (chunk * PACKS + j) * TEAM + member; }
    DEVICE Index chunks() const { return S::HELD ? 1 : (packs + (Index)TEAM * PACKS - 1) / ((Index)TEAM * PACKS); }

    DEVICE void load(Index chunk) {
        UNROLL for (int j = 0; j < PACKS; j++) {
            Index i = pack_index(chunk, j);
            if (i >= packs) continue;
            held[j].load(x + head + i * W);
            if constexpr (HAS_SECOND) held_second[j].load(second + head + i * W);
        }
    }

    DEVICE void load_extra() {
        if (!has_extra()) return;
        held_extra.load(x + extra_position());
        if constexpr (HAS_SECOND) held_extra_second.load(second + extra_position());
    }

    // Call body(position, entries, entries of the second array) for every access of this thread.
    template <class Body>
    DEVICE void visit(bool fresh, Body body) {
        Index count = chunks();
        for (Index chunk = 0; chunk < count; chunk++) {
            if (!S::HELD || fresh) load(chunk);
            if (fresh && chunk == 0) load_extra();
            UNROLL for (int j = 0; j < PACKS; j++) {
                Index i = pack_index(chunk, j);
                if (i < packs) body(head + i * W, held[j], held_second[HAS_SECOND ? j : 0]);
            }
        }
        if (fresh && count == 0) load_extra();
        if (has_extra()) body(extra_position(), held_extra, held_extra_second);
    }

    DEVICE bool exists(Index position) const { return !S::GENERAL || mask.exists(position); }

    template <int N>
    DEVICE void entries(Index position, const Pack<X, N>& from, C* to) const {
        UNROLL for (int i = 0; i < N; i++) to[i] = widen(from.at[i]);
        if (!S::GENERAL || !mask.where) return;
        UNROLL for (int i = 0; i < N; i++) to[i] = exists(position + i) ? to[i] : -infinity<C>();
    }

    // Σ of the cotangent, as the formula of log_softmax takes it, goes along with the total.
    struct Both {
        Total<C> total;
        Total<C> second;
    };

    DEVICE static Both merge_both(const Both& p, const Both& q, const RowTemperature<C>& t) {
        Both r{merge(p.total, q.total, t), p.second};
        r.second.rest += q.second.rest;
        r.second.lost += q.second.lost;
        return r;
    }

    DEVICE void sum_up() {
        Both mine{no_entries<C>(), no_entries<C>()};
        visit(true, [&](Index position, const auto& pack, const auto& other) {
            constexpr int N = sizeof(pack.at) / sizeof(X);
            C v[N];
            entries(position, pack, v);
            if constexpr (!IS_PULLBACK) add_entries<N>(mine.total, v, t);
            if constexpr (SUMS_SECOND) {
                UNROLL for (int i = 0; i < N; i++) v[i] = exists(position + i) ? widen(other.at[i]) : 0;
                add_exactly(mine.second, tree_sum<N>(v));
            }
        });
        if constexpr (SUMS_SECOND) {
            mine = merged<S::THREADS, S::CLUSTER>(
                mine, shared, [&](const Both& p, const Both& q) { return merge_both(p, q, t); });
            moment = mine.second.rest + mine.second.lost;
        } else if constexpr (!IS_PULLBACK) {
            mine.total = merged<S::THREADS, S::CLUSTER>(
                mine.total, shared, [&](const Total<C>& p, const Total<C>& q) { return merge(p, q, t); });
        }
        total = mine.total;
        C sum = sum_of(total);
        inverse = 1 / sum;
        if constexpr (F == LOG_SOFTMAX) log_total = log(sum);
    }

    DEVICE C probability(C v) const { return exp(over_temperature(v - total.top, t)) * inverse; }

    // y of the softmax, and the cotangent where y is not 0.
    template <int N>
    DEVICE void weighted(Index position, const Pack<X, N>& pack, const Pack<X, N>& other, C* y, C* g) const {
        if constexpr (F == SOFTMAX_PULLBACK) {
            UNROLL for (int i = 0; i < N; i++) y[i] = widen(pack.at[i]);
        } else {
            entries(position, pack, y);
            UNROLL for (int i = 0; i < N; i++) y[i] = exists(position + i) ? probability(y[i]) : 0;
        }
        UNROLL for (int i = 0; i < N; i++) g[i] = y[i] != 0 ? widen(other.at[i]) : 0;
    }

    DEVICE void sum_up_weighted() {
        Total<C> mine = no_entries<C>();
        visit(F == SOFTMAX_PULLBACK, [&](Index position, const auto& pack, const auto& other) {
            constexpr int N = sizeof(pack.at) / sizeof(X);
            C y[N], g[N];
            weighted(position, pack, other, y, g);
            UNROLL for (int i = 0; i < N; i++) y[i] *= g[i];
            add_exactly(mine, tree_sum<N>(y));
        });
        C sum = mine.rest + mine.lost;
        moment = merged<S::THREADS, S::CLUSTER>(sum, shared, [](C p, C q) { return p + q; });
    }

    template <int N>
    DEVICE void answer(Index position, const Pack<X, N>& pack, const Pack<X, N>& other) const {
        C v[N], g[N];
        if constexpr (F == SOFTMAX_VJP || F == SOFTMAX_PULLBACK) {
            weighted(position, pack, other, v, g);
            UNROLL for (int i = 0; i < N; i++) v[i] = over_regular_temperature(v[i] * (g[i] - moment), t);
        } else if constexpr (SUMS_SECOND) {
            entries(position, pack, v);
            UNROLL for (int i = 0; i < N; i++) {
                bool kept = exists(position + i);
                C p = F == LOG_SOFTMAX_PULLBACK ? exp(v[i]) : kept ? probability(v[i]) : 0;
                v[i] = over_regular_temperature((kept ? widen(other.at[i]) : 0) - p * moment, t);
            }
        } else if constexpr (F == CROSS_ENTROPY_SLOPE) {
            entries(position, pack, v);
            UNROLL for (int i = 0; i < N; i++) v[i] = slope(position + i, probability(v[i]));
        } else {
            entries(position, pack, v);
            UNROLL for (int i = 0; i < N; i++) {
                C z = over_temperature(v[i] - total.top, t);
                if constexpr (F == SOFTMAX) v[i] = exists(position + i) ? exp(z) * inverse : 0;
                if constexpr (F == LOG_SOFTMAX) v[i] = exists(position + i) ? z - log_total : -infinity<C>();
            }
        }
        Pack<Y, N> y;
        UNROLL for (int i = 0; i < N; i++) round_to(v[i], y.at[i]);
        y.store(out + position);
    }

    // The class of the row, and whether the row counts.
    DEVICE bool read_target() {
        target = ((const Index*)a.targets)[a.targets_map.offset(row)];
        bool counts = !a.ignores || target != a.ignore_index;
        bool known = target >= 0 && target < a.n;
        weight = 1;
        if (a.weight) weight = ((const C*)a.weight)[(known ? target : 0) * a.weight_stride];
        if (!known) weight = nan_of<C>();
        return counts;
    }

    DEVICE void find_slope() {
        share = a.z_loss == 0 ? weight : weight + 2 * (C)a.z_loss * logsumexp_of(total);
        cotangent = ((const C*)a.cotangent)[a.cotangent_map.offset(row)];
    }

    DEVICE C slope(Index position, C p) const {
        return (p * share - (position == target ? weight : 0)) * cotangent;
    }

    DEVICE void write_zeros() {
        visit(false, [&](Index position, const auto& pack, const auto&) {
            Pack<Y, sizeof(pack.at) / sizeof(X)> zeros;
            for (Y& one : zeros.at) one = rounded<Y>((C)0);
            zeros.store(out + position);
        });
    }

    DEVICE void run() {
        bool counts = true;
        if constexpr (IS_LOSS) counts = read_target();
        sum_up();
        if constexpr (F == SOFTMAX_VJP || F == SOFTMAX_PULLBACK) sum_up_weighted();
        if constexpr (F == CROSS_ENTROPY_SLOPE) find_slope();
        if constexpr (REDUCES) {
            if (member != 0 || !present) return;
            C y;
            if constexpr (F == LOGSUMEXP) {
                y = logsumexp_of(total);
            } else {
                bool known = target >= 0 && target < a.n;
                y = !counts ? 0 : known ? loss_of(total, (C)widen(x[target]), weight, (C)a.z_loss) : nan_of<C>();
            }
            out[0] = rounded<Y>(y);
        } else {
            if (IS_LOSS && !counts) return write_zeros();
            visit(false, [&](Index position, const auto& pack, const auto& other) { answer(position, pack, other); });
        }
    }
};

// Parameters of a kernel, each of 8 bytes; the launcher passes them in this order.
#define MAP_PARAMETERS(name) Index name##_inner, Index name##_period, Index name##_stride
#define MAP(name) {name##_inner, name##_period, name##_stride}
#define GIVEN_PARAMETERS(name) const void *name, double name##_value, MAP_PARAMETERS(name##_row)
#define GIVEN(name) {name, name##_value, MAP(name##_row)}
#define MASK_PARAMETERS const void *where, MAP_PARAMETERS(where_row), Index where_stride
#define MASK {where, MAP(where_row), where_stride}
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
