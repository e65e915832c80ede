// Copies that another thread or process can stop at any moment.
//
// A guarded copy compares a guard word and then copies as one restartable sequence (rseq): a thread
// that is preempted, stopped or interrupted by a signal meanwhile does not resume, but returns
// LINUX_COPY_INTERRUPTED. So whoever changes the word and then sees the thread stopped knows that
// the thread will not touch the memory again without checking the word. Where the C library or the
// processor has no such sequences, `rseq` is null and the copy is an ordinary one after an ordinary
// comparison.
#ifndef CLINUX_GUARDED_COPY_H
#define CLINUX_GUARDED_COPY_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

// Larger than any error number.
enum { LINUX_COPY_CHANGED = -100001, LINUX_COPY_INTERRUPTED = -100002 };

#if defined(__x86_64__)
#define LINUX_HAS_RSEQ_COPY 1
#endif

// The calling thread's rseq area, or null.
static inline void *linux_rseq_area(void) {
#ifdef LINUX_HAS_RSEQ_COPY
  if (__rseq_size == 0) return NULL;
  struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
  return (int32_t)area->cpu_id >= 0 ? area : NULL;
#else
  return NULL;
#endif
}

#ifdef LINUX_HAS_RSEQ_COPY
// Labels: 1 begin and 2 end of the sequence, 3 its descriptor, 4 abort handler, 5 guard changed, 6
// done. The bytes before 4 are the signature that the kernel checks.
#define LINUX_SEQUENCE_BEGIN                                                                       \
  ".pushsection __rseq_cs, \"aw\"\n\t.balign 32\n3:\n\t.long 0, 0\n\t.quad 1f, 2f - 1f, 4f\n\t"    \
  ".popsection\n\t"                                                                                \
  "leaq 3b(%%rip), %[scratch]\n\tmovq %[scratch], %[area]\n"                                       \
  "1:\n\tcmpq %[expected], %[guard]\n\tjne 5f\n\t"
#define LINUX_SEQUENCE_END                                                                         \
  "2:\n\tjmp 6f\n\t.byte 0x0f, 0xb9, 0x3d\n\t.long 0x53053053\n"                                   \
  "4:\n\tmovq $-100002, %[result]\n\tjmp 6f\n"                                                     \
  "5:\n\tmovq $-100001, %[result]\n"                                                               \
  "6:\n"
#endif

// process_vm_readv or process_vm_writev. Returns the bytes copied, a negative error number, or
// LINUX_COPY_*.
static inline long linux_guarded_kernel_copy(
  int writes, pid_t process, const struct iovec *local, const struct iovec *remote,
  unsigned long count, const void *guard, uint64_t expected, void *rseq) {
#ifdef LINUX_HAS_RSEQ_COPY
  if (rseq) {
    long result = writes ? SYS_process_vm_writev : SYS_process_vm_readv;
    register unsigned long argument4 __asm__("r10") = (unsigned long)remote;
    register unsigned long argument5 __asm__("r8") = count;
    register unsigned long argument6 __asm__("r9") = 0;
    unsigned long scratch;
    // The system call is the last instruction: the sequence ends when the kernel is entered.
    __asm__ volatile(
      LINUX_SEQUENCE_BEGIN "syscall\n" LINUX_SEQUENCE_END
      : [result] "+&a"(result), [scratch] "=&c"(scratch)
      : "D"((long)process), "S"(local), "d"(count), "r"(argument4), "r"(argument5), "r"(argument6),
        [area] "m"(((struct rseq *)rseq)->rseq_cs), [guard] "m"(*(const uint64_t *)guard),
        [expected] "r"(expected)
      : "r11", "memory", "cc");
    return result;
  }
#endif
  if (__atomic_load_n((const uint64_t *)guard, __ATOMIC_SEQ_CST) != expected)
    return LINUX_COPY_CHANGED;
  long result = writes ? process_vm_writev(process, local, count, remote, count, 0)
                       : process_vm_readv(process, local, count, remote, count, 0);
  return result < 0 ? -errno : result;
}

#ifdef LINUX_HAS_RSEQ_COPY
// Copies whole blocks from the front of what is left. Only `index` changes, from -left to 0, so an
// interrupted copy knows how far it got. Wide registers are cleared at the end, also after an
// interruption: on some processors the thread's later SSE instructions are slow while the upper
// halves are not zero.
#define LINUX_BLOCK_LOOP(name, block, body)                                                        \
  static inline long linux_blocks_##name(                                                          \
    char *target_end, const char *source_end, long *left, const void *guard, uint64_t expected,    \
    void *rseq) {                                                                                  \
    long index = -*left, result = 0;                                                               \
    unsigned long scratch;                                                                         \
    __asm__ volatile(                                                                              \
      LINUX_SEQUENCE_BEGIN ".balign 16\n7:\n\t" body "addq $" #block                               \
                           ", %[index]\n\tjnz 7b\n" LINUX_SEQUENCE_END "\tvzeroupper\n"           \
      : [result] "+&r"(result), [scratch] "=&r"(scratch), [index] "+&r"(index)                     \
      : [to] "r"(target_end), [from] "r"(source_end),                                              \
        [area] "m"(((struct rseq *)rseq)->rseq_cs), [guard] "m"(*(const uint64_t *)guard),         \
        [expected] "r"(expected)                                                                   \
      : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",    \
        "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");                             \
    *left = -index;                                                                                \
    return result;                                                                                 \
  }

// Non-temporal stores need an aligned target, bypass the caches and must be fenced.
LINUX_BLOCK_LOOP(
  stream32, 256,
  "vmovdqu (%[from],%[index]), %%ymm0\n\tvmovdqu 32(%[from],%[index]), %%ymm1\n\t"
  "vmovdqu 64(%[from],%[index]), %%ymm2\n\tvmovdqu 96(%[from],%[index]), %%ymm3\n\t"
  "vmovdqu 128(%[from],%[index]), %%ymm4\n\tvmovdqu 160(%[from],%[index]), %%ymm5\n\t"
  "vmovdqu 192(%[from],%[index]), %%ymm6\n\tvmovdqu 224(%[from],%[index]), %%ymm7\n\t"
  "vmovntdq %%ymm0, (%[to],%[index])\n\tvmovntdq %%ymm1, 32(%[to],%[index])\n\t"
  "vmovntdq %%ymm2, 64(%[to],%[index])\n\tvmovntdq %%ymm3, 96(%[to],%[index])\n\t"
  "vmovntdq %%ymm4, 128(%[to],%[index])\n\tvmovntdq %%ymm5, 160(%[to],%[index])\n\t"
  "vmovntdq %%ymm6, 192(%[to],%[index])\n\tvmovntdq %%ymm7, 224(%[to],%[index])\n\t")

LINUX_BLOCK_LOOP(
  stream64, 256,
  "vmovdqu64 (%[from],%[index]), %%zmm0\n\tvmovdqu64 64(%[from],%[index]), %%zmm1\n\t"
  "vmovdqu64 128(%[from],%[index]), %%zmm2\n\tvmovdqu64 192(%[from],%[index]), %%zmm3\n\t"
  "vmovntdq %%zmm0, (%[to],%[index])\n\tvmovntdq %%zmm1, 64(%[to],%[index])\n\t"
  "vmovntdq %%zmm2, 128(%[to],%[index])\n\tvmovntdq %%zmm3, 192(%[to],%[index])\n\t")

// Plain copy of any length; the instruction (rep movsb) keeps its own count when interrupted.
static inline long linux_bytes(
  char *target_end, const char *source_end, long *left, const void *guard, uint64_t expected,
  void *rseq) {
  char *target = target_end - *left;
  const char *source = source_end - *left;
  long result = 0;
  unsigned long scratch;
  __asm__ volatile(
    LINUX_SEQUENCE_BEGIN "rep movsb\n" LINUX_SEQUENCE_END
    : [result] "+&r"(result), [scratch] "=&r"(scratch), "+&D"(target), "+&S"(source), "+&c"(*left)
    : [area] "m"(((struct rseq *)rseq)->rseq_cs), [guard] "m"(*(const uint64_t *)guard),
      [expected] "r"(expected)
    : "memory", "cc");
  return result;
}
#endif

// Copies the last *left bytes before the ends. Returns 0, or LINUX_COPY_* with the rest in *left.
// `vector_bytes`, of linux_vector_bytes(), asks for non-temporal stores; 0 for plain ones.
static inline long linux_guarded_copy(
  void *target_end, const void *source_end, long *left, int vector_bytes, const void *guard,
  uint64_t expected, void *rseq) {
  char *target = (char *)target_end;
  const char *source = (const char *)source_end;
#ifdef LINUX_HAS_RSEQ_COPY
  if (rseq) {
    long result = 0;
    if (vector_bytes && *left >= 1024) {
      // First up to an aligned target, then whole blocks; the rest is copied below.
      long head = (long)(-(uintptr_t)(target - *left) & 63), after = *left - head;
      if (head) {
        result = linux_bytes(target - after, source - after, &head, guard, expected, rseq);
        *left = head + after;
        if (result) return result;
      }
      long blocks = after & ~255L, tail = after - blocks;
      result = vector_bytes == 64
        ? linux_blocks_stream64(target - tail, source - tail, &blocks, guard, expected, rseq)
        : linux_blocks_stream32(target - tail, source - tail, &blocks, guard, expected, rseq);
      __asm__ volatile("sfence" ::: "memory");
      *left = blocks + tail;
      if (result || *left == 0) return result;
    }
    return linux_bytes(target, source, left, guard, expected, rseq);
  }
#endif
  (void)vector_bytes;
  if (__atomic_load_n((const uint64_t *)guard, __ATOMIC_SEQ_CST) != expected)
    return LINUX_COPY_CHANGED;
  memcpy(target - *left, source - *left, (size_t)*left);
  *left = 0;
  return 0;
}

// The widest vectors that the processor and the kernel offer for non-temporal stores: 64, 32 or 0.
static inline int linux_vector_bytes(void) {
#ifdef LINUX_HAS_RSEQ_COPY
  uint32_t a, b, c, d;
  __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(1), "c"(0));
  const uint32_t wanted = 1u << 27 | 1u << 28;
  if ((c & wanted) != wanted) return 0;
  uint32_t enabled, high;
  __asm__("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
  if ((enabled & 6) != 6) return 0;
  __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
  return (b & 1u << 16) && (enabled & 0xE6) == 0xE6 ? 64 : 32;
#else
  return 0;
#endif
}

#endif
