/* A process out of descriptors gets that error, not that its peer is silent. */
#include <fcntl.h>
#include <sys/resource.h>

#include "mooncake.h"

#include "check.h"
#include "peer.h"

static void limit_descriptors(rlim_t count) {
  struct rlimit limit;
  REQUIRE(getrlimit(RLIMIT_NOFILE, &limit) == 0);
  limit.rlim_cur = count;
  REQUIRE(setrlimit(RLIMIT_NOFILE, &limit) == 0);
}

static int tells_it(void) {
  return strstr(mooncake_error_message(), "this process is out of descriptors") != NULL &&
         strstr(mooncake_error_message(), "is the peer alive") == NULL;
}

int main(void) {
  static unsigned char memory[4096];
  mooncake_engine_t *engine = NULL;
  mooncake_segment_t segment;
  struct rlimit before;
  REQUIRE_OK(mooncake_log_set_level(MOONCAKE_LOG_OFF));
  REQUIRE(getrlimit(RLIMIT_NOFILE, &before) == 0);
  peer_t peer = peer_start();
  REQUIRE_OK(mooncake_engine_create(NULL, &engine));
  REQUIRE_OK(mooncake_segment_open(engine, peer.name, 5000, &segment));
  mooncake_transfer_request_t request = {MOONCAKE_OPCODE_READ, segment, memory, peer.address,
                                         sizeof memory};
  int next = open("/dev/null", O_RDONLY);
  REQUIRE(next >= 0);
  close(next);
  limit_descriptors((rlim_t)next);
  CHECK_EQUAL(mooncake_transfer_sync(engine, &request, 1, 500), MOONCAKE_ERROR_TIMEOUT);
  CHECK(tells_it());
  CHECK_EQUAL(mooncake_transfer_sync(engine, &request, 1, 10000), MOONCAKE_ERROR_SYSTEM);
  CHECK(tells_it());
  CHECK(mooncake_segment_open(engine, peer.name, 500, &segment) != MOONCAKE_OK);
  CHECK(tells_it());
  limit_descriptors(before.rlim_cur);
  REQUIRE_OK(mooncake_transfer_sync(engine, &request, 1, 5000));
  CHECK(has_pattern(memory, sizeof memory, PEER_SEED));
  REQUIRE_OK(mooncake_engine_destroy(engine));
  peer_kill(&peer);
  return check_result("descriptors");
}
