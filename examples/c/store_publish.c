/* Publishes a file as a payload of the store and stays its holder until SIGINT or SIGTERM.
 *
 *   store_publish METADATA_URI NAME FILE [ADDRESS]
 *
 * ADDRESS is where this machine listens; others reach it only if that is not 127.0.0.1. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <mooncake.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int32_t show_progress(const mooncake_store_progress_t *progress, void *context) {
  (void)context;
  fprintf(stderr, "\r%" PRIu64 " of %" PRIu64 " MiB ", progress->done_bytes >> 20,
          progress->total_bytes >> 20);
  return 0; /* go on */
}

static int failed(const char *what, int32_t code) {
  fprintf(stderr, "store_publish: %s: %s (%s)\n", what, mooncake_error_message(),
          mooncake_error_name(code));
  return 1;
}

/* The engine only reads the memory, so a mapping of the file is enough: no second copy. */
static int map_file(const char *path, mooncake_buffer_t *buffer) {
  struct stat status;
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0 || fstat(file, &status) != 0 || status.st_size == 0) return -1;
  buffer->length = (uint64_t)status.st_size;
  buffer->address = mmap(NULL, buffer->length, PROT_READ, MAP_SHARED, file, 0);
  close(file);
  return buffer->address == MAP_FAILED ? -1 : 0;
}

static int publish(mooncake_store_t *store, const char *name, const mooncake_buffer_t *buffer) {
  mooncake_store_operation_t operation;
  mooncake_store_result_t *result = NULL;
  const mooncake_store_report_t *report = NULL;
  mooncake_store_operation_init(&operation, sizeof operation);
  operation.progress = show_progress;
  int32_t code = mooncake_store_register(store, name, buffer, 1, NULL, &operation, &result);
  if (code != MOONCAKE_OK) return failed("cannot publish", code);
  if (mooncake_store_result_read(result, &report) == MOONCAKE_OK) {
    printf("published %s version %s size %" PRIu64 "\n", report->payloads[0]->name,
           report->payloads[0]->version, report->payloads[0]->size);
    fflush(stdout);
  }
  mooncake_store_result_free(result);
  return 0;
}

int main(int argc, char **argv) {
  mooncake_engine_options_t options;
  mooncake_store_t *store = NULL;
  mooncake_buffer_t buffer;
  sigset_t signals;
  int signal_number;
  if (argc < 4 || argc > 5) {
    fprintf(stderr, "usage: store_publish METADATA_URI NAME FILE [ADDRESS]\n");
    return 2;
  }
  if (map_file(argv[3], &buffer) != 0) {
    fprintf(stderr, "store_publish: cannot map %s, or it is empty\n", argv[3]);
    return 1;
  }
  /* Before the library starts threads, so that sigwait() below receives the signals. */
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  sigprocmask(SIG_BLOCK, &signals, NULL);
  mooncake_engine_options_init(&options, sizeof options);
  options.metadata_uri = argv[1];
  options.bind_address = argv[4]; /* null without it: the default */
  int32_t code = mooncake_store_create(NULL, &options, NULL, &store);
  if (code != MOONCAKE_OK) return failed("cannot create a store", code);
  int status = publish(store, argv[2], &buffer);
  if (status == 0) sigwait(&signals, &signal_number);
  /* Withdraws the payload; afterwards nobody reads the memory. */
  mooncake_store_destroy(store);
  munmap(buffer.address, buffer.length);
  return status;
}
