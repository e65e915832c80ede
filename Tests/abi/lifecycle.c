/* Two engines of one process use everything in mooncake.h: names, memory, segments, batches
 * completed in each of the four ways, notifications, rights. dropin.c does the same for the
 * drop-in header, in_flight.c covers unfinished work. */
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>

#include "mooncake.h"

#include "check.h"

enum { LENGTH = 8 << 20, BOTH_RIGHTS = 3, WAIT_MS = 20000 };

typedef struct pair {
  mooncake_engine_t *initiator;
  mooncake_engine_t *target;
  mooncake_segment_t segment; /* of the target, at the initiator */
  unsigned char *local;       /* LENGTH bytes of the initiator */
  unsigned char *remote;      /* LENGTH bytes of the target */
} pair_t;

static mooncake_transfer_request_t make_request(const pair_t *pair, int32_t opcode,
                                                uint64_t offset, uint64_t length) {
  mooncake_transfer_request_t request;
  memset(&request, 0, sizeof request);
  request.opcode = opcode;
  request.segment = pair->segment;
  request.source = pair->local + offset;
  request.target_offset = (uint64_t)(uintptr_t)(pair->remote + offset);
  request.length = length;
  return request;
}

static pair_t create_pair(void) {
  pair_t pair;
  mooncake_engine_options_t options;
  REQUIRE_OK(mooncake_engine_options_init(&options, sizeof options));
  CHECK_EQUAL(options.struct_size, sizeof options);
  options.io_threads = 1;
  options.connections_per_peer = 4;
  REQUIRE_OK(mooncake_engine_create(&options, &pair.initiator));
  REQUIRE_OK(mooncake_engine_create(NULL, &pair.target));
  REQUIRE(pair.initiator != pair.target);
  pair.local = (unsigned char *)new_pages(LENGTH);
  pair.remote = (unsigned char *)new_pages(LENGTH);
  REQUIRE_OK(mooncake_memory_register(pair.initiator, pair.local, LENGTH, "cpu:0",
                                      MOONCAKE_ACCESS_LOCAL));
  REQUIRE_OK(mooncake_memory_register(pair.target, pair.remote, LENGTH, "*", BOTH_RIGHTS));
  return pair;
}

static void open_by_name(pair_t *pair) {
  char name[256];
  char short_name[4];
  uint64_t length = 0;
  uint64_t full_length = 0;
  mooncake_segment_t again = -1;
  REQUIRE_OK(mooncake_engine_name(pair->target, name, sizeof name, &length));
  CHECK_EQUAL(length, strlen(name));
  CHECK(strchr(name, ':') != NULL);

  CHECK_EQUAL(mooncake_engine_name(pair->target, short_name, sizeof short_name, &full_length),
              MOONCAKE_ERROR_FULL);
  CHECK_EQUAL(full_length, length);
  CHECK(strncmp(short_name, name, 3) == 0 && short_name[3] == 0);
  full_length = 0;
  CHECK_EQUAL(mooncake_engine_name(pair->target, NULL, 0, &full_length), MOONCAKE_ERROR_FULL);
  CHECK_EQUAL(full_length, length);
  REQUIRE_OK(mooncake_engine_name(pair->target, name, length + 1, NULL));

  REQUIRE_OK(mooncake_peer_probe(pair->initiator, name, WAIT_MS));
  REQUIRE_OK(mooncake_segment_open(pair->initiator, name, WAIT_MS, &pair->segment));
  CHECK(pair->segment > 0);
  REQUIRE_OK(mooncake_segment_open(pair->initiator, name, WAIT_MS, &again));
  CHECK_EQUAL(again, pair->segment);
}

static void check_descriptor(const pair_t *pair) {
  char name[256];
  char text[64 << 10];
  uint64_t count = 0;
  uint64_t length = 0;
  mooncake_remote_buffer_t buffers[4];
  REQUIRE_OK(mooncake_segment_buffers(pair->initiator, pair->segment, buffers, 4, &count));
  REQUIRE_EQUAL(count, 1);
  CHECK(buffers[0].address == (uint64_t)(uintptr_t)pair->remote);
  CHECK_EQUAL(buffers[0].length, LENGTH);
  CHECK_EQUAL(buffers[0].access, BOTH_RIGHTS);
  count = 0;
  CHECK_EQUAL(mooncake_segment_buffers(pair->initiator, pair->segment, NULL, 0, &count),
              MOONCAKE_ERROR_FULL);
  CHECK_EQUAL(count, 1);

  REQUIRE_OK(mooncake_engine_name(pair->target, name, sizeof name, NULL));
  REQUIRE_OK(mooncake_segment_describe(pair->initiator, pair->segment, text, sizeof text, &length));
  CHECK(text[0] == '{' && length == strlen(text));
  CHECK(strstr(text, name) != NULL && strstr(text, "\"buffers\"") != NULL);

  REQUIRE_OK(mooncake_engine_metrics(pair->initiator, text, sizeof text, &length));
  CHECK(length > 0 && strstr(text, "# TYPE ") != NULL);
}

/* Completion by wait. */
static void write_and_read_back(const pair_t *pair) {
  mooncake_batch_t batch = 0;
  mooncake_batch_status_t status;
  mooncake_transfer_status_t request_status;
  mooncake_transfer_request_t requests[8];
  fill_pattern(pair->local, LENGTH, 1);
  memset(pair->remote, 0, LENGTH);
  for (uint64_t index = 0; index < 8; index += 1) {
    requests[index] = make_request(pair, MOONCAKE_OPCODE_WRITE, index * (LENGTH / 8), LENGTH / 8);
  }
  REQUIRE_OK(mooncake_batch_create(pair->initiator, 9, &batch));
  REQUIRE_OK(mooncake_batch_submit(pair->initiator, batch, requests, 3, 0));
  REQUIRE_OK(mooncake_batch_submit(pair->initiator, batch, requests + 3, 5, WAIT_MS));
  REQUIRE_OK(mooncake_batch_wait(pair->initiator, batch, WAIT_MS, &status));
  CHECK_EQUAL(status.state, MOONCAKE_STATE_COMPLETED);
  CHECK_EQUAL(status.error, MOONCAKE_OK);
  CHECK_EQUAL(status.submitted_count, 8);
  CHECK_EQUAL(status.completed_count, 8);
  CHECK_EQUAL(status.terminal_count, 8);
  CHECK_EQUAL(status.transferred_bytes, LENGTH);
  CHECK(has_pattern(pair->remote, LENGTH, 1));
  for (uint64_t index = 0; index < 8; index += 1) {
    REQUIRE_OK(mooncake_batch_poll_request(pair->initiator, batch, index, &request_status));
    CHECK_EQUAL(request_status.state, MOONCAKE_STATE_COMPLETED);
    CHECK_EQUAL(request_status.transferred_bytes, LENGTH / 8);
  }
  CHECK_EQUAL(mooncake_batch_submit(pair->initiator, batch, requests, 2, 0), MOONCAKE_ERROR_FULL);
  REQUIRE_OK(mooncake_batch_free(pair->initiator, batch));
  CHECK_EQUAL(mooncake_batch_poll(pair->initiator, batch, &status), MOONCAKE_ERROR_INVALID_HANDLE);
  CHECK_EQUAL(mooncake_batch_free(pair->initiator, batch), MOONCAKE_ERROR_INVALID_HANDLE);

  /* Odd sizes at odd addresses, and an empty one; neighboring bytes do not change. */
  memset(pair->local, 0xAA, LENGTH);
  requests[0] = make_request(pair, MOONCAKE_OPCODE_READ, 4097, 12345);
  requests[1] = make_request(pair, MOONCAKE_OPCODE_READ, LENGTH - 1, 1);
  requests[2] = make_request(pair, MOONCAKE_OPCODE_READ, 0, 0);
  REQUIRE_OK(mooncake_transfer_sync(pair->initiator, requests, 3, WAIT_MS));
  CHECK(memcmp(pair->local + 4097, pair->remote + 4097, 12345) == 0);
  CHECK(pair->local[LENGTH - 1] == pair->remote[LENGTH - 1]);
  CHECK(has_only(pair->local, 4097, 0xAA));
  CHECK(has_only(pair->local + 4097 + 12345, LENGTH - 4097 - 12345 - 1, 0xAA));
}

/* Completion by poll. */
static void poll_until_done(const pair_t *pair) {
  mooncake_batch_t batch = 0;
  mooncake_batch_status_t status;
  mooncake_transfer_request_t request = make_request(pair, MOONCAKE_OPCODE_READ, 0, LENGTH);
  double end = seconds_now() + WAIT_MS / 1000;
  fill_pattern(pair->remote, LENGTH, 2);
  REQUIRE_OK(mooncake_batch_create(pair->initiator, 1, &batch));
  REQUIRE_OK(mooncake_batch_submit(pair->initiator, batch, &request, 1, 0));
  do {
    REQUIRE_OK(mooncake_batch_poll(pair->initiator, batch, &status));
    CHECK(status.transferred_bytes <= LENGTH);
    REQUIRE(seconds_now() < end);
  } while (status.state == MOONCAKE_STATE_WAITING);
  CHECK_EQUAL(status.state, MOONCAKE_STATE_COMPLETED);
  CHECK(has_pattern(pair->local, LENGTH, 2));
  REQUIRE_OK(mooncake_batch_free(pair->initiator, batch));
}

static void require_readable(int32_t descriptor) {
  struct pollfd event = {descriptor, POLLIN, 0};
  REQUIRE_EQUAL(poll(&event, 1, WAIT_MS), 1);
  CHECK((event.revents & POLLIN) != 0);
}

/* Completion by the event fd of the batch and of the engine. */
static void wait_by_descriptor(const pair_t *pair) {
  mooncake_batch_t batch = 0;
  mooncake_batch_status_t status;
  mooncake_transfer_request_t request = make_request(pair, MOONCAKE_OPCODE_WRITE, 0, LENGTH);
  int32_t batch_descriptor = -1;
  int32_t engine_descriptor = -1;
  uint64_t value = 0;
  REQUIRE_OK(mooncake_engine_event_fd(pair->initiator, &engine_descriptor));
  REQUIRE_OK(mooncake_batch_create(pair->initiator, 3, &batch));
  REQUIRE_OK(mooncake_batch_event_fd(pair->initiator, batch, &batch_descriptor));
  REQUIRE(batch_descriptor >= 0 && engine_descriptor >= 0);
  for (uint64_t round = 0; round < 3; round += 1) {
    /* The engine's descriptor may still report earlier batches. */
    struct pollfd event = {engine_descriptor, POLLIN, 0};
    if (poll(&event, 1, 0) == 1) REQUIRE(read(engine_descriptor, &value, 8) == 8);

    fill_pattern(pair->local, LENGTH, 30 + round);
    REQUIRE_OK(mooncake_batch_submit(pair->initiator, batch, &request, 1, 0));
    require_readable(batch_descriptor);
    REQUIRE_OK(mooncake_batch_poll(pair->initiator, batch, &status));
    CHECK_EQUAL(status.state, MOONCAKE_STATE_COMPLETED);
    CHECK_EQUAL(status.completed_count, round + 1);
    CHECK(has_pattern(pair->remote, LENGTH, 30 + round));
    require_readable(engine_descriptor);
    REQUIRE(read(engine_descriptor, &value, 8) == 8);
  }
  REQUIRE_OK(mooncake_batch_free(pair->initiator, batch));
}

typedef struct seen {
  mooncake_engine_t *engine;
  pthread_t caller; /* the thread that submitted */
  atomic_int call_count;
  int32_t state;
  uint64_t completed_count;
  mooncake_batch_t batch;
  int32_t free_code;
} seen_t;

/* The second time, the callback frees its own batch. */
static void note_completion(mooncake_batch_t batch, const mooncake_batch_status_t *status,
                            void *context) {
  seen_t *seen = (seen_t *)context;
  seen->batch = batch;
  seen->state = status->state;
  seen->completed_count = status->completed_count;
  CHECK(!pthread_equal(pthread_self(), seen->caller));
  if (atomic_load(&seen->call_count) == 1) {
    seen->free_code = mooncake_batch_free(seen->engine, batch);
  }
  atomic_fetch_add(&seen->call_count, 1);
}

static void await_calls(seen_t *seen, int count) {
  double end = seconds_now() + WAIT_MS / 1000;
  while (atomic_load(&seen->call_count) < count && seconds_now() < end) sleep_milliseconds(1);
  REQUIRE_EQUAL(atomic_load(&seen->call_count), count);
}

/* Completion by callback. */
static void wait_by_callback(const pair_t *pair) {
  mooncake_batch_t batch = 0;
  mooncake_batch_status_t status;
  mooncake_transfer_request_t request = make_request(pair, MOONCAKE_OPCODE_READ, 0, 4096);
  seen_t seen;
  memset(&seen, 0, sizeof seen);
  seen.engine = pair->initiator;
  seen.caller = pthread_self();
  seen.free_code = -999;
  REQUIRE_OK(mooncake_batch_create(pair->initiator, 2, &batch));
  REQUIRE_OK(mooncake_batch_set_callback(pair->initiator, batch, note_completion, &seen));
  REQUIRE_OK(mooncake_batch_submit(pair->initiator, batch, &request, 1, 0));
  await_calls(&seen, 1);
  CHECK(seen.batch == batch);
  CHECK_EQUAL(seen.state, MOONCAKE_STATE_COMPLETED);
  CHECK_EQUAL(seen.completed_count, 1);
  CHECK_EQUAL(mooncake_batch_set_callback(pair->initiator, batch, note_completion, &seen),
              MOONCAKE_ERROR_BUSY);
  REQUIRE_OK(mooncake_batch_submit(pair->initiator, batch, &request, 1, 0));
  await_calls(&seen, 2);
  CHECK_EQUAL(seen.completed_count, 2);
  CHECK_EQUAL(seen.free_code, MOONCAKE_OK);
  CHECK_EQUAL(mooncake_batch_poll(pair->initiator, batch, &status), MOONCAKE_ERROR_INVALID_HANDLE);
  sleep_milliseconds(50);
  CHECK_EQUAL(atomic_load(&seen.call_count), 2);
}

static void expect_notification(mooncake_engine_t *engine, const char *name, const char *message) {
  mooncake_notification_t *notification = NULL;
  REQUIRE_OK(mooncake_notification_receive(engine, &notification));
  REQUIRE(notification != NULL);
  CHECK(strcmp(notification->name, name) == 0);
  CHECK(strcmp(notification->message, message) == 0);
  mooncake_notification_free(notification);
}

static void notify(const pair_t *pair) {
  static const char awkward[] = "line\none \"quoted\" \\ \xC3\xA9 \xF0\x9F\xA5\xAE {}";
  mooncake_batch_t batch = 0;
  mooncake_batch_status_t status;
  mooncake_notification_t *notification = NULL;
  mooncake_transfer_request_t request = make_request(pair, MOONCAKE_OPCODE_WRITE, 0, LENGTH);
  REQUIRE_OK(mooncake_notification_send(pair->initiator, pair->segment, "first", "", WAIT_MS));
  REQUIRE_OK(mooncake_notification_send(pair->initiator, pair->segment, "next", awkward, WAIT_MS));
  expect_notification(pair->target, "first", "");
  expect_notification(pair->target, "next", awkward);
  REQUIRE_OK(mooncake_notification_receive(pair->target, &notification));
  CHECK(notification == NULL);

  fill_pattern(pair->local, LENGTH, 5);
  REQUIRE_OK(mooncake_batch_create(pair->initiator, 1, &batch));
  REQUIRE_OK(mooncake_batch_submit_notify(pair->initiator, batch, &request, 1, 0, "weights",
                                          "v1"));
  REQUIRE_OK(mooncake_batch_wait(pair->initiator, batch, WAIT_MS, &status));
  CHECK_EQUAL(status.state, MOONCAKE_STATE_COMPLETED);
  expect_notification(pair->target, "weights", "v1");
  CHECK(has_pattern(pair->remote, LENGTH, 5));
  REQUIRE_OK(mooncake_batch_free(pair->initiator, batch));
  mooncake_notification_free(NULL);
}

/* A transfer must fail with one of the "not allowed" codes and leave the target alone. */
static void expect_refused(const pair_t *pair, int32_t opcode, unsigned char *target) {
  mooncake_transfer_request_t request = make_request(pair, opcode, 0, 4096);
  request.target_offset = (uint64_t)(uintptr_t)target;
  memset(target, 0x11, 4096);
  memset(pair->local, 0x22, 4096);
  int32_t code = mooncake_transfer_sync(pair->initiator, &request, 1, 5000);
  if (!CHECK(code == MOONCAKE_ERROR_ACCESS_DENIED || code == MOONCAKE_ERROR_NOT_REGISTERED)) {
    fprintf(stderr, "  opcode %d gave %s\n", opcode, mooncake_error_name(code));
  }
  CHECK(has_only(target, 4096, 0x11));
  if (opcode == MOONCAKE_OPCODE_READ) CHECK(has_only(pair->local, 4096, 0x22));
}

static void rights_and_revocation(const pair_t *pair) {
  unsigned char *target = (unsigned char *)new_pages(4096);
  mooncake_transfer_request_t request = make_request(pair, MOONCAKE_OPCODE_READ, 0, 4096);
  request.target_offset = (uint64_t)(uintptr_t)target;

  expect_refused(pair, MOONCAKE_OPCODE_READ, target);

  REQUIRE_OK(mooncake_memory_register(pair->target, target, 4096, NULL,
                                      MOONCAKE_ACCESS_REMOTE_READ));
  fill_pattern(target, 4096, 6);
  REQUIRE_OK(mooncake_transfer_sync(pair->initiator, &request, 1, WAIT_MS));
  CHECK(has_pattern(pair->local, 4096, 6));
  expect_refused(pair, MOONCAKE_OPCODE_WRITE, target);
  REQUIRE_OK(mooncake_memory_unregister(pair->target, target));
  expect_refused(pair, MOONCAKE_OPCODE_READ, target);

  REQUIRE_OK(mooncake_memory_register(pair->target, target, 4096, NULL, MOONCAKE_ACCESS_LOCAL));
  expect_refused(pair, MOONCAKE_OPCODE_READ, target);
  expect_refused(pair, MOONCAKE_OPCODE_WRITE, target);
  REQUIRE_OK(mooncake_memory_unregister(pair->target, target));
  free(target);
}

static void owned_memory(const pair_t *pair) {
  void *address = NULL;
  mooncake_transfer_request_t request = make_request(pair, MOONCAKE_OPCODE_WRITE, 0, LENGTH);
  REQUIRE_OK(mooncake_memory_allocate(pair->target, LENGTH, NULL, BOTH_RIGHTS, &address));
  REQUIRE(address != NULL);
  CHECK((uintptr_t)address % 4096 == 0);
  CHECK(has_only(address, LENGTH, 0));
  fill_pattern(pair->local, LENGTH, 7);
  request.target_offset = (uint64_t)(uintptr_t)address;
  REQUIRE_OK(mooncake_transfer_sync(pair->initiator, &request, 1, WAIT_MS));
  CHECK(has_pattern(address, LENGTH, 7));
  REQUIRE_OK(mooncake_memory_free(pair->target, address));
  CHECK_EQUAL(mooncake_memory_free(pair->target, address), MOONCAKE_ERROR_NOT_REGISTERED);
}

static void batches_of_buffers(const pair_t *pair) {
  unsigned char *memory = (unsigned char *)new_pages(4 * 4096);
  mooncake_buffer_t buffers[4];
  void *addresses[4];
  for (int index = 0; index < 4; index += 1) {
    addresses[index] = memory + index * 4096;
    buffers[index].address = addresses[index];
    buffers[index].length = 4096;
  }
  REQUIRE_OK(mooncake_memory_register_batch(pair->target, buffers, 4, "cpu:0", BOTH_RIGHTS));
  CHECK_EQUAL(mooncake_memory_register(pair->target, memory + 100, 8, NULL, 0),
              MOONCAKE_ERROR_OVERLAP);
  REQUIRE_OK(mooncake_memory_unregister(pair->target, addresses[2]));
  /* All or none: the last one overlaps, so the third must not stay registered. */
  CHECK_EQUAL(mooncake_memory_register_batch(pair->target, buffers + 2, 2, NULL, 0),
              MOONCAKE_ERROR_OVERLAP);
  CHECK_EQUAL(mooncake_memory_unregister(pair->target, addresses[2]),
              MOONCAKE_ERROR_NOT_REGISTERED);
  /* Returns the first error, but does the rest nevertheless. */
  CHECK_EQUAL(mooncake_memory_unregister_batch(pair->target, addresses, 4),
              MOONCAKE_ERROR_NOT_REGISTERED);
  for (int index = 0; index < 4; index += 1) {
    CHECK_EQUAL(mooncake_memory_unregister(pair->target, addresses[index]),
                MOONCAKE_ERROR_NOT_REGISTERED);
  }
  free(memory);
}

static atomic_int log_line_count;

static void count_lines(int32_t level, const char *message, void *context) {
  (void)context;
  CHECK(level >= MOONCAKE_LOG_DEBUG && level <= MOONCAKE_LOG_ERROR);
  CHECK(strchr(message, '\n') == NULL);
  atomic_fetch_add(&log_line_count, 1);
}

static void log_lines(const pair_t *pair) {
  mooncake_segment_t segment = 0;
  REQUIRE_OK(mooncake_log_set_callback(count_lines, NULL));
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_DEBUG));
  CHECK_EQUAL(mooncake_segment_open(pair->initiator, "127.0.0.1:1", 2000, &segment),
              MOONCAKE_ERROR_UNREACHABLE);
  CHECK(strstr(mooncake_error_message(), "127.0.0.1:1") != NULL);
  CHECK(atomic_load(&log_line_count) > 0);
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_OFF));
  atomic_store(&log_line_count, 0);
  CHECK(mooncake_segment_open(pair->initiator, "127.0.0.1:1", 2000, &segment) != MOONCAKE_OK);
  CHECK_EQUAL(atomic_load(&log_line_count), 0);
  REQUIRE_OK(mooncake_log_set_callback(NULL, NULL));
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_WARNING));
}

int main(void) {
  char version[32];
  snprintf(version, sizeof version, "%d.%d.%d", MOONCAKE_VERSION_MAJOR, MOONCAKE_VERSION_MINOR,
           MOONCAKE_VERSION_PATCH);
  CHECK(strcmp(mooncake_version(), version) == 0);
  CHECK(strcmp(mooncake_error_message(), "") == 0);

  pair_t pair = create_pair();
  open_by_name(&pair);
  check_descriptor(&pair);
  write_and_read_back(&pair);
  poll_until_done(&pair);
  wait_by_descriptor(&pair);
  wait_by_callback(&pair);
  notify(&pair);
  rights_and_revocation(&pair);
  owned_memory(&pair);
  batches_of_buffers(&pair);
  log_lines(&pair);

  REQUIRE_OK(mooncake_segment_close(pair.initiator, pair.segment));
  REQUIRE_OK(mooncake_memory_unregister(pair.initiator, pair.local));
  REQUIRE_OK(mooncake_memory_unregister(pair.target, pair.remote));
  REQUIRE_OK(mooncake_engine_destroy(pair.initiator));
  CHECK_EQUAL(mooncake_engine_destroy(pair.initiator), MOONCAKE_ERROR_INVALID_HANDLE);
  REQUIRE_OK(mooncake_engine_destroy(pair.target));
  return check_result("lifecycle");
}
