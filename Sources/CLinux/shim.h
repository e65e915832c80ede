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
#include <malloc.h>
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
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "guarded_copy.h"

static inline int linux_futex_wait(
  uint32_t *word, uint32_t expected, const struct timespec *absolute_monotonic) {
  return (int)syscall(SYS_futex, word, FUTEX_WAIT_BITSET_PRIVATE, expected, absolute_monotonic,
                      NULL, FUTEX_BITSET_MATCH_ANY);
}

static inline int linux_futex_wake(uint32_t *word, int count) {
  return (int)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

// accept4, or accept and fcntl where a sandbox does not know accept4.
static inline int linux_accept(int listener, int flags) {
  int accepted = accept4(listener, NULL, NULL, flags);
  if (accepted >= 0 || (errno != ENOSYS && errno != EPERM)) return accepted;
  accepted = accept(listener, NULL, NULL);
  if (accepted < 0) return accepted;
  if ((flags & SOCK_CLOEXEC) && fcntl(accepted, F_SETFD, FD_CLOEXEC) < 0) goto failed;
  if ((flags & SOCK_NONBLOCK) && fcntl(accepted, F_SETFL, O_NONBLOCK) < 0) goto failed;
  return accepted;
failed:
  close(accepted);
  return -1;
}

// Asks for pages of a range near a NUMA node, where that has room; MPOL_PREFERRED.
static inline int linux_prefer_node(void *address, size_t length, unsigned node) {
  unsigned long mask[16] = {0};
  const unsigned bits = 8 * sizeof(unsigned long);
  if (node >= sizeof mask * 8) {
    errno = EINVAL;
    return -1;
  }
  mask[node / bits] = 1ul << (node % bits);
  return (int)syscall(SYS_mbind, address, length, 1, mask, sizeof mask * 8, 0);
}

static inline int linux_gettid(void) { return (int)syscall(SYS_gettid); }

// The calling thread's number, cached; the kernel is asked again when `generation` changes, which
// it does in the child of a fork.
static inline int linux_thread_number(uint32_t generation) {
  static __thread int number;
  static __thread uint32_t known;
  if (known != generation) {
    number = linux_gettid();
    known = generation;
  }
  return number;
}

static inline int linux_pidfd_open(pid_t process) {
  return (int)syscall(SYS_pidfd_open, process, 0);
}

// GNU extension constants, under our own names.
enum { LINUX_O_PATH = O_PATH };
enum { LINUX_RENAME_NOREPLACE = 1, LINUX_RENAME_EXCHANGE = 2 };

static inline int linux_rename(
  int from_directory, const char *from, int to_directory, const char *to, unsigned flags) {
  return (int)syscall(SYS_renameat2, from_directory, from, to_directory, to, flags);
}

// Whether the descriptor's file system keeps its files in memory.
static inline int linux_is_memory_system(int descriptor) {
  struct statfs system;
  return fstatfs(descriptor, &system) == 0 && (unsigned long)system.f_type == 0x01021994;
}

// Whether other machines may see the descriptor's file system: NFS, SMB, FUSE, 9p, Ceph, AFS,
// Lustre, GFS2, OCFS2, GPFS.
static inline int linux_is_shared_system(int descriptor) {
  static const unsigned long kinds[] = {0x6969,     0xFF534D42, 0xFE534D42, 0x65735546,
                                        0x01021997, 0x00C36400, 0x5346414F, 0x0BD00BD0,
                                        0x01161970, 0x7461636F, 0x47504653};
  struct statfs system;
  if (fstatfs(descriptor, &system) != 0) return 1;
  for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++)
    if (((unsigned long)system.f_type & 0xFFFFFFFF) == kinds[i]) return 1;
  return 0;
}

static inline int linux_set_dumpable(int value) { return prctl(PR_SET_DUMPABLE, value, 0, 0, 0); }

// Whether a thread exists, even if we may not signal it.
static inline int linux_thread_exists(pid_t process, pid_t thread) {
  return syscall(SYS_tgkill, process, thread, 0) == 0 || errno != ESRCH;
}

// Sends one message with up to 4 descriptors.
static inline ssize_t linux_send_message(
  int socket, const void *bytes, size_t count, const int *descriptors, size_t descriptor_count) {
  union {
    char bytes[CMSG_SPACE(4 * sizeof(int))];
    struct cmsghdr alignment;
  } control;
  struct iovec vector = {(void *)bytes, count};
  struct msghdr message;
  memset(&message, 0, sizeof message);
  message.msg_iov = &vector;
  message.msg_iovlen = 1;
  if (descriptor_count > 0 && descriptor_count <= 4) {
    memset(&control, 0, sizeof control);
    message.msg_control = &control;
    message.msg_controllen = CMSG_SPACE(descriptor_count * sizeof(int));
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(descriptor_count * sizeof(int));
    memcpy(CMSG_DATA(header), descriptors, descriptor_count * sizeof(int));
  }
  return sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

// Receives one message with up to 4 descriptors, close-on-exec, which the caller then owns. EMFILE
// if this process has too few free descriptors for them.
static inline ssize_t linux_receive_message(
  int socket, void *bytes, size_t count, int *descriptors, size_t *descriptor_count) {
  union {
    char bytes[CMSG_SPACE(4 * sizeof(int))];
    struct cmsghdr alignment;
  } control;
  struct iovec vector = {bytes, count};
  struct msghdr message;
  memset(&message, 0, sizeof message);
  message.msg_iov = &vector;
  message.msg_iovlen = 1;
  message.msg_control = &control;
  message.msg_controllen = sizeof control;
  *descriptor_count = 0;
  ssize_t received = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  if (received < 0) return received;
  for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    size_t number = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t index = 0; index < number && *descriptor_count < 4; index++)
      memcpy(&descriptors[(*descriptor_count)++], CMSG_DATA(header) + index * sizeof(int),
             sizeof(int));
  }
  if (message.msg_flags & MSG_CTRUNC) {
    while (*descriptor_count > 0) close(descriptors[--*descriptor_count]);
    errno = EMFILE;
    return -1;
  }
  return received;
}

static inline void linux_cpu_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __asm__ __volatile__("pause");
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

#endif
