/* SHA-256 of memory as lower-case hexadecimal digits, through OpenSSL. */
#ifndef EXAMPLE_SHA256_H
#define EXAMPLE_SHA256_H

#include <stddef.h>

#define SHA256_TEXT_SIZE 65

/* Returns 0, or -1 if OpenSSL fails. */
int sha256_text(const void *bytes, size_t count, char text[SHA256_TEXT_SIZE]);

#endif
