// The draw: two levels of the Gumbel-max trick. A row is cut into blocks; a Gumbel variate is added to the logarithm of
// each block's mass, and inside the block that wins to each scaled logit. Who wins is found by a race (race.hpp).
#pragma once

#include "race.hpp"
#include "truncation.hpp"

// Tokens of a block; the draw depends on it, so it never changes.
inline int block_length(int64_t n) {
    const int bits = (bit_length((uint64_t)(n - 1)) + 1) / 2;
    return bits < 1 ? 2 : bits > 8 ? 256 : 1 << bits;
}

// What the lengths of a problem say about its draws.
struct Cut {
    int64_t n, blocks;
    int size;
    int64_t slots;    // rows that are looked at together

    Cut(int64_t n, int64_t draws) : n(n), size(block_length(n)) {
        constexpr int64_t variates = 1024;
        blocks = (n + size - 1) / size;
        const int64_t longest = blocks > size ? blocks : size;
        slots = is_short() ? Batch::most : longest < variates ? variates / longest : 1;
        slots = slots < draws ? 1 : slots / draws;
    }

    int64_t padded() const { return blocks * size; }
    bool is_short() const { return size < 16; }
    int64_t words() const { return blocks + size; }    // that a draw takes
};

// What rows are masked and truncated in.
template <class C>
struct Workspace {
    Survivors<C> survivors;
    C *masked, *left;

    Workspace(Shelf& shelf, int64_t n) : survivors(shelf, n), masked(shelf.take<C>(n)), left(shelf.take<C>(n)) {}
};

// At T = 0 a block counts if it has a maximum.
template <class C>
C score_of_block(C mass, bool greedy) {
    return !greedy ? log(mass) : mass > 0 ? 0 : -infinity<C>();
}

// z of a row at T = 0 or inf, where it is 0 or -inf; NaN stays NaN, and so does +inf.
template <class C>
void write_limits(const C* x, int64_t n, C temperature, C* z) {
    C top = -infinity<C>();
    for (int64_t j = 0; j < n; j++) top = x[j] > top ? x[j] : top;
    const C bound = temperature == 0 ? top : -largest<C>;
    for (int64_t j = 0; j < n; j++) z[j] = x[j] < bound ? -infinity<C>() : x[j] - x[j];
}

template <int count, class C>
BOTH C sum_of_lanes(C* sum) {
#pragma GCC unroll 4
    for (int width = count / 2; width; width /= 2) {
        for (int l = 0; l < width; l++) sum[l] += sum[l + width];
    }
    return sum[0];
}

// Rows of few tokens, as columns side by side: what is computed for a token or a block is computed for all rows at once,
// and draws race in a lane each. What is removed has -inf.
template <class C>
class ShortRows {
    const Cut cut;
    const int64_t pitch;    // from a token of a row to the next
    Workspace<C>& space;
    C *z, *terms, *masses, *tops, *halves, *divisors, *left;
    float *token_slowness, *block_slowness;
    bool *answered, *greedy;

  public:
    ShortRows(Shelf& shelf, const Cut& cut, Workspace<C>& space)
        : cut(cut), pitch((cut.slots + group - 1) / group * group), space(space) {
        z = shelf.take<C>(cut.padded() * pitch);
        terms = shelf.take<C>(cut.size * pitch);
        masses = shelf.take<C>(cut.blocks * pitch);
        tops = shelf.take<C>(pitch);
        halves = shelf.take<C>(pitch);
        divisors = shelf.take<C>(pitch);
        left = shelf.take<C>(cut.n);
        token_slowness = shelf.take<float>(cut.padded() * pitch);
        block_slowness = shelf.take<float>(cut.blocks * pitch);
        answered = shelf.take<bool>(pitch);
        greedy = shelf.take<bool>(pitch);
    }

    void start() {
        for (int64_t j = 0; j < cut.padded() * pitch; j++) z[j] = -infinity<C>();
    }

    bool has_token(int64_t s) const { return answered[s]; }

    // There is always a table of the tokens' times.
    APART void prepare(const Block<C>& block, int64_t first, int64_t count, bool) {
        const bool plain = !(block.temperature || block.k || block.top_k || block.p || block.min_p);
        for (int64_t s = 0; s < count; s++) {
            const C* x = masked(block, first + s, space.masked);
            greedy[s] = false;
            if (!plain) x = left_of(x, Filters<C>(block, first + s), s);
            for (int64_t j = 0; j < cut.n; j++) z[j * pitch + s] = x[j];
        }
        const int64_t lanes = (count + group - 1) / group * group;
        plain ? scale<false>(lanes) : scale<true>(lanes);
        switch (cut.size) {
            case 2: add_masses<2>(lanes); break;
            case 4: add_masses<4>(lanes); break;
            case 8: add_masses<8>(lanes); break;
        }
    }

    APART void race(Batch& batch, Domain domain) const {
        const int32_t step = (int32_t)(cut.size * pitch);
        if (domain == BLOCK_VARIATES) {
            for (int64_t d = 0; d < Batch::most; d++) batch.place[d] = batch.slot[d];
            race_across(batch, domain, cut.blocks, block_slowness, pitch,
                        [](int64_t, int64_t i) { return WordLanes{} + (Word)i; });
        } else {
            for (int64_t d = 0; d < Batch::most; d++) batch.place[d] = batch.run[d] * step + batch.slot[d];
            race_across(batch, domain, cut.size, token_slowness, pitch, [&](int64_t d, int64_t i) {
                return (WordLanes)lanes(batch.run + d) * (Word)cut.size + (Word)i;
            });
        }
        for (int64_t d = 0; d < batch.count; d++) batch.rival[d] = greedy[batch.slot[d]] ? 0 : batch.rival[d];
    }

    APART void decide(Batch& batch, int64_t d, Domain domain) const {
        const int64_t s = batch.slot[d], start = batch.run[d] * cut.size;
        if (domain == BLOCK_VARIATES) {
            batch.leader[d] = first_best<C>(cut.blocks, batch.key(d), domain, greedy[s],
                [&](int64_t i) { return score_of_block(masses[i * pitch + s], greedy[s]); }, [](int64_t i) { return (Word)i; });
        } else {
            batch.leader[d] = first_best<C>(cut.size, batch.key(d), domain, greedy[s],
                [&](int64_t i) { return z[(start + i) * pitch + s]; }, [=](int64_t i) { return (Word)(start + i); });
        }
    }

    int64_t token_of(const Batch& batch, int64_t d) const { return batch.run[d] * cut.size + batch.leader[d]; }

    // A short row is prepared anew as fast as a part of it.
    bool mend(int64_t, C) { return false; }

  private:
    // What temperature and filters leave of a row. Where the temperature is 0 or inf, that is z itself.
    const C* left_of(const C* x, const Filters<C>& filters, int64_t s) {
        const Temperature<C> t = temperature_of(filters.temperature);
        greedy[s] = filters.temperature == 0;
        halves[s] = t.half;
        divisors[s] = t.divisor;
        if (!filters.valid || !filters.off()) {
            truncate_row(x, cut.n, filters, space.survivors, left);
            x = left;
        }
        if (!t.limit) return x;
        halves[s] = divisors[s] = 1;
        write_limits(x, cut.n, filters.temperature, left);
        return left;
    }

    template <bool scaled>
    void scale(int64_t lanes) {
        const int64_t n = cut.n, step = pitch;
        C *const top = tops, *const own = z;
        const C *const half = halves, *const divisor = divisors;
        for (int64_t s = 0; s < lanes; s++) top[s] = own[s];
        for (int64_t j = 1; j < n; j++) {
            const C* x = own + j * step;
            for (int64_t s = 0; s < lanes; s++) top[s] = x[s] > top[s] ? x[s] : top[s];
        }
        for (int64_t j = 0; j < n; j++) {
            C* x = own + j * step;
#pragma GCC ivdep
            for (int64_t s = 0; s < lanes; s++) {
                x[s] = scaled ? halved_distance(x[s], top[s], half[s]) / divisor[s] : x[s] - top[s];
            }
        }
    }

    // In each block, halves of its tokens are added until one is left.
    template <int size>
    void add_masses(int64_t lanes) {
        const int64_t step = pitch;
        C *const term = terms, *const sums = tops;    // not needed any more
        for (int64_t s = 0; s < lanes; s++) sums[s] = 0;
        for (int64_t b = 0; b < cut.blocks; b++) {
            C* const mass = masses + b * step;
            float* const slowness = block_slowness + b * step;
            for (int64_t j = 0; j < size; j++) {
                const int64_t at = (b * size + j) * step;
                write_terms(z + at, lanes, term + j * step, token_slowness + at);
            }
#pragma GCC ivdep
            for (int64_t s = 0; s < lanes; s++) {
                C sum[size];
#pragma GCC unroll 8
                for (int j = 0; j < size; j++) sum[j] = term[j * step + s];
                mass[s] = sum_of_lanes<size>(sum);
            }
#pragma GCC ivdep
            for (int64_t s = 0; s < lanes; s++) {
                slowness[s] = slowness_of(mass[s]);
                sums[s] += mass[s];
            }
        }
        for (int64_t s = 0; s < lanes; s++) answered[s] = sums[s] > 0;
    }

    APART static void write_terms(const C* z, int64_t lanes, C* term, float* slowness) {
#pragma GCC ivdep
        for (int64_t s = 0; s < lanes; s++) {
            term[s] = exp(z[s]);
            slowness[s] = slowness_of(term[s]);
        }
    }
};

// Rows of blocks of 16 tokens or more, one after another; each draw's race is along its candidates.
template <class C>
class LongRows {
    // What a draw needs to know of a row. A run is a block that has tokens.
    struct Slot {
        // Dense: all blocks are runs, and z = (half·row - half·top) / divisor.
        const C* row;
        C half, top, divisor;
        // Sparse: the survivors of run i stand at z and indices from starts[i] to starts[i + 1].
        C* z;
        int32_t *indices, *starts, *own_blocks;
        const int32_t* blocks;
        C* masses;
        float *slowness, *token_slowness;
        int64_t runs;
        bool sparse, greedy, answered, limit, tabled;
    };

    // Lanes of a block's mass. Survivors are added in the lanes of their indices, and what is removed adds 0, so the
    // mass is the same with and without it.
    static constexpr int lanes = 16;

    const Cut cut;
    Workspace<C>& space;
    Slot* slots;
    C *all_z, *terms, *masses;
    int32_t *all_indices, *blocks, *starts, *every_block;
    float *block_slowness, *token_slowness;
    int64_t blocks_in_groups;

  public:
    LongRows(Shelf& shelf, const Cut& cut, Workspace<C>& space) : cut(cut), space(space) {
        const int64_t padded = cut.padded();
        blocks_in_groups = (cut.blocks + group - 1) / group * group;
        slots = shelf.take<Slot>(cut.slots);
        all_z = shelf.take<C>(cut.slots * padded);
        terms = shelf.take<C>(padded);
        masses = shelf.take<C>(cut.slots * cut.blocks);
        all_indices = shelf.take<int32_t>(cut.slots * padded);
        blocks = shelf.take<int32_t>(cut.slots * blocks_in_groups);
        starts = shelf.take<int32_t>(cut.slots * (cut.blocks + 1));
        every_block = shelf.take<int32_t>(blocks_in_groups);
        block_slowness = shelf.take<float>(cut.slots * blocks_in_groups);
        token_slowness = shelf.take<float>(cut.slots * padded);
    }

    void start() {
        for (int64_t i = 0; i < blocks_in_groups; i++) every_block[i] = (int32_t)i;
        for (int64_t s = 0; s < cut.slots; s++) {
            Slot& slot = slots[s];
            slot.z = all_z + s * cut.padded();
            slot.indices = all_indices + s * cut.padded();
            slot.own_blocks = blocks + s * blocks_in_groups;
            slot.starts = starts + s * (cut.blocks + 1);
            slot.masses = masses + s * cut.blocks;
            slot.slowness = block_slowness + s * blocks_in_groups;
            slot.token_slowness = token_slowness + s * cut.padded();
        }
    }

    bool has_token(int64_t s) const { return slots[s].answered; }

    // With a table of all tokens' times, where there are enough draws for it.
    void prepare(const Block<C>& block, int64_t first, int64_t count, bool tabled) {
        for (int64_t s = 0; s < count; s++) {
            Filters<C> filters(block, first + s);
            Slot& slot = slots[s];
            slot.runs = 0;
            slot.tabled = slot.answered = false;
            slot.greedy = filters.temperature == 0;
            if (!filters.valid) continue;
            if (filters.off()) {
                prepare_dense(block, first + s, filters.temperature, slot);
                if (tabled) write_table(block, slot);
            } else {
                prepare_sparse(masked(block, first + s, space.masked), filters, slot);
            }
            write_slowness(slot);
        }
    }

    APART void race(Batch& batch, Domain domain) const {
        for (int64_t d = 0; d < batch.count; d++) {
            const Slot& slot = slots[batch.slot[d]];
            batch.leader[d] = 0;
            batch.slowness[d] = 0;
            batch.rival[d] = slot.greedy ? 0 : infinity<float>();
            if (slot.greedy) continue;
            if (domain == BLOCK_VARIATES) race_of_blocks(batch, d, slot);
            else race_of_tokens(batch, d, slot);
        }
    }

    APART void decide(Batch& batch, int64_t d, Domain domain) const {
        const Slot& slot = slots[batch.slot[d]];
        if (domain == BLOCK_VARIATES) {
            batch.leader[d] = first_best<C>(slot.runs, batch.key(d), domain, slot.greedy,
                [&](int64_t i) { return score_of_block(slot.masses[i], slot.greedy); },
                [&](int64_t i) { return (Word)slot.blocks[i]; });
            return;
        }
        alignas(64) C z[256];
        const int64_t run = batch.run[d], length = length_of(slot, run);
        auto counter = [&](int64_t i) { return counter_of(slot, run, i); };
        write_z(slot, run, length, z, cut.size);
        batch.leader[d] = first_best<C>(length, batch.key(d), domain, slot.greedy, [&](int64_t i) { return z[i]; }, counter);
    }

    int64_t token_of(const Batch& batch, int64_t d) const {
        return counter_of(slots[batch.slot[d]], batch.run[d], batch.leader[d]);
    }

    // Whether a token that the only row has lost changes the mass of its block alone, which is then known.
    bool mend(int64_t token, C lost) {
        Slot& slot = slots[0];
        if (slot.sparse || slot.limit || !(lost < slot.top)) return false;
        const int64_t run = token / cut.size;
        write_masses(slot, run * cut.size, run * cut.size + length_of(slot, run));
        slot.slowness[run] = slowness_of(slot.masses[run]);
        return true;
    }

  private:
    void prepare_dense(const Block<C>& block, int64_t r, C temperature, Slot& slot) {
        const C* x = masked(block, r, slot.z);
        const Temperature<C> t = temperature_of(temperature);
        slot.limit = t.limit;
        if (!t.limit) {
            slot.half = t.half;
            slot.divisor = t.divisor;
            const Along<C> row{cut.n, nullptr, block.pieces};
            slot.top = row.max([&](int64_t j) { return x[j]; }).value;
        } else {
            write_limits(x, cut.n, temperature, slot.z);
            x = slot.z;
            slot.half = slot.divisor = 1;
            slot.top = 0;
        }
        slot.row = x;
        slot.sparse = false;
        slot.blocks = every_block;
        slot.runs = cut.blocks;
        in_pieces(block, [&](int64_t start, int64_t end) { write_masses(slot, start, end); });
    }

    template <class F>
    void in_pieces(const Block<C>& block, F f) const {
        if (!block.pieces || cut.n <= Along<C>::shortest_piece) return f(0, cut.n);
        const Along<C> row{cut.n, nullptr, block.pieces};
        row.by_pieces([&](int64_t, int64_t start, int64_t end) { f(start, end); });
    }

    // The masses of the blocks from start to end, which is the end of a block or of the row.
    APART void write_masses(const Slot& slot, int64_t start, int64_t end) const {
        const int64_t whole = start + (end - start) / cut.size * cut.size;
        const bool divided = slot.half != 1 || slot.divisor != 1;
        for (int64_t j = start; j < whole; j += cut.size) {
            const C* x = slot.row + j;
            slot.masses[j / cut.size] = divided ? mass_of<true>(slot, x, cut.size) : mass_of<false>(slot, x, cut.size);
        }
        if (whole == end) return;
        C last[256];
        for (int64_t j = 0; j < cut.size; j++) last[j] = whole + j < end ? slot.row[whole + j] : -infinity<C>();
        slot.masses[whole / cut.size] = mass_of<true>(slot, last, cut.size);
    }

    template <bool divided>
    BOTH static C mass_of(const Slot& slot, const C* x, int64_t size) {
        const C top = slot.top, half = slot.half, divisor = slot.divisor;
        alignas(64) C sum[lanes] = {};
        for (int64_t j = 0; j < size; j += lanes) {
#pragma GCC ivdep
            for (int l = 0; l < lanes; l++) {
                sum[l] += exp(divided ? halved_distance(x[j + l], top, half) / divisor : x[j + l] - top);
            }
        }
        return sum_of_lanes<lanes>(sum);
    }

    APART void prepare_sparse(const C* x, const Filters<C>& filters, Slot& slot) {
        slot.sparse = true;
        Survivors<C>& survivors = space.survivors;
        if (!survivors.find(x, filters)) return;
        const int64_t count = survivors.count;
        const C top = survivors.top;
        const Temperature<C> t = temperature_of(filters.temperature);
        C* const z = slot.z;
        C* const term = terms;
        const PlaceOf<C>* const places = survivors.places;
        if (!t.limit) {
#pragma GCC ivdep
            for (int64_t j = 0; j < count; j++) z[j] = halved_distance(number<C>(places[j]), top, t.half) / t.divisor;
        } else {
            for (int64_t j = 0; j < count; j++) {
                C v = number<C>(places[j]);
                z[j] = v == -infinity<C>() || (t.bound == 0 && v < top) ? -infinity<C>() : 0;
            }
        }
#pragma GCC ivdep
        for (int64_t j = 0; j < count; j++) term[j] = exp(z[j]);
        __builtin_memcpy(slot.indices, survivors.indices, count * sizeof(int32_t));
        sum_runs(slot, count);
    }

    // Split the survivors into runs and add up their masses.
    void sum_runs(Slot& slot, int64_t count) const {
        const int shift = bit_length((uint64_t)cut.size) - 1;
        int64_t runs = 0;
        for (int64_t j = 0; j < count; runs++) {
            const int32_t of = slot.indices[j] >> shift;
            slot.own_blocks[runs] = of;
            slot.starts[runs] = (int32_t)j;
            alignas(64) C sum[lanes] = {};
            for (; j < count && slot.indices[j] >> shift == of; j++) sum[slot.indices[j] & (lanes - 1)] += terms[j];
            slot.masses[runs] = sum_of_lanes<lanes>(sum);
        }
        slot.starts[runs] = (int32_t)count;
        slot.blocks = slot.own_blocks;
        slot.runs = runs;
    }

    // A mass of NaN, or none above 0, leaves the row without an answer.
    static void write_slowness(Slot& slot) {
        const C* const masses = slot.masses;
        float* const slowness = slot.slowness;
        C sum = 0;
        for (int64_t i = 0; i < slot.runs; i++) sum += masses[i];
#pragma GCC ivdep
        for (int64_t i = 0; i < slot.runs; i++) slowness[i] = slowness_of(masses[i]);
        for (int64_t i = slot.runs; i % group; i++) slowness[i] = slowest;
        slot.answered = sum > 0;
    }

    void write_table(const Block<C>& block, Slot& slot) const {
        slot.tabled = true;
        in_pieces(block, [&](int64_t start, int64_t end) {
            for (int64_t run = start / cut.size; run * cut.size < end; run++) {
                write_token_slowness(slot, run, length_of(slot, run), slot.token_slowness + run * cut.size);
            }
        });
    }

    // With what completes a group.
    APART void write_token_slowness(const Slot& slot, int64_t run, int64_t length, float* slowness) const {
        alignas(64) C z[256];
        write_z(slot, run, length, z, cut.size);
#pragma GCC ivdep
        for (int64_t i = 0; i < length; i++) slowness[i] = slowness_of(exp(z[i]));
        for (int64_t i = length; i % group; i++) slowness[i] = slowest;
    }

    void race_of_blocks(Batch& batch, int64_t d, const Slot& slot) const {
        const int32_t* const blocks = slot.blocks;
        if (slot.runs < 2) return;
        race_along(batch, d, BLOCK_VARIATES, slot.slowness, slot.runs,
                   [=](int64_t i) { return *(const WordLanes*)(blocks + i); });
    }

    void race_of_tokens(Batch& batch, int64_t d, const Slot& slot) const {
        const int64_t run = batch.run[d], length = length_of(slot, run), start = run * cut.size;
        alignas(64) float own[256];
        const float* const slowness = slot.tabled ? slot.token_slowness + start : own;
        if (!slot.tabled) write_token_slowness(slot, run, length, own);
        if (slot.sparse) {
            alignas(64) int32_t counters[256];
            const int32_t* const from = slot.indices + slot.starts[run];
            for (int64_t i = 0; i < length; i++) counters[i] = from[i];
            for (int64_t i = length; i % group; i++) counters[i] = 0;
            race_along(batch, d, TOKEN_VARIATES, slowness, length,
                       [&](int64_t i) { return *(const WordLanes*)(counters + i); });
        } else {
            race_along(batch, d, TOKEN_VARIATES, slowness, length,
                       [=](int64_t i) { return WordLanes{0, 1, 2, 3, 4, 5, 6, 7} + (Word)(start + i); });
        }
    }

    Word counter_of(const Slot& slot, int64_t run, int64_t i) const {
        return (Word)(slot.sparse ? slot.indices[slot.starts[run] + i] : run * cut.size + i);
    }

    int64_t length_of(const Slot& slot, int64_t run) const {
        if (slot.sparse) return slot.starts[run + 1] - slot.starts[run];
        const int64_t start = run * cut.size;
        return cut.n - start < cut.size ? cut.n - start : cut.size;
    }

    static void write_z(const Slot& slot, int64_t run, int64_t length, C* z, int64_t size) {
        if (slot.sparse) {
            __builtin_memcpy(z, slot.z + slot.starts[run], length * sizeof(C));
        } else {
            const C* from = slot.row + run * size;
            const C top = slot.top, half = slot.half, divisor = slot.divisor;
            for (int64_t i = 0; i < length; i++) z[i] = halved_distance(from[i], top, half) / divisor;
        }
    }
};

// Rows are prepared, some at a time, and drawn from.
template <class C, class Rows>
class Sampler {
  public:
    Shelf shelf;

    Sampler(char* memory, int64_t n, int64_t draws) : shelf{memory}, cut(n, draws), space(shelf, n), rows(shelf, cut, space) {
        row_keys = shelf.take<Words>(cut.slots);
    }

    void run(const Block<C>& block) {
        rows.start();
        if (block.distinct) return run_distinct(block);
        const bool tabled = block.draws > 1 && block.draws * cut.size >= cut.n;
        for (int64_t first = 0; first < block.rows; first += cut.slots) {
            const int64_t count = block.rows - first < cut.slots ? block.rows - first : cut.slots;
            rows.prepare(block, first, count, tabled);
            if (block.one_key) fold(block, first, count);
            draw_all(block, first, count * block.draws);
        }
    }

  private:
    const Cut cut;
    Workspace<C> space;
    Rows rows;
    Words* row_keys;

    // A single key is folded with the number of each row.
    void fold(const Block<C>& block, int64_t first, int64_t count) {
        const Words key{(Word)block.keys[0], (Word)block.keys[1]};
        const int64_t* index = block.index + first;
        Words* const folded = row_keys;
#pragma GCC ivdep
        for (int64_t s = 0; s < count; s++) folded[s] = random_words(key, (Word)index[s], NEW_KEYS);
    }

    // The draws from the rows that are prepared, numbered row by row. Many of them are shared between the threads.
    void draw_all(const Block<C>& block, int64_t first, int64_t count) const {
        constexpr int64_t work = 1 << 14;
        const int64_t size = Batch::most * (1 + work / (Batch::most * cut.words()));
        if (!block.pieces || count <= size) return draw_some(block, first, 0, count);
        struct Context {
            const Sampler& sampler;
            const Block<C>& block;
            int64_t first, size, count;
        } context{*this, block, first, size, count};
        auto one = [](void* given, int64_t k) {
            const Context& c = *(const Context*)given;
            const int64_t start = k * c.size;
            c.sampler.draw_some(c.block, c.first, start, start + c.size < c.count ? start + c.size : c.count);
        };
        block.pieces((count + size - 1) / size, one, &context);
    }

    void draw_some(const Block<C>& block, int64_t first, int64_t start, int64_t end) const {
        const int64_t each = block.with_each_key, keys = block.draws / each;
        int64_t fold = start % each, which = start / each % keys, s = start / block.draws;
        int64_t* const tokens = block.tokens + first * block.draws;
        Batch batch;
        for (int64_t d = start, number; d < end; d += number, fold += number) {
            if (fold == each) fold = 0, which++;
            if (which == keys) which = 0, s++;
            number = each - fold < end - d ? each - fold : end - d;
            if (!rows.has_token(s)) {
                for (int64_t k = 0; k < number; k++) tokens[d + k] = -1;
                continue;
            }
            const int32_t* words = block.keys + 2 * ((first + s) * keys + which);
            const Words key = block.one_key ? row_keys[s] : Words{(Word)words[0], (Word)words[1]};
            number = batch.add(number, s, key, (Word)fold, tokens + d);
            if (batch.count == Batch::most) finish(block, batch);
        }
        finish(block, batch);
    }

    void finish(const Block<C>& block, Batch& batch) const {
        if (batch.count == 0) return;
        if (block.with_each_key > 1) batch.fold_keys();
        if (cut.blocks > 1) {
            choose(batch, BLOCK_VARIATES);
            for (int64_t d = 0; d < batch.count; d++) batch.run[d] = batch.leader[d];
        }
        choose(batch, TOKEN_VARIATES);
        const int64_t count = batch.count;
        for (int64_t d = 0; d < count; d++) *batch.token[d] = rows.token_of(batch, d);
        batch.count = 0;
    }

    void choose(Batch& batch, Domain domain) const {
        rows.race(batch, domain);
        batch.settle([&](int64_t d) { rows.decide(batch, d, domain); });
    }

    // One draw after another, each from what the ones before have left of the row.
    void run_distinct(const Block<C>& block) {
        Block<C> one = {};
        one.rows = 1;
        one.n = block.n;
        one.x = space.left;
        one.pieces = block.pieces;
        one.draws = block.draws;
        one.with_each_key = block.with_each_key;
        one.one_key = block.one_key;
        one.index = block.index;
        for (int64_t r = 0; r < block.rows; r++) {
            if (block.one_key) fold(block, r, 1);
            one.temperature = block.temperature ? block.temperature + r : nullptr;
            one.keys = block.one_key ? nullptr : block.keys + 2 * r * (block.draws / block.with_each_key);
            one.tokens = block.tokens + r * block.draws;
            const Filters<C> filters(block, r);
            bool is_known = false;
            for (int64_t i = 0; i < block.draws; i++) {
                if (i % block.with_each_key == 0) {
                    truncate_row(masked(block, r, space.masked), cut.n, filters, space.survivors, space.left);
                    if (filters.temperature == 0) write_greatest();
                    is_known = false;
                }
                if (!is_known) rows.prepare(one, 0, 1, false);
                draw_some(one, 0, i, i + 1);
                const int64_t token = one.tokens[i];
                if (token < 0) continue;
                const C lost = space.left[token];
                space.left[token] = -infinity<C>();
                is_known = rows.mend(token, lost);
            }
        }
    }

    // At T = 0 what is below the maximum does not exist, also once the maximum is drawn.
    void write_greatest() {
        C top = -infinity<C>();
        for (int64_t j = 0; j < cut.n; j++) top = space.left[j] > top ? space.left[j] : top;
        for (int64_t j = 0; j < cut.n; j++) space.left[j] = space.left[j] < top ? -infinity<C>() : space.left[j];
    }
};

// Of a row's draws, in entries of a row: a random word takes about as long as an exponential.
inline int64_t draws_work(const Problem& problem) {
    return problem.n > 0 ? problem.options[1] * Cut(problem.n, 1).words() : 0;
}

template <class C>
int64_t sample_scratch(int64_t n, int64_t draws) {
    if (n == 0) return 0;
    return Cut(n, draws).is_short() ? Sampler<C, ShortRows<C>>(nullptr, n, draws).shelf.used
                                    : Sampler<C, LongRows<C>>(nullptr, n, draws).shelf.used;
}

template <class C>
void sample_rows(const Problem& problem, const Block<C>& block, char* memory) {
    const int64_t draws = problem.options[1];
    if (block.n == 0) return;
    if (Cut(block.n, draws).is_short()) Sampler<C, ShortRows<C>>(memory, block.n, draws).run(block);
    else Sampler<C, LongRows<C>>(memory, block.n, draws).run(block);
}

template <class C>
void words_of(const Problem&, const Block<C>& block, char*) {
    const int32_t *k0 = block.words[0], *k1 = block.words[1], *c0 = block.words[2], *c1 = block.words[3];
    int32_t *a = block.answers[0], *b = block.answers[1];
#pragma GCC ivdep
    for (int64_t i = 0; i < block.rows * block.n; i++) {
        const Words drawn = random_words(Words{(Word)k0[i], (Word)k1[i]}, (Word)c0[i], (Word)c1[i]);
        a[i] = (int32_t)drawn.first;
        b[i] = (int32_t)drawn.second;
    }
}
