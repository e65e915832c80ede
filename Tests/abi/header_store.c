/* The store's header, first and alone in a C99 file. */
#include "mooncake_store.h"

int main(void) {
  mooncake_store_options_t options;
  mooncake_store_operation_t operation;
  if (mooncake_store_options_init(&options, (uint32_t)sizeof options) != MOONCAKE_OK) return 1;
  int32_t code = mooncake_store_operation_init(&operation, (uint32_t)sizeof operation);
  if (code != MOONCAKE_OK || operation.struct_size != sizeof operation) return 2;
  return options.drain_ms != 0 ? 0 : 3;
}
