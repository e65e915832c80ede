/* Every kind of bad input to the store's functions: an error code and a message each time,
 * never a crash, and the store still works. */
#include "store.h"

enum { LENGTH = 256 << 10 };

static mooncake_store_t *store;
static unsigned char *memory; /* LENGTH bytes that are registered as "good" */
static unsigned char *other;  /* LENGTH bytes that are not */

/* ---- Judging one call ---- */

#define ONLY(name) (1u << -MOONCAKE_ERROR_##name)
#define INVALID ONLY(INVALID_ARGUMENT)
#define HANDLE ONLY(INVALID_HANDLE)

static void judge(int32_t code, unsigned accepted, const char *call, int line,
                  const char *marker) {
  const char *message = mooncake_error_message();
  int known = code < 0 && code >= MOONCAKE_ERROR_NO_HOLDER && ((accepted >> -code) & 1) != 0;
  if (!known) {
    check_failure_count += 1;
    fprintf(stderr, "store_bad_input.c:%d: %s gave %s: %s\n", line, call,
            mooncake_error_name(code), message);
  } else if (message[0] == 0 || strcmp(message, marker) == 0) {
    check_failure_count += 1;
    fprintf(stderr, "store_bad_input.c:%d: %s left no message\n", line, call);
  }
}

#define EXPECT(accepted, call) \
  do { \
    char marker_[256]; \
    mooncake_log_set_level(77777); \
    snprintf(marker_, sizeof marker_, "%s", mooncake_error_message()); \
    judge((call), accepted, #call, __LINE__, marker_); \
  } while (0)

/* ---- Handles ---- */

static void ignore_change(int32_t kind, const mooncake_payload_info_t *payload, void *context) {
  (void)kind;
  (void)payload;
  (void)context;
}

static void try_store(mooncake_store_t *handle) {
  mooncake_buffer_t buffer = {other, LENGTH};
  mooncake_engine_t *engine = NULL;
  mooncake_store_result_t *result = NULL;
  mooncake_store_watch_t *watch = NULL;
  EXPECT(HANDLE, mooncake_store_engine(handle, &engine));
  EXPECT(HANDLE, mooncake_store_register(handle, "a", &buffer, 1, NULL, NULL, &result));
  EXPECT(HANDLE, mooncake_store_unregister(handle, "a", NULL));
  EXPECT(HANDLE, mooncake_store_get(handle, "a", NULL, 0, NULL, NULL, &result));
  EXPECT(HANDLE, mooncake_store_delete_replica(handle, "a", NULL));
  EXPECT(HANDLE, mooncake_store_remove(handle, "a", NULL));
  EXPECT(HANDLE, mooncake_store_list(handle, NULL, NULL, &result));
  EXPECT(HANDLE, mooncake_store_stat(handle, "a", NULL, &result));
  EXPECT(HANDLE, mooncake_store_read(handle, "a", 0, other, 1, NULL));
  EXPECT(HANDLE, mooncake_store_write(handle, "a", 0, other, 1, NULL));
  EXPECT(HANDLE, mooncake_store_watch_create(handle, NULL, &watch, ignore_change, NULL));
  EXPECT(HANDLE, mooncake_store_destroy(handle));
  CHECK(engine == NULL && result == NULL && watch == NULL);
}

static void try_others(void *handle) {
  const mooncake_store_report_t *report = NULL;
  mooncake_store_operation_t operation = operation_defaults();
  mooncake_store_result_t *result = NULL;
  EXPECT(HANDLE, mooncake_store_result_read((mooncake_store_result_t *)handle, &report));
  EXPECT(HANDLE, mooncake_store_result_free((mooncake_store_result_t *)handle));
  EXPECT(HANDLE, mooncake_cancellation_cancel((mooncake_cancellation_t *)handle));
  EXPECT(HANDLE, mooncake_cancellation_destroy((mooncake_cancellation_t *)handle));
  EXPECT(HANDLE, mooncake_store_watch_destroy((mooncake_store_watch_t *)handle));
  if (handle != NULL) {
    operation.cancellation = (mooncake_cancellation_t *)handle;
    EXPECT(HANDLE, mooncake_store_list(store, NULL, &operation, &result));
  }
  CHECK(report == NULL && result == NULL);
}

static void bad_handles(void) {
  static uint64_t zeros[64];
  mooncake_engine_t *engine = NULL;
  mooncake_store_t *ended = create_store("ended");
  uintptr_t live = (uintptr_t)store;
  void *foreign[] = {NULL, (void *)1, (void *)8, (void *)9, (void *)UINTPTR_MAX, zeros, other,
                     store_server, (void *)(live + 1), (void *)(live + 8000),
                     (void *)(live ^ ((uintptr_t)1 << 50))};
  for (size_t index = 0; index < sizeof foreign / sizeof foreign[0]; index += 1) {
    try_store((mooncake_store_t *)foreign[index]);
    try_others(foreign[index]);
  }
  /* A store's handle is neither an engine's nor one of the others. */
  try_others(store);
  REQUIRE_OK(mooncake_store_engine(store, &engine));
  try_store((mooncake_store_t *)engine);
  try_others(engine);
  EXPECT(HANDLE, mooncake_engine_destroy((mooncake_engine_t *)store));
  EXPECT(HANDLE, mooncake_metadata_server_stop((mooncake_metadata_server_t *)store));
  EXPECT(HANDLE, mooncake_store_create((mooncake_engine_t *)store, NULL, NULL, &ended));
  REQUIRE_OK(mooncake_store_destroy(ended));
  try_store(ended);
  try_others(ended);
}

/* ---- Options ---- */

static void bad_options(void) {
  mooncake_store_options_t options;
  mooncake_engine_options_t engine_options = store_engine_options(NULL);
  mooncake_engine_options_t lonely = store_engine_options(NULL);
  mooncake_engine_t *engine = NULL;
  mooncake_store_t *made = NULL;
  struct {
    mooncake_store_options_t options;
    uint64_t later;
  } larger;
  EXPECT(INVALID, mooncake_store_options_init(NULL, sizeof options));
  uint32_t sizes[] = {0, 1, 4, 23, 4097, UINT32_MAX};
  for (size_t index = 0; index < sizeof sizes / sizeof sizes[0]; index += 1) {
    EXPECT(INVALID, mooncake_store_options_init(&options, sizes[index]));
    REQUIRE_OK(mooncake_store_options_init(&options, sizeof options));
    options.struct_size = sizes[index];
    EXPECT(INVALID, mooncake_store_create(NULL, &engine_options, &options, &made));
  }
  REQUIRE_OK(mooncake_store_options_init(&options, sizeof options));
  REQUIRE_OK(mooncake_store_engine(store, &engine));
  EXPECT(INVALID, mooncake_store_create(engine, &engine_options, &options, &made));
  EXPECT(INVALID, mooncake_store_create(engine, NULL, &options, NULL));
  options.reserved = 1;
  EXPECT(INVALID, mooncake_store_create(engine, NULL, &options, &made));
  REQUIRE_OK(mooncake_store_options_init(&options, sizeof options));
  options.metadata_uri = "";
  EXPECT(INVALID, mooncake_store_create(engine, NULL, &options, &made));
  options.metadata_uri = "gopher://127.0.0.1:70";
  EXPECT(INVALID | ONLY(UNSUPPORTED), mooncake_store_create(engine, NULL, &options, &made));
  options.metadata_uri = "\xFF\xFE";
  EXPECT(INVALID, mooncake_store_create(engine, NULL, &options, &made));
  options.metadata_uri = "P2PHANDSHAKE";
  EXPECT(ONLY(UNSUPPORTED), mooncake_store_create(engine, NULL, &options, &made));
  lonely.metadata_uri = NULL;
  EXPECT(ONLY(UNSUPPORTED), mooncake_store_create(NULL, &lonely, NULL, &made));
  EXPECT(ONLY(UNSUPPORTED), mooncake_store_create(NULL, NULL, NULL, &made));
  lonely.struct_size = 3;
  EXPECT(INVALID, mooncake_store_create(NULL, &lonely, NULL, &made));
  REQUIRE_OK(mooncake_store_options_init(&larger.options, sizeof larger));
  CHECK_EQUAL(larger.later, 0);
  larger.later = 1;
  EXPECT(ONLY(UNSUPPORTED), mooncake_store_create(engine, NULL, &larger.options, &made));
  CHECK(made == NULL);
  larger.later = 0;
  REQUIRE_OK(mooncake_store_create(engine, NULL, &larger.options, &made));
  REQUIRE_OK(mooncake_store_destroy(made));
}

static void bad_operations(void) {
  mooncake_store_operation_t operation;
  mooncake_store_register_options_t how = register_defaults();
  mooncake_store_get_options_t fetch = get_defaults();
  mooncake_buffer_t buffer = {other, LENGTH};
  mooncake_store_result_t *result = NULL;
  EXPECT(INVALID, mooncake_store_operation_init(NULL, sizeof operation));
  EXPECT(INVALID, mooncake_store_operation_init(&operation, 8));
  EXPECT(INVALID, mooncake_store_register_options_init(NULL, sizeof how));
  EXPECT(INVALID, mooncake_store_register_options_init(&how, 31));
  EXPECT(INVALID, mooncake_store_get_options_init(NULL, sizeof fetch));
  EXPECT(INVALID, mooncake_store_get_options_init(&fetch, 0));
  operation = operation_defaults();
  operation.struct_size = 0;
  EXPECT(INVALID, mooncake_store_list(store, NULL, &operation, &result));
  operation = operation_defaults();
  operation.reserved = 7;
  EXPECT(INVALID, mooncake_store_unregister(store, "good", &operation));
  how.create_only = 2;
  EXPECT(INVALID, mooncake_store_register(store, "a", &buffer, 1, &how, NULL, NULL));
  how = register_defaults();
  how.writable = UINT32_MAX;
  EXPECT(INVALID, mooncake_store_register(store, "a", &buffer, 1, &how, NULL, NULL));
  how = register_defaults();
  how.reserved = 1;
  EXPECT(INVALID, mooncake_store_register(store, "a", &buffer, 1, &how, NULL, NULL));
  how = register_defaults();
  how.location = "";
  EXPECT(INVALID, mooncake_store_register(store, "a", &buffer, 1, &how, NULL, NULL));
  /* More shards than a payload may have, and shards of absurd sizes. */
  uint64_t counts[] = {1, 2, 3, UINT64_MAX};
  buffer.length = 1u << 31;
  for (size_t index = 0; index < sizeof counts / sizeof counts[0]; index += 1) {
    how = register_defaults();
    how.shard_bytes = counts[index];
    if (index == 3) buffer.length = LENGTH;
    int32_t code = mooncake_store_register(store, "a", &buffer, 1, &how, NULL, NULL);
    /* The caller may well have wanted one huge shard. */
    if (index == 3 && code == MOONCAKE_OK) {
      REQUIRE_OK(mooncake_store_unregister(store, "a", NULL));
    } else {
      CHECK(code == MOONCAKE_ERROR_INVALID_ARGUMENT);
    }
  }
  const char *versions[] = {"", "1", "0123456789abcdef0123456789abcde", "\xC3",
                            "0123456789abcdef0123456789abcdef0",
                            "+123456789abcdef0123456789abcdef", "0x23456789abcdef0123456789abcdef",
                            "0123456789abcdef 123456789abcdef"};
  for (size_t index = 0; index < sizeof versions / sizeof versions[0]; index += 1) {
    fetch = get_defaults();
    fetch.version = versions[index];
    EXPECT(INVALID, mooncake_store_get(store, "a", NULL, 0, &fetch, NULL, &result));
  }
  fetch = get_defaults();
  fetch.follow_versions = 3;
  EXPECT(INVALID, mooncake_store_get(store, "a", NULL, 0, &fetch, NULL, &result));
  fetch = get_defaults();
  fetch.receive_only = 2;
  EXPECT(INVALID, mooncake_store_get(store, "a", NULL, 0, &fetch, NULL, &result));
  fetch = get_defaults();
  fetch.reserved = 1;
  EXPECT(INVALID, mooncake_store_get(store, "a", NULL, 0, &fetch, NULL, &result));
  CHECK(result == NULL);
}

/* ---- Names ---- */

static void try_name(const char *name, unsigned accepted) {
  mooncake_buffer_t buffer = {other, LENGTH};
  mooncake_store_result_t *result = NULL;
  EXPECT(accepted, mooncake_store_register(store, name, &buffer, 1, NULL, NULL, &result));
  EXPECT(accepted, mooncake_store_unregister(store, name, NULL));
  EXPECT(accepted, mooncake_store_get(store, name, NULL, 0, NULL, NULL, &result));
  EXPECT(accepted, mooncake_store_delete_replica(store, name, NULL));
  EXPECT(accepted, mooncake_store_remove(store, name, NULL));
  EXPECT(accepted, mooncake_store_stat(store, name, NULL, &result));
  EXPECT(accepted, mooncake_store_read(store, name, 0, other, 1, NULL));
  EXPECT(accepted, mooncake_store_write(store, name, 0, other, 1, NULL));
  CHECK(result == NULL);
}

static void bad_names(void) {
  static char text[70000];
  try_name(NULL, INVALID);
  try_name("", INVALID);
  try_name("/a", INVALID);
  try_name("\xC3", INVALID);
  try_name("a\xED\xA0\x80", INVALID);
  memset(text, 'a', 513);
  try_name(text, INVALID);
  memset(text, 'a', sizeof text - 1);
  try_name(text, INVALID);
  /* Each byte alone and inside a name, which is then either accepted or refused everywhere. */
  for (int byte = 1; byte < 256; byte += 1) {
    char name[4] = {'x', (char)byte, 'y', 0};
    mooncake_buffer_t buffer = {other, LENGTH};
    mooncake_store_result_t *result = NULL;
    int32_t code = mooncake_store_register(store, name, &buffer, 1, NULL, NULL, NULL);
    int allowed = byte >= 32 && byte < 127;
    if (!allowed) {
      CHECK_EQUAL(code, MOONCAKE_ERROR_INVALID_ARGUMENT);
      continue;
    }
    CHECK_EQUAL(code, MOONCAKE_OK);
    REQUIRE_OK(mooncake_store_stat(store, name, NULL, &result));
    CHECK(strcmp(report_of(result)->payloads[0]->name, name) == 0);
    REQUIRE_OK(mooncake_store_result_free(result));
    CHECK_EQUAL(count_payloads(store, name), 1);
    REQUIRE_OK(mooncake_store_unregister(store, name, NULL));
  }
  mooncake_buffer_t buffer = {other, LENGTH};
  memset(text, 0, sizeof text);
  for (int index = 0; index < 128; index += 1) memcpy(text + 4 * index, "\xF0\x9F\x8D\xB0", 4);
  REQUIRE_OK(mooncake_store_register(store, text, &buffer, 1, NULL, NULL, NULL));
  CHECK_EQUAL(count_payloads(store, text), 1);
  REQUIRE_OK(mooncake_store_unregister(store, text, NULL));
  mooncake_store_result_t *result = NULL;
  EXPECT(INVALID, mooncake_store_list(store, "\xFF", NULL, &result));
  EXPECT(INVALID, mooncake_store_list(store, NULL, NULL, NULL));
  EXPECT(INVALID, mooncake_store_stat(store, "good", NULL, NULL));
}

/* ---- Memory ---- */

static void bad_buffers(void) {
  static mooncake_buffer_t many[65537];
  mooncake_buffer_t wrong[] = {{NULL, 0}, {NULL, LENGTH}, {other, 0}, {other, UINT64_MAX},
                               {(void *)(UINTPTR_MAX - 10), 11}, {other, 1ull << 62},
                               {other, (1ull << 62) - 1}};
  mooncake_store_result_t *result = NULL;
  for (size_t index = 0; index < sizeof wrong / sizeof wrong[0] - 1; index += 1) {
    mooncake_buffer_t two[2] = {{other, LENGTH}, wrong[index]};
    EXPECT(INVALID, mooncake_store_register(store, "a", &wrong[index], 1, NULL, NULL, &result));
    EXPECT(INVALID, mooncake_store_register(store, "a", two, 2, NULL, NULL, &result));
    EXPECT(INVALID, mooncake_store_get(store, "good", two, 2, NULL, NULL, &result));
  }
  /* Lengths that are too much only together. */
  mooncake_buffer_t sum[8];
  for (int index = 0; index < 8; index += 1) sum[index] = wrong[6];
  EXPECT(INVALID, mooncake_store_register(store, "a", sum, 8, NULL, NULL, &result));
  EXPECT(INVALID, mooncake_store_register(store, "a", NULL, 1, NULL, NULL, &result));
  EXPECT(INVALID, mooncake_store_register(store, "a", NULL, 0, NULL, NULL, &result));
  EXPECT(INVALID, mooncake_store_register(store, "a", wrong, 0, NULL, NULL, &result));
  EXPECT(INVALID, mooncake_store_get(store, "good", NULL, 1, NULL, NULL, &result));
  EXPECT(INVALID, mooncake_store_get(store, "good", wrong, 0, NULL, NULL, &result));
  EXPECT(INVALID, mooncake_store_get(store, "good", NULL, 0, NULL, NULL, NULL));
  for (int index = 0; index < 65537; index += 1) many[index] = (mooncake_buffer_t){other, 1};
  unsigned full = INVALID | ONLY(FULL);
  EXPECT(full, mooncake_store_register(store, "a", many, 65537, NULL, NULL, &result));
  EXPECT(full, mooncake_store_register(store, "a", many, UINT64_MAX, NULL, NULL, &result));
  /* The same bytes twice, and registered bytes with other boundaries. */
  mooncake_buffer_t twice[2] = {{other, LENGTH / 2}, {other + LENGTH / 2 - 1, LENGTH / 2}};
  mooncake_buffer_t same[2] = {{other, LENGTH / 2}, {other, LENGTH / 2}};
  mooncake_buffer_t taken = {memory + 1, LENGTH - 1};
  EXPECT(ONLY(OVERLAP), mooncake_store_register(store, "a", twice, 2, NULL, NULL, &result));
  EXPECT(ONLY(OVERLAP), mooncake_store_register(store, "a", same, 2, NULL, NULL, &result));
  EXPECT(ONLY(OVERLAP), mooncake_store_register(store, "a", &taken, 1, NULL, NULL, &result));
  CHECK_EQUAL(count_payloads(store, "a"), 0);
  EXPECT(INVALID, mooncake_store_read(store, "good", 0, NULL, 1, NULL));
  EXPECT(INVALID, mooncake_store_read(store, "good", 0, other, UINT64_MAX, NULL));
  EXPECT(INVALID, mooncake_store_read(store, "good", UINT64_MAX, other, 1, NULL));
  EXPECT(INVALID, mooncake_store_read(store, "good", LENGTH, other, 1, NULL));
  EXPECT(INVALID, mooncake_store_write(store, "good", 0, NULL, 1, NULL));
  EXPECT(INVALID, mooncake_store_write(store, "good", 1, other, LENGTH, NULL));
  EXPECT(ONLY(ACCESS_DENIED), mooncake_store_write(store, "good", 0, other, 1, NULL));
  CHECK(result == NULL);
}

/* ---- Cancel, deadline, callbacks ---- */

static int32_t refuse(const mooncake_store_progress_t *progress, void *context) {
  (void)progress;
  *(int *)context += 1;
  return 1;
}

/* A progress callback may call the library, but not end what it was called for. */
static int32_t call_back(const mooncake_store_progress_t *progress, void *context) {
  mooncake_engine_t *engine = NULL;
  (void)progress;
  *(int *)context += 1;
  EXPECT(INVALID, mooncake_store_destroy(store));
  REQUIRE_OK(mooncake_store_engine(store, &engine));
  EXPECT(INVALID, mooncake_engine_destroy(engine));
  EXPECT(INVALID, mooncake_store_watch_destroy(NULL));
  CHECK(count_payloads(store, "good") == 1);
  return 0;
}

static void ended_early(void) {
  mooncake_store_t *receiver = create_store("receiver");
  mooncake_store_operation_t operation = operation_defaults();
  mooncake_cancellation_t *cancellation = NULL;
  mooncake_buffer_t buffer = {other, LENGTH};
  mooncake_store_result_t *result = NULL;
  int count = 0;
  EXPECT(INVALID, mooncake_cancellation_create(NULL));
  REQUIRE_OK(mooncake_cancellation_create(&cancellation));
  REQUIRE_OK(mooncake_cancellation_cancel(cancellation));
  REQUIRE_OK(mooncake_cancellation_cancel(cancellation));
  operation.cancellation = cancellation;
  unsigned canceled = ONLY(CANCELED);
  EXPECT(canceled, mooncake_store_register(store, "a", &buffer, 1, NULL, &operation, &result));
  EXPECT(canceled, mooncake_store_get(receiver, "good", NULL, 0, NULL, &operation, &result));
  EXPECT(canceled, mooncake_store_get(receiver, "none", NULL, 0, NULL, &operation, &result));
  EXPECT(canceled, mooncake_store_list(store, NULL, &operation, &result));
  EXPECT(canceled, mooncake_store_stat(store, "good", &operation, &result));
  EXPECT(canceled, mooncake_store_read(store, "good", 0, other, 1, &operation));
  EXPECT(canceled, mooncake_store_remove(store, "good", &operation));
  REQUIRE_OK(mooncake_cancellation_destroy(cancellation));
  EXPECT(HANDLE, mooncake_store_list(store, NULL, &operation, &result));
  operation = operation_defaults();
  operation.progress = refuse;
  operation.context = &count;
  EXPECT(canceled, mooncake_store_get(receiver, "good", NULL, 0, NULL, &operation, &result));
  CHECK(count == 1);
  CHECK(result == NULL);
  /* None of them has left anything. */
  CHECK_EQUAL(count_payloads(store, "a"), 0);
  CHECK_EQUAL(settle_holders(store, "good", 1), 1);
  CHECK_EQUAL(mooncake_store_delete_replica(receiver, "good", NULL), MOONCAKE_ERROR_NOT_HELD);
  operation.progress = call_back;
  count = 0;
  REQUIRE_OK(mooncake_store_get(receiver, "good", &buffer, 1, NULL, &operation, &result));
  CHECK(count > 0);
  CHECK(memcmp(other, memory, LENGTH) == 0);
  REQUIRE_OK(mooncake_store_result_free(result));
  REQUIRE_OK(mooncake_store_destroy(receiver));
}

static int change_count;

static void change_calls_back(int32_t kind, const mooncake_payload_info_t *payload,
                              void *context) {
  mooncake_store_watch_t **watch = (mooncake_store_watch_t **)context;
  (void)kind;
  (void)payload;
  EXPECT(INVALID, mooncake_store_watch_destroy(*watch));
  EXPECT(INVALID, mooncake_store_destroy(store));
  CHECK(count_payloads(store, "good") == 1);
  __atomic_add_fetch(&change_count, 1, __ATOMIC_SEQ_CST);
}

static void watches(void) {
  static mooncake_store_watch_t *watch;
  mooncake_buffer_t buffer = {other, LENGTH};
  EXPECT(INVALID, mooncake_store_watch_create(store, "w", NULL, ignore_change, NULL));
  EXPECT(INVALID, mooncake_store_watch_create(store, "w", &watch, NULL, NULL));
  EXPECT(INVALID, mooncake_store_watch_create(store, "\xFF", &watch, ignore_change, NULL));
  CHECK(watch == NULL);
  REQUIRE_OK(mooncake_store_watch_create(store, "w", &watch, change_calls_back, &watch));
  REQUIRE_OK(mooncake_store_register(store, "w", &buffer, 1, NULL, NULL, NULL));
  double end = seconds_now() + 10;
  while (__atomic_load_n(&change_count, __ATOMIC_SEQ_CST) == 0 && seconds_now() < end) {
    sleep_milliseconds(5);
  }
  CHECK(__atomic_load_n(&change_count, __ATOMIC_SEQ_CST) > 0);
  REQUIRE_OK(mooncake_store_watch_destroy(watch));
  int count = change_count;
  REQUIRE_OK(mooncake_store_unregister(store, "w", NULL));
  sleep_milliseconds(200);
  CHECK_EQUAL(change_count, count);
}

/* ---- Log callback ---- */

static int logged;

static void call_from_log(int32_t level, const char *message, void *context) {
  mooncake_store_result_t *result = NULL;
  mooncake_cancellation_t *cancellation = NULL;
  (void)level;
  (void)message;
  (void)context;
  if (logged++ > 0) return;
  CHECK_EQUAL(mooncake_store_list(store, NULL, NULL, &result), MOONCAKE_ERROR_INVALID_ARGUMENT);
  CHECK_EQUAL(mooncake_store_destroy(store), MOONCAKE_ERROR_INVALID_ARGUMENT);
  CHECK_EQUAL(mooncake_cancellation_create(&cancellation), MOONCAKE_ERROR_INVALID_ARGUMENT);
  CHECK_EQUAL(mooncake_store_create(NULL, NULL, NULL, &store), MOONCAKE_ERROR_INVALID_ARGUMENT);
}

static void from_log(void) {
  mooncake_store_result_t *result = NULL;
  REQUIRE_OK(mooncake_log_set_callback(call_from_log, NULL));
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_DEBUG));
  CHECK_EQUAL(mooncake_store_stat(store, "none", NULL, &result), MOONCAKE_ERROR_NOT_FOUND);
  REQUIRE_OK(mooncake_log_set_callback(NULL, NULL));
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_WARNING));
  CHECK(logged > 0);
}

int main(void) {
  start_store_server();
  store = create_store("bad input");
  memory = (unsigned char *)new_pages(LENGTH);
  other = (unsigned char *)new_pages(LENGTH);
  mooncake_buffer_t good = {memory, LENGTH};
  fill_pattern(memory, LENGTH, 3);
  REQUIRE_OK(mooncake_store_register(store, "good", &good, 1, NULL, NULL, NULL));
  bad_handles();
  bad_options();
  bad_operations();
  bad_names();
  bad_buffers();
  ended_early();
  watches();
  from_log();
  /* What was there all the time is unchanged. */
  mooncake_store_t *receiver = create_store("last receiver");
  mooncake_buffer_t place = {other, LENGTH};
  memset(other, 0, LENGTH);
  REQUIRE_OK(mooncake_store_get(receiver, "good", &place, 1, NULL, NULL, NULL));
  CHECK(has_pattern(other, LENGTH, 3));
  REQUIRE_OK(mooncake_store_destroy(receiver));
  REQUIRE_OK(mooncake_store_destroy(store));
  REQUIRE_OK(mooncake_metadata_server_stop(store_server));
  free(memory);
  free(other);
  return check_result("store_bad_input");
}
