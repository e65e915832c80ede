/* Both headers in one C99 file, each twice. */
#include "mooncake.h"
#include "transfer_engine_c.h"
#include "mooncake.h"
#include "transfer_engine_c.h"

int main(void) {
  mooncake_transfer_request_t native;
  transfer_request_t compatible;
  native.opcode = MOONCAKE_OPCODE_WRITE;
  compatible.opcode = OPCODE_WRITE;
  return native.opcode == compatible.opcode ? 0 : 1;
}
