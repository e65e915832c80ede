/* Guarded copies leave no wide vector register in use: on some processors a thread's later SSE
 * instructions are slow while the upper halves are not zero. */
#include "../../Sources/CLinux/guarded_copy.h"

#include "check.h"

enum { LENGTH = 1 << 20 };

#if defined(__x86_64__)
#include <cpuid.h>

/* Whether the processor reports which parts of its state are in use. */
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
  char *source = (char *)new_pages(LENGTH);
  char *target = (char *)new_pages(LENGTH);
  void *rseq = linux_rseq_area();
  const int vector_bytes = linux_vector_bytes();
  uint64_t guard = 1;
  if (!tells_use() || vector_bytes == 0 || rseq == NULL) {
    printf("skipped: no wide copies here, or the processor does not tell what is in use\n");
    return 0;
  }
  fill_pattern(source, LENGTH, 3);
  /* One that succeeds, and one stopped by a changed guard. */
  for (uint64_t expected = 1; expected <= 2; expected += 1) {
    long left = LENGTH;
    long result;
    unsigned in_use;
    do {
      result = linux_guarded_copy(target + LENGTH, source + LENGTH, &left, vector_bytes, &guard,
                                  expected, rseq);
      in_use = wide_registers_in_use();
      CHECK_EQUAL(in_use, 0);
    } while (result == LINUX_COPY_INTERRUPTED);
    CHECK_EQUAL(result, expected == 1 ? 0 : LINUX_COPY_CHANGED);
  }
  CHECK(has_pattern(target, LENGTH, 3));
  free(source);
  free(target);
  return check_result("vector_state");
}
