/* Forks of a host whose threads are busy registering, moving memory, logging, using store
 * handles and making engines. Each child makes an engine, uses it on several threads and copies
 * to a third process through shared memory; none may die, hang or see wrong bytes.
 *
 * usage: fork_busy [SECONDS [SEED]]   (the default is short) */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "mooncake.h"
#include "mooncake_store.h"

#include "check.h"

enum {
  LENGTH = 64 << 10,
  BUSY_THREADS = 6,
  CHILD_THREADS = 4,
  CHILD_ROUNDS = 20,
  CHILD_SECONDS = 30,
  WARM_ROUNDS = 20,
  LEAST_FORKS = 60,
  AT_ONCE = 4
};

static const uint32_t both = MOONCAKE_ACCESS_REMOTE_READ | MOONCAKE_ACCESS_REMOTE_WRITE;

/* The third process: its buffer begins at `address`; a second one behind it comes and goes. */
typedef struct third {
  pid_t pid;
  uint64_t address;
  char name[256];
} third_t;

typedef struct worker {
  mooncake_engine_t *engine;
  const third_t *third;
  uint64_t seed;
  int rounds; /* 0: until the host ends */
} worker_t;

static atomic_int should_end;
static atomic_int rounds[BUSY_THREADS];
static atomic_ullong lines;

static void count_line(int32_t level, const char *message, void *context) {
  (void)level;
  (void)message;
  (void)context;
  atomic_fetch_add(&lines, 1);
}

static uint64_t next_random(uint64_t *state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return *state >> 33;
}

static mooncake_engine_t *new_engine(void) {
  mooncake_engine_t *engine = NULL;
  REQUIRE_OK(mooncake_engine_create(NULL, &engine));
  return engine;
}

static void move(mooncake_engine_t *engine, int32_t opcode, mooncake_segment_t segment,
                 void *source, uint64_t target, uint64_t length) {
  mooncake_transfer_request_t request;
  memset(&request, 0, sizeof request);
  request.opcode = opcode;
  request.segment = segment;
  request.source = source;
  request.target_offset = target;
  request.length = length;
  REQUIRE_OK(mooncake_transfer_sync(engine, &request, 1, 20000));
}

/* ---- The third process ---- */

static void serve(int output) {
  third_t self;
  memset(&self, 0, sizeof self);
  mooncake_engine_t *engine = new_engine();
  void *memory = NULL;
  REQUIRE_OK(mooncake_memory_allocate(engine, LENGTH * 2, NULL, both, &memory));
  fill_pattern(memory, LENGTH, 7);
  REQUIRE_OK(mooncake_engine_name(engine, self.name, sizeof self.name, NULL));
  self.address = (uint64_t)(uintptr_t)memory;
  REQUIRE(write(output, &self, sizeof self) == (ssize_t)sizeof self);
  unsigned char *other = (unsigned char *)new_pages(LENGTH);
  for (;;) {
    /* Each unregistration waits for the copies of every process. */
    REQUIRE_OK(mooncake_memory_register(engine, other, LENGTH, NULL, both));
    double start = seconds_now();
    REQUIRE_OK(mooncake_memory_unregister(engine, other));
    REQUIRE(seconds_now() - start < 20);
    sleep_milliseconds(1);
  }
}

static third_t start_third(void) {
  third_t third;
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  pid_t pid = fork();
  REQUIRE(pid >= 0);
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(ends[0]);
    serve(ends[1]);
  }
  close(ends[1]);
  REQUIRE(read(ends[0], &third, sizeof third) == (ssize_t)sizeof third);
  close(ends[0]);
  third.pid = pid;
  return third;
}

/* ---- Threads of the host and of its children ---- */

static int goes_on(const worker_t *worker, int round) {
  if (worker->rounds == 0) atomic_store(&rounds[worker->seed], round);
  return worker->rounds > 0 ? round < worker->rounds : !atomic_load(&should_end);
}

static void use_registrations(const worker_t *worker) {
  unsigned char *memory = (unsigned char *)new_pages(4096);
  for (int round = 0; goes_on(worker, round); round += 1) {
    REQUIRE_OK(mooncake_memory_register(worker->engine, memory, 4096, NULL, both));
    REQUIRE_OK(mooncake_memory_unregister(worker->engine, memory));
  }
  free(memory);
}

static void use_batches(const worker_t *worker) {
  mooncake_segment_t segment = 0;
  unsigned char *memory = (unsigned char *)new_pages(LENGTH);
  for (int round = 0; goes_on(worker, round); round += 1) {
    REQUIRE_OK(mooncake_segment_open(worker->engine, worker->third->name, 20000, &segment));
    memset(memory, 0, LENGTH);
    move(worker->engine, MOONCAKE_OPCODE_READ, segment, memory, worker->third->address, LENGTH);
    REQUIRE(has_pattern(memory, LENGTH, 7));
    REQUIRE_OK(mooncake_segment_close(worker->engine, segment));
  }
  free(memory);
}

/* A request outside any buffer is logged; a refused call only when debugging. */
static void use_log(const worker_t *worker) {
  mooncake_batch_t batch = 0;
  mooncake_batch_status_t status;
  char byte[8];
  for (int round = 0; goes_on(worker, round); round += 1) {
    mooncake_transfer_request_t request;
    memset(&request, 0, sizeof request);
    request.opcode = MOONCAKE_OPCODE_READ;
    request.segment = MOONCAKE_SEGMENT_LOCAL;
    request.source = byte;
    request.target_offset = 64;
    request.length = sizeof byte;
    REQUIRE_OK(mooncake_batch_create(worker->engine, 1, &batch));
    REQUIRE_OK(mooncake_batch_submit(worker->engine, batch, &request, 1, 10000));
    REQUIRE_OK(mooncake_batch_wait(worker->engine, batch, 20000, &status));
    CHECK(status.state == MOONCAKE_STATE_FAILED);
    REQUIRE_OK(mooncake_batch_free(worker->engine, batch));
    CHECK_EQUAL(mooncake_segment_close(worker->engine, 12345), MOONCAKE_ERROR_INVALID_HANDLE);
  }
}

static void use_handles(const worker_t *worker) {
  for (int round = 0; goes_on(worker, round); round += 1) {
    mooncake_cancellation_t *cancellation = NULL;
    REQUIRE_OK(mooncake_cancellation_create(&cancellation));
    REQUIRE_OK(mooncake_cancellation_destroy(cancellation));
  }
}

static void use_engines(const worker_t *worker) {
  for (int round = 0; goes_on(worker, round); round += 1) {
    REQUIRE_OK(mooncake_engine_destroy(new_engine()));
  }
}

static void *work(void *argument) {
  const worker_t *worker = (const worker_t *)argument;
  switch (worker->seed % 5) {
    case 0: use_registrations(worker); break;
    case 1: use_batches(worker); break;
    case 2: use_log(worker); break;
    case 3: use_handles(worker); break;
    default: use_engines(worker);
  }
  return NULL;
}

/* ---- The children ---- */

static void child_main(const third_t *third, mooncake_engine_t *inherited, uint64_t seed) {
  pthread_t threads[CHILD_THREADS];
  worker_t workers[CHILD_THREADS];
  char name[256];
  alarm(CHILD_SECONDS);
  check_failure_count = 0;
  REQUIRE_OK(mooncake_log_set_callback(count_line, NULL));
  CHECK_EQUAL(mooncake_engine_name(inherited, name, sizeof name, NULL),
              MOONCAKE_ERROR_INVALID_HANDLE);
  mooncake_engine_t *engine = new_engine();
  /* Two threads of each kind that lock most, so that they collide; this thread is one of them. */
  for (int index = 0; index < CHILD_THREADS; index += 1) {
    workers[index] = (worker_t){engine, third, (seed + (uint64_t)index / 2) % 4, CHILD_ROUNDS};
    REQUIRE(pthread_create(&threads[index], NULL, work, &workers[index]) == 0);
  }
  worker_t own = {engine, third, seed % 4, CHILD_ROUNDS};
  work(&own);
  for (int index = 0; index < CHILD_THREADS; index += 1) {
    REQUIRE(pthread_join(threads[index], NULL) == 0);
  }
  unsigned char *memory = (unsigned char *)new_pages(LENGTH * 2);
  REQUIRE_OK(mooncake_memory_register(engine, memory, LENGTH * 2, NULL, both));
  fill_pattern(memory, LENGTH, seed);
  move(engine, MOONCAKE_OPCODE_WRITE, MOONCAKE_SEGMENT_LOCAL, memory,
       (uint64_t)(uintptr_t)(memory + LENGTH), LENGTH);
  REQUIRE(has_pattern(memory + LENGTH, LENGTH, seed));
  REQUIRE_OK(mooncake_engine_destroy(engine));
  _exit(check_result("fork_busy (child)"));
}

static int await_one(void) {
  int status = 0;
  pid_t pid = wait(&status);
  REQUIRE(pid > 0);
  if (WIFSIGNALED(status)) {
    fprintf(stderr, "a child was ended by signal %d (%d: it hung)\n", WTERMSIG(status), SIGALRM);
  }
  return CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(int count, char **arguments) {
  double seconds = count > 1 ? atof(arguments[1]) : 0;
  uint64_t seed = count > 2 ? strtoull(arguments[2], NULL, 10) : (uint64_t)time(NULL);
  pthread_t threads[BUSY_THREADS];
  worker_t workers[BUSY_THREADS];
  printf("seed %llu\n", (unsigned long long)seed);
  fflush(stdout);

  third_t third = start_third();
  REQUIRE_OK(mooncake_log_set_callback(count_line, NULL));
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_DEBUG));
  mooncake_engine_t *engine = new_engine();
  for (int index = 0; index < BUSY_THREADS; index += 1) {
    workers[index] = (worker_t){engine, &third, (uint64_t)index, 0};
    REQUIRE(pthread_create(&threads[index], NULL, work, &workers[index]) == 0);
  }
  /* Everything has been used once: see "fork" in docs/threading-and-memory.md. */
  for (int index = 0; index < BUSY_THREADS; index += 1) {
    while (atomic_load(&rounds[index]) < WARM_ROUNDS) sleep_milliseconds(1);
  }
  double end = seconds_now() + seconds;
  int forks = 0, running = 0, good = 1;
  while (good && (forks < LEAST_FORKS || seconds_now() < end)) {
    struct timespec pause = {0, (long)(next_random(&seed) % 3000000)};
    nanosleep(&pause, NULL);
    uint64_t child_seed = next_random(&seed);
    fflush(NULL);
    pid_t pid = fork();
    REQUIRE(pid >= 0);
    if (pid == 0) child_main(&third, engine, child_seed);
    forks += 1;
    running += 1;
    if (running == AT_ONCE) {
      good = await_one();
      running -= 1;
    }
  }
  while (running > 0) {
    await_one();
    running -= 1;
  }
  atomic_store(&should_end, 1);
  for (int index = 0; index < BUSY_THREADS; index += 1) {
    REQUIRE(pthread_join(threads[index], NULL) == 0);
  }
  REQUIRE_OK(mooncake_engine_destroy(engine));
  kill(third.pid, SIGKILL);
  waitpid(third.pid, NULL, 0);
  printf("%d children, %llu log lines in the parent\n", forks, (unsigned long long)lines);
  return check_result("fork_busy");
}
