// The draw: two levels of the Gumbel-max trick. A row is cut into blocks; a Gumbel variate is added to the logarithm of
// each block's mass, and inside the block that wins to each scaled logit. Rows are taken several at a time, so that the
// variates of all of them are computed in loops that are long enough for vectors.
#pragma once

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
    int64_t together;    // draws whose variates are computed together
    int64_t slots;       // rows that are looked at together

    Cut(int64_t n, int64_t draws) : n(n), size(block_length(n)) {
        constexpr int64_t variates = 1024, most = 64;
        blocks = (n + size - 1) / size;
        const int64_t longest = blocks > size ? blocks : size;
        together = longest * most <= variates ? most : longest < variates ? variates / longest : 1;
        slots = draws <= 1 ? together : draws < together ? together / draws : 1;
    }

    int64_t padded() const { return blocks * size; }
    bool is_short() const { return size < 16; }
};

// What a draw needs to know of a row. A run is a block that has tokens.
template <class C>
struct Slot {
    // Dense: all blocks are runs, and z = (half·row - half·top) / divisor.
    const C* row;
    C half, top, divisor;
    // Sparse: the survivors of run i stand at z and indices from starts[i] to starts[i + 1].
    C* z;
    int32_t *indices, *starts, *own_blocks;
    const int32_t* blocks;
    C* scores;
    int64_t runs;
    double total;    // NaN if the row has no answer
    bool sparse, greedy;
};

template <class C>
struct Draw {
    const Slot<C>* slot;
    int64_t run;
    int64_t* token;
};

// Keys, counters and variates of several draws, side by side.
template <class C>
struct Variates {
    static constexpr int64_t width = 16;
    Word *first, *second, *counter;
    float* noise;
    C* z;

    Variates(Shelf& shelf, int64_t count) {
        count += width;
        first = shelf.take<Word>(count);
        second = shelf.take<Word>(count);
        counter = shelf.take<Word>(count);
        noise = shelf.take<float>(count);
        z = shelf.take<C>(count);
    }

    BOTH void set_keys(int64_t start, int64_t count, Words key) {
        for (int64_t i = start; i < start + count; i++) {
            first[i] = key.first;
            second[i] = key.second;
        }
    }

    // Those behind the last one only complete a vector.
    APART void draw(int64_t count, Domain domain) {
        for (int64_t i = count; i < count + width; i++) first[i] = second[i] = counter[i] = 0;
        for (int64_t start = 0; start < count; start += width) {
#pragma GCC ivdep
            for (int64_t i = start; i < start + width; i++) {
                noise[i] = gumbel_of(random_words(Words{first[i], second[i]}, counter[i], domain).first);
            }
        }
    }
};

template <class C>
class Sampler {
  public:
    Shelf shelf;

    Sampler(char* memory, int64_t n, int64_t draws)
        : shelf{memory}, cut(n, draws), variates(shelf, cut.together * (cut.blocks > cut.size ? cut.blocks : cut.size)),
          survivors(shelf, n) {
        const int64_t padded = cut.padded();
        slots = shelf.take<Slot<C>>(cut.slots);
        draws_waiting = shelf.take<Draw<C>>(cut.together);
        keys = shelf.take<Words>(cut.together);
        folds = shelf.take<Word>(cut.together);
        row_keys = shelf.take<Words>(cut.slots);
        all_z = shelf.take<C>(cut.slots * padded);
        terms = shelf.take<C>(cut.is_short() ? cut.slots * padded : padded);
        scores = shelf.take<C>(cut.slots * cut.blocks);
        all_indices = shelf.take<int32_t>(cut.slots * padded);
        blocks = shelf.take<int32_t>(cut.slots * cut.blocks);
        starts = shelf.take<int32_t>(cut.slots * (cut.blocks + 1));
        every_block = shelf.take<int32_t>(cut.blocks);
        masked_row = shelf.take<C>(n);
        left = shelf.take<C>(n);
    }

    void run(const Block<C>& block) {
        for (int64_t i = 0; i < cut.blocks; i++) every_block[i] = (int32_t)i;
        lay_out();
        with_each_key = block.with_each_key;
        if (block.distinct) return run_distinct(block);
        for (int64_t first = 0; first < block.rows; first += cut.slots) {
            const int64_t count = block.rows - first < cut.slots ? block.rows - first : cut.slots;
            prepare(block, first, count);
            if (block.one_key) fold(block, first, count);
            draw_from(block, first, count);
        }
    }

  private:
    // Lanes of a block's mass. Survivors are added in the lanes of their indices, and what is removed adds 0, so the
    // mass is the same with and without it.
    static constexpr int lanes = 16;

    const Cut cut;
    int64_t with_each_key = 1;
    Variates<C> variates;
    Survivors<C> survivors;
    Slot<C>* slots;
    Draw<C>* draws_waiting;
    Words *keys, *row_keys;
    Word* folds;
    C *all_z, *terms, *scores, *masked_row, *left;
    int32_t *all_indices, *blocks, *starts, *every_block;

    void lay_out() {
        for (int64_t s = 0; s < cut.slots; s++) {
            Slot<C>& slot = slots[s];
            slot.z = all_z + s * cut.padded();
            slot.indices = all_indices + s * cut.padded();
            slot.own_blocks = blocks + s * cut.blocks;
            slot.starts = starts + s * (cut.blocks + 1);
            slot.scores = scores + s * cut.blocks;
            slot.row = slot.z;    // and so it stays for short rows
            set_plain(slot);
            slot.greedy = false;
            set_dense(slot);
        }
    }

    void prepare(const Block<C>& block, int64_t first, int64_t count) {
        if (cut.is_short()) return prepare_short(block, first, count);
        for (int64_t s = 0; s < count; s++) {
            Filters<C> filters(block, first + s);
            Slot<C>& slot = slots[s];
            if (!filters.valid) {
                slot.runs = 0;
                slot.total = nan_of<C>();
            } else if (filters.off()) {
                prepare_dense(block, first + s, filters.temperature, slot);
            } else {
                prepare_sparse(masked(block, first + s, masked_row), filters, slot);
            }
            slot.greedy = filters.temperature == 0;
            if (slot.greedy) only_support(slot);
        }
    }

    // At T = 0 the first block that holds a maximum wins.
    static void only_support(Slot<C>& slot) {
        for (int64_t i = 0; i < slot.runs; i++) slot.scores[i] = slot.scores[i] > -infinity<C>() ? 0 : -infinity<C>();
    }

    // z of a row at T = 0 or inf, where it is 0 or -inf; NaN stays NaN, and so does +inf.
    static void write_limits(const C* x, int64_t n, C temperature, C* z) {
        C top = -infinity<C>();
        for (int64_t j = 0; j < n; j++) top = x[j] > top ? x[j] : top;
        const C bound = temperature == 0 ? top : -largest<C>;
        for (int64_t j = 0; j < n; j++) {
            z[j] = x[j] < bound ? -infinity<C>() : x[j] - x[j];
        }
    }

    // Rows of few tokens are dense, with -inf for what is removed; the exponentials and logarithms of all rows are computed
    // in one loop each.
    void prepare_short(const Block<C>& block, int64_t first, int64_t count) {
        const bool plain = !(block.temperature || block.k || block.top_k || block.p || block.min_p);
        for (int64_t s = 0; s < count; s++) {
            const C* x = masked(block, first + s, masked_row);
            if (!plain) {
                const Filters<C> filters(block, first + s);
                slots[s].greedy = filters.temperature == 0;
                if (!filters.valid || !filters.off()) {
                    truncate_row(x, cut.n, filters, survivors, terms);
                    x = terms;
                }
                scale_short(x, filters.temperature, slots[s].z);
            } else {
                scale_short(x, 1, slots[s].z);
            }
        }
        const int64_t length = count * cut.padded();
        C *const z = all_z, *const term = terms;
#pragma GCC ivdep
        for (int64_t j = 0; j < length; j++) term[j] = exp(z[j]);
        switch (cut.size) {
            case 2: sum_short<2>(count * cut.blocks); break;
            case 4: sum_short<4>(count * cut.blocks); break;
            case 8: sum_short<8>(count * cut.blocks); break;
        }
        for (int64_t s = 0; s < count; s++) slots[s].total = total_of(slots[s]);
        if (cut.blocks > 1) to_logarithms(scores, count * cut.blocks);
        for (int64_t s = 0; s < count; s++) {
            if (slots[s].greedy) only_support(slots[s]);
        }
    }

    void set_dense(Slot<C>& slot) const {
        slot.sparse = false;
        slot.blocks = every_block;
        slot.runs = cut.blocks;
    }

    static void set_plain(Slot<C>& slot) {
        slot.half = slot.divisor = 1;
        slot.top = 0;
    }

    void scale_short(const C* x, C value, C* z) {
        const int64_t n = cut.n;
        const Temperature<C> t = temperature_of(value);
        if (!t.limit) {
            C top = x[0];
            for (int64_t j = 1; j < n; j++) top = x[j] > top ? x[j] : top;
            if (value == 1) {
                for (int64_t j = 0; j < n; j++) z[j] = x[j] - top;
            } else {
                for (int64_t j = 0; j < n; j++) z[j] = halved_distance(x[j], top, t.half) / t.divisor;
            }
        } else {
            write_limits(x, n, value, z);
        }
        for (int64_t j = n; j < cut.padded(); j++) z[j] = -infinity<C>();
    }

    template <int size>
    void sum_short(int64_t count) {
        C* term = terms;
        for (int64_t b = 0; b < count; b++, term += size) scores[b] = sum_of_lanes<size>(term);
    }

    template <int count>
    BOTH static C sum_of_lanes(C* sum) {
#pragma GCC unroll 4
        for (int width = count / 2; width; width /= 2) {
            for (int l = 0; l < width; l++) sum[l] += sum[l + width];
        }
        return sum[0];
    }

    APART void prepare_dense(const Block<C>& block, int64_t r, C temperature, Slot<C>& slot) {
        const C* x = masked(block, r, slot.z);
        const Temperature<C> t = temperature_of(temperature);
        if (!t.limit) {
            slot.half = t.half;
            slot.divisor = t.divisor;
            const Along<C> row{cut.n, nullptr, block.pieces};
            slot.top = row.max([&](int64_t j) { return x[j]; }).value;
        } else {
            write_limits(x, cut.n, temperature, slot.z);
            x = slot.z;
            set_plain(slot);
        }
        slot.row = x;
        if (block.pieces && cut.n > Along<C>::shortest_piece) {
            const Along<C> row{cut.n, nullptr, block.pieces};
            row.by_pieces([&](int64_t, int64_t start, int64_t end) { write_masses(slot, start, end); });
        } else {
            write_masses(slot, 0, cut.n);
        }
        set_dense(slot);
        slot.total = total_of(slot);
        to_logarithms(slot.scores, slot.runs);
    }

    // The masses of the blocks from start to end, which is the end of a block or of the row.
    APART void write_masses(const Slot<C>& slot, int64_t start, int64_t end) const {
        const int64_t whole = start + (end - start) / cut.size * cut.size;
        const bool divided = slot.half != 1 || slot.divisor != 1;
        for (int64_t j = start; j < whole; j += cut.size) {
            const C* x = slot.row + j;
            slot.scores[j / cut.size] = divided ? mass_of<true>(slot, x, cut.size) : mass_of<false>(slot, x, cut.size);
        }
        if (whole == end) return;
        C last[256];
        for (int64_t j = 0; j < cut.size; j++) last[j] = whole + j < end ? slot.row[whole + j] : -infinity<C>();
        slot.scores[whole / cut.size] = mass_of<true>(slot, last, cut.size);
    }

    template <bool divided>
    BOTH static C mass_of(const Slot<C>& slot, const C* x, int64_t size) {
        const C top = slot.top, half = slot.half, divisor = slot.divisor;
        alignas(64) C sum[lanes] = {};
        for (int64_t j = 0; j < size; j += lanes) {
#pragma GCC ivdep
            for (int l = 0; l < lanes; l++) sum[l] += exp(divided ? halved_distance(x[j + l], top, half) / divisor : x[j + l] - top);
        }
        return sum_of_lanes<lanes>(sum);
    }

    APART void prepare_sparse(const C* x, const Filters<C>& filters, Slot<C>& slot) {
        slot.sparse = true;
        slot.runs = 0;
        slot.total = nan_of<C>();
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
        slot.total = total_of(slot);
        to_logarithms(slot.scores, slot.runs);
    }

    // Split the survivors into runs and add up their masses.
    void sum_runs(Slot<C>& slot, int64_t count) const {
        const int shift = bit_length((uint64_t)cut.size) - 1;
        int64_t runs = 0;
        for (int64_t j = 0; j < count; runs++) {
            const int32_t of = slot.indices[j] >> shift;
            slot.own_blocks[runs] = of;
            slot.starts[runs] = (int32_t)j;
            alignas(64) C sum[lanes] = {};
            for (; j < count && slot.indices[j] >> shift == of; j++) sum[slot.indices[j] & (lanes - 1)] += terms[j];
            slot.scores[runs] = sum_of_lanes<lanes>(sum);
        }
        slot.starts[runs] = (int32_t)count;
        slot.blocks = slot.own_blocks;
        slot.runs = runs;
    }

    // In lanes of the blocks' numbers, so that blocks without tokens change nothing.
    double total_of(const Slot<C>& slot) const {
        if (cut.blocks > 16) return total_in<64>(slot);
        double sum = 0;
        for (int64_t i = 0; i < slot.runs; i++) sum += slot.scores[i];
        return sum;
    }

    template <int width>
    static double total_in(const Slot<C>& slot) {
        alignas(64) double sum[width] = {};
        for (int64_t i = 0; i < slot.runs; i++) sum[slot.blocks[i] & (width - 1)] += slot.scores[i];
#pragma GCC unroll 6
        for (int half = width / 2; half; half /= 2) {
            for (int l = 0; l < half; l++) sum[l] += sum[l + half];
        }
        return sum[0];
    }

    static void to_logarithms(C* masses, int64_t count) {
#pragma GCC ivdep
        for (int64_t i = 0; i < count; i++) masses[i] = log(masses[i]);
    }

    // A single key is folded with the number of each row.
    void fold(const Block<C>& block, int64_t first, int64_t count) {
        const Words key{(Word)block.keys[0], (Word)block.keys[1]};
        const int64_t* index = block.index + first;
        Words* const folded = row_keys;
#pragma GCC ivdep
        for (int64_t s = 0; s < count; s++) folded[s] = random_words(key, (Word)index[s], NEW_KEYS);
    }

    // Key i of row s in a block that starts with row `first`.
    Words key_of(const Block<C>& block, int64_t first, int64_t s, int64_t i) const {
        if (block.one_key) return row_keys[s];
        const int32_t* words = block.keys + 2 * ((first + s) * (block.draws / block.with_each_key) + i);
        return Words{(Word)words[0], (Word)words[1]};
    }

    void draw_from(const Block<C>& block, int64_t first, int64_t count) {
        int64_t waiting = 0;
        for (int64_t s = 0; s < count; s++) {
            for (int64_t i = 0; i < block.draws; i++) {
                int64_t* token = block.tokens + (first + s) * block.draws + i;
                if (!(slots[s].total > 0)) {
                    *token = -1;
                    continue;
                }
                keys[waiting] = key_of(block, first, s, i / block.with_each_key);
                folds[waiting] = (Word)(i % block.with_each_key);
                draws_waiting[waiting++] = {&slots[s], 0, token};
                if (waiting == cut.together) {
                    draw_waiting(waiting);
                    waiting = 0;
                }
            }
        }
        draw_waiting(waiting);
    }

    // One draw after another, each from what the ones before have left of the row.
    void run_distinct(const Block<C>& block) {
        Block<C> one = block;
        one.rows = one.draws = 1;
        one.x = left;
        one.where = nullptr;
        one.k = nullptr;
        one.p = one.min_p = nullptr;
        one.top_k = 0;
        for (int64_t r = 0; r < block.rows; r++) {
            if (block.one_key) fold(block, r, 1);
            one.temperature = block.temperature ? block.temperature + r : nullptr;
            const Filters<C> filters(block, r);
            for (int64_t i = 0; i < block.draws; i++) {
                if (i % block.with_each_key == 0) truncate_row(masked(block, r, masked_row), cut.n, filters, survivors, left);
                if (i % block.with_each_key == 0 && filters.temperature == 0) write_greatest();
                prepare(one, 0, 1);
                int64_t* token = block.tokens + r * block.draws + i;
                *token = -1;
                if (!(slots[0].total > 0)) continue;
                keys[0] = key_of(block, r, 0, i / block.with_each_key);
                folds[0] = (Word)(i % block.with_each_key);
                draws_waiting[0] = {&slots[0], 0, token};
                draw_waiting(1);
                left[*token] = -infinity<C>();
            }
        }
    }

    // At T = 0 what is below the maximum does not exist, also once the maximum is drawn.
    void write_greatest() {
        C top = -infinity<C>();
        for (int64_t j = 0; j < cut.n; j++) top = left[j] > top ? left[j] : top;
        for (int64_t j = 0; j < cut.n; j++) left[j] = left[j] < top ? -infinity<C>() : left[j];
    }

    // The first draw with a key takes the key itself.
    APART void fold_keys(int64_t count) {
        Words* const folded = keys;
        const Word* const by = folds;
#pragma GCC ivdep
        for (int64_t d = 0; d < count; d++) {
            const Words own = folded[d], next = random_words(own, by[d], NEW_KEYS);
            folded[d].first = by[d] ? next.first : own.first;
            folded[d].second = by[d] ? next.second : own.second;
        }
    }

    void draw_waiting(int64_t count) {
        if (count == 0) return;
        if (with_each_key > 1) fold_keys(count);
        choose_runs(count);
        switch (cut.size) {
            case 2: return choose_tokens<2>(count);
            case 4: return choose_tokens<4>(count);
            case 8: return choose_tokens<8>(count);
            default: return choose_tokens<0>(count);
        }
    }

    APART void choose_runs(int64_t count) {
        int64_t end = 0;
        for (int64_t d = 0; d < count; d++) {
            const Slot<C>& slot = *draws_waiting[d].slot;
            if (slot.runs < 2 || slot.greedy) continue;
            variates.set_keys(end, slot.runs, keys[d]);
            for (int64_t i = 0; i < slot.runs; i++) variates.counter[end + i] = (Word)slot.blocks[i];
            end += slot.runs;
        }
        variates.draw(end, BLOCK_VARIATES);
        const float* noise = variates.noise;
        for (int64_t d = 0; d < count; d++) {
            const Slot<C>& slot = *draws_waiting[d].slot;
            if (slot.greedy) {
                draws_waiting[d].run = first_best(slot.scores, slot.runs, nullptr);
            } else if (slot.runs > 1) {
                draws_waiting[d].run = first_best(slot.scores, slot.runs, noise);
                noise += slot.runs;
            }
        }
    }

    // With `fixed`, all runs have that many tokens, and loops over them are unrolled.
    template <int fixed>
    APART void choose_tokens(int64_t count) {
        int64_t end = 0;
        for (int64_t d = 0; d < count; d++) {
            const Draw<C>& draw = draws_waiting[d];
            const int64_t length = fixed ? fixed : length_of(draw);
            if (fixed) {
                const C* from = draw.slot->row + draw.run * fixed;
                for (int i = 0; i < fixed; i++) variates.z[end + i] = from[i];
            } else {
                write_z(draw, length, variates.z + end);
            }
            if (draw.slot->sparse) {
                const int32_t* from = draw.slot->indices + draw.slot->starts[draw.run];
                for (int64_t i = 0; i < length; i++) variates.counter[end + i] = (Word)from[i];
            } else {
                for (int64_t i = 0; i < length; i++) variates.counter[end + i] = (Word)(draw.run * cut.size + i);
            }
            variates.set_keys(end, length, keys[d]);
            end += length;
        }
        variates.draw(end, TOKEN_VARIATES);
        end = 0;
        for (int64_t d = 0; d < count; d++) {
            const Draw<C>& draw = draws_waiting[d];
            const int64_t length = fixed ? fixed : length_of(draw);
            const int64_t at = end + first_best(variates.z + end, length, draw.slot->greedy ? nullptr : variates.noise + end);
            *draw.token = variates.counter[at];
            end += length;
        }
    }

    int64_t length_of(const Draw<C>& draw) const {
        const Slot<C>& slot = *draw.slot;
        if (slot.sparse) return slot.starts[draw.run + 1] - slot.starts[draw.run];
        const int64_t start = draw.run * cut.size;
        return cut.n - start < cut.size ? cut.n - start : cut.size;
    }

    void write_z(const Draw<C>& draw, int64_t length, C* z) const {
        const Slot<C>& slot = *draw.slot;
        if (slot.sparse) {
            const C* from = slot.z + slot.starts[draw.run];
            for (int64_t i = 0; i < length; i++) z[i] = from[i];
        } else {
            const C* from = slot.row + draw.run * cut.size;
            for (int64_t i = 0; i < length; i++) z[i] = halved_distance(from[i], slot.top, slot.half) / slot.divisor;
        }
    }

    BOTH static int64_t first_best(const C* score, int64_t count, const float* noise) {
        C best = -infinity<C>();
        int64_t at = 0;
        for (int64_t i = 0; i < count; i++) {
            C s = noise ? score[i] + noise[i] : score[i];
            at = s > best ? i : at;    // no branch, which short rows would mispredict
            best = s > best ? s : best;
        }
        return at;
    }
};

template <class C>
int64_t sample_scratch(int64_t n, int64_t draws) {
    return n > 0 ? Sampler<C>(nullptr, n, draws).shelf.used : 0;
}

template <class C>
void sample_rows(const Problem& problem, const Block<C>& block, char* memory) {
    if (block.n > 0) Sampler<C>(memory, block.n, problem.options[1]).run(block);
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
