/* Copies that use wide vector registers leave none of them in use: on some processors a thread's
 * later SSE instructions are slow while the upper halves hold anything. */
#include "mooncake.h"

#include "check.h"

enum { LENGTH = 1 << 20 };

#if defined(__x86_64__)
#include <cpuid.h>

/* Whether the processor tells which parts of its state are in use. */
static int tells_use(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & 1u << 27)) return 0;
  return __get_cpuid_count(13, 1, &a, &b, &c, &d) && (a & 4);
}

/* Upper halves of the 256 bit registers, and of the first sixteen of 512 bit. */
static inline unsigned wide_registers_in_use(void) {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return low & (1u << 2 | 1u << 6);
}
#else
static int tells_use(void) { return 0; }
static inline unsigned wide_registers_in_use(void) { return 0; }
#endif

int main(void) {
  mooncake_engine_t *engine = NULL;
  void *memory = NULL;
  mooncake_transfer_request_t request;
  if (!tells_use()) {
    printf("skipped: this processor does not tell which registers are in use\n");
    return 0;
  }
  REQUIRE_OK(mooncake_engine_create(NULL, &engine));
  REQUIRE_OK(mooncake_memory_allocate(
    engine, 2 * LENGTH, NULL, MOONCAKE_ACCESS_REMOTE_READ | MOONCAKE_ACCESS_REMOTE_WRITE, &memory));
  memset(&request, 0, sizeof request);
  request.opcode = MOONCAKE_OPCODE_WRITE;
  request.segment = MOONCAKE_SEGMENT_LOCAL;
  request.source = memory;
  request.target_offset = (uint64_t)(uintptr_t)memory + LENGTH;
  request.length = LENGTH;
  for (int round = 0; round < 20; round += 1) {
    const int32_t code = mooncake_transfer_sync(engine, &request, 1, 10000);
    const unsigned in_use = wide_registers_in_use();
    REQUIRE_OK(code);
    CHECK_EQUAL(in_use, 0);
  }
  REQUIRE_OK(mooncake_engine_destroy(engine));
  return check_result("vector_state");
}
