/* Standard streams that are closed, or whose reader is gone: the library never takes
 * descriptors 0, 1 or 2 for itself, writes its log lines nowhere else, and raises no signal. */
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "mooncake.h"
#include "mooncake_store.h"

#include "check.h"

enum { LENGTH = 64 << 10, ROUNDS = 3 };

static const uint32_t both = MOONCAKE_ACCESS_REMOTE_READ | MOONCAKE_ACCESS_REMOTE_WRITE;

static mooncake_engine_t *new_engine(const char *metadata_uri, const char *name) {
  mooncake_engine_t *engine = NULL;
  mooncake_engine_options_t options;
  REQUIRE_OK(mooncake_engine_options_init(&options, sizeof options));
  options.metadata_uri = metadata_uri;
  options.name = name;
  REQUIRE_OK(mooncake_engine_create(&options, &engine));
  return engine;
}

static int32_t move(mooncake_engine_t *engine, mooncake_segment_t segment, void *source,
                    uint64_t target, uint64_t length) {
  mooncake_transfer_request_t request;
  memset(&request, 0, sizeof request);
  request.opcode = MOONCAKE_OPCODE_WRITE;
  request.segment = segment;
  request.source = source;
  request.target_offset = target;
  request.length = length;
  return mooncake_transfer_sync(engine, &request, 1, 10000);
}

/* A standard stream is closed or is the null device, whoever opened it. */
static void check_standard(void) {
  struct stat null, now;
  REQUIRE(stat("/dev/null", &null) == 0);
  for (int number = 0; number <= 2; number += 1) {
    if (fstat(number, &now) == 0) CHECK(S_ISCHR(now.st_mode) && now.st_rdev == null.st_rdev);
  }
}

/* Everything that opens descriptors, with log lines in between. */
static void use_library(void) {
  mooncake_metadata_server_t *server = NULL;
  char uri[128], name[256];
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_DEBUG));
  REQUIRE_OK(mooncake_metadata_server_start(NULL, &server));
  REQUIRE_OK(mooncake_metadata_server_uri(server, uri, sizeof uri, NULL));
  for (int round = 0; round < ROUNDS; round += 1) {
    mooncake_engine_t *engine = new_engine(uri, "one"), *other = new_engine(uri, "other");
    mooncake_segment_t segment = 0;
    void *memory = NULL;
    int32_t event = -1;
    unsigned char *source = (unsigned char *)new_pages(LENGTH);
    fill_pattern(source, LENGTH, (uint64_t)round);
    REQUIRE_OK(mooncake_memory_allocate(other, LENGTH, NULL, both, &memory));
    REQUIRE_OK(mooncake_engine_name(other, name, sizeof name, NULL));
    REQUIRE_OK(mooncake_segment_open(engine, name, 10000, &segment));
    REQUIRE_OK(move(engine, segment, source, (uint64_t)(uintptr_t)memory, LENGTH));
    REQUIRE(has_pattern(memory, LENGTH, (uint64_t)round));
    REQUIRE_OK(mooncake_engine_event_fd(engine, &event));
    CHECK(event > 2);
    /* Fails, and is logged. */
    CHECK(move(engine, segment, source, 64, 8) != MOONCAKE_OK);
    CHECK(mooncake_segment_open(engine, "127.0.0.1:9", 300, &segment) != MOONCAKE_OK);
    check_standard();
    REQUIRE_OK(mooncake_engine_destroy(engine));
    REQUIRE_OK(mooncake_engine_destroy(other));
    free(source);
  }
  REQUIRE_OK(mooncake_metadata_server_stop(server));
  check_standard();
}

static void closed_streams(void) {
  for (int number = 0; number <= 2; number += 1) close(number);
  use_library();
}

static void broken_pipe(void) {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  REQUIRE(dup2(ends[1], STDERR_FILENO) == STDERR_FILENO);
  close(ends[0]);
  close(ends[1]);
  for (int round = 0; round < ROUNDS; round += 1) {
    mooncake_engine_t *engine = new_engine(NULL, NULL);
    mooncake_segment_t segment = 0;
    char byte = 0;
    CHECK(move(engine, MOONCAKE_SEGMENT_LOCAL, &byte, 64, 1) != MOONCAKE_OK);
    CHECK(mooncake_segment_open(engine, "127.0.0.1:9", 300, &segment) != MOONCAKE_OK);
    REQUIRE_OK(mooncake_engine_destroy(engine));
  }
}

/* A log file that has reached its size limit. */
static void full_file(void) {
  char path[] = "/tmp/mooncake-log-XXXXXX";
  int file = mkstemp(path);
  REQUIRE(file >= 0);
  unlink(path);
  REQUIRE(dup2(file, STDERR_FILENO) == STDERR_FILENO);
  mooncake_engine_t *engine = new_engine(NULL, NULL);
  mooncake_segment_t segment = 0;
  struct rlimit limit = {0, 0};
  REQUIRE(setrlimit(RLIMIT_FSIZE, &limit) == 0);
  CHECK(mooncake_segment_open(engine, "127.0.0.1:9", 300, &segment) != MOONCAKE_OK);
  REQUIRE_OK(mooncake_engine_destroy(engine));
}

/* Each in its own process, with default signals. */
static void run(const char *name, void (*body)(void)) {
  int status = 0;
  pid_t pid = fork();
  REQUIRE(pid >= 0);
  if (pid == 0) {
    signal(SIGPIPE, SIG_DFL);
    signal(SIGXFSZ, SIG_DFL);
    alarm(60);
    body();
    _exit(check_failure_count == 0 ? 0 : 1);
  }
  REQUIRE(waitpid(pid, &status, 0) == pid);
  if (!CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0)) {
    fprintf(stderr, "%s: status 0x%x\n", name, (unsigned)status);
  }
}

int main(void) {
  run("closed streams", closed_streams);
  run("broken pipe", broken_pipe);
  run("full file", full_file);
  return check_result("standard_streams");
}
