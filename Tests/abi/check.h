/* Helpers of the ABI programs: checks that print place and condition, and bounded waiting. */
#ifndef ABI_CHECK_H
#define ABI_CHECK_H

#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int check_failure_count;

static inline int check_that(int holds, const char *what, const char *file, int line) {
  if (!holds) {
    check_failure_count += 1;
    fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, what);
  }
  return holds;
}

static inline int check_integers(long long actual, long long expected, const char *what,
                                 const char *file, int line) {
  if (actual != expected) {
    check_failure_count += 1;
    fprintf(stderr, "%s:%d: %s is %lld, expected %lld\n", file, line, what, actual, expected);
  }
  return actual == expected;
}

/* Counts a failure and continues. */
#define CHECK(condition) check_that((condition) ? 1 : 0, #condition, __FILE__, __LINE__)
#define CHECK_EQUAL(actual, expected) \
  check_integers((long long)(actual), (long long)(expected), #actual, __FILE__, __LINE__)

/* Ends the program if continuing would be pointless. */
#define REQUIRE(condition) \
  do { \
    if (!CHECK(condition)) exit(1); \
  } while (0)
#define REQUIRE_EQUAL(actual, expected) \
  do { \
    if (!CHECK_EQUAL(actual, expected)) exit(1); \
  } while (0)

/* Programs that link the library also print why a call failed. */
#ifdef MOONCAKE_H
#define REQUIRE_OK(call) \
  do { \
    int32_t code_ = (call); \
    if (code_ != MOONCAKE_OK) { \
      fprintf(stderr, "%s:%d: %s gave %s: %s\n", __FILE__, __LINE__, #call, \
              mooncake_error_name(code_), mooncake_error_message()); \
      exit(1); \
    } \
  } while (0)
#endif

/* The exit status of main(). */
static inline int check_result(const char *program) {
  if (check_failure_count == 0) return 0;
  fprintf(stderr, "%s: %d checks failed\n", program, check_failure_count);
  return 1;
}

static inline double seconds_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static inline void sleep_milliseconds(long milliseconds) {
  struct timespec duration = {milliseconds / 1000, (milliseconds % 1000) * 1000000};
  nanosleep(&duration, NULL);
}

/* A pattern that reveals shifted and swapped blocks. */
static inline void fill_pattern(void *memory, uint64_t length, uint64_t seed) {
  unsigned char *bytes = (unsigned char *)memory;
  uint64_t state = seed * 2 + 1;
  for (uint64_t index = 0; index < length; index += 1) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    bytes[index] = (unsigned char)(state >> 56);
  }
}

static inline int has_pattern(const void *memory, uint64_t length, uint64_t seed) {
  const unsigned char *bytes = (const unsigned char *)memory;
  uint64_t state = seed * 2 + 1;
  for (uint64_t index = 0; index < length; index += 1) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    if (bytes[index] != (unsigned char)(state >> 56)) {
      fprintf(stderr, "byte %llu of %llu differs\n", (unsigned long long)index,
              (unsigned long long)length);
      return 0;
    }
  }
  return 1;
}

static inline int has_only(const void *memory, uint64_t length, unsigned char value) {
  const unsigned char *bytes = (const unsigned char *)memory;
  for (uint64_t index = 0; index < length; index += 1) {
    if (bytes[index] != value) return 0;
  }
  return 1;
}

/* Page-aligned, zeroed memory for the lifetime of the process. */
static inline void *new_pages(uint64_t length) {
  void *memory = NULL;
  if (posix_memalign(&memory, 4096, length) != 0) {
    fprintf(stderr, "no memory\n");
    exit(1);
  }
  memset(memory, 0, length);
  return memory;
}

/* Number of entries of a folder such as /proc/self/fd. The folder's own descriptor is always
 * among them. */
static inline int count_entries(const char *folder) {
  DIR *directory = opendir(folder);
  int count = 0;
  if (directory == NULL) {
    fprintf(stderr, "%s cannot be read\n", folder);
    exit(1);
  }
  while (readdir(directory) != NULL) count += 1;
  closedir(directory);
  return count;
}

/* Waits until the folder has count entries, because a joined thread stays listed for a moment.
 * Returns the last number seen. */
static inline int settle_entries(const char *folder, int count) {
  double end = seconds_now() + 3;
  int seen = count_entries(folder);
  while (seen != count && seconds_now() < end) {
    sleep_milliseconds(10);
    seen = count_entries(folder);
  }
  return seen;
}

static inline long resident_bytes(void) {
  long total = 0;
  long resident = 0;
  FILE *file = fopen("/proc/self/statm", "r");
  if (file == NULL || fscanf(file, "%ld %ld", &total, &resident) != 2) {
    fprintf(stderr, "/proc/self/statm cannot be read\n");
    exit(1);
  }
  fclose(file);
  return resident * sysconf(_SC_PAGESIZE);
}

#endif
