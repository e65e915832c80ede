/* Everything the store does, through its C interface: three stores of one process and one of a
 * process that is killed. Afterwards no descriptor or thread is left. */
#include <ctype.h>

#include "store.h"

enum { MIB = 1 << 20, FIRST = 3 * MIB + 5, SECOND = MIB, TOTAL = FIRST + SECOND, SEED = 5 };

/* ---- Watching ---- */

typedef struct changes {
  pthread_mutex_t mutex;
  int counts[3];
  char name[3][64];
  char version[3][33];
} changes_t;

static void note_change(int32_t kind, const mooncake_payload_info_t *payload, void *context) {
  changes_t *changes = (changes_t *)context;
  REQUIRE(kind >= 0 && kind <= 2 && payload != NULL && payload->name != NULL);
  CHECK((kind == MOONCAKE_CHANGE_VANISHED) == (payload->version == NULL));
  pthread_mutex_lock(&changes->mutex);
  changes->counts[kind] += 1;
  snprintf(changes->name[kind], sizeof changes->name[kind], "%s", payload->name);
  if (payload->version != NULL) memcpy(changes->version[kind], payload->version, 33);
  pthread_mutex_unlock(&changes->mutex);
}

static int settle_changes(changes_t *changes, int32_t kind, int count) {
  double end = seconds_now() + 10;
  int seen = 0;
  do {
    pthread_mutex_lock(&changes->mutex);
    seen = changes->counts[kind];
    pthread_mutex_unlock(&changes->mutex);
    if (seen < count) sleep_milliseconds(5);
  } while (seen < count && seconds_now() < end);
  return seen;
}

/* ---- One payload ---- */

typedef struct progress_seen {
  int count;
  int phases;
  uint64_t last_done;
  int wrong;
} progress_seen_t;

static int32_t note_progress(const mooncake_store_progress_t *progress, void *context) {
  progress_seen_t *seen = (progress_seen_t *)context;
  seen->count += 1;
  seen->phases |= 1 << progress->phase;
  if (progress->done_bytes > progress->total_bytes) seen->wrong += 1;
  if (progress->phase == MOONCAKE_PHASE_TRANSFERRING) seen->last_done = progress->done_bytes;
  return 0;
}

static void check_info(const mooncake_payload_info_t *info, const char *name,
                       const char *version) {
  CHECK(strcmp(info->name, name) == 0);
  REQUIRE(info->version != NULL);
  REQUIRE_EQUAL(strlen(info->version), 32);
  for (const char *digit = info->version; *digit != 0; digit += 1) CHECK(isxdigit(*digit));
  if (version != NULL) CHECK(strcmp(info->version, version) == 0);
  CHECK_EQUAL(info->size, TOTAL);
  CHECK_EQUAL(info->shard_bytes, MIB);
  CHECK_EQUAL(info->shard_count, 5);
  CHECK_EQUAL(info->is_writable, 0);
  CHECK(info->published_ms > 1500000000000ull);
  if (info->buffer_count != 0) {
    REQUIRE_EQUAL(info->buffer_count, 2);
    CHECK_EQUAL(info->buffer_sizes[0], FIRST);
    CHECK_EQUAL(info->buffer_sizes[1], SECOND);
  }
}

static void publish(mooncake_store_t *store, const char *name, unsigned char *memory,
                    char version[33]) {
  mooncake_buffer_t buffers[2] = {{memory, FIRST}, {memory + FIRST + 4096, SECOND}};
  mooncake_store_register_options_t options = register_defaults();
  mooncake_store_result_t *result = NULL;
  options.shard_bytes = MIB;
  REQUIRE_OK(mooncake_store_register(store, name, buffers, 2, &options, NULL, &result));
  const mooncake_store_report_t *report = report_of(result);
  REQUIRE_EQUAL(report->payload_count, 1);
  check_info(report->payloads[0], name, NULL);
  CHECK_EQUAL(report->payloads[0]->buffer_count, 2);
  CHECK(report->holder_count == 0 && report->holders == NULL && report->buffers == NULL);
  take_version(result, version);
}

static void fill_both(unsigned char *memory, uint64_t seed) {
  fill_pattern(memory, FIRST, seed);
  fill_pattern(memory + FIRST + 4096, SECOND, seed + 1);
}

static int has_both(const void *first, const void *second, uint64_t seed) {
  return has_pattern(first, FIRST, seed) && has_pattern(second, SECOND, seed + 1);
}

static void check_sources(const mooncake_store_report_t *report, const char *origin) {
  uint64_t bytes = 0;
  for (uint64_t index = 0; index < report->source_count; index += 1) {
    const mooncake_payload_source_t *source = report->sources[index];
    CHECK((strcmp(source->segment, origin) == 0) == (source->is_origin == 1));
    CHECK_EQUAL(source->corrupt_shard_count, 0);
    bytes += source->bytes;
  }
  CHECK_EQUAL(bytes, TOTAL);
  CHECK_EQUAL(report->is_verified, 1);
  CHECK(report->duration_ns > 0);
}

/* ---- The parts ---- */

static void engines(mooncake_store_t *own, mooncake_store_t *other, mooncake_engine_t *given) {
  mooncake_engine_t *engine = NULL;
  char text[64];
  uint64_t length = 0;
  REQUIRE_OK(mooncake_store_engine(other, &engine));
  CHECK(engine == given);
  REQUIRE_OK(mooncake_store_engine(own, &engine));
  CHECK(engine != NULL && engine != given);
  REQUIRE_OK(mooncake_engine_name(engine, text, sizeof text, NULL));
  CHECK(strcmp(text, "a") == 0);
  CHECK_EQUAL(mooncake_engine_metrics(engine, NULL, 0, &length), MOONCAKE_ERROR_FULL);
  CHECK(length > 0);
}

static void found(mooncake_store_t *store, const char *version) {
  mooncake_store_result_t *result = NULL;
  REQUIRE_OK(mooncake_store_list(store, "models/", NULL, &result));
  REQUIRE_EQUAL(report_of(result)->payload_count, 1);
  check_info(report_of(result)->payloads[0], "models/a", version);
  REQUIRE_OK(mooncake_store_result_free(result));
  CHECK_EQUAL(mooncake_store_result_free(result), MOONCAKE_ERROR_INVALID_HANDLE);
  CHECK_EQUAL(count_payloads(store, NULL), 1);
  CHECK_EQUAL(count_payloads(store, ""), 1);
  CHECK_EQUAL(count_payloads(store, "models/a"), 1);
  CHECK_EQUAL(count_payloads(store, "models/ab"), 0);
  REQUIRE_OK(mooncake_store_stat(store, "models/a", NULL, &result));
  const mooncake_store_report_t *report = report_of(result);
  REQUIRE_EQUAL(report->payload_count, 1);
  check_info(report->payloads[0], "models/a", version);
  REQUIRE_EQUAL(report->holder_count, 1);
  CHECK(strcmp(report->holders[0]->segment, "a") == 0);
  CHECK(strcmp(report->holders[0]->version, version) == 0);
  CHECK_EQUAL(report->holders[0]->is_origin, 1);
  CHECK_EQUAL(report->holders[0]->is_complete, 1);
  REQUIRE_OK(mooncake_store_result_free(result));
}

static void get_into(mooncake_store_t *store, unsigned char *memory, const char *version,
                     uint64_t seed) {
  mooncake_buffer_t buffers[2] = {{memory, FIRST}, {memory + FIRST + 4096, SECOND}};
  mooncake_store_result_t *result = NULL;
  memset(memory, 0, TOTAL + 4096);
  REQUIRE_OK(mooncake_store_get(store, "models/a", buffers, 2, NULL, NULL, &result));
  const mooncake_store_report_t *report = report_of(result);
  check_info(report->payloads[0], "models/a", version);
  CHECK(has_both(memory, memory + FIRST + 4096, seed));
  CHECK(has_only(memory + FIRST, 4096, 0));
  REQUIRE_EQUAL(report->buffer_count, 2);
  CHECK(report->buffers[1].address == memory + FIRST + 4096);
  check_sources(report, "a");
  REQUIRE_OK(mooncake_store_result_free(result));
  CHECK_EQUAL(mooncake_store_get(store, "models/a", buffers, 2, NULL, NULL, NULL),
              MOONCAKE_ERROR_EXISTS);
}

static void get_allocated(mooncake_store_t *store, const char *version, uint64_t seed) {
  mooncake_store_get_options_t options = get_defaults();
  mooncake_store_operation_t operation = operation_defaults();
  mooncake_store_result_t *result = NULL;
  progress_seen_t seen = {0, 0, 0, 0};
  operation.progress = note_progress;
  operation.context = &seen;
  options.version = version;
  options.location = "cpu:0";
  REQUIRE_OK(mooncake_store_get(store, "models/a", NULL, 0, &options, &operation, &result));
  const mooncake_store_report_t *report = report_of(result);
  REQUIRE_EQUAL(report->buffer_count, 1);
  REQUIRE_EQUAL(report->buffers[0].length, TOTAL);
  const unsigned char *memory = (const unsigned char *)report->buffers[0].address;
  CHECK(has_both(memory, memory + FIRST, seed));
  check_sources(report, "a");
  CHECK(seen.count > 0 && seen.wrong == 0);
  CHECK(seen.phases & 1 << MOONCAKE_PHASE_LOCATING);
  REQUIRE_OK(mooncake_store_result_free(result));
}

static void ranges(mooncake_store_t *store, const unsigned char *memory) {
  static unsigned char bytes[2 * MIB];
  /* Across a shard and across the two buffers. */
  REQUIRE_OK(mooncake_store_read(store, "models/a", MIB - 100, bytes, 200, NULL));
  CHECK(memcmp(bytes, memory + MIB - 100, 200) == 0);
  REQUIRE_OK(mooncake_store_read(store, "models/a", FIRST - 1000, bytes, 2000, NULL));
  CHECK(memcmp(bytes, memory + FIRST - 1000, 1000) == 0);
  CHECK(memcmp(bytes + 1000, memory + FIRST + 4096, 1000) == 0);
  REQUIRE_OK(mooncake_store_read(store, "models/a", TOTAL, bytes, 0, NULL));
  CHECK_EQUAL(mooncake_store_read(store, "models/a", TOTAL - 1, bytes, 2, NULL),
              MOONCAKE_ERROR_INVALID_ARGUMENT);
  CHECK_EQUAL(mooncake_store_read(store, "models/a", UINT64_MAX, bytes, 2, NULL),
              MOONCAKE_ERROR_INVALID_ARGUMENT);
  CHECK_EQUAL(mooncake_store_write(store, "models/a", 0, bytes, 1, NULL),
              MOONCAKE_ERROR_ACCESS_DENIED);
}

static void written(mooncake_store_t *holder, mooncake_store_t *writer) {
  unsigned char *memory = (unsigned char *)new_pages(TOTAL);
  static unsigned char bytes[MIB];
  mooncake_buffer_t buffer = {memory, TOTAL};
  mooncake_store_register_options_t options = register_defaults();
  mooncake_store_result_t *result = NULL;
  options.writable = 1;
  options.shard_bytes = MIB;
  REQUIRE_OK(mooncake_store_register(holder, "state", &buffer, 1, &options, NULL, &result));
  CHECK_EQUAL(report_of(result)->payloads[0]->is_writable, 1);
  REQUIRE_OK(mooncake_store_result_free(result));
  fill_pattern(bytes, MIB, 9);
  REQUIRE_OK(mooncake_store_write(writer, "state", MIB / 2, bytes, MIB, NULL));
  CHECK(has_only(memory, MIB / 2, 0));
  CHECK(has_pattern(memory + MIB / 2, MIB, 9));
  CHECK(has_only(memory + MIB + MIB / 2, TOTAL - MIB - MIB / 2, 0));
  memset(bytes, 0, MIB);
  REQUIRE_OK(mooncake_store_read(writer, "state", MIB / 2, bytes, MIB, NULL));
  CHECK(has_pattern(bytes, MIB, 9));
  REQUIRE_OK(mooncake_store_get(writer, "state", NULL, 0, NULL, NULL, &result));
  CHECK_EQUAL(report_of(result)->is_verified, 0);
  CHECK(has_pattern((unsigned char *)report_of(result)->buffers[0].address + MIB / 2, MIB, 9));
  REQUIRE_OK(mooncake_store_result_free(result));
  REQUIRE_OK(mooncake_store_delete_replica(writer, "state", NULL));
  REQUIRE_OK(mooncake_store_unregister(holder, "state", NULL));
  CHECK_EQUAL(mooncake_store_write(writer, "state", 0, bytes, 1, NULL), MOONCAKE_ERROR_NOT_FOUND);
  free(memory);
}

static void wrong_sizes(mooncake_store_t *store, unsigned char *memory) {
  mooncake_buffer_t small = {memory, TOTAL - 1};
  mooncake_buffer_t crossing[2] = {{memory, TOTAL / 2}, {memory + TOTAL / 2, TOTAL - TOTAL / 2}};
  mooncake_store_get_options_t options = get_defaults();
  CHECK_EQUAL(mooncake_store_get(store, "models/a", &small, 1, NULL, NULL, NULL),
              MOONCAKE_ERROR_SIZE_MISMATCH);
  CHECK_EQUAL(mooncake_store_get(store, "models/a", crossing, 2, NULL, NULL, NULL),
              MOONCAKE_ERROR_SIZE_MISMATCH);
  options.version = "00000000000000000000000000000001";
  CHECK_EQUAL(mooncake_store_get(store, "models/a", &small, 1, &options, NULL, NULL),
              MOONCAKE_ERROR_NOT_FOUND);
  CHECK_EQUAL(mooncake_store_delete_replica(store, "models/a", NULL), MOONCAKE_ERROR_NOT_HELD);
}

/* Repeats a call that ends a payload while the store itself is using it. */
static int32_t settle_end(int32_t (*end_payload)(mooncake_store_t *, const char *,
                                                 const mooncake_store_operation_t *),
                          mooncake_store_t *store, const char *name) {
  double end = seconds_now() + 10;
  int32_t code;
  while ((code = end_payload(store, name, NULL)) == MOONCAKE_ERROR_BUSY && seconds_now() < end) {
    sleep_milliseconds(5);
  }
  return code;
}

/* A store that holds nothing of a payload removes its name. */
static void removed(mooncake_store_t *a, mooncake_store_t *b, mooncake_store_t *c,
                    unsigned char *memory) {
  mooncake_buffer_t buffer = {memory, MIB};
  mooncake_store_register_options_t options = register_defaults();
  mooncake_store_result_t *result = NULL;
  REQUIRE_OK(mooncake_store_register(a, "gone", &buffer, 1, NULL, NULL, NULL));
  options.create_only = 1;
  CHECK_EQUAL(mooncake_store_register(b, "gone", &buffer, 1, &options, NULL, NULL),
              MOONCAKE_ERROR_EXISTS);
  REQUIRE_OK(mooncake_store_get(b, "gone", NULL, 0, NULL, NULL, &result));
  const unsigned char *replica = (const unsigned char *)report_of(result)->buffers[0].address;
  REQUIRE_OK(mooncake_store_remove(c, "gone", NULL));
  CHECK_EQUAL(settle_holders(c, "gone", 0), 0);
  CHECK_EQUAL(count_payloads(c, "gone"), 0);
  /* The bytes stay until their holder ends the replica. */
  CHECK(memcmp(replica, memory, MIB) == 0);
  REQUIRE_OK(mooncake_store_result_free(result));
  /* BUSY until the store has withdrawn it by itself. */
  REQUIRE_EQUAL(settle_end(mooncake_store_delete_replica, b, "gone"), MOONCAKE_OK);
  REQUIRE_EQUAL(settle_end(mooncake_store_unregister, a, "gone"), MOONCAKE_OK);
  CHECK_EQUAL(mooncake_store_remove(c, "gone", NULL), MOONCAKE_ERROR_NOT_FOUND);
}

/* ---- A holder that is killed ---- */

static void killed(mooncake_store_t *store, const store_child_t *child) {
  mooncake_store_operation_t operation = operation_defaults();
  mooncake_store_result_t *result = NULL;
  child_publish(child);
  CHECK_EQUAL(settle_holders(store, CHILD_PAYLOAD, 1), 1);
  child_kill(child);
  double start = seconds_now();
  operation.timeout_ms = 15000;
  CHECK_EQUAL(mooncake_store_get(store, CHILD_PAYLOAD, NULL, 0, NULL, &operation, &result),
              MOONCAKE_ERROR_NO_HOLDER);
  CHECK(seconds_now() - start < 14);
  /* The message names the holders that were tried. */
  CHECK(strstr(mooncake_error_message(), CHILD_SEGMENT) != NULL);
}

int main(void) {
  store_child_t child = child_start();
  unsigned char *memory = (unsigned char *)new_pages(TOTAL + 4096);
  unsigned char *copy = (unsigned char *)new_pages(TOTAL + 4096);
  changes_t changes = {.mutex = PTHREAD_MUTEX_INITIALIZER};
  char version[33];
  char next[33];
  /* Resources set up once per process are not counted. */
  start_store_server();
  REQUIRE_OK(mooncake_store_destroy(create_store("first")));
  REQUIRE_OK(mooncake_metadata_server_stop(store_server));
  int descriptors = count_entries("/proc/self/fd");
  int threads = count_entries("/proc/self/task");
  start_store_server();

  mooncake_store_t *a = create_store("a");
  mooncake_store_t *c = create_store("c");
  mooncake_store_t *b = NULL;
  mooncake_engine_t *engine = NULL;
  mooncake_engine_options_t engine_options = store_engine_options("b");
  REQUIRE_OK(mooncake_engine_create(&engine_options, &engine));
  REQUIRE_OK(mooncake_store_create(engine, NULL, NULL, &b));
  engines(a, b, engine);

  mooncake_store_watch_t *watch = NULL;
  REQUIRE_OK(mooncake_store_watch_create(b, "models/", &watch, note_change, &changes));
  fill_both(memory, SEED);
  publish(a, "models/a", memory, version);
  CHECK_EQUAL(settle_changes(&changes, MOONCAKE_CHANGE_APPEARED, 1), 1);
  CHECK(strcmp(changes.version[MOONCAKE_CHANGE_APPEARED], version) == 0);
  found(b, version);
  wrong_sizes(b, copy);
  get_into(b, copy, version, SEED);
  get_allocated(c, version, SEED);
  CHECK_EQUAL(settle_holders(a, "models/a", 3), 3);
  ranges(c, memory);
  written(a, b);

  /* Other content under the same name. */
  REQUIRE_OK(mooncake_store_delete_replica(c, "models/a", NULL));
  REQUIRE_OK(mooncake_store_unregister(a, "models/a", NULL));
  CHECK(has_both(copy, copy + FIRST + 4096, SEED));
  fill_both(memory, SEED + 7);
  publish(a, "models/a", memory, next);
  CHECK(strcmp(version, next) != 0);
  CHECK_EQUAL(settle_changes(&changes, MOONCAKE_CHANGE_CHANGED, 1), 1);
  CHECK(strcmp(changes.version[MOONCAKE_CHANGE_CHANGED], next) == 0);
  get_allocated(c, next, SEED + 7);
  REQUIRE_OK(mooncake_store_delete_replica(c, "models/a", NULL));
  REQUIRE_OK(mooncake_store_delete_replica(b, "models/a", NULL));
  REQUIRE_OK(mooncake_store_unregister(a, "models/a", NULL));
  CHECK_EQUAL(mooncake_store_unregister(a, "models/a", NULL), MOONCAKE_ERROR_NOT_HELD);
  CHECK_EQUAL(mooncake_store_delete_replica(b, "models/a", NULL), MOONCAKE_ERROR_NOT_HELD);
  CHECK(settle_changes(&changes, MOONCAKE_CHANGE_VANISHED, 1) >= 1);
  CHECK(strcmp(changes.name[MOONCAKE_CHANGE_VANISHED], "models/a") == 0);
  CHECK_EQUAL(mooncake_store_get(b, "models/a", NULL, 0, NULL, NULL, NULL),
              MOONCAKE_ERROR_INVALID_ARGUMENT);
  mooncake_store_result_t *result = NULL;
  CHECK_EQUAL(mooncake_store_get(b, "models/a", NULL, 0, NULL, NULL, &result),
              MOONCAKE_ERROR_NOT_FOUND);
  CHECK(result == NULL);
  REQUIRE_OK(mooncake_store_watch_destroy(watch));
  CHECK_EQUAL(mooncake_store_watch_destroy(watch), MOONCAKE_ERROR_INVALID_HANDLE);

  removed(a, b, c, memory);
  killed(c, &child);

  REQUIRE_OK(mooncake_store_destroy(a));
  REQUIRE_OK(mooncake_store_destroy(b));
  REQUIRE_OK(mooncake_store_destroy(c));
  CHECK_EQUAL(mooncake_store_destroy(c), MOONCAKE_ERROR_INVALID_HANDLE);
  REQUIRE_OK(mooncake_engine_destroy(engine));
  REQUIRE_OK(mooncake_metadata_server_stop(store_server));
  /* Without the two pipe ends to the child. */
  CHECK_EQUAL(settle_entries("/proc/self/fd", descriptors - 2), descriptors - 2);
  CHECK_EQUAL(settle_entries("/proc/self/task", threads), threads);
  free(memory);
  free(copy);
  return check_result("store_basic");
}
