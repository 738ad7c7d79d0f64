// The search for an OpenMP runtime on Windows. openmp.cc has the search on other systems.
#if defined(_WIN32) && !defined(ANYATTN_NO_OPENMP)

#include <windows.h>

#include <cstring>
#include <mutex>
#include <new>

#include "openmp.h"

namespace anyattn {
namespace {

// In a process without PyTorch: the runtimes of Intel, of LLVM (also part of Microsoft's compiler) and of Microsoft.
constexpr const char *kRuntimes[] = {"libiomp5md.dll", "libomp140.x86_64.dll", "libomp140.aarch64.dll", "libomp.dll",
                                     "vcomp140.dll"};

template <class F>
bool bind(HMODULE library, const char *name, F **function) {
    *function = reinterpret_cast<F *>(reinterpret_cast<void *>(GetProcAddress(library, name)));
    return *function != nullptr;
}

void name_runtime(HMODULE library, OpenMp *runtime) {
    char path[MAX_PATH] = "";
    GetModuleFileNameA(library, path, MAX_PATH - 1);
    const char *slash = std::strrchr(path, '\\'), *file = slash ? slash + 1 : path;
    const size_t length = std::strcspn(file, ".-");
    std::memcpy(runtime->name, file, length < sizeof runtime->name ? length : sizeof runtime->name - 1);
}

// Returns null if the library is not an OpenMP runtime. A runtime stays loaded from then on.
const OpenMp *bind_runtime(HMODULE library) {
    OpenMp runtime{};
    const bool common = bind(library, "omp_get_thread_num", &runtime.thread_num) &&
                        bind(library, "omp_get_max_threads", &runtime.max_threads) &&
                        bind(library, "omp_in_parallel", &runtime.in_parallel);
    const bool kmpc = bind(library, "__kmpc_fork_call", &runtime.kmpc_fork_call) &&
                      bind(library, "__kmpc_push_num_threads", &runtime.kmpc_push_num_threads) &&
                      bind(library, "__kmpc_global_thread_num", &runtime.kmpc_global_thread_num);
    // Intel's runtime has both.
    const bool vcomp = !kmpc && bind(library, "_vcomp_fork", &runtime.vcomp_fork) &&
                       bind(library, "_vcomp_set_num_threads", &runtime.vcomp_set_num_threads);
    constexpr DWORD pin = GET_MODULE_HANDLE_EX_FLAG_PIN | GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS;
    HMODULE pinned;
    if (!common || !(kmpc || vcomp) || !GetModuleHandleExA(pin, reinterpret_cast<LPCSTR>(library), &pinned)) {
        return nullptr;
    }
    name_runtime(library, &runtime);
    return new (std::nothrow) OpenMp(runtime);
}

// Returns the runtime that a loaded library imports. A process may have several, and only PyTorch's follows its settings.
const OpenMp *runtime_of(HMODULE library) {
    const char *image = reinterpret_cast<const char *>(library);
    const auto *dos = reinterpret_cast<const IMAGE_DOS_HEADER *>(image);
    const auto *headers = reinterpret_cast<const IMAGE_NT_HEADERS *>(image + dos->e_lfanew);
    const DWORD imports = headers->OptionalHeader.DataDirectory[IMAGE_DIRECTORY_ENTRY_IMPORT].VirtualAddress;
    if (!imports) return nullptr;
    for (auto entry = reinterpret_cast<const IMAGE_IMPORT_DESCRIPTOR *>(image + imports); entry->Name; ++entry) {
        const HMODULE imported = GetModuleHandleA(image + entry->Name);
        if (!imported || !GetProcAddress(imported, "omp_get_max_threads")) continue;
        if (const OpenMp *runtime = bind_runtime(imported)) return runtime;
    }
    return nullptr;
}

std::mutex search_mutex;
const OpenMp *found = nullptr;
bool is_torchs = false;
ULONGLONG searched_at = 0;

// Tables of runtimes found earlier are kept, because other threads may use them.
void search() {
    if (const HMODULE torch = GetModuleHandleA("torch_cpu.dll")) {
        if (const OpenMp *runtime = runtime_of(torch)) found = runtime;
        is_torchs = true;
        return;
    }
    for (const char *name : kRuntimes) {
        if (found) return;
        if (const HMODULE library = GetModuleHandleA(name)) found = bind_runtime(library);
    }
}

}  // namespace

// Searches at most once per tick, which lasts 10 to 16 ms.
const OpenMp *find_openmp() {
    const std::lock_guard<std::mutex> lock(search_mutex);
    const ULONGLONG tick = GetTickCount64();
    if (is_torchs || tick == searched_at) return found;
    searched_at = tick;
    search();
    return found;
}

void hold_openmp() {}
void release_openmp(bool) {}

}  // namespace anyattn

#endif
