/* Many threads use and end the same stores: each call does its work or says why not, nothing
 * crashes or hangs, and no memory is touched once a store is gone. */
#include "store.h"

enum { THREADS = 6, STORES = 3, LENGTH = 1 << 20, SECONDS = 6 };

static mooncake_store_t *stores[STORES]; /* replaced while others use them */
static mooncake_cancellation_t *cancellation;
static int is_over;
static unsigned long done_counts[8];

static mooncake_store_t *some_store(unsigned *seed) {
  return __atomic_load_n(&stores[rand_r(seed) % STORES], __ATOMIC_SEQ_CST);
}

static void expect_ended(int32_t code, int line) {
  switch (code) {
    case MOONCAKE_OK:
    case MOONCAKE_ERROR_INVALID_HANDLE: /* a store that another thread ends */
    case MOONCAKE_ERROR_CANCELED:
    case MOONCAKE_ERROR_EXISTS: /* a name that another thread works on, or holds */
    case MOONCAKE_ERROR_NOT_HELD:
    case MOONCAKE_ERROR_BUSY:
    case MOONCAKE_ERROR_NOT_FOUND:
    case MOONCAKE_ERROR_NO_HOLDER:
    case MOONCAKE_ERROR_UNREACHABLE:
    case MOONCAKE_ERROR_OVERLAP: return;
    default:
      __atomic_add_fetch(&check_failure_count, 1, __ATOMIC_SEQ_CST);
      fprintf(stderr, "store_threads.c:%d: %s: %s\n", line, mooncake_error_name(code),
              mooncake_error_message());
  }
}

static void note(int kind, int32_t code, int line) {
  expect_ended(code, line);
  if (code == MOONCAKE_OK) __atomic_add_fetch(&done_counts[kind], 1, __ATOMIC_SEQ_CST);
}

static void check_got(mooncake_store_result_t *result) {
  const mooncake_store_report_t *report = report_of(result);
  CHECK(report->payload_count == 1 && report->buffer_count == 1 && report->is_verified == 1);
  /* Another thread may delete the replica's memory. */
  CHECK_EQUAL(report->buffers[0].length, LENGTH);
  REQUIRE_OK(mooncake_store_result_free(result));
}

static void *use(void *argument) {
  unsigned seed = (unsigned)(uintptr_t)argument;
  unsigned char *memory = (unsigned char *)new_pages(LENGTH);
  mooncake_buffer_t buffer = {memory, LENGTH};
  mooncake_store_operation_t operation = operation_defaults();
  char own[32];
  snprintf(own, sizeof own, "own %u", seed);
  operation.cancellation = cancellation;
  while (!__atomic_load_n(&is_over, __ATOMIC_SEQ_CST)) {
    mooncake_store_t *store = some_store(&seed);
    mooncake_store_result_t *result = NULL;
    int32_t code;
    switch (rand_r(&seed) % 7) {
      case 0:
        code = mooncake_store_get(store, "shared", NULL, 0, NULL, &operation, &result);
        if (code == MOONCAKE_OK) check_got(result);
        note(0, code, __LINE__);
        break;
      case 1: note(1, mooncake_store_delete_replica(store, "shared", NULL), __LINE__); break;
      case 2:
        code = mooncake_store_register(store, own, &buffer, 1, NULL, &operation, NULL);
        note(2, code, __LINE__);
        if (code == MOONCAKE_OK) {
          note(3, mooncake_store_unregister(store, own, NULL), __LINE__);
        }
        break;
      case 3:
        code = mooncake_store_list(store, NULL, &operation, &result);
        note(4, code, __LINE__);
        if (code == MOONCAKE_OK) REQUIRE_OK(mooncake_store_result_free(result));
        break;
      case 4:
        code = mooncake_store_stat(store, "shared", NULL, &result);
        note(5, code, __LINE__);
        if (code == MOONCAKE_OK) REQUIRE_OK(mooncake_store_result_free(result));
        break;
      case 5:
        note(6, mooncake_store_read(store, "shared", 1000, memory, 100000, &operation), __LINE__);
        break;
      default:
        code = mooncake_store_get(store, "shared", &buffer, 1, NULL, &operation, NULL);
        note(0, code, __LINE__);
        if (code == MOONCAKE_OK) {
          /* Nobody touches it once it is deleted; another thread may have been faster. */
          note(1, mooncake_store_delete_replica(store, "shared", NULL), __LINE__);
        }
    }
  }
  /* `memory` is freed after the stores, which may still hold it. */
  return memory;
}

/* Destroys and replaces stores; one of them each time by two threads at once. */
static void *end_one(void *argument) {
  int32_t code = mooncake_store_destroy((mooncake_store_t *)argument);
  CHECK(code == MOONCAKE_OK || code == MOONCAKE_ERROR_INVALID_HANDLE);
  return NULL;
}

static int replace_stores(void) {
  int count = 0;
  double end = seconds_now() + SECONDS;
  while (seconds_now() < end) {
    int index = count % STORES;
    pthread_t second;
    double start = seconds_now();
    mooncake_store_t *old = stores[index];
    sleep_milliseconds(100);
    REQUIRE(pthread_create(&second, NULL, end_one, old) == 0);
    end_one(old);
    REQUIRE(pthread_join(second, NULL) == 0);
    CHECK(seconds_now() - start < 12);
    CHECK_EQUAL(mooncake_store_list(old, NULL, NULL, NULL), MOONCAKE_ERROR_INVALID_HANDLE);
    char name[32];
    snprintf(name, sizeof name, "store %d", count);
    __atomic_store_n(&stores[index], create_store(name), __ATOMIC_SEQ_CST);
    count += 1;
  }
  return count;
}

int main(void) {
  pthread_t threads[THREADS];
  void *memories[THREADS];
  unsigned char *memory = (unsigned char *)new_pages(LENGTH);
  mooncake_buffer_t buffer = {memory, LENGTH};
  start_store_server();
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_OFF));
  REQUIRE_OK(mooncake_cancellation_create(&cancellation));
  mooncake_store_t *origin = create_store("origin");
  fill_pattern(memory, LENGTH, 1);
  REQUIRE_OK(mooncake_store_register(origin, "shared", &buffer, 1, NULL, NULL, NULL));
  for (int index = 0; index < STORES; index += 1) stores[index] = create_store(NULL);
  for (int index = 0; index < THREADS; index += 1) {
    REQUIRE(pthread_create(&threads[index], NULL, use, (void *)(uintptr_t)(index + 1)) == 0);
  }
  int replaced = replace_stores();
  __atomic_store_n(&is_over, 1, __ATOMIC_SEQ_CST);
  REQUIRE_OK(mooncake_cancellation_cancel(cancellation));
  double start = seconds_now();
  for (int index = 0; index < THREADS; index += 1) {
    REQUIRE(pthread_join(threads[index], &memories[index]) == 0);
  }
  CHECK(seconds_now() - start < 12);
  for (int index = 0; index < STORES; index += 1) REQUIRE_OK(mooncake_store_destroy(stores[index]));
  for (int index = 0; index < THREADS; index += 1) {
    memset(memories[index], 0x5A, LENGTH);
  }
  sleep_milliseconds(100);
  for (int index = 0; index < THREADS; index += 1) {
    CHECK(has_only(memories[index], LENGTH, 0x5A));
    free(memories[index]);
  }
  CHECK(has_pattern(memory, LENGTH, 1));
  REQUIRE_OK(mooncake_store_unregister(origin, "shared", NULL));
  REQUIRE_OK(mooncake_store_destroy(origin));
  REQUIRE_OK(mooncake_cancellation_destroy(cancellation));
  REQUIRE_OK(mooncake_metadata_server_stop(store_server));
  printf("%d stores replaced;", replaced);
  const char *names[] = {"get", "delete", "register", "unregister", "list", "stat", "read"};
  for (int kind = 0; kind < 7; kind += 1) {
    printf(" %s %lu", names[kind], done_counts[kind]);
    CHECK(done_counts[kind] > 0);
  }
  printf("\n");
  return check_result("store_threads");
}
