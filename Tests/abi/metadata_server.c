/* The metadata server of mooncake.h: engines of one process find each other by name through it,
 * its contents survive a restart, and no argument or handle crashes the process. */
#include <arpa/inet.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "mooncake.h"

#include "check.h"

enum { LENGTH = 64 << 10, BOTH_RIGHTS = 3 };

static mooncake_metadata_server_options_t defaults(void) {
  mooncake_metadata_server_options_t options;
  REQUIRE_OK(mooncake_metadata_server_options_init(&options, sizeof options));
  return options;
}

static mooncake_engine_t *create_engine(const char *uri, const char *name) {
  mooncake_engine_options_t options;
  mooncake_engine_t *engine = NULL;
  REQUIRE_OK(mooncake_engine_options_init(&options, sizeof options));
  options.metadata_uri = uri;
  options.name = name;
  REQUIRE_OK(mooncake_engine_create(&options, &engine));
  return engine;
}

static void find_each_other(const char *uri) {
  unsigned char *memory = (unsigned char *)new_pages(2 * LENGTH);
  mooncake_engine_t *target = create_engine(uri, "a target, by name");
  mooncake_engine_t *actor = create_engine(uri, "actor");
  mooncake_segment_t segment = 0;
  mooncake_transfer_request_t request;
  char name[64];
  REQUIRE_OK(mooncake_engine_name(target, name, sizeof name, NULL));
  CHECK(strcmp(name, "a target, by name") == 0);
  REQUIRE_OK(mooncake_memory_register(target, memory + LENGTH, LENGTH, NULL, BOTH_RIGHTS));
  REQUIRE_OK(mooncake_segment_open(actor, "a target, by name", 5000, &segment));
  memset(&request, 0, sizeof request);
  request.opcode = MOONCAKE_OPCODE_WRITE;
  request.segment = segment;
  request.source = memory;
  request.target_offset = (uint64_t)(uintptr_t)(memory + LENGTH);
  request.length = LENGTH;
  fill_pattern(memory, LENGTH, 11);
  REQUIRE_OK(mooncake_transfer_sync(actor, &request, 1, 5000));
  CHECK(has_pattern(memory + LENGTH, LENGTH, 11));
  REQUIRE_OK(mooncake_peer_probe(actor, "a target, by name", 5000));
  REQUIRE_OK(mooncake_engine_destroy(target));
  CHECK_EQUAL(mooncake_segment_open(actor, "a target, by name", 5000, &segment),
              MOONCAKE_ERROR_NOT_FOUND);
  CHECK(strstr(mooncake_error_message(), uri) != NULL);
  REQUIRE_OK(mooncake_engine_destroy(actor));
  free(memory);
}

static void serve(const char *directory) {
  mooncake_metadata_server_options_t options = defaults();
  mooncake_metadata_server_t *server = NULL;
  mooncake_metadata_server_t *other = NULL;
  uint32_t port = 0;
  uint64_t length = 0;
  char uri[128];
  options.directory = directory;
  REQUIRE_OK(mooncake_metadata_server_start(&options, &server));
  REQUIRE_OK(mooncake_metadata_server_port(server, &port));
  REQUIRE_OK(mooncake_metadata_server_uri(server, uri, sizeof uri, &length));
  CHECK(port != 0 && length == strlen(uri) && strncmp(uri, "http://127.0.0.1:", 17) == 0);
  find_each_other(uri);
  if (directory) {
    CHECK_EQUAL(mooncake_metadata_server_start(&options, &other), MOONCAKE_ERROR_SYSTEM);
  }
  options.directory = NULL;
  options.port = port;
  CHECK_EQUAL(mooncake_metadata_server_start(&options, &other), MOONCAKE_ERROR_ADDRESS_IN_USE);
  CHECK(other == NULL);
  REQUIRE_OK(mooncake_metadata_server_stop(server));
  CHECK_EQUAL(mooncake_metadata_server_stop(server), MOONCAKE_ERROR_INVALID_HANDLE);
  CHECK_EQUAL(mooncake_metadata_server_port(server, &port), MOONCAKE_ERROR_INVALID_HANDLE);
  REQUIRE_OK(mooncake_metadata_server_start(&options, &server));
  find_each_other(uri);
  REQUIRE_OK(mooncake_metadata_server_stop(server));
}

static void put(uint32_t port, const char *key, size_t length) {
  struct sockaddr_in address;
  int descriptor = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  char *value = calloc(length, 1);
  char text[200];
  memset(&address, 0, sizeof address);
  address.sin_family = AF_INET;
  address.sin_port = htons((uint16_t)port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  REQUIRE(descriptor >= 0 && value);
  REQUIRE(connect(descriptor, (struct sockaddr *)&address, sizeof address) == 0);
  int count = snprintf(text, sizeof text,
                       "PUT /metadata?key=%s HTTP/1.1\r\nHost: h\r\nContent-Length: %zu\r\n\r\n",
                       key, length);
  REQUIRE(send(descriptor, text, (size_t)count, 0) == count);
  REQUIRE(send(descriptor, value, length, 0) == (ssize_t)length);
  REQUIRE(recv(descriptor, text, sizeof text, 0) > 12);
  CHECK(strncmp(text, "HTTP/1.1 200", 12) == 0);
  close(descriptor);
  free(value);
}

/* A start that would lose contents is refused, and loses nothing. */
static void smaller_limit(const char *directory) {
  mooncake_metadata_server_options_t options = defaults();
  mooncake_metadata_server_t *server = NULL;
  uint32_t port = 0;
  options.directory = directory;
  REQUIRE_OK(mooncake_metadata_server_start(&options, &server));
  REQUIRE_OK(mooncake_metadata_server_port(server, &port));
  put(port, "one", 700000);
  put(port, "two", 700000);
  REQUIRE_OK(mooncake_metadata_server_stop(server));
  options.maximum_bytes = 1 << 20;
  server = NULL;
  CHECK_EQUAL(mooncake_metadata_server_start(&options, &server), MOONCAKE_ERROR_INVALID_ARGUMENT);
  CHECK(server == NULL);
  CHECK(strstr(mooncake_error_message(), "2MiB or more (maximum_bytes in C)") != NULL);
  options.maximum_bytes = 2 << 20;
  REQUIRE_OK(mooncake_metadata_server_start(&options, &server));
  REQUIRE_OK(mooncake_metadata_server_stop(server));
}

static void bad_arguments(void) {
  mooncake_metadata_server_options_t options = defaults();
  mooncake_metadata_server_t *server = NULL;
  mooncake_metadata_server_t *foreign = (mooncake_metadata_server_t *)&options;
  uint32_t port = 0;
  struct {
    mooncake_metadata_server_options_t options;
    uint64_t later;
  } larger = {options, 1};
  CHECK_EQUAL(mooncake_metadata_server_options_init(NULL, sizeof options),
              MOONCAKE_ERROR_INVALID_ARGUMENT);
  CHECK_EQUAL(mooncake_metadata_server_options_init(&options, 4), MOONCAKE_ERROR_INVALID_ARGUMENT);
  CHECK_EQUAL(mooncake_metadata_server_start(&options, NULL), MOONCAKE_ERROR_INVALID_ARGUMENT);
  larger.options.struct_size = sizeof larger;
  CHECK_EQUAL(mooncake_metadata_server_start(&larger.options, &server),
              MOONCAKE_ERROR_UNSUPPORTED);
  options.port = 65536;
  CHECK_EQUAL(mooncake_metadata_server_start(&options, &server), MOONCAKE_ERROR_INVALID_ARGUMENT);
  options = defaults();
  options.host = "localhost";
  CHECK_EQUAL(mooncake_metadata_server_start(&options, &server), MOONCAKE_ERROR_INVALID_ARGUMENT);
  options.host = "";
  CHECK_EQUAL(mooncake_metadata_server_start(&options, &server), MOONCAKE_ERROR_INVALID_ARGUMENT);
  options = defaults();
  options.directory = "/nonexistent/folder";
  CHECK_EQUAL(mooncake_metadata_server_start(&options, &server), MOONCAKE_ERROR_SYSTEM);
  options = defaults();
  options.maximum_bytes = 5;
  CHECK_EQUAL(mooncake_metadata_server_start(&options, &server), MOONCAKE_ERROR_INVALID_ARGUMENT);
  CHECK(server == NULL);
  CHECK_EQUAL(mooncake_metadata_server_stop(NULL), MOONCAKE_ERROR_INVALID_HANDLE);
  CHECK_EQUAL(mooncake_metadata_server_stop(foreign), MOONCAKE_ERROR_INVALID_HANDLE);
  CHECK_EQUAL(mooncake_metadata_server_uri(foreign, NULL, 0, NULL), MOONCAKE_ERROR_INVALID_HANDLE);
  CHECK_EQUAL(mooncake_metadata_server_port(foreign, &port), MOONCAKE_ERROR_INVALID_HANDLE);
}

/* A child can have its own servers but cannot use its parent's, and the parent does not notice. */
static void forked(void) {
  mooncake_metadata_server_t *server = NULL;
  int status = 0;
  char uri[128];
  REQUIRE_OK(mooncake_metadata_server_start(NULL, &server));
  REQUIRE_OK(mooncake_metadata_server_uri(server, uri, sizeof uri, NULL));
  fflush(NULL);
  pid_t pid = fork();
  REQUIRE(pid >= 0);
  if (pid == 0) {
    mooncake_metadata_server_t *own = NULL;
    char own_uri[128];
    alarm(20);
    check_failure_count = 0;
    CHECK_EQUAL(mooncake_metadata_server_stop(server), MOONCAKE_ERROR_INVALID_HANDLE);
    REQUIRE_OK(mooncake_metadata_server_start(NULL, &own));
    CHECK(own != server);
    REQUIRE_OK(mooncake_metadata_server_uri(own, own_uri, sizeof own_uri, NULL));
    find_each_other(own_uri);
    REQUIRE_OK(mooncake_metadata_server_stop(own));
    _exit(check_result("metadata_server (child)"));
  }
  REQUIRE(waitpid(pid, &status, 0) == pid);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  find_each_other(uri);
  REQUIRE_OK(mooncake_metadata_server_stop(server));
}

int main(void) {
  char directory[] = "/tmp/metadata-XXXXXX";
  char command[64];
  REQUIRE(mkdtemp(directory) != NULL);
  bad_arguments();
  serve(NULL);
  serve(directory);
  smaller_limit(directory);
  forked();
  snprintf(command, sizeof command, "rm -r %s", directory);
  CHECK_EQUAL(system(command), 0);
  return check_result("metadata_server");
}
