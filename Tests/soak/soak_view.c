/* A worker's local memory, which comes and goes, and its views of the peers, which come and go
 * by themselves. */
#include <sys/socket.h>

#include "worker.h"

void worker_fail(const worker_t *worker, int peer, const char *what) {
  soak_fail("worker %d (%s), step %llu, peer %d: %s; last error: %s", worker->index,
            worker->index % ENGINES == 0 ? "default transports" : "tcp",
            (unsigned long long)worker->step, peer, what, mooncake_error_message());
}

void check_bytes(const worker_t *worker, const unsigned char *memory, uint64_t key,
                        uint64_t offset, uint64_t length, const char *what) {
  uint64_t good = pattern_check(memory, key, offset, length);
  atomic_fetch_add(&soak.count.verified_bytes, length);
  if (good == length) return;
  uint64_t wrong = 0;
  for (uint64_t index = good; index < length; index += 1) {
    wrong += memory[index] != pattern_byte(key, offset + index);
  }
  soak_fail("CORRUPTION: worker %d, step %llu: %s: byte %llu of %llu at %p is %02x, expected %02x; "
            "%llu bytes differ",
            worker->index, (unsigned long long)worker->step, what, (unsigned long long)good,
            (unsigned long long)length, (const void *)memory, memory[good],
            pattern_byte(key, offset + good), (unsigned long long)wrong);
}

/* ---- Local memory ------------------------------------------------------------------------- */

static uint64_t arena_bytes(const worker_t *worker) {
  return slot_stride(worker) * worker->shape.request_limit;
}

/* Whether memory allocated by its engine is private rather than shared. */
static int is_private(const worker_t *worker) { return worker->index % ENGINES == 1; }

void create_arena(worker_t *worker, arena_t *arena) {
  uint64_t length = arena_bytes(worker);
  arena->kind = (arena_kind_t)below(worker, ARENA_KINDS);
  arena->used_count = 0;
  if (arena->kind == ALLOCATED) {
    void *memory = NULL;
    SOAK_OK(mooncake_memory_allocate(worker->engine, length, NULL, MOONCAKE_ACCESS_LOCAL, &memory));
    arena->memory = memory;
    if (memory == NULL) return;
    memset(memory, 0, length);
    if (is_private(worker)) soak_count_own(length, 1);
    return;
  }
  arena->memory = soak_map(0, length, 0);
  if (arena->kind == REGISTERED) {
    /* Not writable: a late visitor may still hold this address from earlier. */
    SOAK_OK(mooncake_memory_register(worker->engine, arena->memory, length, "cpu:0",
                                     (uint32_t)below(worker, MOONCAKE_ACCESS_REMOTE_WRITE)));
  }
}

void check_arena(worker_t *worker, arena_t *arena) {
  for (uint32_t index = 0; index < arena->used_count; index += 1) {
    const slot_t *slot = &arena->slot[index];
    check_bytes(worker, slot->memory, slot->key, slot->offset, slot->length,
                "local memory changed after the request had ended");
  }
  arena->used_count = 0;
}

void destroy_arena(worker_t *worker, arena_t *arena) {
  check_arena(worker, arena);
  if (arena->kind == ALLOCATED) {
    if (is_private(worker)) soak_count_own(arena_bytes(worker), -1);
    SOAK_OK(mooncake_memory_free(worker->engine, arena->memory));
    return;
  }
  if (arena->kind == REGISTERED) {
    SOAK_OK(mooncake_memory_unregister(worker->engine, arena->memory));
  }
  soak_unmap(arena->memory, arena_bytes(worker));
}

void churn_arena(worker_t *worker) {
  arena_t *arena = &worker->arena[below(worker, ARENAS)];
  destroy_arena(worker, arena);
  create_arena(worker, arena);
  atomic_fetch_add(&soak.count.registrations, 1);
}

/* ---- Peers -------------------------------------------------------------------------------- */

static void reset_cells(worker_t *worker, view_t *view) {
  for (uint32_t index = 0; index < worker->shape.cell_count; index += 1) {
    view->cells[index] = (cell_t){
        .key = initial_key(soak.shared, peer_index(worker, view), view->generation, worker->index,
                           view->renewal, index),
        .length = worker->shape.cell_bytes};
  }
  view->has_retired = 0;
}

/* Until the region is renewed, its contents are unknown. */
static void forget_cells(worker_t *worker, view_t *view) {
  for (uint32_t index = 0; index < worker->shape.cell_count; index += 1) {
    view->cells[index] = (cell_t){.is_retired = 1};
  }
  view->has_retired = 1;
}

void detach(worker_t *worker, view_t *view) {
  if (view->is_open) SOAK_OK(mooncake_segment_close(worker->engine, view->segment));
  view->is_open = 0;
}

/* Checks the result of a blocking call to a peer; returns whether it succeeded. */
static int check_call(worker_t *worker, int peer, int32_t code, uint64_t start,
                      const char *what) {
  double took = (double)(nanoseconds_now() - start) / 1e9;
  if (took > CALL_MS / 1000 + SLACK_SECONDS) worker_fail(worker, peer, what);
  if (code == MOONCAKE_OK) return 1;
  if (!was_dead(&soak.peer[peer], start) || !is_excused(code)) worker_fail(worker, peer, what);
  return 0;
}

/* Opens the segment that is served now. What is known of a process is kept while it is the same
 * one. */
static int open_segment(worker_t *worker, int index) {
  view_t *view = &worker->view[index];
  peer_t *peer = &soak.peer[index];
  mooncake_segment_t segment = 0;
  pthread_mutex_lock(&peer->lock);
  uint64_t generation = atomic_load(&peer->generation);
  peer_hello_t hello = peer->hello;
  pthread_mutex_unlock(&peer->lock);
  if (generation == 0) return 0;
  uint64_t start = nanoseconds_now();
  int32_t code = mooncake_segment_open(worker->engine, hello.name, CALL_MS, &segment);
  if (!check_call(worker, index, code, start, "segment open")) return 0;
  detach(worker, view);
  view->is_open = 1;
  view->segment = segment;
  atomic_fetch_add(&soak.count.opens, 1);
  if (view->generation == generation) return 1;
  view->generation = generation;
  view->address = hello.address[worker->index];
  view->renewal = 0;
  view->notifications_sent = view->notifications_acknowledged = 0;
  reset_cells(worker, view);
  if (view->is_foreign) forget_cells(worker, view);
  view->is_foreign = 0;
  return 1;
}

/* Replaces the region by one at another address, which nothing sent earlier can reach. */
static void renew_region(worker_t *worker, view_t *view) {
  peer_t *peer = &soak.peer[peer_index(worker, view)];
  peer_command_t command = {COMMAND_RENEW, worker->index};
  peer_reply_t reply;
  if (pthread_mutex_trylock(&peer->lock) != 0) return;
  int is_same = atomic_load(&peer->generation) == view->generation;
  int is_done = is_same &&
                send(peer->control, &command, sizeof command, MSG_NOSIGNAL) == sizeof command &&
                recv(peer->control, &reply, sizeof reply, 0) == sizeof reply;
  pthread_mutex_unlock(&peer->lock);
  if (!is_done) return;
  if (reply.notification_count < view->notifications_acknowledged ||
      reply.notification_count > view->notifications_sent) {
    soak_fail("worker %d, peer %d: %llu notifications sent, %llu acknowledged, %llu received",
              worker->index, peer_index(worker, view),
              (unsigned long long)view->notifications_sent,
              (unsigned long long)view->notifications_acknowledged,
              (unsigned long long)reply.notification_count);
  }
  view->address = reply.address;
  view->renewal += 1;
  reset_cells(worker, view);
  atomic_fetch_add(&soak.count.renewals, 1);
}

int attach(worker_t *worker, int index) {
  view_t *view = &worker->view[index];
  uint64_t generation = atomic_load(&soak.peer[index].generation);
  if (generation == 0 && view->is_open) return below(worker, 4) == 0;
  if (view->generation != generation || !view->is_open) return open_segment(worker, index);
  if (view->has_retired && below(worker, 4) == 0 && !atomic_load(&soak.peer[index].is_stopped)) {
    renew_region(worker, view);
  }
  return 1;
}

/* Half of the time the last handle is closed first, so that connections end. */
void reopen(worker_t *worker, int index) {
  if (below(worker, 2) == 0) detach(worker, &worker->view[index]);
  open_segment(worker, index);
}

void probe(worker_t *worker, int index) {
  char name[256];
  uint64_t start = nanoseconds_now();
  pthread_mutex_lock(&soak.peer[index].lock);
  memcpy(name, soak.peer[index].hello.name, sizeof name);
  pthread_mutex_unlock(&soak.peer[index].lock);
  check_call(worker, index, mooncake_peer_probe(worker->engine, name, CALL_MS), start, "probe");
}

void write_message(worker_t *worker, const view_t *view, char *message, size_t capacity) {
  int length = snprintf(message, capacity, "%d %llu+", worker->index,
                        (unsigned long long)view->generation);
  size_t padding = random_length(&worker->random, capacity - (size_t)length - 1);
  memset(message + length, '+', padding);
  message[(size_t)length + padding] = 0;
}

void notify(worker_t *worker, int index) {
  char message[4096];
  view_t *view = &worker->view[index];
  if (!attach(worker, index)) return;
  write_message(worker, view, message, sizeof message);
  view->notifications_sent += 1;
  uint64_t start = nanoseconds_now();
  int32_t code =
      mooncake_notification_send(worker->engine, view->segment, "soak", message, CALL_MS);
  if (check_call(worker, index, code, start, "notification") &&
      atomic_load(&soak.peer[index].generation) == view->generation) {
    view->notifications_acknowledged += 1;
    atomic_fetch_add(&soak.count.notifications, 1);
  }
}
