/* Gets a payload of the store from all of its holders, verifies each shard, and writes it to a
 * file.
 *
 *   store_get METADATA_URI NAME FILE [ADDRESS]
 *
 * ADDRESS is where this machine listens: others get shards from here while it downloads. */
#define _GNU_SOURCE
#include <inttypes.h>
#include <mooncake.h>
#include <stdio.h>

static int32_t show_progress(const mooncake_store_progress_t *progress, void *context) {
  (void)context;
  fprintf(stderr, "\r%" PRIu64 " of %" PRIu64 " MiB from %" PRIu64 " holders ",
          progress->done_bytes >> 20, progress->total_bytes >> 20, progress->active_holder_count);
  return 0; /* go on */
}

static int failed(const char *what, int32_t code) {
  fprintf(stderr, "store_get: %s: %s (%s)\n", what, mooncake_error_message(),
          mooncake_error_name(code));
  return 1;
}

static void print_report(const mooncake_store_report_t *report) {
  const mooncake_payload_info_t *payload = report->payloads[0];
  printf("got %s version %s size %" PRIu64 " seconds %.3f %s\n", payload->name,
         payload->version != NULL ? payload->version : "none", payload->size,
         (double)report->duration_ns / 1e9, report->is_verified ? "verified" : "unverified");
  for (uint64_t index = 0; index < report->source_count; index += 1) {
    printf("  %" PRIu64 " bytes from %s\n", report->sources[index]->bytes,
           report->sources[index]->segment);
  }
}

/* A real program would use the memory instead. */
static int write_file(const char *path, const mooncake_store_report_t *report) {
  FILE *file = fopen(path, "wb");
  size_t written = 1;
  if (file == NULL) return -1;
  for (uint64_t index = 0; index < report->buffer_count; index += 1) {
    const mooncake_buffer_t *buffer = &report->buffers[index];
    written &= fwrite(buffer->address, buffer->length, 1, file);
  }
  return fclose(file) == 0 && written == 1 ? 0 : -1;
}

static int get(mooncake_store_t *store, const char *name, const char *path) {
  mooncake_store_operation_t operation;
  mooncake_store_result_t *result = NULL;
  const mooncake_store_report_t *report = NULL;
  mooncake_store_operation_init(&operation, sizeof operation);
  operation.progress = show_progress;
  /* No buffers: the engine allocates them. */
  int32_t code = mooncake_store_get(store, name, NULL, 0, NULL, &operation, &result);
  fputc('\n', stderr);
  if (code != MOONCAKE_OK) return failed("cannot get it", code);
  code = mooncake_store_result_read(result, &report);
  if (code != MOONCAKE_OK) return failed("cannot read the result", code);
  print_report(report);
  int status = write_file(path, report);
  if (status != 0) fprintf(stderr, "store_get: cannot write %s\n", path);
  mooncake_store_result_free(result);
  return status == 0 ? 0 : 1;
}

int main(int argc, char **argv) {
  mooncake_engine_options_t options;
  mooncake_store_t *store = NULL;
  if (argc < 4 || argc > 5) {
    fprintf(stderr, "usage: store_get METADATA_URI NAME FILE [ADDRESS]\n");
    return 2;
  }
  mooncake_engine_options_init(&options, sizeof options);
  options.metadata_uri = argv[1];
  options.bind_address = argv[4]; /* null without it: the default */
  int32_t code = mooncake_store_create(NULL, &options, NULL, &store);
  if (code != MOONCAKE_OK) return failed("cannot create a store", code);
  int status = get(store, argv[2], argv[3]);
  /* Stops being a holder and frees the memory. */
  mooncake_store_destroy(store);
  return status;
}
