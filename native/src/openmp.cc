#include "openmp.h"

#if defined(ANYATTN_NO_OPENMP)

namespace anyattn {

const OpenMp *find_openmp() { return nullptr; }
void hold_openmp() {}
void release_openmp(bool) {}
void run_openmp(const OpenMp &, void (*)(void *), void *, int32_t) {}

}  // namespace anyattn

#else

#if !defined(_WIN32)  // there: openmp_windows.cc

#include <dlfcn.h>

#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <link.h>
#elif defined(__APPLE__)
#include <mach-o/dyld.h>
#endif

namespace anyattn {
namespace {

constexpr size_t kPath = 4096;

// Libraries that the process has loaded: PyTorch, and the preferred OpenMP runtime by its file name.
struct Loaded {
    char torch[kPath], runtime[kPath];
    int points;
};

const char *file_of(const char *path) {
    const char *slash = std::strrchr(path, '/');
    return slash ? slash + 1 : path;
}

bool starts_with(const char *text, const char *start) { return !std::strncmp(text, start, std::strlen(start)); }

int points_of(const char *file) {
    if (starts_with(file, "libgomp")) return 2;
    return starts_with(file, "libiomp5") || starts_with(file, "libomp.") || starts_with(file, "libomp-") ? 1 : 0;
}

void consider(Loaded *loaded, const char *path) {
    if (!path || std::strlen(path) >= kPath) return;
    const char *file = file_of(path);
    if (starts_with(file, "libtorch_cpu.")) std::strcpy(loaded->torch, path);
    if (points_of(file) <= loaded->points) return;
    loaded->points = points_of(file);
    std::strcpy(loaded->runtime, path);
}

// Returns the runtime that a library is linked to. A process may have several, and only PyTorch's follows its settings.
bool find_runtime_of(const char *library, char (&path)[kPath]) {
    void *handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) return false;
    Dl_info info{};
    void *address = dlsym(handle, "omp_get_max_threads");
    const bool found = address && dladdr(address, &info) && info.dli_fname && std::strlen(info.dli_fname) < kPath;
    if (found) std::strcpy(path, info.dli_fname);
    dlclose(handle);
    return found;
}

#if defined(__linux__)
int first_entry(dl_phdr_info *info, size_t, void *count) {
    *static_cast<uint64_t *>(count) = info->dlpi_adds;
    return 1;
}

uint64_t load_count() {
    uint64_t count = 0;
    dl_iterate_phdr(first_entry, &count);
    return count;
}

int visit(dl_phdr_info *info, size_t, void *loaded) {
    consider(static_cast<Loaded *>(loaded), info->dlpi_name);
    return 0;
}

void search(Loaded *loaded) { dl_iterate_phdr(visit, loaded); }
#elif defined(__APPLE__)
uint64_t load_count() { return _dyld_image_count(); }

void search(Loaded *loaded) {
    for (uint32_t i = 0; i < _dyld_image_count(); ++i) consider(loaded, _dyld_get_image_name(i));
}
#else
uint64_t load_count() { return 1; }
void search(Loaded *loaded) { consider(loaded, "libgomp.so.1"); }
#endif

template <class F>
bool bind(void *library, const char *name, F **function) {
    *function = reinterpret_cast<F *>(dlsym(library, name));
    return *function != nullptr;
}

// RTLD_NOLOAD loads nothing, but keeps the runtime loaded while this handle is open.
OpenMp *bind_runtime(const char *path) {
    void *library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return nullptr;
    OpenMp runtime{};
    const bool common = bind(library, "omp_get_thread_num", &runtime.thread_num) &&
                        bind(library, "omp_get_max_threads", &runtime.max_threads) &&
                        bind(library, "omp_in_parallel", &runtime.in_parallel);
    const bool gomp = bind(library, "GOMP_parallel", &runtime.gomp_parallel);
    const bool kmpc = bind(library, "__kmpc_fork_call", &runtime.kmpc_fork_call) &&
                      bind(library, "__kmpc_push_num_threads", &runtime.kmpc_push_num_threads) &&
                      bind(library, "__kmpc_global_thread_num", &runtime.kmpc_global_thread_num);
    if (!common || !(gomp || kmpc)) {
        dlclose(library);
        return nullptr;
    }
    const char *file = file_of(path);
    const size_t length = std::strcspn(file, ".-");
    std::memcpy(runtime.name, file, length < sizeof runtime.name ? length : sizeof runtime.name - 1);
    return new (std::nothrow) OpenMp(runtime);
}

// Locked before the system's list of libraries is read. Otherwise a forked child could inherit the lock of that list from
// a thread that it does not have.
std::mutex search_mutex;
OpenMp *found = nullptr;
uint64_t searched_at = 0;
char found_path[kPath];

const OpenMp *find_locked() {
    const uint64_t loads = load_count();
    if (loads == searched_at) return found;
    Loaded loaded{};
    search(&loaded);
    if (*loaded.torch) find_runtime_of(loaded.torch, loaded.runtime);
    // Tables of runtimes found earlier are kept, because other threads may use them.
    if (*loaded.runtime && std::strcmp(loaded.runtime, found_path) != 0) {
        if (OpenMp *runtime = bind_runtime(loaded.runtime)) {
            std::strcpy(found_path, loaded.runtime);
            found = runtime;
        }
    }
    searched_at = loads;
    return found;
}

}  // namespace

const OpenMp *find_openmp() {
    const std::lock_guard<std::mutex> lock(search_mutex);
    return find_locked();
}

void hold_openmp() {
    search_mutex.lock();
    find_locked();
}

void release_openmp(bool child) {
    if (child && found) found->inherited = true;
    search_mutex.unlock();
}

}  // namespace anyattn

#endif

namespace anyattn {
namespace {

struct Task {
    void (*body)(void *);
    void *context;
};

void microtask(int32_t *, int32_t *, void *context) {
    const Task &task = *static_cast<Task *>(context);
    task.body(task.context);
}

// The location that a compiler passes for a parallel region. The runtime only reads it.
struct Location {
    int32_t reserved_1, flags, reserved_2, reserved_3;
    const char *source;
};
Location location = {0, 2, 0, 0, ";unknown;unknown;0;0;;"};

}  // namespace

void run_openmp(const OpenMp &runtime, void (*body)(void *), void *context, int32_t threads) {
    if (runtime.gomp_parallel) {
        runtime.gomp_parallel(body, context, static_cast<unsigned>(threads), 0);
        return;
    }
    if (runtime.vcomp_fork) {
        runtime.vcomp_set_num_threads(threads);
        runtime.vcomp_fork(1, 1, body, context);
        return;
    }
    Task task{body, context};
    runtime.kmpc_push_num_threads(&location, runtime.kmpc_global_thread_num(&location), threads);
    runtime.kmpc_fork_call(&location, 1, microtask, &task);
}

}  // namespace anyattn

#endif
