/*
 * The drop-in interface: programs written for Mooncake's transfer_engine_c.h compile against this
 * header and run on libmooncake without a change. New programs should use mooncake.h.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * Rules that hold for every function here, unless it says otherwise:
 *  - It may be called from any thread at any time and returns without waiting for a peer.
 *  - Strings, arrays and structs passed in are copied before it returns. The source of a request
 *    must stay valid until its status is terminal, a registered range until it is unregistered.
 *  - A null, wrong or already destroyed engine is an error (never a crash): ERR_INVALID_ARGUMENT,
 *    or 1 from a batch call. An engine created before fork() is such a wrong one in the child.
 *  - A transport_t is only a mark that installTransport() succeeded; there is nothing to free.
 *  - mooncake_error_message() of mooncake.h explains the calling thread's last failure. An engine
 *    of one header is a wrong one to the functions of the other.
 *
 * Two error spaces:
 *  - Engine, memory, segment and notification calls return 0 or a negative ERR_* value.
 *  - submitTransfer(), submitTransferWithNotify(), getTransferStatus() and freeBatchID() return 0
 *    or a positive code: 1 invalid argument, 2 too many requests for the batch, 3 address not
 *    registered, 4 batch busy, 8 the target's protocol is not installed, 101 name resolution,
 *    102 socket, 103 malformed JSON, 104 handshake rejected, 200 metadata, 302 memory,
 *    999 not implemented.
 *
 * What this implementation adds to the original, in general:
 *  - Nothing a caller passes or a peer sends ends the process; malformed JSON closes a connection.
 *  - Every transfer has a deadline, MC_TRANSFER_TIMEOUT seconds (default 30), over connecting,
 *    queueing, moving and retrying. One that misses it ends as STATUS_FAILED, which is terminal:
 *    afterwards the library never touches its memory, and the batch can be freed.
 *  - Peers reach only registered memory, with the rights of its registration.
 *  - A local segment starts empty, also where a crashed process of the same name left entries.
 */
#ifndef TRANSFER_ENGINE_C_H
#define TRANSFER_ENGINE_C_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Types and constants ------------------------------------------------------------------ */

/* Identifies an opened segment; the two names mean the same. Macros, as in the original. */
#define segment_handle_t int32_t
#define segment_id_t int32_t

/* Identifies a batch of transfers. */
#define batch_id_t uint64_t

/* The calling engine's own segment. */
#define LOCAL_SEGMENT (0)

/* What allocateBatchID() returns on failure: all bits set. */
#define INVALID_BATCH 0xFFFFFFFFFFFFFFFFull

/* Opcodes, seen from the initiator: a read fills source, a write sends it. */
#define OPCODE_READ (0)
#define OPCODE_WRITE (1)

/* Status of a transfer. COMPLETED and FAILED are terminal: every transfer ends as one of them. The
 * others but WAITING exist for source compatibility and are never reported. */
#define STATUS_WAITING (0)
#define STATUS_PENDING (1)
#define STATUS_INVALID (2)
#define STATUS_CANCELED (3)
#define STATUS_COMPLETED (4)
#define STATUS_TIMEOUT (5)
#define STATUS_FAILED (6)

/* Errors of the calls that are no batch calls. */
#define ERR_INVALID_ARGUMENT (-1)
#define ERR_TOO_MANY_REQUESTS (-2)
#define ERR_ADDRESS_NOT_REGISTERED (-3)
#define ERR_BATCH_BUSY (-4)
#define ERR_DEVICE_NOT_FOUND (-6)
#define ERR_ADDRESS_OVERLAPPED (-7)
#define ERR_DNS (-101)
#define ERR_SOCKET (-102)
#define ERR_MALFORMED_JSON (-103)
#define ERR_REJECT_HANDSHAKE (-104)
#define ERR_METADATA (-200)
#define ERR_ENDPOINT (-201)
#define ERR_CONTEXT (-202)
#define ERR_NUMA (-300)
#define ERR_CLOCK (-301)
#define ERR_MEMORY (-302)
#define ERR_NOT_IMPLEMENTED (-303)

/* An engine: memory registrations, connections and threads. */
typedef void *transfer_engine_t;

/* An installed transport. */
typedef void *transport_t;

/* One read or write. */
struct transfer_request {
  int opcode;             /* OPCODE_* */
  void *source;           /* local memory: filled by a read, sent by a write. Registered
                             throughout or not at all */
  segment_id_t target_id; /* LOCAL_SEGMENT or what openSegment() gave */
  uint64_t target_offset; /* address inside one registered buffer of the target */
  uint64_t length;        /* bytes; 0 completes at once */
};
typedef struct transfer_request transfer_request_t;

/* How far one request has come. */
struct transfer_status {
  int status;                 /* STATUS_* */
  uint64_t transferred_bytes; /* all of them once COMPLETED */
};
typedef struct transfer_status transfer_status_t;

/* A notification. Passed by value. */
struct notify_msg {
  char *name;
  char *msg;
};
typedef struct notify_msg notify_msg_t;

/* One range to register. */
struct buffer_entry {
  void *addr;
  size_t length; /* bytes */
};
typedef struct buffer_entry buffer_entry_t;

/* Load of one NIC. */
struct nic_load_stat {
  char device_name[64];
  uint64_t inflight_bytes;
  double ewma_bandwidth_bps;
};
typedef struct nic_load_stat nic_load_stat_t;

/* Description of a segment. No function takes or returns it; declared because the original does. */
struct segment_desc {
  int type;
  union {
    struct {
      void *addr;
      uint64_t size;
      const char *location;
    } rdma;
    struct {
      const char *file_path;
      const char *subsystem_name;
      const char *proto;
      const char *ip;
      uint64_t port;
    } nvmeof;
  } desc_;
};
typedef struct segment_desc segment_desc_t;

/* ---- Engine ------------------------------------------------------------------------------- */

/* Creates an engine whose RPC port is listening when this returns. metadata_conn_string is
 * "P2PHANDSHAKE" (no server: peers ask each other) or the "scheme://address" of a metadata store.
 * local_server_name is "host:port": the host is what peers connect to. auto_discover other than 0
 * installs the transports that the machine offers; 0 leaves that to installTransport().
 * ip_or_host_name may be null. The caller owns the engine and ends it with destroyTransferEngine().
 * Blocking while a metadata store is asked, at most a few seconds.
 * Returns null on failure: a null or malformed name, a store that does not answer, or a scheme that
 * this build does not serve (the original ends the process on an unknown one).
 * Ports: listens on the port of local_server_name, or on rpc_port where the name has none, if that
 * is free, and chooses another if it is taken or both are 0 (the original ignores both). In
 * P2PHANDSHAKE mode peers need the port that was chosen: read it back with getLocalIpAndPort().
 * Addresses: listens only on the address that it advertises; on every interface, with one log line,
 * if that name is no address of this machine (the original always does). Since 0.1. */
transfer_engine_t createTransferEngine(const char *metadata_conn_string,
                                       const char *local_server_name, const char *ip_or_host_name,
                                       uint64_t rpc_port, int auto_discover);

/* Ends the engine: cancels what is in flight, closes its connections, ends its threads, takes its
 * entries out of the metadata store and frees its own memory. Null is allowed; destroying twice is
 * harmless. Blocking, at most a few seconds. Ours: afterwards no memory of the caller is touched
 * and every late call of any thread fails; the original promises nothing about transfers in flight.
 * Since 0.1. */
void destroyTransferEngine(transfer_engine_t engine);

/* Looks for RDMA devices, for a later installTransport("rdma"). 0 also if there is none.
 * Errors: ERR_INVALID_ARGUMENT (engine). Since 0.1. */
int discoverTopology(transfer_engine_t engine);

/* Writes "host:port" under which peers reach the engine, in P2PHANDSHAKE mode the name for their
 * openSegment(). At most buf_len - 1 bytes and a NUL are written; a longer text is cut without an
 * error. Errors: ERR_INVALID_ARGUMENT (engine, null or empty buffer). Ours: an IPv6 host stands in
 * brackets, so that the text is a valid name. Since 0.1. */
int getLocalIpAndPort(transfer_engine_t engine, char *buf_out, size_t buf_len);

/* Installs a transport: "tcp" always can be. args is null, or an array whose first element is null
 * or a NIC priority matrix as JSON text; further elements are not read. Ranges registered before
 * are served as well. Returns null on failure: unknown or unavailable protocol, malformed matrix,
 * no device. Installing one again returns the same value. The engine owns the transport.
 * Since 0.1. */
transport_t installTransport(transfer_engine_t engine, const char *proto, void **args);

/* Does nothing and returns 0, as the original: transports stay until the engine ends.
 * Errors: ERR_INVALID_ARGUMENT (engine). Since 0.1. */
int uninstallTransport(transfer_engine_t engine, const char *proto);

/* Makes the process end in order on SIGTERM and SIGINT, whose handlers it replaces: engines are
 * destroyed, which takes them out of the metadata store, then the process exits with status
 * 128 + signal. They are also destroyed at exit(). Meant for programs without such handlers. Does
 * nothing if the engine is not valid. Since 0.1. */
void enableGracefulShutdown(transfer_engine_t engine);

/* ---- Memory ------------------------------------------------------------------------------- */

/* Makes [addr, addr + length) a buffer of the local segment, on every transport, also of those
 * installed later. The memory stays the caller's. location says which device it is near ("cpu:0",
 * "cuda:1"); null or "*" lets the engine find out. Peers may read and write it unless
 * remote_accessible is 0, which here holds on every transport.
 * Errors: ERR_INVALID_ARGUMENT (engine, null, empty, wraps around), ERR_ADDRESS_OVERLAPPED,
 * ERR_MEMORY, ERR_METADATA. Blocking while a metadata store is told. Since 0.1. */
int registerLocalMemory(transfer_engine_t engine, void *addr, size_t length, const char *location,
                        int remote_accessible);

/* Ends the registration that begins at addr. Ours: when it returns, no peer reads or writes the
 * memory and none will. Errors: ERR_INVALID_ARGUMENT (engine), ERR_ADDRESS_NOT_REGISTERED.
 * Blocking while a metadata store is told. Since 0.1. */
int unregisterLocalMemory(transfer_engine_t engine, void *addr);

/* As registerLocalMemory() for buffer_len ranges, remotely accessible: all or none. Ranges that
 * overlap within the list give ERR_ADDRESS_OVERLAPPED. Since 0.1. */
int registerLocalMemoryBatch(transfer_engine_t engine, buffer_entry_t *buffer_list,
                             size_t buffer_len, const char *location);

/* As unregisterLocalMemory() for addr_len addresses: goes on after a failure and returns the first
 * error. Since 0.1. */
int unregisterLocalMemoryBatch(transfer_engine_t engine, void **addr_list, size_t addr_len);

/* ---- Segments ----------------------------------------------------------------------------- */

/* Finds the segment called segment_name and returns its id, at least 0. Leading '/' are dropped. In
 * P2PHANDSHAKE mode the name is the peer's "host:port". Opening a name again gives the same id from
 * the cache; the engine's own name gives 0 once a transport is installed. An id is never used for
 * another name. Blocking at the first open of a name, within the deadline of a transfer.
 * Errors: -1, as the original. Ours: a peer that restarted under the same name is found again
 * without reopening. Since 0.1. */
segment_id_t openSegment(transfer_engine_t engine, const char *segment_name);

/* As openSegment(), but fetches the descriptor also if it is cached; if only that fails, it is
 * logged and the cached one stays. Blocking. Since 0.1. */
segment_id_t openSegmentNoCache(transfer_engine_t engine, const char *segment_name);

/* Does nothing and returns 0, as the original: the id stays valid until the engine ends.
 * Errors: ERR_INVALID_ARGUMENT (engine). Since 0.1. */
int closeSegment(transfer_engine_t engine, segment_id_t segment_id);

/* Returns 0: there is no EFA transport to warm up. Errors: ERR_INVALID_ARGUMENT (engine).
 * Since 0.1. */
int warmupEfaSegment(transfer_engine_t engine, const char *segment_name);

/* Forgets the cached descriptor of a remote segment; the metadata store is not changed. Leading '/'
 * are dropped. 0 also if the name was not cached.
 * Errors: ERR_INVALID_ARGUMENT (engine, null or empty name). Since 0.1. */
int removeLocalSegment(transfer_engine_t engine, const char *segment_name);

/* Fetches the descriptor of every open segment again. 0 even if some peers did not answer; those
 * keep the old one. Blocking. Errors: ERR_INVALID_ARGUMENT (engine). Since 0.1. */
int syncSegmentCache(transfer_engine_t engine);

/* ---- Transfers ---------------------------------------------------------------------------- */

/* Creates a batch for up to batch_size requests over its life. Ends with freeBatchID() or with the
 * engine. Returns INVALID_BATCH on failure: wrong engine, more than 1,048,576 requests, too many
 * batches. Ours: the id is a number, not an address, so that a stale or invented one is told
 * apart. Since 0.1. */
batch_id_t allocateBatchID(transfer_engine_t engine, size_t batch_size);

/* Appends count requests; task ids continue over the submits of a batch. All requests are checked
 * before any is added; afterwards a failure lives in the status of its task. The entries may be
 * reused on return. Two threads must not submit to one batch at once: one of them may get 4.
 * Returns 1 (engine, batch, null entries, opcode, target id, range), 2 (more than the batch has
 * room for), 3 (a source that lies partly in registered memory), 8 (no transport installed for the
 * target's protocol). Since 0.1. */
int submitTransfer(transfer_engine_t engine, batch_id_t batch_id, struct transfer_request *entries,
                   size_t count);

/* As submitTransfer(); once the whole batch is COMPLETED, and only then, the owner of the first
 * entry's segment gets the notification. Returns 1 also if count is 0. Ours: it is sent without
 * anybody polling, and the last task becomes COMPLETED only after the peer has acknowledged it or
 * its delivery has failed, which is logged. Since 0.1. */
int submitTransferWithNotify(transfer_engine_t engine, batch_id_t batch_id,
                             struct transfer_request *entries, size_t count,
                             notify_msg_t notify_msg);

/* Reads the status of the task_id-th request of the batch. Returns 1 (engine, batch, task_id out of
 * range, null status). Ours: *status is then STATUS_FAILED with 0 bytes, so that a program that
 * looks only there comes to an end. Since 0.1. */
int getTransferStatus(transfer_engine_t engine, batch_id_t batch_id, size_t task_id,
                      struct transfer_status *status);

/* Frees the batch. Returns 4 while a task is not terminal, never once every task was seen terminal;
 * 1 for a wrong engine or batch. Ours: it is enough that all tasks are terminal; nobody needs to
 * have polled them. Since 0.1. */
int freeBatchID(transfer_engine_t engine, batch_id_t batch_id);

/* ---- Notifications ------------------------------------------------------------------------ */

/* Takes all notifications received, oldest first, and writes their number to *size. Null and 0 if
 * there are none. The caller owns the array and its strings and ends them with freeNotifsMsgBuf();
 * all come from malloc(3). Null on a wrong engine or null size. Ours: the queue of waiting
 * notifications is bounded, and senders are told when it is full. Since 0.1. */
notify_msg_t *getNotifsFromEngine(transfer_engine_t engine, int *size);

/* Frees what getNotifsFromEngine() returned, with the size it gave. Null is allowed. Always 0.
 * Since 0.1. */
int freeNotifsMsgBuf(notify_msg_t *msg, int size);

/* Delivers a notification to the owner of the segment target_id. Blocking, within the deadline of a
 * transfer. Errors: ERR_INVALID_ARGUMENT (engine, null or overlong text), ERR_METADATA (unknown id,
 * no route, not acknowledged), ERR_DNS, ERR_SOCKET, ERR_MALFORMED_JSON. Since 0.1. */
int genNotifyInEngine(transfer_engine_t engine, uint64_t target_id, notify_msg_t notify_msg);

/* ---- Diagnostics -------------------------------------------------------------------------- */

/* Writes the load of up to *count NICs and sets *count to how many there are; 0 without RDMA
 * devices. Errors: ERR_INVALID_ARGUMENT (engine, null stats or count). Since 0.1. */
int getNicLoadStats(transfer_engine_t engine, nic_load_stat_t *stats, size_t *count);

/* Describes the machine's NICs and which are near which memory, as text or, if json is not 0, as an
 * object with "local_nics" and "topology". At most buf_len - 1 bytes and a NUL are written; a
 * longer text is cut without an error.
 * Errors: ERR_INVALID_ARGUMENT (engine, null or empty buffer). Since 0.1. */
int showLinks(transfer_engine_t engine, char *buf_out, size_t buf_len, int json);

#ifdef __cplusplus
}
#endif
#endif
