/* Alternates verified gets of the store with plain reads by the engine of the same bytes, over TCP
 * into the caller's memory, which has been touched before.
 *
 *   store_get [SHARD_KIB [REPETITIONS]]      one GiB; shards as the store chooses unless given
 */
#define _GNU_SOURCE
#include <mooncake.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { URI_BYTES = 100, READ_COUNT = 16 };
static const uint64_t SIZE = 1ull << 30;

static void check(int32_t code, const char *what) {
  if (code == MOONCAKE_OK) return;
  fprintf(stderr, "store_get: %s: %s\n", what, mooncake_error_message());
  exit(1);
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static mooncake_engine_t *create_engine(const char *uri) {
  mooncake_engine_options_t options;
  mooncake_engine_t *engine;
  check(mooncake_engine_options_init(&options, sizeof options), "options");
  options.metadata_uri = uri;
  options.transports = "tcp";
  check(mooncake_engine_create(&options, &engine), "create an engine");
  return engine;
}

/* The origin: prints its segment and stays until its input ends. */
static void serve(uint64_t shard_bytes, int output, int input) {
  mooncake_metadata_server_t *server;
  mooncake_store_t *store;
  mooncake_store_register_options_t options;
  char uri[URI_BYTES];
  check(mooncake_metadata_server_start(NULL, &server), "start a metadata server");
  check(mooncake_metadata_server_uri(server, uri, sizeof uri, NULL), "uri");
  check(mooncake_store_create(create_engine(uri), NULL, NULL, &store), "create a store");
  mooncake_buffer_t buffer = {aligned_alloc(2 << 20, SIZE), SIZE};
  for (uint64_t at = 0; at < SIZE; at += 8) {
    memcpy((char *)buffer.address + at, &(uint64_t){at * 0x9E3779B97F4A7C15}, 8);
  }
  check(mooncake_store_register_options_init(&options, sizeof options), "options");
  options.shard_bytes = shard_bytes;
  check(mooncake_store_register(store, "payload", &buffer, 1, &options, NULL, NULL), "register");
  char end;
  if (write(output, uri, sizeof uri) != sizeof uri || read(input, &end, 1) < 0) exit(1);
  exit(0);
}

static double get(mooncake_store_t *store, const mooncake_buffer_t *buffer) {
  double start = now();
  check(mooncake_store_get(store, "payload", buffer, 1, NULL, NULL, NULL), "get");
  double seconds = now() - start;
  check(mooncake_store_delete_replica(store, "payload", NULL), "delete the replica");
  return seconds;
}

static double plain_read(mooncake_engine_t *engine, mooncake_segment_t segment,
                         const mooncake_buffer_t *buffer) {
  mooncake_remote_buffer_t buffers[16];
  mooncake_transfer_request_t requests[READ_COUNT];
  uint64_t count, address = 0;
  check(mooncake_segment_buffers(engine, segment, buffers, 16, &count), "buffers");
  for (uint64_t index = 0; index < count; index += 1) {
    if (buffers[index].length == SIZE) address = buffers[index].address;
  }
  check(mooncake_memory_register(engine, buffer->address, SIZE, NULL, MOONCAKE_ACCESS_LOCAL),
        "register memory");
  for (uint64_t index = 0; index < READ_COUNT; index += 1) {
    uint64_t offset = index * (SIZE / READ_COUNT);
    requests[index] = (mooncake_transfer_request_t){
        MOONCAKE_OPCODE_READ, segment, (char *)buffer->address + offset, address + offset,
        SIZE / READ_COUNT};
  }
  double start = now();
  check(mooncake_transfer_sync(engine, requests, READ_COUNT, 0), "read");
  double seconds = now() - start;
  check(mooncake_memory_unregister(engine, buffer->address), "unregister");
  return seconds;
}

int main(int argc, char **argv) {
  uint64_t shard_bytes = argc > 1 ? strtoull(argv[1], NULL, 10) << 10 : 0;
  int repetitions = argc > 2 ? atoi(argv[2]) : 7;
  int output[2], input[2];
  char uri[URI_BYTES];
  if (pipe(output) != 0 || pipe(input) != 0) return 1;
  pid_t child = fork();
  if (child == 0) {
    close(input[1]); /* else its input never ends */
    serve(shard_bytes, output[1], input[0]);
  }
  if (child < 0 || read(output[0], uri, sizeof uri) != sizeof uri) return 1;
  mooncake_engine_t *engine = create_engine(uri);
  mooncake_store_t *store;
  mooncake_store_result_t *result;
  const mooncake_store_report_t *report;
  mooncake_segment_t segment;
  check(mooncake_store_create(engine, NULL, NULL, &store), "create a store");
  check(mooncake_store_stat(store, "payload", NULL, &result), "stat");
  check(mooncake_store_result_read(result, &report), "result");
  check(mooncake_segment_open(engine, report->holders[0]->segment, 0, &segment), "open");
  mooncake_buffer_t buffer = {aligned_alloc(2 << 20, SIZE), SIZE};
  memset(buffer.address, 1, SIZE);
  for (int repetition = 0; repetition < repetitions; repetition += 1) {
    double verified = get(store, &buffer);
    double plain = plain_read(engine, segment, &buffer);
    printf("get %.2f GB/s, read %.2f GB/s, %.2f of it\n", (double)SIZE / verified / 1e9,
           (double)SIZE / plain / 1e9, plain / verified);
  }
  check(mooncake_store_destroy(store), "destroy the store");
  check(mooncake_engine_destroy(engine), "destroy the engine");
  close(input[1]);
  return waitpid(child, NULL, 0) != child;
}
