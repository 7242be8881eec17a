// top_k, top_p and min_p: which tokens of a row are left. `truncate` and the draw both ask `Survivors`, so they agree on
// every token. Each of top_k and top_p keeps a prefix of the tokens in order of logit, then index.
#pragma once

#include "problem.hpp"
#include "rows.hpp"

// Compiled once for all its callers: inlined, these functions would double the time of the build.
#define APART __attribute__((noinline))

// Memory that is given out piece by piece, at multiples of 64 bytes. Without memory it only counts.
struct Shelf {
    char* base;
    int64_t used = 0;

    template <class T>
    T* take(int64_t count) {
        T* taken = base ? (T*)(base + used) : nullptr;
        used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
        return taken;
    }
};

// Call f(j) in order for each j that flag(j) holds for. Flags are computed for a group of entries at once, as vectors, and
// eight clear ones are skipped together, so a rare flag costs little and none is a branch to mispredict.
template <class Flag, class F>
BOTH void for_each_flagged(int64_t count, Flag flag, F f) {
    constexpr int group = 64;
    alignas(64) uint8_t flags[group];
    for (int64_t start = 0; start < count; start += group) {
        if (count - start >= group) {
#pragma GCC ivdep
            for (int l = 0; l < group; l++) flags[l] = flag(start + l);
        } else {
            for (int l = 0; l < group; l++) flags[l] = start + l < count && flag(start + l);
        }
        for (int part = 0; part < group; part += 8) {
            uint64_t set;
            __builtin_memcpy(&set, flags + part, 8);
            for (; set; set &= set - 1) f(start + part + (__builtin_ctzll(set) >> 3));
        }
    }
}

// Tokens with their masses, integers that add up exactly in any order; without masses, each counts 1.
template <class C>
struct Entries {
    int64_t count;
    PlaceOf<C>* places;
    uint64_t* masses;
};

// The prefix of everything above `end`, and the first `room` entries at it.
template <class C>
struct Prefix {
    PlaceOf<C> end;
    int64_t room;
};

template <class C>
BOTH void range_of(const PlaceOf<C>* places, int64_t count, PlaceOf<C>& low, PlaceOf<C>& high) {
    PlaceOf<C> least = places[0], greatest = places[0];
    for (int64_t j = 0; j < count; j++) {
        least = places[j] < least ? places[j] : least;
        greatest = places[j] > greatest ? places[j] : greatest;
    }
    low = least;
    high = greatest;
}

// Finds the shortest prefix whose mass reaches a target. The range that holds its end is cut into buckets, and only the
// entries of the bucket in which the mass crosses the target are looked at again.
template <class C>
class EndOfPrefix {
    using P = PlaceOf<C>;
    static constexpr int most_buckets = 1024, chunk = 256;

  public:
    // `space` has room for all entries. Nothing below `floor` is worth telling apart at first.
    APART EndOfPrefix(Entries<C> entries, uint64_t target, C floor, Entries<C> space) : list(entries), space(space) {
        if (!entries.masses) this->space.masses = nullptr;
        uint64_t left = target;
        range_of<C>(list.places, list.count, low, high);
        for (int step = 0; low < high; step++) {
            // Buckets of equal width spread logits evenly; buckets of equally many floats bound the number of steps.
            if (step % 2 || !by_width(left, floor)) by_place(left);
        }
        uint64_t each = list.masses ? list.masses[0] : 1;
        found = {low, (int64_t)((left + each - 1) / each)};
    }

    Prefix<C> found;

  private:
    Entries<C> list, space;
    P low, high;
    uint64_t weights[2][most_buckets];

    int bits() const { return list.count < 2048 ? 6 : 10; }

    bool by_width(uint64_t& left, C floor) {
        const C top = number<C>(high), least = number<C>(low), range = top - (least > floor ? least : floor);
        const C last = (C)((1 << bits()) - 1), scale = last / range;
        if (!(range > 0 && range < infinity<C>() && scale < infinity<C>())) return false;
        narrow(left, [=](P at) {
            C bucket = (top - number<C>(at)) * scale;
            return (int32_t)(bucket < last ? bucket : last);
        });
        return true;
    }

    void by_place(uint64_t& left) {
        using U = BitsOf<C>;
        const U top = (U)high;
        const int width = bit_length((U)(top - (U)low)) - bits(), shift = width > 0 ? width : 0;
        narrow(left, [=](P at) { return (int32_t)((U)(top - (U)at) >> shift); });
    }

    template <class F>
    void narrow(uint64_t& left, F bucket_of) {
        weigh(bucket_of);
        int32_t bucket = 0;
        for (uint64_t here; (here = weights[0][bucket] + weights[1][bucket]) < left; bucket++) left -= here;
        const P* places = list.places;
        int64_t kept = 0;
        for_each_flagged(list.count, [&](int64_t j) { return bucket_of(places[j]) == bucket; }, [&](int64_t j) {
            if (space.masses) space.masses[kept] = list.masses[j];
            space.places[kept++] = places[j];
        });
        list = {kept, space.places, space.masses};
        range_of<C>(list.places, kept, low, high);
    }

    // Two tables take turns, so that neighbours in one bucket need not wait for each other.
    template <class F>
    void weigh(F bucket_of) {
        __builtin_memset(weights[0], 0, sizeof(uint64_t) << bits());
        __builtin_memset(weights[1], 0, sizeof(uint64_t) << bits());
        int32_t bucket[chunk];
        for (int64_t start = 0; start < list.count; start += chunk) {
            const P* places = list.places + start;
            const int count = list.count - start < chunk ? (int)(list.count - start) : chunk;
#pragma GCC ivdep
            for (int l = 0; l < count; l++) bucket[l] = bucket_of(places[l]);
            if (list.masses) {
                for (int l = 0; l < count; l++) weights[l & 1][bucket[l]] += list.masses[start + l];
            } else {
                for (int l = 0; l < count; l++) weights[l & 1][bucket[l]]++;
            }
        }
    }
};

// exp((x - top) / T), in double for floats too: summed in float, a prefix that ends close to p would end at another token
// than in exact arithmetic.
template <class C>
struct Mass {
    double top, inverse;
    Temperature<double> temperature;

    BOTH Mass(C top, C t) : top(top), inverse(1 / (double)t), temperature(temperature_of<double>(t)) {}

    // A distance between floats, which is a double, does not overflow.
    BOTH double of_regular(C x) const {
        if (sizeof(C) == 4) return exp(((double)x - top) * inverse);
        return exp(halved_distance<double>(x, top, temperature.half) / temperature.divisor);
    }

    // At T = 0 the maxima are left, and at T = inf all that exists.
    BOTH double at_limit(C x) const { return temperature.bound == 0 ? x == (C)top : x > -infinity<C>(); }
};

// The filters of one row; k = 0, p = 1 and min_p = 0 are off.
template <class C>
struct Filters {
    C temperature;
    int64_t k;
    C p, min_p;
    bool valid;

    Filters(const Block<C>& block, int64_t row) {
        temperature = block.temperature ? block.temperature[row] : 1;
        if (is_zero_temperature(temperature)) temperature = 0;
        k = block.k ? block.k[row] : block.top_k;
        p = block.p ? block.p[row] : 1;
        min_p = block.min_p ? block.min_p[row] : 0;
        valid = temperature >= 0 && k >= 0 && p >= 0 && p <= 1 && min_p >= 0 && min_p <= 1;
        k = k < block.n ? k : 0;
    }

    bool off() const { return k == 0 && p == 1 && min_p == 0; }
};

// What the filters leave of a row: places and indices, in order of the indices.
template <class C>
class Survivors {
    using P = PlaceOf<C>;
    static constexpr int group = 64;

  public:
    P* places;
    int32_t* indices;
    int64_t count;
    C top;

    Survivors(Shelf& shelf, int64_t n) : n(n) {
        places = shelf.take<P>(n);
        indices = shelf.take<int32_t>(n);
        masses = shelf.take<uint64_t>(n);
        space = {0, shelf.take<P>(n), shelf.take<uint64_t>(n)};
    }

    // False if the row has NaN or +inf, and so no answer. At least one filter is on.
    bool find(const C* x, const Filters<C>& filters) {
        if (!(filters.k ? find_leading(x, filters.k) : take_all(x))) return false;
        if (top == -infinity<C>()) {
            count = 0;
            return true;
        }
        if (filters.p < 1) keep_share(filters);
        if (filters.min_p > 0) keep_likely(filters);
        return true;
    }

    // Exactly k, 1 or more, of -inf too.
    bool find_leading(const C* x, int64_t k) {
        if (!take_leading(x, k)) return false;
        if (k < count) keep(EndOfPrefix<C>({count, places, nullptr}, k, -infinity<C>(), space).found);
        return true;
    }

    int32_t index_of(int64_t j) const { return numbered ? indices[j] : (int32_t)j; }

  private:
    const int64_t n;
    uint64_t* masses;
    Entries<C> space;
    bool numbered;    // false: indices[j] would be j

    bool take_all(const C* x) {
        const int64_t length = n;
        P *const to = places, low, high;
#pragma GCC ivdep
        for (int64_t j = 0; j < length; j++) to[j] = place(x[j]);
        range_of<C>(to, length, low, high);
        numbered = false;
        count = length;
        top = number<C>(high);
        return low >= place(-infinity<C>()) && high < place(infinity<C>());
    }

    // Take entries that the k greatest are among. The k-th greatest maximum of groups is a bound that k entries reach.
    bool take_leading(const C* x, int64_t k) {
        const int64_t groups = n / group, rest = groups * group;
        if (groups < 2 * k) return take_all(x);
        P* maxima = (P*)masses;
        bool has_nan = write_maxima(x, groups, maxima);
        for (int64_t j = rest; j < n; j++) has_nan = has_nan || x[j] != x[j];
        if (has_nan) return false;
        const P bound = EndOfPrefix<C>({groups, maxima, nullptr}, k, -infinity<C>(), space).found.end;
        numbered = true;
        count = 0;
        auto take = [&](int64_t start, int64_t length) {
            for_each_flagged(length, [&](int64_t j) { return place(x[start + j]) >= bound; }, [&](int64_t j) {
                places[count] = place(x[start + j]);
                indices[count++] = (int32_t)(start + j);
            });
        };
        for_each_flagged(groups, [&](int64_t g) { return maxima[g] >= bound; }, [&](int64_t g) { take(g * group, group); });
        take(rest, n - rest);
        P low, high;
        range_of<C>(places, count, low, high);
        top = number<C>(high);
        return top < infinity<C>();
    }

    static bool write_maxima(const C* x, int64_t groups, P* maxima) {
        using Bits = BitsOf<C>;
        constexpr int half = group / 2;
        alignas(64) Bits odd[half] = {};
        for (int64_t g = 0; g < groups; g++, x += group) {
            alignas(64) C most[half];
#pragma GCC ivdep
            for (int l = 0; l < half; l++) {
                C v = x[l], w = x[l + half];
                most[l] = v > w ? v : w;
                odd[l] |= v == v && w == w ? 0 : ~(Bits)0;
            }
#pragma GCC unroll 5
            for (int width = half / 2; width; width /= 2) {
                for (int l = 0; l < width; l++) most[l] = most[l + width] > most[l] ? most[l + width] : most[l];
            }
            maxima[g] = place(most[0]);
        }
        Bits any = 0;
        for (int l = 0; l < half; l++) any |= odd[l];
        return any != 0;
    }

    APART void keep(Prefix<C> prefix) {
        int64_t kept = 0, at_end = 0;
        const P end = prefix.end;
        for_each_flagged(count, [&](int64_t j) { return places[j] >= end; }, [&](int64_t j) {
            const bool is_end = places[j] == end;
            at_end += is_end;
            put(kept, j);
            kept += !(is_end && at_end > prefix.room);
        });
        finish(kept);
    }

    void put(int64_t to, int64_t from) {
        places[to] = places[from];
        indices[to] = index_of(from);
    }

    void finish(int64_t kept) {
        count = kept;
        numbered = true;
    }

    // Masses are integers: multiples of 2^-51 of the greatest one, or of a greater power of 2 where the sum of n would
    // overflow. Integers add up exactly, so a prefix weighs the same in whatever order its end is searched.
    void keep_share(const Filters<C>& filters) {
        const int spare = 63 - bit_length((uint64_t)n), digits = spare < 51 ? spare : 51;
        const double scale = of_bits<double>((uint64_t)(1023 + digits) << 52);
        const Mass<C> mass(top, filters.temperature);
        // A fused multiply-add with 2^52 rounds to an integer and leaves it in the low bits.
        auto whole = [&](double e) { return bits_of(fused(e, scale, 0x1p52)) - bits_of(0x1p52); };
        const int64_t length = count;    // a member, which stores to masses could change as far as the compiler knows
        const P* const from = places;
        uint64_t *const to = masses, total = 0;
        if (!mass.temperature.limit) {
#pragma GCC ivdep
            for (int64_t j = 0; j < length; j++) to[j] = whole(mass.of_regular(number<C>(from[j])));
        } else {
            for (int64_t j = 0; j < length; j++) to[j] = whole(mass.at_limit(number<C>(from[j])));
        }
        for (int64_t j = 0; j < length; j++) total += to[j];
        // Farther down, exp(-48) is less than half of any unit.
        const C floor = !mass.temperature.limit ? top - 48 * filters.temperature : -infinity<C>();
        keep(EndOfPrefix<C>({count, places, masses}, share_of(filters.p, total), floor, space).found);
    }

    void keep_likely(const Filters<C>& filters) {
        const Mass<C> mass(top, filters.temperature);
        const double least = filters.min_p;
        int64_t kept = 0;
        auto keep_one = [&](int64_t j) { put(kept++, j); };
        if (!mass.temperature.limit) {
            for_each_flagged(count, [&](int64_t j) { return mass.of_regular(number<C>(places[j])) >= least; }, keep_one);
        } else {
            for_each_flagged(count, [&](int64_t j) { return mass.at_limit(number<C>(places[j])) >= least; }, keep_one);
        }
        finish(kept);
    }
};

// The row, with -inf for what is masked, in `space` if anything may be.
template <class C>
const C* masked(const Block<C>& block, int64_t row, C* space) {
    const C* x = block.x + row * block.n;
    if (!block.where) return x;
    const uint8_t* where = block.where + row * block.n;
#pragma GCC ivdep
    for (int64_t j = 0; j < block.n; j++) space[j] = where[j] ? x[j] : -infinity<C>();
    return space;
}

template <class C>
struct TruncateScratch {
    Shelf shelf;
    C* row;
    Survivors<C> survivors;

    TruncateScratch(char* memory, int64_t n) : shelf{memory}, row(shelf.take<C>(n)), survivors(shelf, n) {}
};

template <class C>
int64_t truncate_scratch(int64_t n) {
    return TruncateScratch<C>(nullptr, n).shelf.used;
}

template <class C>
void truncate_row(const C* x, int64_t n, const Filters<C>& filters, Survivors<C>& survivors, C* y) {
    const bool answered = filters.valid && survivors.find(x, filters);
    if (answered && filters.off()) {
        __builtin_memcpy(y, x, n * sizeof(C));
        return;
    }
    const C gone = answered ? -infinity<C>() : nan_of<C>();
    for (int64_t j = 0; j < n; j++) y[j] = gone;
    if (!answered) return;
    for (int64_t i = 0; i < survivors.count; i++) y[survivors.indices[i]] = x[survivors.indices[i]];
}

template <class C>
void truncate_rows(const Problem&, const Block<C>& block, char* memory) {
    if (block.n == 0) return;
    TruncateScratch<C> scratch(memory, block.n);
    for (int64_t r = 0; r < block.rows; r++) {
        const C* x = masked(block, r, scratch.row);
        truncate_row(x, block.n, Filters<C>(block, r), scratch.survivors, block.y + r * block.n);
    }
}
