/* What plain sockets reach between two processes on this machine: the bound for the TCP transport.
 *
 *   tcp_bound bulk     [connections] [chunk] [socket buffer] [total bytes] [seconds]
 *   tcp_bound zerocopy ...                            the same, sent with MSG_ZEROCOPY
 *   tcp_bound pingpong [answer bytes] [seconds]      both ends spin
 *   tcp_bound gathered [block bytes] [blocks] [seconds]   one request, scattered blocks back
 *
 * Prints one line of JSON. Buffers are touched before the clock starts.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CONNECTION_LIMIT = 64, BLOCK_LIMIT = 1024, HEADER = 24, STATUS = 8 };

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void die(const char *what) {
  perror(what);
  exit(1);
}

static char *touched(size_t bytes) {
  char *memory = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
  if (memory == NULL) die("memory");
  memset(memory, 1, bytes);
  return memory;
}

static void tune(int descriptor, int buffer) {
  int one = 1;
  /* The fastest within a host: the system's default may pace as for a network. */
  setsockopt(descriptor, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
  setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  setsockopt(descriptor, SOL_SOCKET, SO_ZEROCOPY, &one, sizeof one);
  if (buffer > 0) {
    setsockopt(descriptor, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
    setsockopt(descriptor, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
  }
}

/* Connected pairs over loopback: left[i] belongs to the parent, right[i] to the child. */
static void connect_pairs(int count, int buffer, int *left, int *right) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t length = sizeof address;
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  tune(listener, buffer);
  if (bind(listener, (struct sockaddr *)&address, length) != 0) die("bind");
  if (listen(listener, count) != 0) die("listen");
  getsockname(listener, (struct sockaddr *)&address, &length);
  for (int index = 0; index < count; index += 1) {
    left[index] = socket(AF_INET, SOCK_STREAM, 0);
    tune(left[index], buffer);
    if (connect(left[index], (struct sockaddr *)&address, length) != 0) die("connect");
    right[index] = accept(listener, NULL, NULL);
    if (right[index] < 0) die("accept");
    tune(right[index], buffer);
  }
  close(listener);
}

typedef struct {
  int descriptor;
  char *memory;
  size_t bytes;
  size_t chunk;
  double end;
  uint64_t moved;
} lane_t;

static int send_flags = MSG_NOSIGNAL;

/* Reads the kernel's notices about memory that it has finished sending from. */
static void take_notices(int descriptor) {
  char control[128];
  struct msghdr message = {.msg_control = control, .msg_controllen = sizeof control};
  while (recvmsg(descriptor, &message, MSG_ERRQUEUE | MSG_DONTWAIT) >= 0)
    message.msg_controllen = sizeof control;
}

static void *send_lane(void *argument) {
  lane_t *lane = argument;
  size_t offset = 0;
  while (now() < lane->end) {
    size_t left = lane->bytes - offset;
    ssize_t sent = send(lane->descriptor, lane->memory + offset,
                        left < lane->chunk ? left : lane->chunk, send_flags);
    if (send_flags & MSG_ZEROCOPY) take_notices(lane->descriptor);
    if (sent < 0 && errno == ENOBUFS) continue;
    if (sent < 0) die("send");
    lane->moved += (uint64_t)sent;
    offset = (offset + (size_t)sent) % lane->bytes;
  }
  shutdown(lane->descriptor, SHUT_WR);
  return NULL;
}

static void *receive_lane(void *argument) {
  lane_t *lane = argument;
  size_t offset = 0;
  for (;;) {
    size_t left = lane->bytes - offset;
    ssize_t count = recv(lane->descriptor, lane->memory + offset,
                         left < lane->chunk ? left : lane->chunk, 0);
    if (count < 0) die("recv");
    if (count == 0) return NULL;
    offset = (offset + (size_t)count) % lane->bytes;
  }
}

static double cpu_seconds(void) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return (double)usage.ru_utime.tv_sec + (double)usage.ru_utime.tv_usec * 1e-6 +
         (double)usage.ru_stime.tv_sec + (double)usage.ru_stime.tv_usec * 1e-6;
}

/* A copy of this process that ends with it; 0 in the child. */
static pid_t fork_bound(void) {
  pid_t parent = getpid(), child = fork();
  if (child < 0) die("fork");
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
  }
  return child;
}

/* Waits until the other end of a connection has arrived here too. */
static void meet(int descriptor) {
  char byte = 0;
  if (send(descriptor, &byte, 1, MSG_NOSIGNAL) != 1) die("send");
  if (recv(descriptor, &byte, 1, MSG_WAITALL) != 1) die("recv");
}

typedef struct {
  uint64_t bytes;
  double seconds;
  double cpu;
} moved_t;

/* One thread per connection. Memory is touched before both sides meet and the clock starts. */
static moved_t run_lanes(void *(*body)(void *), const int *descriptors, int count, size_t total,
                         size_t chunk, double seconds) {
  pthread_t threads[CONNECTION_LIMIT];
  static lane_t lanes[CONNECTION_LIMIT];
  moved_t moved = {0};
  for (int index = 0; index < count; index += 1) {
    lanes[index] = (lane_t){descriptors[index], touched(total / (size_t)count),
                            total / (size_t)count, chunk, 0, 0};
  }
  meet(descriptors[0]);
  double start = now(), cpu = cpu_seconds();
  for (int index = 0; index < count; index += 1) {
    lanes[index].end = start + seconds;
    pthread_create(&threads[index], NULL, body, &lanes[index]);
  }
  for (int index = 0; index < count; index += 1) {
    pthread_join(threads[index], NULL);
    moved.bytes += lanes[index].moved;
  }
  moved.seconds = now() - start;
  moved.cpu = cpu_seconds() - cpu;
  return moved;
}

static void bulk(int count, size_t chunk, int buffer, size_t total, double seconds) {
  int left[CONNECTION_LIMIT], right[CONNECTION_LIMIT], result[2];
  if (count < 1 || count > CONNECTION_LIMIT) count = 2;
  if (pipe(result) != 0) die("pipe");
  connect_pairs(count, buffer, left, right);
  if (fork_bound() == 0) {
    for (int index = 0; index < count; index += 1) close(left[index]);
    moved_t received = run_lanes(receive_lane, right, count, total, chunk, seconds);
    exit(write(result[1], &received, sizeof received) == sizeof received ? 0 : 1);
  }
  for (int index = 0; index < count; index += 1) close(right[index]);
  close(result[1]);
  moved_t sent = run_lanes(send_lane, left, count, total, chunk, seconds), received;
  if (read(result[0], &received, sizeof received) != sizeof received) die("the receiver");
  wait(NULL);
  printf("{\"bytes_per_second\": %.0f, \"cpu_seconds_per_gb\": %.4f}\n",
         (double)sent.bytes / sent.seconds,
         (sent.cpu + received.cpu) / ((double)sent.bytes / 1e9));
}

static int compare(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

/* Receives exactly the bytes of vectors, spinning. */
static void receive_all(int descriptor, struct iovec *vectors, int count) {
  while (count > 0) {
    ssize_t got = readv(descriptor, vectors, count < BLOCK_LIMIT ? count : BLOCK_LIMIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (got <= 0) exit(got == 0 ? 0 : 1);
    while (count > 0 && (size_t)got >= vectors->iov_len) {
      got -= (ssize_t)vectors->iov_len;
      vectors += 1;
      count -= 1;
    }
    if (count > 0) {
      vectors->iov_base = (char *)vectors->iov_base + got;
      vectors->iov_len -= (size_t)got;
    }
  }
}

static void send_all(int descriptor, struct iovec *vectors, int count) {
  while (count > 0) {
    struct msghdr message = {.msg_iov = vectors,
                             .msg_iovlen = (size_t)(count < BLOCK_LIMIT ? count : BLOCK_LIMIT)};
    ssize_t sent = sendmsg(descriptor, &message, MSG_NOSIGNAL);
    if (sent < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (sent < 0) die("sendmsg");
    while (count > 0 && (size_t)sent >= vectors->iov_len) {
      sent -= (ssize_t)vectors->iov_len;
      vectors += 1;
      count -= 1;
    }
    if (count > 0) {
      vectors->iov_base = (char *)vectors->iov_base + sent;
      vectors->iov_len -= (size_t)sent;
    }
  }
}

static void lay_out(struct iovec *vectors, char *memory, char *frames, size_t block, int blocks,
                    size_t stride, uint64_t *seed) {
  for (int index = 0; index < blocks; index += 1) {
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    vectors[2 * index] = (struct iovec){frames + index * STATUS, STATUS};
    vectors[2 * index + 1] =
        (struct iovec){memory + (*seed >> 33) % (stride / block) * block, block};
  }
}

/* A request of `blocks` headers is answered by that many frames and scattered blocks. */
static void gathered(size_t block, int blocks, double seconds) {
  int left, right;
  size_t total = 256u << 20;
  uint64_t seed = 1;
  if (blocks < 1 || blocks > BLOCK_LIMIT) blocks = 128;
  static struct iovec vectors[2 * BLOCK_LIMIT];
  static char headers[BLOCK_LIMIT * HEADER], frames[BLOCK_LIMIT * STATUS];
  connect_pairs(1, 512 << 10, &left, &right);
  pid_t child = fork_bound();
  char *memory = touched(total);
  int mine = child == 0 ? right : left;
  close(child == 0 ? left : right);
  meet(mine);
  if (fcntl(mine, F_SETFL, O_NONBLOCK) != 0) die("fcntl");
  if (child == 0) {
    for (;;) {
      struct iovec request = {headers, (size_t)blocks * HEADER};
      receive_all(mine, &request, 1);
      lay_out(vectors, memory, frames, block, blocks, total, &seed);
      send_all(mine, vectors, 2 * blocks);
    }
  }
  enum { SAMPLES = 4000000 };
  static double samples[SAMPLES];
  size_t count = 0;
  double start = now(), last = start;
  while (last - start < seconds && count < SAMPLES) {
    struct iovec request = {headers, (size_t)blocks * HEADER};
    send_all(mine, &request, 1);
    lay_out(vectors, memory, frames, block, blocks, total, &seed);
    receive_all(mine, vectors, 2 * blocks);
    double time = now();
    samples[count++] = time - last;
    last = time;
  }
  close(mine);
  waitpid(child, NULL, 0);
  qsort(samples, count, sizeof *samples, compare);
  printf("{\"bytes_per_second\": %.0f, \"operations_per_second\": %.0f, "
         "\"p50_us\": %.2f, \"p90_us\": %.2f, \"p99_us\": %.2f, \"p999_us\": %.2f}\n",
         (double)count * (double)block * blocks / (last - start),
         (double)count * blocks / (last - start), samples[count / 2] * 1e6,
         samples[count * 90 / 100] * 1e6, samples[count * 99 / 100] * 1e6,
         samples[count * 999 / 1000] * 1e6);
}

static double seconds(int argc, char **argv, int index) {
  return argc > index ? atof(argv[index]) : 3;
}

static size_t number(int argc, char **argv, int index, size_t fallback) {
  return argc > index ? (size_t)strtoull(argv[index], NULL, 10) : fallback;
}

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  if (strcmp(what, "zerocopy") == 0) send_flags |= MSG_ZEROCOPY;
  if (strcmp(what, "bulk") == 0 || strcmp(what, "zerocopy") == 0) {
    bulk((int)number(argc, argv, 2, 2), number(argc, argv, 3, 256 << 10),
         (int)number(argc, argv, 4, 512 << 10), number(argc, argv, 5, 512 << 20),
         seconds(argc, argv, 6));
  } else if (strcmp(what, "pingpong") == 0) {
    gathered(number(argc, argv, 2, 4096), 1, seconds(argc, argv, 3));
  } else if (strcmp(what, "gathered") == 0) {
    gathered(number(argc, argv, 2, 4096), (int)number(argc, argv, 3, 128),
             seconds(argc, argv, 4));
  } else {
    fprintf(stderr, "usage: %s bulk|zerocopy|pingpong|gathered [...]\n", argv[0]);
    return 2;
  }
  return 0;
}
