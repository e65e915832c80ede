/* usage: soak [--duration SECONDS] [--seed NUMBER] [--hold]
 *
 * Runs everything for a time, reports progress every ten seconds, and at the end looks for
 * leaks. Exit status 1 for anything that should not have happened; with --hold the process then
 * waits for a debugger. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>

#include "soak.h"

enum { LOG_LINES = 40, LOG_BYTES = 400, PROGRESS_SECONDS = 10, HANG_SECONDS = 120 };

/* What engines may keep: caches, thread stacks, allocator slack. A sanitizer keeps more. */
#ifdef __SANITIZE_ADDRESS__
#define HEAP_GROWTH_LIMIT (1 << 30)
#else
#define HEAP_GROWTH_LIMIT (16 << 20)
#endif
#define SHARED_GROWTH_LIMIT (1 << 20)

soak_t soak;
static double start_time;
static int holds;
static char log_line[LOG_LINES][LOG_BYTES];
static unsigned log_count;
static pthread_mutex_t failure_lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- Failures ----------------------------------------------------------------------------- */

/* The library's log lines are kept, and shown only with a failure. */
static void keep_log(int32_t level, const char *message, void *context) {
  (void)context;
  snprintf(log_line[log_count % LOG_LINES], LOG_BYTES, "%.3f level %d: %s",
           seconds_now() - start_time, level, message);
  log_count += 1;
}

void soak_fail(const char *format, ...) {
  va_list arguments;
  pthread_mutex_lock(&failure_lock);
  int is_first = !atomic_exchange(&soak.has_failed, 1);
  fprintf(stderr, "soak: FAILED (seed %llu, after %.3f s, pid %d): ",
          (unsigned long long)soak.shared->seed, seconds_now() - start_time, (int)getpid());
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  if (is_first) {
    unsigned index = log_count > LOG_LINES ? log_count - LOG_LINES : 0;
    for (; index < log_count; index += 1) {
      fprintf(stderr, "  log: %s\n", log_line[index % LOG_LINES]);
    }
  }
  while (holds) pause();
  atomic_store(&soak.ends, 1);
  pthread_mutex_unlock(&failure_lock);
}

int soak_expect(int32_t code, const char *what, const char *file, int line) {
  if (code == MOONCAKE_OK) return 1;
  soak_fail("%s:%d: %s gave %s: %s", file, line, what, mooncake_error_name(code),
            mooncake_error_message());
  return 0;
}

/* ---- Memory of this process --------------------------------------------------------------- */

void soak_count_own(uint64_t length, int sign) {
  atomic_fetch_add(&soak.own_bytes, sign * (int64_t)((length + 4095) & ~(uint64_t)4095));
}

unsigned char *soak_map(uint64_t place, uint64_t length, unsigned char byte) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | (place == 0 ? 0 : MAP_FIXED_NOREPLACE);
  void *memory = mmap((void *)(uintptr_t)place, length, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) {
    fprintf(stderr, "soak: mmap: %s\n", strerror(errno));
    exit(1);
  }
  /* Whole huge pages would count more than was requested. */
  madvise(memory, length, MADV_NOHUGEPAGE);
  memset(memory, byte, length);
  soak_count_own(length, 1);
  return memory;
}

void soak_unmap(unsigned char *memory, uint64_t length) {
  soak_count_own(length, -1);
  munmap(memory, length);
}

/* A line of /proc/self/status in bytes. */
static int64_t status_bytes(const char *name) {
  char line[256];
  long long kilobytes = -1;
  size_t length = strlen(name);
  FILE *file = fopen("/proc/self/status", "r");
  while (file != NULL && fgets(line, sizeof line, file) != NULL) {
    if (strncmp(line, name, length) == 0) sscanf(line + length, ": %lld", &kilobytes);
  }
  if (file != NULL) fclose(file);
  if (kilobytes < 0) soak_fail("/proc/self/status has no %s", name);
  return kilobytes * 1024;
}

/* Private memory not allocated by the soak: engines and stacks. Higher for a moment while
 * memory is being filled. */
static int64_t heap_bytes(void) { return status_bytes("RssAnon") - atomic_load(&soak.own_bytes); }

/* ---- Progress ----------------------------------------------------------------------------- */

static uint64_t verified_bytes(void) {
  uint64_t sum = atomic_load(&soak.count.verified_bytes);
  for (int peer = 0; peer < PEERS; peer += 1) {
    sum += atomic_load(&soak.shared->visit[peer].visited_bytes);
  }
  return sum;
}

static void print_progress(const char *title) {
  counters_t *count = &soak.count;
#define COUNT(name) (unsigned long long)atomic_load(&count->name)
  printf("soak: %s%.0f s: %llu batches; requests: %llu completed, %llu canceled, %llu timed out, "
         "%llu failed; %.1f GB read, %.1f GB written, %.1f GB verified; faults: %llu kills, "
         "%llu stops, %llu revocations; %llu engines, %llu opens, %llu registrations, "
         "%llu renewals, %llu notifications; RSS %lld MB, of it engines %lld MB\n",
         title, seconds_now() - start_time, COUNT(batches), COUNT(completed), COUNT(canceled),
         COUNT(timed_out), COUNT(failed), (double)COUNT(read_bytes) / 1e9,
         (double)COUNT(written_bytes) / 1e9, (double)verified_bytes() / 1e9, COUNT(kills),
         COUNT(stops), COUNT(revocations), COUNT(engines), COUNT(opens), COUNT(registrations),
         COUNT(renewals), COUNT(notifications), (long long)status_bytes("VmRSS") / 1000000,
         (long long)heap_bytes() / 1000000);
#undef COUNT
  fflush(stdout);
}

/* Compares the lowest heap of the second quarter with that of the last: growth is a leak. */
typedef struct growth {
  int64_t early, late;
} growth_t;

static void sample_growth(growth_t *growth, double part) {
  int64_t bytes = heap_bytes();
  if (part >= 0.25 && part < 0.5 && bytes < growth->early) growth->early = bytes;
  if (part >= 0.75 && bytes < growth->late) growth->late = bytes;
}

static void check_hangs(void) {
  uint64_t now = nanoseconds_now();
  for (int stepper = 0; stepper < STEPPERS; stepper += 1) {
    uint64_t start = atomic_load(&soak.step_start[stepper]);
    if (start == 0 || now < start || now - start < HANG_SECONDS * 1000000000ull) continue;
    soak_fail("HANG: %s %d is in one step for %.0f s",
              stepper < WORKERS ? "worker" : stepper == GUEST_STEPS ? "guest" : "faults", stepper,
              (double)(now - start) / 1e9);
    _exit(1);
  }
}

static void *watch_main(void *duration) {
  double seconds = *(double *)duration;
  growth_t growth = {INT64_MAX, INT64_MAX};
  double next = PROGRESS_SECONDS;
  int is_checked = 0;
  while (!atomic_load(&soak.watch_ends)) {
    sleep_milliseconds(50);
    double passed = seconds_now() - start_time;
    check_hangs();
    if (passed >= seconds) atomic_store(&soak.ends, 1);
    if (!atomic_load(&soak.ends)) sample_growth(&growth, passed / seconds);
    else if (!is_checked && !atomic_load(&soak.has_failed)) {
      is_checked = 1;
      if (growth.late - growth.early > HEAP_GROWTH_LIMIT) {
        soak_fail("LEAK: the engines' memory grew from %lld to %lld bytes",
                  (long long)growth.early, (long long)growth.late);
      }
    }
    if (passed < next) continue;
    print_progress("");
    next += PROGRESS_SECONDS;
  }
  return NULL;
}

/* ---- Start and end ------------------------------------------------------------------------ */

static void share_memory(uint64_t seed) {
  int file = memfd_create("soak", MFD_CLOEXEC);
  int moved = fcntl(file, F_DUPFD_CLOEXEC, 10);
  REQUIRE(file >= 0 && moved >= 0 && ftruncate(moved, sizeof *soak.shared) == 0);
  close(file);
  REQUIRE(dup3(moved, SHARED_DESCRIPTOR, O_CLOEXEC) == SHARED_DESCRIPTOR);
  REQUIRE(dup3(moved, CONTROL_DESCRIPTOR, O_CLOEXEC) == CONTROL_DESCRIPTOR);
  close(moved);
  soak.shared = mmap(NULL, sizeof *soak.shared, PROT_READ | PROT_WRITE, MAP_SHARED,
                     SHARED_DESCRIPTOR, 0);
  REQUIRE(soak.shared != MAP_FAILED);
  soak.shared->seed = seed;
}

static void create_engines(void) {
  for (int index = 0; index < ENGINES; index += 1) {
    mooncake_engine_options_t options;
    REQUIRE_OK(mooncake_engine_options_init(&options, sizeof options));
    if (index == 1) options.transports = "tcp";
    REQUIRE_OK(mooncake_engine_create(&options, &soak.engine[index]));
  }
  REQUIRE_OK(mooncake_engine_name(soak.engine[0], soak.shared->initiator,
                                  sizeof soak.shared->initiator, NULL));
}

static void check_leak(const char *folder, int before, const char *what) {
  int after = settle_entries(folder, before);
  if (after != before) soak_fail("LEAK: %d %s before, %d after", before, what, after);
}

/* One engine's life, so that what the library keeps for the process exists from the start. */
static void warm_up(void) {
  mooncake_engine_t *engine = NULL;
  REQUIRE_OK(mooncake_engine_create(NULL, &engine));
  REQUIRE_OK(mooncake_engine_destroy(engine));
}

static void run(double seconds) {
  pthread_t threads[WORKERS + 1];
  pthread_t watch;
  warm_up();
  int descriptors = count_entries("/proc/self/fd");
  int tasks = count_entries("/proc/self/task");
  int64_t shared = status_bytes("RssShmem");
  create_engines();
  for (int index = 0; index < PEERS; index += 1) pthread_mutex_init(&soak.peer[index].lock, NULL);
  faults_start();
  start_time = seconds_now();
  REQUIRE(pthread_create(&watch, NULL, watch_main, &seconds) == 0);
  for (intptr_t index = 0; index < WORKERS; index += 1) {
    REQUIRE(pthread_create(&threads[index], NULL, worker_main, (void *)index) == 0);
  }
  REQUIRE(pthread_create(&threads[WORKERS], NULL, guest_main, NULL) == 0);
  while (!atomic_load(&soak.ends)) faults_run();
  for (int index = 0; index <= WORKERS; index += 1) pthread_join(threads[index], NULL);
  faults_end();
  atomic_store(&soak.step_start[FAULT_STEPS], 0);
  for (int index = 0; index < ENGINES; index += 1) {
    SOAK_OK(mooncake_engine_destroy(soak.engine[index]));
  }
  atomic_store(&soak.watch_ends, 1);
  pthread_join(watch, NULL);
  if (atomic_load(&soak.has_failed)) return;
  check_leak("/proc/self/fd", descriptors, "descriptors");
  check_leak("/proc/self/task", tasks, "threads");
  if (status_bytes("RssShmem") - shared > SHARED_GROWTH_LIMIT) {
    soak_fail("LEAK: %lld bytes of shared memory are still mapped",
              (long long)(status_bytes("RssShmem") - shared));
  }
}

static _Noreturn void show_usage(void) {
  fprintf(stderr, "usage: soak [--duration SECONDS] [--seed NUMBER] [--hold]\n");
  exit(2);
}

int main(int count, char **arguments) {
  double seconds = 600;
  uint64_t seed = nanoseconds_now() % 1000000007u;
  if (count == 5 && strcmp(arguments[1], "--peer") == 0) {
    return peer_main(atoi(arguments[2]), strtoull(arguments[3], NULL, 10),
                     (uint32_t)atoi(arguments[4]));
  }
  for (int index = 1; index < count; index += 1) {
    const char *name = arguments[index];
    if (strcmp(name, "--hold") == 0) holds = 1;
    else if (index + 1 == count) show_usage();
    else if (strcmp(name, "--duration") == 0) seconds = atof(arguments[++index]);
    else if (strcmp(name, "--seed") == 0) seed = strtoull(arguments[++index], NULL, 10);
    else show_usage();
  }
  if (!(seconds >= 1)) show_usage();
  share_memory(seed);
  printf("soak: %.0f s, seed %llu, libmooncake %s\n", seconds, (unsigned long long)seed,
         mooncake_version());
  fflush(stdout);
  mooncake_log_set_callback(keep_log, NULL);
  run(seconds);
  print_progress("in all, ");
  printf("soak: %s (seed %llu)\n", atomic_load(&soak.has_failed) ? "FAILED" : "passed",
         (unsigned long long)seed);
  return atomic_load(&soak.has_failed) ? 1 : 0;
}
