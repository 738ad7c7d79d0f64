// Elements of an anyattn_array as doubles, and arrays that own their memory.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "anyattn.h"
#include "half.h"

struct Index {
    int64_t a, b, c, d;
};

inline int64_t size_of(int32_t dtype) {
    switch (dtype) {
        case ANYATTN_FLOAT64:
            return 8;
        case ANYATTN_FLOAT32:
        case ANYATTN_INT32:
            return 4;
        case ANYATTN_BOOL:
            return 1;
        default:
            return 2;
    }
}

inline char *address(const anyattn_array &array, Index i) {
    const int64_t *s = array.stride;
    return static_cast<char *>(array.data) + (i.a * s[0] + i.b * s[1] + i.c * s[2] + i.d * s[3]) * size_of(array.dtype);
}

template <class T>
T read(const char *from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class T>
void write(char *to, T value) {
    std::memcpy(to, &value, sizeof value);
}

inline double get(const anyattn_array &array, Index i) {
    const char *from = address(array, i);
    switch (array.dtype) {
        case ANYATTN_FLOAT64:
            return read<double>(from);
        case ANYATTN_FLOAT32:
            return read<float>(from);
        case ANYATTN_FLOAT16:
            return anyattn::float_from_float16(read<uint16_t>(from));
        case ANYATTN_BFLOAT16:
            return anyattn::float_from_bfloat16(read<uint16_t>(from));
        case ANYATTN_INT32:
            return read<int32_t>(from);
        default:
            return *from;
    }
}

inline void set(const anyattn_array &array, Index i, double value) {
    char *to = address(array, i);
    switch (array.dtype) {
        case ANYATTN_FLOAT64:
            return write(to, value);
        case ANYATTN_FLOAT32:
            return write(to, static_cast<float>(value));
        case ANYATTN_FLOAT16:
            return write(to, anyattn::float16_from_float(static_cast<float>(value)));
        case ANYATTN_BFLOAT16:
            return write(to, anyattn::bfloat16_from_float(static_cast<float>(value)));
        case ANYATTN_INT32:
            return write(to, static_cast<int32_t>(value));
        default:
            *to = static_cast<char>(value);
    }
}

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Arrays of one call. Every array is inside a larger one that is full of NaN (INT32_MAX), which detects accesses out of bounds.
class Memory {
  public:
    explicit Memory(uint32_t seed) : random_(seed) {}

    // Contiguous, except that rows are `gap` elements further apart than they need to be. Filled with NaN.
    anyattn_array array(int32_t dtype, Index dims, int64_t gap = 0) {
        anyattn_array result{};
        result.dtype = dtype;
        const int64_t strides[4] = {dims.b * dims.c * (dims.d + gap), dims.c * (dims.d + gap), dims.d + gap, 1};
        std::memcpy(result.stride, strides, sizeof strides);
        const int64_t elements = dims.a * strides[0] + 64;
        blocks_.emplace_back(new char[static_cast<size_t>(elements * size_of(dtype)) + 64]);
        char *data = blocks_.back().get();
        result.data = data + (64 - reinterpret_cast<uintptr_t>(data) % 64) % 64;
        const double filler = dtype == ANYATTN_BOOL ? 1 : dtype == ANYATTN_INT32 ? INT32_MAX : kNan;
        for (int64_t i = 0; i < elements; ++i) set(result, {0, 0, 0, i}, filler);
        return result;
    }

    anyattn_array normal(int32_t dtype, Index dims, int64_t gap = 0) {
        const anyattn_array result = array(dtype, dims, gap);
        fill(result, dims, [this] { return normal_(random_); });
        return result;
    }

    template <class Value>
    static void fill(const anyattn_array &array, Index dims, const Value &value) {
        for (int64_t a = 0; a < dims.a; ++a)
            for (int64_t b = 0; b < dims.b; ++b)
                for (int64_t c = 0; c < dims.c; ++c)
                    for (int64_t d = 0; d < dims.d; ++d) set(array, {a, b, c, d}, value());
    }

    int64_t below(int64_t limit) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(limit)); }
    std::mt19937 &random() { return random_; }

  private:
    std::vector<std::unique_ptr<char[]>> blocks_;
    std::mt19937 random_;
    std::normal_distribution<double> normal_;
};
