// The two-level draw. The masses of a row's blocks of tokens take the one read of the logits; the draw itself reads the
// masses and the tokens of one block.
//
// A specialisation S of the masses says X, C, WIDTH, THREADS, PACKS, CLUSTER and GENERAL as for rows; THREADS is the
// whole block. A group of LANES threads adds up a block of tokens: LANES·PACKS·WIDTH is its length. One of the draw says
// X, C, THREADS, BLOCK and GENERAL; one of the draw from few tokens C and THREADS.

struct MassArguments {
    const void* x;
    void *top, *mass;
    Index n, rows, x_stride;
    Parameter temperature;
    Mask where;
};

template <class S>
struct MassKernel {
    using X = typename S::X;
    using C = typename S::C;
    static constexpr int W = S::WIDTH, LANES = S::LANES, PACKS = S::PACKS, GROUPS = S::THREADS / LANES;
    static constexpr Index SIZE = LANES * PACKS * W;

    // What is known of a block of tokens: its greatest, and its mass under that.
    struct Tokens {
        C top, mass;
    };

    const MassArguments& a;
    char* shared;
    C* tops;    // of the blocks of tokens that this thread block has looked at; their masses wait in the answer
    Index row, count;
    const X* x;
    C* mass;
    RowTemperature<C> t;
    MaskedRow mask;

    DEVICE MassKernel(const MassArguments& arguments, char* shared) : a(arguments), shared(shared) {
        tops = (C*)(shared + SCRATCH);
        row = block_index() / S::CLUSTER;
        count = (a.n + SIZE - 1) / SIZE;
        x = (const X*)a.x + row * a.x_stride;
        mass = (C*)a.mass + row * count;
        t = row_temperature<C>(false, 1);
        if constexpr (S::GENERAL) t = a.temperature.as_temperature<C>(row), mask = a.where.of(row);
    }

    DEVICE int first_group() const { return S::CLUSTER > 1 ? cluster_rank() * GROUPS : 0; }
    DEVICE Index rounds() const { return (count + S::CLUSTER * GROUPS - 1) / (S::CLUSTER * GROUPS); }
    DEVICE Index block_at(Index round, int group) const { return round * S::CLUSTER * GROUPS + first_group() + group; }

    // Tokens of a block in the lane's accesses; those past the end are -inf.
    DEVICE void read(Index block, C* v) const {
        int lane = thread_index() % LANES;
        Index end = (block + 1) * SIZE < a.n ? (block + 1) * SIZE : a.n;
        Pack<X, W> packs[PACKS];
        UNROLL for (int j = 0; j < PACKS; j++) {
            Index i = block * SIZE + (Index)(j * LANES + lane) * W;
            if (i + W <= end) packs[j].load(x + i);
        }
        UNROLL for (int j = 0; j < PACKS; j++) {
            Index i = block * SIZE + (Index)(j * LANES + lane) * W;
            UNROLL for (int k = 0; k < W; k++) {
                C value = -infinity<C>();
                if (i + W <= end) {
                    value = widen(packs[j].at[k]);
                } else if (i + k < end) {
                    value = widen(x[i + k]);
                }
                if (S::GENERAL && i + k < end && !mask.exists(i + k)) value = -infinity<C>();
                v[j * W + k] = value;
            }
        }
    }

    // A NaN among the tokens is a NaN in the mass.
    DEVICE Tokens look(Index block) const {
        C v[PACKS * W];
        read(block, v);
        C top = -infinity<C>();
        UNROLL for (int i = 0; i < PACKS * W; i++) top = greater(top, v[i]);
        UNROLL for (int mask = 1; mask < LANES; mask *= 2) top = greater(top, across(top, mask));
        C reference = finite(top) ? top : 0;
        UNROLL for (int i = 0; i < PACKS * W; i++) v[i] = v[i] == top ? 1 : term(v[i] - reference, t);
        C mass = tree_sum<PACKS * W>(v);
        UNROLL for (int mask = 1; mask < LANES; mask *= 2) mass += across(mass, mask);
        return Tokens{top, mass};
    }

    DEVICE Total<C> look_at_all() const {
        Total<C> total = no_entries<C>();
        for (Index round = 0; round < rounds(); round++) {
            int group = thread_index() / LANES;
            // Past the last block too, where all is -inf: a warp has to look together.
            Index block = block_at(round, group);
            Tokens one = look(block);
            if (thread_index() % LANES == 0) {
                tops[round * GROUPS + group] = one.top;
                if (block < count) mass[block] = one.mass;
                total = merge(total, Total<C>{one.top, 0, one.mass, 0}, t);
            }
        }
        return total;
    }

    DEVICE C mass_under(const Tokens& one, C top) const {
        if (!finite(top) || !t.has_answer()) return nan_of<C>();
        return one.top == top ? one.mass : one.mass * term(one.top - top, t);
    }

    DEVICE void run() {
        Total<C> total = merged<S::THREADS, S::CLUSTER>(
            look_at_all(), shared, [&](const Total<C>& p, const Total<C>& q) { return merge(p, q, t); });
        block_barrier();
        for (Index i = thread_index(); i < rounds() * GROUPS; i += S::THREADS) {
            Index block = block_at(i / GROUPS, (int)(i % GROUPS));
            if (block < count) mass[block] = mass_under(Tokens{tops[i], mass[block]}, total.top);
        }
        bool first = thread_index() == 0 && (S::CLUSTER == 1 || cluster_rank() == 0);
        if (first) ((C*)a.top)[row] = total.rest == total.rest ? total.top : nan_of<C>();
    }
};

struct DrawArguments {
    Index* tokens;
    void* logprobs;
    const void* mass;
    RowMap mass_map;
    const void* x;
    RowMap x_map;
    Index n, rows, size;
    const void* top;
    RowMap top_map;
    const int* keys;
    RowMap keys_map;
    Index keys_stride;    // from the first word of a key to the second
    Index folds;    // whether there is one key, and each row's is made from it
    Parameter temperature;
    Mask where;
};

// The key of a row.
template <class Arguments>
DEVICE Words key_of(const Arguments& a, Index row) {
    const int* words = a.keys + a.keys_map.offset(row);
    Words key{(Word)words[0], (Word)words[a.keys_stride]};
    return a.folds ? random_words(key, (Word)row, NEW_KEYS) : key;
}

template <class S>
struct DrawKernel {
    using X = typename S::X;
    using C = typename S::C;

    const DrawArguments& a;
    char* shared;
    int member;
    Index row, count;
    bool present;
    const C* mass;
    const X* x;
    C top;
    Words key;
    RowTemperature<C> t;
    MaskedRow mask;

    DEVICE DrawKernel(const DrawArguments& arguments, char* shared) : a(arguments), shared(shared) {
        constexpr int ROWS = S::BLOCK / S::THREADS;
        member = thread_index() % S::THREADS;
        row = block_index() * ROWS + thread_index() / S::THREADS;
        present = row < a.rows;
        if (!present) row = 0;
        count = (a.n + a.size - 1) / a.size;
        mass = (const C*)a.mass + a.mass_map.offset(row);
        x = (const X*)a.x + a.x_map.offset(row);
        top = ((const C*)a.top)[a.top_map.offset(row)];
        key = key_of(a, row);
        t = row_temperature<C>(false, 1);
        if constexpr (S::GENERAL) t = a.temperature.as_temperature<C>(row), mask = a.where.of(row);
    }

    DEVICE Best<C> best_block(C* total) const {
        Best<C> best{-infinity<C>(), count};
        Total<C> sum = no_entries<C>();
        for (Index i = member; i < count; i += S::THREADS) {
            add_exactly(sum, mass[i]);
            C score = log(mass[i]);
            best = merge(best, Best<C>{noisy_score(score, t, key, i, BLOCK_VARIATES), i});
        }
        *total = sum.rest + sum.lost;
        return best;
    }

    DEVICE C distance(Index i) const { return over_temperature((C)widen(x[i]) - top, t); }

    DEVICE Best<C> best_token(Index block) const {
        Best<C> best{-infinity<C>(), a.n};
        Index end = (block + 1) * a.size < a.n ? (block + 1) * a.size : a.n;
        for (Index i = block * a.size + member; i < end; i += S::THREADS) {
            C score = S::GENERAL && !mask.exists(i) ? -infinity<C>() : distance(i);
            best = merge(best, Best<C>{noisy_score(score, t, key, i, TOKEN_VARIATES), i});
        }
        return best;
    }

    DEVICE void run() {
        auto merge_scores = [](const Best<C>& p, const Best<C>& q) { return merge(p, q); };
        C total;
        Best<C> best = best_block(&total);
        best = merged<S::THREADS, 1>(best, shared, merge_scores);
        total = merged<S::THREADS, 1>(total, shared, [](C p, C q) { return p + q; });
        Best<C> token{-infinity<C>(), a.n};
        if (best.index < count) token = best_token(best.index);
        token = merged<S::THREADS, 1>(token, shared, merge_scores);
        if (member != 0 || !present) return;
        bool drawn = finite(top) && total > 0 && token.index < a.n;
        a.tokens[row] = drawn ? token.index : -1;
        if (a.logprobs) ((C*)a.logprobs)[row] = drawn ? distance(token.index) - log(total) : nan_of<C>();
    }
};

struct LeadingArguments {
    Index* tokens;
    void* logprobs;
    const void* x;
    RowMap x_map;
    const int* index;
    RowMap index_map;
    Index k, rows, size;
    const void* top;
    RowMap top_map;
    const int* keys;
    RowMap keys_map;
    Index keys_stride, folds;
    Parameter temperature, p, min_p;
};

// The draw from the k tokens that top-k left, given with their indices: what the two-level draw would take. A block has
// a row, and compares every token with every other, since they are few.
template <class S>
struct LeadingKernel {
    using C = typename S::C;

    const LeadingArguments& a;
    char* shared;
    int member;
    Index row;
    const C* x;
    const int* index;
    C top;
    Words key;
    RowTemperature<C> t;
    C *terms, *kept;    // exp((x - top) / T) of all tokens, and of those that the other filters leave; else 0

    DEVICE LeadingKernel(const LeadingArguments& arguments, char* shared) : a(arguments), shared(shared) {
        member = thread_index();
        row = block_index();
        x = (const C*)a.x + a.x_map.offset(row);
        index = a.index + a.index_map.offset(row);
        top = ((const C*)a.top)[a.top_map.offset(row)];
        key = key_of(a, row);
        t = a.temperature.as_temperature<C>(row);
        terms = (C*)(shared + SCRATCH);
        kept = terms + a.k;
    }

    DEVICE C distance(Index i) const { return over_temperature(x[i] - top, t); }

    // The sum of the terms for whose tokens `counts` is true, in the order of the tokens.
    template <class Counts>
    DEVICE double sum_of_terms(const C* of, Counts counts) const {
        double sum = 0;
        for (Index i = 0; i < a.k; i++) sum += counts(i) ? (double)of[i] : 0;
        return sum;
    }

    DEVICE void filter() {
        double p = a.p.of<C>(row), min_p = a.min_p.of<C>(row);
        bool answered = p >= 0 && p <= 1 && min_p >= 0 && min_p <= 1;
        for (Index i = member; i < a.k; i += S::THREADS) terms[i] = exp(distance(i));
        block_barrier();
        double target = p < 1 ? p * sum_of_terms(terms, [](Index) { return true; }) : 0;
        for (Index i = member; i < a.k; i += S::THREADS) {
            auto precedes = [&](Index j) { return x[j] > x[i] || (x[j] == x[i] && j < i); };
            double before = p < 1 ? sum_of_terms(terms, precedes) : 0;
            bool keep = (p >= 1 || before == 0 || before < target) && terms[i] >= (C)min_p;
            // A row without an answer stays NaN.
            kept[i] = !answered ? nan_of<C>() : keep || terms[i] != terms[i] ? terms[i] : 0;
        }
        block_barrier();
    }

    DEVICE Best<C> best_block() const {
        Best<C> best{-infinity<C>(), a.k};
        for (Index i = member; i < a.k; i += S::THREADS) {
            Index block = index[i] / a.size;
            C score = log((C)sum_of_terms(kept, [&](Index j) { return index[j] / a.size == block; }));
            best = merge(best, Best<C>{noisy_score(score, t, key, block, BLOCK_VARIATES), i});
        }
        return best;
    }

    DEVICE Best<C> best_token(Index block) const {
        Best<C> best{-infinity<C>(), a.k};
        for (Index i = member; i < a.k; i += S::THREADS) {
            if (index[i] / a.size != block || !(kept[i] > 0)) continue;
            best = merge(best, Best<C>{noisy_score(distance(i), t, key, index[i], TOKEN_VARIATES), i});
        }
        return best;
    }

    DEVICE void run() {
        auto merge_scores = [](const Best<C>& p, const Best<C>& q) { return merge(p, q); };
        filter();
        C total = (C)sum_of_terms(kept, [](Index) { return true; });
        Best<C> best = merged<S::THREADS, 1>(best_block(), shared, merge_scores);
        Best<C> token{-infinity<C>(), a.k};
        if (best.index < a.k) token = best_token(index[best.index] / a.size);
        token = merged<S::THREADS, 1>(token, shared, merge_scores);
        if (member != 0) return;
        bool drawn = total > 0 && token.index < a.k;
        a.tokens[row] = drawn ? index[token.index] : -1;
        if (a.logprobs) ((C*)a.logprobs)[row] = drawn ? distance(token.index) - log(total) : nan_of<C>();
    }
};

#define MASS_PARAMETERS                                                                                            \
    const void *x, void *top, void *mass, Index n, Index rows, Index x_stride, GIVEN_PARAMETERS(temperature),      \
        MASK_PARAMETERS
#define MASS_ARGUMENTS {x, top, mass, n, rows, x_stride, GIVEN(temperature), MASK}
#define DRAW_PARAMETERS                                                                                            \
    Index *tokens, void *logprobs, const void *mass, MAP_PARAMETERS(mass_row), const void *x, MAP_PARAMETERS(x_row), \
        Index n, Index rows, Index size, const void *top, MAP_PARAMETERS(top_row), const int *keys,                \
        MAP_PARAMETERS(keys_row), Index keys_stride, Index folds, GIVEN_PARAMETERS(temperature), MASK_PARAMETERS
#define DRAW_ARGUMENTS                                                                                             \
    {                                                                                                              \
        tokens, logprobs, mass, MAP(mass_row), x, MAP(x_row), n, rows, size, top, MAP(top_row), keys,              \
            MAP(keys_row), keys_stride, folds, GIVEN(temperature), MASK                                            \
    }
#define LEADING_PARAMETERS                                                                                         \
    Index *tokens, void *logprobs, const void *x, MAP_PARAMETERS(x_row), const int *index,                         \
        MAP_PARAMETERS(index_row), Index k, Index rows, Index size, const void *top, MAP_PARAMETERS(top_row),      \
        const int *keys, MAP_PARAMETERS(keys_row), Index keys_stride, Index folds, GIVEN_PARAMETERS(temperature),  \
        GIVEN_PARAMETERS(p), GIVEN_PARAMETERS(min_p)
#define LEADING_ARGUMENTS                                                                                          \
    {                                                                                                              \
        tokens, logprobs, x, MAP(x_row), index, MAP(index_row), k, rows, size, top, MAP(top_row), keys,            \
            MAP(keys_row), keys_stride, folds, GIVEN(temperature), GIVEN(p), GIVEN(min_p)                          \
    }

template <class S>
DEVICE void run_masses(const MassArguments& arguments, char* shared) {
    MassKernel<S>(arguments, shared).run();
}

template <class S>
DEVICE void run_draw(const DrawArguments& arguments, char* shared) {
    DrawKernel<S>(arguments, shared).run();
}

template <class S>
DEVICE void run_leading(const LeadingArguments& arguments, char* shared) {
    LeadingKernel<S>(arguments, shared).run();
}
