// The two-level draw. The masses of a row's blocks of tokens take the one read of the logits; the draw itself reads the
// masses and the tokens of one block.
//
// A specialisation S of the masses says X, C, WIDTH, PACKS, CLUSTER and GENERAL as for rows; the whole block has a row. A
// group of LANES threads adds up a block of tokens: LANES·PACKS·WIDTH is its length. LANES is 0 where the launch says how
// many. One of the draw says X, C, THREADS, BLOCK and GENERAL; one of the draw from few tokens C and THREADS.

const int ROOM_FOR_MASSES = 16 << 10;    // bytes of shared memory

// The length of a block of tokens is a power of two, and a division would take as long as ten tokens.
DEVICE int log2_of(Index size) { return bit_length((Word)size) - 1; }

struct MassArguments {
    const void* x;
    void *top, *mass;
    Index n, rows, x_stride;
    Parameter temperature;
    Mask where;
    Index lanes;
};

template <class S>
struct MassKernel {
    using X = typename S::X;
    using C = typename S::C;
    static constexpr int W = S::WIDTH, PACKS = S::PACKS;

    // What is known of a block of tokens: its greatest, and its mass under that.
    struct Tokens {
        C top, mass;
    };

    const MassArguments& a;
    char* shared;
    const int lanes, groups;    // powers of two, and so is the team: the groups of threads that have a row together
    const int size, team;       // size: tokens of a block
    C *tops, *masses;    // of the blocks of tokens that this thread block has looked at; without room, masses are in the answer
    int shift;           // how many tokens before the row its first whole access starts
    int count, rounds;    // blocks of tokens, and how many of them a group has
    Index row;
    const X* x;
    C* mass;
    RowTemperature<C> t;
    MaskedRow mask;

    DEVICE MassKernel(const MassArguments& arguments, char* shared)
        : a(arguments),
          shared(shared),
          lanes(S::LANES ? S::LANES : (int)arguments.lanes),
          groups(block_threads() >> log2_of(lanes)),
          size(lanes * PACKS * W),
          team(S::CLUSTER ? cluster_size() * groups : groups) {
        tops = (C*)(shared + bytes_of_merge<WHOLE_BLOCK, S::CLUSTER>());
        row = S::CLUSTER ? cluster_index() : block_index();
        count = ((int)a.n - 1 >> log2_of(size)) + 1;
        rounds = (count - 1 >> log2_of(team)) + 1;
        x = (const X*)a.x + row * a.x_stride;
        mass = (C*)a.mass + row * count;
        masses = rounds * groups * (int)sizeof(C) <= ROOM_FOR_MASSES ? tops + rounds * groups : nullptr;
        shift = (int)((unsigned long long)x / sizeof(X) % W);
        t = row_temperature<C>(false, 1);
        if constexpr (S::GENERAL) t = a.temperature.as_temperature<C>(row), mask = a.where.of(row);
    }

    DEVICE int block_at(int round, int group) const {
        return round * team + (S::CLUSTER ? cluster_rank() * groups : 0) + group;
    }

    DEVICE int lane() const { return thread_index() & (lanes - 1); }
    DEVICE int place(int j) const { return (j * lanes + lane()) * W; }

    // Tokens of a block in the lane's accesses; those past the end, and those that the mask hides, are -inf. Of the access
    // that the block starts in, the block's last tokens take the place of those before it.
    DEVICE void read(int block, Pack<X, W>* packs) const {
        const X nothing = rounded<X>(-infinity<C>());
        const X* from = x + block * size;
        const int end = (int)a.n - block * size;    // may be none
        const int before = end >= size ? shift : 0;
        if (end >= size) {
            UNROLL for (int j = 0; j < PACKS; j++) packs[j].load(from - before + place(j));
            if (place(0) < before) {
                UNROLL for (int e = 0; e < W - 1; e++) {
                    if (e < before) packs[0].set(e, from[size - before + e]);
                }
            }
        } else {
            UNROLL for (int j = 0; j < PACKS; j++) {
                UNROLL for (int e = 0; e < W; e++) packs[j].set(e, place(j) + e < end ? from[place(j) + e] : nothing);
            }
        }
        if (!S::GENERAL || !mask.where) return;
        UNROLL for (int j = 0; j < PACKS; j++) {
            UNROLL for (int e = 0; e < W; e++) {
                int i = place(j) + e - before;
                if (i < 0) i += size;
                if (i < end && !mask.exists(block * size + i)) packs[j].set(e, nothing);
            }
        }
    }

    // A NaN among the tokens is a NaN in the mass.
    DEVICE Tokens look(int block) const {
        Pack<X, W> packs[PACKS];
        read(block, packs);
        C top = top_of(packs[0]);
        UNROLL for (int j = 1; j < PACKS; j++) top = greater(top, top_of(packs[j]));
        top = merged_in_group(top, [](C p, C q) { return greater(p, q); });
        C reference = finite(top) ? top : 0, mass = 0;
        UNROLL for (int j = 0; j < PACKS; j++) {
            C v[W];
            widen_all(packs[j], v);
            UNROLL for (int i = 0; i < W; i++) v[i] = term_below(v[i], reference, t);
            mass += tree_sum<W>(v);
        }
        return Tokens{top, merged_in_group(mass, [](C p, C q) { return p + q; })};
    }

    template <class Merge>
    DEVICE C merged_in_group(C mine, Merge merge_two) const {
        if constexpr (S::LANES) return merged_in_warp<S::LANES>(mine, merge_two);
        ONCE for (int mask = 1; mask < lanes; mask *= 2) mine = merge_two(mine, across(mine, mask));
        return mine;
    }

    DEVICE Total<C> look_at_all() const {
        Total<C> total = no_entries<C>();
        for (int round = 0; round < rounds; round++) {
            int group = thread_index() >> log2_of(lanes);
            // Past the last block too, where all is -inf: a warp has to look together.
            int block = block_at(round, group);
            Tokens one = look(block);
            if (lane() == 0) {
                tops[round * groups + group] = one.top;
                if (masses) {
                    masses[round * groups + group] = one.mass;
                } else if (block < count) {
                    mass[block] = one.mass;
                }
                total = merge(total, Total<C>{one.top, one.mass}, t);
            }
        }
        return total;
    }

    DEVICE C mass_under(const Tokens& one, C top) const {
        if (!finite(top) || !t.has_answer()) return nan_of<C>();
        return one.top == top ? one.mass : one.mass * term_below(one.top, top, t);
    }

    DEVICE void run() {
        if constexpr (S::CLUSTER) cluster_arrive();
        Total<C> total = look_at_all();
        if constexpr (S::CLUSTER) cluster_wait();
        total = merged_once<WHOLE_BLOCK, S::CLUSTER>(
            total, shared, [&](const Total<C>& p, const Total<C>& q) { return merge(p, q, t); });
        for (int i = thread_index(); i < rounds * groups; i += block_threads()) {
            int block = block_at(i >> log2_of(groups), i & (groups - 1));
            if (block < count) mass[block] = mass_under(Tokens{tops[i], masses ? masses[i] : mass[block]}, total.top);
        }
        bool first = thread_index() == 0 && (!S::CLUSTER || cluster_rank() == 0);
        if (first) ((C*)a.top)[row] = total.sum == total.sum ? total.top : nan_of<C>();
    }
};

struct DrawArguments {
    Index* tokens;
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
    int member, count;
    Index row;
    bool present;
    const C* mass;
    const X* x;
    C top, first = 0;    // the first mass that this thread looks at: read before the key is waited for
    Words key;
    RowTemperature<C> t;
    MaskedRow mask;

    DEVICE DrawKernel(const DrawArguments& arguments, char* shared) : a(arguments), shared(shared) {
        const int rows = S::THREADS > 32 ? 1 : S::BLOCK / S::THREADS;
        member = thread_index() % S::THREADS;
        row = block_index() * rows + thread_index() / S::THREADS;
        present = row < a.rows;
        if (!present) row = 0;
        count = ((int)a.n - 1 >> log2_of(a.size)) + 1;
        mass = (const C*)a.mass + a.mass_map.offset(row);
        if (member < count) first = mass[member];
        x = (const X*)a.x + a.x_map.offset(row);
        top = ((const C*)a.top)[a.top_map.offset(row)];
        key = key_of(a, row);
        t = row_temperature<C>(false, 1);
        if constexpr (S::GENERAL) t = a.temperature.as_temperature<C>(row), mask = a.where.of(row);
    }

    // The best block of tokens, and the mass of all.
    struct Blocks {
        Best<C> best;
        C total;
    };

    DEVICE static int threads() { return S::THREADS > 32 ? block_threads() : S::THREADS; }

    DEVICE Blocks best_block() const {
        Best<C> best{-infinity<C>(), count};
        LongSum<C> sum;
        C next = first;
        for (int i = member; i < count; i += threads()) {
            C now = next;
            if (i + threads() < count) next = mass[i + threads()];
            sum.add(now);
            best = merge(best, Best<C>{noisy_score(log(now), t, key, i, BLOCK_VARIATES), i});
        }
        return Blocks{best, sum.value()};
    }

    DEVICE C distance(int i) const { return score_below((C)widen(x[i]), top, t); }

    DEVICE Best<C> best_token(int block) const {
        const int size = (int)a.size, n = (int)a.n, start = block * size, end = n - start < size ? n : start + size;
        Best<C> best{-infinity<C>(), n};
        for (int i = start + member; i < end; i += threads()) {
            C score = S::GENERAL && !mask.exists(i) ? -infinity<C>() : distance(i);
            best = merge(best, Best<C>{noisy_score(score, t, key, i, TOKEN_VARIATES), i});
        }
        return best;
    }

    DEVICE void run() {
        auto found = merged_once<S::THREADS, false>(best_block(), shared, [](const Blocks& p, const Blocks& q) {
            return Blocks{merge(p.best, q.best), p.total + q.total};
        });
        const C total = found.total;
        Best<C> token{-infinity<C>(), (int)a.n};
        if (found.best.index < count) token = best_token(found.best.index);
        token = merged_once<S::THREADS, false>(
            token, shared + bytes_of_merge<S::THREADS, false>(), [](const Best<C>& p, const Best<C>& q) { return merge(p, q); });
        if (member != 0 || !present) return;
        bool drawn = finite(top) && total > 0 && token.index < a.n;
        a.tokens[row] = drawn ? token.index : -1;
    }
};

struct LeadingArguments {
    Index* tokens;
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
    int* blocks;        // in which a token stands

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
        blocks = (int*)(kept + a.k);
    }

    DEVICE C distance(Index i) const { return score_below(x[i], top, t); }

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
        for (Index i = member; i < a.k; i += S::THREADS) {
            terms[i] = exp(distance(i));
            blocks[i] = index[i] >> log2_of(a.size);
        }
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
        Best<C> best{-infinity<C>(), (int)a.k};
        for (int i = member; i < a.k; i += S::THREADS) {
            const int block = blocks[i];
            C score = log((C)sum_of_terms(kept, [&](Index j) { return blocks[j] == block; }));
            best = merge(best, Best<C>{noisy_score(score, t, key, block, BLOCK_VARIATES), i});
        }
        return best;
    }

    DEVICE Best<C> best_token(int block) const {
        Best<C> best{-infinity<C>(), (int)a.k};
        for (int i = member; i < a.k; i += S::THREADS) {
            if (blocks[i] != block || !(kept[i] > 0)) continue;
            best = merge(best, Best<C>{noisy_score(distance(i), t, key, index[i], TOKEN_VARIATES), i});
        }
        return best;
    }

    DEVICE void run() {
        auto merge_scores = [](const Best<C>& p, const Best<C>& q) { return merge(p, q); };
        filter();
        C total = (C)sum_of_terms(kept, [](Index) { return true; });
        Best<C> best = merged<S::THREADS>(best_block(), shared, merge_scores);
        Best<C> token{-infinity<C>(), (int)a.k};
        if (best.index < a.k) token = best_token(blocks[best.index]);
        token = merged<S::THREADS>(token, shared, merge_scores);
        if (member != 0) return;
        bool drawn = total > 0 && token.index < a.k;
        a.tokens[row] = drawn ? index[token.index] : -1;
    }
};

#define MASS_PARAMETERS                                                                                            \
    const void *x, void *top, void *mass, Index n, Index rows, Index x_stride, GIVEN_PARAMETERS(temperature),      \
        MASK_PARAMETERS, Index lanes
#define MASS_ARGUMENTS {x, top, mass, n, rows, x_stride, GIVEN(temperature), MASK, lanes}
#define DRAW_PARAMETERS                                                                                            \
    Index *tokens, const void *mass, MAP_PARAMETERS(mass_row), const void *x, MAP_PARAMETERS(x_row),                 \
        Index n, Index rows, Index size, const void *top, MAP_PARAMETERS(top_row), const int *keys,                \
        MAP_PARAMETERS(keys_row), Index keys_stride, Index folds, GIVEN_PARAMETERS(temperature), MASK_PARAMETERS
#define DRAW_ARGUMENTS                                                                                             \
    {                                                                                                              \
        tokens, mass, MAP(mass_row), x, MAP(x_row), n, rows, size, top, MAP(top_row), keys,                        \
            MAP(keys_row), keys_stride, folds, GIVEN(temperature), MASK                                            \
    }
#define LEADING_PARAMETERS                                                                                         \
    Index *tokens, const void *x, MAP_PARAMETERS(x_row), const int *index,                                         \
        MAP_PARAMETERS(index_row), Index k, Index rows, Index size, const void *top, MAP_PARAMETERS(top_row),      \
        const int *keys, MAP_PARAMETERS(keys_row), Index keys_stride, Index folds, GIVEN_PARAMETERS(temperature),  \
        GIVEN_PARAMETERS(p), GIVEN_PARAMETERS(min_p)
#define LEADING_ARGUMENTS                                                                                          \
    {                                                                                                              \
        tokens, x, MAP(x_row), index, MAP(index_row), k, rows, size, top, MAP(top_row), keys,                      \
            MAP(keys_row), keys_stride, folds, GIVEN(temperature), GIVEN(p), GIVEN(min_p)                          \
    }

template <class S>
DEVICE void run_masses(const MassArguments& arguments, char* shared) {
    let_next_launch_begin();
    MassKernel<S>(arguments, shared).run();
}

template <class S>
DEVICE void run_draw(const DrawArguments& arguments, char* shared) {
    wait_for_last_launch();
    DrawKernel<S>(arguments, shared).run();
}

template <class S>
DEVICE void run_leading(const LeadingArguments& arguments, char* shared) {
    wait_for_last_launch();
    LeadingKernel<S>(arguments, shared).run();
}
