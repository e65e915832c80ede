/* The drop-in header for a program that knows two ends of a transfer and only reads the log:
 * every transfer ends, missing data never counts as success, and the log says why a call
 * failed. */
#include <pthread.h>
#include <stdatomic.h>

#include "mooncake.h"
#include "transfer_engine_c.h"

#include "check.h"
#include "peer.h"

enum { LENGTH = 1 << 20, WAIT_SECONDS = 20 };

static atomic_int line_count;
static char last_line[1024];

static void take_line(int32_t level, const char *message, void *context) {
  (void)context;
  if (level < MOONCAKE_LOG_WARNING) return;
  snprintf(last_line, sizeof last_line, "%s", message);
  atomic_fetch_add(&line_count, 1);
}

static void judge(int holds, int lines, const char *call, int line) {
  if (!holds || lines < 1) {
    check_failure_count += 1;
    fprintf(stderr, "dropin_failures.c:%d: %s: %s, %d lines in the log\n", line, call,
            holds ? "failed as it should" : "unexpected result", lines);
  }
}

/* The condition must hold for a failing call, and the log must say why. */
#define FAILS(condition) \
  do { \
    int before_ = atomic_load(&line_count); \
    int holds_ = (condition) ? 1 : 0; \
    judge(holds_, atomic_load(&line_count) - before_, #condition, __LINE__); \
  } while (0)

/* Polls as programs do, ignoring the code, until one of the two ends that they know. */
static int await_end(transfer_engine_t engine, batch_id_t batch, size_t task) {
  transfer_status_t status = {STATUS_WAITING, 0};
  double end = seconds_now() + WAIT_SECONDS;
  while (status.status != STATUS_COMPLETED && status.status != STATUS_FAILED) {
    (void)getTransferStatus(engine, batch, task, &status);
    REQUIRE(seconds_now() < end);
  }
  return status.status;
}

static transfer_engine_t create_engine(void) {
  transfer_engine_t engine = createTransferEngine("P2PHANDSHAKE", "127.0.0.1:0", NULL, 0, 0);
  REQUIRE(engine != NULL);
  return engine;
}

static void failures_are_logged(void) {
  static char broken[] = "{";
  static char text[] = "text";
  void *arguments[] = {broken, NULL};
  unsigned char *memory = (unsigned char *)new_pages(2 * 4096);
  buffer_entry_t entry = {NULL, 1};
  void *nowhere = memory + 1;
  notify_msg_t message = {text, text};
  notify_msg_t no_text = {text, NULL};
  nic_load_stat_t load;
  transfer_status_t status;
  char buffer[8];
  FAILS(createTransferEngine("gopher://127.0.0.1:70", "127.0.0.1:0", NULL, 0, 0) == NULL);
  FAILS(createTransferEngine("P2PHANDSHAKE", NULL, NULL, 0, 0) == NULL);
  transfer_engine_t engine = create_engine();
  transfer_request_t request = {OPCODE_READ, memory, LOCAL_SEGMENT, 4096, 64};
  batch_id_t batch = allocateBatchID(engine, 1);
  FAILS(submitTransfer(engine, batch, &request, 1) == 8);
  CHECK(strstr(last_line, "installTransport") != NULL);
  FAILS(installTransport(engine, "rdma", NULL) == NULL);
  CHECK(strstr(last_line, "installTransport") != NULL && strstr(last_line, "rdma") != NULL);
  CHECK(strstr(last_line, "'tcp'") != NULL);
  FAILS(installTransport(engine, "pigeon", NULL) == NULL);
  FAILS(installTransport(engine, "tcp", arguments) == NULL);
  REQUIRE(installTransport(engine, "tcp", NULL) != NULL);
  FAILS(getLocalIpAndPort(engine, NULL, 0) < 0);
  FAILS(showLinks(engine, buffer, 0, 0) < 0);
  FAILS(getNicLoadStats(engine, &load, NULL) < 0);
  FAILS(registerLocalMemory(engine, NULL, 4096, NULL, 1) < 0);
  REQUIRE_EQUAL(registerLocalMemory(engine, memory, 4096, NULL, 1), 0);
  FAILS(registerLocalMemory(engine, memory, 4096, NULL, 1) == ERR_ADDRESS_OVERLAPPED);
  FAILS(registerLocalMemoryBatch(engine, &entry, 1, NULL) < 0);
  FAILS(unregisterLocalMemory(engine, memory + 1) == ERR_ADDRESS_NOT_REGISTERED);
  FAILS(unregisterLocalMemoryBatch(engine, &nowhere, 1) == ERR_ADDRESS_NOT_REGISTERED);
  FAILS(openSegment(engine, "") == -1);
  FAILS(openSegment(engine, "127.0.0.1:1") == -1);
  FAILS(openSegmentNoCache(engine, "127.0.0.1:1") == -1);
  FAILS(removeLocalSegment(engine, NULL) < 0);
  FAILS(allocateBatchID(engine, SIZE_MAX) == INVALID_BATCH);
  FAILS(submitTransfer(engine, batch, NULL, 1) == 1);
  FAILS(submitTransferWithNotify(engine, batch, &request, 1, no_text) == 1);
  FAILS(getTransferStatus(engine, batch, 0, &status) == 1);
  FAILS(freeBatchID(engine, INVALID_BATCH) == 1);
  FAILS(getNotifsFromEngine(engine, NULL) == NULL);
  FAILS(genNotifyInEngine(engine, 77, message) == ERR_METADATA);
  /* From the middle of the buffer beyond its end: the log names the buffer, its end and the
   * range. */
  request.source = memory + 64;
  request.target_offset = (uint64_t)(uintptr_t)memory;
  request.length = 4096;
  snprintf(buffer, sizeof buffer, "+%d)", 4096);
  FAILS(submitTransfer(engine, batch, &request, 1) == 3);
  CHECK(strstr(last_line, "ends at 0x") != NULL && strstr(last_line, buffer) != NULL);
  destroyTransferEngine(engine);
  FAILS(closeSegment(engine, 0) == ERR_INVALID_ARGUMENT);
  FAILS(syncSegmentCache(engine) == ERR_INVALID_ARGUMENT);
  free(memory);

  /* A program that repeats a bad call forever does not fill the disk. */
  sleep_milliseconds(1100);
  int before = atomic_load(&line_count);
  for (int index = 0; index < 10000; index += 1) (void)freeBatchID(engine, 1);
  CHECK(atomic_load(&line_count) - before <= 100);
}

/* Failed calls whose result the program ignored. */
static void nothing_is_taken_for_success(void) {
  unsigned char *memory = (unsigned char *)new_pages(4096);
  transfer_engine_t engine = create_engine();
  transfer_request_t requests[2] = {{OPCODE_READ, memory, LOCAL_SEGMENT, 0, 0},
                                    {OPCODE_READ, memory, 4711, 0, 64}};
  REQUIRE(installTransport(engine, "tcp", NULL) != NULL);
  CHECK_EQUAL(await_end(engine, INVALID_BATCH, 0), STATUS_FAILED);
  CHECK_EQUAL(await_end(engine, 0, 0), STATUS_FAILED);
  CHECK_EQUAL(await_end(NULL, 0, 0), STATUS_FAILED);
  batch_id_t batch = allocateBatchID(engine, 4);
  REQUIRE(batch != INVALID_BATCH);
  REQUIRE_EQUAL(submitTransfer(engine, batch, requests, 1), 0);
  /* Refused as a whole: neither task exists. */
  CHECK_EQUAL(submitTransfer(engine, batch, requests, 2), 1);
  CHECK_EQUAL(await_end(engine, batch, 0), STATUS_COMPLETED);
  CHECK_EQUAL(await_end(engine, batch, 1), STATUS_FAILED);
  CHECK_EQUAL(await_end(engine, batch, 2), STATUS_FAILED);
  CHECK_EQUAL(await_end(engine, batch, SIZE_MAX), STATUS_FAILED);
  CHECK_EQUAL(freeBatchID(engine, batch), 0);
  CHECK_EQUAL(await_end(engine, batch, 0), STATUS_FAILED);
  destroyTransferEngine(engine);
  CHECK_EQUAL(await_end(engine, batch, 0), STATUS_FAILED);
  free(memory);
}

typedef struct waiter {
  transfer_engine_t engine;
  batch_id_t batch;
  int end;
} waiter_t;

static void *wait_for_end(void *argument) {
  waiter_t *self = (waiter_t *)argument;
  self->end = await_end(self->engine, self->batch, 0);
  return NULL;
}

/* A thread destroys the engine while another polls a transfer that a stopped peer never
 * completes. */
static void destroyed_meanwhile(const peer_t *peer) {
  unsigned char *memory = (unsigned char *)new_pages(LENGTH);
  waiter_t waiter = {create_engine(), 0, -1};
  pthread_t thread;
  REQUIRE(installTransport(waiter.engine, "tcp", NULL) != NULL);
  transfer_request_t request = {OPCODE_READ, memory, openSegment(waiter.engine, peer->name),
                                peer->address, LENGTH};
  REQUIRE(request.target_id > 0);
  peer_stop(peer);
  waiter.batch = allocateBatchID(waiter.engine, 1);
  REQUIRE_EQUAL(submitTransfer(waiter.engine, waiter.batch, &request, 1), 0);
  REQUIRE(pthread_create(&thread, NULL, wait_for_end, &waiter) == 0);
  sleep_milliseconds(100);
  destroyTransferEngine(waiter.engine);
  REQUIRE(pthread_join(thread, NULL) == 0);
  CHECK_EQUAL(waiter.end, STATUS_FAILED);
  peer_continue(peer);
  free(memory);
}

int main(void) {
  peer_t peer = peer_start();
  REQUIRE_OK(mooncake_log_set_callback(take_line, NULL));
  failures_are_logged();
  nothing_is_taken_for_success();
  destroyed_meanwhile(&peer);
  peer_kill(&peer);
  REQUIRE_OK(mooncake_log_set_callback(NULL, NULL));
  return check_result("dropin_failures");
}
