/* Outsiders that keep sending nonsense: what they make the host log and store is bounded, and
 * others are still served.
 *
 * usage: hostile [SECONDS]   (of each flood; the default is short) */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "mooncake.h"

#include "check.h"

enum {
  CONNECTIONS = 1000,
  BUFFERS = 7000,
  MESSAGE = 1 << 20,
  LINE_LIMIT = 100,
  RESIDENT_LIMIT = 200 << 20
};

static double flood_seconds = 3;
static uint16_t rpc_port, data_port;

static atomic_ullong lines;
static atomic_ullong left_out;
static atomic_ullong unprintable;

/* Adds up "(N similar lines left out)" and "left out in T ms: N lines like ...". */
static void take_line(int32_t level, const char *message, void *context) {
  unsigned long long count = 0, time = 0;
  const char *note = strrchr(message, '(');
  (void)level;
  (void)context;
  atomic_fetch_add(&lines, 1);
  if (note != NULL && sscanf(note, "(%llu similar lines left out)", &count) == 1) {
    atomic_fetch_add(&left_out, count);
  } else if (sscanf(message, "left out in %llu ms: %llu lines", &time, &count) == 2) {
    atomic_fetch_add(&left_out, count);
  }
  for (const char *byte = message; *byte != 0; byte += 1) {
    if ((unsigned char)*byte < 0x20 || *byte == 0x7F) atomic_fetch_add(&unprintable, 1);
  }
}

static int connect_from(const char *own, uint16_t port, int flags) {
  struct sockaddr_in address;
  int descriptor = socket(AF_INET, SOCK_STREAM | flags, 0);
  REQUIRE(descriptor >= 0);
  memset(&address, 0, sizeof address);
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = inet_addr(own);
  REQUIRE(bind(descriptor, (struct sockaddr *)&address, sizeof address) == 0);
  address.sin_addr.s_addr = inet_addr("127.0.0.1");
  address.sin_port = htons(port);
  if (connect(descriptor, (struct sockaddr *)&address, sizeof address) != 0 &&
      errno != EINPROGRESS) {
    close(descriptor);
    return -1;
  }
  return descriptor;
}

/* Both ports get input that they must refuse, on a new connection each time. */
static void flood_with_nonsense(void) {
  /* Size, address and opcode of a read of unregistered memory. */
  const uint64_t read_of_nothing[3] = {64, 64, 0x80};
  const char nonsense[] = "GET / HTTP/1.1\r\n\x1b[31mHost: a\r\n\r\n";
  double end = seconds_now() + flood_seconds;
  unsigned long long count = 0;
  while (seconds_now() < end) {
    char bytes[64];
    char own[32];
    snprintf(own, sizeof own, "127.0.0.%llu", 2 + count % 200);
    int rpc = connect_from(own, rpc_port, 0), data = connect_from(own, data_port, 0);
    if (rpc >= 0 && send(rpc, nonsense, sizeof nonsense, MSG_NOSIGNAL) > 0) {
      (void)!recv(rpc, bytes, sizeof bytes, 0);
    }
    if (data >= 0 && send(data, read_of_nothing, sizeof read_of_nothing, MSG_NOSIGNAL) > 0) {
      (void)!recv(data, bytes, sizeof bytes, 0);
    }
    if (rpc >= 0) close(rpc);
    if (data >= 0) close(data);
    count += 1;
  }
  printf("%llu refused connections of each kind\n", count);
  fflush(stdout);
}

/* A thousand requests that lack only the last byte. */
static void flood_with_requests(void) {
  static int sockets[CONNECTIONS];
  static size_t sent[CONNECTIONS];
  static unsigned char body[MESSAGE];
  const uint64_t length = MESSAGE;
  double end = seconds_now() + flood_seconds;
  memset(sockets, -1, sizeof sockets);
  memset(body, ' ', sizeof body);
  memcpy(body, &length, sizeof length);
  body[8] = 1;
  while (seconds_now() < end) {
    for (int index = 0; index < CONNECTIONS; index += 1) {
      if (sockets[index] < 0) {
        sockets[index] = connect_from("127.0.0.250", rpc_port, SOCK_NONBLOCK);
        sent[index] = 0;
        continue;
      }
      size_t rest = sizeof body - sent[index];
      if (rest == 0) continue;
      ssize_t count = send(sockets[index], body + sent[index], rest, MSG_NOSIGNAL);
      if (count > 0) sent[index] += (size_t)count;
      if (count < 0 && errno != EAGAIN && errno != ENOTCONN) {
        close(sockets[index]);
        sockets[index] = -1;
      }
    }
  }
}

/* Each asks for the descriptor and never receives the answer. */
static void flood_with_questions(void) {
  static int sockets[CONNECTIONS];
  const struct __attribute__((packed)) {
    uint64_t length;
    unsigned char type;
    char body[2];
  } question = {3, 1, {'{', '}'}};
  double end = seconds_now() + flood_seconds;
  for (int index = 0; index < CONNECTIONS; index += 1) {
    sockets[index] = connect_from("127.0.0.250", rpc_port, 0);
    if (sockets[index] >= 0) (void)!send(sockets[index], &question, sizeof question, MSG_NOSIGNAL);
  }
  while (seconds_now() < end) sleep_milliseconds(20);
}

static pid_t start(void (*body)(void)) {
  fflush(NULL);
  pid_t pid = fork();
  REQUIRE(pid >= 0);
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    body();
    _exit(0);
  }
  return pid;
}

static int is_running(pid_t pid) {
  int status = 0;
  pid_t ended = waitpid(pid, &status, WNOHANG);
  if (ended == pid) CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  return ended == 0;
}

static void logged_lines(void) {
  pid_t attacker = start(flood_with_nonsense);
  while (is_running(attacker)) sleep_milliseconds(20);
}

/* Another address is always served, and memory stays bounded. */
static void held_memory(const char *name, void (*flood)(void)) {
  pid_t attacker = start(flood);
  long most = 0;
  double slowest = 0;
  int probes = 0;
  while (is_running(attacker)) {
    mooncake_engine_t *peer = NULL;
    double before = seconds_now();
    REQUIRE_OK(mooncake_engine_create(NULL, &peer));
    REQUIRE_OK(mooncake_peer_probe(peer, name, 30000));
    REQUIRE_OK(mooncake_engine_destroy(peer));
    double taken = seconds_now() - before;
    if (taken > slowest) slowest = taken;
    long now = resident_bytes();
    if (now > most) most = now;
    probes += 1;
    sleep_milliseconds(20);
  }
  printf("%ld MiB at most; %d probes answered, the slowest in %.2f s\n", most >> 20, probes,
         slowest);
  CHECK(most < RESIDENT_LIMIT);
  CHECK(probes > 0);
}

int main(int count, char **arguments) {
  static mooncake_buffer_t buffers[BUFFERS];
  mooncake_engine_t *engine = NULL;
  char name[256], text[4096];
  struct rlimit files;
  if (count > 1) flood_seconds = atof(arguments[1]);
  REQUIRE(getrlimit(RLIMIT_NOFILE, &files) == 0);
  files.rlim_cur = files.rlim_max;
  REQUIRE(setrlimit(RLIMIT_NOFILE, &files) == 0);
  REQUIRE_OK(mooncake_log_set_callback(take_line, NULL));
  REQUIRE_OK(mooncake_engine_create(NULL, &engine));
  REQUIRE_OK(mooncake_engine_name(engine, name, sizeof name, NULL));
  rpc_port = (uint16_t)atoi(strrchr(name, ':') + 1);
  REQUIRE_OK(mooncake_segment_describe(engine, MOONCAKE_SEGMENT_LOCAL, text, sizeof text, NULL));
  const char *port = strstr(text, "\"tcp_data_port\":");
  REQUIRE(port != NULL);
  data_port = (uint16_t)atoi(port + strlen("\"tcp_data_port\":"));

  logged_lines();
  unsigned long long nonsense_lines = lines;
  held_memory(name, flood_with_requests);
  unsigned char *memory = (unsigned char *)new_pages((uint64_t)BUFFERS * 2 * 4096);
  for (int index = 0; index < BUFFERS; index += 1) {
    buffers[index] = (mooncake_buffer_t){memory + (uint64_t)index * 2 * 4096, 4096};
  }
  REQUIRE_OK(mooncake_memory_register_batch(engine, buffers, BUFFERS, NULL,
                                            MOONCAKE_ACCESS_REMOTE_READ));
  held_memory(name, flood_with_questions);
  REQUIRE_OK(mooncake_engine_destroy(engine));
  printf("%llu lines about nonsense, %llu in all, %llu left out\n", nonsense_lines,
         (unsigned long long)lines, (unsigned long long)left_out);
  CHECK(lines < LINE_LIMIT);
  CHECK(left_out > 0);
  CHECK_EQUAL(unprintable, 0);
  return check_result("hostile");
}
