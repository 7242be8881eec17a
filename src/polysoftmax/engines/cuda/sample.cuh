// The two-level draw in one read of the logits: a group of lanes adds up each block of tokens, the best block wins, and
// its tokens are read once more.
//
// A specialisation S says X, C, WIDTH, THREADS, PACKS, CLUSTER and GENERAL as for rows; THREADS is the whole block. A group of
// LANES threads holds a block of tokens: LANES·PACKS·WIDTH is its length.
namespace polysoftmax {

struct SampleArguments {
    const void* x;
    Index* tokens;
    void* logprobs;
    Index n, rows, x_stride;
    const int* k0;
    RowMap k0_map;
    const int* k1;
    RowMap k1_map;
    const void* temperature;
    double temperature_value;
    RowMap temperature_map;
    const void* where;
    RowMap where_map;
    Index where_stride;
};

template <class S>
struct SampleKernel {
    using X = typename S::X;
    using C = typename S::C;
    static constexpr int W = S::WIDTH, LANES = S::LANES, PACKS = S::PACKS, GROUPS = S::THREADS / LANES;

    static constexpr Index size = LANES * PACKS * W;    // of a block of tokens: block_length(n)

    // What is known of a block of tokens.
    struct Block {
        C top, mass;
    };

    const SampleArguments& a;
    char* shared;
    Block* blocks;    // those that this thread block looked at
    Index row, count;
    const X* x;
    const unsigned char* where;
    Word k0, k1;
    Temperature<C> t;

    DEVICE SampleKernel(const SampleArguments& arguments, char* shared) : a(arguments), shared(shared) {
        blocks = (Block*)(shared + SCRATCH);
        row = block_index() / S::CLUSTER;
        count = (a.n + size - 1) / size;
        x = (const X*)a.x + row * a.x_stride;
        where = nullptr;
        t = temperature_of<C>(false, 1);
        if constexpr (S::GENERAL) read_parameters();
        k0 = (Word)a.k0[a.k0_map.offset(row)];
        k1 = (Word)a.k1[a.k1_map.offset(row)];
    }

    DEVICE void read_parameters() {
        if (a.where) where = (const unsigned char*)a.where + a.where_map.offset(row);
        C value = a.temperature ? ((const C*)a.temperature)[a.temperature_map.offset(row)] : (C)a.temperature_value;
        t = temperature_of<C>(a.temperature || a.temperature_value != 1, value);
    }

    DEVICE int group() const { return (S::CLUSTER > 1 ? cluster_rank() * GROUPS : 0) + thread_index() / LANES; }
    DEVICE Index rounds() const { return (count + S::CLUSTER * GROUPS - 1) / (S::CLUSTER * GROUPS); }
    DEVICE Index block_of_round(Index round) const { return round * S::CLUSTER * GROUPS + group(); }

    DEVICE C entry(Index i) const {
        return !S::GENERAL || !where || where[i * a.where_stride] ? (C)widen(x[i]) : -infinity<C>();
    }

    // Tokens of a block in the lane's accesses; those past the end are -inf.
    DEVICE void read(Index block, C* v) const {
        int lane = thread_index() % LANES;
        Index end = (block + 1) * size < a.n ? (block + 1) * size : a.n;
        Pack<X, W> packs[PACKS];
        UNROLL for (int j = 0; j < PACKS; j++) {
            Index i = block * size + (Index)(j * LANES + lane) * W;
            if (i + W <= end) packs[j].load(x + i);
        }
        UNROLL for (int j = 0; j < PACKS; j++) {
            Index i = block * size + (Index)(j * LANES + lane) * W;
            UNROLL for (int k = 0; k < W; k++) {
                C value = -infinity<C>();
                if (i + W <= end) {
                    value = widen(packs[j].at[k]);
                } else if (i + k < end) {
                    value = widen(x[i + k]);
                }
                if (S::GENERAL && where && i + k < end && !where[(i + k) * a.where_stride]) value = -infinity<C>();
                v[j * W + k] = value;
            }
        }
    }

    // The greatest token of a block and its mass; a NaN is a NaN in the mass.
    DEVICE Block look(Index block) const {
        C v[PACKS * W];
        read(block, v);
        C top = v[0];
        UNROLL for (int i = 1; i < PACKS * W; i++) top = greater(top, v[i]);
        UNROLL for (int mask = 1; mask < LANES; mask *= 2) top = greater(top, across(top, mask));
        if (top != top) top = -infinity<C>();
        C reference = finite(top) ? top : 0;
        UNROLL for (int i = 0; i < PACKS * W; i++) v[i] = v[i] == top ? 1 : term(v[i] - reference, t);
        C mass = tree_sum<PACKS * W>(v);
        UNROLL for (int mask = 1; mask < LANES; mask *= 2) mass += across(mass, mask);
        return Block{top, mass};
    }

    DEVICE Total<C> look_at_all() const {
        Total<C> total = no_entries<C>();
        for (Index round = 0; round < rounds(); round++) {
            // Past the last block too, where all is -inf: a warp has to look together.
            Block found = look(block_of_round(round));
            if (thread_index() % LANES == 0) {
                blocks[round * GROUPS + thread_index() / LANES] = found;
                total = merge(total, Total<C>{found.top, 0, found.mass, 0}, t);
            }
        }
        return total;
    }

    DEVICE C mass_under(const Block& block, C top) const {
        return block.top == top ? block.mass : block.mass * term(block.top - top, t);
    }

    DEVICE Best<C> best_block(C top) const {
        Best<C> best{-infinity<C>(), count};
        for (Index i = thread_index(); i < rounds() * GROUPS; i += S::THREADS) {
            Index block = i / GROUPS * S::CLUSTER * GROUPS + i % GROUPS;
            if constexpr (S::CLUSTER > 1) block += cluster_rank() * GROUPS;
            if (block >= count) continue;
            C score = logarithm(mass_under(blocks[i], top));
            best = merge(best, Best<C>{noisy_score(score, t, k0, k1, block, BLOCK_VARIATES), block});
        }
        return best;
    }

    DEVICE Best<C> best_token(Index block, C top) const {
        Best<C> best{-infinity<C>(), a.n};
        Index end = (block + 1) * size < a.n ? (block + 1) * size : a.n;
        for (Index i = block * size + thread_index(); i < end; i += S::THREADS) {
            C z = over_temperature(entry(i) - top, t);
            best = merge(best, Best<C>{noisy_score(z, t, k0, k1, i, TOKEN_VARIATES), i});
        }
        return best;
    }

    DEVICE void run() {
        auto merge_totals = [&](const Total<C>& p, const Total<C>& q) { return merge(p, q, t); };
        auto merge_scores = [](const Best<C>& p, const Best<C>& q) { return merge(p, q); };
        Total<C> total = merged<S::THREADS, S::CLUSTER>(look_at_all(), shared, merge_totals);
        block_barrier();
        Best<C> block = merged<S::THREADS, S::CLUSTER>(best_block(total.top), shared, merge_scores);
        // From here every block of a cluster does the same, and the first writes.
        Best<C> token{0, a.n};
        if (block.index < count) token = best_token(block.index, total.top);
        token = merged<S::THREADS, 1>(token, shared, merge_scores);
        if (thread_index() != 0 || (S::CLUSTER > 1 && cluster_rank() != 0)) return;
        bool drawn = finite(total.top) && total.rest > 0 && token.index < a.n && (!t.given || t.value >= 0);
        a.tokens[row] = drawn ? token.index : -1;
        if (!a.logprobs) return;
        C z = drawn ? over_temperature(entry(token.index) - total.top, t) : 0;
        ((C*)a.logprobs)[row] = drawn ? z - logarithm(total.rest) : nan_of<C>();
    }
};

#define SAMPLE_PARAMETERS                                                                                           \
    const void *x, Index *tokens, void *logprobs, Index n, Index rows, Index x_stride, const int *k0,              \
        MAP_PARAMETERS(k0_row), const int *k1, MAP_PARAMETERS(k1_row), const void *temperature,                    \
        double temperature_value, MAP_PARAMETERS(temperature_row), const void *where, MAP_PARAMETERS(where_row),   \
        Index where_stride
#define SAMPLE_ARGUMENTS                                                                                           \
    {                                                                                                              \
        x, tokens, logprobs, n, rows, x_stride, k0, MAP(k0_row), k1, MAP(k1_row), temperature, temperature_value,  \
            MAP(temperature_row), where, MAP(where_row), where_stride                                              \
    }

template <class S>
DEVICE void run_sample(const SampleArguments& arguments, char* shared) {
    SampleKernel<S>(arguments, shared).run();
}

}  // namespace polysoftmax
