/*
 * libmooncake: moves memory between processes and machines.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * Rules that hold for every function here, unless it says otherwise:
 *  - It returns MOONCAKE_OK (0) or a negative MOONCAKE_ERROR_*; outputs are written on success
 *    only. mooncake_error_message() explains the calling thread's last failure.
 *  - It may be called from any thread at any time. Strings and structs passed in are copied before
 *    it returns; memory named by a transfer request must stay valid until that request is terminal.
 *  - "Blocking" functions return within their timeout, or the engine's default if they take none,
 *    also if a peer or the metadata service stands still; others do not wait for either.
 *  - A handle that is null, wrong or already destroyed gives MOONCAKE_ERROR_INVALID_HANDLE.
 *  - A handle created before fork() is invalid in the child.
 *  - Timeouts are milliseconds; 0 means the engine's default.
 *  - Text outputs are a (buffer, capacity, length) triple: at most capacity - 1 bytes and a NUL are
 *    written, *length (may be null) receives the full length without NUL. buffer may be null if
 *    capacity is 0. A text that did not fit gives MOONCAKE_ERROR_FULL and is cut.
 */
#ifndef MOONCAKE_H
#define MOONCAKE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Version and errors ------------------------------------------------------------------- */

#define MOONCAKE_VERSION_MAJOR 0
#define MOONCAKE_VERSION_MINOR 1
#define MOONCAKE_VERSION_PATCH 0

/* Version of the loaded library, "MAJOR.MINOR.PATCH". Static storage. Since 0.1. */
const char *mooncake_version(void);

/* Version of the loaded library as MAJOR * 1000000 + MINOR * 1000 + PATCH. Since 0.1. */
uint32_t mooncake_version_number(void);

enum {
  MOONCAKE_OK = 0,
  /* An argument is null, empty, out of range or contradicts another. Fix the call. */
  MOONCAKE_ERROR_INVALID_ARGUMENT = -1,
  /* The engine, segment, batch or other handle does not exist (any more). */
  MOONCAKE_ERROR_INVALID_HANDLE = -2,
  /* The address range is not (any more) inside one registered buffer. */
  MOONCAKE_ERROR_NOT_REGISTERED = -3,
  /* The range overlaps a registered buffer. */
  MOONCAKE_ERROR_OVERLAP = -4,
  /* The buffer is registered without the access right that the operation needs, or the metadata
   * service refuses user, password or certificate. */
  MOONCAKE_ERROR_ACCESS_DENIED = -5,
  /* Transfers are still in flight; wait for them or cancel them first. */
  MOONCAKE_ERROR_BUSY = -6,
  /* A capacity or limit is reached (batch, queue, table, output buffer). */
  MOONCAKE_ERROR_FULL = -7,
  /* Memory could not be allocated. */
  MOONCAKE_ERROR_OUT_OF_MEMORY = -8,
  /* The requested port is taken. */
  MOONCAKE_ERROR_ADDRESS_IN_USE = -9,
  /* A host name could not be resolved. */
  MOONCAKE_ERROR_UNRESOLVED = -10,
  /* The peer refused, reset or closed the connection, or no route leads to it. */
  MOONCAKE_ERROR_UNREACHABLE = -11,
  /* The peer sent something that is not the protocol. */
  MOONCAKE_ERROR_PROTOCOL = -12,
  /* The peer or the metadata service does not know the name. */
  MOONCAKE_ERROR_NOT_FOUND = -13,
  /* The deadline passed first. */
  MOONCAKE_ERROR_TIMEOUT = -14,
  /* Ended by a cancel, by a progress callback or by the end of engine or store. */
  MOONCAKE_ERROR_CANCELED = -15,
  /* This build, machine or peer cannot do it. */
  MOONCAKE_ERROR_UNSUPPORTED = -16,
  /* The operating system refused; the message has its reason. */
  MOONCAKE_ERROR_SYSTEM = -17,
  /* The name is taken, or this store holds the payload already. */
  MOONCAKE_ERROR_EXISTS = -18,
  /* This store does not hold the payload. */
  MOONCAKE_ERROR_NOT_HELD = -19,
  /* The buffers are not of the payload's size, or the payload has other buffers. */
  MOONCAKE_ERROR_SIZE_MISMATCH = -20,
  /* Bytes arrived, but not those that were registered. */
  MOONCAKE_ERROR_DIGEST_MISMATCH = -21,
  /* No holder of the payload could be read; the message lists those tried, and why not. */
  MOONCAKE_ERROR_NO_HOLDER = -22
};

/* Name of an error code, such as "MOONCAKE_ERROR_TIMEOUT"; "MOONCAKE_ERROR_UNKNOWN" for any other
 * value. Static storage. Since 0.1. */
const char *mooncake_error_name(int32_t code);

/* What the calling thread's last failing call, or failed transfer seen by a poll or wait, ran into:
 * peer, phase, cause and what to do. Never null; "" before the first failure. Valid until the next
 * mooncake call of this thread. Since 0.1. */
const char *mooncake_error_message(void);

/* ---- Log ---------------------------------------------------------------------------------- */

enum {
  MOONCAKE_LOG_DEBUG = 0,
  MOONCAKE_LOG_INFO = 1,
  MOONCAKE_LOG_WARNING = 2,
  MOONCAKE_LOG_ERROR = 3,
  MOONCAKE_LOG_OFF = 4
};

/* One finished line without newline. Called from any thread, never from two at once; must not call
 * the library. */
typedef void (*mooncake_log_callback_t)(int32_t level, const char *message, void *context);

/* Sends log lines of the process to callback instead of stderr; null restores stderr. When it
 * returns, the former callback is not running and will not be called again. Since 0.1. */
int32_t mooncake_log_set_callback(mooncake_log_callback_t callback, void *context);

/* Drops lines below level. The default is MOONCAKE_LOG_WARNING, or what the environment variable
 * MC_LOG_LEVEL says. Since 0.1. */
int32_t mooncake_log_set_level(int32_t level);

/* ---- Engine ------------------------------------------------------------------------------- */

/* Owns memory registrations, connections and threads. A process may have several. */
typedef struct mooncake_engine mooncake_engine_t;

/* Fill with mooncake_engine_options_init(), then change what matters. Null or 0: the default. */
typedef struct mooncake_engine_options {
  uint32_t struct_size;           /* sizeof(mooncake_engine_options_t), set by the initialiser */
  uint32_t port;                  /* RPC port; 0: the system chooses. Taken: ADDRESS_IN_USE */
  const char *name;               /* segment name; default "advertised_address:port". Without a
                                     metadata service it must be that or null */
  const char *bind_address;       /* numeric address to listen on; default: the advertised address
                                     if given, else 127.0.0.1. "0.0.0.0" or "::": every interface */
  const char *advertised_address; /* host that peers connect to; default: the bound address, or this
                                     machine's first address if every interface is bound */
  const char *metadata_uri;       /* where peers find each other: "P2PHANDSHAKE" (the default), by
                                     asking each other, or the URI of a metadata service:
                                     "etcd://host:2379,host:2379", "redis://host:6379" or
                                     "http://host:8080/metadata" */
  const char *transports;         /* comma list in order of preference; default "shm,tcp": memory
                                     between processes of one host, TCP for all else. Where several
                                     reach a peer, the first one that works moves the bytes.
                                     MC_FORCE_TCP in the environment leaves only "tcp" */
  uint64_t default_timeout_ms;    /* deadline of an operation that names none; default 30000 */
  uint32_t io_threads;            /* threads per direction, at most 64; default half the
                                     processors, 2 to 4 */
  uint32_t connections_per_peer;  /* data connections to one peer, 1 to 64; default 2 */
  uint32_t spin_us;               /* how long a waiter or I/O thread spins before it sleeps while
                                     work is outstanding, 1 to 1000000; default 50; servers
                                     spin four times as long */
  uint32_t reserved;              /* 0 */
  const char *processors;         /* where the threads that move bytes run: "0-3,8", or "node:1" for
                                     those of a NUMA node; default: anywhere. io_threads is then
                                     their number, 2 to 4, unless given */
} mooncake_engine_options_t;

/* Writes the defaults. struct_size is sizeof(mooncake_engine_options_t). Since 0.1. */
int32_t mooncake_engine_options_init(mooncake_engine_options_t *options, uint32_t struct_size);

/* Creates an engine whose ports are listening when this returns, and which a metadata service, if
 * one is named, knows. options may be null. The caller owns *engine and ends it with
 * mooncake_engine_destroy(). Blocking with a metadata service: for default_timeout_ms, at most ten
 * seconds.
 * Errors: INVALID_ARGUMENT, ADDRESS_IN_USE, UNRESOLVED, UNSUPPORTED, FULL (1,024 engines), SYSTEM;
 * of the service UNREACHABLE, TIMEOUT, ACCESS_DENIED, PROTOCOL. Since 0.1. */
int32_t mooncake_engine_create(const mooncake_engine_options_t *options,
                               mooncake_engine_t **engine);

/* Cancels what is in flight, closes every connection, ends the engine's threads and frees its own
 * memory. Calls of other threads return MOONCAKE_ERROR_CANCELED or INVALID_HANDLE. Afterwards no
 * caller memory is touched, unless the log names a thread of another process of this host that is
 * held up in the middle of a copy. Blocking, at most a few seconds. Not from a callback of the
 * library: INVALID_ARGUMENT. Since 0.1. */
int32_t mooncake_engine_destroy(mooncake_engine_t *engine);

/* The segment name under which peers open this engine, "host:port" without a metadata service. Text
 * output. Since 0.1. */
int32_t mooncake_engine_name(mooncake_engine_t *engine, char *buffer, uint64_t capacity,
                             uint64_t *length);

/* Counters and gauges in the Prometheus text format. Text output. Since 0.1. */
int32_t mooncake_engine_metrics(mooncake_engine_t *engine, char *buffer, uint64_t capacity,
                                uint64_t *length);

/* *fd becomes readable whenever a batch of the engine has become terminal; read 8 bytes from it to
 * rearm. The engine owns the descriptor: do not close it. Since 0.1. */
int32_t mooncake_engine_event_fd(mooncake_engine_t *engine, int32_t *fd);

/* ---- Memory ------------------------------------------------------------------------------- */

/* What peers may do with a buffer; may be combined. */
enum {
  MOONCAKE_ACCESS_LOCAL = 0,
  MOONCAKE_ACCESS_REMOTE_READ = 1,
  MOONCAKE_ACCESS_REMOTE_WRITE = 2
};

typedef struct mooncake_buffer {
  void *address;
  uint64_t length; /* bytes */
} mooncake_buffer_t;

/* Makes [address, address + length) a buffer of the local segment. location says which device it is
 * near ("cpu:0", "cuda:1"), null or "*" lets the engine find out. The memory stays the caller's; it
 * must stay mapped until it is unregistered: transfers may touch it directly. access:
 * MOONCAKE_ACCESS_*. A metadata service knows the buffer when this returns, or, if it cannot be
 * reached or does not answer within the default timeout (at most ten seconds), as soon as it does.
 * Blocking with a metadata service. Errors, after which nothing is registered: INVALID_ARGUMENT
 * (null, empty, wraps around), OVERLAP, FULL (the engine, or what peers or the service take),
 * PROTOCOL and ACCESS_DENIED (the service refuses). Since 0.1. */
int32_t mooncake_memory_register(mooncake_engine_t *engine, void *address, uint64_t length,
                                 const char *location, uint32_t access);

/* Ends the registration that begins at address. When it returns, no peer reads or writes the memory
 * and none will. Blocking. Errors: NOT_REGISTERED; BUSY if a process of this host has been in the
 * middle of a copy for the default timeout and may still touch the memory: keep it, and call again.
 * Since 0.1. */
int32_t mooncake_memory_unregister(mooncake_engine_t *engine, void *address);

/* As mooncake_memory_register() for count buffers: all or none. Since 0.1. */
int32_t mooncake_memory_register_batch(mooncake_engine_t *engine, const mooncake_buffer_t *buffers,
                                       uint64_t count, const char *location, uint32_t access);

/* As mooncake_memory_unregister() for count addresses: goes on after a failure and returns the
 * first error. Since 0.1. */
int32_t mooncake_memory_unregister_batch(mooncake_engine_t *engine, void *const *addresses,
                                         uint64_t count);

/* Allocates zeroed, page-aligned, registered memory owned by the engine, in huge pages where the
 * system grants them, near NUMA node N if location is "cpu:N". It may take all of the memory now:
 * about 0.15 s a GiB. Processes of the same user and host map it. Ends with mooncake_memory_free()
 * or with the engine. Since 0.1. */
int32_t mooncake_memory_allocate(mooncake_engine_t *engine, uint64_t length, const char *location,
                                 uint32_t access, void **address);

/* Unregisters and frees memory of mooncake_memory_allocate(). Errors: NOT_REGISTERED; BUSY as for
 * mooncake_memory_unregister(), and the memory is still there. Since 0.1. */
int32_t mooncake_memory_free(mooncake_engine_t *engine, void *address);

/* ---- Segments ----------------------------------------------------------------------------- */

/* A named address space of one process. MOONCAKE_SEGMENT_LOCAL is the engine's own. */
typedef int32_t mooncake_segment_t;
enum { MOONCAKE_SEGMENT_LOCAL = 0 };

typedef struct mooncake_remote_buffer {
  uint64_t address; /* what target_offset counts in */
  uint64_t length;  /* bytes */
  uint32_t access;  /* MOONCAKE_ACCESS_*; both rights if the peer does not say */
  uint32_t reserved;
} mooncake_remote_buffer_t;

/* Finds the peer called name and fetches its descriptor. Opening a name again gives the same id and
 * a fresh descriptor. Blocking. Errors: NOT_FOUND, UNRESOLVED, UNREACHABLE, PROTOCOL, TIMEOUT.
 * Since 0.1. */
int32_t mooncake_segment_open(mooncake_engine_t *engine, const char *name, uint64_t timeout_ms,
                              mooncake_segment_t *segment);

/* Gives the id back. Once every open is closed, connections to the peer end when their transfers
 * have. Since 0.1. */
int32_t mooncake_segment_close(mooncake_engine_t *engine, mooncake_segment_t segment);

/* Writes up to capacity buffers of the segment in order of address and their full number into
 * *count. Errors: FULL if there are more than capacity. Since 0.1. */
int32_t mooncake_segment_buffers(mooncake_engine_t *engine, mooncake_segment_t segment,
                                 mooncake_remote_buffer_t *buffers, uint64_t capacity,
                                 uint64_t *count);

/* The segment descriptor as JSON. Its member mooncake_paths lists the paths to the peer in order of
 * preference, then the transports without one: "transport", "path" (its peer), "state" ("used",
 * "standby" where another is preferred, "resting" after a failure, or "none"), "moved_bytes",
 * "failures", and "reason" where it does not work. Text output. Since 0.1. */
int32_t mooncake_segment_describe(mooncake_engine_t *engine, mooncake_segment_t segment,
                                  char *buffer, uint64_t capacity, uint64_t *length);

/* Asks the peer called name for a sign of life. Blocking. Since 0.1. */
int32_t mooncake_peer_probe(mooncake_engine_t *engine, const char *name, uint64_t timeout_ms);

/* ---- Transfers ---------------------------------------------------------------------------- */

/* Seen from the initiator: a read fills local memory, a write fills the target's. */
enum { MOONCAKE_OPCODE_READ = 0, MOONCAKE_OPCODE_WRITE = 1 };

typedef struct mooncake_transfer_request {
  int32_t opcode;             /* MOONCAKE_OPCODE_* */
  mooncake_segment_t segment; /* the target */
  void *source;               /* local memory: filled by a read, sent by a write. Registered
                                 throughout or not at all */
  uint64_t target_offset;     /* address inside one buffer of the target segment */
  uint64_t length;            /* bytes; 0 completes at once */
} mooncake_transfer_request_t;

/* CANCELED, COMPLETED, TIMEOUT and FAILED are terminal: the library never again touches the
 * request's local memory. */
enum {
  MOONCAKE_STATE_WAITING = 0,
  MOONCAKE_STATE_CANCELED = 3,
  MOONCAKE_STATE_COMPLETED = 4,
  MOONCAKE_STATE_TIMEOUT = 5,
  MOONCAKE_STATE_FAILED = 6
};

typedef struct mooncake_transfer_status {
  int32_t state;              /* MOONCAKE_STATE_* */
  int32_t error;              /* MOONCAKE_OK or why it did not complete */
  uint64_t transferred_bytes; /* all of them once COMPLETED */
} mooncake_transfer_status_t;

typedef struct mooncake_batch_status {
  int32_t state;              /* WAITING until every request is terminal; then COMPLETED, or how the
                                 first request that did not complete ended */
  int32_t error;              /* likewise */
  uint64_t submitted_count;
  uint64_t completed_count;   /* requests that are COMPLETED */
  uint64_t terminal_count;
  uint64_t transferred_bytes;
} mooncake_batch_status_t;

/* Requests that are submitted and waited for together. */
typedef uint64_t mooncake_batch_t;

/* Creates a batch for up to capacity requests over its life. Ends with mooncake_batch_free() or
 * with the engine. Errors: INVALID_ARGUMENT (0 or above 1048576), FULL (65,536 batches or
 * 16,777,216 requests of all batches together). Since 0.1. */
int32_t mooncake_batch_create(mooncake_engine_t *engine, uint64_t capacity,
                              mooncake_batch_t *batch);

/* Appends count requests; indices continue over the submits of a batch. All arguments are checked
 * before any request starts; afterwards a failure lives in the status. Two threads must not submit
 * to one batch at once: BUSY. Errors: INVALID_ARGUMENT, INVALID_HANDLE, FULL, NOT_REGISTERED (a
 * local range that lies partly in registered memory of this engine). Since 0.1. */
int32_t mooncake_batch_submit(mooncake_engine_t *engine, mooncake_batch_t batch,
                              const mooncake_transfer_request_t *requests, uint64_t count,
                              uint64_t timeout_ms);

/* As mooncake_batch_submit(); once the whole batch is COMPLETED, and only then, the segment of the
 * first request gets the notification. The batch and its completed requests become terminal
 * after the peer has acknowledged it or its delivery has failed; a failed delivery is the batch's
 * error. A batch holds one notification: another submitted before the batch has ended replaces it.
 * Since 0.1. */
int32_t mooncake_batch_submit_notify(mooncake_engine_t *engine, mooncake_batch_t batch,
                                     const mooncake_transfer_request_t *requests, uint64_t count,
                                     uint64_t timeout_ms, const char *name, const char *message);

/* Reads the status of the whole batch. Since 0.1. */
int32_t mooncake_batch_poll(mooncake_engine_t *engine, mooncake_batch_t batch,
                            mooncake_batch_status_t *status);

/* Reads the status of request index. Since 0.1. */
int32_t mooncake_batch_poll_request(mooncake_engine_t *engine, mooncake_batch_t batch,
                                    uint64_t index, mooncake_transfer_status_t *status);

/* Waits until every submitted request is terminal and reads the status (may be null). timeout_ms
 * bounds the wait only: TIMEOUT means that the requests are still running; 0 waits as long as they
 * do, which their own deadlines bound. Blocking. Since 0.1. */
int32_t mooncake_batch_wait(mooncake_engine_t *engine, mooncake_batch_t batch, uint64_t timeout_ms,
                            mooncake_batch_status_t *status);

/* Ends every request that is not terminal as CANCELED. Returns without waiting for that; a request
 * may still complete first. Since 0.1. */
int32_t mooncake_batch_cancel(mooncake_engine_t *engine, mooncake_batch_t batch);

/* Frees the batch. Errors: BUSY while a request is not terminal; never once every request was seen
 * terminal. Since 0.1. */
int32_t mooncake_batch_free(mooncake_engine_t *engine, mooncake_batch_t batch);

/* *fd is readable when every submitted request is terminal; a later submit on the batch resets it.
 * The batch owns the descriptor: do not close or read it. Since 0.1. */
int32_t mooncake_batch_event_fd(mooncake_engine_t *engine, mooncake_batch_t batch, int32_t *fd);

/* Called once each time the batch becomes terminal, on a thread of the library, one call at a time.
 * May call any function but mooncake_engine_destroy(), including mooncake_batch_free(). */
typedef void (*mooncake_batch_callback_t)(mooncake_batch_t batch,
                                          const mooncake_batch_status_t *status, void *context);

/* Sets the callback of a batch before its first submit: BUSY after it. Errors: SYSTEM if its thread
 * cannot be started. Since 0.1. */
int32_t mooncake_batch_set_callback(mooncake_engine_t *engine, mooncake_batch_t batch,
                                    mooncake_batch_callback_t callback, void *context);

/* Submits count requests, waits for them and returns MOONCAKE_OK or the error of the first request
 * that did not complete. The fastest way to move little. Blocking. Since 0.1. */
int32_t mooncake_transfer_sync(mooncake_engine_t *engine,
                               const mooncake_transfer_request_t *requests, uint64_t count,
                               uint64_t timeout_ms);

/* ---- Notifications ------------------------------------------------------------------------ */

typedef struct mooncake_notification {
  const char *name;
  const char *message;
} mooncake_notification_t;

/* Delivers a notification to the owner of segment. Blocking. Errors: as mooncake_segment_open(),
 * and FULL if the peer's queue is. Since 0.1. */
int32_t mooncake_notification_send(mooncake_engine_t *engine, mooncake_segment_t segment,
                                   const char *name, const char *message, uint64_t timeout_ms);

/* Takes the oldest notification received, or null if there is none. The caller owns it and ends it
 * with mooncake_notification_free(). Since 0.1. */
int32_t mooncake_notification_receive(mooncake_engine_t *engine,
                                      mooncake_notification_t **notification);

/* Frees a notification; null is allowed. Since 0.1. */
void mooncake_notification_free(mooncake_notification_t *notification);

/* ---- Metadata server ---------------------------------------------------------------------- */

/* An HTTP metadata server inside this process, on a thread of its own. Whoever reaches its port,
 * and has its token if it asks for one, may read and change everything in it. */
typedef struct mooncake_metadata_server mooncake_metadata_server_t;

/* Fill with mooncake_metadata_server_options_init(), then change what matters. Null or 0: the
 * default. */
typedef struct mooncake_metadata_server_options {
  uint32_t struct_size;   /* sizeof(mooncake_metadata_server_options_t), set by the initialiser */
  uint32_t port;          /* 0: the system chooses */
  const char *host;       /* numeric address to listen on; default 127.0.0.1 */
  const char *directory;  /* folder that keeps the contents over restarts; null: they end with the
                             server. It is made if its parent exists; one server at a time */
  uint64_t maximum_bytes; /* keys and values that it takes in all; default 1 GiB */
  const char *token;      /* what clients must have in MC_METADATA_HTTP_TOKEN; null: what that
                             variable says here, nothing if it is not set */
} mooncake_metadata_server_options_t;

/* Writes the defaults. struct_size is sizeof(mooncake_metadata_server_options_t). Since 0.1. */
int32_t mooncake_metadata_server_options_init(mooncake_metadata_server_options_t *options,
                                              uint32_t struct_size);

/* Starts a server that listens when this returns. options may be null. The caller owns *server and
 * ends it with mooncake_metadata_server_stop(). Errors: INVALID_ARGUMENT (also: what the directory
 * keeps needs more than maximum_bytes), ADDRESS_IN_USE, UNSUPPORTED (libmicrohttpd is missing),
 * FULL (64 servers), SYSTEM (also: the directory's journal is damaged or of another version; the
 * message says where). Nothing in a directory is lost by a start that fails. Since 0.1. */
int32_t mooncake_metadata_server_start(const mooncake_metadata_server_options_t *options,
                                       mooncake_metadata_server_t **server);

/* The URI to give to engines of this host, "http://127.0.0.1:8080/metadata". Text output.
 * Since 0.1. */
int32_t mooncake_metadata_server_uri(mooncake_metadata_server_t *server, char *buffer,
                                     uint64_t capacity, uint64_t *length);

/* The port it listens on. Since 0.1. */
int32_t mooncake_metadata_server_port(mooncake_metadata_server_t *server, uint32_t *port);

/* Ends a server: closes its connections and its thread. Since 0.1. */
int32_t mooncake_metadata_server_stop(mooncake_metadata_server_t *server);

#ifdef __cplusplus
}
#endif

/* The store: named payloads, registered, got, watched. */
#include "mooncake_store.h"

#endif
