/* The soak: one initiator process that must survive, and peers that are stopped, killed and
 * restarted. Each worker of the initiator owns a region of each peer, divided into cells, and
 * knows their contents; each peer owns one region of the initiator. */
#ifndef SOAK_H
#define SOAK_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

#include "mooncake.h"

#include "check.h"
#include "pattern.h"

enum {
  PEERS = 3,
  ENGINES = 2, /* with the default transports, and with TCP only */
  WORKERS = 8,
  GUEST_REGION = WORKERS, /* read by engines that are destroyed in mid-transfer */
  REGIONS = WORKERS + 1,
  GUARD_BYTES = 64,
  CALL_MS = 10000,    /* for what blocks */
  TRANSFER_MS = 30000,
  SLACK_SECONDS = 10, /* beyond a deadline, on a loaded machine */
  NOTICE_SECONDS = 2, /* in which an engine hears of the end of a peer, on a loaded machine */
};

#define VISIT_BYTES (4u << 20) /* of the initiator, for each peer */

/* How a region is divided, and how many requests a batch has at most. */
typedef struct shape {
  uint64_t cell_bytes;
  uint32_t cell_count;
  uint32_t request_limit;
} shape_t;

static inline shape_t shape_of(int region) {
  static const shape_t shapes[] = {
      {64u << 20, 1, 1}, {2u << 20, 8, 8}, {64u << 10, 64, 64}, {2u << 10, 256, 128}};
  return shapes[region == GUEST_REGION ? 1 : region / ENGINES % 4];
}

static inline uint64_t region_bytes(int region) {
  shape_t shape = shape_of(region);
  return shape.cell_bytes * shape.cell_count;
}

/* ---- Between initiator and peers ---------------------------------------------------------- */

/* Memory of all processes. An epoch is odd while the initiator's region is revoked. */
typedef struct shared {
  uint64_t seed;
  char initiator[256];
  struct {
    _Atomic uint64_t epoch;
    _Atomic uint64_t address;
    _Atomic uint64_t visited_bytes; /* verified by the peer */
  } visit[PEERS];
} shared_t;

/* A peer's descriptors; the initiator keeps the numbers occupied. */
enum { SHARED_DESCRIPTOR = 3, CONTROL_DESCRIPTOR = 4 };

/* The first message of a peer. */
typedef struct peer_hello {
  char name[256];
  uint64_t address[REGIONS];
} peer_hello_t;

enum { COMMAND_RENEW = 1, COMMAND_END = 2 };

typedef struct peer_command {
  int32_t command;
  int32_t region;
} peer_command_t;

typedef struct peer_reply {
  uint64_t address;
  uint64_t notification_count; /* of this worker, received by this process */
} peer_reply_t;

/* The initial contents of a cell, known to both sides. */
static inline uint64_t initial_key(const shared_t *shared, int peer, uint64_t generation,
                                   int region, uint64_t renewal, uint32_t cell) {
  uint64_t key = shared->seed;
  uint64_t parts[] = {(uint64_t)peer, generation, (uint64_t)region, renewal, cell};
  for (int index = 0; index < 5; index += 1) key = pattern_mix(key ^ parts[index]);
  return key;
}

/* The transports of the peers: the last one leaves out shared memory. */
static inline const char *peer_transports(int peer) {
  return peer == PEERS - 1 ? "tcp" : "shm,tcp";
}

int peer_main(int index, uint64_t generation, uint32_t port);

/* ---- In the initiator --------------------------------------------------------------------- */

typedef struct peer {
  pthread_mutex_t lock; /* of all below but the atomics */
  pid_t pid;
  int control;
  uint32_t port;
  peer_hello_t hello;
  _Atomic uint64_t generation; /* of the process; 0 from before a kill until the next serves */
  _Atomic uint64_t death_end;  /* nanoseconds; UINT64_MAX from before a kill */
  _Atomic int is_stopped;
} peer_t;

typedef struct counters {
  _Atomic uint64_t completed, canceled, timed_out, failed; /* requests */
  _Atomic uint64_t read_bytes, written_bytes, verified_bytes;
  _Atomic uint64_t batches, notifications, opens, registrations, renewals, engines;
  _Atomic uint64_t kills, stops, revocations;
} counters_t;

/* Whose steps are watched for hangs. */
enum { GUEST_STEPS = WORKERS, FAULT_STEPS, STEPPERS };

typedef struct soak {
  shared_t *shared;
  mooncake_engine_t *engine[ENGINES];
  peer_t peer[PEERS];
  counters_t count;
  _Atomic int64_t own_bytes; /* private memory that the soak asked for, all of it resident */
  _Atomic int ends;          /* everybody should return */
  _Atomic int watch_ends;    /* nobody can hang any more */
  _Atomic int has_failed;
  _Atomic uint64_t step_start[STEPPERS]; /* nanoseconds, 0: not in a step */
} soak_t;

extern soak_t soak;

/* Logs what went wrong, with seed and time, and ends the soak. */
void soak_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Fails unless the call gives MOONCAKE_OK. */
#define SOAK_OK(call) soak_expect((call), #call, __FILE__, __LINE__)
int soak_expect(int32_t code, const char *what, const char *file, int line);

void *worker_main(void *index);
void *guest_main(void *unused);

/* All on one thread, with which the peers end. */
void faults_start(void);
void faults_run(void);
void faults_end(void);

/* Adds to own_bytes, in pages; sign is 1 or -1. */
void soak_count_own(uint64_t length, int sign);

/* Private pages outside malloc, filled with byte: at place, or anywhere if it is 0. */
unsigned char *soak_map(uint64_t place, uint64_t length, unsigned char byte);
void soak_unmap(unsigned char *memory, uint64_t length);

static inline uint64_t nanoseconds_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Whether the peer was dead at any time since start. Having been stopped is no excuse: that
 * never lasts as long as a timeout. */
static inline int was_dead(const peer_t *peer, uint64_t start) {
  return atomic_load(&peer->death_end) >= start;
}

/* Whether it came back so recently that requests may have gone to the former process: those end
 * as unreachable instead of being repeated to the new one. */
static inline int is_just_back(const peer_t *peer, uint64_t start) {
  uint64_t end = atomic_load(&peer->death_end); /* beyond every time while it is dead */
  return end < start && start - end < NOTICE_SECONDS * 1000000000ull;
}

#endif
