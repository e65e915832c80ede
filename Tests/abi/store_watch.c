/* A watch's callback and its memory: once a store or a watch has been destroyed, no callback is
 * running and none starts, however slow it is and however much happens meanwhile. */
#include "store.h"

enum { LENGTH = 4096, ROUNDS = 6 };

static unsigned char *memory;
static mooncake_store_t *publisher;
static int is_over;

/* What a callback may use until its watch or store ends. */
typedef struct context {
  mooncake_store_t *store;
  mooncake_store_watch_t *watch;
  int slow_milliseconds;
  int ends_from_inside;
  int calls_store;
  int is_running;
  int is_gone;
  int count;
  int wrong;
} context_t;

static int load(int *value) { return __atomic_load_n(value, __ATOMIC_SEQ_CST); }

static void store_value(int *value, int new) { __atomic_store_n(value, new, __ATOMIC_SEQ_CST); }

static void note(int32_t kind, const mooncake_payload_info_t *payload, void *argument) {
  context_t *context = (context_t *)argument;
  (void)kind;
  (void)payload;
  if (load(&context->is_gone)) __atomic_add_fetch(&context->wrong, 1, __ATOMIC_SEQ_CST);
  store_value(&context->is_running, 1);
  __atomic_add_fetch(&context->count, 1, __ATOMIC_SEQ_CST);
  if (context->ends_from_inside) {
    CHECK_EQUAL(mooncake_store_watch_destroy(context->watch), MOONCAKE_ERROR_INVALID_ARGUMENT);
    CHECK_EQUAL(mooncake_store_destroy(context->store), MOONCAKE_ERROR_INVALID_ARGUMENT);
  }
  if (context->calls_store) {
    mooncake_store_result_t *result = NULL;
    if (mooncake_store_list(context->store, NULL, NULL, &result) == MOONCAKE_OK) {
      REQUIRE_OK(mooncake_store_result_free(result));
    }
  }
  if (context->slow_milliseconds) sleep_milliseconds(context->slow_milliseconds);
  if (load(&context->is_gone)) __atomic_add_fetch(&context->wrong, 1, __ATOMIC_SEQ_CST);
  store_value(&context->is_running, 0);
}

/* Keeps making changes. */
static void *publish(void *argument) {
  mooncake_buffer_t buffer = {memory, LENGTH};
  (void)argument;
  while (!load(&is_over)) {
    REQUIRE_OK(mooncake_store_register(publisher, "busy", &buffer, 1, NULL, NULL, NULL));
    REQUIRE_OK(mooncake_store_unregister(publisher, "busy", NULL));
  }
  return NULL;
}

static int wait_for(int *value, int least) {
  double end = seconds_now() + 15;
  while (load(value) < least && seconds_now() < end) sleep_milliseconds(1);
  return load(value) >= least;
}

static void begin(context_t *context, const char *name) {
  context->store = create_store(name);
  REQUIRE_OK(mooncake_store_watch_create(context->store, NULL, &context->watch, note, context));
}

static void check_silence(context_t *context) {
  store_value(&context->is_gone, 1);
  CHECK(!load(&context->is_running));
  int count = load(&context->count);
  sleep_milliseconds(60);
  CHECK_EQUAL(load(&context->count), count);
  CHECK_EQUAL(load(&context->wrong), 0);
}

/* The store ends during a callback; the watch's handle must still be ended. */
static void store_ends(int slow_milliseconds, int calls_store) {
  context_t context = {.slow_milliseconds = slow_milliseconds, .calls_store = calls_store};
  begin(&context, "watching");
  REQUIRE(wait_for(&context.count, 1));
  REQUIRE_OK(mooncake_store_destroy(context.store));
  check_silence(&context);
  REQUIRE_OK(mooncake_store_watch_destroy(context.watch));
  CHECK_EQUAL(mooncake_store_watch_destroy(context.watch), MOONCAKE_ERROR_INVALID_HANDLE);
}

static void watch_ends(int slow_milliseconds) {
  context_t context = {.slow_milliseconds = slow_milliseconds};
  begin(&context, "watching");
  REQUIRE(wait_for(&context.count, 1));
  REQUIRE_OK(mooncake_store_watch_destroy(context.watch));
  check_silence(&context);
  REQUIRE_OK(mooncake_store_destroy(context.store));
}

static void *destroy_store(void *argument) {
  context_t *context = (context_t *)argument;
  REQUIRE_OK(mooncake_store_destroy(context->store));
  CHECK(!load(&context->is_running));
  return NULL;
}

/* Two threads end the same watch: each returns only once no callback is running. */
static void both_end(void) {
  context_t context = {.slow_milliseconds = 100};
  pthread_t thread;
  begin(&context, "watching");
  REQUIRE(wait_for(&context.count, 1));
  REQUIRE(pthread_create(&thread, NULL, destroy_store, &context) == 0);
  REQUIRE_OK(mooncake_store_watch_destroy(context.watch));
  CHECK(!load(&context.is_running));
  store_value(&context.is_gone, 1);
  pthread_join(thread, NULL);
  CHECK_EQUAL(load(&context.wrong), 0);
}

/* A call that would wait for itself is refused, and everything goes on. */
static void ended_from_inside(void) {
  context_t context = {0};
  context.store = create_store("watching");
  REQUIRE_OK(mooncake_store_watch_create(context.store, "none", &context.watch, note, &context));
  context.ends_from_inside = 1;
  mooncake_buffer_t buffer = {memory, LENGTH};
  REQUIRE_OK(mooncake_store_register(context.store, "none/a", &buffer, 1, NULL, NULL, NULL));
  REQUIRE(wait_for(&context.count, 1));
  REQUIRE_OK(mooncake_store_unregister(context.store, "none/a", NULL));
  CHECK(wait_for(&context.count, 2));
  REQUIRE_OK(mooncake_store_watch_destroy(context.watch));
  REQUIRE_OK(mooncake_store_destroy(context.store));
}

int main(void) {
  memory = (unsigned char *)new_pages(LENGTH);
  start_store_server();
  publisher = create_store("publisher");
  ended_from_inside();
  pthread_t thread;
  REQUIRE(pthread_create(&thread, NULL, publish, NULL) == 0);
  store_ends(300, 0);
  watch_ends(300);
  both_end();
  for (int round = 0; round < ROUNDS; round += 1) {
    store_ends(round % 3, 0);
    store_ends(round % 3, 1);
    watch_ends(round % 3);
  }
  store_value(&is_over, 1);
  pthread_join(thread, NULL);
  REQUIRE_OK(mooncake_store_destroy(publisher));
  REQUIRE_OK(mooncake_metadata_server_stop(store_server));
  free(memory);
  return check_result("store_watch");
}
