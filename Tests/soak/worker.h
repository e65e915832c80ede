/* A worker's state: its local memory, and its knowledge of the peers. */
#ifndef SOAK_WORKER_H
#define SOAK_WORKER_H

#include <semaphore.h>

#include "soak.h"

enum { REQUEST_LIMIT = 128, ARENAS = 2, METRICS_BYTES = 32768 };

/* The known bytes of a cell: [offset, offset + length) of the pattern of key. */
typedef struct cell {
  uint64_t key, offset, length;
  uint64_t step;    /* the last batch that uses it */
  int is_unchecked; /* written since it was last read: read it before it is written again */
  int is_retired;   /* a former write may still arrive: never write it again */
} cell_t;

/* A peer as the worker knows it. */
typedef struct view {
  uint64_t generation; /* of the process that the rest is about; 0: none yet */
  int is_open;
  mooncake_segment_t segment;
  uint64_t address, renewal;
  cell_t *cells;
  int has_retired;
  int is_foreign; /* writes for a former process may have reached the present one */
  uint64_t notifications_sent, notifications_acknowledged;
} view_t;

typedef enum arena_kind { PLAIN, REGISTERED, ALLOCATED, ARENA_KINDS } arena_kind_t;

/* Local memory of a request; holds the pattern of key after the request has ended. */
typedef struct slot {
  unsigned char *memory;
  uint64_t key, offset, length;
} slot_t;

typedef struct arena {
  arena_kind_t kind;
  unsigned char *memory;
  uint32_t used_count;
  slot_t slot[REQUEST_LIMIT];
} arena_t;

/* The work of a batch; parallel to its requests. */
typedef struct job {
  view_t *view;
  peer_t *peer;
  cell_t *cell;
} job_t;

typedef enum way { WAIT, POLL, EVENT, CALLBACK, NOTIFY, SYNC, WAYS } way_t;

typedef struct worker {
  int index;
  uint64_t random, step;
  mooncake_engine_t *engine;
  shape_t shape;
  view_t view[PEERS];
  arena_t arena[ARENAS];
  sem_t called_back;
  uint32_t count;
  job_t job[REQUEST_LIMIT];
  mooncake_transfer_request_t request[REQUEST_LIMIT];
  /* Of the current batch. */
  way_t way;
  int is_canceled, is_short;
  uint64_t start, timeout_ms;
  char metrics[METRICS_BYTES];
} worker_t;

static inline uint64_t below(worker_t *worker, uint64_t bound) {
  return random_below(&worker->random, bound);
}

static inline int peer_index(const worker_t *worker, const view_t *view) {
  return (int)(view - worker->view);
}

static inline uint64_t slot_stride(const worker_t *worker) {
  return worker->shape.cell_bytes + 4 * GUARD_BYTES;
}

/* Calls to a peer may fail only while it is dead, and then only with these codes. */
static inline int is_excused(int32_t code) {
  return code == MOONCAKE_ERROR_UNREACHABLE || code == MOONCAKE_ERROR_TIMEOUT ||
         code == MOONCAKE_ERROR_NOT_FOUND;
}

void worker_fail(const worker_t *worker, int peer, const char *what);
void check_bytes(const worker_t *worker, const unsigned char *memory, uint64_t key, uint64_t offset,
                 uint64_t length, const char *what);

/* The memory of the last batch that used the arena must be unchanged since. */
void check_arena(worker_t *worker, arena_t *arena);
void create_arena(worker_t *worker, arena_t *arena);
void destroy_arena(worker_t *worker, arena_t *arena);
void churn_arena(worker_t *worker);

/* Updates the view; returns whether the peer can be used. Now and then a dead one is. */
int attach(worker_t *worker, int index);
void detach(worker_t *worker, view_t *view);
void reopen(worker_t *worker, int index);
void probe(worker_t *worker, int index);

/* "worker generation padding" */
void write_message(worker_t *worker, const view_t *view, char *message, size_t capacity);
void notify(worker_t *worker, int index);

#endif
