/* A thousand engines, one after the other, leave nothing behind: no descriptor, no thread, no
 * memory. */
#include "mooncake.h"

#include "check.h"

enum { WARM_UP_COUNT = 50, CYCLE_COUNT = 1000, LENGTH = 16 << 10, GROWTH_BYTES = 4 << 20 };

static unsigned char *memory;

/* One engine, ended by destroy() with a batch, a registration and an open segment left. */
static void live_once(uint64_t index) {
  mooncake_engine_t *engine = NULL;
  mooncake_batch_t batch = 0;
  mooncake_segment_t segment = -1;
  int32_t descriptor = -1;
  void *owned = NULL;
  char name[256];
  mooncake_transfer_request_t request;
  REQUIRE_OK(mooncake_engine_create(NULL, &engine));
  REQUIRE_OK(mooncake_memory_register(engine, memory, LENGTH * 2, NULL,
                                      MOONCAKE_ACCESS_REMOTE_READ | MOONCAKE_ACCESS_REMOTE_WRITE));
  REQUIRE_OK(mooncake_memory_allocate(engine, 4096, NULL, MOONCAKE_ACCESS_LOCAL, &owned));
  REQUIRE_OK(mooncake_engine_name(engine, name, sizeof name, NULL));
  REQUIRE_OK(mooncake_segment_open(engine, name, 10000, &segment));
  REQUIRE_OK(mooncake_batch_create(engine, 16, &batch));
  REQUIRE_OK(mooncake_batch_event_fd(engine, batch, &descriptor));
  REQUIRE_OK(mooncake_engine_event_fd(engine, &descriptor));
  CHECK(mooncake_segment_close(engine, 999) != MOONCAKE_OK);

  memset(&request, 0, sizeof request);
  request.opcode = MOONCAKE_OPCODE_WRITE;
  request.segment = segment;
  request.source = memory;
  request.target_offset = (uint64_t)(uintptr_t)(memory + LENGTH);
  request.length = LENGTH;
  fill_pattern(memory, LENGTH, index);
  REQUIRE_OK(mooncake_batch_submit(engine, batch, &request, 1, 10000));
  if (index % 4 != 3) { /* Every fourth is destroyed with the transfer under way. */
    REQUIRE_OK(mooncake_batch_wait(engine, batch, 10000, NULL));
    REQUIRE(has_pattern(memory + LENGTH, LENGTH, index));
  }
  REQUIRE_OK(mooncake_engine_destroy(engine));
}

int main(void) {
  memory = (unsigned char *)new_pages(LENGTH * 2);
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_OFF));
  int thread_count_at_start = count_entries("/proc/self/task");
  for (uint64_t index = 0; index < WARM_UP_COUNT; index += 1) live_once(index);
  int thread_count = settle_entries("/proc/self/task", thread_count_at_start);
  int descriptor_count = count_entries("/proc/self/fd");
  long resident = resident_bytes();

  double start = seconds_now();
  for (uint64_t index = 0; index < CYCLE_COUNT; index += 1) live_once(index);
  double seconds = seconds_now() - start;

  CHECK_EQUAL(settle_entries("/proc/self/task", thread_count), thread_count);
  CHECK_EQUAL(settle_entries("/proc/self/fd", descriptor_count), descriptor_count);
  long growth = resident_bytes() - resident;
  printf("%d cycles in %.1f s: %d threads, %d descriptors, %ld KiB more resident\n", CYCLE_COUNT,
         seconds, thread_count - 2, descriptor_count - 3, growth / 1024);
  CHECK(growth < GROWTH_BYTES);
  return check_result("cycles");
}
