/* A child of fork() cannot use the parent's handles but can have engines of its own, and the parent
 * does not notice. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/wait.h>

#include "mooncake.h"
#include "transfer_engine_c.h"

#include "check.h"

enum { LENGTH = 64 << 10, CHILD_SECONDS = 20, BUSY_FORKS = 8, FIRST_FORKS = 800 };

typedef struct inherited {
  mooncake_engine_t *engine;
  transfer_engine_t compatible;
  mooncake_batch_t batch;
  batch_id_t compatible_batch;
  unsigned char *memory;
} inherited_t;

static mooncake_engine_t *create_with(unsigned char *memory) {
  mooncake_engine_t *engine = NULL;
  REQUIRE_OK(mooncake_engine_create(NULL, &engine));
  REQUIRE_OK(mooncake_memory_register(engine, memory, LENGTH * 2, NULL,
                                      MOONCAKE_ACCESS_REMOTE_READ | MOONCAKE_ACCESS_REMOTE_WRITE));
  return engine;
}

static mooncake_transfer_request_t request_between_halves(unsigned char *memory) {
  mooncake_transfer_request_t request;
  memset(&request, 0, sizeof request);
  request.opcode = MOONCAKE_OPCODE_WRITE;
  request.segment = MOONCAKE_SEGMENT_LOCAL;
  request.source = memory;
  request.target_offset = (uint64_t)(uintptr_t)(memory + LENGTH);
  request.length = LENGTH;
  return request;
}

static void round_trip(mooncake_engine_t *engine, unsigned char *memory, uint64_t seed) {
  mooncake_transfer_request_t request = request_between_halves(memory);
  fill_pattern(memory, LENGTH, seed);
  REQUIRE_OK(mooncake_transfer_sync(engine, &request, 1, 10000));
  REQUIRE(has_pattern(memory + LENGTH, LENGTH, seed));
}

#define CHECK_INVALID(call) CHECK_EQUAL(call, MOONCAKE_ERROR_INVALID_HANDLE)

static void check_native_handles(const inherited_t *old) {
  mooncake_engine_t *engine = old->engine;
  mooncake_transfer_request_t request = request_between_halves(old->memory);
  mooncake_buffer_t buffer = {old->memory, LENGTH};
  void *address = old->memory;
  mooncake_remote_buffer_t remote;
  mooncake_batch_status_t status;
  mooncake_transfer_status_t request_status;
  mooncake_notification_t *notification = NULL;
  mooncake_segment_t segment = 0;
  mooncake_batch_t batch = 0;
  uint64_t count = 0;
  int32_t descriptor = -1;
  char text[256];

  CHECK_INVALID(mooncake_engine_name(engine, text, sizeof text, NULL));
  CHECK_INVALID(mooncake_engine_metrics(engine, text, sizeof text, NULL));
  CHECK_INVALID(mooncake_engine_event_fd(engine, &descriptor));
  CHECK_INVALID(mooncake_memory_register(engine, text, sizeof text, NULL, 0));
  CHECK_INVALID(mooncake_memory_register_batch(engine, &buffer, 1, NULL, 0));
  CHECK_INVALID(mooncake_memory_unregister_batch(engine, &address, 1));
  CHECK_INVALID(mooncake_memory_unregister(engine, old->memory));
  CHECK_INVALID(mooncake_memory_allocate(engine, 4096, NULL, 0, &address));
  CHECK_INVALID(mooncake_memory_free(engine, old->memory));
  CHECK_INVALID(mooncake_segment_open(engine, "127.0.0.1:9", 1000, &segment));
  CHECK_INVALID(mooncake_segment_close(engine, 1));
  CHECK_INVALID(mooncake_segment_buffers(engine, 0, &remote, 1, &count));
  CHECK_INVALID(mooncake_segment_describe(engine, 0, text, sizeof text, NULL));
  CHECK_INVALID(mooncake_peer_probe(engine, "127.0.0.1:9", 1000));
  CHECK_INVALID(mooncake_batch_create(engine, 1, &batch));
  CHECK_INVALID(mooncake_batch_submit(engine, old->batch, &request, 1, 1000));
  CHECK_INVALID(mooncake_batch_submit_notify(engine, old->batch, &request, 1, 1000, "a", "b"));
  CHECK_INVALID(mooncake_batch_poll(engine, old->batch, &status));
  CHECK_INVALID(mooncake_batch_poll_request(engine, old->batch, 0, &request_status));
  CHECK_INVALID(mooncake_batch_wait(engine, old->batch, 1000, &status));
  CHECK_INVALID(mooncake_batch_cancel(engine, old->batch));
  CHECK_INVALID(mooncake_batch_event_fd(engine, old->batch, &descriptor));
  CHECK_INVALID(mooncake_batch_free(engine, old->batch));
  CHECK_INVALID(mooncake_transfer_sync(engine, &request, 1, 1000));
  CHECK_INVALID(mooncake_notification_send(engine, 0, "a", "b", 1000));
  CHECK_INVALID(mooncake_notification_receive(engine, &notification));
  CHECK(mooncake_error_message()[0] != 0);
  CHECK_INVALID(mooncake_engine_destroy(engine));
}

static void check_compatible_handles(const inherited_t *old) {
  transfer_engine_t engine = old->compatible;
  transfer_request_t request = {OPCODE_WRITE, old->memory, LOCAL_SEGMENT,
                                (uint64_t)(uintptr_t)(old->memory + LENGTH), LENGTH};
  transfer_status_t status;
  int size = -1;
  char text[256];
  CHECK_EQUAL(getLocalIpAndPort(engine, text, sizeof text), ERR_INVALID_ARGUMENT);
  CHECK(installTransport(engine, "tcp", NULL) == NULL);
  CHECK(openSegment(engine, "127.0.0.1:9") < 0);
  CHECK_EQUAL(registerLocalMemory(engine, text, sizeof text, NULL, 1), ERR_INVALID_ARGUMENT);
  CHECK_EQUAL(unregisterLocalMemory(engine, old->memory), ERR_INVALID_ARGUMENT);
  CHECK(allocateBatchID(engine, 1) == INVALID_BATCH);
  CHECK_EQUAL(submitTransfer(engine, old->compatible_batch, &request, 1), 1);
  CHECK_EQUAL(getTransferStatus(engine, old->compatible_batch, 0, &status), 1);
  CHECK_EQUAL(freeBatchID(engine, old->compatible_batch), 1);
  CHECK(getNotifsFromEngine(engine, &size) == NULL);
  destroyTransferEngine(engine);
}

/* Runs in the child; its memory is its own copy. */
static void child_main(const inherited_t *old, uint64_t seed) {
  alarm(CHILD_SECONDS);
  check_failure_count = 0;
  check_native_handles(old);
  check_compatible_handles(old);
  mooncake_engine_t *engine = create_with(old->memory);
  round_trip(engine, old->memory, seed);
  REQUIRE_OK(mooncake_engine_destroy(engine));
  _exit(check_result("fork (child)"));
}

static void check_child(pid_t pid) {
  int status = 0;
  REQUIRE(waitpid(pid, &status, 0) == pid);
  if (WIFSIGNALED(status)) {
    fprintf(stderr, "the child was ended by signal %d (%d: it hung)\n", WTERMSIG(status), SIGALRM);
  }
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void fork_and_check(const inherited_t *old, uint64_t seed) {
  fflush(NULL);
  pid_t pid = fork();
  REQUIRE(pid >= 0);
  if (pid == 0) child_main(old, seed);
  check_child(pid);
}

static void *create_first_engine(void *barrier) {
  mooncake_engine_t *engine = NULL;
  pthread_barrier_wait((pthread_barrier_t *)barrier);
  REQUIRE_OK(mooncake_engine_create(NULL, &engine));
  REQUIRE_OK(mooncake_engine_destroy(engine));
  return NULL;
}

/* In the child, the forking thread and another one look up the same types for the first time, under
 * locks of the Swift runtime. */
static void first_engines_main(void) {
  pthread_t thread;
  pthread_barrier_t barrier;
  alarm(CHILD_SECONDS);
  REQUIRE(pthread_barrier_init(&barrier, NULL, 2) == 0);
  REQUIRE(pthread_create(&thread, NULL, create_first_engine, &barrier) == 0);
  create_first_engine(&barrier);
  REQUIRE(pthread_join(thread, NULL) == 0);
  _exit(0);
}

/* Must come before the first engine of this process, but after the forking thread has used the
 * library. Only about one child in a hundred has its threads meet in a lock, hence so many. */
static void create_first_engines(void) {
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_WARNING));
  for (int index = 0; index < FIRST_FORKS && check_failure_count == 0; index += 1) {
    pid_t pid = fork();
    REQUIRE(pid >= 0);
    if (pid == 0) first_engines_main();
    check_child(pid);
  }
}

static atomic_int busy_should_end;

/* Keeps the library's threads, tables and locks in use while the main thread forks. */
static void *stay_busy(void *argument) {
  mooncake_engine_t *engine = (mooncake_engine_t *)argument;
  unsigned char *memory = (unsigned char *)new_pages(LENGTH * 2);
  uint64_t seed = 0;
  REQUIRE_OK(mooncake_memory_register(engine, memory, LENGTH * 2, NULL,
                                      MOONCAKE_ACCESS_REMOTE_READ | MOONCAKE_ACCESS_REMOTE_WRITE));
  while (!atomic_load(&busy_should_end)) {
    unsigned char other[4096];
    round_trip(engine, memory, seed);
    REQUIRE_OK(mooncake_memory_register(engine, other, sizeof other, NULL, 0));
    REQUIRE_OK(mooncake_memory_unregister(engine, other));
    seed += 1;
  }
  REQUIRE_OK(mooncake_memory_unregister(engine, memory));
  free(memory);
  return NULL;
}

int main(void) {
  pthread_t thread;
  inherited_t old;
  create_first_engines();
  old.memory = (unsigned char *)new_pages(LENGTH * 2);
  old.engine = create_with(old.memory);
  REQUIRE_OK(mooncake_batch_create(old.engine, 4, &old.batch));
  old.compatible = createTransferEngine("P2PHANDSHAKE", "127.0.0.1:0", "127.0.0.1", 0, 0);
  REQUIRE(old.compatible != NULL);
  REQUIRE(installTransport(old.compatible, "tcp", NULL) != NULL);
  old.compatible_batch = allocateBatchID(old.compatible, 4);
  REQUIRE(old.compatible_batch != INVALID_BATCH);
  round_trip(old.engine, old.memory, 1);

  fork_and_check(&old, 2);
  round_trip(old.engine, old.memory, 3);

  REQUIRE(pthread_create(&thread, NULL, stay_busy, old.engine) == 0);
  for (uint64_t index = 0; index < BUSY_FORKS; index += 1) fork_and_check(&old, 10 + index);
  atomic_store(&busy_should_end, 1);
  REQUIRE(pthread_join(thread, NULL) == 0);

  round_trip(old.engine, old.memory, 4);
  CHECK_EQUAL(freeBatchID(old.compatible, old.compatible_batch), 0);
  destroyTransferEngine(old.compatible);
  REQUIRE_OK(mooncake_batch_free(old.engine, old.batch));
  REQUIRE_OK(mooncake_engine_destroy(old.engine));
  return check_result("fork");
}
