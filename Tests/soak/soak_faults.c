/* The faults: peers killed and stopped, memory revoked, engines destroyed in mid-transfer. */
#include <errno.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "soak.h"

extern char **environ;

static uint64_t random_state;
/* The initiator's memory that a peer visits: allocated by the engine, or registered at one of
 * two alternating places per peer, so that a late visitor harms nobody else. */
#define VISITED 0x300000000000u
static unsigned char *visited[PEERS];

static uint64_t below(uint64_t bound) { return random_below(&random_state, bound); }

/* ---- Visited memory ----------------------------------------------------------------------- */

static int is_allocated(int index) { return index == 1; }

static void grant(int index) {
  const uint32_t rights = MOONCAKE_ACCESS_REMOTE_READ | MOONCAKE_ACCESS_REMOTE_WRITE;
  if (is_allocated(index)) {
    void *memory = NULL;
    SOAK_OK(mooncake_memory_allocate(soak.engine[0], VISIT_BYTES, NULL, rights, &memory));
    visited[index] = memory;
  } else {
    uint64_t turn = atomic_load(&soak.shared->visit[index].epoch) / 2 % 2;
    visited[index] = soak_map(VISITED + ((uint64_t)index * 2 + turn) * VISIT_BYTES, VISIT_BYTES, 0);
    SOAK_OK(mooncake_memory_register(soak.engine[0], visited[index], VISIT_BYTES, NULL, rights));
  }
  atomic_store(&soak.shared->visit[index].address, (uint64_t)(uintptr_t)visited[index]);
  atomic_fetch_add(&soak.shared->visit[index].epoch, 1);
}

/* Returns memory that nobody may write any more. Keep it until the next grant, so that that
 * gets another address. */
static unsigned char *take_back(int index) {
  unsigned char *memory = visited[index];
  double start = seconds_now();
  atomic_fetch_add(&soak.shared->visit[index].epoch, 1);
  if (is_allocated(index)) {
    SOAK_OK(mooncake_memory_free(soak.engine[0], memory));
  } else {
    SOAK_OK(mooncake_memory_unregister(soak.engine[0], memory));
    memset(memory, 0x3C, VISIT_BYTES);
  }
  if (seconds_now() - start > SLACK_SECONDS) {
    soak_fail("HANG: unregister of what peer %d visits took %.1f s", index, seconds_now() - start);
  }
  atomic_fetch_add(&soak.count.revocations, 1);
  return memory;
}

static void check_revoked(int index, unsigned char *memory) {
  if (is_allocated(index)) return;
  if (!has_only(memory, VISIT_BYTES, 0x3C)) {
    soak_fail("CORRUPTION: peer %d wrote into memory after its unregister", index);
  }
  soak_unmap(memory, VISIT_BYTES);
}

/* ---- Peers -------------------------------------------------------------------------------- */

static void start_peer(int index, uint64_t generation) {
  peer_t *peer = &soak.peer[index];
  char texts[3][24];
  char *arguments[] = {"soak", "--peer", texts[0], texts[1], texts[2], NULL};
  int ends[2];
  posix_spawn_file_actions_t actions;
  snprintf(texts[0], sizeof texts[0], "%d", index);
  snprintf(texts[1], sizeof texts[1], "%llu", (unsigned long long)generation);
  snprintf(texts[2], sizeof texts[2], "%u", below(2) == 0 ? peer->port : 0);
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) {
    return soak_fail("socketpair: %s", strerror(errno));
  }
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, SHARED_DESCRIPTOR, SHARED_DESCRIPTOR);
  posix_spawn_file_actions_adddup2(&actions, ends[1], CONTROL_DESCRIPTOR);
  int code = posix_spawn(&peer->pid, "/proc/self/exe", &actions, NULL, arguments, environ);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  if (code != 0) soak_fail("posix_spawn: %s", strerror(code));
  struct timeval limit = {60, 0};
  setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  pthread_mutex_lock(&peer->lock);
  peer->control = ends[0];
  if (recv(peer->control, &peer->hello, sizeof peer->hello, 0) != sizeof peer->hello) {
    soak_fail("peer %d did not start", index);
  }
  pthread_mutex_unlock(&peer->lock);
  const char *port = strrchr(peer->hello.name, ':');
  peer->port = port == NULL ? 0 : (uint32_t)atoi(port + 1);
  atomic_store(&peer->generation, generation);
}

static void kill_peer(int index, int and_restart) {
  peer_t *peer = &soak.peer[index];
  uint64_t generation = atomic_load(&peer->generation);
  atomic_store(&peer->death_end, UINT64_MAX);
  atomic_store(&peer->generation, 0);
  kill(peer->pid, SIGKILL);
  waitpid(peer->pid, NULL, 0);
  pthread_mutex_lock(&peer->lock);
  close(peer->control);
  peer->control = -1;
  pthread_mutex_unlock(&peer->lock);
  /* Data sent by the dead process may still arrive: its successor visits other memory. */
  unsigned char *memory = take_back(index);
  sleep_milliseconds((long)random_length(&random_state, 1000));
  if (and_restart) grant(index);
  check_revoked(index, memory);
  if (!and_restart) return;
  start_peer(index, generation + 1);
  atomic_store(&peer->death_end, nanoseconds_now());
  atomic_fetch_add(&soak.count.kills, 1);
}

/* Half of the stopped peers find their visit ended when they resume. */
static void stop_peer(int index) {
  peer_t *peer = &soak.peer[index];
  int revokes = below(2) == 0;
  unsigned char *memory = NULL;
  atomic_store(&peer->is_stopped, 1);
  kill(peer->pid, SIGSTOP);
  waitpid(peer->pid, NULL, WUNTRACED);
  sleep_milliseconds((long)random_length(&random_state, 1500));
  if (revokes) memory = take_back(index);
  kill(peer->pid, SIGCONT);
  atomic_store(&peer->is_stopped, 0);
  atomic_fetch_add(&soak.count.stops, 1);
  if (!revokes) return;
  sleep_milliseconds((long)random_length(&random_state, 300));
  grant(index);
  check_revoked(index, memory);
}

static void revoke_visit(int index) {
  unsigned char *memory = take_back(index);
  sleep_milliseconds((long)random_length(&random_state, 100));
  grant(index);
  check_revoked(index, memory);
}

/* A peer exits by itself only if it has found something wrong. */
static void check_alive(void) {
  for (int index = 0; index < PEERS; index += 1) {
    int status = 0;
    if (waitpid(soak.peer[index].pid, &status, WNOHANG) == 0) continue;
    soak_fail("peer %d ended: %s %d", index, WIFSIGNALED(status) ? "signal" : "status",
              WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
  }
}

static void end_peer(int index) {
  peer_t *peer = &soak.peer[index];
  peer_command_t command = {COMMAND_END, 0};
  peer_reply_t reply;
  if (!atomic_load(&soak.has_failed) &&
      (send(peer->control, &command, sizeof command, MSG_NOSIGNAL) != sizeof command ||
       recv(peer->control, &reply, sizeof reply, 0) != sizeof reply)) {
    soak_fail("peer %d did not confirm that its memory is as it should be", index);
  }
  kill_peer(index, 0);
}

/* ---- Guests ------------------------------------------------------------------------------- */

enum { GUEST_REQUESTS = 16, GUEST_BYTES = 512 << 10 };

/* An engine that reads from a peer and is destroyed, half of the time before the read has
 * ended. */
static void be_guest(int index, unsigned char *memory, uint64_t *random) {
  mooncake_transfer_request_t requests[GUEST_REQUESTS];
  mooncake_engine_options_t options;
  mooncake_engine_t *engine = NULL;
  mooncake_segment_t segment = 0;
  mooncake_batch_t batch = 0;
  peer_t *peer = &soak.peer[index];
  uint64_t start = nanoseconds_now();
  pthread_mutex_lock(&peer->lock);
  peer_hello_t hello = peer->hello;
  pthread_mutex_unlock(&peer->lock);
  SOAK_OK(mooncake_engine_options_init(&options, sizeof options));
  options.transports = random_below(random, 2) == 0 ? "tcp" : "shm,tcp";
  if (!SOAK_OK(mooncake_engine_create(&options, &engine))) return;
  int32_t code = mooncake_segment_open(engine, hello.name, CALL_MS, &segment);
  for (uint64_t number = 0; number < GUEST_REQUESTS; number += 1) {
    requests[number] = (mooncake_transfer_request_t){
        MOONCAKE_OPCODE_READ, segment, memory + number * GUEST_BYTES,
        hello.address[GUEST_REGION] + number * GUEST_BYTES, GUEST_BYTES};
  }
  if (code == MOONCAKE_OK) {
    SOAK_OK(mooncake_batch_create(engine, GUEST_REQUESTS, &batch));
    SOAK_OK(mooncake_batch_submit(engine, batch, requests, GUEST_REQUESTS, 5000));
    if (random_below(random, 2) == 0) SOAK_OK(mooncake_batch_wait(engine, batch, 30000, NULL));
    else usleep((useconds_t)random_length(random, 5000));
  } else if (!was_dead(peer, start)) {
    soak_fail("a guest cannot open peer %d: %s", index, mooncake_error_message());
  }
  double destroy_start = seconds_now();
  SOAK_OK(mooncake_engine_destroy(engine));
  double took = seconds_now() - destroy_start;
  if (took > SLACK_SECONDS) soak_fail("HANG: engine_destroy took %.1f s", took);
  atomic_fetch_add(&soak.count.engines, 1);
  memset(memory, 0x69, GUEST_REQUESTS * GUEST_BYTES);
  sleep_milliseconds((long)random_length(random, 200));
  if (!has_only(memory, GUEST_REQUESTS * GUEST_BYTES, 0x69)) {
    soak_fail("CORRUPTION: memory was written after its engine was destroyed (peer %d)", index);
  }
}

void *guest_main(void *unused) {
  (void)unused;
  uint64_t random = pattern_mix(soak.shared->seed ^ 0x6E57);
  unsigned char *memory = soak_map(0, GUEST_REQUESTS * GUEST_BYTES, 0);
  while (!atomic_load(&soak.ends)) {
    atomic_store(&soak.step_start[GUEST_STEPS], nanoseconds_now());
    be_guest((int)random_below(&random, PEERS), memory, &random);
  }
  atomic_store(&soak.step_start[GUEST_STEPS], 0);
  soak_unmap(memory, GUEST_REQUESTS * GUEST_BYTES);
  return NULL;
}

/* ---- Start and end ------------------------------------------------------------------------ */

static void cause_fault(void) {
  int index = (int)below(PEERS);
  switch (below(5)) {
    case 0: return kill_peer(index, 1);
    case 1: return revoke_visit(index);
    default: return stop_peer(index);
  }
}

void faults_start(void) {
  random_state = pattern_mix(soak.shared->seed ^ 0xFA17);
  for (int index = 0; index < PEERS; index += 1) {
    atomic_store(&soak.shared->visit[index].epoch, 1);
    grant(index);
    start_peer(index, 1);
  }
}

void faults_run(void) {
  atomic_store(&soak.step_start[FAULT_STEPS], nanoseconds_now());
  check_alive();
  sleep_milliseconds((long)random_length(&random_state, 1000));
  if (!atomic_load(&soak.ends)) cause_fault();
}

void faults_end(void) {
  for (int index = 0; index < PEERS; index += 1) end_peer(index);
}
