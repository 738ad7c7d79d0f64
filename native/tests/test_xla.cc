// XLA's side of a custom call, by hand: what the handler computes, and what it refuses.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../src/xla_ffi.h"
#include "anyattn_xla.h"
#include "check.h"

namespace {

namespace xla = anyattn::xla;

std::string last_message;
int last_code = 0;

xla::Error *create_error(xla::ErrorArguments *arguments) {
    last_message = arguments->message;
    last_code = arguments->code;
    static char error;
    return reinterpret_cast<xla::Error *>(&error);
}

constexpr int64_t kSeqlen = 3, kDim = 4, kEntries = kSeqlen * kDim;

// Forward attention of one head: q, k and v are operands, out and lse results.
struct Program {
    std::vector<float> arrays[5];
    int64_t sizes[4] = {1, kSeqlen, 1, kDim}, lse_sizes[3] = {1, 1, kSeqlen};
    xla::Buffer buffers[5];
    std::vector<int64_t> call, words, bytes;
    int32_t pass = ANYATTN_FORWARD;
    int types[5] = {xla::kBuffer, xla::kBuffer, xla::kBuffer, xla::kBuffer, xla::kBuffer};

    Program() {
        for (int i = 0; i < 5; ++i) {
            arrays[i].assign(i < 4 ? kEntries : kSeqlen, i < 3 ? 0.5f + float(i) : -1.0f);
            int64_t *shape = i < 4 ? sizes : lse_sizes;
            buffers[i] = {sizeof(xla::Buffer), nullptr, xla::kF32, arrays[i].data(), i < 4 ? 4 : 3, shape};
            bytes.push_back(int64_t(arrays[i].size() * sizeof(float)));
        }
        anyattn_call described = {};
        described.size = sizeof described;
        described.batch = described.nheads = described.nheads_kv = 1;
        described.seqlen_q = described.seqlen_k = kSeqlen;
        described.head_dim = described.head_dim_v = kDim;
        described.scale = 0.5;
        const anyattn_array array = anyattn_contiguous(nullptr, ANYATTN_FLOAT32, kSeqlen, 1, kDim);
        described.q = described.k = described.v = described.out = array;
        described.lse = anyattn_contiguous(nullptr, ANYATTN_FLOAT32, 1, kSeqlen, 1);
        call.resize(sizeof described / 8);
        std::memcpy(call.data(), &described, sizeof described);
        for (size_t place : {offsetof(anyattn_call, q), offsetof(anyattn_call, k), offsetof(anyattn_call, v),
                             offsetof(anyattn_call, out), offsetof(anyattn_call, lse)}) {
            words.push_back(int64_t(place / 8));
        }
    }

    bool run() {
        xla::Api api = {};
        api.create_error = create_error;
        void *values[5];
        for (int i = 0; i < 5; ++i) values[i] = &buffers[i];
        xla::Array lists[3] = {{xla::kS64, bytes.size(), bytes.data()},
                               {xla::kS64, call.size(), call.data()},
                               {xla::kS64, words.size(), words.data()}};
        xla::Scalar number = {xla::kS32, &pass};
        xla::Name names[4] = {{"bytes", 5}, {"call", 4}, {"pass", 4}, {"words", 5}};
        xla::Name *pointers[4] = {&names[0], &names[1], &names[2], &names[3]};
        int kinds[4] = {xla::kArray, xla::kArray, xla::kScalar, xla::kArray};
        void *attributes[4] = {&lists[0], &lists[1], &number, &lists[2]};
        xla::CallFrame frame = {};
        frame.struct_size = sizeof frame;
        frame.api = &api;
        frame.stage = xla::kExecute;
        frame.operands = {sizeof(xla::Buffers), nullptr, 3, types, values};
        frame.results = {sizeof(xla::Buffers), nullptr, 2, types + 3, values + 3};
        frame.attributes = {sizeof(xla::Attributes), nullptr, 4, kinds, pointers, attributes};
        last_message.clear();
        return anyattn_xla(&frame) == nullptr;
    }

    void refused(const char *text) {
        CHECK(!run());
        CHECK(last_message.find(text) != std::string::npos);
        CHECK(arrays[3] == std::vector<float>(kEntries, -1.0f));
    }
};

}  // namespace

TEST(xla_call_computes_into_the_results) {
    Program program;
    CHECK(program.run());
    CHECK(program.arrays[3] == std::vector<float>(kEntries, 2.5f));  // every value is 2.5
}

TEST(xla_asks_for_the_version) {
    xla::Metadata metadata = {};
    metadata.struct_size = sizeof metadata;
    metadata.version.major = metadata.version.minor = -1;
    xla::MetadataExtension extension = {{sizeof extension, xla::kMetadata, nullptr}, &metadata};
    xla::CallFrame frame = {};
    frame.extension = &extension.base;
    CHECK(anyattn_xla(&frame) == nullptr);
    CHECK(metadata.version.major == 0 && metadata.version.minor == 1);
}

TEST(xla_calls_that_do_not_fit_are_refused) {
    Program size;
    size.lse_sizes[2] = kSeqlen + 1;
    size.refused("result 1 must be an array of 12 bytes");
    Program type;
    type.buffers[0].type = 3;  // S16
    type.refused("operand 0 must be an array of 48 bytes");
    Program word;
    word.words[2] = int64_t(word.call.size());
    word.refused("operand 2");
    Program count;
    count.bytes.pop_back();
    count.refused("an entry for each array");
    Program longer;
    longer.call.resize(513);
    longer.refused("at most 4096 bytes");
    Program shorter;
    shorter.call.resize(offsetof(anyattn_call, message) / 8);
    shorter.words.assign(5, 1);
    shorter.refused("an anyattn_call of at most");
}

TEST(xla_reports_what_the_library_refuses) {
    Program scale;
    anyattn_call call;
    std::memcpy(&call, scale.call.data(), sizeof call);
    call.softcap = -1.0;
    std::memcpy(scale.call.data(), &call, sizeof call);
    scale.refused("softcap");
    CHECK(last_code == xla::kInvalidArgument);
    Program pass;
    pass.pass = 99;
    pass.refused("unsupported");
    CHECK(last_code == xla::kUnimplemented);
}
