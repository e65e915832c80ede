/* The native header, first and alone in a C99 file. */
#include "mooncake.h"

int main(void) {
  uint32_t compiled = MOONCAKE_VERSION_MAJOR * 1000000u + MOONCAKE_VERSION_MINOR * 1000u +
                      MOONCAKE_VERSION_PATCH;
  mooncake_engine_options_t options;
  if (mooncake_engine_options_init(&options, (uint32_t)sizeof options) != MOONCAKE_OK) return 1;
  if (options.struct_size != sizeof options) return 2;
  return mooncake_version_number() == compiled ? 0 : 3;
}
