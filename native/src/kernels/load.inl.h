// Loads and stores rows of the caller's arrays, of any dtype, as vectors of the compute type. Memory after the end of a
// row is neither read nor written.
#pragma once
#include "float8.inl.h"
#include "anyattn.h"
#include "geometry.h"

namespace anyattn {
namespace {

constexpr int64_t dtype_size(int32_t dtype) {
    if (dtype >= ANYATTN_INT8 || dtype == ANYATTN_BOOL) return 1;
    return dtype == ANYATTN_FLOAT64 ? 8 : dtype == ANYATTN_FLOAT32 ? 4 : 2;
}

template <class C>
constexpr int32_t dtype_of = sizeof(C) == 8 ? ANYATTN_FLOAT64 : ANYATTN_FLOAT32;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

ANYATTN_INLINE F32 widen_bfloat16(const char *p) {
    return (F32)(__builtin_convertvector(load<Lanes<float>::Half>(p), U32) << 16);
}

// Rounds to nearest even; NaN stays NaN.
ANYATTN_INLINE void narrow_bfloat16(char *p, F32 x) {
    const U32 bits = (U32)x;
    const U32 rounded = (bits + splat(UINT32_C(0x7fff)) + (bits >> 16 & splat(UINT32_C(1)))) >> 16;
    const U32 nan = bits >> 16 | splat(UINT32_C(0x40));
    const U32 result = x == x ? rounded : nan;
    store(p, __builtin_convertvector(result, Lanes<float>::Half));
}

#if defined(__AVX512F__)
ANYATTN_INLINE void narrow_float16(char *p, F32 x) { store(p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__F16C__) && ANYATTN_VECTOR_BYTES == 32
ANYATTN_INLINE void narrow_float16(char *p, F32 x) { store(p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__aarch64__) && ANYATTN_VECTOR_BYTES == 16
ANYATTN_INLINE void narrow_float16(char *p, F32 x) { store(p, vcvt_f16_f32((float32x4_t)x)); }
#else
ANYATTN_INLINE void narrow_float16(char *p, F32 x) {
    const U32 bits = (U32)x, size = bits & splat(UINT32_C(0x7fffffff));
    const U32 sign = bits >> 16 & splat(UINT32_C(0x8000));
    const U32 odd = size >> 13 & splat(UINT32_C(1));
    const U32 normal = (size - splat(UINT32_C(0x38000000)) + splat(UINT32_C(0xfff)) + odd) >> 13;
    // Below the normal range: adding 0.5 lets the addition itself round to multiples of 2^-24.
    const U32 tiny = (U32)((F32)size + splat(0.5f)) - splat(UINT32_C(0x3f000000));
    U32 half = size < splat(UINT32_C(0x38800000)) ? tiny : normal;
    half = size >= splat(UINT32_C(0x477ff000)) ? splat(UINT32_C(0x7c00)) : half;
    half = size > splat(UINT32_C(0x7f800000)) ? splat(UINT32_C(0x7e00)) : half;
    store(p, __builtin_convertvector(half | sign, Lanes<float>::Half));
}
#endif

ANYATTN_INLINE F32 widen_mask(const char *p, float) { return signed_words(p) != 0 ? splat(1.0f) : F32{}; }
ANYATTN_INLINE F64 widen_mask(const char *p, double) { return widen_int8_double(p) != 0 ? splat(1.0) : F64{}; }

// Loads one whole vector. The last argument chooses the compute type. Bytes of a mask become 0 or 1.
ANYATTN_INLINE F32 load_whole(const char *p, int32_t dtype, float) {
    if (dtype == ANYATTN_FLOAT32) return load<F32>(p);
    if (dtype == ANYATTN_BFLOAT16) return widen_bfloat16(p);
    if (dtype == ANYATTN_FLOAT16) return widen_float16(p);
    if (dtype == ANYATTN_INT8) return widen_int8(p);
    if (dtype == ANYATTN_FLOAT8_E4M3FN) return widen_float8_e4m3(p);
    if (dtype == ANYATTN_FLOAT8_E5M2) return widen_float8_e5m2(p);
    return widen_mask(p, 0.0f);
}

ANYATTN_INLINE F64 load_whole(const char *p, int32_t dtype, double) {
    if (dtype == ANYATTN_FLOAT64) return load<F64>(p);
    if (dtype == ANYATTN_FLOAT32) return __builtin_convertvector(load<Lanes<double>::Single>(p), F64);
    if (dtype == ANYATTN_INT8) return widen_int8_double(p);
    if (dtype == ANYATTN_FLOAT8_E4M3FN) return widen_float8<3, 7>(p);
    if (dtype == ANYATTN_FLOAT8_E5M2) return widen_float8<2, 15>(p);
    return widen_mask(p, 0.0);
}

ANYATTN_INLINE void store_whole(char *p, int32_t dtype, F32 x) {
    if (dtype == ANYATTN_FLOAT32) return store(p, x);
    if (dtype == ANYATTN_BFLOAT16) return narrow_bfloat16(p, x);
    narrow_float16(p, x);
}

ANYATTN_INLINE void store_whole(char *p, int32_t dtype, F64 x) {
    if (dtype == ANYATTN_FLOAT64) return store(p, x);
    store(p, __builtin_convertvector(x, Lanes<double>::Single));
}

// load_bytes copies n bytes and fills the rest of the buffer with zeros. store_bytes copies n bytes back.
#if defined(__AVX512BW__)
ANYATTN_INLINE void load_bytes(char *buffer, const char *p, int64_t n) {
    _mm512_storeu_si512(buffer, _mm512_maskz_loadu_epi8((UINT64_C(1) << n) - 1, p));
}
ANYATTN_INLINE void store_bytes(char *p, const char *buffer, int64_t n) {
    _mm512_mask_storeu_epi8(p, (UINT64_C(1) << n) - 1, _mm512_loadu_si512(buffer));
}
#else
ANYATTN_INLINE void load_bytes(char *buffer, const char *p, int64_t n) {
    __builtin_memset(buffer, 0, kVectorBytes);
    __builtin_memcpy(buffer, p, (size_t)n);
}
ANYATTN_INLINE void store_bytes(char *p, const char *buffer, int64_t n) { __builtin_memcpy(p, buffer, (size_t)n); }
#endif

// Loads the first n elements at p, followed by zeros.
template <class C>
ANYATTN_INLINE typename Lanes<C>::V load_part(const char *p, int32_t dtype, int64_t n) {
    if (n >= lanes<C>) return load_whole(p, dtype, C());
    alignas(64) char buffer[kVectorBytes];
    load_bytes(buffer, p, n * dtype_size(dtype));
    return load_whole(buffer, dtype, C());
}

template <class V>
ANYATTN_INLINE void store_part(char *p, int32_t dtype, V x, int64_t n) {
    constexpr int64_t count = sizeof(V) / sizeof(x[0]);
    if (n >= count) return store_whole(p, dtype, x);
    alignas(64) char buffer[kVectorBytes];
    store_whole(buffer, dtype, x);
    store_bytes(p, buffer, n * dtype_size(dtype));
}

template <class C>
ANYATTN_INLINE C load_scalar(const char *p, int32_t dtype) {
    return load_part<C>(p, dtype, 1)[0];
}

// Rows of one head of q, out, dout or dq, or its values in lse or dlse, at a fixed distance.
struct StridedRows {
    char *data;
    int64_t stride;  // bytes from one row to the next
    int32_t dtype;

    char *row(int64_t i) const { return data + i * stride; }
    char *at(int64_t i, int64_t d) const { return row(i) + d * dtype_size(dtype); }
};

inline StridedRows query_rows(const anyattn_array &array, const anyattn_call &call, const Sequence &s, int64_t h,
                              int64_t i0) {
    const int64_t entry = call.cu_seqlens_q ? 0 : s.index * array.stride[0];
    const int64_t offset = entry + (s.row_q + i0) * array.stride[1] + h * array.stride[2];
    const int64_t size = dtype_size(array.dtype);
    return {static_cast<char *>(array.data) + offset * size, array.stride[1] * size, array.dtype};
}

// Returns the values of lse or dlse from row i0 on.
inline StridedRows row_values(const anyattn_array &array, const anyattn_call &call, const Sequence &s, int64_t h,
                              int64_t i0) {
    const int64_t entry = call.cu_seqlens_q ? 0 : s.index * array.stride[0];
    const int64_t offset = entry + h * array.stride[1] + (s.row_q + i0) * array.stride[2];
    const int64_t size = dtype_size(array.dtype);
    return {static_cast<char *>(array.data) + offset * size, array.stride[2] * size, array.dtype};
}

// Keys (or values) of one KV head of one sequence: in order, in pages, or selected by a list.
struct KeyRows {
    StridedRows rows;
    const int32_t *pages;  // null: not paged
    int64_t page_size, page_stride;
    const int32_t *slots = nullptr;  // key slots of the selected rows; null: all rows, in order

    // Returns whether every row j is stored `rows.stride` bytes after row j - 1.
    bool in_order() const { return !pages && !slots; }

    // Returns the bytes from rows.data to row j. They are equal for all heads.
    int64_t offset(int64_t j) const {
        if (slots) j = slots[j];
        if (!pages) return j * rows.stride;
        return j % page_size * rows.stride + pages[j / page_size] * page_stride;
    }
    const char *row(int64_t j) const { return rows.data + offset(j); }

    // Calls body(i, row j + i) for n rows. Pages take one division in total, because divisions are slow.
    template <class Body>
    ANYATTN_INLINE void for_each(int64_t j, int64_t n, const Body &body) const {
        if (!pages || slots) {
            for (int64_t i = 0; i < n; ++i) body(i, row(j + i));
            return;
        }
        int64_t page = j / page_size, slot = j % page_size;
        for (int64_t i = 0; i < n; ++page, slot = 0) {
            const char *row = rows.row(slot) + pages[page] * page_stride;
            for (; slot < page_size && i < n; ++slot, ++i, row += rows.stride) body(i, row);
        }
    }
};

inline KeyRows key_rows(const anyattn_array &array, const anyattn_call &call, const Sequence &s, int64_t h_kv) {
    const int64_t size = dtype_size(array.dtype);
    int64_t offset = h_kv * array.stride[2];
    if (call.cu_seqlens_k) offset += s.row_k * array.stride[1];
    if (!call.cu_seqlens_k && !call.block_table) offset += s.batch_k * array.stride[0];
    const StridedRows rows{static_cast<char *>(array.data) + offset * size, array.stride[1] * size, array.dtype};
    const int32_t *pages = call.block_table ? call.block_table + s.index * call.max_pages : nullptr;
    return {rows, pages, call.page_size, array.stride[0] * size, nullptr};
}

template <int N>
struct Int {
    static constexpr int value = N;
    constexpr operator int32_t() const { return N; }
};

// Calls body(Int<T>()), where T is a dtype of q, k and v whose compute type is C.
template <class C, class Body>
ANYATTN_INLINE void with_dtype([[maybe_unused]] int32_t dtype, const Body &body) {
    if constexpr (sizeof(C) == 8) {
        body(Int<ANYATTN_FLOAT64>());
    } else {
        if (dtype == ANYATTN_FLOAT32) return body(Int<ANYATTN_FLOAT32>());
        if (dtype == ANYATTN_FLOAT16) return body(Int<ANYATTN_FLOAT16>());
        body(Int<ANYATTN_BFLOAT16>());
    }
}

// Calls body(Int<T>()), where T is a dtype of stored keys and values, quantised ones included.
template <class C, class Body>
ANYATTN_INLINE void with_key_dtype(int32_t dtype, const Body &body) {
    if (dtype == ANYATTN_INT8) return body(Int<ANYATTN_INT8>());
    if (dtype == ANYATTN_FLOAT8_E4M3FN) return body(Int<ANYATTN_FLOAT8_E4M3FN>());
    if (dtype == ANYATTN_FLOAT8_E5M2) return body(Int<ANYATTN_FLOAT8_E5M2>());
    with_dtype<C>(dtype, body);
}

// Prefetches the next tile of keys (or values), one row at a time, while the current tile is multiplied. Many
// prefetches at once would delay the loads of the multiplication. Heads that are adjacent in memory are prefetched in
// memory order, because the processor's own prefetcher follows that order.
struct Ahead {
    const KeyRows *rows;  // of each head
    int64_t heads, j, end, bytes;
    int64_t head = 0, offset = 0;
    const char *line = nullptr, *row_end = nullptr;  // of the current row

    ANYATTN_INLINE bool next_row() {
        if (j >= end) return false;
        if (head == 0) offset = rows->offset(j);
        line = rows[head].rows.data + offset;
        row_end = line + bytes;
        if (++head == heads) {
            head = 0;
            ++j;
        }
        return true;
    }
    // Whole rows, into L2.
    void fetch(int64_t count) {
        for (; count > 0 && next_row(); --count) {
            for (; line < row_end; line += 64) __builtin_prefetch(line, 0, 2);
        }
    }
    // The next lines of 64 bytes, into L1.
    ANYATTN_INLINE void fetch_lines(int64_t count) {
        for (int64_t i = 0; i < count; ++i, line += 64) {
            if (__builtin_expect(line >= row_end, 0) && !next_row()) return;
            __builtin_prefetch(line, 0, 3);
        }
    }
};

struct TileAhead {
    Ahead k, v;  // of the next tile
    Ahead bias = {}, mask = {};  // see AddedAhead

    // Fetches as many rows of each.
    ANYATTN_INLINE void fetch(int64_t count) {
        k.fetch(count);
        v.fetch(count);
        bias.fetch(count);
        mask.fetch(count);
    }
};

// Converts n values to the compute type, and fills the last vector with zeros.
template <class C, int T>
ANYATTN_INLINE void copy_row(C *to, const char *from, int64_t n) {
    int64_t d = 0;
    for (; d + lanes<C> <= n; d += lanes<C>) store(to + d, load_whole(from + d * dtype_size(T), T, C()));
    if (d < n) store(to + d, load_part<C>(from + d * dtype_size(T), T, n - d));
}

template <class C>
ANYATTN_NOINLINE void copy_keys(C *to, int64_t stride, const KeyRows &keys, int64_t j, int64_t n, int64_t dim) {
    with_key_dtype<C>(keys.rows.dtype, [&](auto t) {
        for (int64_t i = 0; i < n; ++i) copy_row<C, decltype(t)::value>(to + i * stride, keys.row(j + i), dim);
    });
}

template <class C>
ANYATTN_NOINLINE void copy_rows(C *to, int64_t stride, const StridedRows &rows, int64_t n, int64_t dim) {
    with_dtype<C>(rows.dtype, [&](auto t) {
        for (int64_t i = 0; i < n; ++i) copy_row<C, decltype(t)::value>(to + i * stride, rows.row(i), dim);
    });
}

// Loads `left` elements (at most a vector) at `offset` bytes of each of `count` rows. The function is not inlined,
// because the compiler would repeat its code for every row of a vector.
template <class C>
ANYATTN_NOINLINE void load_tile(typename Lanes<C>::V *r, const char *const *rows, int64_t offset, int32_t dtype,
                                int64_t count, int64_t left) {
    const auto load_rows = [&](auto t) {
        for (int64_t x = 0; x < count; ++x) r[x] = load_part<C>(rows[x] + offset, t, left);
    };
    // The usual dtypes are constants in a loop of their own.
    if (dtype == dtype_of<C>) return load_rows(Int<dtype_of<C>>());
    if (dtype == ANYATTN_BOOL) return load_rows(Int<ANYATTN_BOOL>());
    if (sizeof(C) == 4 && dtype == ANYATTN_BFLOAT16) return load_rows(Int<ANYATTN_BFLOAT16>());
    load_rows(dtype);
}

template <class C>
ANYATTN_NOINLINE void store_tile(char *const *rows, int64_t offset, int32_t dtype, const typename Lanes<C>::V *r,
                                 int64_t count, int64_t left, bool add) {
    for (int64_t x = 0; x < count; ++x) {
        typename Lanes<C>::V value = r[x];
        if (add) value += load_part<C>(rows[x] + offset, dtype, left);
        store_part(rows[x] + offset, dtype, value, left);
    }
}

// Addresses of the rows of a block in q, out, dout or dq. Rows of several heads are at no fixed distance.
struct RowTable {
    char *row[kBlockQ];
    int32_t dtype;
};

// Packs n rows, times factor, as columns: packed[d][lane]. Lanes from n on are 0.
template <class C>
ANYATTN_NOINLINE void pack_panel(C *packed, const char *const *rows, int32_t dtype, int64_t n, int64_t dim, C factor) {
    using V = typename Lanes<C>::V;
    constexpr int width = lanes<C>;
    const int64_t size = dtype_size(dtype);
    const auto finish = [&](V *r, int64_t d, int c) {
        transpose<C>(r);
        ANYATTN_UNROLL
        for (int x = 0; x < width; ++x) store(packed + (d + x) * panel<C> + c, r[x] * splat(factor));
    };
    for (int c = 0; c < panel<C>; c += width) {
        int64_t d = 0;
        for (; dtype == dtype_of<C> && c + width <= n && d + width <= dim; d += width) {
            V r[width];
            ANYATTN_UNROLL
            for (int x = 0; x < width; ++x) r[x] = load<V>(rows[c + x] + d * size);
            finish(r, d, c);
        }
        for (; d < dim; d += width) {
            V r[width] = {};
            load_tile<C>(r, rows + c, d * size, dtype, min64(width, n - c), dim - d);
            finish(r, d, c);
        }
    }
}

// Unpacks columns of P lanes into n rows, times one factor per lane (null: 1). `add` adds to the rows instead of
// overwriting them.
template <class C, int P>
ANYATTN_NOINLINE void unpack_panel(char *const *rows, int32_t dtype, const C *packed, int64_t n, int64_t dim,
                                   const C *factors, bool add) {
    using V = typename Lanes<C>::V;
    constexpr int width = lanes<C>;
    const int64_t size = dtype_size(dtype);
    const bool plain = dtype == dtype_of<C> && !add;
    for (int c = 0; c < n; c += width) {
        const V factor = factors ? load<V>(factors + c) : splat(C(1));
        for (int64_t d = 0; d < dim; d += width) {
            V r[width];
            ANYATTN_UNROLL
            for (int x = 0; x < width; ++x) r[x] = load<V>(packed + (d + x) * P + c) * factor;
            transpose<C>(r);
            if (plain && c + width <= n && d + width <= dim) {
                ANYATTN_UNROLL
                for (int x = 0; x < width; ++x) store(rows[c + x] + d * size, r[x]);
            } else {
                store_tile<C>(rows + c, d * size, dtype, r, min64(width, n - c), dim - d, add);
            }
        }
    }
}

// Allocates scratch memory in order. Without a base, it only counts bytes.
struct Arena {
    char *base;
    int64_t used;

    template <class T>
    T *take(int64_t n) {
        char *p = base ? base + used : nullptr;
        used += round_up(n * (int64_t)sizeof(T), 64);
        return reinterpret_cast<T *>(p);
    }
};

}  // namespace
}  // namespace anyattn
