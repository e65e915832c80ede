/* A peer: serves one region per worker, renews them on command, receives notifications, and
 * itself writes to and reads from the initiator. Exits with status 0 on command, 3 if it finds
 * something wrong. */
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#include "soak.h"

/* A region's last places are kept: what still arrives for them must do no harm. */
enum { RETIRED_COUNT = 2, PLACE_COUNT = 8, MARGIN_BYTES = 4096 };

/* Every peer has its regions at the same addresses, so only its identity distinguishes a
 * restarted one from its predecessor. The odd end makes them unaligned. */
#define PLACES 0x200000000000u
#define PLACE_BYTES (128u << 20)
#define MISALIGNMENT 13u

typedef struct region {
  uint64_t renewal;
  unsigned char *block; /* MARGIN_BYTES + MISALIGNMENT, then the region, then a margin */
  unsigned char *retired[RETIRED_COUNT];
} region_t;

static struct {
  int index;
  uint64_t generation;
  shared_t *shared;
  mooncake_engine_t *engine;
  region_t region[REGIONS];
  uint64_t notification_count[WORKERS];
} self;

static _Noreturn void give_up(const char *what, int region, int32_t code) {
  fprintf(stderr, "soak: peer %d (generation %llu, region %d, seed %llu): %s: %s: %s\n", self.index,
          (unsigned long long)self.generation, region, (unsigned long long)self.shared->seed, what,
          mooncake_error_name(code), mooncake_error_message());
  _exit(3);
}

static void require(int32_t code, const char *what, int region) {
  if (code != MOONCAKE_OK) give_up(what, region, code);
}

/* ---- Regions ------------------------------------------------------------------------------ */

static uint64_t block_bytes(int region) { return region_bytes(region) + 2 * MARGIN_BYTES; }

static unsigned char *inner(unsigned char *block) { return block + MARGIN_BYTES + MISALIGNMENT; }

/* One peer's memory belongs to the engine, so others map it; that of the rest is copied. */
static int is_allocated(void) { return self.index == 1; }

static unsigned char *new_block(int number, uint64_t renewal) {
  uint64_t length = block_bytes(number);
  uint32_t rights = MOONCAKE_ACCESS_REMOTE_READ;
  void *block = NULL;
  if (number != GUEST_REGION) rights |= MOONCAKE_ACCESS_REMOTE_WRITE;
  if (is_allocated()) {
    require(mooncake_memory_allocate(self.engine, length, NULL, rights, &block), "allocate",
            number);
  } else {
    uint64_t place = (uint64_t)number * PLACE_COUNT + renewal % PLACE_COUNT;
    block = mmap((void *)(uintptr_t)(PLACES + place * PLACE_BYTES), length, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (block == MAP_FAILED) give_up("mmap", number, MOONCAKE_OK);
  }
  memset(block, 0xA5, MARGIN_BYTES + MISALIGNMENT);
  memset(inner(block) + region_bytes(number), 0xA5, MARGIN_BYTES - MISALIGNMENT);
  shape_t shape = shape_of(number);
  for (uint32_t cell = 0; cell < shape.cell_count; cell += 1) {
    pattern_fill(inner(block) + cell * shape.cell_bytes,
                 initial_key(self.shared, self.index, self.generation, number, renewal, cell), 0,
                 shape.cell_bytes);
  }
  if (!is_allocated()) {
    require(mooncake_memory_register(self.engine, inner(block), region_bytes(number), NULL, rights),
            "register", number);
  }
  return block;
}

static void check_margins(const unsigned char *block, int number) {
  if (!has_only(block, MARGIN_BYTES + MISALIGNMENT, 0xA5) ||
      !has_only(block + MARGIN_BYTES + MISALIGNMENT + region_bytes(number),
                MARGIN_BYTES - MISALIGNMENT, 0xA5)) {
    give_up("bytes beside the region were written", number, MOONCAKE_OK);
  }
}

/* Once unregistered, a block is zeroed and must stay so. */
static void retire_block(unsigned char *block, int number) {
  region_t *region = &self.region[number];
  if (!is_allocated()) {
    require(mooncake_memory_unregister(self.engine, inner(block)), "unregister", number);
  }
  check_margins(block, number);
  if (!is_allocated() && madvise(block, block_bytes(number), MADV_DONTNEED) != 0) {
    give_up("madvise", number, MOONCAKE_OK);
  }
  unsigned char *last = region->retired[RETIRED_COUNT - 1];
  memmove(region->retired + 1, region->retired, sizeof(void *) * (RETIRED_COUNT - 1));
  region->retired[0] = block;
  if (last == NULL) return;
  if (is_allocated()) {
    require(mooncake_memory_free(self.engine, last), "free", number);
  } else {
    if (!has_only(last, block_bytes(number), 0)) {
      give_up("memory was written after its unregister", number, MOONCAKE_OK);
    }
    munmap(last, block_bytes(number));
  }
}

/* The successor is registered before the region goes. */
static void renew(int number) {
  region_t *region = &self.region[number];
  unsigned char *former = region->block;
  if (former != NULL) region->renewal += 1;
  region->block = new_block(number, region->renewal);
  if (former != NULL) retire_block(former, number);
}

static void check_everything(void) {
  for (int number = 0; number < REGIONS; number += 1) {
    check_margins(self.region[number].block, number);
    for (int index = 0; index < RETIRED_COUNT && !is_allocated(); index += 1) {
      unsigned char *block = self.region[number].retired[index];
      if (block != NULL && !has_only(block, block_bytes(number), 0)) {
        give_up("memory was written after its unregister", number, MOONCAKE_OK);
      }
    }
  }
}

/* ---- Notifications ------------------------------------------------------------------------ */

/* "worker generation padding"; a late one for a former process does not count. */
static void take_notifications(void) {
  for (;;) {
    mooncake_notification_t *notification = NULL;
    unsigned worker = 0;
    unsigned long long generation = 0;
    require(mooncake_notification_receive(self.engine, &notification), "receive", -1);
    if (notification == NULL) return;
    const char *padding = strchr(notification->message, '+');
    if (strcmp(notification->name, "soak") != 0 || padding == NULL ||
        sscanf(notification->message, "%u %llu+", &worker, &generation) != 2 ||
        worker >= WORKERS || strspn(padding, "+") != strlen(padding)) {
      give_up("a notification is not what was sent", -1, MOONCAKE_OK);
    }
    if (generation == self.generation) self.notification_count[worker] += 1;
    mooncake_notification_free(notification);
  }
}

/* ---- Visits: this peer as initiator ------------------------------------------------------- */

static int32_t visit(mooncake_segment_t segment, int32_t opcode, void *source, uint64_t address,
                     uint64_t length) {
  mooncake_transfer_request_t request = {opcode, segment, source, address, length};
  return mooncake_transfer_sync(self.engine, &request, 1, 30000);
}

static void *visitor_main(void *unused) {
  (void)unused;
  mooncake_segment_t segment = 0;
  uint64_t random = self.shared->seed ^ (self.generation << 8) ^ (uint64_t)self.index;
  unsigned char *memory = new_pages(VISIT_BYTES);
  require(mooncake_memory_register(self.engine, memory, VISIT_BYTES, NULL, MOONCAKE_ACCESS_LOCAL),
          "register", -1);
  require(mooncake_segment_open(self.engine, self.shared->initiator, 30000, &segment), "open", -1);
  for (;; sleep_milliseconds((long)random_below(&random, 5))) {
    _Atomic uint64_t *epochs = &self.shared->visit[self.index].epoch;
    uint64_t epoch = atomic_load(epochs);
    uint64_t length = random_length(&random, VISIT_BYTES);
    uint64_t offset = random_below(&random, VISIT_BYTES - length + 1);
    uint64_t address = atomic_load(&self.shared->visit[self.index].address) + offset;
    uint64_t key = random_next(&random);
    pattern_fill(memory, key, offset, length);
    int32_t code = visit(segment, MOONCAKE_OPCODE_WRITE, memory, address, length);
    if (code == MOONCAKE_OK) {
      memset(memory, 0, length);
      code = visit(segment, MOONCAKE_OPCODE_READ, memory, address, length);
    }
    if (epoch % 2 != 0 || atomic_load(epochs) != epoch) {
      /* Other memory may have this address by now, but none that may be written. */
      if (code != MOONCAKE_OK && code != MOONCAKE_ERROR_NOT_REGISTERED &&
          code != MOONCAKE_ERROR_ACCESS_DENIED && code != MOONCAKE_ERROR_UNREACHABLE) {
        give_up("a transfer to a revoked region", -1, code);
      }
      continue;
    }
    if (code != MOONCAKE_OK) give_up("a transfer to the initiator", -1, code);
    if (pattern_check(memory, key, offset, length) != length) {
      give_up("what was read from the initiator is not what was written", -1, MOONCAKE_OK);
    }
    atomic_fetch_add(&self.shared->visit[self.index].visited_bytes, length);
  }
}

/* ---- Start and end ------------------------------------------------------------------------ */

static void start_engine(uint32_t port) {
  mooncake_engine_options_t options;
  require(mooncake_engine_options_init(&options, sizeof options), "options", -1);
  options.transports = peer_transports(self.index);
  options.port = port;
  int32_t code = mooncake_engine_create(&options, &self.engine);
  if (code == MOONCAKE_ERROR_ADDRESS_IN_USE && port != 0) {
    options.port = 0;
    code = mooncake_engine_create(&options, &self.engine);
  }
  require(code, "create", -1);
}

/* Answers one command; returns 0 when it was the last. */
static int obey(void) {
  peer_command_t command;
  peer_reply_t reply = {0, 0};
  if (recv(CONTROL_DESCRIPTOR, &command, sizeof command, 0) != (ssize_t)sizeof command) _exit(2);
  take_notifications();
  if (command.command == COMMAND_RENEW) {
    renew(command.region);
    reply.address = (uint64_t)(uintptr_t)inner(self.region[command.region].block);
    reply.notification_count = self.notification_count[command.region];
  } else {
    check_everything();
  }
  if (send(CONTROL_DESCRIPTOR, &reply, sizeof reply, 0) != (ssize_t)sizeof reply) _exit(2);
  return command.command == COMMAND_RENEW;
}

int peer_main(int index, uint64_t generation, uint32_t port) {
  pthread_t visitor;
  peer_hello_t hello;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  memset(&hello, 0, sizeof hello);
  self.index = index;
  self.generation = generation;
  self.shared = mmap(NULL, sizeof *self.shared, PROT_READ | PROT_WRITE, MAP_SHARED,
                     SHARED_DESCRIPTOR, 0);
  if (self.shared == MAP_FAILED) _exit(2);
  mooncake_log_set_level(MOONCAKE_LOG_ERROR);
  start_engine(port);
  for (int number = 0; number < REGIONS; number += 1) {
    renew(number);
    hello.address[number] = (uint64_t)(uintptr_t)inner(self.region[number].block);
  }
  require(mooncake_engine_name(self.engine, hello.name, sizeof hello.name, NULL), "name", -1);
  if (send(CONTROL_DESCRIPTOR, &hello, sizeof hello, 0) != (ssize_t)sizeof hello) _exit(2);
  if (pthread_create(&visitor, NULL, visitor_main, NULL) != 0) _exit(2);
  for (;;) {
    struct pollfd control = {CONTROL_DESCRIPTOR, POLLIN, 0};
    if (poll(&control, 1, 20) > 0 && !obey()) _exit(0);
    take_notifications();
  }
}
