// How a formula is run on all rows of a problem: in which layout, how many at a time, on which threads.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "memory.hpp"
#include "problem.hpp"
#include "rows.hpp"

template <class T>
struct Code;
template <> struct Code<uint8_t> { static constexpr int dtype = UINT8; };
template <> struct Code<int32_t> { static constexpr int dtype = INT32; };
template <> struct Code<int64_t> { static constexpr int dtype = INT64; };
template <> struct Code<float> { static constexpr int dtype = FLOAT32; };
template <> struct Code<double> { static constexpr int dtype = FLOAT64; };

// What a formula takes and gives, a letter for each operand: logits (x), other reals (r, R), weights (o) and a mask (m) of n
// entries a row; a real (v, V) or an integer (i) a row; words (w, W); keys (k); several tokens (c, T) or reals (d, L) a row.
// Capitals are written. Behind the operands come `scratch` rows that the formula needs for itself.
template <class C>
struct Formula {
    const char* letters;
    int scratch;
    void (*along)(const Problem&, Along<C>&);
    void (*padded)(const Problem&, Along<C, true>&);
    void (*across)(const Problem&, Across<C>&);
    void (*block)(const Problem&, const Block<C>&, char* scratch);
    int64_t block_scratch;
    bool fills;    // absent weights, or an absent mask, are a row of ones
    int64_t row_work = 0;    // what a row takes beyond a pass over its entries, as a number of entries
};

enum Layout { ALONG, PADDED, ACROSS };

// Some rows of a problem in one layout.
template <class C>
class Run {
  public:
    Run(const Problem& problem, const Formula<C>& formula, Layout layout, int64_t first, int64_t last, Pieces pieces, int threads)
        : p(problem), f(formula), first(first), last(last), share(pieces), threads(threads) {
        across = layout == ACROSS;
        padded = layout == PADDED;
        pitch = padded ? Along<C, true>::to_the_end(p.n ? p.n : 1) : p.n;    // a class is looked up even where there is none
        for (int k = 0; k < p.count + f.scratch; k++) prepare(stages[k], k);
        choose_tile();
    }

    int all() {
        if (first == last) return 0;
        constexpr int64_t work = 1 << 14;
        const int64_t of_row = p.n + f.row_work;
        int64_t per_piece = tile * (1 + work / (tile * (of_row + 16)));
        int64_t count = (last - first + per_piece - 1) / per_piece;
        if (threads > 1 && count < 2 * threads && of_row > 2 * Along<C>::shortest_piece) {
            inside = share;
            some(first, last);
        } else if (threads > 1 && count > 1) {
            this->per_piece = per_piece;
            share(count, [](void* given, int64_t k) { ((Run*)given)->piece(k); }, this);
        } else {
            some(first, last);
        }
        return failed;
    }

  private:
    struct Stage {
        char letter;
        const Operand* operand;    // null for scratch
        int64_t length, pitch;     // entries of a row, and how far the next row is
        int size, dtype;           // of an entry as the formula sees it
        bool writes, aligned, direct;
    };

    const Problem& p;
    const Formula<C>& f;
    const int64_t first, last;
    Pieces share;
    Pieces inside = nullptr;
    int threads;
    bool across, padded;
    int64_t pitch, tile = 1, per_piece = 1;
    int failed = 0;
    Stage stages[most_operands + 4];

    void piece(int64_t k) {
        int64_t start = first + k * per_piece;
        some(start, start + per_piece < last ? start + per_piece : last);
    }

    void prepare(Stage& s, int k) {
        s.operand = k < p.count ? &p.operands[k] : nullptr;
        s.letter = s.operand ? f.letters[k] : 'r';
        auto is_one_of = [&](const char* letters) { return __builtin_strchr(letters, s.letter) != nullptr; };
        bool is_row = is_one_of("xrRomwW"), is_token = is_one_of("cTdL");
        s.length = is_row ? p.n : is_token ? p.options[1] : 1;
        if (s.letter == 'k') s.length = p.options[2] ? 2 : 2 * (p.options[1] / draws_with_each_key());
        s.pitch = is_row ? pitch : s.length;
        s.dtype = s.letter == 'm' ? UINT8 : is_one_of("icT") ? INT64 : is_one_of("wWk") ? INT32 : Code<C>::dtype;
        s.size = size_of(s.dtype);
        s.writes = s.letter >= 'A' && s.letter <= 'Z';
        s.aligned = s.direct = false;
        if (!s.operand || !s.operand->data) return;
        const Operand& one = *s.operand;
        const int size = size_of(one.dtype);
        s.aligned = (int64_t)one.data % size == 0;
        for (int d = 0; d < p.dimensions; d++) s.aligned = s.aligned && one.strides[d] % size == 0;
        bool same = one.dtype == s.dtype || (s.dtype == UINT8 && one.dtype == BOOL) || (s.dtype == INT32 && one.dtype == UINT32);
        bool neighbours = one.step == size || s.length == 1;
        s.direct = same && s.aligned && !across && neighbours && s.pitch == s.length;
        // A block of rows is direct where they follow each other without a gap.
        if (f.block && !(p.dimensions == 0 || (p.dimensions == 1 && one.strides[0] == s.length * s.size))) s.direct = false;
    }

    int64_t draws_with_each_key() const { return p.options[3] > 1 ? p.options[3] : 1; }

    bool filled(const Stage& s) const {
        return s.operand && !s.operand->data && f.fills && (s.letter == 'm' || s.letter == 'o');
    }

    bool absent(const Stage& s) const { return s.operand && !s.operand->data && !filled(s); }

    void choose_tile() {
        constexpr int64_t most = 1 << 24, line = 64;
        const int64_t cache = padded ? 1 << 13 : 1 << 15, row = pitch * (int64_t)sizeof(C) + 1;
        if (across) {
            tile = Across<C>::lanes;
            return;
        }
        bool gathers = false, neighbours = false;
        for (int k = 0; k < p.count; k++) {
            const Stage& s = stages[k];
            if (!s.operand->data || s.direct || s.length == 1) continue;
            gathers = true;
            neighbours = neighbours || s.operand->step != size_of(s.operand->dtype);
        }
        if (gathers || f.block) tile = 1 + cache / row;
        if (neighbours && tile < line && line * row <= most) tile = line / 2;
        if (tile > last - first) tile = last - first;
    }

    // Do some rows, a tile at a time, in memory that is allocated for them.
    void some(int64_t first, int64_t last) {
        const int64_t held = across ? Across<C>::lanes : tile;
        const int count = p.count + f.scratch;
        auto room = [](int64_t bytes) { return (bytes + 127) / 64 * 64; };
        int64_t bytes = room(count * held * sizeof(char*)) + room(held * sizeof(int64_t)) + room(f.block_scratch) + 64;
        for (int k = 0; k < count; k++) bytes += 2 * room(stages[k].direct || absent(stages[k]) ? 0 : held * stages[k].pitch * 8);
        char stack[4096];
        char* memory = bytes <= (int64_t)sizeof stack ? stack : (char*)malloc(bytes);
        if (!memory) {
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
            return;
        }
        char* next = memory + (64 - (int64_t)memory % 64);
        auto take = [&](int64_t size) {
            char* taken = next;
            next += room(size);
            return taken;
        };
        char** places[most_operands + 4];
        char *wide[most_operands + 4], *raw[most_operands + 4];
        char** all_places = (char**)take(count * held * sizeof(char*));
        int64_t* index = (int64_t*)take(held * sizeof(int64_t));
        char* block_scratch = take(f.block_scratch);
        for (int k = 0; k < count; k++) {
            const Stage& s = stages[k];
            places[k] = all_places + k * held;
            wide[k] = raw[k] = nullptr;
            if (s.direct || absent(s)) continue;
            wide[k] = take(held * s.pitch * s.size);
            // Lanes without a row, and what rows are padded with, are computed with, too.
            if (across || padded) __builtin_memset(wide[k], 0, held * s.pitch * s.size);
            if (!s.operand) continue;
            if (filled(s)) {
                fill(s, wide[k]);
                continue;
            }
            if (padded && s.letter == 'x') pad(s, wide[k]);
            if (s.operand->dtype == s.dtype) continue;
            raw[k] = take(held * s.pitch * size_of(s.operand->dtype));
            if (across) __builtin_memset(raw[k], 0, held * s.pitch * size_of(s.operand->dtype));
        }
        for (int64_t start = first; start < last; start += tile) {
            int64_t rows = start + tile < last ? tile : last - start;
            for (int k = 0; k < p.count; k++) {
                const Operand& one = *stages[k].operand;
                if (!one.data) continue;
                locate(p, one.data, one.strides, start, rows, places[k]);
                if (!stages[k].direct && !stages[k].writes) gather(stages[k], rows, places[k], raw[k], wide[k]);
            }
            if (f.block) {
                locate(p, nullptr, p.index_strides, start, rows, (char**)index);
                run_block(rows, places, wide, index, block_scratch);
            } else if (across) {
                Across<C> view{p.n, wide};
                f.across(p, view);
            } else {
                for (int64_t r = 0; r < rows; r++) run_row(r, count, places, wide);
            }
            for (int k = 0; k < p.count; k++) {
                const Stage& s = stages[k];
                if (s.writes && s.operand->data && !s.direct) scatter(s, rows, places[k], raw[k], wide[k]);
            }
        }
        if (memory != stack) free(memory);
    }

    void pad(const Stage& s, char* rows) {
        for (int64_t r = 0; r < tile; r++) {
            for (int64_t i = s.length; i < s.pitch; i++) ((C*)rows)[r * s.pitch + i] = -infinity<C>();
        }
    }

    // One row serves all.
    void fill(const Stage& s, char* row) {
        const int64_t entries = s.length * (across ? Across<C>::lanes : 1);
        if (s.letter == 'm') {
            __builtin_memset(row, 1, entries);
        } else {
            for (int64_t i = 0; i < entries; i++) ((C*)row)[i] = 1;
        }
    }

    void run_row(int64_t r, int count, char** const* places, char* const* wide) {
        char* operands[most_operands + 4];
        for (int k = 0; k < count; k++) {
            const Stage& s = stages[k];
            const int64_t own = filled(s) ? 0 : r;
            operands[k] = s.direct ? places[k][r] : wide[k] ? wide[k] + own * s.pitch * s.size : nullptr;
        }
        if (padded) {
            Along<C, true> view{p.n, operands, nullptr};
            f.padded(p, view);
        } else {
            Along<C> view{p.n, operands, inside};
            f.along(p, view);
        }
    }

    void run_block(int64_t rows, char** const* places, char* const* wide, const int64_t* index, char* scratch) {
        char* at[most_operands] = {};
        for (int k = 0; k < p.count; k++) at[k] = stages[k].direct ? places[k][0] : wide[k];
        Block<C> b = {};
        b.rows = rows;
        b.n = p.n;
        b.index = index;
        b.pieces = inside;
        b.top_k = p.options[0];
        b.draws = p.options[1];
        b.one_key = p.options[2];
        b.with_each_key = draws_with_each_key();
        b.distinct = p.options[4];
        int words = 0, answers = 0, shares = 0;
        for (int k = 0; k < p.count; k++) {
            switch (f.letters[k]) {
                case 'x': b.x = (const C*)at[k]; break;
                case 'm': b.where = (const uint8_t*)at[k]; break;
                case 'i': b.k = (const int64_t*)at[k]; break;
                case 'k': b.keys = (const int32_t*)at[k]; break;
                case 'R': b.y = (C*)at[k]; break;
                case 'V': b.of_row = (C*)at[k]; break;
                case 'c': b.given_tokens = (const int64_t*)at[k]; break;
                case 'd': b.reals = (const C*)at[k]; break;
                case 'T': b.tokens = (int64_t*)at[k]; break;
                case 'L': b.logprobs = (C*)at[k]; break;
                case 'w': b.words[words++] = (const int32_t*)at[k]; break;
                case 'W': b.answers[answers++] = (int32_t*)at[k]; break;
                case 'v': (shares == 0 ? b.temperature : shares == 1 ? b.p : b.min_p) = (const C*)at[k], shares++; break;
            }
        }
        f.block(p, b, scratch);
    }

    void load_all(const Stage& s, const char* from, char* to, int64_t count) {
        switch (s.dtype) {
            case UINT8: return load(s.operand->dtype, from, (uint8_t*)to, count);
            case INT32: return load(s.operand->dtype, from, (int32_t*)to, count);
            case INT64: return load(s.operand->dtype, from, (int64_t*)to, count);
            default: return load(s.operand->dtype, from, (C*)to, count);
        }
    }

    void store_all(const Stage& s, const char* from, char* to, int64_t count) {
        if (s.dtype == Code<C>::dtype) return store(s.operand->dtype, (const C*)from, to, count);
        const int64_t* x = (const int64_t*)from;
        for (int64_t i = 0; i < count; i++) ((int32_t*)to)[i] = (int32_t)x[i];
    }

    // A long row that stands alone is converted by all threads.
    template <class G>
    void by_parts(int64_t length, G g) {
        Along<C> row{length, nullptr, inside};
        if (inside && length > Along<C>::shortest_piece) {
            row.by_pieces([&](int64_t, int64_t start, int64_t end) { g(start, end - start); });
        } else {
            g(0, length);
        }
    }

    // Whether rows go through memory of their own dtype one by one: side by side they would have what pads them between.
    bool one_by_one(const Stage& s) const { return !across && s.pitch > 1 && (padded || s.operand->step == size_of(s.operand->dtype)); }

    void gather(const Stage& s, int64_t rows, char* const* places, char* raw, char* wide) {
        const int64_t held = across ? Across<C>::lanes : 0, step = s.length == 1 ? 0 : s.operand->step;
        const int size = size_of(s.operand->dtype);
        const bool in_place = s.aligned && step == size;
        char* to = raw ? raw : wide;
        if (!raw || !one_by_one(s) || !in_place) move_bytes<true>(size, to, places, rows, s.length, step, s.pitch, held);
        if (!raw) return;
        if (!one_by_one(s)) return load_all(s, raw, wide, s.length * (across ? held : rows));
        for (int64_t r = 0; r < rows; r++) {
            const char* from = in_place ? places[r] : raw + r * s.pitch * size;
            char* own = wide + r * s.pitch * s.size;
            by_parts(s.length, [&](int64_t start, int64_t count) {
                load_all(s, from + start * size, own + start * s.size, count);
            });
        }
    }

    void scatter(const Stage& s, int64_t rows, char* const* places, char* raw, char* wide) {
        const int64_t held = across ? Across<C>::lanes : 0, step = s.length == 1 ? 0 : s.operand->step;
        const int size = size_of(s.operand->dtype);
        const bool in_place = s.aligned && step == size;
        if (raw && one_by_one(s)) {
            for (int64_t r = 0; r < rows; r++) {
                char* to = in_place ? places[r] : raw + r * s.pitch * size;
                const char* own = wide + r * s.pitch * s.size;
                by_parts(s.length, [&](int64_t start, int64_t count) {
                    store_all(s, own + start * s.size, to + start * size, count);
                });
            }
            if (in_place) return;
        } else if (raw) {
            store_all(s, wide, raw, s.length * (across ? held : rows));
        }
        move_bytes<false>(size, raw ? raw : wide, places, rows, s.length, step, s.pitch, held);
    }
};

// All rows of a problem: short ones across, but for a few that are left; those and others that are not long are padded.
template <class C>
int run_rows(const Problem& p, const Formula<C>& f, Pieces pieces, int threads) {
    constexpr int64_t few = 6;
    int64_t across = 0;
    if (!f.block && p.n > 0 && p.n <= longest_in_eights) {
        across = p.rows / Across<C>::lanes * Across<C>::lanes;
        if (p.rows - across > few) across = p.rows;
    }
    const Layout rest = !f.block && p.n <= Along<C>::longest_padded ? PADDED : ALONG;
    const int failed = across ? Run<C>(p, f, ACROSS, 0, across, pieces, threads).all() : 0;
    return failed || across == p.rows ? failed : Run<C>(p, f, rest, across, p.rows, pieces, threads).all();
}
