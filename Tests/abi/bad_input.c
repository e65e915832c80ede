/* Every kind of bad input to mooncake.h: each gives an error code and its own message, and the
 * engine still works. bad_input_dropin.c does the same for the drop-in header. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sys/socket.h>

#include "mooncake.h"
#include "transfer_engine_c.h"

#include "check.h"

enum { LENGTH = 64 << 10, LONG_LENGTH = 4 << 20, BOTH_RIGHTS = 3 };

static char *long_text; /* LONG_LENGTH times 'a' */

/* ---- Judging one call ---- */

/* Sets of accepted codes. */
#define ONLY(name) (1u << -MOONCAKE_ERROR_##name)
#define INVALID ONLY(INVALID_ARGUMENT)
#define HANDLE ONLY(INVALID_HANDLE)

static char marker[512];

/* Leaves a message unrelated to the next call, so that a stale one is noticed. */
static void provoke(void) {
  CHECK_EQUAL(mooncake_log_set_level(77777), MOONCAKE_ERROR_INVALID_ARGUMENT);
  snprintf(marker, sizeof marker, "%s", mooncake_error_message());
}

static void judge(int32_t code, unsigned accepted, const char *call, int line) {
  const char *message = mooncake_error_message();
  int known = code < 0 && code >= MOONCAKE_ERROR_NO_HOLDER && ((accepted >> -code) & 1) != 0;
  if (!known) {
    check_failure_count += 1;
    fprintf(stderr, "bad_input.c:%d: %s gave %s (%d): %s\n", line, call,
            code == 0 ? "MOONCAKE_OK" : mooncake_error_name(code), code, message);
  } else if (message == NULL || message[0] == 0 || strcmp(message, marker) == 0) {
    check_failure_count += 1;
    fprintf(stderr, "bad_input.c:%d: %s left no message\n", line, call);
  }
}

#define EXPECT(accepted, call) \
  do { \
    provoke(); \
    judge((call), accepted, #call, __LINE__); \
  } while (0)

/* ---- Handles ---- */

static void try_handle(mooncake_engine_t *engine) {
  static unsigned char memory[4096];
  char text[64];
  void *address = memory;
  int32_t descriptor = -1;
  uint64_t count = 0;
  mooncake_buffer_t buffer = {memory, sizeof memory};
  mooncake_remote_buffer_t remote;
  mooncake_segment_t segment = 0;
  mooncake_batch_t batch = 1;
  mooncake_batch_status_t status;
  mooncake_transfer_status_t request_status;
  mooncake_notification_t *notification = NULL;
  mooncake_transfer_request_t request = {MOONCAKE_OPCODE_READ, 0, memory, 4096, 16};

  EXPECT(HANDLE, mooncake_engine_name(engine, text, sizeof text, NULL));
  EXPECT(HANDLE, mooncake_engine_metrics(engine, text, sizeof text, &count));
  EXPECT(HANDLE, mooncake_engine_event_fd(engine, &descriptor));
  EXPECT(HANDLE, mooncake_memory_register(engine, memory, sizeof memory, "cpu:0", BOTH_RIGHTS));
  EXPECT(HANDLE, mooncake_memory_unregister(engine, memory));
  EXPECT(HANDLE, mooncake_memory_register_batch(engine, &buffer, 1, NULL, 0));
  EXPECT(HANDLE, mooncake_memory_unregister_batch(engine, &address, 1));
  EXPECT(HANDLE, mooncake_memory_allocate(engine, 4096, NULL, 0, &address));
  EXPECT(HANDLE, mooncake_memory_free(engine, memory));
  EXPECT(HANDLE, mooncake_segment_open(engine, "127.0.0.1:1", 1000, &segment));
  EXPECT(HANDLE, mooncake_segment_close(engine, 1));
  EXPECT(HANDLE, mooncake_segment_buffers(engine, 0, &remote, 1, &count));
  EXPECT(HANDLE, mooncake_segment_describe(engine, 0, text, sizeof text, NULL));
  EXPECT(HANDLE, mooncake_peer_probe(engine, "127.0.0.1:1", 1000));
  EXPECT(HANDLE, mooncake_batch_create(engine, 1, &batch));
  EXPECT(HANDLE, mooncake_batch_submit(engine, batch, &request, 1, 0));
  EXPECT(HANDLE, mooncake_batch_submit_notify(engine, batch, &request, 1, 0, "a", "b"));
  EXPECT(HANDLE, mooncake_batch_poll(engine, batch, &status));
  EXPECT(HANDLE, mooncake_batch_poll_request(engine, batch, 0, &request_status));
  EXPECT(HANDLE, mooncake_batch_wait(engine, batch, 100, &status));
  EXPECT(HANDLE, mooncake_batch_cancel(engine, batch));
  EXPECT(HANDLE, mooncake_batch_free(engine, batch));
  EXPECT(HANDLE, mooncake_batch_event_fd(engine, batch, &descriptor));
  EXPECT(HANDLE, mooncake_batch_set_callback(engine, batch, NULL, NULL));
  EXPECT(HANDLE, mooncake_transfer_sync(engine, &request, 1, 1000));
  EXPECT(HANDLE, mooncake_notification_send(engine, 0, "a", "b", 1000));
  EXPECT(HANDLE, mooncake_notification_receive(engine, &notification));
  EXPECT(HANDLE, mooncake_engine_destroy(engine));
  CHECK(address == memory && segment == 0 && batch == 1 && descriptor == -1 && count == 0);
}

static void bad_handles(void) {
  static uint64_t zeros[64];
  static uint64_t noise[64];
  mooncake_engine_t *engine = NULL;
  void *freed = malloc(256);
  uintptr_t freed_address = (uintptr_t)freed;
  fill_pattern(noise, sizeof noise, 9);
  free(freed);
  REQUIRE_OK(mooncake_engine_create(NULL, &engine));
  uintptr_t live = (uintptr_t)engine;
  uintptr_t values[] = {0, 1, 8, 4096, UINTPTR_MAX, UINTPTR_MAX - 7, UINTPTR_MAX / 2 + 1,
                        (uintptr_t)zeros, (uintptr_t)noise, freed_address,
                        live + 1, live - 1, live + 8, live ^ ((uintptr_t)1 << 40)};
  for (size_t index = 0; index < sizeof values / sizeof values[0]; index += 1) {
    /* The freed block may now be the engine itself. */
    if (values[index] != live) try_handle((mooncake_engine_t *)values[index]);
  }
  REQUIRE_OK(mooncake_engine_destroy(engine));
  try_handle(engine);
  /* Even if its place may have been reused. */
  mooncake_engine_t *next = NULL;
  REQUIRE_OK(mooncake_engine_create(NULL, &next));
  if (next != engine) try_handle(engine);
  REQUIRE_OK(mooncake_engine_destroy(next));

  /* An engine of the other header is not valid here. */
  transfer_engine_t other =
      createTransferEngine("P2PHANDSHAKE", "127.0.0.1:0", "127.0.0.1", 0, 0);
  REQUIRE(other != NULL);
  try_handle((mooncake_engine_t *)other);
  CHECK_EQUAL(discoverTopology(other), 0);
  destroyTransferEngine(other);
}

/* ---- Options ---- */

static void expect_options(unsigned accepted, const mooncake_engine_options_t *options,
                           const char *what, int line) {
  mooncake_engine_t *engine = NULL;
  provoke();
  judge(mooncake_engine_create(options, &engine), accepted, what, line);
  CHECK(engine == NULL);
  if (engine != NULL) mooncake_engine_destroy(engine);
}

/* Sets one field of the default options. */
#define EXPECT_OPTION(accepted, field, value) \
  do { \
    mooncake_engine_options_t options_; \
    REQUIRE_OK(mooncake_engine_options_init(&options_, sizeof options_)); \
    options_.field = (value); \
    expect_options(accepted, &options_, "option " #field " = " #value, __LINE__); \
  } while (0)

static int listen_anywhere(uint32_t *port) {
  struct sockaddr_in address;
  socklen_t length = sizeof address;
  memset(&address, 0, sizeof address);
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int descriptor = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  REQUIRE(descriptor >= 0);
  REQUIRE(bind(descriptor, (struct sockaddr *)&address, sizeof address) == 0);
  REQUIRE(listen(descriptor, 8) == 0);
  REQUIRE(getsockname(descriptor, (struct sockaddr *)&address, &length) == 0);
  *port = ntohs(address.sin_port);
  return descriptor;
}

static void bad_options(void) {
  unsigned wrong_name = INVALID | ONLY(UNRESOLVED);
  mooncake_engine_options_t options;
  uint32_t taken_port = 0;
  EXPECT(INVALID, mooncake_engine_options_init(NULL, sizeof options));
  EXPECT(INVALID, mooncake_engine_options_init(&options, 0));
  EXPECT(INVALID, mooncake_engine_options_init(&options, 3));
  EXPECT(INVALID, mooncake_engine_create(NULL, NULL));
  EXPECT_OPTION(INVALID, struct_size, 0);
  EXPECT_OPTION(INVALID, struct_size, 3);
  EXPECT_OPTION(INVALID | ONLY(UNSUPPORTED), struct_size, UINT32_MAX);
  EXPECT_OPTION(INVALID, port, 65536);
  EXPECT_OPTION(INVALID, port, UINT32_MAX);
  EXPECT_OPTION(INVALID, io_threads, 65);
  EXPECT_OPTION(INVALID, io_threads, UINT32_MAX);
  EXPECT_OPTION(INVALID, connections_per_peer, 65);
  EXPECT_OPTION(INVALID, spin_us, 1000001);
  EXPECT_OPTION(INVALID, reserved, 1);
  EXPECT_OPTION(INVALID, processors, "");
  EXPECT_OPTION(INVALID, processors, "0-");
  EXPECT_OPTION(INVALID, processors, "1023");
  EXPECT_OPTION(INVALID, processors, "node:4294967295");
  EXPECT_OPTION(INVALID, processors, long_text);
  EXPECT_OPTION(INVALID, name, "not-the-address");
  EXPECT_OPTION(INVALID, name, long_text);
  EXPECT_OPTION(wrong_name, bind_address, "no address");
  EXPECT_OPTION(wrong_name, bind_address, "300.0.0.1");
  EXPECT_OPTION(wrong_name, bind_address, long_text);
  EXPECT_OPTION(wrong_name, advertised_address, long_text);
  EXPECT_OPTION(INVALID | ONLY(UNSUPPORTED), metadata_uri, "gopher://127.0.0.1:70");
  EXPECT_OPTION(INVALID | ONLY(UNSUPPORTED), metadata_uri, long_text);
  EXPECT_OPTION(INVALID | ONLY(UNSUPPORTED), transports, "pigeon");
  EXPECT_OPTION(INVALID | ONLY(UNSUPPORTED), transports, "tcp,pigeon");
  EXPECT_OPTION(INVALID | ONLY(UNSUPPORTED), transports, long_text);
  int listener = listen_anywhere(&taken_port);
  EXPECT_OPTION(ONLY(ADDRESS_IN_USE), port, taken_port);
  close(listener);
}

/* ---- Arguments, with a working engine ---- */

static void bad_outputs(mooncake_engine_t *engine) {
  uint64_t length = 0;
  mooncake_segment_t segment = 0;
  EXPECT(INVALID, mooncake_engine_name(engine, NULL, 10, &length));
  EXPECT(INVALID, mooncake_engine_name(engine, NULL, UINT64_MAX, &length));
  EXPECT(ONLY(FULL), mooncake_engine_name(engine, NULL, 0, NULL));
  EXPECT(INVALID, mooncake_engine_metrics(engine, NULL, 10, NULL));
  EXPECT(INVALID, mooncake_engine_event_fd(engine, NULL));
  EXPECT(INVALID, mooncake_segment_open(engine, "127.0.0.1:1", 100, NULL));
  EXPECT(INVALID, mooncake_segment_buffers(engine, 0, NULL, 3, &length));
  EXPECT(INVALID, mooncake_segment_describe(engine, 0, NULL, 10, NULL));
  EXPECT(INVALID, mooncake_batch_create(engine, 1, NULL));
  EXPECT(INVALID, mooncake_notification_receive(engine, NULL));
  EXPECT(INVALID, mooncake_log_set_level(-1));
  EXPECT(INVALID, mooncake_log_set_level(5));
  CHECK_EQUAL(segment, 0);
}

static void bad_memory(mooncake_engine_t *engine, unsigned char *registered) {
  unsigned char *other = (unsigned char *)new_pages(4 * 4096);
  unsigned huge = INVALID | ONLY(FULL) | ONLY(OUT_OF_MEMORY);
  mooncake_buffer_t buffers[3] = {{other, 4096}, {other + 4096, 4096}, {other + 8191, 4096}};
  void *addresses[2] = {other, other + 4096};
  void *address = NULL;
  EXPECT(INVALID, mooncake_memory_register(engine, NULL, 4096, NULL, 0));
  EXPECT(INVALID, mooncake_memory_register(engine, other, 0, NULL, 0));
  EXPECT(INVALID, mooncake_memory_register(engine, other, UINT64_MAX, NULL, 0));
  EXPECT(INVALID, mooncake_memory_register(engine, (void *)UINTPTR_MAX, 2, NULL, 0));
  EXPECT(INVALID, mooncake_memory_register(engine, other, 4096, NULL, 4));
  EXPECT(INVALID, mooncake_memory_register(engine, other, 4096, NULL, UINT32_MAX));
  EXPECT(INVALID, mooncake_memory_register(engine, other, 4096, long_text, 0));
  EXPECT(ONLY(OVERLAP), mooncake_memory_register(engine, registered, LENGTH, NULL, 0));
  EXPECT(ONLY(OVERLAP), mooncake_memory_register(engine, registered + LENGTH - 1, 1, NULL, 0));
  EXPECT(INVALID, mooncake_memory_register_batch(engine, NULL, 1, NULL, 0));
  EXPECT(huge, mooncake_memory_register_batch(engine, buffers, UINT64_MAX, NULL, 0));
  EXPECT(ONLY(OVERLAP), mooncake_memory_register_batch(engine, buffers, 3, NULL, 0));
  buffers[2].address = NULL;
  EXPECT(INVALID, mooncake_memory_register_batch(engine, buffers, 3, NULL, 0));
  EXPECT(INVALID, mooncake_memory_register_batch(engine, buffers, 2, NULL, 8));
  EXPECT(ONLY(NOT_REGISTERED), mooncake_memory_unregister(engine, other));
  EXPECT(ONLY(NOT_REGISTERED) | INVALID, mooncake_memory_unregister(engine, NULL));
  EXPECT(ONLY(NOT_REGISTERED), mooncake_memory_unregister(engine, registered + 1));
  EXPECT(INVALID, mooncake_memory_unregister_batch(engine, NULL, 1));
  EXPECT(huge, mooncake_memory_unregister_batch(engine, addresses, UINT64_MAX));
  EXPECT(ONLY(NOT_REGISTERED), mooncake_memory_unregister_batch(engine, addresses, 2));
  EXPECT(INVALID, mooncake_memory_allocate(engine, 0, NULL, 0, &address));
  EXPECT(INVALID, mooncake_memory_allocate(engine, 4096, NULL, 0, NULL));
  EXPECT(INVALID, mooncake_memory_allocate(engine, 4096, NULL, 77, &address));
  EXPECT(INVALID, mooncake_memory_allocate(engine, 4096, long_text, 0, &address));
  EXPECT(huge, mooncake_memory_allocate(engine, UINT64_MAX, NULL, 0, &address));
  EXPECT(huge, mooncake_memory_allocate(engine, UINT64_MAX - 4096, NULL, 0, &address));
  EXPECT(huge, mooncake_memory_allocate(engine, (uint64_t)1 << 62, NULL, 0, &address));
  CHECK(address == NULL);
  EXPECT(ONLY(NOT_REGISTERED) | INVALID, mooncake_memory_free(engine, NULL));
  EXPECT(ONLY(NOT_REGISTERED), mooncake_memory_free(engine, other));
  EXPECT(ONLY(NOT_REGISTERED), mooncake_memory_free(engine, registered));
  free(other);
}

static void bad_segments(mooncake_engine_t *engine) {
  static const char *const malformed[] = {"",     ":",        "127.0.0.1:",  "127.0.0.1:x",
                                          "[::1", "[]:12345", "127.0.0.1:0", "127.0.0.1:70000",
                                          "\xFF\xFE\x80:1"};
  unsigned wrong_name = INVALID | ONLY(UNRESOLVED) | ONLY(NOT_FOUND);
  unsigned nobody = wrong_name | ONLY(UNREACHABLE) | ONLY(TIMEOUT);
  mooncake_remote_buffer_t buffer;
  mooncake_segment_t segment = 77;
  uint64_t count = 0;
  char text[64];
  EXPECT(INVALID, mooncake_segment_open(engine, NULL, 500, &segment));
  EXPECT(wrong_name, mooncake_segment_open(engine, long_text, 500, &segment));
  EXPECT(INVALID, mooncake_peer_probe(engine, NULL, 500));
  EXPECT(wrong_name, mooncake_peer_probe(engine, long_text, 500));
  for (size_t index = 0; index < sizeof malformed / sizeof malformed[0]; index += 1) {
    EXPECT(nobody, mooncake_segment_open(engine, malformed[index], 500, &segment));
    EXPECT(nobody, mooncake_peer_probe(engine, malformed[index], 500));
  }
  EXPECT(ONLY(UNREACHABLE), mooncake_segment_open(engine, "127.0.0.1:1", 2000, &segment));
  EXPECT(ONLY(UNREACHABLE), mooncake_peer_probe(engine, "127.0.0.1:1", 2000));
  CHECK_EQUAL(segment, 77);
  EXPECT(HANDLE, mooncake_segment_close(engine, 12345));
  EXPECT(HANDLE, mooncake_segment_close(engine, -1));
  EXPECT(HANDLE, mooncake_segment_close(engine, INT32_MIN));
  EXPECT(HANDLE, mooncake_segment_close(engine, INT32_MAX));
  EXPECT(HANDLE, mooncake_segment_buffers(engine, 12345, &buffer, 1, &count));
  EXPECT(HANDLE, mooncake_segment_describe(engine, -5, text, sizeof text, NULL));
}

/* A peer that accepts and never answers costs no more than the timeout. */
static void silent_peer(mooncake_engine_t *engine) {
  mooncake_segment_t segment = 0;
  uint32_t port = 0;
  char name[64];
  int listener = listen_anywhere(&port);
  snprintf(name, sizeof name, "127.0.0.1:%u", port);
  double start = seconds_now();
  EXPECT(ONLY(TIMEOUT), mooncake_segment_open(engine, name, 300, &segment));
  EXPECT(ONLY(TIMEOUT), mooncake_peer_probe(engine, name, 300));
  CHECK(seconds_now() - start < 4);
  close(listener);
}

/* An unresolvable name fails within the timeout, however slow the resolver is. */
static void unresolvable_peer(mooncake_engine_t *engine) {
  mooncake_segment_t segment = 0;
  double start = seconds_now();
  EXPECT(ONLY(UNRESOLVED) | ONLY(TIMEOUT),
         mooncake_segment_open(engine, "no-such-host.invalid:1234", 2000, &segment));
  CHECK(seconds_now() - start < 6);
}

static void bad_requests(mooncake_engine_t *engine, unsigned char *memory) {
  const mooncake_transfer_request_t good = {MOONCAKE_OPCODE_WRITE, MOONCAKE_SEGMENT_LOCAL, memory,
                                            (uint64_t)(uintptr_t)memory + 8192, 4096};
  unsigned range = INVALID | ONLY(NOT_REGISTERED);
  mooncake_transfer_request_t requests[2] = {good, good};
  mooncake_transfer_request_t *bad = &requests[1];
  mooncake_batch_status_t status;
  mooncake_batch_t batch = 0;
  REQUIRE_OK(mooncake_batch_create(engine, 4, &batch));
#define EXPECT_SUBMIT(accepted, field, value) \
  do { \
    *bad = good; \
    bad->field = (value); \
    EXPECT(accepted, mooncake_batch_submit(engine, batch, requests, 2, 0)); \
    EXPECT(accepted, mooncake_transfer_sync(engine, requests, 2, 1000)); \
  } while (0)
  EXPECT_SUBMIT(INVALID, opcode, 2);
  EXPECT_SUBMIT(INVALID, opcode, INT32_MIN);
  EXPECT_SUBMIT(HANDLE, segment, 12345);
  EXPECT_SUBMIT(HANDLE, segment, -1);
  EXPECT_SUBMIT(INVALID, source, NULL);
  EXPECT_SUBMIT(range, source, (void *)(UINTPTR_MAX - 10));
  EXPECT_SUBMIT(range, target_offset, UINT64_MAX - 10);
  EXPECT_SUBMIT(range, length, UINT64_MAX);
  EXPECT_SUBMIT(range, length, UINT64_MAX - (uint64_t)(uintptr_t)memory);
  /* Beyond a registered buffer, and into one. */
  EXPECT_SUBMIT(ONLY(NOT_REGISTERED), source, memory + LENGTH - 4095);
  EXPECT_SUBMIT(ONLY(NOT_REGISTERED), source, memory - 1);
#undef EXPECT_SUBMIT
  *bad = good;
  EXPECT(INVALID, mooncake_batch_submit(engine, batch, NULL, 1, 0));
  EXPECT(ONLY(FULL) | INVALID, mooncake_batch_submit(engine, batch, requests, UINT64_MAX, 0));
  EXPECT(ONLY(FULL), mooncake_batch_submit(engine, batch, requests, 5, 0));
  EXPECT(INVALID, mooncake_batch_submit_notify(engine, batch, requests, 0, 0, "a", "b"));
  EXPECT(INVALID, mooncake_batch_submit_notify(engine, batch, requests, 1, 0, NULL, "b"));
  EXPECT(INVALID, mooncake_batch_submit_notify(engine, batch, requests, 1, 0, "a", NULL));
  EXPECT(INVALID | ONLY(FULL),
         mooncake_batch_submit_notify(engine, batch, requests, 1, 0, "a", long_text));
  EXPECT(INVALID, mooncake_transfer_sync(engine, NULL, 1, 1000));
  EXPECT(INVALID | ONLY(FULL), mooncake_transfer_sync(engine, requests, UINT64_MAX, 1000));
  /* None of these calls has left a request behind. */
  REQUIRE_OK(mooncake_batch_poll(engine, batch, &status));
  CHECK_EQUAL(status.submitted_count, 0);
  REQUIRE_OK(mooncake_batch_free(engine, batch));

  requests[0] = good;
  requests[0].target_offset = 4096;
  EXPECT(ONLY(NOT_REGISTERED), mooncake_transfer_sync(engine, requests, 1, 3000));
  requests[0].target_offset = (uint64_t)(uintptr_t)memory + LENGTH - 4095;
  EXPECT(ONLY(NOT_REGISTERED), mooncake_transfer_sync(engine, requests, 1, 3000));
}

static void bad_batches(mooncake_engine_t *engine, unsigned char *memory) {
  const mooncake_transfer_request_t request = {MOONCAKE_OPCODE_WRITE, 0, memory,
                                               (uint64_t)(uintptr_t)memory + 8192, 4096};
  mooncake_batch_t freed = 0;
  mooncake_batch_t batch = 0;
  mooncake_batch_status_t status;
  mooncake_transfer_status_t request_status;
  int32_t descriptor = -1;
  EXPECT(INVALID, mooncake_batch_create(engine, 0, &batch));
  EXPECT(INVALID, mooncake_batch_create(engine, 1048577, &batch));
  EXPECT(INVALID, mooncake_batch_create(engine, UINT64_MAX, &batch));
  CHECK(batch == 0);
  REQUIRE_OK(mooncake_batch_create(engine, 2, &batch));
  REQUIRE_OK(mooncake_batch_create(engine, 2, &freed));
  REQUIRE_OK(mooncake_batch_free(engine, freed));
  mooncake_batch_t values[] = {0, 1, 0xFFFFFFFF, UINT64_MAX, batch + 1, freed, batch ^ (1ull << 63),
                               batch ^ (1ull << 32), (uint64_t)(uintptr_t)memory};
  for (size_t index = 0; index < sizeof values / sizeof values[0]; index += 1) {
    if (values[index] == batch) continue;
    EXPECT(HANDLE, mooncake_batch_submit(engine, values[index], &request, 1, 0));
    EXPECT(HANDLE, mooncake_batch_submit_notify(engine, values[index], &request, 1, 0, "a", "b"));
    EXPECT(HANDLE, mooncake_batch_poll(engine, values[index], &status));
    EXPECT(HANDLE, mooncake_batch_poll_request(engine, values[index], 0, &request_status));
    EXPECT(HANDLE, mooncake_batch_wait(engine, values[index], 100, &status));
    EXPECT(HANDLE, mooncake_batch_cancel(engine, values[index]));
    EXPECT(HANDLE, mooncake_batch_event_fd(engine, values[index], &descriptor));
    EXPECT(HANDLE, mooncake_batch_set_callback(engine, values[index], NULL, NULL));
    EXPECT(HANDLE, mooncake_batch_free(engine, values[index]));
  }
  EXPECT(INVALID, mooncake_batch_poll(engine, batch, NULL));
  EXPECT(INVALID, mooncake_batch_event_fd(engine, batch, NULL));
  REQUIRE_OK(mooncake_batch_submit(engine, batch, &request, 1, 0));
  EXPECT(INVALID, mooncake_batch_poll_request(engine, batch, 0, NULL));
  EXPECT(INVALID, mooncake_batch_poll_request(engine, batch, 1, &request_status));
  EXPECT(INVALID, mooncake_batch_poll_request(engine, batch, UINT64_MAX, &request_status));
  REQUIRE_OK(mooncake_batch_wait(engine, batch, 10000, NULL));
  REQUIRE_OK(mooncake_batch_free(engine, batch));
}

static void bad_notifications(mooncake_engine_t *engine) {
  EXPECT(HANDLE, mooncake_notification_send(engine, 12345, "a", "b", 500));
  EXPECT(HANDLE, mooncake_notification_send(engine, -1, "a", "b", 500));
  EXPECT(INVALID, mooncake_notification_send(engine, 0, NULL, "b", 500));
  EXPECT(INVALID, mooncake_notification_send(engine, 0, "a", NULL, 500));
  EXPECT(INVALID | ONLY(FULL), mooncake_notification_send(engine, 0, "a", long_text, 500));
  EXPECT(INVALID | ONLY(FULL), mooncake_notification_send(engine, 0, long_text, "b", 500));
  mooncake_notification_free(NULL);
}

/* ---- Messages ---- */

static void *read_fresh_message(void *argument) {
  (void)argument;
  CHECK(strcmp(mooncake_error_message(), "") == 0);
  CHECK_EQUAL(mooncake_engine_destroy(NULL), MOONCAKE_ERROR_INVALID_HANDLE);
  CHECK(mooncake_error_message()[0] != 0);
  return NULL;
}

static void names_and_messages(void) {
  pthread_t thread;
  CHECK(strcmp(mooncake_error_name(0), "MOONCAKE_OK") == 0);
  CHECK(strcmp(mooncake_error_name(-1), "MOONCAKE_ERROR_INVALID_ARGUMENT") == 0);
  CHECK(strcmp(mooncake_error_name(-14), "MOONCAKE_ERROR_TIMEOUT") == 0);
  CHECK(strcmp(mooncake_error_name(-22), "MOONCAKE_ERROR_NO_HOLDER") == 0);
  for (int32_t code = -22; code <= 0; code += 1) {
    CHECK(strcmp(mooncake_error_name(code), "MOONCAKE_ERROR_UNKNOWN") != 0);
    for (int32_t other = -22; other < code; other += 1) {
      CHECK(strcmp(mooncake_error_name(code), mooncake_error_name(other)) != 0);
    }
  }
  int32_t unknown[] = {1, -23, 1000, INT32_MAX, INT32_MIN};
  for (size_t index = 0; index < sizeof unknown / sizeof unknown[0]; index += 1) {
    CHECK(strcmp(mooncake_error_name(unknown[index]), "MOONCAKE_ERROR_UNKNOWN") == 0);
  }
  provoke();
  REQUIRE(pthread_create(&thread, NULL, read_fresh_message, NULL) == 0);
  REQUIRE(pthread_join(thread, NULL) == 0);
  CHECK(strcmp(mooncake_error_message(), marker) == 0);
}

static void expect_working(mooncake_engine_t *engine, unsigned char *memory) {
  mooncake_transfer_request_t request = {MOONCAKE_OPCODE_WRITE, MOONCAKE_SEGMENT_LOCAL, memory,
                                         (uint64_t)(uintptr_t)memory + LENGTH / 2, LENGTH / 2};
  static uint64_t seed = 0;
  seed += 1;
  fill_pattern(memory, LENGTH / 2, seed);
  REQUIRE_OK(mooncake_transfer_sync(engine, &request, 1, 10000));
  REQUIRE(has_pattern(memory + LENGTH / 2, LENGTH / 2, seed));
}

int main(void) {
  mooncake_engine_t *engine = NULL;
  unsigned char *memory = (unsigned char *)new_pages(LENGTH);
  long_text = (char *)new_pages(LONG_LENGTH + 1);
  memset(long_text, 'a', LONG_LENGTH);
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_OFF));

  names_and_messages();
  bad_handles();
  bad_options();
  REQUIRE_OK(mooncake_engine_create(NULL, &engine));
  REQUIRE_OK(mooncake_memory_register(engine, memory, LENGTH, NULL, BOTH_RIGHTS));
  expect_working(engine, memory);
  bad_outputs(engine);
  bad_memory(engine, memory);
  expect_working(engine, memory);
  bad_segments(engine);
  silent_peer(engine);
  unresolvable_peer(engine);
  bad_requests(engine, memory);
  bad_batches(engine, memory);
  bad_notifications(engine);
  expect_working(engine, memory);
  REQUIRE_OK(mooncake_engine_destroy(engine));
  return check_result("bad_input");
}
