// The store's header, first and alone in a C++11 file.
#include "mooncake_store.h"

static int32_t go_on(const mooncake_store_progress_t *progress, void *context) {
  *static_cast<uint64_t *>(context) = progress->done_bytes;
  return 0;
}

int main() {
  uint64_t done_bytes = 0;
  mooncake_store_get_options_t options = mooncake_store_get_options_t();
  mooncake_store_operation_t operation = mooncake_store_operation_t();
  if (mooncake_store_get_options_init(&options, sizeof options) != MOONCAKE_OK) return 1;
  if (mooncake_store_operation_init(&operation, sizeof operation) != MOONCAKE_OK) return 2;
  operation.progress = go_on;
  operation.context = &done_bytes;
  int32_t code = mooncake_store_get(nullptr, "name", nullptr, 0, &options, &operation, nullptr);
  return code == MOONCAKE_ERROR_INVALID_HANDLE ? 0 : 3;
}
