/* Short-lived threads load, use and unload the library. */
#include <pthread.h>

#include "loaded.h"

static const char *library_path;

/* Loads, works and unloads, all on one thread that then ends. */
static void *load_use_close(void *argument) {
  uint64_t seed = (uint64_t)(uintptr_t)argument;
  unsigned char *memory = NULL;
  loaded_t library = load_library(library_path);
  mooncake_engine_t *engine = loaded_create(&library, &memory);
  loaded_round_trip(&library, engine, memory, seed);
  loaded_destroy(&library, engine, memory);
  /* The failure leaves a message in this thread's storage, which must outlive dlclose(). */
  CHECK_EQUAL(library.mooncake_engine_destroy(engine), MOONCAKE_ERROR_INVALID_HANDLE);
  CHECK(library.mooncake_error_message()[0] != 0);
  CHECK(dlclose(library.handle) == 0);
  return NULL;
}

typedef struct left_behind {
  loaded_t library;
  mooncake_engine_t *engine;
  unsigned char *memory;
} left_behind_t;

/* Loads, creates an engine, and unloads the library while the engine lives. */
static void *load_create_close(void *argument) {
  left_behind_t *left = (left_behind_t *)argument;
  left->library = load_library(library_path);
  left->engine = loaded_create(&left->library, &left->memory);
  CHECK(dlclose(left->library.handle) == 0);
  return NULL;
}

static void run_thread(void *(*body)(void *), void *argument) {
  pthread_t thread;
  REQUIRE(pthread_create(&thread, NULL, body, argument) == 0);
  REQUIRE(pthread_join(thread, NULL) == 0);
}

int main(int argument_count, char **arguments) {
  pthread_t threads[4];
  left_behind_t left;
  REQUIRE(argument_count == 2);
  library_path = arguments[1];

  run_thread(load_use_close, (void *)1);
  run_thread(load_use_close, (void *)2);

  for (uintptr_t index = 0; index < 4; index += 1) {
    REQUIRE(pthread_create(&threads[index], NULL, load_use_close, (void *)(index + 10)) == 0);
  }
  for (int index = 0; index < 4; index += 1) {
    REQUIRE(pthread_join(threads[index], NULL) == 0);
  }

  run_thread(load_create_close, &left);
  loaded_round_trip(&left.library, left.engine, left.memory, 3);
  loaded_destroy(&left.library, left.engine, left.memory);

  void *still_there = dlopen(library_path, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  CHECK(still_there != NULL);
  if (still_there != NULL) dlclose(still_there);
  run_thread(load_use_close, (void *)4);
  return check_result("dlopen_threads");
}
