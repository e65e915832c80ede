/* A link between two network namespaces, for kernels without netem.
 *
 *   delay_link [OPTION VALUE]... NAMESPACE_A NAMESPACE_B
 *
 *   --delay-us N      one way (0)
 *   --rate BITS       bits a second; 0 for no limit (0)
 *   --loss P          part of the packets that vanish, 0 to 1 (0)
 *   --jitter-us N     each packet takes 0 to N longer; none overtakes another (0)
 *   --reorder P       part of the packets that arrive --late-us after their time, so that others
 *                     overtake them (0)
 *   --late-us N       (1000)
 *   --seed N          of loss, jitter and reordering, each way its own (1)
 *
 * Makes the device "link0" in both namespaces (named as under /run/netns), prints "ready" once
 * addresses can be assigned, and carries packets until it is killed. In each direction, packets
 * leave one after the other at the rate; a packet that would be queued for more than QUEUE_US is
 * dropped, as by a switch. Needs CAP_NET_ADMIN and /dev/net/tun.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
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

enum { PACKET = 65536, LIMIT = 4096, QUEUE_US = 20000 };

typedef struct {
  int64_t delay, jitter, late; /* ns */
  double ns_per_byte, loss, reorder;
} link_t;

typedef struct packet {
  int64_t due;
  uint64_t number; /* of two that are due at once, the first sent goes first */
  int length;
  char bytes[PACKET];
} packet_t;

typedef struct {
  int from, to;
  const link_t *link;
  uint64_t random;
  int64_t free_at; /* when the link has sent all it took */
  int64_t last_due;
  uint64_t number;
  packet_t *packets;
  int spare[LIMIT], heap[LIMIT]; /* indices of packets: unused ones, and a heap by time */
  int spare_count, heap_count;
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

/* From 0 to below 1: xorshift64*. */
static double chance(lane_t *lane) {
  lane->random ^= lane->random >> 12;
  lane->random ^= lane->random << 25;
  lane->random ^= lane->random >> 27;
  return (double)((lane->random * 0x2545F4914F6CDD1DULL) >> 11) / 9007199254740992.0;
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

static int is_before(const lane_t *lane, int one, int other) {
  const packet_t *a = &lane->packets[one], *b = &lane->packets[other];
  return a->due != b->due ? a->due < b->due : a->number < b->number;
}

static void swap(int *one, int *other) {
  int held = *one;
  *one = *other;
  *other = held;
}

static void insert(lane_t *lane, int packet) {
  int place = lane->heap_count++;
  lane->heap[place] = packet;
  while (place > 0 && is_before(lane, lane->heap[place], lane->heap[(place - 1) / 2])) {
    swap(&lane->heap[place], &lane->heap[(place - 1) / 2]);
    place = (place - 1) / 2;
  }
}

static void remove_first(lane_t *lane) {
  lane->spare[lane->spare_count++] = lane->heap[0];
  lane->heap[0] = lane->heap[--lane->heap_count];
  for (int place = 0;;) {
    int child = 2 * place + 1;
    if (child >= lane->heap_count) return;
    if (child + 1 < lane->heap_count && is_before(lane, lane->heap[child + 1], lane->heap[child]))
      child += 1;
    if (!is_before(lane, lane->heap[child], lane->heap[place])) return;
    swap(&lane->heap[child], &lane->heap[place]);
    place = child;
  }
}

/* Reads what the device has sent. */
static void accept_packets(lane_t *lane) {
  const link_t *link = lane->link;
  while (lane->spare_count > 0) {
    int index = lane->spare[lane->spare_count - 1];
    packet_t *packet = &lane->packets[index];
    ssize_t length = read(lane->from, packet->bytes, PACKET);
    if (length <= 0) return;
    int64_t time = now();
    int64_t start = lane->free_at > time ? lane->free_at : time;
    if (start - time > QUEUE_US * 1000LL) continue;
    lane->free_at = start + (int64_t)((double)length * link->ns_per_byte);
    /* It has used the link before it is lost. */
    if (link->loss > 0 && chance(lane) < link->loss) continue;
    int64_t due = lane->free_at + link->delay;
    if (link->jitter > 0) due += (int64_t)(chance(lane) * (double)link->jitter);
    if (due < lane->last_due) due = lane->last_due;
    lane->last_due = due;
    if (link->reorder > 0 && chance(lane) < link->reorder) due += link->late;
    packet->due = due;
    packet->number = lane->number++;
    packet->length = (int)length;
    lane->spare_count -= 1;
    insert(lane, index);
  }
}

static void *carry(void *argument) {
  lane_t *lane = argument;
  for (;;) {
    accept_packets(lane);
    int64_t time = now(), wait = 1000000000;
    while (lane->heap_count > 0) {
      packet_t *packet = &lane->packets[lane->heap[0]];
      wait = packet->due - time;
      if (wait > 0) break;
      if (write(lane->to, packet->bytes, (size_t)packet->length) < 0 && errno == EAGAIN) {
        wait = 100000;
        break;
      }
      remove_first(lane);
      wait = 1000000000;
    }
    struct pollfd item = {lane->from, POLLIN, 0};
    struct timespec timeout = {wait / 1000000000, wait % 1000000000};
    /* Without room, packets are delivered first. */
    ppoll(&item, lane->spare_count > 0 ? 1 : 0, &timeout, NULL);
  }
  return NULL;
}

static void usage(const char *name) {
  fprintf(stderr,
          "usage: %s [--delay-us N] [--rate BITS] [--loss P] [--jitter-us N] [--reorder P]\n"
          "       [--late-us N] [--seed N] NAMESPACE_A NAMESPACE_B\n",
          name);
  exit(2);
}

static double number(const char *name, double least, double most) {
  char *end;
  double value = strtod(optarg, &end);
  if (*end != 0 || end == optarg || !(value >= least && value <= most)) {
    fprintf(stderr, "%s: '%s' is not a number from %g to %g\n", name, optarg, least, most);
    exit(2);
  }
  return value;
}

int main(int argc, char **argv) {
  static const struct option options[] = {
      {"delay-us", 1, NULL, 'd'}, {"rate", 1, NULL, 'r'},    {"loss", 1, NULL, 'l'},
      {"jitter-us", 1, NULL, 'j'}, {"reorder", 1, NULL, 'o'}, {"late-us", 1, NULL, 't'},
      {"seed", 1, NULL, 's'},     {NULL, 0, NULL, 0}};
  const double longest = 60e6, fastest = 1e12;
  link_t link = {.late = 1000000};
  uint64_t seed = 1;
  for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
    switch (option) {
    case 'd': link.delay = (int64_t)(number("--delay-us", 0, longest) * 1e3); break;
    case 'r': {
      double rate = number("--rate", 0, fastest);
      link.ns_per_byte = rate > 0 ? 8e9 / rate : 0;
      break;
    }
    case 'l': link.loss = number("--loss", 0, 1); break;
    case 'j': link.jitter = (int64_t)(number("--jitter-us", 0, longest) * 1e3); break;
    case 'o': link.reorder = number("--reorder", 0, 1); break;
    case 't': link.late = (int64_t)(number("--late-us", 0, longest) * 1e3); break;
    case 's': seed = (uint64_t)number("--seed", 0, 9e15); break;
    default: usage(argv[0]);
    }
  }
  if (argc - optind != 2) usage(argv[0]);
  int a = make_device(argv[optind]), b = make_device(argv[optind + 1]);
  static lane_t lanes[2];
  pthread_t threads[2];
  for (int index = 0; index < 2; index += 1) {
    lane_t *lane = &lanes[index];
    lane->from = index == 0 ? a : b;
    lane->to = index == 0 ? b : a;
    lane->link = &link;
    lane->random = (2 * seed + (uint64_t)index + 1) * 0x9E3779B97F4A7C15ULL;
    lane->packets = calloc(LIMIT, sizeof *lane->packets);
    if (lane->packets == NULL) die("memory");
    while (lane->spare_count < LIMIT) {
      lane->spare[lane->spare_count] = lane->spare_count;
      lane->spare_count += 1;
    }
  }
  puts("ready");
  fflush(stdout);
  for (int index = 0; index < 2; index += 1)
    if (pthread_create(&threads[index], NULL, carry, &lanes[index]) != 0) die("thread");
  pthread_join(threads[0], NULL);
  return 0;
}
