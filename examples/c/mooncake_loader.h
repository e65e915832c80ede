/* Loads libmooncake.so at run time, so that a program can be built and started without it. */
#ifndef MOONCAKE_LOADER_H
#define MOONCAKE_LOADER_H

#include <mooncake.h>
#include <stddef.h>

/* The functions that the examples use, under their names without the prefix. */
typedef struct mooncake_library {
  void *handle;
  const char *(*version)(void);
  const char *(*error_name)(int32_t code);
  const char *(*error_message)(void);
  int32_t (*engine_options_init)(mooncake_engine_options_t *options, uint32_t struct_size);
  int32_t (*engine_create)(const mooncake_engine_options_t *options, mooncake_engine_t **engine);
  int32_t (*engine_destroy)(mooncake_engine_t *engine);
  int32_t (*engine_name)(mooncake_engine_t *engine, char *buffer, uint64_t capacity,
                         uint64_t *length);
  int32_t (*engine_metrics)(mooncake_engine_t *engine, char *buffer, uint64_t capacity,
                            uint64_t *length);
  int32_t (*memory_register)(mooncake_engine_t *engine, void *address, uint64_t length,
                             const char *location, uint32_t access);
  int32_t (*memory_unregister)(mooncake_engine_t *engine, void *address);
  int32_t (*memory_allocate)(mooncake_engine_t *engine, uint64_t length, const char *location,
                             uint32_t access, void **address);
  int32_t (*memory_free)(mooncake_engine_t *engine, void *address);
  int32_t (*segment_open)(mooncake_engine_t *engine, const char *name, uint64_t timeout_ms,
                          mooncake_segment_t *segment);
  int32_t (*segment_close)(mooncake_engine_t *engine, mooncake_segment_t segment);
  int32_t (*segment_buffers)(mooncake_engine_t *engine, mooncake_segment_t segment,
                             mooncake_remote_buffer_t *buffers, uint64_t capacity,
                             uint64_t *count);
  int32_t (*batch_create)(mooncake_engine_t *engine, uint64_t capacity, mooncake_batch_t *batch);
  int32_t (*batch_submit)(mooncake_engine_t *engine, mooncake_batch_t batch,
                          const mooncake_transfer_request_t *requests, uint64_t count,
                          uint64_t timeout_ms);
  int32_t (*batch_poll)(mooncake_engine_t *engine, mooncake_batch_t batch,
                        mooncake_batch_status_t *status);
  int32_t (*batch_wait)(mooncake_engine_t *engine, mooncake_batch_t batch, uint64_t timeout_ms,
                        mooncake_batch_status_t *status);
  int32_t (*batch_free)(mooncake_engine_t *engine, mooncake_batch_t batch);
} mooncake_library_t;

/* Opens the library at path; null: the path in the environment variable MOONCAKE_LIBRARY, or
 * libmooncake.so.0 wherever the dynamic linker finds it. Returns 0, or -1 with the reason in
 * error. */
int mooncake_library_open(mooncake_library_t *library, const char *path, char *error,
                          size_t capacity);

/* Closes the library; all engines must have been destroyed. */
void mooncake_library_close(mooncake_library_t *library);

#endif
