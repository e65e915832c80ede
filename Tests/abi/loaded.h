/* The functions of mooncake.h that the dlopen programs call, and one round trip through them. These
 * programs are not linked with the library. */
#ifndef ABI_LOADED_H
#define ABI_LOADED_H

#include <dlfcn.h>

#include "mooncake.h"

#include "check.h"

#define LOADED_FUNCTIONS(each) \
  each(mooncake_version) \
  each(mooncake_version_number) \
  each(mooncake_error_name) \
  each(mooncake_error_message) \
  each(mooncake_engine_create) \
  each(mooncake_engine_destroy) \
  each(mooncake_engine_name) \
  each(mooncake_memory_register) \
  each(mooncake_memory_unregister) \
  each(mooncake_segment_open) \
  each(mooncake_transfer_sync)

#define LOADED_MEMBER(name) __typeof__(&name) name;
typedef struct loaded {
  void *handle;
  LOADED_FUNCTIONS(LOADED_MEMBER)
} loaded_t;
#undef LOADED_MEMBER

static inline void *loaded_symbol(void *handle, const char *name) {
  void *symbol = dlsym(handle, name);
  if (symbol == NULL) {
    fprintf(stderr, "%s: %s\n", name, dlerror());
    exit(1);
  }
  return symbol;
}

static inline loaded_t load_library(const char *path) {
  loaded_t library;
  library.handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library.handle == NULL) {
    fprintf(stderr, "dlopen: %s\n", dlerror());
    exit(1);
  }
#define LOADED_FILL(name) library.name = (__typeof__(&name))loaded_symbol(library.handle, #name);
  LOADED_FUNCTIONS(LOADED_FILL)
#undef LOADED_FILL
  return library;
}

#define LOADED_OK(library, call) \
  do { \
    int32_t code_ = (library)->call; \
    if (code_ != MOONCAKE_OK) { \
      fprintf(stderr, "%s:%d: %s gave %s: %s\n", __FILE__, __LINE__, #call, \
              (library)->mooncake_error_name(code_), (library)->mooncake_error_message()); \
      exit(1); \
    } \
  } while (0)

enum { LOADED_LENGTH = 1 << 20 };

/* An engine with LOADED_LENGTH * 2 registered bytes. */
static inline mooncake_engine_t *loaded_create(const loaded_t *library, unsigned char **memory) {
  mooncake_engine_t *engine = NULL;
  *memory = (unsigned char *)new_pages(LOADED_LENGTH * 2);
  LOADED_OK(library, mooncake_engine_create(NULL, &engine));
  REQUIRE(engine != NULL);
  LOADED_OK(library,
            mooncake_memory_register(engine, *memory, LOADED_LENGTH * 2, NULL,
                                     MOONCAKE_ACCESS_REMOTE_READ | MOONCAKE_ACCESS_REMOTE_WRITE));
  return engine;
}

/* Writes the first half into the second through the engine's own segment and compares. */
static inline void loaded_round_trip(const loaded_t *library, mooncake_engine_t *engine,
                                     unsigned char *memory, uint64_t seed) {
  char name[256];
  mooncake_segment_t segment = -1;
  mooncake_transfer_request_t request;
  LOADED_OK(library, mooncake_engine_name(engine, name, sizeof name, NULL));
  LOADED_OK(library, mooncake_segment_open(engine, name, 10000, &segment));
  fill_pattern(memory, LOADED_LENGTH, seed);
  memset(&request, 0, sizeof request);
  request.opcode = MOONCAKE_OPCODE_WRITE;
  request.segment = segment;
  request.source = memory;
  request.target_offset = (uint64_t)(uintptr_t)(memory + LOADED_LENGTH);
  request.length = LOADED_LENGTH;
  LOADED_OK(library, mooncake_transfer_sync(engine, &request, 1, 10000));
  REQUIRE(has_pattern(memory + LOADED_LENGTH, LOADED_LENGTH, seed));
}

static inline void loaded_destroy(const loaded_t *library, mooncake_engine_t *engine,
                                  unsigned char *memory) {
  LOADED_OK(library, mooncake_engine_destroy(engine));
  free(memory);
}

#endif
