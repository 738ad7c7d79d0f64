// A Vulkan driver that ends every process that loads it, and first adds a byte to the file that BROKEN_DRIVER_LOG names.
#include <stdio.h>
#include <stdlib.h>

static void end(void) {
  const char *name = getenv("BROKEN_DRIVER_LOG");
  FILE *file = name ? fopen(name, "ab") : NULL;
  if (file) {
    fputc('x', file);
    fclose(file);
  }
  fputs("broken driver: no GPU here\n", stderr);
  abort();
}

int vk_icdNegotiateLoaderICDInterfaceVersion(unsigned *version) {
  (void)version;
  end();
  return 0;
}

void *vk_icdGetInstanceProcAddr(void *instance, const char *name) {
  (void)instance, (void)name;
  end();
  return NULL;
}
