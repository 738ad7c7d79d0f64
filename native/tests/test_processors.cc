#include "../src/processors.h"

#include <cstdio>
#include <string>

#include "check.h"

#if defined(__linux__)
#include <filesystem>
#include <fstream>
#include <stdlib.h>
#endif

TEST(number_of_openmp) {
    const struct {
        const char *text;
        int32_t threads;
    } cases[] = {{nullptr, 0},   {"", 0},    {"0", 0},  {"abc", 0},    {"-3", 0},  {"4", 4},
                 {"4,2", 4},     {"4,0", 0}, {"4,", 0}, {",4", 0},     {"4 2", 0}, {"1.5", 0},
                 {" 8 , 2 ", 8}, {"+6", 6},  {"4;", 0}, {"5000", 5000}};
    for (const auto &c : cases) CHECK(anyattn::omp_num_threads(c.text) == c.threads);
    CHECK(anyattn::omp_num_threads("99999999999999999999") > 4096);
    CHECK(anyattn::processors() >= 1);
}

#if defined(__linux__)
namespace {

namespace fs = std::filesystem;

// A folder that looks like the root of a file system.
class Root {
  public:
    Root() {
        char name[] = "/tmp/anyattn-XXXXXX";
        path_ = mkdtemp(name);
    }
    ~Root() { fs::remove_all(path_); }

    Root &write(const std::string &file, const std::string &text) {
        fs::create_directories((path_ + file).substr(0, (path_ + file).rfind('/')));
        std::ofstream(path_ + file) << text << "\n";
        return *this;
    }
    int32_t quota() const { return anyattn::quota(path_.c_str()); }

  private:
    std::string path_;
};

const std::string kGroups = "/proc/self/cgroup", kTwo = "/sys/fs/cgroup", kOne = "/sys/fs/cgroup/cpu,cpuacct";

}  // namespace

TEST(quota_of_version_two) {
    CHECK(Root().quota() == 0);
    CHECK(Root().write(kGroups, "0::/").quota() == 0);
    CHECK(Root().write(kGroups, "0::/").write(kTwo + "/cpu.max", "max 100000").quota() == 0);
    CHECK(Root().write(kGroups, "0::/").write(kTwo + "/cpu.max", "400000 100000").quota() == 4);
    CHECK(Root().write(kGroups, "0::/a/b").write(kTwo + "/a/b/cpu.max", "150000 100000").quota() == 2);
    CHECK(Root().write(kGroups, "0::/a/b").write(kTwo + "/a/b/cpu.max", "1000 100000").quota() == 1);
    // The group's own name is unknown inside a container: its root is the group.
    CHECK(Root().write(kGroups, "0::/docker/0123").write(kTwo + "/cpu.max", "300000 100000").quota() == 3);
}

TEST(least_quota_of_all_above) {
    Root root;
    root.write(kGroups, "0::/a/b").write(kTwo + "/a/b/cpu.max", "800000 100000");
    CHECK(root.quota() == 8);
    CHECK(root.write(kTwo + "/a/cpu.max", "300000 100000").quota() == 3);
    CHECK(root.write(kTwo + "/a/b/cpu.max", "max 100000").quota() == 3);
}

TEST(quota_of_version_one) {
    Root root;
    root.write(kGroups, "4:memory:/x\n3:cpuset:/x\n2:cpu,cpuacct:/x/y\n1:name=systemd:/");
    CHECK(root.quota() == 0);
    CHECK(root.write(kOne + "/x/y/cpu.cfs_quota_us", "-1").quota() == 0);
    CHECK(root.write(kOne + "/x/y/cpu.cfs_period_us", "50000").quota() == 0);
    CHECK(root.write(kOne + "/x/y/cpu.cfs_quota_us", "100001").quota() == 3);
    CHECK(Root().write(kGroups, "7:cpuset:/").write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "1").quota() == 0);
}

TEST(nonsense_is_no_quota) {
    Root root;
    for (const char *text : {"", "abc", "0 0", "100000 0", "-5 100000", "100000", "max"}) {
        CHECK(root.write(kGroups, "0::/").write(kTwo + "/cpu.max", text).quota() == 0);
    }
    for (const char *text : {"", ":", "::", "0:", "x:y", "2:cpu"}) CHECK(Root().write(kGroups, text).quota() == 0);
    CHECK(Root().write(kGroups, "0::/" + std::string(5000, 'a')).quota() == 0);
}
#endif
