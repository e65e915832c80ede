// Compiled into its users, so that the library does not need libxxhash at load time. Swift does not
// see the macros that rename its functions, but sees these wrappers.
#ifndef MOONCAKE_XXHASH_SHIM_H
#define MOONCAKE_XXHASH_SHIM_H

#define XXH_INLINE_ALL
#if defined(__x86_64__)
// Adds the AVX2 variants beside those that every x86-64 processor can run.
#include <immintrin.h>
#define XXH_DISPATCH_AVX2 1
#define XXH_TARGET_AVX2 __attribute__((target("avx2")))
#endif
#include <xxhash.h>

// Opaque: Swift cannot import a type with cache-line alignment.
typedef struct xxhash_state xxhash_state_t;

static inline xxhash_state_t *xxhash_create(void) {
  return (xxhash_state_t *)XXH3_createState();
}

static inline void xxhash_free(xxhash_state_t *hash) { XXH3_freeState((XXH3_state_t *)hash); }

static inline void xxhash_reset(xxhash_state_t *hash) {
  XXH3_128bits_reset((XXH3_state_t *)hash);
}

static inline void xxhash_update(xxhash_state_t *hash, const void *bytes, size_t count) {
  XXH3_128bits_update((XXH3_state_t *)hash, bytes, count);
}

#if defined(__x86_64__)

// The same function with AVX2; call it only if xxhash_has_avx2 says so.
static inline XXH_TARGET_AVX2 void xxhash_update_avx2(
  xxhash_state_t *hash, const void *bytes, size_t count) {
#if XXH_VERSION_NUMBER >= 802
#define XXHASH_ACCUMULATE_AVX2 XXH3_accumulate_avx2
#else
#define XXHASH_ACCUMULATE_AVX2 XXH3_accumulate_512_avx2
#endif
  XXH3_update((XXH3_state_t *)hash, (const xxh_u8 *)bytes, count, XXHASH_ACCUMULATE_AVX2,
              XXH3_scrambleAcc_avx2);
}

static inline int xxhash_has_avx2(void) { return __builtin_cpu_supports("avx2") != 0; }

#else

static inline void xxhash_update_avx2(xxhash_state_t *hash, const void *bytes, size_t count) {
  xxhash_update(hash, bytes, count);
}

static inline int xxhash_has_avx2(void) { return 0; }

#endif

static inline void xxhash_digest(const xxhash_state_t *hash, uint64_t *high, uint64_t *low) {
  XXH128_hash_t digest = XXH3_128bits_digest((const XXH3_state_t *)hash);
  *high = digest.high64;
  *low = digest.low64;
}

#endif
