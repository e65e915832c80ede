/* Threads that cannot be started: set-up reports it, and nothing that was set up is lost. The
 * library's calls of pthread_create() reach the one below. */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

#include "mooncake.h"
#include "transfer_engine_c.h"

#include "check.h"
#include "peer.h"

enum { COUNT = 50, LENGTH = 1 << 20 };

static atomic_int refuses_threads;

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
                   void *argument) {
  typedef int (*create_t)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
  static create_t real;
  if (real == NULL) real = (create_t)dlsym(RTLD_NEXT, "pthread_create");
  if (atomic_load(&refuses_threads)) return EAGAIN;
  return real(thread, attributes, start, argument);
}

typedef struct world {
  mooncake_engine_t *engine;
  mooncake_segment_t segment;
  unsigned char *local;
  peer_t peer;
} world_t;

static mooncake_transfer_request_t make_read(const world_t *world, uint64_t offset,
                                             uint64_t length) {
  mooncake_transfer_request_t request = {MOONCAKE_OPCODE_READ, world->segment,
                                         world->local, world->peer.address + offset, length};
  return request;
}

static void count_call(mooncake_batch_t batch, const mooncake_batch_status_t *status,
                       void *context) {
  (void)batch;
  CHECK_EQUAL(status->state, MOONCAKE_STATE_COMPLETED);
  atomic_fetch_add((atomic_int *)context, 1);
}

/* Set-up fails if its thread cannot be started. */
static void setting_up(void) {
  mooncake_engine_t *engine = NULL;
  mooncake_segment_t segment = -1;
  mooncake_batch_t batch;
  atomic_store(&refuses_threads, 1);
  CHECK_EQUAL(mooncake_engine_create(NULL, &engine), MOONCAKE_ERROR_SYSTEM);
  CHECK(createTransferEngine("P2PHANDSHAKE", "127.0.0.1:0", NULL, 0, 0) == NULL);
  atomic_store(&refuses_threads, 0);
  REQUIRE_OK(mooncake_engine_create(NULL, &engine));
  REQUIRE_OK(mooncake_batch_create(engine, 1, &batch));
  atomic_store(&refuses_threads, 1);
  CHECK_EQUAL(mooncake_batch_set_callback(engine, batch, count_call, NULL), MOONCAKE_ERROR_SYSTEM);
  CHECK(strstr(mooncake_error_message(), "ulimit -u") != NULL);
  CHECK_EQUAL(mooncake_segment_open(engine, "127.0.0.1:1", 0, &segment), MOONCAKE_ERROR_SYSTEM);
  CHECK(strstr(mooncake_error_message(), "thread") != NULL);
  REQUIRE_OK(mooncake_engine_destroy(engine));
  atomic_store(&refuses_threads, 0);
}

static void callbacks(const world_t *world) {
  atomic_int calls;
  mooncake_batch_t batches[COUNT];
  mooncake_transfer_request_t request = make_read(world, 0, 64);
  double end = seconds_now() + 20;
  atomic_init(&calls, 0);
  for (int index = 0; index < COUNT; index += 1) {
    REQUIRE_OK(mooncake_batch_create(world->engine, 1, &batches[index]));
    REQUIRE_OK(mooncake_batch_set_callback(world->engine, batches[index], count_call, &calls));
  }
  atomic_store(&refuses_threads, 1);
  for (int index = 0; index < COUNT; index += 1) {
    REQUIRE_OK(mooncake_batch_submit(world->engine, batches[index], &request, 1, 0));
  }
  while (atomic_load(&calls) < COUNT && seconds_now() < end) sleep_milliseconds(5);
  CHECK_EQUAL(atomic_load(&calls), COUNT);
  for (int index = 0; index < COUNT; index += 1) {
    CHECK_EQUAL(mooncake_batch_free(world->engine, batches[index]), MOONCAKE_OK);
  }
  atomic_store(&refuses_threads, 0);
}

/* Ranges that the peer has not registered make a worker ask it again, and notifications are
 * sent. */
static void recovery_and_notifications(const world_t *world) {
  mooncake_transfer_request_t good = make_read(world, 0, 64);
  mooncake_transfer_request_t bad = make_read(world, PEER_LENGTH, 64);
  mooncake_batch_status_t status;
  mooncake_batch_t batch;
  mooncake_notification_t *received = NULL;
  atomic_store(&refuses_threads, 1);
  for (int index = 0; index < COUNT; index += 1) {
    CHECK_EQUAL(mooncake_transfer_sync(world->engine, &bad, 1, 5000),
                MOONCAKE_ERROR_NOT_REGISTERED);
    CHECK_EQUAL(mooncake_transfer_sync(world->engine, &good, 1, 5000), MOONCAKE_OK);
  }
  good.segment = MOONCAKE_SEGMENT_LOCAL;
  good.length = 0;
  REQUIRE_OK(mooncake_batch_create(world->engine, COUNT, &batch));
  for (int index = 0; index < COUNT; index += 1) {
    REQUIRE_OK(mooncake_batch_submit_notify(world->engine, batch, &good, 1, 5000, "n", "m"));
    REQUIRE_OK(mooncake_batch_wait(world->engine, batch, 5000, &status));
    CHECK_EQUAL(status.state, MOONCAKE_STATE_COMPLETED);
    REQUIRE_OK(mooncake_notification_receive(world->engine, &received));
    REQUIRE(received != NULL);
    mooncake_notification_free(received);
  }
  CHECK_EQUAL(mooncake_batch_free(world->engine, batch), MOONCAKE_OK);
  /* Copies that the engine's threads would make are made by the caller. */
  good = make_read(world, 0, LENGTH);
  good.length = LENGTH;
  REQUIRE_OK(mooncake_transfer_sync(world->engine, &good, 1, 5000));
  CHECK(has_pattern(world->local, LENGTH, PEER_SEED));
  atomic_store(&refuses_threads, 0);
}

static void drop_in(const world_t *world) {
  transfer_engine_t engine = createTransferEngine("P2PHANDSHAKE", "127.0.0.1:0", NULL, 0, 1);
  transfer_status_t status = {STATUS_WAITING, 0};
  static char text[] = "text";
  notify_msg_t message = {text, text};
  int size = 0;
  REQUIRE(engine != NULL);
  atomic_store(&refuses_threads, 1);
  CHECK_EQUAL(openSegment(engine, world->peer.name), -1);
  atomic_store(&refuses_threads, 0);
  segment_id_t segment = openSegment(engine, world->peer.name);
  REQUIRE(segment > 0);
  atomic_store(&refuses_threads, 1);
  transfer_request_t request = {OPCODE_READ, world->local, segment, world->peer.address, 64};
  transfer_request_t bad = {OPCODE_READ, world->local, segment, world->peer.address + PEER_LENGTH,
                            64};
  transfer_request_t own = {OPCODE_READ, NULL, LOCAL_SEGMENT, 0, 0};
  transfer_request_t requests[3] = {request, bad, own};
  const int ends[3] = {STATUS_COMPLETED, STATUS_FAILED, STATUS_COMPLETED};
  for (int index = 0; index < 3; index += 1) {
    double end = seconds_now() + 10;
    batch_id_t batch = allocateBatchID(engine, 1);
    REQUIRE_EQUAL(submitTransferWithNotify(engine, batch, &requests[index], 1, message), 0);
    do {
      REQUIRE_EQUAL(getTransferStatus(engine, batch, 0, &status), 0);
    } while (status.status == STATUS_WAITING && seconds_now() < end);
    CHECK_EQUAL(status.status, ends[index]);
    CHECK_EQUAL(freeBatchID(engine, batch), 0);
  }
  notify_msg_t *received = getNotifsFromEngine(engine, &size);
  CHECK_EQUAL(size, 1);
  freeNotifsMsgBuf(received, size);
  destroyTransferEngine(engine);
  atomic_store(&refuses_threads, 0);
}

int main(void) {
  world_t world = {0};
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_OFF));
  world.peer = peer_start();
  setting_up();
  REQUIRE_OK(mooncake_engine_create(NULL, &world.engine));
  world.local = (unsigned char *)new_pages(LENGTH);
  REQUIRE_OK(mooncake_segment_open(world.engine, world.peer.name, 0, &world.segment));
  callbacks(&world);
  recovery_and_notifications(&world);
  drop_in(&world);
  atomic_store(&refuses_threads, 1);
  REQUIRE_OK(mooncake_engine_destroy(world.engine));
  peer_kill(&world.peer);
  return check_result("thread_failure");
}
