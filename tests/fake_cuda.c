// Stands in for libcuda.so.1, so that Triton's own launchers run on a machine without a GPU: nothing is computed, and
// each launch is handed to a callback with the parameters as the driver would get them.
#include <stddef.h>
#include <stdint.h>

typedef void (*Callback)(const uint32_t *config, const void *function, void **parameters);
static Callback callback;
static uintptr_t functions;
static int context;

void fake_cuda_on_launch(Callback given) { callback = given; }

int cuLaunchKernelEx(const uint32_t *config, const void *function, void **parameters, void **extra) {
  (void)extra;
  callback(config, function, parameters);
  return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  (void)module, (void)name;
  *function = (void *)++functions;
  return 0;
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
  *value = attribute == 0 ? 1024 : 0;  // most threads per block
  return 0;
}

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

// What Triton's modules are linked with and these launches do not need.
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
NOT_NEEDED(cuTensorMapEncodeIm2col)
