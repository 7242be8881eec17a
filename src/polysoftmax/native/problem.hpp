// A problem: what Python asks for, in words of 8 bytes, and where its rows lie.
#pragma once

#include <stdint.h>

enum DType { BOOL, INT8, UINT8, INT16, UINT16, INT32, UINT32, INT64, UINT64, FLOAT16, BFLOAT16, FLOAT32, FLOAT64, DTYPES };

// What the address of an operand is: absent, that of its data, that of a word that holds the address of its data, or no
// address but a float64 number.
enum Address { ABSENT, DATA, INDIRECT, NUMBER, ADDRESSES };

// What becomes of answers of one entry a row: they stay, or are reduced to one.
enum Reduction { NONE, SUM, MEAN };

inline int size_of(int dtype) {
    constexpr int8_t sizes[DTYPES] = {1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8};
    return sizes[dtype];
}

constexpr int most_operands = 12, most_dimensions = 17;

struct Operand {
    char* data;
    int dtype;
    int64_t step, strides[most_dimensions];
};

struct Problem {
    int kernel, dimensions, count, compute;
    int64_t n, rows, options[8], shape[most_dimensions];
    Operand operands[most_operands];
    int64_t index_strides[most_dimensions];    // of the rows in C order

    int reduction() const { return (int)options[7]; }

    double real_option(int k) const {
        double x;
        __builtin_memcpy(&x, &options[k], sizeof x);
        return x;
    }
};

// Read the words of a problem. Dimensions are put into the order in which x lies in memory, and joined where all operands
// allow: what is computed for a row does not depend on when.
inline bool parse(const int64_t* words, const int64_t* addresses, Problem& p) {
    p.kernel = (int)words[0];
    int64_t dimensions = words[1];
    p.n = words[2];
    p.count = (int)words[3];
    p.compute = (int)words[4];
    if (dimensions < 0 || dimensions > 16 || p.n < 0 || words[3] < 1 || words[3] > most_operands) return false;
    if (words[0] != p.kernel || words[4] != p.compute) return false;
    if (p.compute != FLOAT32 && p.compute != FLOAT64) return false;
    for (int k = 0; k < 8; k++) p.options[k] = words[5 + k];
    const int64_t* shape = words + 13;
    const int64_t* operands = shape + dimensions;
    const int64_t width = 3 + dimensions;
    int order[most_dimensions];
    int64_t c_strides[most_dimensions], rows = 1;
    for (int d = (int)dimensions - 1; d >= 0; d--) {
        if (shape[d] < 0) return false;
        c_strides[d] = rows;
        rows *= shape[d];
    }
    p.rows = rows;
    auto reach = [&](int d) { return operands[3 + d] < 0 ? -operands[3 + d] : operands[3 + d]; };
    int kept = 0;
    for (int d = 0; d < dimensions; d++) {
        if (shape[d] == 1) continue;
        int at = kept++;
        for (; at > 0 && reach(order[at - 1]) < reach(d); at--) order[at] = order[at - 1];
        order[at] = d;
    }
    for (int k = 0; k < p.count; k++) {
        const int64_t* from = operands + k * width;
        Operand& one = p.operands[k];
        one.data = from[0] == ABSENT ? nullptr : from[0] == NUMBER ? (char*)&addresses[k] : (char*)addresses[k];
        one.dtype = (int)from[1];
        one.step = from[2];
        if (from[0] < 0 || from[0] >= ADDRESSES) return false;
        if (one.data && (from[1] < 0 || from[1] >= DTYPES)) return false;
        if (from[0] == INDIRECT) one.data = *(char**)one.data;
    }
    p.dimensions = 0;
    for (int i = 0; i < kept; i++) {
        int d = order[i], last = p.dimensions - 1;
        bool joins = last >= 0 && p.index_strides[last] == c_strides[d] * shape[d];
        for (int k = 0; joins && k < p.count; k++) {
            joins = !p.operands[k].data || p.operands[k].strides[last] == operands[k * width + 3 + d] * shape[d];
        }
        if (!joins) p.dimensions = ++last + 1;
        p.shape[last] = joins ? p.shape[last] * shape[d] : shape[d];
        p.index_strides[last] = c_strides[d];
        for (int k = 0; k < p.count; k++) p.operands[k].strides[last] = operands[k * width + 3 + d];
    }
    return true;
}

// The places of rows, `first` and those behind it.
inline void locate(const Problem& p, char* data, const int64_t* strides, int64_t first, int64_t count, char** places) {
    if (p.dimensions <= 1) {
        for (int64_t r = 0; r < count; r++) places[r] = data + (p.dimensions ? (first + r) * strides[0] : 0);
        return;
    }
    int64_t at[most_dimensions], rest = first;
    for (int d = p.dimensions - 1; d >= 0; d--) {
        at[d] = rest % p.shape[d];
        rest /= p.shape[d];
        data += at[d] * strides[d];
    }
    for (int64_t r = 0; r < count; r++) {
        places[r] = data;
        for (int d = p.dimensions - 1; d >= 0; d--) {
            data += strides[d];
            if (++at[d] < p.shape[d]) break;
            data -= at[d] * strides[d];
            at[d] = 0;
        }
    }
}
