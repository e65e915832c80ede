/* What this machine's memory allows between two processes: the bound for shared memory.
 *
 *   memory_bound copy     KIND [block bytes] [total bytes] [threads] [seconds]
 *   memory_bound pingpong [seconds]     a word in shared memory, both ends spin
 *
 * KIND   memcpy   within the process, ordinary stores
 *        stream   within the process, non-temporal stores
 *        readv    process_vm_readv from another process
 *        mapped-memcpy, mapped-stream    from a mapped memory file that another process has written
 *
 * Each thread copies blocks through its own part of `total`, in order, again and again; with as
 * many bytes in total as in a block everything stays in the caches. All pages are written before
 * the clock starts. Prints one line of JSON.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { THREAD_LIMIT = 64 };

typedef void copy_t(char *target, const char *source, size_t bytes);

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void die(const char *what) {
  fprintf(stderr, "memory_bound: %s: %s\n", what, strerror(errno));
  exit(1);
}

static void copy_plain(char *target, const char *source, size_t bytes) {
  memcpy(target, source, bytes);
}

/* Blocks are multiples of 256 bytes and aligned: main sees to it. */
#if defined(__x86_64__)
__attribute__((target("avx512f"))) static void stream_512(char *target, const char *source,
                                                          size_t bytes) {
  for (size_t at = 0; at < bytes; at += 256) {
    __m512i a = _mm512_loadu_si512(source + at), b = _mm512_loadu_si512(source + at + 64);
    __m512i c = _mm512_loadu_si512(source + at + 128), d = _mm512_loadu_si512(source + at + 192);
    _mm512_stream_si512((__m512i *)(target + at), a);
    _mm512_stream_si512((__m512i *)(target + at + 64), b);
    _mm512_stream_si512((__m512i *)(target + at + 128), c);
    _mm512_stream_si512((__m512i *)(target + at + 192), d);
  }
  _mm_sfence();
}

__attribute__((target("avx2"))) static void stream_256(char *target, const char *source,
                                                       size_t bytes) {
  for (size_t at = 0; at < bytes; at += 128) {
    const __m256i *from = (const __m256i *)(source + at);
    __m256i *to = (__m256i *)(target + at);
    __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1);
    __m256i c = _mm256_loadu_si256(from + 2), d = _mm256_loadu_si256(from + 3);
    _mm256_stream_si256(to, a);
    _mm256_stream_si256(to + 1, b);
    _mm256_stream_si256(to + 2, c);
    _mm256_stream_si256(to + 3, d);
  }
  _mm_sfence();
}

static copy_t *streaming(void) {
  if (__builtin_cpu_supports("avx512f")) return stream_512;
  return __builtin_cpu_supports("avx2") ? stream_256 : NULL;
}
#else
static copy_t *streaming(void) { return NULL; }
#endif

static char *touched(int descriptor, size_t bytes) {
  int flags = descriptor < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
  char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, descriptor, 0);
  if (memory == MAP_FAILED) die("memory");
  madvise(memory, bytes, MADV_HUGEPAGE);
  memset(memory, 1, bytes);
  return memory;
}

typedef struct {
  copy_t *copy; /* NULL: process_vm_readv */
  pid_t owner;
  char *target;
  char *source;
  size_t block;
  size_t bytes;
  double end;
  uint64_t moved;
} lane_t;

static void *run_lane(void *argument) {
  lane_t *lane = argument;
  size_t offset = 0;
  /* One look at the clock per MiB: it costs about as much as copying 1 KiB. */
  size_t pause = lane->block < (1 << 20) ? (1 << 20) / lane->block : 1;
  while (now() < lane->end) {
    for (size_t count = 0; count < pause; count += 1) {
      char *target = lane->target + offset, *source = lane->source + offset;
      if (lane->copy != NULL) {
        lane->copy(target, source, lane->block);
      } else {
        struct iovec local = {target, lane->block}, remote = {source, lane->block};
        ssize_t got = process_vm_readv(lane->owner, &local, 1, &remote, 1, 0);
        if (got != (ssize_t)lane->block) die("process_vm_readv");
      }
      lane->moved += lane->block;
      offset += lane->block;
      if (offset + lane->block > lane->bytes) offset = 0;
    }
  }
  return NULL;
}

/* A process that owns touched memory (the descriptor's, or private) and ends with this one.
 * `memory` is its address there. */
static pid_t start_owner(int descriptor, size_t bytes, char **memory) {
  int ready[2];
  char *address = NULL;
  if (pipe(ready) != 0) die("pipe");
  pid_t parent = getpid(), child = fork();
  if (child < 0) die("fork");
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    address = touched(descriptor, bytes);
    if (write(ready[1], &address, sizeof address) != sizeof address) _exit(1);
    for (;;) pause();
  }
  close(ready[1]);
  if (read(ready[0], &address, sizeof address) != sizeof address) die("the other process");
  close(ready[0]);
  *memory = address;
  return child;
}

static void end_owner(pid_t child) {
  if (child == 0) return;
  kill(child, SIGKILL);
  waitpid(child, NULL, 0);
}

static int copy(const char *kind, size_t block, size_t total, int threads, double seconds) {
  lane_t lane = {.block = block};
  char *source;
  pid_t owner = 0;
  int mapped = strncmp(kind, "mapped-", 7) == 0;
  const char *way = mapped ? kind + 7 : kind;
  if (strcmp(way, "memcpy") == 0) {
    lane.copy = copy_plain;
  } else if (strcmp(way, "stream") == 0) {
    lane.copy = streaming();
    if (lane.copy == NULL) {
      fprintf(stderr, "memory_bound: no non-temporal stores of 32 bytes on this processor\n");
      return 1;
    }
  } else if (strcmp(kind, "readv") != 0) {
    fprintf(stderr, "memory_bound: %s is not known\n", kind);
    return 2;
  }
  if (mapped) {
    int descriptor = memfd_create("bound", MFD_CLOEXEC);
    if (descriptor < 0 || ftruncate(descriptor, (off_t)total) != 0) die("memfd_create");
    owner = start_owner(descriptor, total, &source);
    source = mmap(NULL, total, PROT_READ, MAP_SHARED | MAP_POPULATE, descriptor, 0);
    if (source == MAP_FAILED) die("mmap");
  } else if (lane.copy == NULL) {
    owner = start_owner(-1, total, &source);
    lane.owner = owner;
  } else {
    source = touched(-1, total);
  }
  char *target = touched(-1, total);

  static lane_t lanes[THREAD_LIMIT];
  pthread_t ids[THREAD_LIMIT];
  double start = now();
  uint64_t moved = 0;
  lane.bytes = total / (size_t)threads & ~(size_t)4095;
  lane.end = start + seconds;
  for (int index = 0; index < threads; index += 1) {
    lanes[index] = lane;
    lanes[index].target = target + (size_t)index * lane.bytes;
    lanes[index].source = source + (size_t)index * lane.bytes;
    if (pthread_create(&ids[index], NULL, run_lane, &lanes[index]) != 0) die("pthread_create");
  }
  for (int index = 0; index < threads; index += 1) {
    pthread_join(ids[index], NULL);
    moved += lanes[index].moved;
  }
  double elapsed = now() - start;
  end_owner(owner);
  printf("{\"bytes_per_second\": %.0f, \"operations_per_second\": %.0f}\n",
         (double)moved / elapsed, (double)moved / (double)block / elapsed);
  return 0;
}

static void relax(void) {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

/* Two processes wait for each other's word, each on its own cache line. */
static int pingpong(double seconds) {
  struct {
    _Alignas(128) _Atomic uint64_t ping;
    _Alignas(128) _Atomic uint64_t pong;
  } *words = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (words == MAP_FAILED) die("memory");
  pid_t parent = getpid(), child = fork();
  if (child < 0) die("fork");
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    for (uint64_t turn = 1;; turn += 1) {
      while (atomic_load_explicit(&words->ping, memory_order_acquire) != turn) relax();
      atomic_store_explicit(&words->pong, turn, memory_order_release);
    }
  }
  uint64_t turn = 0;
  double start = now();
  while (now() - start < seconds) {
    for (int count = 0; count < 1000; count += 1) {
      turn += 1;
      atomic_store_explicit(&words->ping, turn, memory_order_release);
      while (atomic_load_explicit(&words->pong, memory_order_acquire) != turn) relax();
    }
  }
  double elapsed = now() - start;
  end_owner(child);
  printf("{\"operations_per_second\": %.0f, \"p50_us\": %.4f}\n", (double)turn / elapsed,
         elapsed / (double)turn * 1e6);
  return 0;
}

static size_t number(int argc, char **argv, int index, size_t fallback) {
  return argc > index ? (size_t)strtoull(argv[index], NULL, 10) : fallback;
}

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  if (strcmp(what, "copy") == 0 && argc > 2) {
    size_t block = number(argc, argv, 3, 1 << 20);
    size_t total = number(argc, argv, 4, 512 << 20);
    size_t threads = number(argc, argv, 5, 1);
    double seconds = argc > 6 ? atof(argv[6]) : 3;
    if (block == 0 || block % 256 != 0 || threads < 1 || threads > THREAD_LIMIT ||
        total / threads < block) {
      fprintf(stderr, "memory_bound: blocks are multiples of 256 bytes, 1 to %d threads, and "
                      "each thread needs room for one block\n", THREAD_LIMIT);
      return 2;
    }
    return copy(argv[2], block, total, (int)threads, seconds);
  }
  if (strcmp(what, "pingpong") == 0) return pingpong(argc > 2 ? atof(argv[2]) : 3);
  fprintf(stderr, "usage: %s copy KIND [...] | pingpong [seconds]\n", argv[0]);
  return 2;
}
