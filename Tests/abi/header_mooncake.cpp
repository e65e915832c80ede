// The native header, first and alone in a C++11 file.
#include "mooncake.h"

int main() {
  mooncake_engine_options_t options;
  if (mooncake_engine_options_init(&options, sizeof options) != MOONCAKE_OK) return 1;
  return options.struct_size == sizeof options ? 0 : 2;
}
