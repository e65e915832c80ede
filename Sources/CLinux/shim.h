// Linux and GNU declarations that Swift's Glibc module leaves out. System headers only; the inline
// functions wrap what Swift cannot call: variadic functions and function-like macros.
#ifndef CLINUX_SHIM_H
#define CLINUX_SHIM_H

#include <features.h>
#ifndef __USE_GNU
#define __USE_GNU 1
#endif

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <linux/futex.h>
#include <linux/mempolicy.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static inline int linux_futex_wait(
  uint32_t *word, uint32_t expected, const struct timespec *absolute_monotonic) {
  return (int)syscall(SYS_futex, word, FUTEX_WAIT_BITSET_PRIVATE, expected, absolute_monotonic,
                      NULL, FUTEX_BITSET_MATCH_ANY);
}

static inline int linux_futex_wake(uint32_t *word, int count) {
  return (int)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static inline int linux_accept(int listener, int flags) {
  return accept4(listener, NULL, NULL, flags);
}

static inline int linux_gettid(void) { return (int)syscall(SYS_gettid); }

static inline void linux_cpu_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __asm__ __volatile__("pause");
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

#endif
