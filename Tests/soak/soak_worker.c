/* A worker: one batch after another on its own cells of every peer, in every way that the API
 * offers, and a check of each request's result. */
#include <poll.h>

#include "worker.h"

static void add_request(worker_t *worker, arena_t *arena, view_t *view) {
  cell_t *cell = &view->cells[below(worker, worker->shape.cell_count)];
  if (cell->step == worker->step) return;
  int writes = !cell->is_unchecked && !cell->is_retired && below(worker, 2) == 0;
  slot_t *slot = &arena->slot[worker->count];
  slot->key = random_next(&worker->random);
  slot->offset = 0;
  slot->length = worker->shape.cell_bytes;
  if (!writes && cell->length > 0) {
    slot->offset = cell->offset;
    slot->length = cell->length;
  }
  /* What was just written is read as a whole. */
  if (!cell->is_unchecked) {
    uint64_t length = random_length(&worker->random, slot->length);
    slot->offset += below(worker, slot->length - length + 1);
    slot->length = length;
  }
  slot->memory = arena->memory + slot_stride(worker) * worker->count + GUARD_BYTES +
                 below(worker, GUARD_BYTES);
  memset(slot->memory - GUARD_BYTES, 0x5A, GUARD_BYTES);
  memset(slot->memory + slot->length, 0x5A, GUARD_BYTES);
  pattern_fill(slot->memory, slot->key, slot->offset, slot->length);
  cell->step = worker->step;
  uint64_t start = (uint64_t)(cell - view->cells) * worker->shape.cell_bytes + slot->offset;
  worker->request[worker->count] = (mooncake_transfer_request_t){
      writes ? MOONCAKE_OPCODE_WRITE : MOONCAKE_OPCODE_READ, view->segment, slot->memory,
      view->address + start, slot->length};
  worker->job[worker->count] = (job_t){view, &soak.peer[peer_index(worker, view)], cell};
  worker->count += 1;
}

static void plan(worker_t *worker, arena_t *arena) {
  uint64_t wanted = random_length(&worker->random, worker->shape.request_limit);
  int main_peer = (int)below(worker, PEERS);
  int is_mixed = below(worker, 4) == 0;
  int is_usable[PEERS];
  for (int index = 0; index < PEERS; index += 1) {
    is_usable[index] = (is_mixed || index == main_peer) && attach(worker, index);
  }
  worker->count = 0;
  for (uint64_t index = 0; index < wanted; index += 1) {
    int peer = is_mixed ? (int)below(worker, PEERS) : main_peer;
    if (is_usable[peer]) add_request(worker, arena, &worker->view[peer]);
  }
  arena->used_count = worker->count;
  worker->way = (way_t)below(worker, WAYS);
  worker->is_canceled = worker->way != SYNC && below(worker, 10) == 0;
  worker->is_short = below(worker, 12) == 0;
  worker->timeout_ms = worker->is_short ? 1 + below(worker, 40) : TRANSFER_MS;
}

/* Connections that the engine has given up. Their requests were repeated, so data may arrive
 * twice. */
static uint64_t disconnect_count(worker_t *worker) {
  SOAK_OK(mooncake_engine_metrics(worker->engine, worker->metrics, METRICS_BYTES, NULL));
  const char *line = strstr(worker->metrics, "\nmooncake_disconnects_total{");
  const char *number = line == NULL ? NULL : strstr(line, "} ");
  if (number == NULL) worker_fail(worker, -1, "no metric of disconnects");
  return number == NULL ? 0 : strtoull(number + 2, NULL, 10);
}

static void called_back(mooncake_batch_t batch, const mooncake_batch_status_t *status,
                        void *context) {
  (void)batch;
  (void)status;
  sem_post(context);
}

/* Returns whether the batch ended in time. */
static int await_batch(worker_t *worker, mooncake_batch_t batch, mooncake_batch_status_t *status) {
  /* A canceled request may have to wait for a descriptor, or for its batch's notification. */
  int is_prompt = worker->is_canceled && worker->way != NOTIFY;
  uint64_t limit_ms = (is_prompt ? 3000 : worker->timeout_ms) + SLACK_SECONDS * 1000;
  struct timespec end;
  struct pollfd event = {-1, POLLIN, 0};
  switch (worker->way) {
    case EVENT:
      SOAK_OK(mooncake_batch_event_fd(worker->engine, batch, &event.fd));
      if (poll(&event, 1, (int)limit_ms) != 1) return 0;
      break;
    case CALLBACK:
      clock_gettime(CLOCK_REALTIME, &end);
      end.tv_sec += (time_t)(limit_ms / 1000);
      if (sem_timedwait(&worker->called_back, &end) != 0) return 0;
      break;
    case POLL:
      do {
        SOAK_OK(mooncake_batch_poll(worker->engine, batch, status));
        if (status->state != MOONCAKE_STATE_WAITING) return 1;
        usleep((useconds_t)below(worker, 300));
      } while (nanoseconds_now() - worker->start < limit_ms * 1000000);
      return 0;
    default:
      return mooncake_batch_wait(worker->engine, batch, limit_ms, status) == MOONCAKE_OK;
  }
  SOAK_OK(mooncake_batch_poll(worker->engine, batch, status));
  return status->state != MOONCAKE_STATE_WAITING;
}

static void submit(worker_t *worker, mooncake_batch_t batch) {
  char message[512];
  view_t *view = worker->job[0].view;
  if (worker->way == CALLBACK) {
    SOAK_OK(mooncake_batch_set_callback(worker->engine, batch, called_back, &worker->called_back));
  }
  if (worker->way == NOTIFY) {
    write_message(worker, view, message, sizeof message);
    view->notifications_sent += 1;
    SOAK_OK(mooncake_batch_submit_notify(worker->engine, batch, worker->request, worker->count,
                                         worker->timeout_ms, "soak", message));
  } else {
    SOAK_OK(mooncake_batch_submit(worker->engine, batch, worker->request, worker->count,
                                  worker->timeout_ms));
  }
  if (worker->is_canceled) {
    if (below(worker, 2) == 0) usleep((useconds_t)random_length(&worker->random, 20000));
    SOAK_OK(mooncake_batch_cancel(worker->engine, batch));
  }
}

/* Whether a request may have ended like this. */
static int is_expected(const worker_t *worker, const job_t *job,
                       const mooncake_transfer_status_t *status) {
  int is_gone = atomic_load(&job->peer->generation) != job->view->generation;
  switch (status->state) {
    case MOONCAKE_STATE_COMPLETED: return status->error == MOONCAKE_OK;
    case MOONCAKE_STATE_CANCELED:
      return worker->is_canceled && status->error == MOONCAKE_ERROR_CANCELED;
    case MOONCAKE_STATE_TIMEOUT:
      return status->error == MOONCAKE_ERROR_TIMEOUT && worker->is_short &&
             nanoseconds_now() - worker->start >= worker->timeout_ms * 1000000;
    case MOONCAKE_STATE_FAILED:
      return (is_excused(status->error) && was_dead(job->peer, worker->start)) ||
             (status->error == MOONCAKE_ERROR_UNREACHABLE &&
              is_just_back(job->peer, worker->start)) ||
             (status->error == MOONCAKE_ERROR_NOT_REGISTERED && is_gone);
    default: return 0;
  }
}

static void count_end(const mooncake_transfer_request_t *request, int32_t state) {
  int reads = request->opcode == MOONCAKE_OPCODE_READ;
  _Atomic uint64_t *bytes = reads ? &soak.count.read_bytes : &soak.count.written_bytes;
  switch (state) {
    case MOONCAKE_STATE_COMPLETED:
      atomic_fetch_add(&soak.count.completed, 1);
      atomic_fetch_add(bytes, request->length);
      break;
    case MOONCAKE_STATE_CANCELED: atomic_fetch_add(&soak.count.canceled, 1); break;
    case MOONCAKE_STATE_TIMEOUT: atomic_fetch_add(&soak.count.timed_out, 1); break;
    default: atomic_fetch_add(&soak.count.failed, 1); break;
  }
}

/* Checks the local memory of a request and records what its cell holds now. */
static void settle(worker_t *worker, uint32_t index, slot_t *slot, int is_completed,
                   int may_repeat) {
  const job_t *job = &worker->job[index];
  cell_t *cell = job->cell;
  int is_gone = atomic_load(&job->peer->generation) != job->view->generation;
  if (!has_only(slot->memory - GUARD_BYTES, GUARD_BYTES, 0x5A) ||
      !has_only(slot->memory + slot->length, GUARD_BYTES, 0x5A)) {
    worker_fail(worker, peer_index(worker, job->view),
                "CORRUPTION: bytes beside local memory changed");
  }
  if (worker->request[index].opcode == MOONCAKE_OPCODE_WRITE) {
    cell->key = slot->key;
    cell->offset = slot->offset;
    cell->length = is_completed ? slot->length : 0;
    cell->is_unchecked = is_completed;
    cell->is_retired = !is_completed || may_repeat;
    if (cell->is_retired) job->view->has_retired = 1;
    if (is_gone) job->view->is_foreign = 1;
    return;
  }
  if (is_completed && !is_gone && cell->length > 0) {
    check_bytes(worker, slot->memory, cell->key, slot->offset, slot->length,
                "what was read is not what was written");
    if (slot->length == cell->length) cell->is_unchecked = 0;
  }
  /* Reads end with bytes that nobody sends. */
  pattern_fill(slot->memory, slot->key, slot->offset, slot->length);
}

static void judge(worker_t *worker, arena_t *arena, mooncake_batch_t batch,
                  const mooncake_batch_status_t *whole, uint64_t disconnects) {
  int may_repeat = disconnect_count(worker) != disconnects;
  uint64_t completed = 0;
  for (uint32_t index = 0; index < worker->count; index += 1) {
    mooncake_transfer_status_t status;
    const job_t *job = &worker->job[index];
    memset(&status, 0, sizeof status);
    SOAK_OK(mooncake_batch_poll_request(worker->engine, batch, index, &status));
    if (!is_expected(worker, job, &status)) {
      char what[160];
      snprintf(what, sizeof what, "request %u of %u (opcode %d, %llu bytes) ended as %d, %s", index,
               worker->count, worker->request[index].opcode,
               (unsigned long long)worker->request[index].length, status.state,
               mooncake_error_name(status.error));
      worker_fail(worker, peer_index(worker, job->view), what);
    }
    int is_completed = status.state == MOONCAKE_STATE_COMPLETED;
    if (is_completed && status.transferred_bytes != worker->request[index].length) {
      worker_fail(worker, peer_index(worker, job->view), "completed with another number of bytes");
    }
    completed += (uint64_t)is_completed;
    count_end(&worker->request[index], status.state);
    settle(worker, index, &arena->slot[index], is_completed, may_repeat);
  }
  if (whole->submitted_count != worker->count || whole->terminal_count != worker->count ||
      whole->completed_count != completed) {
    worker_fail(worker, -1, "the batch's counts are not those of its requests");
  }
}

/* If only a notification is lost with its peer, the batch fails and nothing else. */
static void judge_notification(worker_t *worker, const mooncake_batch_status_t *status) {
  view_t *view = worker->job[0].view;
  int index = peer_index(worker, view);
  if (worker->way != NOTIFY || status->completed_count != worker->count) return;
  if (status->state == MOONCAKE_STATE_COMPLETED) {
    if (atomic_load(&soak.peer[index].generation) != view->generation) return;
    view->notifications_acknowledged += 1;
    atomic_fetch_add(&soak.count.notifications, 1);
  } else if (!worker->is_short && !worker->is_canceled &&
             !was_dead(&soak.peer[index], worker->start)) {
    worker_fail(worker, index, "the notification of a batch was not delivered");
  }
}

static void run_sync(worker_t *worker, arena_t *arena, uint64_t disconnects) {
  mooncake_transfer_status_t status = {MOONCAKE_STATE_COMPLETED, MOONCAKE_OK, 0};
  status.error = mooncake_transfer_sync(worker->engine, worker->request, worker->count,
                                        worker->timeout_ms);
  if (status.error == MOONCAKE_ERROR_TIMEOUT) status.state = MOONCAKE_STATE_TIMEOUT;
  else if (status.error != MOONCAKE_OK) status.state = MOONCAKE_STATE_FAILED;
  int is_completed = status.error == MOONCAKE_OK;
  int may_repeat = disconnect_count(worker) != disconnects;
  int is_fine = 0;
  for (uint32_t index = 0; index < worker->count; index += 1) {
    is_fine |= is_expected(worker, &worker->job[index], &status);
    count_end(&worker->request[index], status.state);
    settle(worker, index, &arena->slot[index], is_completed, may_repeat);
  }
  if (!is_fine) worker_fail(worker, peer_index(worker, worker->job[0].view), "transfer_sync");
}

static void transfer(worker_t *worker) {
  arena_t *arena = &worker->arena[worker->step % ARENAS];
  mooncake_batch_t batch = 0;
  mooncake_batch_status_t status;
  check_arena(worker, arena);
  plan(worker, arena);
  if (worker->count == 0) return sleep_milliseconds(5);
  atomic_fetch_add(&soak.count.batches, 1);
  uint64_t disconnects = disconnect_count(worker);
  worker->start = nanoseconds_now();
  if (worker->way == SYNC) return run_sync(worker, arena, disconnects);
  if (!SOAK_OK(mooncake_batch_create(worker->engine, worker->count, &batch))) return;
  submit(worker, batch);
  if (!await_batch(worker, batch, &status)) {
    worker_fail(worker, peer_index(worker, worker->job[0].view), "HANG: a batch did not end");
    return;
  }
  judge(worker, arena, batch, &status, disconnects);
  judge_notification(worker, &status);
  SOAK_OK(mooncake_batch_free(worker->engine, batch));
  /* Time for late data to arrive where it must not. */
  if (status.state != MOONCAKE_STATE_COMPLETED && below(worker, 8) == 0) {
    sleep_milliseconds((long)random_length(&worker->random, 500));
  }
}

static void take_step(worker_t *worker) {
  int peer = (int)below(worker, PEERS);
  switch (below(worker, 50)) {
    case 0: return churn_arena(worker);
    case 1: return reopen(worker, peer);
    case 2: return notify(worker, peer);
    case 3: return probe(worker, peer);
    default: return transfer(worker);
  }
}

void *worker_main(void *index) {
  worker_t *worker = calloc(1, sizeof *worker);
  worker->index = (int)(intptr_t)index;
  worker->random = pattern_mix(soak.shared->seed + (uint64_t)worker->index + 1);
  worker->engine = soak.engine[worker->index % ENGINES];
  worker->shape = shape_of(worker->index);
  sem_init(&worker->called_back, 0, 0);
  for (int peer = 0; peer < PEERS; peer += 1) {
    worker->view[peer].cells = calloc(worker->shape.cell_count, sizeof(cell_t));
  }
  for (int arena = 0; arena < ARENAS; arena += 1) create_arena(worker, &worker->arena[arena]);
  while (!atomic_load(&soak.ends)) {
    worker->step += 1;
    atomic_store(&soak.step_start[worker->index], nanoseconds_now());
    take_step(worker);
  }
  atomic_store(&soak.step_start[worker->index], 0);
  for (int arena = 0; arena < ARENAS; arena += 1) destroy_arena(worker, &worker->arena[arena]);
  for (int peer = 0; peer < PEERS; peer += 1) {
    detach(worker, &worker->view[peer]);
    free(worker->view[peer].cells);
  }
  sem_destroy(&worker->called_back);
  free(worker);
  return NULL;
}
