#include <atomic>
#include <functional>
#include <thread>

#include "check.h"
#include "crowd.h"
#include "fixture.h"
#include "reference.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace {

Config large() {
    Config config;
    config.batch = 2;
    config.nheads = 4;
    config.nheads_kv = 2;
    config.seqlen_q = 300;
    config.seqlen_k = 280;
    config.head_dim = 16;
    config.head_dim_v = 24;
    config.flags = ANYATTN_HAS_RIGHT;
    config.bias = 1;
    config.sink = true;
    config.seqused_q = config.seqused_k = true;
    return config;
}

// Packed rows with gaps, and a cache of which some entries belong to nobody.
Config packed() {
    Config config = large();
    config.batch = 5;
    config.seqlen_q = 150;
    config.bias = -1;
    config.packed_q = config.packed_k = true;
    return config;
}

Config cached() {
    Config config = packed();
    config.packed_k = false;
    config.cache_batch_idx = true;
    return config;
}

Config selected() {
    Config config = large();
    config.kv_indices = 90;
    return config;
}

std::string bytes_of(const anyattn_array &array, Index dims) {
    const int64_t bytes = dims.a * dims.b * dims.c * dims.d * size_of(array.dtype);
    return array.data ? std::string(static_cast<const char *>(array.data), static_cast<size_t>(bytes)) : "";
}

// Everything that the two passes write, byte for byte.
std::string results(const anyattn_call &c) {
    return bytes_of(c.out, dims_q(c, c.head_dim_v)) + bytes_of(c.lse, dims_q(c, 1)) +
           bytes_of(c.dq, dims_q(c, c.head_dim)) + bytes_of(c.dk, dims_k(c, c.head_dim)) +
           bytes_of(c.dv, dims_k(c, c.head_dim_v)) + bytes_of(c.dbias, {1, c.nheads, c.seqlen_q, c.seqlen_k}) +
           bytes_of(c.dsink, {1, 1, 1, c.nheads});
}

std::string run(Config config, int32_t threads, const std::function<void(anyattn_call &)> &change = {}) {
    config.threads = threads;
    Fixture fixture(config);
    if (change) change(fixture.call);
    CHECK(fixture.forward() == ANYATTN_SUCCESS);
    CHECK(fixture.backward() == ANYATTN_SUCCESS);
    return results(fixture.call);
}

}  // namespace

TEST(any_number_of_threads_gives_the_same_bits) {
    for (int32_t target : targets()) {
        for (Config config : {large(), packed(), cached(), selected()}) {
            config.target = target;
            const std::string one = run(config, 1);
            for (int32_t threads : {2, 3, 7, 0}) CHECK(run(config, threads) == one);
        }
    }
}

// Backward, more threads than heads cut every head along its rows and its keys.
TEST(more_threads_than_heads_give_the_same_bits) {
    std::vector<Config> configs(6);
    for (Config &config : configs) {
        config.batch = 2;
        config.nheads = 8;
        config.nheads_kv = 4;
        config.seqlen_q = 500;
        config.seqlen_k = 620;
        config.head_dim = 64;
        config.head_dim_v = 48;
        config.scale = 0.125;
        config.flags = ANYATTN_HAS_RIGHT;
        config.sink = true;
    }
    configs[0].flags = ANYATTN_HAS_RIGHT | ANYATTN_ACCUMULATE;
    configs[1].dtype = ANYATTN_BFLOAT16;
    configs[2].leftpad = configs[2].seqused_k = configs[2].seqused_q = true;
    configs[3].packed_q = configs[3].packed_k = true;
    configs[4].bias = 0;
    configs[5].nheads = configs[5].nheads_kv = 1;
    configs[5].flags = ANYATTN_BATCH_INVARIANT;
    for (const Config &config : configs) {
        const std::string one = run(config, 1);
        for (int32_t threads : {13, 32}) CHECK(run(config, threads) == one);
    }
}

// OpenMP's threads where a runtime is loaded, and the own ones.
TEST(any_pool_gives_the_same_bits) {
    const std::string one = run(large(), 1);
    for (int32_t pool : {ANYATTN_POOL_OWN, ANYATTN_POOL_OPENMP, ANYATTN_POOL_AUTOMATIC}) {
        CHECK(anyattn_set_pool(pool) == ANYATTN_SUCCESS);
        CHECK(run(large(), 3) == one);
        CHECK(pool != ANYATTN_POOL_OWN || anyattn_thread_runtime() == std::string("anyattn"));
    }
    CHECK(anyattn_set_pool(-1) == ANYATTN_INVALID_VALUE && anyattn_set_pool(3) == ANYATTN_INVALID_VALUE);
}

#if defined(_WIN32)
// Microsoft's runtime, which wine has too. A search may be a tick old.
TEST(an_openmp_runtime_that_is_loaded_later) {
    const std::string one = run(large(), 1);
    CHECK(anyattn_thread_runtime() == std::string("anyattn"));
    if (!LoadLibraryA("vcomp140.dll")) {
        std::printf("this system has no vcomp140.dll\n");
        return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(anyattn_thread_runtime() == std::string("vcomp140"));
    CHECK(anyattn_set_pool(ANYATTN_POOL_OPENMP) == ANYATTN_SUCCESS);
    for (int32_t threads : {2, 3, 0}) CHECK(run(large(), threads) == one);
    CHECK(anyattn_set_pool(ANYATTN_POOL_AUTOMATIC) == ANYATTN_SUCCESS);
}
#endif

TEST(threads_that_are_kept_waiting_are_left_alone_for_a_while) {
    anyattn::Crowd crowd;
    CHECK(!crowd.crowded());
    crowd.region_ended(anyattn::Crowd::now());
    CHECK(!crowd.crowded());
    crowd.region_ended(anyattn::Crowd::now() - 5000000);
    CHECK(crowd.crowded());
    std::this_thread::sleep_for(std::chrono::milliseconds(150));
    CHECK(!crowd.crowded());
}

TEST(callers_side_by_side) {
    const std::string one = run(large(), 1);
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&] {
            for (int repeat = 0; repeat < 5; ++repeat) wrong += run(large(), 3) != one;
        });
    }
    for (std::thread &caller : callers) caller.join();
    CHECK(wrong == 0);
}

TEST(many_small_calls) {
    Config config;
    config.batch = 4;
    config.seqlen_q = config.seqlen_k = 64;
    config.nheads = 8;
    config.head_dim = 32;
    Fixture fixture(config);
    fixture.call.num_threads = 3;
    CHECK(fixture.forward() == ANYATTN_SUCCESS);
    const std::string first = bytes_of(fixture.call.out, dims_q(fixture.call, 8));
    for (int repeat = 0; repeat < 200; ++repeat) CHECK(anyattn_forward(&fixture.call) == ANYATTN_SUCCESS);
    CHECK(bytes_of(fixture.call.out, dims_q(fixture.call, 8)) == first);
}

TEST(parallel_for_of_the_caller) {
    const std::string one = run(large(), 1);
    int64_t tasks_seen = 0;
    CHECK(run(large(), 3, [&](anyattn_call &call) {
              call.parallel_for_user = &tasks_seen;
              call.parallel_for = [](void *user, int64_t tasks, int32_t threads, anyattn_body body, void *context) {
                  *static_cast<int64_t *>(user) += tasks;
                  for (int64_t task = tasks - 1; task >= 0; --task) body(context, task, int32_t(task % threads));
              };
          }) == one);
    CHECK(tasks_seen > 0);
}

TEST(parallel_for_that_is_wrong) {
    Fixture fixture(large());
    fixture.call.num_threads = 2;
    fixture.call.parallel_for = [](void *, int64_t tasks, int32_t, anyattn_body body, void *context) {
        for (int64_t task = 0; task + 1 < tasks; ++task) body(context, task, 0);
    };
    CHECK(anyattn_forward(&fixture.call) == ANYATTN_INVALID_VALUE);
    fixture.call.parallel_for = [](void *, int64_t tasks, int32_t, anyattn_body body, void *context) {
        for (int64_t task = 0; task < tasks; ++task) body(context, task, 9);
    };
    CHECK(anyattn_forward(&fixture.call) == ANYATTN_INVALID_VALUE);
}

// A call that a task of the caller's own parallel_for makes, inside another call.
TEST(calls_inside_calls) {
    const std::string one = run(large(), 1);
    static bool inner_was_right;
    inner_was_right = false;
    CHECK(run(large(), 2, [&](anyattn_call &call) {
              call.parallel_for_user = const_cast<std::string *>(&one);
              call.parallel_for = [](void *user, int64_t tasks, int32_t, anyattn_body body, void *context) {
                  for (int64_t task = 0; task < tasks; ++task) {
                      body(context, task, 0);
                      if (task == 1) inner_was_right = run(large(), 2) == *static_cast<std::string *>(user);
                  }
              };
          }) == one);
    CHECK(inner_was_right);
}

// qemu's own threads do not survive a fork.
#if !defined(_WIN32) && !defined(ANYATTN_EMULATED)
// The child has none of the threads that its parent started.
TEST(a_forked_child_computes) {
    const std::string one = run(large(), 3);
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        _exit(run(large(), 3) == one && run(large(), 2) == one ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(run(large(), 3) == one);
}
#endif
