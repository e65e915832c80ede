// Compiled into its users, so that the library needs no libxxhash to load. The macros that rename
// its functions are not seen from Swift; these are.
#ifndef MOONCAKE_XXHASH_SHIM_H
#define MOONCAKE_XXHASH_SHIM_H

#define XXH_INLINE_ALL
#include <xxhash.h>

typedef struct {
  XXH3_state_t state;
} xxhash_state_t;

static inline void xxhash_reset(xxhash_state_t *hash) { XXH3_128bits_reset(&hash->state); }

static inline void xxhash_update(xxhash_state_t *hash, const void *bytes, size_t count) {
  XXH3_128bits_update(&hash->state, bytes, count);
}

static inline void xxhash_digest(const xxhash_state_t *hash, uint64_t *high, uint64_t *low) {
  XXH128_hash_t digest = XXH3_128bits_digest(&hash->state);
  *high = digest.high64;
  *low = digest.low64;
}

static inline xxhash_state_t *xxhash_create(void) {
  return (xxhash_state_t *)XXH3_createState();
}

static inline void xxhash_free(xxhash_state_t *hash) { XXH3_freeState((XXH3_state_t *)hash); }

#endif
