/* Layouts, constants and signatures, stated a second time for the compiler to compare. Built on
 * a 64-bit machine, where the numbers are part of the ABI. */
#include "mooncake.h"
#include "transfer_engine_c.h"

#include <stdio.h>

#define VALUE(constant, value) _Static_assert((constant) == (value), #constant)
#define SIZE(type, size) _Static_assert(sizeof(type) == (size), #type)
#define FIELD(type, field, offset, size) \
  _Static_assert(offsetof(type, field) == (offset), #type "." #field); \
  _Static_assert(sizeof(((type *)0)->field) == (size), #type "." #field)
#define SAME_TYPE(type, expected) \
  _Static_assert(_Generic((type)0, expected : 1, default : 0), #type)

/* ---- transfer_engine_c.h ---- */

SAME_TYPE(segment_handle_t, int32_t);
SAME_TYPE(segment_id_t, int32_t);
SAME_TYPE(batch_id_t, uint64_t);
SAME_TYPE(transfer_engine_t, void *);
SAME_TYPE(transport_t, void *);

VALUE(LOCAL_SEGMENT, 0);
VALUE(INVALID_BATCH, UINT64_MAX);
VALUE(OPCODE_READ, 0);
VALUE(OPCODE_WRITE, 1);
VALUE(STATUS_WAITING, 0);
VALUE(STATUS_PENDING, 1);
VALUE(STATUS_INVALID, 2);
VALUE(STATUS_CANCELED, 3);
VALUE(STATUS_COMPLETED, 4);
VALUE(STATUS_TIMEOUT, 5);
VALUE(STATUS_FAILED, 6);
VALUE(ERR_INVALID_ARGUMENT, -1);
VALUE(ERR_TOO_MANY_REQUESTS, -2);
VALUE(ERR_ADDRESS_NOT_REGISTERED, -3);
VALUE(ERR_BATCH_BUSY, -4);
VALUE(ERR_DEVICE_NOT_FOUND, -6);
VALUE(ERR_ADDRESS_OVERLAPPED, -7);
VALUE(ERR_DNS, -101);
VALUE(ERR_SOCKET, -102);
VALUE(ERR_MALFORMED_JSON, -103);
VALUE(ERR_REJECT_HANDSHAKE, -104);
VALUE(ERR_METADATA, -200);
VALUE(ERR_ENDPOINT, -201);
VALUE(ERR_CONTEXT, -202);
VALUE(ERR_NUMA, -300);
VALUE(ERR_CLOCK, -301);
VALUE(ERR_MEMORY, -302);
VALUE(ERR_NOT_IMPLEMENTED, -303);

SIZE(transfer_request_t, 40);
SIZE(struct transfer_request, 40);
FIELD(struct transfer_request, opcode, 0, 4);
FIELD(struct transfer_request, source, 8, 8);
FIELD(struct transfer_request, target_id, 16, 4);
FIELD(struct transfer_request, target_offset, 24, 8);
FIELD(struct transfer_request, length, 32, 8);

SIZE(transfer_status_t, 16);
FIELD(struct transfer_status, status, 0, 4);
FIELD(struct transfer_status, transferred_bytes, 8, 8);

SIZE(notify_msg_t, 16);
FIELD(struct notify_msg, name, 0, 8);
FIELD(struct notify_msg, msg, 8, 8);

SIZE(buffer_entry_t, 16);
FIELD(struct buffer_entry, addr, 0, 8);
FIELD(struct buffer_entry, length, 8, 8);

SIZE(nic_load_stat_t, 80);
FIELD(struct nic_load_stat, device_name, 0, 64);
FIELD(struct nic_load_stat, inflight_bytes, 64, 8);
FIELD(struct nic_load_stat, ewma_bandwidth_bps, 72, 8);

SIZE(segment_desc_t, 48);
FIELD(struct segment_desc, type, 0, 4);
FIELD(struct segment_desc, desc_, 8, 40);
FIELD(struct segment_desc, desc_.rdma.addr, 8, 8);
FIELD(struct segment_desc, desc_.rdma.size, 16, 8);
FIELD(struct segment_desc, desc_.rdma.location, 24, 8);
FIELD(struct segment_desc, desc_.nvmeof.file_path, 8, 8);
FIELD(struct segment_desc, desc_.nvmeof.subsystem_name, 16, 8);
FIELD(struct segment_desc, desc_.nvmeof.proto, 24, 8);
FIELD(struct segment_desc, desc_.nvmeof.ip, 32, 8);
FIELD(struct segment_desc, desc_.nvmeof.port, 40, 8);

void *createTransferEngine(const char *, const char *, const char *, uint64_t, int);
int discoverTopology(void *);
int getLocalIpAndPort(void *, char *, size_t);
void *installTransport(void *, const char *, void **);
int uninstallTransport(void *, const char *);
int32_t openSegment(void *, const char *);
int32_t openSegmentNoCache(void *, const char *);
int closeSegment(void *, int32_t);
int warmupEfaSegment(void *, const char *);
int removeLocalSegment(void *, const char *);
void destroyTransferEngine(void *);
int registerLocalMemory(void *, void *, size_t, const char *, int);
int unregisterLocalMemory(void *, void *);
int registerLocalMemoryBatch(void *, struct buffer_entry *, size_t, const char *);
int unregisterLocalMemoryBatch(void *, void **, size_t);
uint64_t allocateBatchID(void *, size_t);
int submitTransfer(void *, uint64_t, struct transfer_request *, size_t);
int submitTransferWithNotify(void *, uint64_t, struct transfer_request *, size_t,
                             struct notify_msg);
struct notify_msg *getNotifsFromEngine(void *, int *);
int freeNotifsMsgBuf(struct notify_msg *, int);
int genNotifyInEngine(void *, uint64_t, struct notify_msg);
int getTransferStatus(void *, uint64_t, size_t, struct transfer_status *);
int freeBatchID(void *, uint64_t);
int syncSegmentCache(void *);
int getNicLoadStats(void *, struct nic_load_stat *, size_t *);
void enableGracefulShutdown(void *);
int showLinks(void *, char *, size_t, int);

/* ---- mooncake.h ---- */

SAME_TYPE(mooncake_segment_t, int32_t);
SAME_TYPE(mooncake_batch_t, uint64_t);

VALUE(MOONCAKE_OK, 0);
VALUE(MOONCAKE_ERROR_INVALID_ARGUMENT, -1);
VALUE(MOONCAKE_ERROR_INVALID_HANDLE, -2);
VALUE(MOONCAKE_ERROR_NOT_REGISTERED, -3);
VALUE(MOONCAKE_ERROR_OVERLAP, -4);
VALUE(MOONCAKE_ERROR_ACCESS_DENIED, -5);
VALUE(MOONCAKE_ERROR_BUSY, -6);
VALUE(MOONCAKE_ERROR_FULL, -7);
VALUE(MOONCAKE_ERROR_OUT_OF_MEMORY, -8);
VALUE(MOONCAKE_ERROR_ADDRESS_IN_USE, -9);
VALUE(MOONCAKE_ERROR_UNRESOLVED, -10);
VALUE(MOONCAKE_ERROR_UNREACHABLE, -11);
VALUE(MOONCAKE_ERROR_PROTOCOL, -12);
VALUE(MOONCAKE_ERROR_NOT_FOUND, -13);
VALUE(MOONCAKE_ERROR_TIMEOUT, -14);
VALUE(MOONCAKE_ERROR_CANCELED, -15);
VALUE(MOONCAKE_ERROR_UNSUPPORTED, -16);
VALUE(MOONCAKE_ERROR_SYSTEM, -17);
VALUE(MOONCAKE_ERROR_EXISTS, -18);
VALUE(MOONCAKE_ERROR_NOT_HELD, -19);
VALUE(MOONCAKE_ERROR_SIZE_MISMATCH, -20);
VALUE(MOONCAKE_ERROR_DIGEST_MISMATCH, -21);
VALUE(MOONCAKE_ERROR_NO_HOLDER, -22);
VALUE(MOONCAKE_LOG_DEBUG, 0);
VALUE(MOONCAKE_LOG_INFO, 1);
VALUE(MOONCAKE_LOG_WARNING, 2);
VALUE(MOONCAKE_LOG_ERROR, 3);
VALUE(MOONCAKE_LOG_OFF, 4);
VALUE(MOONCAKE_ACCESS_LOCAL, 0);
VALUE(MOONCAKE_ACCESS_REMOTE_READ, 1);
VALUE(MOONCAKE_ACCESS_REMOTE_WRITE, 2);
VALUE(MOONCAKE_SEGMENT_LOCAL, 0);
VALUE(MOONCAKE_OPCODE_READ, 0);
VALUE(MOONCAKE_OPCODE_WRITE, 1);
VALUE(MOONCAKE_STATE_WAITING, 0);
VALUE(MOONCAKE_STATE_CANCELED, 3);
VALUE(MOONCAKE_STATE_COMPLETED, 4);
VALUE(MOONCAKE_STATE_TIMEOUT, 5);
VALUE(MOONCAKE_STATE_FAILED, 6);

SIZE(mooncake_engine_options_t, 80);
FIELD(mooncake_engine_options_t, struct_size, 0, 4);
FIELD(mooncake_engine_options_t, port, 4, 4);
FIELD(mooncake_engine_options_t, name, 8, 8);
FIELD(mooncake_engine_options_t, bind_address, 16, 8);
FIELD(mooncake_engine_options_t, advertised_address, 24, 8);
FIELD(mooncake_engine_options_t, metadata_uri, 32, 8);
FIELD(mooncake_engine_options_t, transports, 40, 8);
FIELD(mooncake_engine_options_t, default_timeout_ms, 48, 8);
FIELD(mooncake_engine_options_t, io_threads, 56, 4);
FIELD(mooncake_engine_options_t, connections_per_peer, 60, 4);
FIELD(mooncake_engine_options_t, spin_us, 64, 4);
FIELD(mooncake_engine_options_t, reserved, 68, 4);
FIELD(mooncake_engine_options_t, processors, 72, 8);

SIZE(mooncake_metadata_server_options_t, 40);
FIELD(mooncake_metadata_server_options_t, struct_size, 0, 4);
FIELD(mooncake_metadata_server_options_t, port, 4, 4);
FIELD(mooncake_metadata_server_options_t, host, 8, 8);
FIELD(mooncake_metadata_server_options_t, directory, 16, 8);
FIELD(mooncake_metadata_server_options_t, maximum_bytes, 24, 8);
FIELD(mooncake_metadata_server_options_t, token, 32, 8);

SIZE(mooncake_buffer_t, 16);
FIELD(mooncake_buffer_t, address, 0, 8);
FIELD(mooncake_buffer_t, length, 8, 8);

SIZE(mooncake_remote_buffer_t, 24);
FIELD(mooncake_remote_buffer_t, address, 0, 8);
FIELD(mooncake_remote_buffer_t, length, 8, 8);
FIELD(mooncake_remote_buffer_t, access, 16, 4);
FIELD(mooncake_remote_buffer_t, reserved, 20, 4);

SIZE(mooncake_transfer_request_t, 32);
FIELD(mooncake_transfer_request_t, opcode, 0, 4);
FIELD(mooncake_transfer_request_t, segment, 4, 4);
FIELD(mooncake_transfer_request_t, source, 8, 8);
FIELD(mooncake_transfer_request_t, target_offset, 16, 8);
FIELD(mooncake_transfer_request_t, length, 24, 8);

SIZE(mooncake_transfer_status_t, 16);
FIELD(mooncake_transfer_status_t, state, 0, 4);
FIELD(mooncake_transfer_status_t, error, 4, 4);
FIELD(mooncake_transfer_status_t, transferred_bytes, 8, 8);

SIZE(mooncake_batch_status_t, 40);
FIELD(mooncake_batch_status_t, state, 0, 4);
FIELD(mooncake_batch_status_t, error, 4, 4);
FIELD(mooncake_batch_status_t, submitted_count, 8, 8);
FIELD(mooncake_batch_status_t, completed_count, 16, 8);
FIELD(mooncake_batch_status_t, terminal_count, 24, 8);
FIELD(mooncake_batch_status_t, transferred_bytes, 32, 8);

SIZE(mooncake_notification_t, 16);
FIELD(mooncake_notification_t, name, 0, 8);
FIELD(mooncake_notification_t, message, 8, 8);

/* ---- mooncake_store.h ---- */

VALUE(MOONCAKE_PHASE_LOCATING, 0);
VALUE(MOONCAKE_PHASE_HASHING, 1);
VALUE(MOONCAKE_PHASE_TRANSFERRING, 2);
VALUE(MOONCAKE_PHASE_PUBLISHING, 3);
VALUE(MOONCAKE_PHASE_DRAINING, 4);
VALUE(MOONCAKE_CHANGE_APPEARED, 0);
VALUE(MOONCAKE_CHANGE_CHANGED, 1);
VALUE(MOONCAKE_CHANGE_VANISHED, 2);

SIZE(mooncake_store_options_t, 24);
FIELD(mooncake_store_options_t, struct_size, 0, 4);
FIELD(mooncake_store_options_t, reserved, 4, 4);
FIELD(mooncake_store_options_t, metadata_uri, 8, 8);
FIELD(mooncake_store_options_t, drain_ms, 16, 8);

SIZE(mooncake_store_progress_t, 40);
FIELD(mooncake_store_progress_t, phase, 0, 4);
FIELD(mooncake_store_progress_t, reserved, 4, 4);
FIELD(mooncake_store_progress_t, done_bytes, 8, 8);
FIELD(mooncake_store_progress_t, total_bytes, 16, 8);
FIELD(mooncake_store_progress_t, active_holder_count, 24, 8);
FIELD(mooncake_store_progress_t, holder_count, 32, 8);

SIZE(mooncake_store_operation_t, 40);
FIELD(mooncake_store_operation_t, struct_size, 0, 4);
FIELD(mooncake_store_operation_t, reserved, 4, 4);
FIELD(mooncake_store_operation_t, timeout_ms, 8, 8);
FIELD(mooncake_store_operation_t, cancellation, 16, 8);
FIELD(mooncake_store_operation_t, progress, 24, 8);
FIELD(mooncake_store_operation_t, context, 32, 8);

SIZE(mooncake_payload_info_t, 80);
FIELD(mooncake_payload_info_t, name, 0, 8);
FIELD(mooncake_payload_info_t, version, 8, 8);
FIELD(mooncake_payload_info_t, size, 16, 8);
FIELD(mooncake_payload_info_t, shard_bytes, 24, 8);
FIELD(mooncake_payload_info_t, shard_count, 32, 8);
FIELD(mooncake_payload_info_t, buffer_count, 40, 8);
FIELD(mooncake_payload_info_t, buffer_sizes, 48, 8);
FIELD(mooncake_payload_info_t, holder_count, 56, 8);
FIELD(mooncake_payload_info_t, published_ms, 64, 8);
FIELD(mooncake_payload_info_t, is_writable, 72, 4);
FIELD(mooncake_payload_info_t, reserved, 76, 4);

SIZE(mooncake_payload_holder_t, 24);
FIELD(mooncake_payload_holder_t, segment, 0, 8);
FIELD(mooncake_payload_holder_t, version, 8, 8);
FIELD(mooncake_payload_holder_t, is_origin, 16, 4);
FIELD(mooncake_payload_holder_t, is_complete, 20, 4);

SIZE(mooncake_payload_source_t, 32);
FIELD(mooncake_payload_source_t, segment, 0, 8);
FIELD(mooncake_payload_source_t, bytes, 8, 8);
FIELD(mooncake_payload_source_t, corrupt_shard_count, 16, 8);
FIELD(mooncake_payload_source_t, is_origin, 24, 4);
FIELD(mooncake_payload_source_t, reserved, 28, 4);

SIZE(mooncake_store_report_t, 80);
FIELD(mooncake_store_report_t, payload_count, 0, 8);
FIELD(mooncake_store_report_t, payloads, 8, 8);
FIELD(mooncake_store_report_t, holder_count, 16, 8);
FIELD(mooncake_store_report_t, holders, 24, 8);
FIELD(mooncake_store_report_t, buffer_count, 32, 8);
FIELD(mooncake_store_report_t, buffers, 40, 8);
FIELD(mooncake_store_report_t, source_count, 48, 8);
FIELD(mooncake_store_report_t, sources, 56, 8);
FIELD(mooncake_store_report_t, duration_ns, 64, 8);
FIELD(mooncake_store_report_t, is_verified, 72, 4);
FIELD(mooncake_store_report_t, reserved, 76, 4);

SIZE(mooncake_store_register_options_t, 32);
FIELD(mooncake_store_register_options_t, struct_size, 0, 4);
FIELD(mooncake_store_register_options_t, create_only, 4, 4);
FIELD(mooncake_store_register_options_t, shard_bytes, 8, 8);
FIELD(mooncake_store_register_options_t, location, 16, 8);
FIELD(mooncake_store_register_options_t, writable, 24, 4);
FIELD(mooncake_store_register_options_t, reserved, 28, 4);

SIZE(mooncake_store_get_options_t, 32);
FIELD(mooncake_store_get_options_t, struct_size, 0, 4);
FIELD(mooncake_store_get_options_t, follow_versions, 4, 4);
FIELD(mooncake_store_get_options_t, version, 8, 8);
FIELD(mooncake_store_get_options_t, location, 16, 8);
FIELD(mooncake_store_get_options_t, receive_only, 24, 4);
FIELD(mooncake_store_get_options_t, reserved, 28, 4);

int main(void) {
  printf("layouts, constants and signatures are as published\n");
  return 0;
}
