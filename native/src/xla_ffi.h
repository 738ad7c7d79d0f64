// Structs of XLA's typed foreign function interface (xla/ffi/api/c_api.h) in version 0.1, as far as they are used here.
// Later versions append fields and keep these. The struct sizes that XLA passes are checked.
#pragma once
#include <cstddef>
#include <cstdint>

namespace anyattn::xla {

constexpr int kMajor = 0, kMinor = 1;

enum Extension : int { kMetadata = 1 };
enum Stage : int { kExecute = 3 };
enum Argument : int { kBuffer = 1 };  // of operands and results alike
enum Attribute : int { kArray = 1, kScalar = 3 };
enum Code : int { kInvalidArgument = 3, kResourceExhausted = 8, kUnimplemented = 12 };
enum Type : int {
    kPred = 1,
    kS8 = 2,
    kS32 = 4,
    kS64 = 5,
    kU32 = 8,
    kU64 = 9,
    kF16 = 10,
    kF32 = 11,
    kF64 = 12,
    kBF16 = 16,
    kF8E5M2 = 19,
    kF8E4M3FN = 20,
};

struct ExtensionBase {
    size_t struct_size;
    int type;
    ExtensionBase *next;
};

struct ApiVersion {
    size_t struct_size;
    ExtensionBase *extension;
    int major, minor;
};

struct Metadata {
    size_t struct_size;
    ApiVersion version;
    uint32_t traits;
};

struct MetadataExtension {
    ExtensionBase base;
    Metadata *metadata;
};

struct Error;

struct ErrorArguments {
    size_t struct_size;
    ExtensionBase *extension;
    const char *message;
    int code;
};

struct Api {
    size_t struct_size;
    ExtensionBase *extension;
    ApiVersion version;
    const void *internal;
    Error *(*create_error)(ErrorArguments *arguments);
};

struct Buffer {
    size_t struct_size;
    ExtensionBase *extension;
    int type;
    void *data;
    int64_t rank;
    int64_t *sizes;
};

struct Array {
    int type;
    size_t size;
    void *data;
};

struct Scalar {
    int type;
    void *value;
};

struct Name {
    const char *text;
    size_t size;
};

struct Buffers {
    size_t struct_size;
    ExtensionBase *extension;
    int64_t size;
    int *types;
    void **values;
};

struct Attributes {
    size_t struct_size;
    ExtensionBase *extension;
    int64_t size;
    int *types;
    Name **names;
    void **values;
};

struct CallFrame {
    size_t struct_size;
    ExtensionBase *extension;
    const Api *api;
    void *context;
    int stage;
    Buffers operands, results;
    Attributes attributes;
};

}  // namespace anyattn::xla
