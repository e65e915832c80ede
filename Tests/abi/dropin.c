/* The drop-in header as used by a program written for Mooncake: life cycle, return codes in
 * both error spaces, and where ours promises more. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "mooncake.h"
#include "transfer_engine_c.h"

#include "check.h"
#include "peer.h"

/* WAIT_SECONDS exceeds the library's own deadline, so that a late request shows as FAILED. */
enum { LENGTH = 8 << 20, WAIT_SECONDS = 40, DEADLINE_SECONDS = 3 };

typedef struct pair {
  transfer_engine_t initiator;
  transfer_engine_t target;
  segment_handle_t segment; /* of the target, at the initiator */
  char target_name[256];
  unsigned char *local;  /* LENGTH bytes of the initiator */
  unsigned char *remote; /* LENGTH bytes of the target */
} pair_t;

static transfer_engine_t create_engine(const char *name) {
  transfer_engine_t engine = createTransferEngine("P2PHANDSHAKE", name, "127.0.0.1", 0, 0);
  if (engine == NULL) {
    fprintf(stderr, "createTransferEngine(%s): %s\n", name, mooncake_error_message());
    exit(1);
  }
  return engine;
}

static transfer_request_t make_request(const pair_t *pair, int opcode, uint64_t offset,
                                       uint64_t length) {
  transfer_request_t request;
  memset(&request, 0, sizeof request);
  request.opcode = opcode;
  request.source = pair->local + offset;
  request.target_id = pair->segment;
  request.target_offset = (uint64_t)(uintptr_t)(pair->remote + offset);
  request.length = length;
  return request;
}

/* Polls one task until it is terminal and returns its status. */
static transfer_status_t await_task(transfer_engine_t engine, batch_id_t batch, size_t task) {
  transfer_status_t status = {-1, 0};
  double end = seconds_now() + WAIT_SECONDS;
  for (;;) {
    REQUIRE_EQUAL(getTransferStatus(engine, batch, task, &status), 0);
    if (status.status != STATUS_WAITING) return status;
    REQUIRE(seconds_now() < end);
  }
}

static pair_t create_pair(void) {
  static char matrix[] = "{\"cpu:0\": [[], []]}";
  void *arguments[] = {matrix, NULL};
  char own_name[256];
  pair_t pair;
  pair.local = (unsigned char *)new_pages(LENGTH);
  pair.remote = (unsigned char *)new_pages(LENGTH);
  pair.initiator = create_engine("127.0.0.1:0");
  pair.target = create_engine("127.0.0.1:0");

  CHECK_EQUAL(discoverTopology(pair.initiator), 0);
  transport_t transport = installTransport(pair.initiator, "tcp", NULL);
  REQUIRE(transport != NULL);
  CHECK(installTransport(pair.initiator, "tcp", NULL) == transport);
  CHECK(installTransport(pair.initiator, "pigeon", NULL) == NULL);
  CHECK(mooncake_error_message()[0] != 0);
  CHECK_EQUAL(uninstallTransport(pair.initiator, "tcp"), 0);

  /* Memory may be registered before there is a transport. */
  CHECK_EQUAL(registerLocalMemory(pair.target, pair.remote, LENGTH, "cpu:0", 1), 0);
  REQUIRE(installTransport(pair.target, "tcp", arguments) != NULL);
  CHECK_EQUAL(registerLocalMemory(pair.initiator, pair.local, LENGTH, "*", 0), 0);

  CHECK_EQUAL(getLocalIpAndPort(pair.target, pair.target_name, sizeof pair.target_name), 0);
  CHECK(strncmp(pair.target_name, "127.0.0.1:", 10) == 0 && atoi(pair.target_name + 10) > 0);
  CHECK_EQUAL(getLocalIpAndPort(pair.initiator, own_name, sizeof own_name), 0);
  CHECK(strcmp(own_name, pair.target_name) != 0);
  CHECK_EQUAL(openSegment(pair.initiator, own_name), LOCAL_SEGMENT);

  pair.segment = openSegment(pair.initiator, pair.target_name);
  REQUIRE(pair.segment > 0);
  CHECK_EQUAL(openSegment(pair.initiator, pair.target_name), pair.segment);
  CHECK_EQUAL(openSegmentNoCache(pair.initiator, pair.target_name), pair.segment);
  char slashed[300];
  snprintf(slashed, sizeof slashed, "/%s", pair.target_name);
  CHECK_EQUAL(openSegment(pair.initiator, slashed), pair.segment);
  return pair;
}

static void end_pair(const pair_t *pair) {
  CHECK_EQUAL(unregisterLocalMemory(pair->initiator, pair->local), 0);
  CHECK_EQUAL(unregisterLocalMemory(pair->target, pair->remote), 0);
  destroyTransferEngine(pair->initiator);
  destroyTransferEngine(pair->initiator);
  destroyTransferEngine(pair->target);
}

static void write_and_read_back(const pair_t *pair) {
  transfer_request_t requests[4];
  transfer_status_t status;
  fill_pattern(pair->local, LENGTH, 1);
  for (uint64_t index = 0; index < 4; index += 1) {
    requests[index] = make_request(pair, OPCODE_WRITE, index * (LENGTH / 4), LENGTH / 4);
  }
  batch_id_t batch = allocateBatchID(pair->initiator, 4);
  REQUIRE(batch != INVALID_BATCH);
  REQUIRE_EQUAL(submitTransfer(pair->initiator, batch, requests, 1), 0);
  REQUIRE_EQUAL(submitTransfer(pair->initiator, batch, requests + 1, 3), 0);
  CHECK_EQUAL(submitTransfer(pair->initiator, batch, requests, 1), 2);
  for (size_t task = 0; task < 4; task += 1) {
    status = await_task(pair->initiator, batch, task);
    CHECK_EQUAL(status.status, STATUS_COMPLETED);
    CHECK_EQUAL(status.transferred_bytes, LENGTH / 4);
  }
  CHECK(has_pattern(pair->remote, LENGTH, 1));
  /* Programs that only look at the status must not see the previous task's. */
  CHECK_EQUAL(getTransferStatus(pair->initiator, batch, 4, &status), 1);
  CHECK_EQUAL(status.status, STATUS_FAILED);
  CHECK_EQUAL(status.transferred_bytes, 0);
  CHECK_EQUAL(freeBatchID(pair->initiator, batch), 0);
  CHECK_EQUAL(freeBatchID(pair->initiator, batch), 1);
  status.status = STATUS_COMPLETED;
  CHECK_EQUAL(getTransferStatus(pair->initiator, batch, 0, &status), 1);
  CHECK_EQUAL(status.status, STATUS_FAILED);

  /* Reads back, and frees without ever having polled. */
  memset(pair->local, 0, LENGTH);
  requests[0] = make_request(pair, OPCODE_READ, 0, LENGTH);
  batch = allocateBatchID(pair->initiator, 1);
  REQUIRE_EQUAL(submitTransfer(pair->initiator, batch, requests, 1), 0);
  double end = seconds_now() + WAIT_SECONDS;
  int code = freeBatchID(pair->initiator, batch);
  while (code == 4 && seconds_now() < end) {
    sleep_milliseconds(1);
    code = freeBatchID(pair->initiator, batch);
  }
  REQUIRE_EQUAL(code, 0);
  CHECK(has_pattern(pair->local, LENGTH, 1));

  batch = allocateBatchID(pair->initiator, 4);
  CHECK_EQUAL(freeBatchID(pair->initiator, batch), 0);
}

static void loop_back(const pair_t *pair) {
  transfer_request_t request = make_request(pair, OPCODE_WRITE, 0, 4096);
  unsigned char *memory = (unsigned char *)new_pages(4096);
  CHECK_EQUAL(registerLocalMemory(pair->initiator, memory, 4096, "cpu:0", 1), 0);
  request.target_id = LOCAL_SEGMENT;
  request.target_offset = (uint64_t)(uintptr_t)memory;
  fill_pattern(pair->local, 4096, 2);
  batch_id_t batch = allocateBatchID(pair->initiator, 1);
  REQUIRE_EQUAL(submitTransfer(pair->initiator, batch, &request, 1), 0);
  CHECK_EQUAL(await_task(pair->initiator, batch, 0).status, STATUS_COMPLETED);
  CHECK(has_pattern(memory, 4096, 2));
  CHECK_EQUAL(freeBatchID(pair->initiator, batch), 0);
  CHECK_EQUAL(unregisterLocalMemory(pair->initiator, memory), 0);
  free(memory);
}

static void bad_targets(const pair_t *pair) {
  transfer_request_t requests[2];
  transfer_status_t status;
  unsigned char *foreign = (unsigned char *)new_pages(4096);
  batch_id_t batch = allocateBatchID(pair->initiator, 2);
  requests[0] = make_request(pair, OPCODE_WRITE, 0, 4096);
  requests[1] = make_request(pair, OPCODE_WRITE, 0, 4096);
  requests[1].target_id = 9999;
  CHECK_EQUAL(submitTransfer(pair->initiator, batch, requests, 2), 1);
  CHECK(mooncake_error_message()[0] != 0);
  /* All or none: the valid one was not added either. */
  CHECK_EQUAL(getTransferStatus(pair->initiator, batch, 0, &status), 1);

  requests[0].target_offset = (uint64_t)(uintptr_t)foreign;
  REQUIRE_EQUAL(submitTransfer(pair->initiator, batch, requests, 1), 0);
  CHECK_EQUAL(await_task(pair->initiator, batch, 0).status, STATUS_FAILED);
  CHECK(has_only(foreign, 4096, 0));
  CHECK_EQUAL(freeBatchID(pair->initiator, batch), 0);
  free(foreign);
}

static void register_memory(const pair_t *pair) {
  unsigned char *memory = (unsigned char *)new_pages(4 * 4096);
  buffer_entry_t entries[2] = {{memory, 8192}, {memory + 4096, 8192}};
  void *addresses[2] = {memory, memory + 8192};
  CHECK_EQUAL(registerLocalMemory(pair->target, memory, 0, "cpu:0", 1), ERR_INVALID_ARGUMENT);
  CHECK_EQUAL(registerLocalMemory(pair->target, memory, 4096, "cpu:0", 1), 0);
  CHECK_EQUAL(registerLocalMemory(pair->target, memory, 4096, "cpu:0", 1), ERR_ADDRESS_OVERLAPPED);
  CHECK_EQUAL(registerLocalMemory(pair->target, memory + 4095, 1, "cpu:0", 1),
              ERR_ADDRESS_OVERLAPPED);
  CHECK_EQUAL(unregisterLocalMemory(pair->target, memory + 1), ERR_ADDRESS_NOT_REGISTERED);
  CHECK_EQUAL(unregisterLocalMemory(pair->target, memory), 0);
  CHECK_EQUAL(unregisterLocalMemory(pair->target, memory), ERR_ADDRESS_NOT_REGISTERED);

  CHECK_EQUAL(registerLocalMemoryBatch(pair->target, entries, 2, "cpu:0"), ERR_ADDRESS_OVERLAPPED);
  CHECK_EQUAL(unregisterLocalMemory(pair->target, memory), ERR_ADDRESS_NOT_REGISTERED);
  entries[1].addr = memory + 8192;
  CHECK_EQUAL(registerLocalMemoryBatch(pair->target, entries, 2, "cpu:0"), 0);
  CHECK_EQUAL(unregisterLocalMemory(pair->target, memory), 0);
  CHECK_EQUAL(unregisterLocalMemoryBatch(pair->target, addresses, 2), ERR_ADDRESS_NOT_REGISTERED);
  CHECK_EQUAL(unregisterLocalMemory(pair->target, memory + 8192), ERR_ADDRESS_NOT_REGISTERED);
  free(memory);
}

static void notify(const pair_t *pair) {
  static char name[] = "trainer";
  static char first[] = "step 1";
  static char second[] = "step \"2\"\n";
  notify_msg_t message = {name, first};
  transfer_request_t request = make_request(pair, OPCODE_WRITE, 0, LENGTH);
  int size = -1;
  CHECK(getNotifsFromEngine(pair->target, &size) == NULL);
  CHECK_EQUAL(size, 0);

  batch_id_t batch = allocateBatchID(pair->initiator, 1);
  CHECK_EQUAL(submitTransferWithNotify(pair->initiator, batch, &request, 0, message), 1);
  REQUIRE_EQUAL(submitTransferWithNotify(pair->initiator, batch, &request, 1, message), 0);
  CHECK_EQUAL(await_task(pair->initiator, batch, 0).status, STATUS_COMPLETED);
  CHECK_EQUAL(freeBatchID(pair->initiator, batch), 0);
  message.msg = second;
  CHECK_EQUAL(genNotifyInEngine(pair->initiator, (uint64_t)pair->segment, message), 0);
  CHECK_EQUAL(genNotifyInEngine(pair->initiator, 9999, message), ERR_METADATA);
  CHECK_EQUAL(genNotifyInEngine(pair->initiator, UINT64_MAX, message), ERR_METADATA);

  notify_msg_t *received = getNotifsFromEngine(pair->target, &size);
  REQUIRE_EQUAL(size, 2);
  REQUIRE(received != NULL);
  CHECK(strcmp(received[0].name, name) == 0 && strcmp(received[0].msg, first) == 0);
  CHECK(strcmp(received[1].name, name) == 0 && strcmp(received[1].msg, second) == 0);
  CHECK_EQUAL(freeNotifsMsgBuf(received, size), 0);

  /* The messages may also be freed with free(3). */
  CHECK_EQUAL(genNotifyInEngine(pair->initiator, (uint64_t)pair->segment, message), 0);
  received = getNotifsFromEngine(pair->target, &size);
  REQUIRE_EQUAL(size, 1);
  free(received[0].name);
  free(received[0].msg);
  free(received);
}

static void ask_about_things(const pair_t *pair) {
  char text[16 << 10];
  char tiny[5] = "xxxx";
  nic_load_stat_t loads[2];
  size_t count = 2;
  CHECK_EQUAL(getLocalIpAndPort(pair->target, tiny, sizeof tiny), 0);
  CHECK(strcmp(tiny, "127.") == 0);
  CHECK_EQUAL(showLinks(pair->initiator, text, sizeof text, 0), 0);
  CHECK(strstr(text, "Local NICs") != NULL);
  CHECK_EQUAL(showLinks(pair->initiator, text, sizeof text, 1), 0);
  CHECK(text[0] == '{' && strstr(text, "\"local_nics\"") != NULL);
  CHECK(strstr(text, "\"topology\"") != NULL);
  CHECK_EQUAL(showLinks(pair->initiator, tiny, sizeof tiny, 1), 0);
  CHECK_EQUAL(strlen(tiny), 4);
  CHECK_EQUAL(showLinks(pair->initiator, text, 0, 1), -1);
  CHECK_EQUAL(getNicLoadStats(pair->initiator, loads, &count), 0);
  CHECK(count <= 64);
  CHECK_EQUAL(getNicLoadStats(pair->initiator, NULL, &count), -1);
  CHECK_EQUAL(getNicLoadStats(pair->initiator, loads, NULL), -1);
  CHECK_EQUAL(warmupEfaSegment(pair->initiator, pair->target_name), 0);
  CHECK_EQUAL(syncSegmentCache(pair->initiator), 0);
  CHECK_EQUAL(removeLocalSegment(pair->initiator, pair->target_name), 0);
  CHECK_EQUAL(removeLocalSegment(pair->initiator, "nobody:1"), 0);
  CHECK_EQUAL(removeLocalSegment(pair->initiator, ""), -1);
  CHECK(openSegment(pair->initiator, pair->target_name) > 0);
  CHECK_EQUAL(closeSegment(pair->initiator, pair->segment), 0);
  CHECK(openSegment(pair->initiator, "") < 0);
}

/* A port that was free a moment ago. */
static int free_port(void) {
  struct sockaddr_in address;
  socklen_t length = sizeof address;
  memset(&address, 0, sizeof address);
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int descriptor = socket(AF_INET, SOCK_STREAM, 0);
  REQUIRE(descriptor >= 0);
  REQUIRE(bind(descriptor, (struct sockaddr *)&address, sizeof address) == 0);
  REQUIRE(getsockname(descriptor, (struct sockaddr *)&address, &length) == 0);
  close(descriptor);
  return ntohs(address.sin_port);
}

static void ports(void) {
  char wanted[64] = "?";
  char first_name[64] = "";
  char second_name[64] = "";
  transfer_engine_t first = NULL;
  /* Another process may take the port in between, hence up to three attempts. */
  for (int attempt = 0; attempt < 3 && strcmp(first_name, wanted) != 0; attempt += 1) {
    if (first != NULL) destroyTransferEngine(first);
    snprintf(wanted, sizeof wanted, "127.0.0.1:%d", free_port());
    first = create_engine(wanted);
    CHECK_EQUAL(getLocalIpAndPort(first, first_name, sizeof first_name), 0);
  }
  CHECK(strcmp(first_name, wanted) == 0);
  transfer_engine_t second = create_engine(wanted);
  CHECK_EQUAL(getLocalIpAndPort(second, second_name, sizeof second_name), 0);
  CHECK(strncmp(second_name, "127.0.0.1:", 10) == 0 && strcmp(second_name, wanted) != 0);
  destroyTransferEngine(first);
  destroyTransferEngine(second);

  CHECK(createTransferEngine("gopher://127.0.0.1:70", "127.0.0.1:0", NULL, 0, 0) == NULL);
  CHECK(mooncake_error_message()[0] != 0);
  transfer_engine_t discovering =
      createTransferEngine("P2PHANDSHAKE", "127.0.0.1:0", "127.0.0.1", 0, 1);
  REQUIRE(discovering != NULL);
  CHECK(getLocalIpAndPort(discovering, second_name, sizeof second_name) == 0);
  CHECK_EQUAL(openSegment(discovering, second_name), LOCAL_SEGMENT);
  destroyTransferEngine(discovering);
}

/* A stopped peer: waiting until the deadline by MC_TRANSFER_TIMEOUT, then FAILED, the only failure
 * that programs know. */
static void stopped_peer(const pair_t *pair, const peer_t *peer) {
  transfer_request_t request = make_request(pair, OPCODE_READ, 0, LENGTH);
  transfer_status_t status;
  request.target_id = openSegment(pair->initiator, peer->name);
  REQUIRE(request.target_id > 0);
  request.target_offset = peer->address;
  peer_stop(peer);
  double start = seconds_now();
  batch_id_t batch = allocateBatchID(pair->initiator, 1);
  REQUIRE_EQUAL(submitTransfer(pair->initiator, batch, &request, 1), 0);
  CHECK_EQUAL(freeBatchID(pair->initiator, batch), 4);
  REQUIRE_EQUAL(getTransferStatus(pair->initiator, batch, 0, &status), 0);
  CHECK_EQUAL(status.status, STATUS_WAITING);
  status = await_task(pair->initiator, batch, 0);
  double seconds = seconds_now() - start;
  CHECK(seconds > DEADLINE_SECONDS * 0.8 && seconds < DEADLINE_SECONDS + 3);
  CHECK_EQUAL(status.status, STATUS_FAILED);
  CHECK(strstr(mooncake_error_message(), "deadline") != NULL);
  memset(pair->local, 0x5A, LENGTH);
  peer_continue(peer);
  sleep_milliseconds(300);
  CHECK(has_only(pair->local, LENGTH, 0x5A));
  REQUIRE_EQUAL(getTransferStatus(pair->initiator, batch, 0, &status), 0);
  CHECK_EQUAL(status.status, STATUS_FAILED);
  CHECK_EQUAL(freeBatchID(pair->initiator, batch), 0);
}

/* Runs in a child: SIGTERM must end it properly although it is only waiting. */
static void graceful_child(void) {
  alarm(20);
  transfer_engine_t engine = create_engine("127.0.0.1:0");
  REQUIRE(installTransport(engine, "tcp", NULL) != NULL);
  enableGracefulShutdown(NULL);
  enableGracefulShutdown(engine);
  enableGracefulShutdown(engine);
  raise(SIGTERM);
  for (;;) pause();
}

static void shut_down_gracefully(void) {
  int status = 0;
  pid_t pid = fork();
  REQUIRE(pid >= 0);
  if (pid == 0) graceful_child();
  REQUIRE(waitpid(pid, &status, 0) == pid);
  CHECK(WIFEXITED(status));
  CHECK_EQUAL(WEXITSTATUS(status), 128 + SIGTERM);
}

/* Everything that should not take long, with the default deadline: a slow machine must not fail. */
static void run_in_good_time(void) {
  shut_down_gracefully();
  pair_t pair = create_pair();
  write_and_read_back(&pair);
  loop_back(&pair);
  bad_targets(&pair);
  register_memory(&pair);
  notify(&pair);
  ask_about_things(&pair);
  ports();
  end_pair(&pair);
}

static void run_until_deadline(void) {
  peer_t peer = peer_start();
  pair_t pair = create_pair();
  stopped_peer(&pair, &peer);
  end_pair(&pair);
  peer_kill(&peer);
}

/* The program runs itself a second time for the deadline, which comes from the environment and must
 * be set before the library is loaded. The argument says how many checks failed before. */
int main(int argument_count, char **arguments) {
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_OFF));
  if (argument_count > 1) {
    check_failure_count = atoi(arguments[1]);
    run_until_deadline();
    return check_result("dropin");
  }
  run_in_good_time();
  char text[16];
  snprintf(text, sizeof text, "%d", DEADLINE_SECONDS);
  REQUIRE(setenv("MC_TRANSFER_TIMEOUT", text, 1) == 0);
  snprintf(text, sizeof text, "%d", check_failure_count);
  execl("/proc/self/exe", arguments[0], text, (char *)NULL);
  perror("the program cannot run itself");
  return 1;
}
