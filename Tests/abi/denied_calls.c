/* Sandboxes: for each system call of the library, a process in which it fails creates two
 * engines and moves bytes between them. If there is another way, the bytes arrive; if not,
 * creating an engine fails with the name of the call. Nothing crashes or hangs. */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "mooncake.h"

#include "check.h"

enum { LENGTH = 192 << 10, SMALL = 700, SMALL_COUNT = 40, CHILD_SECONDS = 60 };

/* The allowed exit statuses. */
enum { MOVED = 0, REFUSED = 3 };

enum { NEVER = 0, IN_CREATE = 1, LATER = 2 };

typedef struct denied {
  int number;
  const char *name;
  int may_refuse; /* no other way: an error is right, too; IN_CREATE: one that names the call */
} denied_t;

#define CALL(name, may_refuse) {SYS_##name, #name, may_refuse}

/* Not included: futex, gettid, mmap, mprotect, read, write, close and the signal calls, without
 * which locks, threads and memory do not work at all; and rseq, because the C library ends a
 * process in which only later threads lack it. */
static const denied_t denied_calls[] = {
  CALL(memfd_create, NEVER),
  CALL(ftruncate, NEVER),
  CALL(process_vm_readv, NEVER),
  CALL(process_vm_writev, NEVER),
  CALL(pidfd_open, NEVER),
  CALL(membarrier, NEVER),
  CALL(sched_setaffinity, NEVER),
  CALL(sched_getaffinity, NEVER),
  CALL(sched_yield, NEVER),
  CALL(mbind, NEVER),
  CALL(madvise, NEVER),
  CALL(getrandom, NEVER),
  CALL(accept4, NEVER),
  CALL(statx, NEVER),
  CALL(newfstatat, NEVER),
  CALL(preadv, NEVER),
  CALL(preadv2, NEVER),
  CALL(userfaultfd, NEVER),
  CALL(prctl, NEVER),
  CALL(tgkill, NEVER),
  CALL(prlimit64, NEVER),
  CALL(getdents64, NEVER),
  CALL(uname, NEVER),
  CALL(sysinfo, NEVER),
  CALL(geteuid, NEVER),
  CALL(clock_nanosleep, NEVER),
  CALL(io_uring_setup, NEVER),
  CALL(set_robust_list, NEVER),
  CALL(socketpair, NEVER),
  CALL(openat, NEVER),
  CALL(getpeername, LATER),
  CALL(clone3, IN_CREATE),
  CALL(eventfd2, IN_CREATE),
  CALL(epoll_create1, IN_CREATE),
  CALL(epoll_ctl, IN_CREATE),
  CALL(socket, IN_CREATE),
  CALL(bind, IN_CREATE),
  CALL(listen, IN_CREATE),
  CALL(getsockname, IN_CREATE),
  CALL(sendmsg, LATER),
  CALL(recvmsg, LATER),
  CALL(sendto, LATER),
  CALL(recvfrom, LATER),
  CALL(readv, LATER),
  CALL(connect, LATER),
  CALL(setsockopt, LATER),
  CALL(getsockopt, LATER),
  CALL(shutdown, LATER),
  CALL(poll, LATER),
  CALL(fcntl, LATER),
  CALL(pipe2, LATER),
#ifdef SYS_epoll_wait
  CALL(epoll_wait, IN_CREATE),
#endif
#ifdef SYS_accept
  CALL(accept, NEVER),
#endif
};

static void deny(int number, int error) {
  struct sock_filter filter[] = {
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)number, 0, 1),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)error),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  struct sock_fprog program = {sizeof filter / sizeof filter[0], filter};
  REQUIRE(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
  REQUIRE(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}

/* Ends the process if a call of the library fails: with REFUSED if it had no other way and says
 * why. */
static void need(const denied_t *call, int32_t code, const char *what) {
  if (code == MOONCAKE_OK) return;
  const char *message = mooncake_error_message();
  if (call->may_refuse == LATER && message[0] != 0) _exit(REFUSED);
  fprintf(stderr, "%s: %s: %s: %s\n", call->name, what, mooncake_error_name(code), message);
  _exit(1);
}

#define NEED(expression) need(call, expression, #expression)

static void create(const denied_t *call, const char *transports, mooncake_engine_t **engine) {
  mooncake_engine_options_t options;
  REQUIRE_OK(mooncake_engine_options_init(&options, sizeof options));
  options.transports = transports;
  if (mooncake_engine_create(&options, engine) == MOONCAKE_OK) return;
  const char *message = mooncake_error_message();
  /* pthread_create makes the clone3 call. */
  const char *name = strcmp(call->name, "clone3") == 0 ? "pthread_create" : call->name;
  if (call->may_refuse == IN_CREATE && strstr(message, name) == NULL) {
    fprintf(stderr, "%s: the error does not name it: %s\n", call->name, message);
    _exit(1);
  }
  if (call->may_refuse == NEVER) fprintf(stderr, "%s: %s\n", call->name, message);
  _exit(REFUSED);
}

/* One large block and many small ones, there and back, with the library's or the caller's
 * memory as the target. */
static void move(const denied_t *call, mooncake_engine_t *from, mooncake_engine_t *to,
                 int is_allocated, uint64_t seed) {
  mooncake_transfer_request_t requests[1 + SMALL_COUNT];
  mooncake_segment_t segment = 0;
  void *source = NULL;
  void *target = NULL;
  char name[256];
  const uint32_t access = MOONCAKE_ACCESS_REMOTE_READ | MOONCAKE_ACCESS_REMOTE_WRITE;
  NEED(mooncake_memory_allocate(from, LENGTH, NULL, MOONCAKE_ACCESS_LOCAL, &source));
  if (is_allocated) {
    NEED(mooncake_memory_allocate(to, LENGTH, "cpu:0", access, &target));
  } else {
    target = new_pages(LENGTH);
    NEED(mooncake_memory_register(to, target, LENGTH, NULL, access));
  }
  NEED(mooncake_engine_name(to, name, sizeof name, NULL));
  NEED(mooncake_segment_open(from, name, 10000, &segment));
  memset(requests, 0, sizeof requests);
  const uint64_t small_bytes = SMALL * SMALL_COUNT;
  for (int opcode = MOONCAKE_OPCODE_WRITE; opcode >= MOONCAKE_OPCODE_READ; opcode -= 1) {
    for (uint64_t index = 0; index <= SMALL_COUNT; index += 1) {
      const uint64_t offset = index * SMALL;
      requests[index].opcode = opcode;
      requests[index].segment = segment;
      requests[index].source = (char *)source + offset;
      requests[index].target_offset = (uint64_t)(uintptr_t)target + offset;
      requests[index].length = index < SMALL_COUNT ? SMALL : LENGTH - small_bytes;
    }
    fill_pattern(opcode == MOONCAKE_OPCODE_WRITE ? source : target, LENGTH, seed);
    NEED(mooncake_transfer_sync(from, requests, 1 + SMALL_COUNT, 10000));
    REQUIRE(has_pattern(opcode == MOONCAKE_OPCODE_WRITE ? target : source, LENGTH, seed));
    seed += 1;
  }
  if (is_allocated) {
    NEED(mooncake_memory_free(to, target));
  } else {
    NEED(mooncake_memory_unregister(to, target));
  }
  NEED(mooncake_segment_close(from, segment));
  NEED(mooncake_memory_free(from, source));
}

static void child_main(const denied_t *call, int error, const char *transports) {
  mooncake_engine_t *one = NULL;
  mooncake_engine_t *other = NULL;
  alarm(CHILD_SECONDS);
  if (call->number >= 0) deny(call->number, error);
  create(call, transports, &one);
  create(call, transports, &other);
  move(call, one, other, 1, 5);
  move(call, one, other, 0, 7);
  NEED(mooncake_engine_destroy(one));
  NEED(mooncake_engine_destroy(other));
  _exit(MOVED);
}

static void check_call(const denied_t *call, int error, const char *transports) {
  int status = 0;
  fflush(NULL);
  pid_t pid = fork();
  REQUIRE(pid >= 0);
  if (pid == 0) child_main(call, error, transports);
  REQUIRE(waitpid(pid, &status, 0) == pid);
  const int code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  if (code == MOVED || (code == REFUSED && call->may_refuse != NEVER)) return;
  fprintf(stderr, "%s denied with %s, %s: ended with %d%s\n", call->name,
          error == EPERM ? "EPERM" : "ENOSYS", transports, code,
          code == REFUSED ? ", though there is another way" : "");
  CHECK(0);
}

/* File size limits also apply to memory files: an error when they are made, never SIGXFSZ. */
static void check_file_limit(void) {
  const denied_t nothing = {-1, "RLIMIT_FSIZE", NEVER};
  const struct rlimit former = {RLIM_INFINITY, RLIM_INFINITY};
  for (unsigned long bytes = 4096; bytes <= 64ul << 20; bytes *= 8) {
    const struct rlimit limit = {bytes, former.rlim_max};
    REQUIRE(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    check_call(&nothing, 0, "shm,tcp");
    REQUIRE(setrlimit(RLIMIT_FSIZE, &former) == 0);
  }
}

int main(void) {
  const struct rlimit no_core = {0, 0};
  REQUIRE(setrlimit(RLIMIT_CORE, &no_core) == 0);
  mooncake_log_set_level(MOONCAKE_LOG_OFF);
  for (size_t index = 0; index < sizeof denied_calls / sizeof denied_calls[0]; index += 1) {
    check_call(&denied_calls[index], EPERM, "shm,tcp");
    check_call(&denied_calls[index], ENOSYS, "tcp");
  }
  check_file_limit();
  return check_result("denied_calls");
}
