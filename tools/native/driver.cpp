// Runs problems from a file through the library and prints what came of each: the status, a hash of every output, a
// hash of one row of it, and complaints. tools/native/problems.py writes the file.
//
// Each operand has memory of its own, exactly as long as its entries reach, so that AddressSanitizer sees any access
// outside. An output's bytes between its entries, and all inputs, must stay as they were.
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

extern "C" int polysoftmax_run(const int64_t* problem, const int64_t* addresses);
extern "C" int polysoftmax_level();
extern "C" void polysoftmax_set_threads(int count);

namespace {

constexpr int kHead = 13;  // words before the batch shape

// What a byte of an output is before the call; no answer to the problems here consists of it.
constexpr unsigned char kUnwritten = 0xFB;

struct Operand {
    int64_t size, offset, origin, is_output, entries;  // bytes, of misalignment, to the first entry; entries a row
    std::vector<unsigned char> given;
    unsigned char* memory = nullptr;
};

FILE* input;

int64_t read_word() {
    int64_t word;
    if (std::fread(&word, sizeof word, 1, input) != 1) std::exit(std::feof(input) ? 0 : 3);
    return word;
}

int64_t bytes_of(int64_t dtype) {
    static const int sizes[] = {1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8};
    return sizes[dtype];
}

// NaNs are one value here: processors differ in the sign of those that they make.
uint64_t entry_bits(const unsigned char* at, int64_t dtype) {
    uint64_t bits = 0;
    std::memcpy(&bits, at, size_t(bytes_of(dtype)));
    static const uint64_t infinity[] = {0x7C00, 0x7F80, 0x7F800000, 0x7FF0000000000000};
    if (dtype >= 9) {
        const uint64_t magnitude = bits & ~(uint64_t(1) << (8 * bytes_of(dtype) - 1));
        if (magnitude > infinity[dtype - 9]) return ~uint64_t(0);
    }
    return bits;
}

uint64_t mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
    return hash ^ (hash >> 29);
}

struct Hashes {
    uint64_t all = 0, row = 0;
    bool is_missing = false, has_strayed = false;
};

Hashes look(const Operand& operand, const int64_t* words, const int64_t* strides, int64_t dtype, int64_t chosen) {
    const int64_t dims = words[1], width = bytes_of(dtype);
    std::vector<unsigned char> left(operand.memory + operand.offset, operand.memory + operand.offset + operand.size);
    std::vector<int64_t> index(size_t(dims), 0);
    int64_t rows = 1;
    for (int64_t i = 0; i < dims; i++) rows *= words[kHead + i];
    Hashes found;
    for (int64_t row = 0; row < rows; row++) {
        int64_t start = operand.origin;
        for (int64_t i = 0; i < dims; i++) start += index[size_t(i)] * strides[1 + i];
        uint64_t hash = 0;
        for (int64_t i = 0; i < operand.entries; i++) {
            unsigned char* entry = &left[size_t(start + i * strides[0])];
            hash = mix(hash, entry_bits(entry, dtype));
            bool is_missing = width > 2;  // of so many 16-bit answers one may well look like that
            for (int64_t k = 0; k < width; k++) is_missing &= entry[k] == kUnwritten;
            found.is_missing |= is_missing;
            std::memset(entry, kUnwritten, size_t(width));
        }
        found.all = mix(found.all, hash);
        if (row == chosen) found.row = mix(0, hash);
        for (int64_t i = dims; i-- > 0 && ++index[size_t(i)] == words[kHead + i];) index[size_t(i)] = 0;
    }
    for (unsigned char byte : left) found.has_strayed |= byte != kUnwritten;
    return found;
}

void run_one(int64_t number) {
    const int64_t threads = read_word(), chosen = read_word(), count = read_word();
    std::vector<int64_t> words(static_cast<size_t>(count));
    for (auto& word : words) word = read_word();
    const int64_t dims = words[1], operands = words[3];
    std::vector<Operand> all(static_cast<size_t>(operands));
    std::vector<int64_t> addresses(static_cast<size_t>(operands), 0);
    auto field = [&](int64_t i) { return &words[size_t(kHead + dims + i * (3 + dims))]; };
    for (int64_t i = 0; i < operands; i++) {
        if (!field(i)[0]) continue;
        Operand& one = all[size_t(i)];
        one.size = read_word(), one.offset = read_word(), one.origin = read_word();
        one.is_output = read_word(), one.entries = read_word();
        one.given.assign(size_t(one.size), kUnwritten);
        if (!one.is_output && std::fread(one.given.data(), 1, size_t(one.size), input) != size_t(one.size)) std::exit(3);
        one.memory = static_cast<unsigned char*>(std::malloc(size_t(one.offset + one.size)));
        if (one.size) std::memcpy(one.memory + one.offset, one.given.data(), size_t(one.size));
        addresses[size_t(i)] = int64_t(one.memory + one.offset + one.origin);
    }
    std::fprintf(stderr, "problem %" PRId64 "\n", number);
    polysoftmax_set_threads(int(threads));
    std::printf("%" PRId64 " status %d", number, polysoftmax_run(words.data(), addresses.data()));
    for (int64_t i = 0; i < operands; i++) {
        Operand& one = all[size_t(i)];
        if (!field(i)[0]) continue;
        if (one.is_output) {
            const Hashes found = look(one, words.data(), field(i) + 2, field(i)[1], chosen);
            std::printf(" %016" PRIx64 "/%016" PRIx64, found.all, found.row);
            if (found.is_missing) std::printf(" unwritten:%" PRId64, i);
            if (found.has_strayed) std::printf(" strayed:%" PRId64, i);
        } else if (one.size && std::memcmp(one.memory + one.offset, one.given.data(), size_t(one.size))) {
            std::printf(" overwritten:%" PRId64, i);
        }
        std::free(one.memory);
    }
    std::printf("\n");
    std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
    input = count == 2 ? std::fopen(arguments[1], "rb") : nullptr;
    if (!input) return 3;
    std::printf("level %d\n", polysoftmax_level());
    for (int64_t number = 0;; number++) run_one(number);
}
