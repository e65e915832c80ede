/*
 * libmooncake's store: named payloads, such as a model's weights, which one process registers and
 * any number of others get, from it and from each other. mooncake.h includes this section; its
 * rules hold here.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 *  - A payload has a name: 1 to 512 bytes of UTF-8 without control characters, not beginning with
 *    "/".
 *  - A payload is cut into shards, each with a digest; none spans two buffers. Its version, 32
 *    hexadecimal digits, is the digest of these: the same bytes cut the same way are the same
 *    version. No get ever mixes two.
 *  - Functions that take an operation block. Its deadline and its cancellation end them as TIMEOUT
 *    and CANCELED, and so does mooncake_store_destroy(); what they had begun is then undone. That
 *    holds within a tenth of a second whatever stands still, the metadata service, too: what it
 *    cannot be told by then it is told when it is back.
 *    Besides what each says, they give INVALID_ARGUMENT, INVALID_HANDLE, FULL, SYSTEM, and of the
 *    metadata service UNREACHABLE, TIMEOUT, ACCESS_DENIED, PROTOCOL.
 *  - What the library hands out (results, and what callbacks get) is its own memory, read-only.
 *    These structs may grow at their end.
 */
#ifndef MOONCAKE_STORE_H
#define MOONCAKE_STORE_H

#include "mooncake.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Stores ------------------------------------------------------------------------------- */

/* What a process registers, gets and offers. A process may have several. */
typedef struct mooncake_store mooncake_store_t;

/* Fill with mooncake_store_options_init(), then change what matters. Null or 0: the default. */
typedef struct mooncake_store_options {
  uint32_t struct_size;     /* sizeof(mooncake_store_options_t), set by the initialiser */
  uint32_t reserved;        /* 0 */
  const char *metadata_uri; /* the metadata service that payloads are found through: etcd, Redis or
                               HTTP, as in mooncake_engine_options_t; default: the engine's */
  uint64_t drain_ms;        /* how long whatever withdraws a payload lets readers finish; default
                               5000 */
} mooncake_store_options_t;

/* Writes the defaults. struct_size is sizeof(mooncake_store_options_t). Since 0.1. */
int32_t mooncake_store_options_init(mooncake_store_options_t *options, uint32_t struct_size);

/* Creates a store: on engine, which stays the caller's and must be destroyed after the store, or,
 * if engine is null, on one of its own made from engine_options (null: the defaults). Giving both
 * is INVALID_ARGUMENT. options may be null. The caller owns *store and ends it with
 * mooncake_store_destroy(). Blocking, as mooncake_engine_create(). Errors: those of that, and
 * UNSUPPORTED if no metadata service is named or it cannot list, INVALID_HANDLE (engine), FULL
 * (1,024 stores). Since 0.1. */
int32_t mooncake_store_create(mooncake_engine_t *engine,
                              const mooncake_engine_options_t *engine_options,
                              const mooncake_store_options_t *options, mooncake_store_t **store);

/* Withdraws every payload that the store offers, frees the memory that it allocated, ends its
 * watches and its own engine. Calls of other threads return CANCELED or INVALID_HANDLE. Afterwards
 * no callback runs and no caller memory is touched, unless the log names a thread of another
 * process of this host that is held up in the middle of a copy. Results and cancellations stay
 * valid. Blocking: readers get options.drain_ms, the rest at most five seconds. Not from a callback
 * of the library: INVALID_ARGUMENT. Since 0.1. */
int32_t mooncake_store_destroy(mooncake_store_t *store);

/* The engine that the store works on, for its name, metrics and transfers. Of a store's own engine
 * this is borrowed: it ends with the store, do not destroy it. Since 0.1. */
int32_t mooncake_store_engine(mooncake_store_t *store, mooncake_engine_t **engine);

/* ---- Deadline, cancel and progress of an operation ----------------------------------------- */

/* Ends operations from any thread. May be given to any number of them, of any store. */
typedef struct mooncake_cancellation mooncake_cancellation_t;

/* Creates a cancellation. The caller owns *cancellation and ends it with
 * mooncake_cancellation_destroy(). Errors: FULL (65,536), SYSTEM. Since 0.1. */
int32_t mooncake_cancellation_create(mooncake_cancellation_t **cancellation);

/* Makes the operations that were given it return CANCELED soon, and later ones at once. Does not
 * wait for them. Since 0.1. */
int32_t mooncake_cancellation_cancel(mooncake_cancellation_t *cancellation);

/* Frees a cancellation; operations that were given it go on. Since 0.1. */
int32_t mooncake_cancellation_destroy(mooncake_cancellation_t *cancellation);

enum {
  MOONCAKE_PHASE_LOCATING = 0,     /* asking the metadata service and holders */
  MOONCAKE_PHASE_HASHING = 1,      /* computing digests of what is registered */
  MOONCAKE_PHASE_TRANSFERRING = 2, /* bytes arrive */
  MOONCAKE_PHASE_PUBLISHING = 3,   /* telling the metadata service */
  MOONCAKE_PHASE_DRAINING = 4      /* letting readers finish */
};

typedef struct mooncake_store_progress {
  int32_t phase;                /* MOONCAKE_PHASE_* */
  uint32_t reserved;
  uint64_t done_bytes;
  uint64_t total_bytes;         /* 0 while unknown */
  uint64_t active_holder_count; /* holders that bytes come from now */
  uint64_t holder_count;        /* holders known */
} mooncake_store_progress_t;

/* Called on the thread that called the operation: when a phase begins, and during it ten times a
 * second at most. Returns 0 to go on; anything else ends the operation as CANCELED. *progress is
 * valid until it returns. May call any function but mooncake_engine_destroy(),
 * mooncake_store_destroy() and mooncake_store_watch_destroy(). */
typedef int32_t (*mooncake_store_progress_callback_t)(const mooncake_store_progress_t *progress,
                                                      void *context);

/* Fill with mooncake_store_operation_init(), then change what matters. Null or 0: the default; a
 * null pointer to it: all defaults. Read before the operation begins; context must last until the
 * operation has returned. */
typedef struct mooncake_store_operation {
  uint32_t struct_size;                  /* sizeof(mooncake_store_operation_t) */
  uint32_t reserved;                     /* 0 */
  uint64_t timeout_ms;                   /* default: none for register and get, else the engine's */
  mooncake_cancellation_t *cancellation; /* may be destroyed once the operation has begun */
  mooncake_store_progress_callback_t progress;
  void *context;                         /* of progress */
} mooncake_store_operation_t;

/* Writes the defaults. struct_size is sizeof(mooncake_store_operation_t). Since 0.1. */
int32_t mooncake_store_operation_init(mooncake_store_operation_t *operation, uint32_t struct_size);

/* ---- Results ------------------------------------------------------------------------------ */

typedef struct mooncake_payload_info {
  const char *name;
  const char *version;          /* null: registered by the existing system, without digests */
  uint64_t size;                /* bytes of all buffers */
  uint64_t shard_bytes;         /* the last shard of a buffer may be shorter */
  uint64_t shard_count;
  uint64_t buffer_count;        /* 0 where only the holders know */
  const uint64_t *buffer_sizes; /* buffer_count lengths, in order; null if that is 0 */
  uint64_t holder_count;
  uint64_t published_ms;        /* when it was registered, milliseconds since 1970; 0: unknown */
  uint32_t is_writable;         /* 1: peers may write into it; it has no digests and one holder */
  uint32_t reserved;
} mooncake_payload_info_t;

/* A process that offers a payload or part of it. */
typedef struct mooncake_payload_holder {
  const char *segment;  /* name of the segment whose memory it is in */
  const char *version;  /* as in mooncake_payload_info_t */
  uint32_t is_origin;   /* 1: registered it; 0: got it */
  uint32_t is_complete; /* 1: has every shard */
} mooncake_payload_holder_t;

/* Where a get took bytes from. */
typedef struct mooncake_payload_source {
  const char *segment;
  uint64_t bytes;
  uint64_t corrupt_shard_count; /* shards that did not match their digests */
  uint32_t is_origin;
  uint32_t reserved;
} mooncake_payload_source_t;

/* Everything that a call has found. Arrays are null where their count is 0. */
typedef struct mooncake_store_report {
  uint64_t payload_count;                         /* list: any number; else 1 */
  const mooncake_payload_info_t *const *payloads;
  uint64_t holder_count;                          /* stat */
  const mooncake_payload_holder_t *const *holders;
  uint64_t buffer_count;                          /* get: where the payload is now */
  const mooncake_buffer_t *buffers;
  uint64_t source_count;                          /* get */
  const mooncake_payload_source_t *const *sources;
  uint64_t duration_ns;                           /* get */
  uint32_t is_verified;                           /* get: 1 if every shard matched its digest */
  uint32_t reserved;
} mooncake_store_report_t;

/* Owns what a call has found. */
typedef struct mooncake_store_result mooncake_store_result_t;

/* *report is what the result holds; it and all that it points to live until
 * mooncake_store_result_free(). Since 0.1. */
int32_t mooncake_store_result_read(mooncake_store_result_t *result,
                                   const mooncake_store_report_t **report);

/* Frees a result, not the payload it tells of: memory that a get allocated stays until
 * mooncake_store_delete_replica(). Since 0.1. */
int32_t mooncake_store_result_free(mooncake_store_result_t *result);

/* ---- Offering ----------------------------------------------------------------------------- */

/* Fill with mooncake_store_register_options_init(), then change what matters. Null or 0: the
 * default; a null pointer to it: all defaults. */
typedef struct mooncake_store_register_options {
  uint32_t struct_size; /* sizeof(mooncake_store_register_options_t) */
  uint32_t create_only; /* 1: EXISTS if the name is taken, instead of a new version of it */
  uint64_t shard_bytes; /* default: by the payload's size. At most 1,048,576 shards */
  const char *location; /* device the memory is near, as in mooncake_memory_register() */
  uint32_t writable;    /* 1: peers may write into it in place; it has no digests, and only this
                           store holds it */
  uint32_t reserved;    /* 0 */
} mooncake_store_register_options_t;

/* Writes the defaults. struct_size is sizeof(mooncake_store_register_options_t). Since 0.1. */
int32_t mooncake_store_register_options_init(mooncake_store_register_options_t *options,
                                             uint32_t struct_size);

/* Offers count buffers (1 to 65,536), laid end to end, as the payload called name; others find it
 * when this returns. The memory stays the caller's: it must not be registered with the engine by
 * mooncake_memory_register(), and must stay mapped and, unless it is writable, unchanged until
 * mooncake_store_unregister() or mooncake_store_destroy(). The same buffers may be in several
 * payloads of a store. If the name is registered already, by this store or another, it gets a new
 * version; what this store offered under it before is withdrawn. Should a process of this host be
 * stuck in the middle of a copy of that memory, the new version stands, the log names the process,
 * and the former memory must be kept until mooncake_store_unregister() of the name has succeeded.
 * *result (result may be null) is the caller's. Errors: EXISTS (create_only; or this store has got
 * it: delete that replica first), BUSY (another call of this store works on the name, or memory
 * stays in use: see mooncake_store_unregister()), OVERLAP, OUT_OF_MEMORY. Since 0.1. */
int32_t mooncake_store_register(mooncake_store_t *store, const char *name,
                                const mooncake_buffer_t *buffers, uint64_t count,
                                const mooncake_store_register_options_t *options,
                                const mooncake_store_operation_t *operation,
                                mooncake_store_result_t **result);

/* Withdraws what this store has registered: readers get drain_ms to finish, later ones an error.
 * When it returns, nobody reads the memory and nobody will, also when it fails for another reason
 * than NOT_HELD or BUSY. Replicas that others have stay. Errors: NOT_HELD; BUSY if another call of
 * this store works on the name, or if a process of this host has been in the middle of a copy until
 * the deadline or the cancel and may still touch the memory, which is not offered any more: keep
 * it, and call again. Likewise BUSY of a register or get that fails. Since 0.1. */
int32_t mooncake_store_unregister(mooncake_store_t *store, const char *name,
                                  const mooncake_store_operation_t *operation);

/* ---- Getting ------------------------------------------------------------------------------ */

/* Fill with mooncake_store_get_options_init(), then change what matters. Null or 0: the default; a
 * null pointer to it: all defaults. */
typedef struct mooncake_store_get_options {
  uint32_t struct_size;     /* sizeof(mooncake_store_get_options_t) */
  uint32_t follow_versions; /* 1: starts over when the name gets a new version and nobody holds the
                               old one any more, instead of failing */
  const char *version;      /* only this version, 32 hexadecimal digits; default: the present one */
  const char *location;     /* where engine-allocated memory comes from, as in
                               mooncake_memory_allocate() */
  uint32_t receive_only;    /* 1: offers nothing of it to others, neither while it arrives nor
                               afterwards */
  uint32_t reserved;        /* 0 */
} mooncake_store_get_options_t;

/* Writes the defaults. struct_size is sizeof(mooncake_store_get_options_t). Since 0.1. */
int32_t mooncake_store_get_options_init(mooncake_store_get_options_t *options,
                                        uint32_t struct_size);

/* Gets a whole payload from all who hold it, verifies every shard, and is a holder from then on
 * (see receive_only). It goes into count buffers of the caller, laid end to end, whose lengths add
 * up to the payload's size and each of which takes whole shards; they must stay mapped and
 * unchanged until mooncake_store_delete_replica() or mooncake_store_destroy(). With buffers null
 * and count 0 the engine allocates memory, which those two free and *result tells. *result is the
 * caller's; result may be null if buffers is not. A get that fails leaves nothing registered,
 * listed or allocated; the caller's buffers may then hold anything.
 * Errors: NOT_FOUND, SIZE_MISMATCH, DIGEST_MISMATCH, NO_HOLDER, EXISTS (this store holds it
 * already), BUSY, OVERLAP, OUT_OF_MEMORY. Since 0.1. */
int32_t mooncake_store_get(mooncake_store_t *store, const char *name,
                           const mooncake_buffer_t *buffers, uint64_t count,
                           const mooncake_store_get_options_t *options,
                           const mooncake_store_operation_t *operation,
                           mooncake_store_result_t **result);

/* Gives up what this store has got: withdraws it as mooncake_store_unregister() does, and frees the
 * memory if the engine allocated it. Errors: NOT_HELD, BUSY. Since 0.1. */
int32_t mooncake_store_delete_replica(mooncake_store_t *store, const char *name,
                                      const mooncake_store_operation_t *operation);

/* Takes the name away: every store stops offering what it has of it, at the latest after a third of
 * the lease in the metadata service; until then it may still be found. Memory stays with those who
 * have it until they unregister or delete it, which is BUSY while their store withdraws it.
 * Errors: NOT_FOUND. Since 0.1. */
int32_t mooncake_store_remove(mooncake_store_t *store, const char *name,
                              const mooncake_store_operation_t *operation);

/* ---- Looking ------------------------------------------------------------------------------ */

/* Finds every payload whose name begins with prefix (null or "": all), in order of name. *result is
 * the caller's. Since 0.1. */
int32_t mooncake_store_list(mooncake_store_t *store, const char *prefix,
                            const mooncake_store_operation_t *operation,
                            mooncake_store_result_t **result);

/* Finds one payload and who holds it. *result is the caller's. Errors: NOT_FOUND. Since 0.1. */
int32_t mooncake_store_stat(mooncake_store_t *store, const char *name,
                            const mooncake_store_operation_t *operation,
                            mooncake_store_result_t **result);

/* Reads length bytes at offset of a payload into buffer, in place from any holder, without becoming
 * one. They are not checked against digests, which are of whole shards. Errors: NOT_FOUND,
 * NO_HOLDER; INVALID_ARGUMENT beyond its end. Since 0.1. */
int32_t mooncake_store_read(mooncake_store_t *store, const char *name, uint64_t offset,
                            void *buffer, uint64_t length,
                            const mooncake_store_operation_t *operation);

/* Writes length bytes of data at offset of a writable payload, in the memory of its only holder.
 * Concurrent writes and reads of the same bytes mix. Errors: NOT_FOUND, NO_HOLDER, ACCESS_DENIED
 * (not writable); INVALID_ARGUMENT beyond its end. Since 0.1. */
int32_t mooncake_store_write(mooncake_store_t *store, const char *name, uint64_t offset,
                             const void *data, uint64_t length,
                             const mooncake_store_operation_t *operation);

/* ---- Watching ----------------------------------------------------------------------------- */

enum {
  MOONCAKE_CHANGE_APPEARED = 0, /* a name is new, or there when the watch begins */
  MOONCAKE_CHANGE_CHANGED = 1,  /* a name has a new version */
  MOONCAKE_CHANGE_VANISHED = 2  /* a name is gone; of *payload only the name is set */
};

/* Called on a thread of the library, one call at a time for a watch; one that is slow delays later
 * changes. kind: MOONCAKE_CHANGE_*. *payload is valid until it returns. May call any function but
 * mooncake_engine_destroy(), mooncake_store_destroy() and mooncake_store_watch_destroy(): they wait
 * for callbacks, so that called from one they do nothing and return INVALID_ARGUMENT. */
typedef void (*mooncake_store_watch_callback_t)(int32_t kind,
                                                const mooncake_payload_info_t *payload,
                                                void *context);

typedef struct mooncake_store_watch mooncake_store_watch_t;

/* Calls callback with each payload whose name begins with prefix (null or "": all), as APPEARED,
 * and with every later change of one, but not for payloads of Mooncake's Go store, which
 * mooncake_store_list() shows. The caller owns *watch and ends it with
 * mooncake_store_watch_destroy(); mooncake_store_destroy() silences it, too. context must last
 * until either has returned: then no callback is running and none will run. Errors:
 * INVALID_ARGUMENT, INVALID_HANDLE (a store that is being destroyed), FULL (1,024 watches), SYSTEM.
 * A metadata service that cannot be reached is waited for. Since 0.1. */
int32_t mooncake_store_watch_create(mooncake_store_t *store, const char *prefix,
                                    mooncake_store_watch_t **watch,
                                    mooncake_store_watch_callback_t callback, void *context);

/* Ends a watch. When it returns, its callback is not running and will not be called again. Not from
 * a callback of the library: INVALID_ARGUMENT. Since 0.1. */
int32_t mooncake_store_watch_destroy(mooncake_store_watch_t *watch);

#ifdef __cplusplus
}
#endif
#endif
