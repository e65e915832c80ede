/* Transfers as programs on the drop-in header make them: submit, ask for each status in a tight
 * loop until the transfer is over, free the batch. Ordinary memory with 4 KiB pages, touched.
 *
 *   dropin_poll target BYTES
 *       prints "segment NAME address ADDRESS" and serves until it is killed
 *   dropin_poll initiator NAME ADDRESS BYTES read|write BLOCK BATCH SECONDS PAUSE_US
 *       moves blocks, one after the other over BYTES on both sides, sleeps PAUSE_US between polls,
 *       and prints what it reached as JSON
 */
#define _GNU_SOURCE
#include "transfer_engine_c.h"

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

static void die(const char *what) {
  fprintf(stderr, "dropin_poll: %s\n", what);
  exit(1);
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static double processor_seconds(void) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
}

static uint64_t number(const char *text, uint64_t least) {
  char *end;
  errno = 0;
  uint64_t value = strtoull(text, &end, 0);
  if (errno != 0 || end == text || *end != 0 || value < least) {
    fprintf(stderr, "dropin_poll: '%s' is not a number of at least %llu\n", text,
            (unsigned long long)least);
    exit(2);
  }
  return value;
}

/* An engine on loopback with touched memory. */
static transfer_engine_t make_engine(char **memory, size_t bytes) {
  transfer_engine_t engine = createTransferEngine("P2PHANDSHAKE", "127.0.0.1:0", "127.0.0.1", 0, 0);
  if (engine == NULL) die("the engine was not created; the log says why");
  if (installTransport(engine, "tcp", NULL) == NULL) die("no TCP");
  *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (*memory == MAP_FAILED) die("no memory");
  madvise(*memory, bytes, MADV_NOHUGEPAGE);
  memset(*memory, 0x5a, bytes);
  if (registerLocalMemory(engine, *memory, bytes, "cpu:0", 1) != 0) die("memory not registered");
  return engine;
}

static int serve(size_t bytes) {
  char *memory, name[256];
  transfer_engine_t engine = make_engine(&memory, bytes);
  if (getLocalIpAndPort(engine, name, sizeof name) != 0) die("the engine has no name");
  printf("segment %s address %llu\n", name, (unsigned long long)(uintptr_t)memory);
  fflush(stdout);
  for (;;) pause();
}

static void pause_between(uint64_t microseconds) {
  if (microseconds > 0) usleep((useconds_t)microseconds);
}

/* One batch from its submit to its end. */
static void run_batch(transfer_engine_t engine, struct transfer_request *requests, size_t count,
                      uint64_t pause_us) {
  batch_id_t batch = allocateBatchID(engine, count);
  if (batch == INVALID_BATCH) die("no batch");
  if (submitTransfer(engine, batch, requests, count) != 0) die("not submitted");
  for (size_t task = 0; task < count; task += 1) {
    for (;;) {
      struct transfer_status status;
      if (getTransferStatus(engine, batch, task, &status) != 0) die("no status");
      if (status.status == STATUS_COMPLETED) break;
      if (status.status != STATUS_WAITING && status.status != STATUS_PENDING) die("it failed");
      pause_between(pause_us);
    }
  }
  if (freeBatchID(engine, batch) != 0) die("the batch was not freed");
}

static int ascending(const void *one, const void *other) {
  double difference = *(const double *)one - *(const double *)other;
  return (difference > 0) - (difference < 0);
}

static int initiate(char **words) {
  size_t bytes = number(words[2], 1), block = number(words[4], 1), batch = number(words[5], 1);
  uint64_t remote = number(words[1], 1), pause_us = number(words[7], 0);
  double seconds = atof(words[6]);
  int opcode = strcmp(words[3], "read") == 0 ? OPCODE_READ : OPCODE_WRITE;
  size_t per_round = bytes / block / batch;
  if (per_round == 0) die("a batch is larger than the memory");
  char *memory;
  transfer_engine_t engine = make_engine(&memory, bytes);
  segment_id_t segment = openSegment(engine, words[0]);
  if (segment < 0) die("the segment was not opened");
  struct transfer_request *requests = calloc(batch, sizeof *requests);
  enum { LIMIT = 1 << 20 };
  double *times = calloc(LIMIT, sizeof *times);
  if (requests == NULL || times == NULL) die("no memory");
  size_t rounds = 0;
  double cpu = 0, begin = 0, end = 0;
  /* The first pass connects. */
  for (int warm = 1; warm >= 0; warm -= 1) {
    rounds = 0;
    cpu = processor_seconds();
    begin = end = now();
    while (end - begin < (warm ? 0.2 : seconds)) {
      size_t first = rounds % per_round * batch;
      for (size_t index = 0; index < batch; index += 1) {
        uint64_t offset = (first + index) * block;
        requests[index] = (struct transfer_request){.opcode = opcode,
                                                    .source = memory + offset,
                                                    .target_id = segment,
                                                    .target_offset = remote + offset,
                                                    .length = block};
      }
      double start = end;
      run_batch(engine, requests, batch, pause_us);
      end = now();
      times[rounds++ % LIMIT] = (end - start) * 1e6;
    }
  }
  cpu = processor_seconds() - cpu;
  size_t known = rounds < LIMIT ? rounds : LIMIT;
  qsort(times, known, sizeof *times, ascending);
  double moved = (double)(rounds * batch * block), elapsed = end - begin;
  printf("{\"bytes\": %.0f, \"bytes_per_second\": %.0f, \"operations_per_second\": %.1f, "
         "\"p50_us\": %.2f, \"p90_us\": %.2f, \"p99_us\": %.2f, \"p999_us\": %.2f, "
         "\"cpu_seconds\": %.6f}\n",
         moved, moved / elapsed, (double)(rounds * batch) / elapsed, times[known / 2],
         times[known * 9 / 10], times[known * 99 / 100], times[known * 999 / 1000], cpu);
  destroyTransferEngine(engine);
  return 0;
}

int main(int argc, char **argv) {
  if (argc == 3 && strcmp(argv[1], "target") == 0) return serve(number(argv[2], 1));
  if (argc == 10 && strcmp(argv[1], "initiator") == 0 &&
      (strcmp(argv[5], "read") == 0 || strcmp(argv[5], "write") == 0))
    return initiate(argv + 2);
  fprintf(stderr,
          "usage: %s target BYTES\n"
          "       %s initiator NAME ADDRESS BYTES read|write BLOCK BATCH SECONDS PAUSE_US\n",
          argv[0], argv[0]);
  return 2;
}
