/* The only holder is stopped: deadline, cancel, progress callback and closing the store each
 * soon end what waits for it, and nothing touches the caller's memory afterwards. */
#include "store.h"

enum { LENGTH = CHILD_LENGTH };

/* Seconds; a question to a holder takes at most 2. */
static const double LIMIT = 1.5;

static unsigned char *memory;

typedef struct call {
  mooncake_store_t *store;
  mooncake_store_operation_t operation;
  int is_read;
  int32_t code;
  double seconds;
  pthread_t thread;
} call_t;

static int32_t stop_after(const mooncake_store_progress_t *progress, void *context) {
  (void)progress;
  return seconds_now() > *(double *)context;
}

static void *run(void *argument) {
  call_t *call = (call_t *)argument;
  mooncake_buffer_t buffer = {memory, LENGTH};
  double start = seconds_now();
  if (call->is_read) {
    call->code = mooncake_store_read(call->store, CHILD_PAYLOAD, 0, memory, LENGTH,
                                     &call->operation);
  } else {
    call->code = mooncake_store_get(call->store, CHILD_PAYLOAD, &buffer, 1, NULL,
                                    &call->operation, NULL);
  }
  call->seconds = seconds_now() - start;
  return NULL;
}

static call_t begin(mooncake_store_t *store, int is_read) {
  call_t call;
  memset(&call, 0, sizeof call);
  call.store = store;
  call.is_read = is_read;
  call.operation = operation_defaults();
  call.operation.timeout_ms = 60000;
  return call;
}

static void check_end(const call_t *call, int32_t code, const char *what) {
  if (!CHECK(call->code == code) || !CHECK(call->seconds < LIMIT)) {
    fprintf(stderr, "  %s of a %s: %s after %.3f s\n", what, call->is_read ? "read" : "get",
            mooncake_error_name(call->code), call->seconds);
  }
}

static void try_all(mooncake_store_t *store, int is_read) {
  mooncake_cancellation_t *cancellation = NULL;
  call_t call = begin(store, is_read);
  call.operation.timeout_ms = 300;
  run(&call);
  check_end(&call, MOONCAKE_ERROR_TIMEOUT, "the deadline");

  call = begin(store, is_read);
  REQUIRE_OK(mooncake_cancellation_create(&cancellation));
  call.operation.cancellation = cancellation;
  REQUIRE(pthread_create(&call.thread, NULL, run, &call) == 0);
  sleep_milliseconds(200);
  REQUIRE_OK(mooncake_cancellation_cancel(cancellation));
  /* A running call keeps what it was given. */
  REQUIRE_OK(mooncake_cancellation_destroy(cancellation));
  REQUIRE(pthread_join(call.thread, NULL) == 0);
  check_end(&call, MOONCAKE_ERROR_CANCELED, "the cancel");

  if (!is_read) {
    double end = seconds_now() + 0.2;
    call = begin(store, is_read);
    call.operation.progress = stop_after;
    call.operation.context = &end;
    run(&call);
    check_end(&call, MOONCAKE_ERROR_CANCELED, "the callback");
  }

  call = begin(store, is_read);
  REQUIRE(pthread_create(&call.thread, NULL, run, &call) == 0);
  sleep_milliseconds(200);
  double start = seconds_now();
  REQUIRE_OK(mooncake_store_destroy(store));
  double seconds = seconds_now() - start;
  CHECK(seconds < 5);
  /* From here on nobody else uses the memory. */
  memset(memory, 0x33, LENGTH);
  REQUIRE(pthread_join(call.thread, NULL) == 0);
  CHECK(call.code == MOONCAKE_ERROR_CANCELED || call.code == MOONCAKE_ERROR_INVALID_HANDLE);
  printf("%s: the store ended in %.3f s, the call with %s\n", is_read ? "read" : "get", seconds,
         mooncake_error_name(call.code));
}

int main(void) {
  store_child_t child = child_start();
  mooncake_engine_options_t options;
  mooncake_engine_t *engine = NULL;
  mooncake_store_t *on_engine = NULL;
  memory = (unsigned char *)new_pages(LENGTH);
  start_store_server();
  child_publish(&child);
  mooncake_store_t *own = create_store("own engine");
  options = store_engine_options("given engine");
  /* Shared memory copies do not need the holder to run. */
  options.transports = "tcp";
  REQUIRE_OK(mooncake_engine_create(&options, &engine));
  REQUIRE_OK(mooncake_store_create(engine, NULL, NULL, &on_engine));
  child_stop(&child);
  try_all(own, 0);
  try_all(on_engine, 1);
  REQUIRE_OK(mooncake_engine_destroy(engine));
  kill(child.pid, SIGCONT);
  sleep_milliseconds(300);
  CHECK(has_only(memory, LENGTH, 0x33));
  child_kill(&child);
  REQUIRE_OK(mooncake_metadata_server_stop(store_server));
  free(memory);
  return check_result("store_stalled");
}
