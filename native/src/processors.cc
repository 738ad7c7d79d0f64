#include "processors.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace anyattn {
namespace {

constexpr size_t kPath = 4096;

class File {
  public:
    explicit File(const char *path) : file_(std::fopen(path, "r")) {}
    ~File() {
        if (file_) std::fclose(file_);
    }
    File(const File &) = delete;
    File &operator=(const File &) = delete;

    // Reads the next line without its line end. Returns false after the last line.
    bool line(char (&text)[kPath]) {
        if (!file_ || !std::fgets(text, sizeof text, file_)) return false;
        text[std::strcspn(text, "\n")] = 0;
        return true;
    }

  private:
    std::FILE *file_;
};

int32_t affinity() {
#if defined(__linux__)
    for (int32_t cpus = 1024; cpus <= 1 << 18; cpus *= 4) {
        cpu_set_t *set = CPU_ALLOC(static_cast<size_t>(cpus));
        if (!set) break;
        const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(cpus));
        const int count = sched_getaffinity(0, bytes, set) == 0 ? CPU_COUNT_S(bytes, set) : 0;
        CPU_FREE(set);
        if (count > 0) return count;
    }
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count > 0 ? static_cast<int32_t>(count) : 1;
}

bool read_line(const char *folder, const char *name, char (&text)[kPath]) {
    char path[kPath];
    const int length = std::snprintf(path, sizeof path, "%s/%s", folder, name);
    return length > 0 && length < int(sizeof path) && File(path).line(text);
}

// Microseconds of processor time per period: "max 100000" or "150000 100000" in one file, or -1 in the first of two.
int32_t quota_of(const char *folder) {
    char text[kPath], period_text[kPath];
    long long time = 0, period = 0;
    if (read_line(folder, "cpu.max", text)) {
        if (std::sscanf(text, "%lld %lld", &time, &period) != 2) return 0;
    } else if (read_line(folder, "cpu.cfs_quota_us", text) && read_line(folder, "cpu.cfs_period_us", period_text)) {
        time = std::atoll(text);
        period = std::atoll(period_text);
    }
    if (time <= 0 || period <= 0) return 0;
    const long long whole = (time + period - 1) / period;
    return whole < (1 << 20) ? static_cast<int32_t>(whole) : 0;
}

int32_t smaller(int32_t a, int32_t b) { return a == 0 ? b : b == 0 || a < b ? a : b; }

// Returns the lowest quota of a group and its parents. In a container, the group of the process may appear as the root.
int32_t quota_above(const char *root, const char *mount, const char *group) {
    char folder[kPath];
    const int start = std::snprintf(folder, sizeof folder, "%s%s", root, mount);
    const int length = std::snprintf(folder, sizeof folder, "%s%s%s", root, mount, group);
    if (length < 0 || length >= int(sizeof folder)) return 0;
    int32_t least = quota_of(folder);
    while (char *slash = std::strrchr(folder + start, '/')) {
        *slash = 0;
        least = smaller(least, quota_of(folder));
    }
    return least;
}

bool names_cpu(const char *controllers, size_t length) {
    for (const char *name = controllers; name < controllers + length; ++name) {
        const size_t size = std::strcspn(name, ",:");
        if (size == 3 && !std::strncmp(name, "cpu", 3)) return true;
        name += size;
    }
    return false;
}

// Initialised here and not at first use, because a child that was forked during the initialisation would wait forever.
const int32_t granted = quota("");

}  // namespace

int32_t quota(const char *root) {
    char path[kPath], line[kPath];
    if (std::snprintf(path, sizeof path, "%s/proc/self/cgroup", root) >= int(sizeof path)) return 0;
    int32_t least = 0;
    File groups(path);
    while (groups.line(line)) {  // "0::/group" (version 2) or "7:cpu,cpuacct:/group"
        const char *controllers = std::strchr(line, ':');
        const char *group = controllers ? std::strchr(controllers + 1, ':') : nullptr;
        if (!group) continue;
        const size_t length = static_cast<size_t>(group++ - ++controllers);
        if (length == 0) {
            for (const char *mount : {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}) {
                least = smaller(least, quota_above(root, mount, group));
            }
        } else if (names_cpu(controllers, length)) {
            for (const char *mount : {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"}) {
                least = smaller(least, quota_above(root, mount, group));
            }
        }
    }
    return least;
}

int32_t processors() {
    const int32_t allowed = affinity();
    return granted > 0 && granted < allowed ? granted : allowed;
}

int32_t omp_num_threads(const char *text) {
    if (!text) return 0;
    int32_t first = 0;
    do {
        char *end;
        const long number = std::strtol(text, &end, 10);
        if (end == text || number < 1) return 0;
        if (first == 0) first = number < (1 << 20) ? static_cast<int32_t>(number) : 1 << 20;
        text = end + std::strspn(end, " \t");
    } while (*text++ == ',');
    return text[-1] ? 0 : first;
}

}  // namespace anyattn
