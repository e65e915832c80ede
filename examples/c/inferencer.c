/* Reads the model that a trainer serves into memory, proves by SHA-256 that it is complete, and
 * writes it to a file if asked to. */
#define _GNU_SOURCE
#include "mooncake_loader.h"
#include "sha256.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

static const char usage[] =
    "usage: inferencer [options] SEGMENT\n"
    "       inferencer [options] --info FILE\n"
    "Reads the first buffer of SEGMENT, or the one named in FILE, which a trainer has written.\n"
    "  --library PATH     libmooncake.so to load (default: $MOONCAKE_LIBRARY or libmooncake.so.0)\n"
    "  --sha256 HASH      fail unless the data has this hash (default: the hash in FILE)\n"
    "  --output PATH      write the data to PATH\n"
    "  --timeout-ms TIME  give up after this time (default: 60000)\n";

/* Bytes of one request: small enough to have several in flight, large enough to need only a few. */
enum { REQUEST_BYTES = 16 << 20, MAXIMUM_REQUESTS = 1048576 };

typedef struct inferencer {
  mooncake_library_t library;
  mooncake_engine_t *engine;
  const char *library_path;
  const char *output_path;
  const char *info_path;
  uint64_t timeout_ms;
  char segment_name[1024];
  char expected_hash[SHA256_TEXT_SIZE];
  mooncake_segment_t segment;
  uint64_t address;
  uint64_t length;
  unsigned char *memory;
} inferencer_t;

static int fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("inferencer: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  return -1;
}

static int fail_mooncake(const inferencer_t *inferencer, const char *what, int32_t code) {
  return fail("%s: %s (%s)", what, inferencer->library.error_message(),
              inferencer->library.error_name(code));
}

static int set_hash(inferencer_t *inferencer, const char *hash) {
  if (strlen(hash) != 64 || strspn(hash, "0123456789abcdefABCDEF") != 64) {
    return fail("\"%s\" is no SHA-256 hash of 64 hexadecimal digits", hash);
  }
  strcpy(inferencer->expected_hash, hash);
  return 0;
}

/* Reads the line `segment NAME buffer ADDRESS LENGTH sha256 HASH`. */
static int read_info(inferencer_t *inferencer) {
  char line[2048];
  char hash[128] = "";
  FILE *file = fopen(inferencer->info_path, "r");
  if (file == NULL) return fail("cannot read %s: %s", inferencer->info_path, strerror(errno));
  char *text = fgets(line, sizeof line, file);
  fclose(file);
  if (text == NULL ||
      sscanf(line, "segment %1023s buffer %" SCNx64 " %" SCNu64 " sha256 %127s",
             inferencer->segment_name, &inferencer->address, &inferencer->length, hash) < 3) {
    return fail("%s was not written by a trainer", inferencer->info_path);
  }
  if (*hash == '\0' || inferencer->expected_hash[0] != '\0') return 0;
  return set_hash(inferencer, hash);
}

static int parse_arguments(inferencer_t *inferencer, int argc, char **argv) {
  static const struct option options[] = {
      {"library", required_argument, NULL, 'l'}, {"sha256", required_argument, NULL, 's'},
      {"output", required_argument, NULL, 'o'},  {"info", required_argument, NULL, 'i'},
      {"timeout-ms", required_argument, NULL, 't'}, {"help", no_argument, NULL, 'h'},
      {NULL, 0, NULL, 0}};
  int option;
  inferencer->timeout_ms = 60000;
  while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
    char *end = NULL;
    switch (option) {
      case 'l': inferencer->library_path = optarg; break;
      case 'o': inferencer->output_path = optarg; break;
      case 'i': inferencer->info_path = optarg; break;
      case 's':
        if (set_hash(inferencer, optarg) != 0) return -1;
        break;
      case 't':
        inferencer->timeout_ms = strtoull(optarg, &end, 10);
        if (*end != '\0' || inferencer->timeout_ms == 0 || inferencer->timeout_ms > 86400000) {
          return fail("--timeout-ms %s is no number from 1 to 86400000", optarg);
        }
        break;
      case 'h': fputs(usage, stdout); exit(0);
      default: fputs(usage, stderr); return -1;
    }
  }
  if (argc - optind != (inferencer->info_path != NULL ? 0 : 1)) {
    fputs(usage, stderr);
    return -1;
  }
  if (inferencer->info_path != NULL) return read_info(inferencer);
  if (strlen(argv[optind]) >= sizeof inferencer->segment_name) return fail("the name is too long");
  strcpy(inferencer->segment_name, argv[optind]);
  return 0;
}

/* Starts an engine and finds the buffer to read. */
static int open_segment(inferencer_t *inferencer) {
  const mooncake_library_t *library = &inferencer->library;
  int32_t code = library->engine_create(NULL, &inferencer->engine);
  if (code != MOONCAKE_OK) return fail_mooncake(inferencer, "cannot start an engine", code);
  code = library->segment_open(inferencer->engine, inferencer->segment_name,
                               inferencer->timeout_ms, &inferencer->segment);
  if (code != MOONCAKE_OK) return fail_mooncake(inferencer, "cannot open the segment", code);
  if (inferencer->length == 0) {
    mooncake_remote_buffer_t buffer;
    uint64_t count = 0;
    code = library->segment_buffers(inferencer->engine, inferencer->segment, &buffer, 1, &count);
    if (code == MOONCAKE_ERROR_FULL) {
      return fail("segment %s has several buffers; name one by --info", inferencer->segment_name);
    }
    if (code != MOONCAKE_OK) return fail_mooncake(inferencer, "cannot list the buffers", code);
    if (count == 0) return fail("segment %s has no buffer", inferencer->segment_name);
    inferencer->address = buffer.address;
    inferencer->length = buffer.length;
  }
  void *memory = NULL;
  code = library->memory_allocate(inferencer->engine, inferencer->length, NULL,
                                  MOONCAKE_ACCESS_LOCAL, &memory);
  if (code != MOONCAKE_OK) return fail_mooncake(inferencer, "cannot allocate memory", code);
  inferencer->memory = memory;
  return 0;
}

static void show_progress(const inferencer_t *inferencer, const mooncake_batch_status_t *status) {
  static int is_terminal = -1;
  if (is_terminal < 0) is_terminal = isatty(STDERR_FILENO);
  if (!is_terminal) return;
  double share = (double)status->transferred_bytes / (double)inferencer->length;
  fprintf(stderr, "\r%5.1f %% of %.1f MB%s", 100 * share, (double)inferencer->length / 1e6,
          status->state == MOONCAKE_STATE_WAITING ? "" : "\n");
}

/* Waits in short steps, so that progress can be shown, until every request has ended. */
static int wait_for(inferencer_t *inferencer, mooncake_batch_t batch) {
  const mooncake_library_t *library = &inferencer->library;
  for (;;) {
    mooncake_batch_status_t status;
    int32_t code = library->batch_wait(inferencer->engine, batch, 100, &status);
    /* Still running: in this case wait does not set the status. */
    if (code == MOONCAKE_ERROR_TIMEOUT) {
      code = library->batch_poll(inferencer->engine, batch, &status);
    }
    if (code != MOONCAKE_OK) {
      return fail_mooncake(inferencer, "cannot wait for the transfer", code);
    }
    show_progress(inferencer, &status);
    if (status.state == MOONCAKE_STATE_WAITING) continue;
    if (status.state == MOONCAKE_STATE_COMPLETED) return 0;
    return fail_mooncake(inferencer, "the transfer failed", status.error);
  }
}

static int submit_and_wait(inferencer_t *inferencer, mooncake_transfer_request_t *requests,
                           uint64_t count) {
  const mooncake_library_t *library = &inferencer->library;
  mooncake_batch_t batch;
  int32_t code = library->batch_create(inferencer->engine, count, &batch);
  if (code != MOONCAKE_OK) return fail_mooncake(inferencer, "cannot create a batch", code);
  int result;
  code = library->batch_submit(inferencer->engine, batch, requests, count, inferencer->timeout_ms);
  if (code != MOONCAKE_OK) {
    result = fail_mooncake(inferencer, "cannot submit the transfer", code);
  } else {
    result = wait_for(inferencer, batch);
  }
  /* A batch with requests in flight is freed with the engine, not here. */
  library->batch_free(inferencer->engine, batch);
  return result;
}

/* Reads the whole buffer in one batch. */
static int pull(inferencer_t *inferencer) {
  uint64_t step = REQUEST_BYTES;
  while (inferencer->length / step >= MAXIMUM_REQUESTS) step *= 2;
  uint64_t count = (inferencer->length - 1) / step + 1;
  mooncake_transfer_request_t *requests = calloc(count, sizeof *requests);
  if (requests == NULL) return fail("out of memory");
  for (uint64_t i = 0; i < count; i++) {
    uint64_t offset = i * step;
    uint64_t rest = inferencer->length - offset;
    requests[i].opcode = MOONCAKE_OPCODE_READ;
    requests[i].segment = inferencer->segment;
    requests[i].source = inferencer->memory + offset;
    requests[i].target_offset = inferencer->address + offset;
    requests[i].length = rest < step ? rest : step;
  }
  int result = submit_and_wait(inferencer, requests, count);
  free(requests);
  return result;
}

static int write_all(int file, const unsigned char *bytes, uint64_t count) {
  while (count > 0) {
    ssize_t written = write(file, bytes, count < (1u << 30) ? count : 1u << 30);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return -1;
    bytes += written;
    count -= (uint64_t)written;
  }
  return 0;
}

/* Writes a hidden temporary file next to the output and renames it once it is complete. */
static int write_output(const inferencer_t *inferencer) {
  const char *path = inferencer->output_path;
  const char *slash = strrchr(path, '/');
  int folder = slash == NULL ? 0 : (int)(slash - path) + 1;
  char temporary[4096];
  int length = snprintf(temporary, sizeof temporary, "%.*s.%s.%ld.tmp", folder, path,
                        path + folder, (long)getpid());
  if (length < 0 || (size_t)length >= sizeof temporary) {
    return fail("%s: the path is too long", path);
  }
  int file = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (file < 0) return fail("cannot write %s: %s", temporary, strerror(errno));
  int reason = 0;
  if (write_all(file, inferencer->memory, inferencer->length) != 0 || fsync(file) != 0) {
    reason = errno;
  }
  if (close(file) != 0 && reason == 0) reason = errno;
  if (reason == 0 && rename(temporary, path) != 0) reason = errno;
  if (reason == 0) return 0;
  unlink(temporary);
  return fail("cannot write %s: %s", path, strerror(reason));
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static int run(inferencer_t *inferencer) {
  char hash[SHA256_TEXT_SIZE];
  if (open_segment(inferencer) != 0) return -1;
  double begin = now();
  if (pull(inferencer) != 0) return -1;
  double seconds = now() - begin;
  if (sha256_text(inferencer->memory, inferencer->length, hash) != 0) return fail("SHA-256 failed");
  if (inferencer->expected_hash[0] != '\0' && strcasecmp(hash, inferencer->expected_hash) != 0) {
    return fail("the data is wrong: its SHA-256 is %s, expected was %s", hash,
                inferencer->expected_hash);
  }
  if (inferencer->output_path != NULL && write_output(inferencer) != 0) return -1;
  printf("bytes %" PRIu64 " seconds %.6f gb_per_second %.3f sha256 %s %s\n", inferencer->length,
         seconds, (double)inferencer->length / 1e9 / seconds, hash,
         inferencer->expected_hash[0] != '\0' ? "verified" : "not-compared");
  return fflush(stdout) == 0 ? 0 : fail("cannot print the result: %s", strerror(errno));
}

int main(int argc, char **argv) {
  static inferencer_t inferencer;
  char error[1024];
  if (parse_arguments(&inferencer, argc, argv) != 0) return 2;
  if (mooncake_library_open(&inferencer.library, inferencer.library_path, error, sizeof error) !=
      0) {
    fail("%s", error);
    return 1;
  }
  int result = run(&inferencer);
  /* Cancels what is in flight and frees the memory. */
  if (inferencer.engine != NULL) inferencer.library.engine_destroy(inferencer.engine);
  mooncake_library_close(&inferencer.library);
  return result == 0 ? 0 : 1;
}
