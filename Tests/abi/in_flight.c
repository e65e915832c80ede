/* Unfinished work: cancel, deadline, a dead peer and destroy, each with a stopped peer process.
 * Terminal means terminal: afterwards nothing writes into the memory of a read. */
#include "mooncake.h"

#include "check.h"
#include "peer.h"

enum { LENGTH = 4 << 20, COUNT = 4 };

typedef struct world {
  mooncake_engine_t *engine;
  mooncake_segment_t segment;
  unsigned char *memory; /* LENGTH * COUNT bytes */
  peer_t peer;
} world_t;

static mooncake_batch_t submit_reads(const world_t *world, uint64_t timeout_ms) {
  mooncake_batch_t batch = 0;
  mooncake_transfer_request_t requests[COUNT];
  memset(requests, 0, sizeof requests);
  for (uint64_t index = 0; index < COUNT; index += 1) {
    requests[index].opcode = MOONCAKE_OPCODE_READ;
    requests[index].segment = world->segment;
    requests[index].source = world->memory + index * LENGTH;
    requests[index].target_offset = world->peer.address + index * LENGTH;
    requests[index].length = LENGTH;
  }
  REQUIRE_OK(mooncake_batch_create(world->engine, COUNT, &batch));
  REQUIRE_OK(mooncake_batch_submit(world->engine, batch, requests, COUNT, timeout_ms));
  return batch;
}

/* Waits up to `seconds` until every request is terminal, as the batch status must then say. */
static mooncake_batch_status_t await_end(const world_t *world, mooncake_batch_t batch,
                                         uint64_t seconds) {
  mooncake_batch_status_t status;
  double start = seconds_now();
  REQUIRE_OK(mooncake_batch_wait(world->engine, batch, seconds * 1000, &status));
  CHECK(seconds_now() - start <= (double)seconds);
  CHECK_EQUAL(status.submitted_count, COUNT);
  CHECK_EQUAL(status.terminal_count, COUNT);
  return status;
}

static void expect_each(const world_t *world, mooncake_batch_t batch, int32_t state,
                        int32_t error) {
  mooncake_transfer_status_t status;
  for (uint64_t index = 0; index < COUNT; index += 1) {
    REQUIRE_OK(mooncake_batch_poll_request(world->engine, batch, index, &status));
    CHECK_EQUAL(status.state, state);
    CHECK_EQUAL(status.error, error);
  }
}

/* Resumes the peer and checks that nothing it still sends is stored. */
static void expect_no_late_byte(const world_t *world) {
  memset(world->memory, 0x5A, LENGTH * COUNT);
  peer_continue(&world->peer);
  sleep_milliseconds(300);
  CHECK(has_only(world->memory, LENGTH * COUNT, 0x5A));
}

static void read_everything(const world_t *world) {
  mooncake_batch_t batch = submit_reads(world, 20000);
  mooncake_batch_status_t status = await_end(world, batch, 20);
  CHECK_EQUAL(status.state, MOONCAKE_STATE_COMPLETED);
  CHECK(has_pattern(world->memory, LENGTH * COUNT, PEER_SEED));
  REQUIRE_OK(mooncake_batch_free(world->engine, batch));
}

static void cancel_stopped(const world_t *world) {
  mooncake_batch_status_t status;
  peer_stop(&world->peer);
  mooncake_batch_t batch = submit_reads(world, 30000);
  CHECK_EQUAL(mooncake_batch_free(world->engine, batch), MOONCAKE_ERROR_BUSY);
  double start = seconds_now();
  CHECK_EQUAL(mooncake_batch_wait(world->engine, batch, 100, &status), MOONCAKE_ERROR_TIMEOUT);
  CHECK(seconds_now() - start >= 0.09 && seconds_now() - start < 2);
  REQUIRE_OK(mooncake_batch_cancel(world->engine, batch));
  status = await_end(world, batch, 5);
  CHECK_EQUAL(status.state, MOONCAKE_STATE_CANCELED);
  CHECK_EQUAL(status.error, MOONCAKE_ERROR_CANCELED);
  expect_each(world, batch, MOONCAKE_STATE_CANCELED, MOONCAKE_ERROR_CANCELED);
  REQUIRE_OK(mooncake_batch_cancel(world->engine, batch));
  REQUIRE_OK(mooncake_batch_free(world->engine, batch));
  expect_no_late_byte(world);
}

static void miss_deadline(const world_t *world) {
  mooncake_batch_status_t status;
  peer_stop(&world->peer);
  double start = seconds_now();
  mooncake_batch_t batch = submit_reads(world, 400);
  status = await_end(world, batch, 5);
  CHECK(seconds_now() - start >= 0.35);
  CHECK_EQUAL(status.state, MOONCAKE_STATE_TIMEOUT);
  CHECK_EQUAL(status.error, MOONCAKE_ERROR_TIMEOUT);
  CHECK(strstr(mooncake_error_message(), world->peer.name) != NULL);
  expect_each(world, batch, MOONCAKE_STATE_TIMEOUT, MOONCAKE_ERROR_TIMEOUT);
  REQUIRE_OK(mooncake_batch_free(world->engine, batch));
  expect_no_late_byte(world);
}

static void race_cancel(const world_t *world) {
  for (int round = 0; round < 20; round += 1) {
    mooncake_batch_t batch = submit_reads(world, 20000);
    if (round % 2 == 1) sleep_milliseconds(1);
    REQUIRE_OK(mooncake_batch_cancel(world->engine, batch));
    mooncake_batch_status_t status = await_end(world, batch, 10);
    CHECK(status.state == MOONCAKE_STATE_CANCELED || status.state == MOONCAKE_STATE_COMPLETED);
    memset(world->memory, 0x5A, LENGTH * COUNT);
    sleep_milliseconds(5);
    CHECK(has_only(world->memory, LENGTH * COUNT, 0x5A));
    REQUIRE_OK(mooncake_batch_free(world->engine, batch));
  }
}

static void lose_peer(const world_t *world) {
  mooncake_segment_t segment = 0;
  peer_stop(&world->peer);
  mooncake_batch_t batch = submit_reads(world, 3000);
  peer_kill(&world->peer);
  mooncake_batch_status_t status = await_end(world, batch, 10);
  CHECK(status.state == MOONCAKE_STATE_FAILED || status.state == MOONCAKE_STATE_TIMEOUT);
  CHECK(status.error == MOONCAKE_ERROR_UNREACHABLE || status.error == MOONCAKE_ERROR_TIMEOUT);
  REQUIRE_OK(mooncake_batch_free(world->engine, batch));
  CHECK_EQUAL(mooncake_segment_open(world->engine, world->peer.name, 2000, &segment),
              MOONCAKE_ERROR_UNREACHABLE);
}

static void destroy_in_flight(world_t *world) {
  mooncake_batch_status_t status;
  peer_t other = world->peer;
  peer_stop(&other);
  mooncake_batch_t batch = submit_reads(world, 30000);
  double start = seconds_now();
  REQUIRE_OK(mooncake_engine_destroy(world->engine));
  CHECK(seconds_now() - start < 5);
  CHECK_EQUAL(mooncake_batch_poll(world->engine, batch, &status), MOONCAKE_ERROR_INVALID_HANDLE);
  expect_no_late_byte(world);
}

int main(void) {
  world_t world;
  peer_t second = peer_start();
  world.peer = peer_start();
  world.memory = (unsigned char *)new_pages(LENGTH * COUNT);
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_OFF));
  REQUIRE_OK(mooncake_engine_create(NULL, &world.engine));
  REQUIRE_OK(mooncake_memory_register(world.engine, world.memory, LENGTH * COUNT, NULL,
                                      MOONCAKE_ACCESS_LOCAL));
  REQUIRE_OK(mooncake_segment_open(world.engine, world.peer.name, 10000, &world.segment));
  read_everything(&world);
  cancel_stopped(&world);
  read_everything(&world);
  miss_deadline(&world);
  read_everything(&world);
  race_cancel(&world);
  read_everything(&world);
  lose_peer(&world);

  world.peer = second;
  REQUIRE_OK(mooncake_segment_open(world.engine, world.peer.name, 10000, &world.segment));
  read_everything(&world);
  destroy_in_flight(&world);
  peer_kill(&second);
  return check_result("in_flight");
}
