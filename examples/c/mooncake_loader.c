#include "mooncake_loader.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ENTRY(name) { "mooncake_" #name, offsetof(mooncake_library_t, name) }

/* Each function's name and its place in the struct. */
static const struct {
  const char *name;
  size_t offset;
} entries[] = {
    ENTRY(version),         ENTRY(error_name),        ENTRY(error_message),
    ENTRY(engine_create),   ENTRY(engine_destroy),    ENTRY(engine_options_init),
    ENTRY(engine_name),     ENTRY(engine_metrics),    ENTRY(memory_register),
    ENTRY(memory_allocate), ENTRY(memory_unregister), ENTRY(memory_free),
    ENTRY(segment_open),    ENTRY(segment_close),     ENTRY(segment_buffers),
    ENTRY(batch_create),    ENTRY(batch_submit),      ENTRY(batch_wait),
    ENTRY(batch_poll),      ENTRY(batch_free),
};

int mooncake_library_open(mooncake_library_t *library, const char *path, char *error,
                          size_t capacity) {
  memset(library, 0, sizeof *library);
  if (path == NULL) {
    path = getenv("MOONCAKE_LIBRARY");
    if (path == NULL || *path == '\0') path = "libmooncake.so.0";
  }
  library->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library->handle == NULL) {
    snprintf(error, capacity, "cannot load %s: %s", path, dlerror());
    return -1;
  }
  for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
    void *function = dlsym(library->handle, entries[i].name);
    if (function == NULL) {
      snprintf(error, capacity, "%s has no function %s; it is older than this program", path,
               entries[i].name);
      mooncake_library_close(library);
      return -1;
    }
    /* ISO C cannot convert object pointers to function pointers; POSIX guarantees equal bytes. */
    memcpy((char *)library + entries[i].offset, &function, sizeof function);
  }
  return 0;
}

void mooncake_library_close(mooncake_library_t *library) {
  if (library->handle != NULL) dlclose(library->handle);
  memset(library, 0, sizeof *library);
}
