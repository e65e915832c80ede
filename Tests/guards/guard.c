/* Small requests between two processes, measured by scripts/test-guards.
 *
 *   guard TRANSPORTS read|write BATCHES REQUESTS
 *
 * Runs BATCHES batches of REQUESTS requests of 64 bytes after some to warm up. With allocations.c
 * preloaded, both processes print how many allocations they made after the warm ones. */
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <valgrind/valgrind.h>

#include "../abi/peer.h"

#ifdef __x86_64__
/* Valgrind 3.19 lacks pidfd_open, without which the library shares no memory. This replaces
 * syscall() for the library; under valgrind, it returns a descriptor that never reports the end
 * of a process. */
long syscall(long number, ...) {
  va_list list;
  va_start(list, number);
  long words[6];
  for (int index = 0; index < 6; index += 1) words[index] = va_arg(list, long);
  va_end(list);
  if (number == SYS_pidfd_open && RUNNING_ON_VALGRIND) return eventfd(0, EFD_CLOEXEC);
  register long fourth __asm__("r10") = words[3];
  register long fifth __asm__("r8") = words[4];
  register long sixth __asm__("r9") = words[5];
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(words[0]), "S"(words[1]), "d"(words[2]), "r"(fourth),
                     "r"(fifth), "r"(sixth)
                   : "rcx", "r11", "memory");
  if (result >= 0 || result < -4095) return result;
  errno = (int)-result;
  return -1;
}
#endif

#define BLOCK 64u
#define WARM_BATCHES 20

typedef struct initiator {
  mooncake_engine_t *engine;
  mooncake_transfer_request_t *requests;
  uint64_t count;
} initiator_t;

static mooncake_engine_t *new_engine(const char *transports) {
  mooncake_engine_options_t options;
  mooncake_engine_t *engine = NULL;
  REQUIRE_OK(mooncake_engine_options_init(&options, sizeof options));
  options.transports = transports;
  options.io_threads = 1;
  options.connections_per_peer = 1;
  /* Spinning is not work: idle threads sleep at once. */
  options.spin_us = 1;
  REQUIRE_OK(mooncake_engine_create(&options, &engine));
  return engine;
}

static uint64_t allocation_count(void) {
  uint64_t (*count)(void) = (uint64_t (*)(void))dlsym(RTLD_DEFAULT, "counted_allocations");
  return count ? count() : 0;
}

/* Called once before and once after the measured part. */
static void measure(const char *role) {
  static int begun;
  static uint64_t before;
  if (begun) {
    printf("%s %llu\n", role, (unsigned long long)(allocation_count() - before));
    fflush(stdout);
    return;
  }
  begun = 1;
  before = allocation_count();
}

static void serve(const char *transports, uint64_t length, int input, int output) {
  peer_t self;
  void *memory = NULL;
  char byte;
  memset(&self, 0, sizeof self);
  mooncake_engine_t *engine = new_engine(transports);
  REQUIRE_OK(mooncake_memory_allocate(engine, length, NULL,
                                      MOONCAKE_ACCESS_REMOTE_READ | MOONCAKE_ACCESS_REMOTE_WRITE,
                                      &memory));
  REQUIRE_OK(mooncake_engine_name(engine, self.name, sizeof self.name, NULL));
  self.address = (uint64_t)(uintptr_t)memory;
  REQUIRE(write(output, &self, sizeof self) == (ssize_t)sizeof self);
  for (int step = 0; step < 2 && read(input, &byte, 1) == 1; step += 1) {
    measure("target");
    REQUIRE(write(output, &byte, 1) == 1);
  }
  REQUIRE_OK(mooncake_engine_destroy(engine));
}

static void run_batches(const initiator_t *self, uint64_t batches) {
  for (uint64_t index = 0; index < batches; index += 1) {
    mooncake_batch_t batch;
    mooncake_batch_status_t status;
    REQUIRE_OK(mooncake_batch_create(self->engine, self->count, &batch));
    REQUIRE_OK(mooncake_batch_submit(self->engine, batch, self->requests, self->count, 0));
    REQUIRE_OK(mooncake_batch_wait(self->engine, batch, 0, &status));
    REQUIRE_EQUAL(status.state, MOONCAKE_STATE_COMPLETED);
    REQUIRE_OK(mooncake_batch_free(self->engine, batch));
  }
}

static void prepare(initiator_t *self, const char *transports, const char *operation,
                    const peer_t *peer) {
  mooncake_segment_t segment;
  void *local = NULL;
  self->engine = new_engine(transports);
  REQUIRE_OK(mooncake_memory_allocate(self->engine, self->count * BLOCK, NULL, 0, &local));
  REQUIRE_OK(mooncake_segment_open(self->engine, peer->name, 0, &segment));
  self->requests = calloc(self->count, sizeof *self->requests);
  REQUIRE(self->requests != NULL);
  for (uint64_t index = 0; index < self->count; index += 1) {
    mooncake_transfer_request_t *request = &self->requests[index];
    request->opcode =
      strcmp(operation, "write") == 0 ? MOONCAKE_OPCODE_WRITE : MOONCAKE_OPCODE_READ;
    request->segment = segment;
    request->source = (char *)local + index * BLOCK;
    request->target_offset = peer->address + index * BLOCK;
    request->length = BLOCK;
  }
}

/* Measures both ends. */
static void measure_both(int output, int input) {
  char byte = 0;
  REQUIRE(write(output, &byte, 1) == 1 && read(input, &byte, 1) == 1);
  measure("initiator");
}

int main(int count, char **words) {
  if (count != 5) {
    fprintf(stderr, "usage: guard TRANSPORTS read|write BATCHES REQUESTS\n");
    return 2;
  }
  initiator_t self = {.count = strtoull(words[4], NULL, 10)};
  peer_t peer;
  int to_peer[2], from_peer[2];
  REQUIRE(pipe(to_peer) == 0 && pipe(from_peer) == 0);
  peer.pid = fork();
  REQUIRE(peer.pid >= 0);
  if (peer.pid == 0) {
    close(to_peer[1]);
    serve(words[1], self.count * BLOCK, to_peer[0], from_peer[1]);
    return check_result("guard target");
  }
  pid_t pid = peer.pid;
  REQUIRE(read(from_peer[0], &peer, sizeof peer) == (ssize_t)sizeof peer);
  prepare(&self, words[1], words[2], &peer);
  run_batches(&self, WARM_BATCHES);
  measure_both(to_peer[1], from_peer[0]);
  run_batches(&self, strtoull(words[3], NULL, 10));
  measure_both(to_peer[1], from_peer[0]);

  REQUIRE_OK(mooncake_engine_destroy(self.engine));
  free(self.requests);
  int status = 0;
  REQUIRE(waitpid(pid, &status, 0) == pid);
  CHECK_EQUAL(status, 0);
  return check_result("guard initiator");
}
