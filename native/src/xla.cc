// Handler of XLA's custom calls: fills the addresses of XLA's buffers into the call that the attributes hold.
#include "anyattn_xla.h"

#include <cstddef>
#include <cstdio>
#include <cstring>

#include "xla_ffi.h"

namespace anyattn::xla {
namespace {

constexpr int64_t kMaxWords = 512, kMessage = 512;
constexpr int64_t kText = offsetof(anyattn_call, message) / 8, kTextSize = offsetof(anyattn_call, message_bytes) / 8;

// Returns the value of an attribute, or null if it is absent or of another type.
template <class T>
const T *find(const Attributes &attributes, const char *name, int kind, int type) {
    for (int64_t i = 0; i < attributes.size; ++i) {
        const Name &found = *attributes.names[i];
        if (found.size != std::strlen(name) || std::memcmp(found.text, name, found.size) != 0) continue;
        const T *value = static_cast<const T *>(attributes.values[i]);
        return attributes.types[i] == kind && value->type == type ? value : nullptr;
    }
    return nullptr;
}

struct Words {
    const int64_t *data;
    int64_t size;
};

bool words_of(const Attributes &attributes, const char *name, Words *words) {
    const Array *found = find<Array>(attributes, name, kArray, kS64);
    if (!found) return false;
    *words = {static_cast<const int64_t *>(found->data), static_cast<int64_t>(found->size)};
    return true;
}

int64_t item_bytes(int type) {
    switch (type) {
        case kPred:
        case kS8:
        case kF8E5M2:
        case kF8E4M3FN:
            return 1;
        case kF16:
        case kBF16:
            return 2;
        case kS32:
        case kU32:
        case kF32:
            return 4;
        case kS64:
        case kU64:
        case kF64:
            return 8;
        default:
            return -1;
    }
}

// Returns -1 for a type that no call has.
int64_t bytes_of(const Buffer &buffer) {
    int64_t bytes = item_bytes(buffer.type);
    for (int64_t i = 0; i < buffer.rank; ++i) bytes *= buffer.sizes[i];
    return bytes;
}

int32_t run_pass(const anyattn_call *call, int32_t pass) {
    switch (pass) {
        case ANYATTN_FORWARD:
            return anyattn_forward(call);
        case ANYATTN_BACKWARD:
            return anyattn_backward(call);
        case ANYATTN_APPEND:
            return anyattn_append(call);
        case ANYATTN_TANGENT:
            return anyattn_tangent(call);
        case ANYATTN_SECOND:
            return anyattn_second(call);
        case ANYATTN_FORWARD_TANGENT:
            return anyattn_forward_tangent(call);
        default:
            return ANYATTN_UNSUPPORTED;
    }
}

class Handler {
  public:
    explicit Handler(const CallFrame &frame) : frame_(frame) {}

    Error *run() {
        Words call, places, bytes;
        const Scalar *pass = find<Scalar>(frame_.attributes, "pass", kScalar, kS32);
        if (!pass || !words_of(frame_.attributes, "call", &call) || !words_of(frame_.attributes, "words", &places) ||
            !words_of(frame_.attributes, "bytes", &bytes)) {
            return refuse("attributes must be pass, call, words and bytes (anyattn_xla.h)");
        }
        const int64_t buffers = frame_.operands.size + frame_.results.size;
        if (places.size != buffers || bytes.size != buffers) {
            return refuse("words and bytes must have an entry for each array");
        }
        if (call.size <= kTextSize || call.size > kMaxWords)
            return refuse("call must be an anyattn_call of at most 4096 bytes");
        std::memcpy(words_, call.data, call.size * sizeof *words_);
        size_ = call.size;
        for (int64_t i = 0; i < buffers; ++i) {
            if (!place(i, places.data[i], bytes.data[i])) return refuse(message_);
        }
        return compute(*static_cast<const int32_t *>(pass->value));
    }

  private:
    bool place(int64_t i, int64_t word, int64_t bytes) {
        const bool operand = i < frame_.operands.size;
        const int64_t index = operand ? i : i - frame_.operands.size;
        const Buffers &side = operand ? frame_.operands : frame_.results;
        const char *name = operand ? "operand" : "result";
        const Buffer &buffer = *static_cast<const Buffer *>(side.values[index]);
        if (side.types[index] != kBuffer || bytes_of(buffer) != bytes || word < 1 || word >= size_) {
            std::snprintf(message_, sizeof message_, "%s %lld must be an array of %lld bytes", name, (long long)index,
                          (long long)bytes);
            return false;
        }
        void *before;
        std::memcpy(&before, &words_[word], sizeof before);
        // XLA gives an operand that is changed in place and its result the same address. If it does not, copy the operand.
        if (!operand && before && before != buffer.data) std::memcpy(buffer.data, before, bytes);
        std::memcpy(&words_[word], &buffer.data, sizeof buffer.data);
        return true;
    }

    Error *compute(int32_t pass) {
        static_assert(sizeof(void *) == 8, "addresses are words of the call");
        char *text = message_;
        std::memcpy(&words_[kText], &text, sizeof text);
        words_[kTextSize] = kMessage;
        const anyattn_call *call = reinterpret_cast<const anyattn_call *>(words_);
        const int32_t status = run_pass(call, pass);
        if (status == ANYATTN_SUCCESS) return nullptr;
        if (!message_[0]) std::snprintf(message_, sizeof message_, "%s", anyattn_error_string(status));
        const bool memory = status == ANYATTN_OUT_OF_MEMORY, unknown = status == ANYATTN_UNSUPPORTED;
        return fail(memory ? kResourceExhausted : unknown ? kUnimplemented : kInvalidArgument, message_);
    }

    Error *refuse(const char *message) { return fail(kInvalidArgument, message); }

    Error *fail(int code, const char *message) {
        char text[kMessage + 16];
        std::snprintf(text, sizeof text, "anyattn: %s", message);
        ErrorArguments arguments = {sizeof arguments, nullptr, text, code};
        return frame_.api->create_error(&arguments);
    }

    const CallFrame &frame_;
    alignas(64) int64_t words_[kMaxWords];
    int64_t size_ = 0;
    char message_[kMessage] = "";
};

// XLA asks for the version when the handler is registered.
void describe(Metadata *metadata) {
    metadata->version.major = kMajor;
    metadata->version.minor = kMinor;
    if (metadata->struct_size >= offsetof(Metadata, traits) + sizeof metadata->traits) metadata->traits = 0;
}

}  // namespace
}  // namespace anyattn::xla

extern "C" void *anyattn_xla(void *call_frame) {
    using namespace anyattn::xla;
    const CallFrame *frame = static_cast<const CallFrame *>(call_frame);
    if (frame->extension && frame->extension->type == kMetadata) {
        describe(reinterpret_cast<MetadataExtension *>(frame->extension)->metadata);
        return nullptr;
    }
    return frame->stage == kExecute ? Handler(*frame).run() : nullptr;
}
