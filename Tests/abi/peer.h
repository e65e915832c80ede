/* A second process with its own engine, which can be stopped and killed: the only peer that
 * certainly does not answer. Start it before this process has engines. */
#ifndef ABI_PEER_H
#define ABI_PEER_H

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "mooncake.h"

#include "check.h"

#define PEER_LENGTH (64u << 20)
#define PEER_SEED 77

typedef struct peer {
  pid_t pid;
  uint64_t address; /* of PEER_LENGTH registered bytes that hold the pattern PEER_SEED */
  char name[256];
} peer_t;

static inline void peer_serve(int output) {
  peer_t self;
  mooncake_engine_t *engine = NULL;
  mooncake_engine_options_t options;
  void *memory = new_pages(PEER_LENGTH);
  memset(&self, 0, sizeof self);
  fill_pattern(memory, PEER_LENGTH, PEER_SEED);
  REQUIRE_OK(mooncake_engine_options_init(&options, sizeof options));
  /* Shared memory copies do not need the peer to answer. */
  options.transports = "tcp";
  REQUIRE_OK(mooncake_engine_create(&options, &engine));
  REQUIRE_OK(mooncake_memory_register(engine, memory, PEER_LENGTH, NULL,
                                      MOONCAKE_ACCESS_REMOTE_READ | MOONCAKE_ACCESS_REMOTE_WRITE));
  REQUIRE_OK(mooncake_engine_name(engine, self.name, sizeof self.name, NULL));
  self.address = (uint64_t)(uintptr_t)memory;
  REQUIRE(write(output, &self, sizeof self) == (ssize_t)sizeof self);
  for (;;) pause();
}

static inline peer_t peer_start(void) {
  peer_t peer;
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  pid_t parent = getpid();
  pid_t pid = fork();
  REQUIRE(pid >= 0);
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    close(ends[0]);
    peer_serve(ends[1]);
  }
  close(ends[1]);
  REQUIRE(read(ends[0], &peer, sizeof peer) == (ssize_t)sizeof peer);
  close(ends[0]);
  peer.pid = pid;
  return peer;
}

/* Returns once all threads of the peer have stopped. */
static inline void peer_stop(const peer_t *peer) {
  int status = 0;
  REQUIRE(kill(peer->pid, SIGSTOP) == 0);
  REQUIRE(waitpid(peer->pid, &status, WUNTRACED) == peer->pid && WIFSTOPPED(status));
}

static inline void peer_continue(const peer_t *peer) { kill(peer->pid, SIGCONT); }

static inline void peer_kill(const peer_t *peer) {
  kill(peer->pid, SIGKILL);
  waitpid(peer->pid, NULL, 0);
}

#endif
