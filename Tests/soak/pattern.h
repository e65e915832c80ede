/* Bytes computed from a key and their offset, and random numbers from a seed. */
#ifndef SOAK_PATTERN_H
#define SOAK_PATTERN_H

#include <stdint.h>
#include <string.h>

static inline uint64_t pattern_mix(uint64_t value) {
  value += 0x9E3779B97F4A7C15u;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
  return value ^ (value >> 31);
}

/* Little-endian bytes of this word are the pattern at 8 * index. */
static inline uint64_t pattern_word(uint64_t key, uint64_t index) {
  uint64_t word = (key + index) * 0x9E3779B97F4A7C15u;
  return word ^ (word >> 32);
}

static inline unsigned char pattern_byte(uint64_t key, uint64_t offset) {
  return (unsigned char)(pattern_word(key, offset / 8) >> (offset % 8 * 8));
}

/* Writes the bytes offset... of the pattern. */
static inline void pattern_fill(unsigned char *memory, uint64_t key, uint64_t offset,
                                uint64_t length) {
  uint64_t done = 0;
  for (; done < length && (offset + done) % 8 != 0; done += 1) {
    memory[done] = pattern_byte(key, offset + done);
  }
  for (; done + 8 <= length; done += 8) {
    uint64_t word = pattern_word(key, (offset + done) / 8);
    memcpy(memory + done, &word, 8);
  }
  for (; done < length; done += 1) memory[done] = pattern_byte(key, offset + done);
}

/* The index of the first byte that differs, or length. */
static inline uint64_t pattern_check(const unsigned char *memory, uint64_t key, uint64_t offset,
                                     uint64_t length) {
  uint64_t done = 0;
  for (; done < length && (offset + done) % 8 != 0; done += 1) {
    if (memory[done] != pattern_byte(key, offset + done)) return done;
  }
  for (; done + 8 <= length; done += 8) {
    uint64_t word;
    memcpy(&word, memory + done, 8);
    if (word != pattern_word(key, (offset + done) / 8)) break;
  }
  for (; done < length; done += 1) {
    if (memory[done] != pattern_byte(key, offset + done)) return done;
  }
  return length;
}

/* A random number generator; its state is a seed. */
static inline uint64_t random_next(uint64_t *state) {
  *state += 0x9E3779B97F4A7C15u;
  return pattern_mix(*state);
}

/* From 0 up to bound - 1. */
static inline uint64_t random_below(uint64_t *state, uint64_t bound) {
  return random_next(state) % bound;
}

/* From 1 to limit, all orders of magnitude equally often; now and then exactly the limit. */
static inline uint64_t random_length(uint64_t *state, uint64_t limit) {
  unsigned bits = 0;
  while (bits < 63 && limit >> bits > 1) bits += 1;
  if (random_below(state, 8) == 0) return limit;
  uint64_t top = (uint64_t)1 << random_below(state, bits + 1);
  uint64_t length = top + random_below(state, top);
  return length < limit ? length : limit;
}

#endif
