/* The drop-in header, first and alone in a C99 file. */
#include "transfer_engine_c.h"

int main(void) {
  segment_handle_t handle = LOCAL_SEGMENT;
  segment_id_t segment = handle;
  batch_id_t batch = INVALID_BATCH;
  if (closeSegment(NULL, segment) != ERR_INVALID_ARGUMENT) return 1;
  return freeBatchID(NULL, batch) == 1 ? 0 : 2;
}
