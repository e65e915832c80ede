/* Helpers of the store's programs: a metadata server in this process, stores that use it, and
 * access to results. */
#ifndef ABI_STORE_H
#define ABI_STORE_H

#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "mooncake.h"

#include "check.h"

static mooncake_metadata_server_t *store_server;
static char store_uri[128];

static inline void start_store_server(void) {
  REQUIRE_OK(mooncake_metadata_server_start(NULL, &store_server));
  REQUIRE_OK(mooncake_metadata_server_uri(store_server, store_uri, sizeof store_uri, NULL));
}

static inline mooncake_engine_options_t store_engine_options(const char *name) {
  mooncake_engine_options_t options;
  REQUIRE_OK(mooncake_engine_options_init(&options, sizeof options));
  options.metadata_uri = store_uri;
  options.name = name;
  return options;
}

/* A store with its own engine. */
static inline mooncake_store_t *create_store(const char *name) {
  mooncake_engine_options_t engine_options = store_engine_options(name);
  mooncake_store_t *store = NULL;
  REQUIRE_OK(mooncake_store_create(NULL, &engine_options, NULL, &store));
  REQUIRE(store != NULL);
  return store;
}

static inline mooncake_store_operation_t operation_defaults(void) {
  mooncake_store_operation_t operation;
  REQUIRE_OK(mooncake_store_operation_init(&operation, sizeof operation));
  operation.timeout_ms = 20000;
  return operation;
}

static inline mooncake_store_register_options_t register_defaults(void) {
  mooncake_store_register_options_t options;
  REQUIRE_OK(mooncake_store_register_options_init(&options, sizeof options));
  return options;
}

static inline mooncake_store_get_options_t get_defaults(void) {
  mooncake_store_get_options_t options;
  REQUIRE_OK(mooncake_store_get_options_init(&options, sizeof options));
  return options;
}

static inline const mooncake_store_report_t *report_of(mooncake_store_result_t *result) {
  const mooncake_store_report_t *report = NULL;
  REQUIRE_OK(mooncake_store_result_read(result, &report));
  REQUIRE(report != NULL);
  return report;
}

/* Copies the version out of a result and frees it. */
static inline void take_version(mooncake_store_result_t *result, char version[33]) {
  const mooncake_store_report_t *report = report_of(result);
  REQUIRE(report->payload_count == 1 && report->payloads[0]->version != NULL);
  REQUIRE_EQUAL(strlen(report->payloads[0]->version), 32);
  memcpy(version, report->payloads[0]->version, 33);
  REQUIRE_OK(mooncake_store_result_free(result));
}

/* Number of payloads that a list finds. */
static inline uint64_t count_payloads(mooncake_store_t *store, const char *prefix) {
  mooncake_store_result_t *result = NULL;
  REQUIRE_OK(mooncake_store_list(store, prefix, NULL, &result));
  uint64_t count = report_of(result)->payload_count;
  REQUIRE_OK(mooncake_store_result_free(result));
  return count;
}

/* Waits until stat finds this many holders; returns the last number seen. */
static inline uint64_t settle_holders(mooncake_store_t *store, const char *name, uint64_t count) {
  double end = seconds_now() + 10;
  uint64_t seen = UINT64_MAX;
  do {
    mooncake_store_result_t *result = NULL;
    int32_t code = mooncake_store_stat(store, name, NULL, &result);
    if (code == MOONCAKE_ERROR_NOT_FOUND) {
      seen = 0;
    } else {
      REQUIRE_EQUAL(code, MOONCAKE_OK);
      seen = report_of(result)->holder_count;
      REQUIRE_OK(mooncake_store_result_free(result));
    }
    if (seen != count) sleep_milliseconds(20);
  } while (seen != count && seconds_now() < end);
  return seen;
}

/* ---- A holder in its own process, which can be stopped and killed ---- */

#define CHILD_PAYLOAD "of the child"
#define CHILD_SEGMENT "the child's segment"

enum { CHILD_LENGTH = 64 << 20, CHILD_SEED = 31 };

typedef struct store_child {
  pid_t pid;
  int input;
  int output;
} store_child_t;

static inline void child_run(int input, int output) {
  unsigned char *memory = (unsigned char *)new_pages(CHILD_LENGTH);
  mooncake_buffer_t buffer = {memory, CHILD_LENGTH};
  fill_pattern(memory, CHILD_LENGTH, CHILD_SEED);
  if (read(input, store_uri, sizeof store_uri) != sizeof store_uri) _exit(1);
  mooncake_store_t *store = create_store(CHILD_SEGMENT);
  REQUIRE_OK(mooncake_store_register(store, CHILD_PAYLOAD, &buffer, 1, NULL, NULL, NULL));
  REQUIRE(write(output, "", 1) == 1);
  for (;;) pause();
}

/* Starts it; call before this process has stores. */
static inline store_child_t child_start(void) {
  int to_child[2];
  int to_parent[2];
  REQUIRE(pipe(to_child) == 0 && pipe(to_parent) == 0);
  pid_t pid = fork();
  REQUIRE(pid >= 0);
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(to_child[1]);
    child_run(to_child[0], to_parent[1]);
  }
  close(to_child[0]);
  close(to_parent[1]);
  store_child_t child = {pid, to_child[1], to_parent[0]};
  return child;
}

/* Returns when it has published. */
static inline void child_publish(const store_child_t *child) {
  char ready;
  REQUIRE(write(child->input, store_uri, sizeof store_uri) == sizeof store_uri);
  REQUIRE(read(child->output, &ready, 1) == 1);
}

/* Returns once all of its threads have stopped. */
static inline void child_stop(const store_child_t *child) {
  int status = 0;
  REQUIRE(kill(child->pid, SIGSTOP) == 0);
  REQUIRE(waitpid(child->pid, &status, WUNTRACED) == child->pid && WIFSTOPPED(status));
}

static inline void child_kill(const store_child_t *child) {
  kill(child->pid, SIGKILL);
  waitpid(child->pid, NULL, 0);
  close(child->input);
  close(child->output);
}

#endif
