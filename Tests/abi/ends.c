/* A caller that has seen every request end may free the batch at once: over shared memory and
 * TCP, with either header, on the submitting thread and on another.
 *
 *   ends [BATCHES]    that many of each kind; prints how many were busy */
#include <pthread.h>
#include <stdatomic.h>

#include "mooncake.h"
#include "transfer_engine_c.h"

#include "check.h"

enum { SMALL = 64, LARGE = 640 << 10, REQUESTS = 2, RING = 64 };

/* One header's calls on an engine that reads from itself. */
typedef struct subject {
  mooncake_engine_t *native;
  transfer_engine_t dropin;
  unsigned char *memory; /* LARGE * REQUESTS * 2 bytes: into the first half, from the second */
  uint64_t length;       /* of a request */
} subject_t;

static uint64_t create_batch(const subject_t *self) {
  mooncake_batch_t batch = 0;
  if (self->native == NULL) {
    batch = allocateBatchID(self->dropin, REQUESTS);
    REQUIRE(batch != INVALID_BATCH);
  } else {
    REQUIRE_OK(mooncake_batch_create(self->native, REQUESTS, &batch));
  }
  return batch;
}

static void submit(const subject_t *self, uint64_t batch) {
  const unsigned char *remote = self->memory + LARGE * REQUESTS;
  mooncake_transfer_request_t requests[REQUESTS];
  transfer_request_t entries[REQUESTS];
  for (uint64_t index = 0; index < REQUESTS; index += 1) {
    uint64_t offset = index * self->length;
    uint64_t address = (uint64_t)(uintptr_t)(remote + offset);
    mooncake_transfer_request_t request = {MOONCAKE_OPCODE_READ, MOONCAKE_SEGMENT_LOCAL,
                                           self->memory + offset, address, self->length};
    transfer_request_t entry = {OPCODE_READ, self->memory + offset, LOCAL_SEGMENT, address,
                                self->length};
    requests[index] = request;
    entries[index] = entry;
  }
  if (self->native == NULL) {
    REQUIRE_EQUAL(submitTransfer(self->dropin, batch, entries, REQUESTS), 0);
  } else {
    REQUIRE_OK(mooncake_batch_submit(self->native, batch, requests, REQUESTS, 0));
  }
}

/* 1 once the request is COMPLETED. Before the submit it does not exist, which is not an end
 * either. */
static int is_completed(const subject_t *self, uint64_t batch, uint64_t index) {
  mooncake_transfer_status_t native;
  transfer_status_t dropin;
  if (self->native == NULL) {
    if (getTransferStatus(self->dropin, batch, index, &dropin) != 0) return 0;
    if (dropin.status != STATUS_WAITING) REQUIRE_EQUAL(dropin.status, STATUS_COMPLETED);
    return dropin.status == STATUS_COMPLETED;
  }
  if (mooncake_batch_poll_request(self->native, batch, index, &native) != 0) return 0;
  if (native.state != MOONCAKE_STATE_WAITING) REQUIRE_EQUAL(native.state, MOONCAKE_STATE_COMPLETED);
  return native.state == MOONCAKE_STATE_COMPLETED;
}

static int free_batch(const subject_t *self, uint64_t batch) {
  return self->native == NULL ? freeBatchID(self->dropin, batch)
                              : mooncake_batch_free(self->native, batch);
}

/* Polls until every request is COMPLETED and frees the batch; returns how often that was
 * refused. */
static uint64_t finish(const subject_t *self, uint64_t batch) {
  uint64_t refused = 0;
  for (uint64_t index = 0; index < REQUESTS; index += 1) {
    while (!is_completed(self, batch, index)) sched_yield();
  }
  while (free_batch(self, batch) != 0) {
    refused += 1;
    REQUIRE(refused < 1000000);
  }
  return refused;
}

static uint64_t alone(const subject_t *self, uint64_t count) {
  uint64_t refused = 0;
  for (uint64_t index = 0; index < count; index += 1) {
    uint64_t batch = create_batch(self);
    submit(self, batch);
    refused += finish(self, batch);
  }
  return refused;
}

/* Batches handed from the submitting thread to the one that polls and frees. */
typedef struct handover {
  const subject_t *subject;
  uint64_t count;
  uint64_t refused;
  _Atomic uint64_t batches[RING];
} handover_t;

static void *poll_and_free(void *argument) {
  handover_t *self = (handover_t *)argument;
  for (uint64_t index = 0; index < self->count; index += 1) {
    _Atomic uint64_t *place = &self->batches[index % RING];
    uint64_t batch = 0;
    while ((batch = atomic_load(place)) == 0) sched_yield();
    self->refused += finish(self->subject, batch);
    atomic_store(place, 0);
  }
  return NULL;
}

static uint64_t by_two(const subject_t *subject, uint64_t count) {
  static handover_t self;
  pthread_t thread;
  memset(&self, 0, sizeof self);
  self.subject = subject;
  self.count = count;
  REQUIRE(pthread_create(&thread, NULL, poll_and_free, &self) == 0);
  for (uint64_t index = 0; index < count; index += 1) {
    _Atomic uint64_t *place = &self.batches[index % RING];
    while (atomic_load(place) != 0) sched_yield();
    uint64_t batch = create_batch(subject);
    /* The other one polls from before the submit, so that it sees the end at once. */
    atomic_store(place, batch);
    submit(subject, batch);
  }
  REQUIRE(pthread_join(thread, NULL) == 0);
  return self.refused;
}

static void measure(const char *header, const char *transport, subject_t *subject, uint64_t count) {
  double start = seconds_now();
  subject->length = SMALL;
  uint64_t one = alone(subject, count);
  uint64_t two = by_two(subject, count);
  /* Large enough to be copied by the engine's threads. */
  subject->length = LARGE;
  uint64_t large = alone(subject, count / 20);
  printf("%s, %s: busy in %llu batches: %llu, with another thread: %llu; large, in %llu: %llu "
         "(%.0f s)\n",
         header, transport, (unsigned long long)count, (unsigned long long)one,
         (unsigned long long)two, (unsigned long long)(count / 20), (unsigned long long)large,
         seconds_now() - start);
  fflush(stdout);
  CHECK_EQUAL(one, 0);
  CHECK_EQUAL(two, 0);
  CHECK_EQUAL(large, 0);
}

int main(int argument_count, char **arguments) {
  uint64_t count = argument_count > 1 ? strtoull(arguments[1], NULL, 10) : 2000;
  const char *transport = getenv("MC_FORCE_TCP") == NULL ? "memory" : "TCP";
  subject_t native = {0};
  subject_t dropin = {0};
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_OFF));
  REQUIRE_OK(mooncake_engine_create(NULL, &native.native));
  native.memory = (unsigned char *)new_pages(LARGE * REQUESTS * 2);
  REQUIRE_OK(mooncake_memory_register(native.native, native.memory, LARGE * REQUESTS * 2, NULL,
                                      MOONCAKE_ACCESS_REMOTE_READ));
  measure("mooncake.h", transport, &native, count);
  REQUIRE_OK(mooncake_engine_destroy(native.native));

  dropin.dropin = createTransferEngine("P2PHANDSHAKE", "127.0.0.1:0", NULL, 0, 0);
  REQUIRE(dropin.dropin != NULL && installTransport(dropin.dropin, "tcp", NULL) != NULL);
  dropin.memory = (unsigned char *)new_pages(LARGE * REQUESTS * 2);
  REQUIRE_EQUAL(
      registerLocalMemory(dropin.dropin, dropin.memory, LARGE * REQUESTS * 2, NULL, 1), 0);
  measure("transfer_engine_c.h", transport, &dropin, count);
  destroyTransferEngine(dropin.dropin);

  if (getenv("MC_FORCE_TCP") == NULL && check_failure_count == 0) {
    /* The same over TCP; the library reads the environment when it is loaded. */
    setenv("MC_FORCE_TCP", "1", 1);
    execv("/proc/self/exe", arguments);
    return 1;
  }
  return check_result("ends");
}
