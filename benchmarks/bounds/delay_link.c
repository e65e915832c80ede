/* A link with delay and rate limit between two network namespaces, for kernels without netem.
 *
 *   delay_link NAMESPACE_A NAMESPACE_B DELAY_US BITS_PER_SECOND
 *
 * Makes the device "link0" in both (named as under /run/netns), prints "ready" once addresses can
 * be assigned, and carries packets until it is killed. In each direction, packets leave one after
 * the other at the given rate and arrive DELAY_US later; a packet that would be queued for more
 * than QUEUE_US is dropped, as by a switch. Needs CAP_NET_ADMIN and /dev/net/tun.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { PACKET = 65536, RING = 4096, QUEUE_US = 20000 };

typedef struct {
  int from, to;
  int64_t delay;         /* ns */
  double ns_per_byte;
  int64_t free_at;       /* when the link has sent all it took */
  struct {
    int64_t due;
    int length;
    char bytes[PACKET];
  } *ring;
  unsigned head, tail;
} lane_t;

static int64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void die(const char *what) {
  perror(what);
  exit(1);
}

static int make_device(const char *namespace) {
  char path[256];
  snprintf(path, sizeof path, "/run/netns/%s", namespace);
  int space = open(path, O_RDONLY | O_CLOEXEC);
  if (space < 0) die(path);
  if (setns(space, CLONE_NEWNET) != 0) die("setns");
  close(space);
  int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  if (device < 0) die("/dev/net/tun");
  struct ifreq request;
  memset(&request, 0, sizeof request);
  request.ifr_flags = IFF_TUN | IFF_NO_PI;
  strcpy(request.ifr_name, "link0");
  if (ioctl(device, TUNSETIFF, &request) != 0) die("TUNSETIFF");
  return device;
}

/* Reads what the device has sent. */
static void accept_packets(lane_t *lane) {
  while (lane->tail - lane->head < RING) {
    int slot = (int)(lane->tail % RING);
    ssize_t length = read(lane->from, lane->ring[slot].bytes, PACKET);
    if (length <= 0) return;
    int64_t time = now();
    int64_t start = lane->free_at > time ? lane->free_at : time;
    if (start - time > QUEUE_US * 1000LL) continue;
    lane->free_at = start + (int64_t)((double)length * lane->ns_per_byte);
    lane->ring[slot].due = lane->free_at + lane->delay;
    lane->ring[slot].length = (int)length;
    lane->tail += 1;
  }
}

static void *carry(void *argument) {
  lane_t *lane = argument;
  for (;;) {
    accept_packets(lane);
    int64_t time = now(), wait = 1000000000;
    while (lane->head != lane->tail) {
      int slot = (int)(lane->head % RING);
      wait = lane->ring[slot].due - time;
      if (wait > 0) break;
      if (write(lane->to, lane->ring[slot].bytes, (size_t)lane->ring[slot].length) < 0 &&
          errno == EAGAIN) {
        wait = 100000;
        break;
      }
      lane->head += 1;
      wait = 1000000000;
    }
    struct pollfd item = {lane->from, POLLIN, 0};
    struct timespec timeout = {wait / 1000000000, wait % 1000000000};
    /* A full ring is emptied first. */
    ppoll(&item, lane->tail - lane->head < RING ? 1 : 0, &timeout, NULL);
  }
  return NULL;
}

int main(int argc, char **argv) {
  if (argc != 5) {
    fprintf(stderr, "usage: %s NAMESPACE_A NAMESPACE_B DELAY_US BITS_PER_SECOND\n", argv[0]);
    return 2;
  }
  int a = make_device(argv[1]), b = make_device(argv[2]);
  lane_t lanes[2] = {{.from = a, .to = b}, {.from = b, .to = a}};
  pthread_t threads[2];
  for (int index = 0; index < 2; index += 1) {
    lanes[index].delay = atoll(argv[3]) * 1000;
    lanes[index].ns_per_byte = 8e9 / atof(argv[4]);
    lanes[index].ring = calloc(RING, sizeof *lanes[index].ring);
    if (lanes[index].ring == NULL) die("memory");
  }
  puts("ready");
  fflush(stdout);
  for (int index = 0; index < 2; index += 1)
    if (pthread_create(&threads[index], NULL, carry, &lanes[index]) != 0) die("thread");
  pthread_join(threads[0], NULL);
  return 0;
}
