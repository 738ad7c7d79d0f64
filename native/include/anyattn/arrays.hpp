// Statuses, element types, and views of arrays and tables. A view does not own its memory.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../anyattn.h"

namespace anyattn {

// anyattn_status. The last two exist for code written for CuFlash-Attn and are never returned.
enum class [[nodiscard]] Status : int32_t {
    SUCCESS = ANYATTN_SUCCESS,
    INVALID_DIMENSION = ANYATTN_INVALID_DIMENSION,
    NULL_POINTER = ANYATTN_NULL_POINTER,
    INVALID_DTYPE = ANYATTN_INVALID_DTYPE,
    INVALID_VALUE = ANYATTN_INVALID_VALUE,
    OUT_OF_RANGE = ANYATTN_OUT_OF_RANGE,
    UNSUPPORTED = ANYATTN_UNSUPPORTED,
    OUT_OF_MEMORY = ANYATTN_OUT_OF_MEMORY,
    INTERRUPTED = ANYATTN_INTERRUPTED,
    UNSUPPORTED_HEAD_DIM = 1000,
    CUDA_ERROR = 1001
};
using FlashAttentionError = Status;

inline const char *get_error_string(Status status) {
    if (status == Status::UNSUPPORTED_HEAD_DIM) return "unsupported head_dim";
    if (status == Status::CUDA_ERROR) return "CUDA error";
    return anyattn_error_string(static_cast<int32_t>(status));
}

// Storage types of 16-bit floats. Conversions from float round to nearest even.
struct float16 {
    uint16_t bits;

    float16() = default;
    explicit float16(float x) {
        const float size = std::fabs(x);
        uint32_t magnitude = 0x7e00;  // NaN
        if (size >= 65520) {
            magnitude = 0x7c00;
        } else if (size < 65520) {
            // 1024 to 2048 steps of 2^(exponent - 10); below the normal range fewer, so that the exponent's bits are 0
            const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
            const float steps = std::nearbyint(std::ldexp(size, 10 - exponent));
            magnitude = (static_cast<uint32_t>(exponent + 14) << 10) + static_cast<uint32_t>(steps);
        }
        bits = static_cast<uint16_t>(magnitude | (std::signbit(x) ? 0x8000u : 0u));
    }
    operator float() const {
        const int exponent = bits >> 10 & 31, fraction = bits & 1023;
        float size =
            std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
        if (exponent == 31) size = fraction ? std::numeric_limits<float>::quiet_NaN() : HUGE_VALF;
        return bits & 0x8000 ? -size : size;
    }
};

struct bfloat16 {
    uint16_t bits;

    bfloat16() = default;
    explicit bfloat16(float x) {
        uint32_t wide;
        std::memcpy(&wide, &x, sizeof wide);
        const uint32_t rounded = wide + 0x7fff + (wide >> 16 & 1);
        bits = static_cast<uint16_t>(std::isnan(x) ? wide >> 16 | 0x40 : rounded >> 16);
    }
    operator float() const {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float x;
        std::memcpy(&x, &wide, sizeof x);
        return x;
    }
};

// The dtype of an element type. Specialize it for a 16-bit float of your own.
template <class T>
struct Dtype;
template <>
struct Dtype<float> : std::integral_constant<int32_t, ANYATTN_FLOAT32> {};
template <>
struct Dtype<double> : std::integral_constant<int32_t, ANYATTN_FLOAT64> {};
template <>
struct Dtype<float16> : std::integral_constant<int32_t, ANYATTN_FLOAT16> {};
template <>
struct Dtype<bfloat16> : std::integral_constant<int32_t, ANYATTN_BFLOAT16> {};
template <>
struct Dtype<bool> : std::integral_constant<int32_t, ANYATTN_BOOL> {};
template <>
struct Dtype<uint8_t> : std::integral_constant<int32_t, ANYATTN_BOOL> {};

// A view of an array. Strides are in elements. A call may write to an Array, and only reads a ConstArray.
struct ConstArray {
    void *data = nullptr;
    int32_t dtype = ANYATTN_NONE;
    int32_t rank = 0;  // 0: absent
    int64_t shape[4] = {};
    int64_t stride[4] = {};
};
struct Array : ConstArray {};

namespace detail {

constexpr size_t kMessageBytes = 512;

inline char *message() {
    static thread_local char buffer[kMessageBytes];
    return buffer;
}

#if defined(__GNUC__)
#define ANYATTN_PRINTF(text, values) __attribute__((format(printf, text, values)))
#else
#define ANYATTN_PRINTF(text, values)
#endif

ANYATTN_PRINTF(2, 3) inline Status refuse(Status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message(), kMessageBytes, format, arguments);
    va_end(arguments);
    return status;
}

using Integer = long long;  // as printf takes it

// Arithmetic on sizes that may be invalid. Neither function overflows.
inline int64_t multiply(int64_t a, int64_t b) {
    if (a <= 0 || b <= 0) return 0;
    return a > std::numeric_limits<int64_t>::max() / b ? std::numeric_limits<int64_t>::max() : a * b;
}

}  // namespace detail

// Returns why the last call of this thread was refused, or "" if it succeeded.
inline const char *error_message() { return detail::message(); }

template <class T>
using ArrayOf = std::conditional_t<std::is_const_v<T>, ConstArray, Array>;

// Returns a view of 1 to 4 axes with these strides.
template <class T, size_t N>
ArrayOf<T> view(T *data, const int64_t (&shape)[N], const int64_t (&stride)[N]) {
    static_assert(N <= 4, "arrays have at most 4 axes");
    ArrayOf<T> array;
    array.data = const_cast<std::remove_const_t<T> *>(data);
    array.dtype = Dtype<std::remove_const_t<T>>::value;
    array.rank = N;
    std::memcpy(array.shape, shape, sizeof shape);
    std::memcpy(array.stride, stride, sizeof stride);
    return array;
}

// Returns a contiguous view of 1 to 4 axes.
template <class T, size_t N>
ArrayOf<T> view(T *data, const int64_t (&shape)[N]) {
    int64_t stride[N];
    stride[N - 1] = 1;
    for (size_t axis = N - 1; axis > 0; --axis) {
        stride[axis - 1] = detail::multiply(stride[axis], shape[axis] > 1 ? shape[axis] : 1);
    }
    return view(data, shape, stride);
}

// Returns the view with two axes exchanged. A Call takes swap_axes<1, 2>(view(q, {batch, nheads, seqlen, head_dim})).
template <int A, int B, class AnyArray>
AnyArray swap_axes(AnyArray array) {
    static_assert(A >= 0 && A < 4 && B >= 0 && B < 4, "arrays have at most 4 axes");
    std::swap(array.shape[A], array.shape[B]);
    std::swap(array.stride[A], array.stride[B]);
    return array;
}

// A view of int32 values: a vector, an array, or a pointer and a count.
struct Table {
    const int32_t *data = nullptr;
    int64_t size = -1;  // less than 0: absent

    Table() = default;
    Table(const int32_t *data_, int64_t size_) : data(data_), size(size_) {}
    template <size_t N>
    Table(const int32_t (&values)[N]) : data(values), size(N) {}
    template <class Container, class = decltype(static_cast<const int32_t *>(std::declval<Container &>().data()))>
    Table(Container &values) : data(values.data()), size(static_cast<int64_t>(values.size())) {}
};

}  // namespace anyattn
