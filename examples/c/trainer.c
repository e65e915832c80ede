/* Offers a model file to inferencers: maps it, registers it for remote reads and serves it until
 * SIGINT or SIGTERM, or the end of stdin if that is a terminal, pipe or socket. */
#define _GNU_SOURCE
#include "mooncake_loader.h"
#include "sha256.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char usage[] =
    "usage: trainer [options] MODEL\n"
    "Serves the file MODEL to inferencers and prints where it is:\n"
    "`segment NAME buffer ADDRESS LENGTH sha256 HASH`.\n"
    "  --library PATH    libmooncake.so to load (default: $MOONCAKE_LIBRARY or libmooncake.so.0)\n"
    "  --bind ADDRESS    numeric address to listen on (default: 127.0.0.1)\n"
    "  --advertise HOST  host that inferencers connect to (default: the address listened on)\n"
    "  --port PORT       RPC port (default: the system chooses)\n"
    "  --info FILE       also write the printed line into FILE\n";

typedef struct trainer {
  mooncake_library_t library;
  mooncake_engine_t *engine;
  const char *model_path;
  const char *info_path;
  const char *library_path;
  const char *bind_address;
  const char *advertised_address;
  uint32_t port;
  void *model;
  size_t model_length;
  int signals;
} trainer_t;

static int fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("trainer: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  return -1;
}

static int fail_mooncake(const trainer_t *trainer, const char *what, int32_t code) {
  return fail("%s: %s (%s)", what, trainer->library.error_message(),
              trainer->library.error_name(code));
}

static int parse_arguments(trainer_t *trainer, int argc, char **argv) {
  static const struct option options[] = {
      {"library", required_argument, NULL, 'l'}, {"bind", required_argument, NULL, 'b'},
      {"advertise", required_argument, NULL, 'a'}, {"port", required_argument, NULL, 'p'},
      {"info", required_argument, NULL, 'i'},    {"help", no_argument, NULL, 'h'},
      {NULL, 0, NULL, 0}};
  int option;
  while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
    char *end = NULL;
    unsigned long port;
    switch (option) {
      case 'l': trainer->library_path = optarg; break;
      case 'b': trainer->bind_address = optarg; break;
      case 'a': trainer->advertised_address = optarg; break;
      case 'i': trainer->info_path = optarg; break;
      case 'p':
        port = strtoul(optarg, &end, 10);
        if (*optarg == '\0' || *end != '\0' || port > 65535) {
          return fail("--port %s is no number from 0 to 65535", optarg);
        }
        trainer->port = (uint32_t)port;
        break;
      case 'h': fputs(usage, stdout); exit(0);
      default: fputs(usage, stderr); return -1;
    }
  }
  if (optind != argc - 1) {
    fputs(usage, stderr);
    return -1;
  }
  trainer->model_path = argv[optind];
  return 0;
}

static int map_model(trainer_t *trainer) {
  int file = open(trainer->model_path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return fail("cannot open %s: %s", trainer->model_path, strerror(errno));
  struct stat status;
  int result = 0;
  if (fstat(file, &status) != 0) {
    result = fail("cannot read %s: %s", trainer->model_path, strerror(errno));
  } else if (!S_ISREG(status.st_mode) || status.st_size == 0) {
    result = fail("%s is empty or no file", trainer->model_path);
  } else {
    trainer->model_length = (size_t)status.st_size;
    trainer->model = mmap(NULL, trainer->model_length, PROT_READ, MAP_PRIVATE, file, 0);
    if (trainer->model == MAP_FAILED) {
      trainer->model = NULL;
      result = fail("cannot map %s: %s", trainer->model_path, strerror(errno));
    }
  }
  close(file);
  return result;
}

/* Blocks the signals in all threads of the process; they arrive at the descriptor instead. */
static int take_signals(trainer_t *trainer) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  sigprocmask(SIG_BLOCK, &signals, NULL);
  trainer->signals = signalfd(-1, &signals, SFD_CLOEXEC);
  return trainer->signals < 0 ? fail("cannot wait for signals: %s", strerror(errno)) : 0;
}

static int start(trainer_t *trainer) {
  const mooncake_library_t *library = &trainer->library;
  mooncake_engine_options_t options;
  int32_t code = library->engine_options_init(&options, sizeof options);
  if (code != MOONCAKE_OK) return fail_mooncake(trainer, "options", code);
  options.bind_address = trainer->bind_address;
  options.advertised_address = trainer->advertised_address;
  options.port = trainer->port;
  code = library->engine_create(&options, &trainer->engine);
  if (code != MOONCAKE_OK) return fail_mooncake(trainer, "cannot start an engine", code);
  code = library->memory_register(trainer->engine, trainer->model, trainer->model_length, NULL,
                                  MOONCAKE_ACCESS_REMOTE_READ);
  return code == MOONCAKE_OK ? 0 : fail_mooncake(trainer, "cannot register the model", code);
}

/* Writes a temporary file and renames it, so that a reader never sees half a line. */
static int write_info(const char *path, const char *line) {
  char temporary[4096];
  int length = snprintf(temporary, sizeof temporary, "%s.%ld.tmp", path, (long)getpid());
  if (length < 0 || (size_t)length >= sizeof temporary) {
    return fail("%s: the path is too long", path);
  }
  FILE *file = fopen(temporary, "w");
  if (file == NULL) return fail("cannot write %s: %s", temporary, strerror(errno));
  int written = fputs(line, file) >= 0;
  if (fclose(file) != 0 || !written || rename(temporary, path) != 0) {
    int reason = errno;
    unlink(temporary);
    return fail("cannot write %s: %s", path, strerror(reason));
  }
  return 0;
}

static int announce(trainer_t *trainer) {
  char name[1024];
  char hash[SHA256_TEXT_SIZE];
  char line[1280];
  int32_t code = trainer->library.engine_name(trainer->engine, name, sizeof name, NULL);
  if (code != MOONCAKE_OK) return fail_mooncake(trainer, "name of the engine", code);
  if (sha256_text(trainer->model, trainer->model_length, hash) != 0) return fail("SHA-256 failed");
  snprintf(line, sizeof line, "segment %s buffer 0x%" PRIxPTR " %zu sha256 %s\n", name,
           (uintptr_t)trainer->model, trainer->model_length, hash);
  /* Written before the line is printed, so that whoever sees the line finds the file. */
  if (trainer->info_path != NULL && write_info(trainer->info_path, line) != 0) return -1;
  fputs(line, stdout);
  return fflush(stdout) == 0 ? 0 : fail("cannot print: %s", strerror(errno));
}

/* A service manager, or `&` in a script, connects it to /dev/null, whose end means nothing. */
static int input_matters(void) {
  struct stat status;
  if (isatty(STDIN_FILENO)) return 1;
  if (fstat(STDIN_FILENO, &status) != 0) return 0;
  return S_ISFIFO(status.st_mode) || S_ISSOCK(status.st_mode);
}

static void serve(const trainer_t *trainer) {
  struct pollfd descriptors[2] = {{trainer->signals, POLLIN, 0},
                                  {input_matters() ? STDIN_FILENO : -1, POLLIN, 0}};
  for (;;) {
    if (poll(descriptors, 2, -1) < 0 && errno != EINTR) return;
    if (descriptors[0].revents != 0) return;
    if (descriptors[1].revents != 0) {
      char bytes[256];
      ssize_t count = read(STDIN_FILENO, bytes, sizeof bytes);
      if (count == 0 || (count < 0 && errno != EINTR && errno != EAGAIN)) return;
    }
  }
}

/* Prints the engine's counters that are not 0. */
static void report(const trainer_t *trainer, double seconds) {
  static char text[64 << 10];
  printf("trainer: served for %.1f s\n", seconds);
  if (trainer->library.engine_metrics(trainer->engine, text, sizeof text, NULL) == MOONCAKE_OK) {
    for (char *line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) {
      const char *value = strrchr(line, ' ');
      if (*line != '#' && value != NULL && strtod(value, NULL) != 0) printf("  %s\n", line);
    }
  }
  fflush(stdout);
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static int run(trainer_t *trainer) {
  if (map_model(trainer) != 0 || start(trainer) != 0 || announce(trainer) != 0) return -1;
  double begin = now();
  serve(trainer);
  report(trainer, now() - begin);
  return 0;
}

int main(int argc, char **argv) {
  trainer_t trainer;
  char error[1024];
  memset(&trainer, 0, sizeof trainer);
  if (parse_arguments(&trainer, argc, argv) != 0) return 2;
  if (take_signals(&trainer) != 0) return 1;
  if (mooncake_library_open(&trainer.library, trainer.library_path, error, sizeof error) != 0) {
    fail("%s", error);
    return 1;
  }
  int result = run(&trainer);
  /* Destroys the engine before the memory that it serves. */
  if (trainer.engine != NULL) trainer.library.engine_destroy(trainer.engine);
  if (trainer.model != NULL) munmap(trainer.model, trainer.model_length);
  mooncake_library_close(&trainer.library);
  close(trainer.signals);
  return result == 0 ? 0 : 1;
}
