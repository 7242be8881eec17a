// What kernels are told of operands that have one entry a row, or may be repeated: where they stand for a row.

// The entry for a row in an array that has one a row, or a row for each: repeated, and broadcast.
struct RowMap {
    Index inner, period, stride;

    DEVICE Index offset(Index row) const {
        // Most maps are of one entry a row, and a division takes as long as ten entries.
        Word i = (Word)row;
        if (inner != 1) i /= (Word)inner;
        if (i >= (Word)period) i %= (Word)period;
        return (Index)i * stride;
    }
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

// Parameters of a kernel, each of 8 bytes; the launcher passes them in this order.
#define MAP_PARAMETERS(name) Index name##_inner, Index name##_period, Index name##_stride
#define MAP(name) {name##_inner, name##_period, name##_stride}
#define GIVEN_PARAMETERS(name) const void *name, double name##_value, MAP_PARAMETERS(name##_row)
#define GIVEN(name) {name, name##_value, MAP(name##_row)}
#define MASK_PARAMETERS const void *where, MAP_PARAMETERS(where_row), Index where_stride
#define MASK {where, MAP(where_row), where_stride}
