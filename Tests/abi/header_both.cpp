// Both headers in one C++11 file, the other way round.
#include "transfer_engine_c.h"
#include "mooncake.h"

int main() {
  mooncake_transfer_request_t native = mooncake_transfer_request_t();
  transfer_request_t compatible = transfer_request_t();
  native.opcode = MOONCAKE_OPCODE_READ;
  compatible.opcode = OPCODE_READ;
  return native.opcode == compatible.opcode ? 0 : 1;
}
