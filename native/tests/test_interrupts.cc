#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "fixture.h"

namespace {

// Long enough to be asked on every machine: with the slowest instruction set.
Config large() {
    Config config;
    config.target = targets().back();
    config.seqlen_q = config.seqlen_k = 1500;
    config.nheads = 4;
    config.nheads_kv = 2;
    config.head_dim = config.head_dim_v = 64;
    config.scale = 0.125;
    config.threads = 2;
    return config;
}

std::string bytes_of(const anyattn_array &array, Index dims) {
    const int64_t bytes = dims.a * dims.b * dims.c * dims.d * size_of(array.dtype);
    return std::string(static_cast<const char *>(array.data), static_cast<size_t>(bytes));
}

std::string inputs(const anyattn_call &c) {
    return bytes_of(c.q, dims_q(c, 64)) + bytes_of(c.k, dims_k(c, 64)) + bytes_of(c.v, dims_k(c, 64));
}

std::string results(const anyattn_call &c) {
    return bytes_of(c.out, dims_q(c, 64)) + bytes_of(c.lse, dims_q(c, 1)) + bytes_of(c.dq, dims_q(c, 64)) +
           bytes_of(c.dk, dims_k(c, 64)) + bytes_of(c.dv, dims_k(c, 64));
}

// Answers "go on" so often, then "stop".
struct Asked {
    int left, times = 0;
    std::vector<std::thread::id> threads;

    explicit Asked(int go_on) : left(go_on) {}
    static int32_t poll(void *user) {
        Asked &self = *static_cast<Asked *>(user);
        ++self.times;
        self.threads.push_back(std::this_thread::get_id());
        return self.left-- <= 0;
    }
    bool only_by(std::thread::id id) const {
        return std::all_of(threads.begin(), threads.end(), [&](std::thread::id other) { return other == id; });
    }
};

void ask(anyattn_call *call, Asked *asked) {
    call->poll = asked ? Asked::poll : nullptr;
    call->poll_user = asked;
}

}  // namespace

TEST(poll_ends_a_call_and_the_next_one_is_right) {
    Fixture fixture(large());
    anyattn_call &call = fixture.call;
    CHECK(fixture.forward() == ANYATTN_SUCCESS && fixture.backward() == ANYATTN_SUCCESS);
    const std::string given = inputs(call), want = results(call);
    for (int32_t threads : {1, 3}) {
        call.num_threads = threads;
        for (const auto pass : {anyattn_forward, anyattn_backward}) {
            Asked asked(0);
            ask(&call, &asked);
            CHECK(pass(&call) == ANYATTN_INTERRUPTED);
            CHECK(std::string(fixture.message()) == "poll ended the call");
            CHECK(asked.times == 1 && asked.only_by(std::this_thread::get_id()));
            CHECK(inputs(call) == given);
            ask(&call, nullptr);
            CHECK(fixture.forward() == ANYATTN_SUCCESS && fixture.backward() == ANYATTN_SUCCESS);
            CHECK(results(call) == want);
        }
    }
}

TEST(poll_that_lets_the_call_go_on_changes_nothing) {
    Fixture fixture(large());
    CHECK(fixture.forward() == ANYATTN_SUCCESS && fixture.backward() == ANYATTN_SUCCESS);
    const std::string want = results(fixture.call);
    Asked asked(1 << 30);
    ask(&fixture.call, &asked);
    CHECK(fixture.forward() == ANYATTN_SUCCESS && fixture.backward() == ANYATTN_SUCCESS);
    CHECK(results(fixture.call) == want);
    CHECK(asked.times > 0 && asked.only_by(std::this_thread::get_id()));
}

TEST(poll_may_compute) {
    Fixture fixture(large());
    CHECK(fixture.forward() == ANYATTN_SUCCESS);
    const std::string want = bytes_of(fixture.call.out, dims_q(fixture.call, 64));
    static bool was_right;
    was_right = true;
    fixture.call.poll = [](void *) {
        Config config;
        config.threads = 2;
        Fixture inner(config);
        was_right = was_right && inner.forward() == ANYATTN_SUCCESS;
        return int32_t(0);
    };
    CHECK(fixture.forward() == ANYATTN_SUCCESS && was_right);
    CHECK(bytes_of(fixture.call.out, dims_q(fixture.call, 64)) == want);
}

TEST(short_calls_ask_nobody) {
    Fixture fixture(Config{});
    Asked asked(0);
    ask(&fixture.call, &asked);
    CHECK(fixture.forward() == ANYATTN_SUCCESS && fixture.backward() == ANYATTN_SUCCESS);
    CHECK(asked.times == 0);
}
