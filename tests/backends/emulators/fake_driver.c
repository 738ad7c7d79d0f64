// Stands in for the drivers of CUDA and HIP, so that Triton's own launchers run on a machine without a GPU: nothing is
// computed, and each launch is handed to a callback with the parameters as the driver would get them.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>

// grid: programs along three axes, then threads of a program
typedef void (*Callback)(const uint32_t *grid, uint64_t stream, const void *function, void **parameters);
static Callback callback;
static uintptr_t functions;
static int context;

void fake_on_launch(Callback given) { callback = given; }

int cuLaunchKernelEx(const uint32_t *config, const void *function, void **parameters, void **extra) {
  (void)extra;
  callback(config, ((const uint64_t *)config)[4], function, parameters);
  return 0;
}

int hipModuleLaunchKernel(const void *function, uint32_t x, uint32_t y, uint32_t z, uint32_t threads, uint32_t block_y,
                          uint32_t block_z, uint32_t shared, uint64_t stream, void **parameters, void **extra) {
  (void)block_y, (void)block_z, (void)shared, (void)extra;
  callback((uint32_t[]){x, y, z, threads}, stream, function, parameters);
  return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  (void)module, (void)name;
  *function = (void *)++functions;
  return 0;
}

int hipModuleGetFunction(void **function, void *module, const char *name) {
  return cuModuleGetFunction(function, module, name);
}

int hipGetProcAddress(const char *name, void **found, int version, uint64_t flags, int *status) {
  (void)version, (void)flags, (void)status;
  *found = dlsym(RTLD_DEFAULT, name);
  return *found == NULL;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 75: *value = 9; break;       // compute capability, major
    case 76: *value = 0; break;       // and minor
    case 97: *value = 232448; break;  // shared memory per block
    default: *value = 132;
  }
  return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
  (void)function;
  *value = attribute == 0 ? 1024 : 0;  // most threads of a program
  return 0;
}

int hipFuncGetAttribute(int *value, int attribute, void *function) {
  (void)attribute, (void)function;
  *value = 1024;  // most threads of a program, and registers, whatever their number means
  return 0;
}

int hipDriverGetVersion(int *version) { return *version = 60000000, 0; }

int cuGetErrorString(int error, const char **text) {
  (void)error;
  *text = "fake";
  return 0;
}

int cuCtxGetCurrent(void **found) { return *found = &context, 0; }
int cuDeviceGet(int *device, int number) { return *device = number, 0; }
int cuDevicePrimaryCtxRetain(void **found, int device) { return (void)device, *found = &context, 0; }
int cuModuleLoadData(void **module, const void *image) { return (void)image, *module = &context, 0; }

// A tensor map as it was asked for: the callback's side reads it like this.
typedef struct {
  uint64_t address;
  uint32_t rank, swizzle;
  uint64_t shape[5], strides[4];  // innermost first; strides in bytes, of all but the innermost
  uint32_t box[5];
} Map;

int cuTensorMapEncodeTiled(Map *map, int type, uint32_t rank, void *address, const uint64_t *shape,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                           int swizzle) {
  (void)type, (void)steps, (void)interleave;
  *map = (Map){.address = (uint64_t)address, .rank = rank, .swizzle = (uint32_t)swizzle};
  for (uint32_t axis = 0; axis < rank; axis++) {
    map->shape[axis] = shape[axis];
    map->box[axis] = box[axis];
    if (axis + 1 < rank) map->strides[axis] = strides[axis];
  }
  return 0;
}

// What Triton's modules want to be there and these launches do not need.
#define NOT_NEEDED(name) \
  int name(void) { return 0; }
NOT_NEEDED(cuInit)
NOT_NEEDED(cuCtxGetDevice)
NOT_NEEDED(cuCtxGetLimit)
NOT_NEEDED(cuCtxSetCurrent)
NOT_NEEDED(cuCtxSetLimit)
NOT_NEEDED(cuDriverGetVersion)
NOT_NEEDED(cuFuncSetAttribute)
NOT_NEEDED(cuFuncSetCacheConfig)
NOT_NEEDED(cuModuleUnload)
NOT_NEEDED(cuOccupancyMaxActiveClusters)
NOT_NEEDED(cuPointerGetAttribute)
NOT_NEEDED(cuPointerGetAttributes)
NOT_NEEDED(cuStreamIsCapturing)
NOT_NEEDED(hipGetDeviceProperties)
NOT_NEEDED(hipGetErrorString)
NOT_NEEDED(hipGetLastError)
NOT_NEEDED(hipModuleLaunchCooperativeKernel)
NOT_NEEDED(hipModuleLoadDataEx)
NOT_NEEDED(hipModuleUnload)
NOT_NEEDED(hipPointerGetAttribute)
NOT_NEEDED(cuTensorMapEncodeIm2col)
