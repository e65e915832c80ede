/* The cost of ending early over TCP: how soon a canceled or late write ends, and how long a later
 * write takes that must wait for the fence, compared with one that need not and with one that
 * nothing disturbs.
 *
 *   fence [ROUNDS]      default 400; two processes of this machine, ordinary memory
 */
#define _GNU_SOURCE
#include <mooncake.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 64 << 10, COUNT = 64, DEADLINE_MS = 50, NAME_BYTES = 100 };

static void check(int32_t code, const char *what) {
  if (code == MOONCAKE_OK) return;
  fprintf(stderr, "fence: %s: %s\n", what, mooncake_error_message());
  exit(1);
}

static double microseconds(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec * 1e6 + (double)time.tv_nsec / 1e3;
}

static int ascending(const void *left, const void *right) {
  double difference = *(const double *)left - *(const double *)right;
  return (difference > 0) - (difference < 0);
}

static void report(const char *what, double *samples, int count) {
  qsort(samples, (size_t)count, sizeof *samples, ascending);
  printf("%-58s %9.0f %9.0f %9.0f\n", what, samples[count / 2], samples[count * 99 / 100],
         samples[count - 1]);
}

static mooncake_engine_t *create_engine(void) {
  mooncake_engine_options_t options;
  mooncake_engine_t *engine;
  check(mooncake_engine_options_init(&options, sizeof options), "options");
  options.transports = "tcp";
  check(mooncake_engine_create(&options, &engine), "create an engine");
  return engine;
}

static void serve(int output) {
  char name[NAME_BYTES];
  void *memory;
  mooncake_engine_t *engine = create_engine();
  check(mooncake_memory_allocate(engine, BLOCK * COUNT, NULL,
                                 MOONCAKE_ACCESS_REMOTE_READ | MOONCAKE_ACCESS_REMOTE_WRITE,
                                 &memory),
        "allocate");
  check(mooncake_engine_name(engine, name, sizeof name, NULL), "name");
  if (write(output, name, sizeof name) != sizeof name) exit(1);
  for (;;) pause();
}

static mooncake_engine_t *engine;
static mooncake_transfer_request_t requests[COUNT];

static double write_one(int index) {
  double begin = microseconds();
  check(mooncake_transfer_sync(engine, &requests[index], 1, 10000), "write");
  return microseconds() - begin;
}

/* Submits `count` writes and ends them early; returns how long that took beyond the deadline. */
static double end_early(int count, int cancels, uint64_t timeout_ms) {
  mooncake_batch_t batch;
  mooncake_batch_status_t status;
  check(mooncake_batch_create(engine, COUNT, &batch), "batch");
  double begin = microseconds();
  check(mooncake_batch_submit(engine, batch, requests, (uint64_t)count, timeout_ms), "submit");
  if (cancels) {
    begin = microseconds();
    check(mooncake_batch_cancel(engine, batch), "cancel");
  }
  check(mooncake_batch_wait(engine, batch, 10000, &status), "wait");
  double end = microseconds();
  check(mooncake_batch_free(engine, batch), "free");
  return end - begin - (cancels ? 0 : (double)timeout_ms * 1e3);
}

int main(int argc, char **argv) {
  int rounds = argc > 1 ? atoi(argv[1]) : 400;
  int stops = rounds / 8 > 0 ? rounds / 8 : 1;
  int channel[2];
  char name[NAME_BYTES];
  if (pipe(channel) != 0) return 1;
  pid_t target = fork();
  if (target == 0) serve(channel[1]);
  if (read(channel[0], name, sizeof name) != sizeof name) return 1;
  mooncake_remote_buffer_t buffer;
  mooncake_segment_t segment;
  uint64_t found;
  mooncake_log_set_level(MOONCAKE_LOG_OFF);
  engine = create_engine();
  check(mooncake_segment_open(engine, name, 0, &segment), "open");
  check(mooncake_segment_buffers(engine, segment, &buffer, 1, &found), "buffers");
  char *memory = aligned_alloc(4096, BLOCK * COUNT);
  memset(memory, 1, BLOCK * COUNT);
  for (int index = 0; index < COUNT; index++) {
    requests[index] = (mooncake_transfer_request_t){
        MOONCAKE_OPCODE_WRITE, segment, memory + (size_t)index * BLOCK,
        buffer.address + (uint64_t)index * BLOCK, BLOCK};
  }
  double *samples[6];
  for (int kind = 0; kind < 6; kind++) samples[kind] = calloc((size_t)rounds, sizeof(double));
  for (int round = 0; round < rounds; round++) {
    samples[0][round] = write_one(0);
    samples[1][round] = end_early(COUNT / 2, 1, 10000);
    samples[2][round] = write_one(0);
    end_early(COUNT / 2, 1, 10000);
    samples[3][round] = write_one(COUNT - 1);
    write_one(0);
  }
  for (int round = 0; round < stops; round++) {
    kill(target, SIGSTOP);
    waitpid(target, NULL, WUNTRACED);
    samples[4][round] = end_early(COUNT / 2, 0, DEADLINE_MS);
    kill(target, SIGCONT);
    samples[5][round] = write_one(0);
  }
  printf("%-58s %9s %9s %9s\n", "microseconds", "median", "p99", "max");
  report("a write of 64 KiB, undisturbed", samples[0], rounds);
  report("cancel of 32 such writes until all have ended", samples[1], rounds);
  report("then a write over one of them, behind the fence", samples[2], rounds);
  report("or one elsewhere, on a new connection", samples[3], rounds);
  report("stopped peer: end beyond the deadline of 50 ms", samples[4], stops);
  report("after it goes on: a write over one, behind the fence", samples[5], stops);
  kill(target, SIGKILL);
  waitpid(target, NULL, 0);
  return mooncake_engine_destroy(engine) != MOONCAKE_OK;
}
