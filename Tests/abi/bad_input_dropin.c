/* Every kind of bad input to transfer_engine_c.h: each gives a code of the right error space
 * and a message, and the engine still works. */
#include "mooncake.h"
#include "transfer_engine_c.h"

#include "check.h"

enum { LENGTH = 64 << 10, LONG_LENGTH = 4 << 20 };

static char *long_text; /* LONG_LENGTH times 'a' */
static char marker[512];

/* Leaves a message unrelated to the next call, so that a stale one is noticed. */
static void provoke(void) {
  CHECK_EQUAL(mooncake_log_set_level(77777), MOONCAKE_ERROR_INVALID_ARGUMENT);
  snprintf(marker, sizeof marker, "%s", mooncake_error_message());
}

static void judge(int holds, long long value, const char *call, int line) {
  const char *message = mooncake_error_message();
  if (!holds) {
    check_failure_count += 1;
    fprintf(stderr, "bad_input_dropin.c:%d: %s gave %lld: %s\n", line, call, value, message);
  } else if (message == NULL || message[0] == 0 || strcmp(message, marker) == 0) {
    check_failure_count += 1;
    fprintf(stderr, "bad_input_dropin.c:%d: %s left no message\n", line, call);
  }
}

/* The call must give exactly this code. */
#define EXPECT(code, call) \
  do { \
    provoke(); \
    long long value_ = (call); \
    judge(value_ == (code), value_, #call, __LINE__); \
  } while (0)

/* The call must give any negative code. */
#define EXPECT_NEGATIVE(call) \
  do { \
    provoke(); \
    long long value_ = (call); \
    judge(value_ < 0, value_, #call, __LINE__); \
  } while (0)

/* The call must give a null pointer. */
#define EXPECT_NULL(call) \
  do { \
    provoke(); \
    const void *value_ = (call); \
    judge(value_ == NULL, value_ != NULL, #call, __LINE__); \
  } while (0)

#define EXPECT_NO_BATCH(call) \
  do { \
    provoke(); \
    uint64_t value_ = (call); \
    judge(value_ == INVALID_BATCH, (long long)value_, #call, __LINE__); \
  } while (0)

/* ---- Handles ---- */

static void try_handle(transfer_engine_t engine) {
  static unsigned char memory[4096];
  static char name[] = "name";
  char text[64] = "untouched";
  notify_msg_t message = {name, name};
  transfer_request_t request = {OPCODE_READ, memory, LOCAL_SEGMENT, 4096, 16};
  transfer_status_t status = {42, 42};
  buffer_entry_t entry = {memory, sizeof memory};
  void *address = memory;
  nic_load_stat_t load;
  size_t count = 1;
  int size = 0;

  EXPECT(ERR_INVALID_ARGUMENT, discoverTopology(engine));
  EXPECT(ERR_INVALID_ARGUMENT, getLocalIpAndPort(engine, text, sizeof text));
  EXPECT_NULL(installTransport(engine, "tcp", NULL));
  EXPECT(ERR_INVALID_ARGUMENT, uninstallTransport(engine, "tcp"));
  EXPECT_NEGATIVE(openSegment(engine, "127.0.0.1:1"));
  EXPECT_NEGATIVE(openSegmentNoCache(engine, "127.0.0.1:1"));
  EXPECT(ERR_INVALID_ARGUMENT, closeSegment(engine, 1));
  EXPECT(ERR_INVALID_ARGUMENT, warmupEfaSegment(engine, "127.0.0.1:1"));
  EXPECT(ERR_INVALID_ARGUMENT, removeLocalSegment(engine, "127.0.0.1:1"));
  EXPECT(ERR_INVALID_ARGUMENT, syncSegmentCache(engine));
  EXPECT(ERR_INVALID_ARGUMENT, registerLocalMemory(engine, memory, sizeof memory, "cpu:0", 1));
  EXPECT(ERR_INVALID_ARGUMENT, unregisterLocalMemory(engine, memory));
  EXPECT(ERR_INVALID_ARGUMENT, registerLocalMemoryBatch(engine, &entry, 1, "cpu:0"));
  EXPECT(ERR_INVALID_ARGUMENT, unregisterLocalMemoryBatch(engine, &address, 1));
  EXPECT_NO_BATCH(allocateBatchID(engine, 1));
  EXPECT(1, submitTransfer(engine, 1, &request, 1));
  EXPECT(1, submitTransferWithNotify(engine, 1, &request, 1, message));
  EXPECT(1, getTransferStatus(engine, 1, 0, &status));
  EXPECT(1, freeBatchID(engine, 1));
  EXPECT_NULL(getNotifsFromEngine(engine, &size));
  EXPECT(ERR_INVALID_ARGUMENT, genNotifyInEngine(engine, 1, message));
  EXPECT(ERR_INVALID_ARGUMENT, getNicLoadStats(engine, &load, &count));
  EXPECT(ERR_INVALID_ARGUMENT, showLinks(engine, text, sizeof text, 1));
  enableGracefulShutdown(engine);
  destroyTransferEngine(engine);
  CHECK_EQUAL(status.status, STATUS_FAILED);
  CHECK_EQUAL(status.transferred_bytes, 0);
  CHECK_EQUAL(size, 0);
  CHECK(strcmp(text, "untouched") == 0);
}

static transfer_engine_t create_engine(void) {
  transfer_engine_t engine =
      createTransferEngine("P2PHANDSHAKE", "127.0.0.1:0", "127.0.0.1", 0, 0);
  REQUIRE(engine != NULL);
  return engine;
}

static void bad_handles(void) {
  static uint64_t zeros[64];
  static uint64_t noise[64];
  void *freed = malloc(256);
  uintptr_t freed_address = (uintptr_t)freed;
  fill_pattern(noise, sizeof noise, 9);
  free(freed);
  transfer_engine_t engine = create_engine();
  transport_t transport = installTransport(engine, "tcp", NULL);
  REQUIRE(transport != NULL);
  uintptr_t live = (uintptr_t)engine;
  uintptr_t values[] = {0, 1, 8, 4096, UINTPTR_MAX, UINTPTR_MAX - 7, UINTPTR_MAX / 2 + 1,
                        (uintptr_t)zeros, (uintptr_t)noise, freed_address,
                        live + 1, live - 1, live + 8, live ^ ((uintptr_t)1 << 40)};
  for (size_t index = 0; index < sizeof values / sizeof values[0]; index += 1) {
    /* The freed block may now be the engine itself. */
    if (values[index] != live) try_handle((transfer_engine_t)values[index]);
  }
  destroyTransferEngine(engine);
  try_handle(engine);
  transfer_engine_t next = create_engine();
  if (next != engine) try_handle(engine);
  destroyTransferEngine(next);

  /* An engine of the other header is not valid here, nor is a transport. */
  mooncake_engine_t *other = NULL;
  REQUIRE_OK(mooncake_engine_create(NULL, &other));
  try_handle((transfer_engine_t)other);
  REQUIRE_OK(mooncake_engine_destroy(other));
  try_handle(transport);
}

/* ---- Arguments ---- */

static void bad_creation(void) {
  static char broken[] = "{\"cpu:0\": [[\"mlx5_0\"]";
  static char misshapen[] = "{\"cpu:0\": [[\"mlx5_0\"]]}";
  void *broken_arguments[] = {broken, NULL};
  void *misshapen_arguments[] = {misshapen, NULL};
  EXPECT_NULL(createTransferEngine(NULL, "127.0.0.1:0", NULL, 0, 0));
  EXPECT_NULL(createTransferEngine("", "127.0.0.1:0", NULL, 0, 0));
  EXPECT_NULL(createTransferEngine("P2PHANDSHAKE", NULL, NULL, 0, 0));
  EXPECT_NULL(createTransferEngine("P2PHANDSHAKE", "", NULL, 0, 0));
  EXPECT_NULL(createTransferEngine("P2PHANDSHAKE", long_text, NULL, 0, 0));
  EXPECT_NULL(createTransferEngine("pigeon://127.0.0.1:1", "127.0.0.1:0", NULL, 0, 0));
  EXPECT_NULL(createTransferEngine("://", "127.0.0.1:0", NULL, 0, 0));
  EXPECT_NULL(createTransferEngine(long_text, "127.0.0.1:0", NULL, 0, 0));

  transfer_engine_t engine = create_engine();
  EXPECT_NULL(installTransport(engine, NULL, NULL));
  EXPECT_NULL(installTransport(engine, "", NULL));
  EXPECT_NULL(installTransport(engine, "pigeon", NULL));
  EXPECT_NULL(installTransport(engine, long_text, NULL));
  EXPECT_NULL(installTransport(engine, "tcp", broken_arguments));
  EXPECT_NULL(installTransport(engine, "tcp", misshapen_arguments));
  CHECK(installTransport(engine, "tcp", NULL) != NULL);
  destroyTransferEngine(engine);
}

static void bad_memory(transfer_engine_t engine, unsigned char *registered) {
  unsigned char *other = (unsigned char *)new_pages(4 * 4096);
  buffer_entry_t entries[2] = {{other, 4096}, {NULL, 4096}};
  void *addresses[2] = {other, NULL};
  EXPECT(ERR_INVALID_ARGUMENT, registerLocalMemory(engine, NULL, 4096, NULL, 1));
  EXPECT(ERR_INVALID_ARGUMENT, registerLocalMemory(engine, other, 0, NULL, 1));
  EXPECT(ERR_INVALID_ARGUMENT, registerLocalMemory(engine, other, SIZE_MAX, NULL, 1));
  EXPECT(ERR_INVALID_ARGUMENT, registerLocalMemory(engine, (void *)UINTPTR_MAX, 2, NULL, 1));
  EXPECT(ERR_INVALID_ARGUMENT, registerLocalMemory(engine, other, 4096, long_text, 1));
  EXPECT(ERR_ADDRESS_OVERLAPPED, registerLocalMemory(engine, registered + 1, 1, NULL, 1));
  EXPECT(ERR_ADDRESS_NOT_REGISTERED, unregisterLocalMemory(engine, other));
  EXPECT_NEGATIVE(unregisterLocalMemory(engine, NULL));
  EXPECT(ERR_INVALID_ARGUMENT, registerLocalMemoryBatch(engine, NULL, 1, NULL));
  EXPECT(ERR_INVALID_ARGUMENT, registerLocalMemoryBatch(engine, entries, 2, NULL));
  EXPECT(ERR_ADDRESS_NOT_REGISTERED, unregisterLocalMemory(engine, other));
  EXPECT_NEGATIVE(registerLocalMemoryBatch(engine, entries, SIZE_MAX, NULL));
  EXPECT_NEGATIVE(registerLocalMemoryBatch(engine, entries, (size_t)1 << 60, NULL));
  EXPECT(ERR_INVALID_ARGUMENT, unregisterLocalMemoryBatch(engine, NULL, 1));
  EXPECT(ERR_ADDRESS_NOT_REGISTERED, unregisterLocalMemoryBatch(engine, addresses, 2));
  EXPECT_NEGATIVE(unregisterLocalMemoryBatch(engine, addresses, SIZE_MAX));
  free(other);
}

static void bad_segments(transfer_engine_t engine) {
  static const char *const malformed[] = {"",     "/",        ":",           "127.0.0.1:x",
                                          "[::1", "[]:12345", "127.0.0.1:0", "127.0.0.1:70000",
                                          "\xFF\xFE\x80:1"};
  char text[64];
  EXPECT(ERR_INVALID_ARGUMENT, openSegment(engine, NULL));
  EXPECT(ERR_INVALID_ARGUMENT, openSegmentNoCache(engine, NULL));
  EXPECT(ERR_INVALID_ARGUMENT, openSegment(engine, long_text));
  EXPECT(ERR_INVALID_ARGUMENT, openSegmentNoCache(engine, long_text));
  for (size_t index = 0; index < sizeof malformed / sizeof malformed[0]; index += 1) {
    EXPECT_NEGATIVE(openSegment(engine, malformed[index]));
    EXPECT_NEGATIVE(openSegmentNoCache(engine, malformed[index]));
  }
  EXPECT_NEGATIVE(openSegment(engine, "127.0.0.1:1"));
  EXPECT(ERR_INVALID_ARGUMENT, removeLocalSegment(engine, NULL));
  EXPECT(ERR_INVALID_ARGUMENT, removeLocalSegment(engine, ""));
  CHECK_EQUAL(closeSegment(engine, 12345), 0);
  CHECK_EQUAL(closeSegment(engine, INT32_MIN), 0);
  CHECK_EQUAL(uninstallTransport(engine, NULL), 0);
  CHECK_EQUAL(warmupEfaSegment(engine, NULL), 0);
  EXPECT(ERR_INVALID_ARGUMENT, getLocalIpAndPort(engine, NULL, 10));
  EXPECT(ERR_INVALID_ARGUMENT, getLocalIpAndPort(engine, text, 0));
  EXPECT(ERR_INVALID_ARGUMENT, showLinks(engine, NULL, 10, 0));
  EXPECT(ERR_INVALID_ARGUMENT, showLinks(engine, text, 0, 0));
  /* No buffer has that length: any code is fine, as long as only the text is written. */
  int code = getLocalIpAndPort(engine, text, SIZE_MAX);
  CHECK(code == 0 || code == ERR_INVALID_ARGUMENT);
}

static void bad_requests(transfer_engine_t engine, unsigned char *memory) {
  const transfer_request_t good = {OPCODE_WRITE, memory, LOCAL_SEGMENT,
                                   (uint64_t)(uintptr_t)memory + 8192, 4096};
  static char name[] = "name";
  notify_msg_t message = {name, name};
  notify_msg_t no_name = {NULL, name};
  notify_msg_t no_text = {name, NULL};
  notify_msg_t too_long = {name, long_text};
  transfer_request_t requests[2] = {good, good};
  transfer_status_t status = {42, 42};
  EXPECT_NO_BATCH(allocateBatchID(engine, SIZE_MAX));
  EXPECT_NO_BATCH(allocateBatchID(engine, (size_t)1 << 60));
  batch_id_t batch = allocateBatchID(engine, 4);
  REQUIRE(batch != INVALID_BATCH);
#define EXPECT_SUBMIT(field, value) \
  do { \
    requests[1] = good; \
    requests[1].field = (value); \
    EXPECT(1, submitTransfer(engine, batch, requests, 2)); \
  } while (0)
  EXPECT_SUBMIT(opcode, 2);
  EXPECT_SUBMIT(opcode, INT32_MIN);
  EXPECT_SUBMIT(target_id, 12345);
  EXPECT_SUBMIT(target_id, -1);
  EXPECT_SUBMIT(source, NULL);
  EXPECT_SUBMIT(length, UINT64_MAX);
  EXPECT_SUBMIT(target_offset, UINT64_MAX - 10);
#undef EXPECT_SUBMIT
  /* Beyond a registered buffer, and into one. */
  requests[1] = good;
  requests[1].source = memory + LENGTH - 4095;
  EXPECT(3, submitTransfer(engine, batch, requests, 2));
  requests[1].source = memory - 1;
  EXPECT(3, submitTransferWithNotify(engine, batch, requests, 2, message));
  requests[1] = good;
  EXPECT(1, submitTransfer(engine, batch, NULL, 1));
  EXPECT(2, submitTransfer(engine, batch, requests, 5));
  EXPECT(2, submitTransfer(engine, batch, requests, SIZE_MAX));
  EXPECT(1, submitTransferWithNotify(engine, batch, requests, 0, message));
  EXPECT(1, submitTransferWithNotify(engine, batch, requests, 1, no_name));
  EXPECT(1, submitTransferWithNotify(engine, batch, requests, 1, no_text));
  EXPECT(1, submitTransferWithNotify(engine, batch, requests, 1, too_long));
  EXPECT(1, getTransferStatus(engine, batch, 0, &status));
  EXPECT(1, getTransferStatus(engine, batch, SIZE_MAX, &status));
  REQUIRE_EQUAL(submitTransfer(engine, batch, requests, 1), 0);
  EXPECT(1, getTransferStatus(engine, batch, 0, NULL));
  EXPECT(1, getTransferStatus(engine, batch, 1, &status));
  CHECK_EQUAL(status.status, STATUS_FAILED);
  CHECK_EQUAL(status.transferred_bytes, 0);
  EXPECT(ERR_INVALID_ARGUMENT, genNotifyInEngine(engine, 0, no_name));
  EXPECT(ERR_INVALID_ARGUMENT, genNotifyInEngine(engine, 0, no_text));
  EXPECT(ERR_INVALID_ARGUMENT, genNotifyInEngine(engine, 0, too_long));
  EXPECT(ERR_METADATA, genNotifyInEngine(engine, UINT64_MAX, message));
  EXPECT(ERR_METADATA, genNotifyInEngine(engine, (uint64_t)1 << 32, message));
  EXPECT_NULL(getNotifsFromEngine(engine, NULL));
  CHECK_EQUAL(freeNotifsMsgBuf(NULL, 0), 0);
  CHECK_EQUAL(freeNotifsMsgBuf(NULL, 1000), 0);
  CHECK_EQUAL(freeNotifsMsgBuf(NULL, -1), 0);
  double end = seconds_now() + 10;
  while (freeBatchID(engine, batch) == 4 && seconds_now() < end) sleep_milliseconds(1);

  batch_id_t values[] = {0, 1, 0xFFFFFFFF, INVALID_BATCH, batch, batch + 1, batch ^ (1ull << 63),
                         batch ^ (1ull << 32), (uint64_t)(uintptr_t)memory};
  for (size_t index = 0; index < sizeof values / sizeof values[0]; index += 1) {
    EXPECT(1, submitTransfer(engine, values[index], requests, 1));
    EXPECT(1, submitTransferWithNotify(engine, values[index], requests, 1, message));
    EXPECT(1, getTransferStatus(engine, values[index], 0, &status));
    EXPECT(1, freeBatchID(engine, values[index]));
  }
}

static void expect_working(transfer_engine_t engine, unsigned char *memory) {
  transfer_request_t request = {OPCODE_WRITE, memory, LOCAL_SEGMENT,
                                (uint64_t)(uintptr_t)memory + LENGTH / 2, LENGTH / 2};
  transfer_status_t status = {STATUS_WAITING, 0};
  static uint64_t seed = 0;
  double end = seconds_now() + 10;
  seed += 1;
  fill_pattern(memory, LENGTH / 2, seed);
  batch_id_t batch = allocateBatchID(engine, 1);
  REQUIRE(batch != INVALID_BATCH);
  REQUIRE_EQUAL(submitTransfer(engine, batch, &request, 1), 0);
  while (status.status == STATUS_WAITING) {
    REQUIRE_EQUAL(getTransferStatus(engine, batch, 0, &status), 0);
    REQUIRE(seconds_now() < end);
  }
  REQUIRE_EQUAL(status.status, STATUS_COMPLETED);
  REQUIRE_EQUAL(freeBatchID(engine, batch), 0);
  REQUIRE(has_pattern(memory + LENGTH / 2, LENGTH / 2, seed));
}

int main(void) {
  unsigned char *memory = (unsigned char *)new_pages(LENGTH);
  long_text = (char *)new_pages(LONG_LENGTH + 1);
  memset(long_text, 'a', LONG_LENGTH);
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_OFF));

  bad_handles();
  bad_creation();
  transfer_engine_t engine = create_engine();
  REQUIRE(installTransport(engine, "tcp", NULL) != NULL);
  REQUIRE_EQUAL(registerLocalMemory(engine, memory, LENGTH, "cpu:0", 1), 0);
  expect_working(engine, memory);
  bad_memory(engine, memory);
  bad_segments(engine);
  expect_working(engine, memory);
  bad_requests(engine, memory);
  expect_working(engine, memory);
  destroyTransferEngine(engine);
  return check_result("bad_input_dropin");
}
